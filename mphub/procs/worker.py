"""A subscriber's process: its life, its stream, its board and its reports. There are several ways to run what it is given."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mphub import failpoints
from mphub.connection import Address, connection_to
from mphub.core.delivery import FAILED
from mphub.core.rows import Head
from mphub.core.spans import Spans, spans_of
from mphub.errors import Reject, RetryLater
from mphub.events import Event, EventId
from mphub.procs import handlers
from mphub.procs.batches import Batches
from mphub.procs.crew import Crew
from mphub.procs.one_by_one import OneByOne
from mphub.procs.outputs import Outputs
from mphub.procs.parcels import Parcel, SharedParcel
from mphub.procs.shelter import Stopped, end_as_usual, end_at_once, listen, shelter
from mphub.procs.ways import Way
from mphub.reply import Reply
from mphub.store.blobs import Blobs
from mphub.store.board import READY, SLOTS, Board
from mphub.subscriber import holder
from mphub.wire import codec, frames
from mphub.wire.frames import Deliver, Failure, HelloSubscriber, ReplyRow, Report, Welcome, decoder, encode, in_rows
from mphub.wire.payloads import CODECS
from mphub.wire.specs import Spec
from mphub.wire.stream import Frame, Line

SOON: Final = 1e-6
"""Seconds: the shortest delay."""
CONFIRMED_WITHIN: Final = 5.0
"""Seconds that the end of a process waits for its last confirms."""
_deliver, _welcome, _confirmed = decoder(Deliver), decoder(Welcome), decoder(int)


class Worker:
    """One incarnation of a subscriber."""

    def __init__(self, address: Address, spec: Spec, incarnation: int, replica: int, board: Path) -> None:
        self.folder, self.codec, self.clock = address.folder, CODECS[address.codec], time.time
        self.address, self.spec, self.name, self.incarnation, self.replica = address, spec, spec.name, incarnation, replica
        self.thread = threading.get_ident()
        self.board = Board(board)
        self.blobs = Blobs(f"{address.folder}/blobs", incarnation, patient=True)
        self.outputs = Outputs(incarnation, self.blobs, address.largest)
        self.line: Line | None = None
        self.way: Way | None = None
        self.unconfirmed: deque[tuple[int, int, bytes, list[int]]] = deque()
        """(frame, upto, bytes, what it names as ended)."""
        self.failures: list[Failure] = []
        self.replies: list[ReplyRow] = []
        self.filtered: list[int] = []
        self.ended: list[int] = []
        """What the next report is to name if something before it has not ended yet."""
        self.slow: list[int] = []
        self.next: list[int] = []
        self.free: list[int] = []
        """Of the subscribers that share it: who has become slow since the last report, wants the next event, is slow no more."""
        self.frame = self.confirmed = 0
        self.claims: deque[tuple[int, int, list[int] | None]] = deque()
        """(first delivery number, count, offsets in there unless all) of what it has run and does not know to be committed."""
        self.generation = 0
        self.upto = 0
        self.last_report = 0.0
        self.ran, self.seconds = 0, 0.0
        """Events run since the last report, and how long they took."""
        self.unsaved = 0
        self.last_snapshot = 0.0
        self.is_ready = False

    # -- life

    def run(self) -> None:
        """Set up, handle events until asked to stop, tear down."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        listen()
        os.register_at_fork(after_in_child=end_as_usual)
        holder.context = self
        way = self._set_up()
        self._begin(self._enter())
        way.run()
        self._tear_down()

    def _set_up(self) -> Way:
        """Load the handler and let it prepare; nobody waits for this process yet, and another one may still be at work in its place."""
        if self.spec.initializer:
            codec.loads(self.spec.initializer)()
        self.work, self.runner = self._load() if not self.spec.hosts else handlers.nothing()
        self.runner.call = failpoints.between("worker.running", self.runner.call, "worker.returned")
        self.way = self._choose_way()
        if self.runner.subscriber is not None:
            self.runner.subscriber.setup()
        failpoints.hit("worker.set_up")
        return self.way

    def _load(self) -> tuple[handlers.Work, handlers.Runner]:
        data = self.blobs.read(self.spec.handler_blob) if self.spec.handler_blob else self.spec.handler
        work = handlers.loads(data)
        return work, handlers.load(work, self.name, self.replica, batched=self.spec.batch is not None)

    def _begin(self, welcome: Welcome) -> None:
        """Take up the state that was committed last, and ask for events."""
        state = self.blobs.copy(welcome.blob) if welcome.blob else welcome.snapshot
        if state and self.runner.subscriber is not None:
            self.runner.subscriber.restore(codec.load_any(state))
        assert self.way is not None
        self.way.prepare()
        self.last_snapshot = time.monotonic()
        self.is_ready = True
        self.board.set_flag(READY)
        self.commit_outputs()
        failpoints.hit("worker.begun")
        self.send(frames.READY)

    def _choose_way(self) -> Way:
        if self.spec.hosts:
            from mphub.procs.hosting import Hosting  # and so asyncio, for these alone

            return Hosting(self)
        if self.spec.concurrency > 1:
            return Crew(self, self.spec.concurrency)
        return OneByOne(self) if self.spec.batch is None else Batches(self, self.spec.batch)

    def _tear_down(self) -> None:
        failpoints.hit("worker.stopping")
        if self._has_news:
            self.report()
        if self.runner.subscriber is not None:
            self.runner.subscriber.teardown()
        if self.way is not None:
            self.way.finish()
        self.commit_outputs()
        self.runner.close()
        deadline = time.monotonic() + CONFIRMED_WITHIN
        while self.unconfirmed and time.monotonic() < deadline:
            self._digest(self.receive())

    def commit_outputs(self) -> None:
        """Report what ``setup`` or ``teardown`` published."""
        self.outputs.keep(0)
        if self.outputs.size:  # kept, though perhaps not packed yet
            self.report()

    # -- the stream

    def _enter(self) -> Welcome:
        """Connect and say what this process holds; the router answers with the snapshot."""
        while True:
            line = self.dial()
            got = line.receive() if line is not None else None
            if line is not None and got is not None and got[0] == frames.WELCOME:
                return self.adopt(line, got[1])
            if line is not None:
                line.close()
            time.sleep(0.01)  # between two routers; without a supervisor this process dies anyway

    def dial(self) -> Line | None:
        """Connect and say what this process holds; return None if nobody listens."""
        claims = list(self.way.claims()) if self.way is not None else []
        hello = HelloSubscriber(self.address.token, self.incarnation, self.is_ready, claims, self.generation, self.frame)
        try:
            line = Line.connect(self.address.data)
            line.send(frames.HELLO_SUBSCRIBER, encode(hello))
        except OSError:
            return None
        return line

    def adopt(self, line: Line, header: bytes) -> Welcome:
        """Go on with a router that has welcomed this process, and send again what it has not confirmed."""
        self.line = line
        welcome = _welcome.decode(header)
        self._forget_confirmed(welcome.confirmed)
        failpoints.hit("worker.welcome")
        for _, _, data, _ in self.unconfirmed:
            self._write(data)
        return welcome

    def receive(self, until: float | None = None) -> Frame:
        """Return the next frame; when the router has died, connect to its successor and resend what was not confirmed.

        Raises TimeoutError: it has not come by then, on the monotonic clock.
        """
        while True:
            if self.line is None:
                self._enter()
            assert self.line is not None
            if self._has_news and not self.line.has_frame():
                self.report()  # idle: what waited for a snapshot goes now
            got = self.line.receive(until)
            if got is not None:
                return got
            self.line.close()
            self.line = None

    @property
    def _has_news(self) -> bool:
        """Say whether something waits for a snapshot that is not due."""
        return bool(self.unsaved or self.failures or self.filtered or self.ended)

    def unpack(self, got: Frame) -> Parcel | None:
        """Return the events that a frame brings, if it is a delivery that counts; anything else is dealt with."""
        kind, header, body = got
        if kind != frames.DELIVER:
            self._digest(got)
            return None
        deliver = _deliver.decode(header)
        self._forget_confirmed(deliver.confirmed)
        if deliver.generation < self.generation:
            return None  # handed out before this process gave everything back
        self.generation = deliver.generation
        if self.spec.concurrency == 1 and self.spec.batch is None and not self.spec.hosts:
            self.claims.append((deliver.number, deliver.count, deliver.chosen))
        failpoints.hit("worker.read")
        return (SharedParcel if self.spec.hosts else Parcel)(deliver, body, self.blobs, self.codec)

    def _digest(self, got: Frame) -> None:
        kind, header, _ = got
        if kind == frames.REPORT_CONFIRM:
            self._forget_confirmed(_confirmed.decode(header))

    def _forget_confirmed(self, frame: int) -> None:
        upto, self.confirmed = 0, max(self.confirmed, frame)
        while self.unconfirmed and self.unconfirmed[0][0] <= frame:
            upto = self.unconfirmed.popleft()[1]
        while self.claims and self.claims[0][0] + self.claims[0][1] <= upto:
            self.claims.popleft()

    def claimed_frames(self) -> Iterator[tuple[int, int]]:
        """Yield (first delivery number, count) of what is claimed: what lies in between may be another replica's."""
        for first, count, chosen in self.claims:
            runs = [(0, count)] if chosen is None else spans_of(offset for offset in chosen if offset < count)
            yield from ((first + a, b - a) for a, b in runs)

    def send(self, kind: int, header: bytes = b"") -> None:
        self._write(frames.frame(kind, header))

    def _write(self, data: bytes) -> None:
        if self.line is None:
            return  # it goes out once there is a router again
        failpoints.hit("worker.half_sent", self.line.sock.send, data)
        try:
            self.line.sock.sendall(data)
        except OSError:
            return  # the router is gone: reading finds out, after what it had sent

    # -- what became of events

    def measure(self, ran: int, started: float) -> None:
        """Note how long some events took, which began at that time of the performance counter."""
        self.ran += ran
        self.seconds += time.perf_counter() - started

    def filter_out(self, number: int) -> None:
        """Note an event that is not wanted, for the next report."""
        self.outputs.fresh.clear()
        self.filtered.append(number)
        self.ended.append(number)
        self.unsaved += self.spec.snapshot is not None

    def keep_result(self, parcel: Parcel, place: int, result: object) -> bool:
        """Publish a result under ``to`` and answer a request; say whether it did the latter."""
        if self.work.to is not None and result is not None:
            self.outputs.publish(self.work.to, self.codec.encode_apart(result, "result"), None)
        if not parcel.deliver.batch.reply:
            return False
        self.answer(parcel, place, self.codec.encode_apart(result, "result"))
        return True

    def answer(self, parcel: Parcel, place: int, result: bytes | codec.Parts) -> None:
        """Let a request have its result."""
        data, blob = self.blobs.spill(result)
        batch = parcel.deliver.batch
        self.replies.append(ReplyRow(batch.publisher, batch.number + parcel.index(place), "ok", data, blob))

    def take_back_answer(self, parcel: Parcel, place: int) -> None:
        """Let a request wait on that has been answered last, if it has: its event runs again."""
        batch = parcel.deliver.batch
        request = (batch.publisher, batch.number + parcel.index(place))
        if batch.reply and self.replies and (self.replies[-1].publisher, self.replies[-1].number) == request:
            self.replies.pop()

    def snapshot_is_due(self) -> bool:
        rule = self.spec.snapshot
        assert rule is not None
        return self.unsaved >= rule.every or time.monotonic() - self.last_snapshot >= rule.period

    def is_the_end(self, error: BaseException) -> bool:
        """Say whether it ends this process: a death, not a failure of the event."""
        return isinstance(error, SystemExit)

    def fail(self, number: int, error: BaseException, attempt: int, work: handlers.Work | None = None, *, soon: bool = False) -> bool:
        """Note a failure; say whether something is to start before everything that this process holds: the event again, or nothing of its
        ordering key.

        ``soon``: others may run beside it, so a retry without delay waits in a row of its own, if only for a moment.
        """
        self.board.map[Board.base + number % SLOTS] = FAILED
        retry, delay = handlers.retry_after(work or self.work, error, attempt)
        delay = max(delay, SOON) if soon else delay
        self.ended.append(number)
        reason = {Reject: "rejected", RetryLater: "later"}.get(type(error), "exception")
        text = codec.traceback_text(error)
        self.failures.append(Failure.here(number, reason, codec.encode_error(error), text, retry, delay))
        return retry and (delay <= 0 or self.spec.ordered)

    # -- reporting

    def report_before_the_end(self) -> None:
        """Let what is finished be committed first."""
        if self.spec.snapshot is None and (self.outputs.kept or self.outputs.size or self.replies or self.failures):
            self.report()

    def return_rest(self) -> None:
        """Report what has run, and that all the rest that this process holds, here and under way, is the router's again."""
        claims = [(first, min(count, self.upto - first), chosen) for first, count, chosen in self.claims]
        self.claims = deque(claim for claim in claims if claim[1] > 0)
        self.report(returned=True)
        self.generation += 1

    def report(self, *, returned: bool = False, still: Spans | None = None) -> None:
        """Send acks, failures, outputs, replies and snapshot as one numbered frame."""
        failpoints.hit("worker.reporting")
        snapshot, blob = self._take_snapshot()
        with shelter:  # else the acks might go with the next one, and the outputs with none
            self.frame += 1
            report = Report(
                self.frame, self.upto, self.ran, self.seconds, self.failures, self.outputs.take(), in_rows(self.replies),
                snapshot, blob, returned, self.generation, self.filtered, self._ended_early(), still or [], self.slow, self.next,
                self.free,
            )  # fmt: skip
            data = frames.frame(frames.REPORT, encode(report))
            self.unconfirmed.append((self.frame, self.upto, data, self.ended))
            self.failures, self.replies, self.filtered, self.ended, self.ran, self.seconds = [], [], [], [], 0, 0.0
            self.slow, self.next, self.free = [], [], []
            self.last_report = time.monotonic()
        self._write(data)
        failpoints.hit("worker.reported")

    def _ended_early(self) -> list[tuple[int, int]]:
        """Return the numbers of what ended before others that came earlier."""
        return spans_of(sorted(number for number in self.ended if number >= self.upto)) if self.ended else []

    def _take_snapshot(self) -> tuple[bytes | None, str | None]:
        if self.spec.snapshot is None or self.runner.subscriber is None or not self.unsaved:
            return None, None
        self.unsaved = 0
        self.last_snapshot = time.monotonic()
        data, blob = self.blobs.spill(codec.encode_apart(self.runner.subscriber.snapshot(), "snapshot"))
        return (data, None) if blob is None else (None, blob)

    # -- what a handler may ask (Context)

    def publish(self, key: str, payload: object, extra: frames.Extra | None, *, now: bool) -> EventId:
        return self.publish_with(self.outputs, key, payload, extra, now=now)

    def publish_with(self, outputs: Outputs, key: str, payload: object, extra: frames.Extra | None, *, now: bool) -> EventId:
        """Let an output be committed with the event that these are of, or send it now."""
        if now:
            epoch = self.way.epoch if self.way is not None else 0
            return connection_to(self.address).publish(key, payload, extra, epoch=epoch)
        data = self.codec.encode_apart(payload)
        if isinstance(data, codec.Parts):
            data = bytes(data)  # it goes out when the handler returns, which may change the payload until then
        return EventId.make(outputs.incarnation, outputs.publish(key, data, extra))

    def publish_together(self, events: list[tuple[str, bytes, frames.Extra | None]]) -> None:
        self.outputs.publish_together(events)

    def event(self, parcel: Parcel, place: int) -> Event:
        """Describe what runs now."""
        return parcel.event(place, self.replica, cancelled=self.board.is_cancelled(parcel.number(place)))

    def request(self, key: str, payload: object, target: str | None, extra: frames.Extra | None = None) -> Reply[object]:
        handlers.check_other(self.spec, key, target)
        return self.ask(key, payload, target, extra)

    def ask(self, key: str, payload: object, target: str | None, extra: frames.Extra | None) -> Reply[object]:
        """Ask another subscriber, at once."""
        return connection_to(self.address).request(key, payload, target, extra)

    def current_events(self) -> list[Event]:
        return self.way.current_events() if self.way is not None else []

    def current_heads(self) -> list[Head]:
        return self.way.current_heads() if self.way is not None else []


def run_worker(address: Address, spec: Spec, incarnation: int, replica: int, board: Path, crash: Path) -> int:
    """Be a subscriber's process; return its exit code. What ``setup`` raised is left in the crash file."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mphub.subscriber").setLevel(logging.INFO)
    with open(crash, "wb", buffering=0) as file:
        faulthandler.enable(file)
        worker = Worker(address, spec, incarnation, replica, board)
        try:
            worker.run()
        except Stopped:
            return 128 + signal.SIGTERM
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            file.write(encode((codec.encode_error(error), codec.traceback_text(error))))
            return 1
        finally:
            end_at_once()
            faulthandler.disable()
    return 0
