"""A subscriber's process: reads events, runs the handler, reports. One thread, one stream, one board."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from mphub import failpoints
from mphub.connection import Address, connection_to
from mphub.core.delivery import DONE, FAILED, FILTERED, HANDLED, RUNNING
from mphub.core.rows import event_of
from mphub.core.spans import spans_of
from mphub.errors import HubError, Reject, RetryLater
from mphub.events import Event, EventId
from mphub.procs import handlers
from mphub.procs.outputs import Outputs
from mphub.reply import Reply
from mphub.store.blobs import Blobs
from mphub.store.board import READY, RECALLED, SLOTS, Board
from mphub.subscriber import holder
from mphub.wire import codec, frames
from mphub.wire.frames import (
    Batch,
    Deliver,
    Failure,
    HelloSubscriber,
    ReplyRow,
    Report,
    Welcome,
    decoder,
    encode,
    split,
    views,
)
from mphub.wire.payloads import CODECS
from mphub.wire.specs import Spec
from mphub.wire.stream import Frame, Line

REPORT_AFTER: Final = 0.001
"""Seconds that outputs and replies wait for company."""
OUTPUT_BYTES: Final = 48 << 10
_deliver, _welcome, _confirmed = decoder(Deliver), decoder(Welcome), decoder(int)


class Stopped(BaseException):
    """SIGTERM came: leave at the next bytecode."""


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
        self.unconfirmed: deque[tuple[int, int, bytes]] = deque()
        """(frame, upto, bytes)."""
        self.failures: list[Failure] = []
        self.replies: list[ReplyRow] = []
        self.filtered: list[int] = []
        self.frame = 0
        self.claims: deque[tuple[int, int, list[int] | None]] = deque()
        """(first delivery number, count, offsets in there unless all) of what it has run and does not know to be committed."""
        self.generation = 0
        self.upto = 0
        self.last_report = 0.0
        self.started = 0.0
        self.ran, self.seconds = 0, 0.0
        """Events run since the last report, and how long they took."""
        self.unsaved = 0
        self.last_snapshot = 0.0
        self.deliver: Deliver | None = None
        self.batch: Batch | None = None
        """That of the delivery, once somebody has asked for a key of it."""
        self.is_ready = False
        self.offsets: Sequence[int] = ()
        self.events: list[Any] = []
        self.loads = self.codec.loads
        self.last = 0

    # -- life

    def run(self) -> None:
        """Set up, handle events until asked to stop, tear down."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _raise_stopped)
        os.register_at_fork(after_in_child=_end_as_usual)
        holder.context = self
        self._set_up()
        self._begin(self._enter())
        for deliver, body in self._deliveries():
            self._handle(deliver, body)
        self._tear_down()

    def _set_up(self) -> None:
        """Load the handler and let it prepare; nobody waits for this process yet, and another one may still be at work in its place."""
        if self.spec.initializer:
            codec.loads(self.spec.initializer)()
        data = self.blobs.read(self.spec.handler_blob) if self.spec.handler_blob else self.spec.handler
        self.work = handlers.loads(data)
        self.runner = handlers.load(self.work, self.name, self.replica)
        self.runner.call = failpoints.between("worker.running", self.runner.call, "worker.returned")
        self.plain = self.work.to is None and self.spec.snapshot is None and self.runner.wants is None
        if self.runner.subscriber is not None:
            self.runner.subscriber.setup()
        failpoints.hit("worker.set_up")

    def _begin(self, welcome: Welcome) -> None:
        """Take up the state that was committed last, and ask for events."""
        state = self.blobs.copy(welcome.blob) if welcome.blob else welcome.snapshot
        if state and self.runner.subscriber is not None:
            self.runner.subscriber.restore(codec.load_any(state))
        self.last_snapshot = time.monotonic()
        self.is_ready = True
        self.board.set_flag(READY)
        self._commit_outputs()
        failpoints.hit("worker.begun")
        self._send(frames.READY)

    def _tear_down(self) -> None:
        failpoints.hit("worker.stopping")
        if self._has_news:
            self._report()
        if self.runner.subscriber is not None:
            self.runner.subscriber.teardown()
        self._commit_outputs()
        self.runner.close()
        deadline = time.monotonic() + 5.0
        while self.unconfirmed and time.monotonic() < deadline and (got := self._receive()) is not None:
            self._digest(*got)

    def _commit_outputs(self) -> None:
        """Report what ``setup`` or ``teardown`` published."""
        self.outputs.keep(0)
        if self.outputs.size:  # kept, though perhaps not packed yet
            self._report()

    # -- the stream

    def _enter(self) -> Welcome:
        """Connect and say what this process holds; the router answers with the snapshot."""
        while True:
            try:
                line = Line.connect(self.address.data)
                hello = HelloSubscriber(
                    self.address.token, self.incarnation, self.is_ready, list(self._runs_claimed()), self.generation, self.frame
                )
                line.send(frames.HELLO_SUBSCRIBER, encode(hello))
            except OSError:
                time.sleep(0.01)  # between two routers; without a supervisor this process dies anyway
                continue
            got = line.receive()
            if got is not None and got[0] == frames.WELCOME:
                self.line = line
                welcome = _welcome.decode(got[1])
                self._forget_confirmed(welcome.confirmed)
                failpoints.hit("worker.welcome")
                return welcome
            line.close()
            time.sleep(0.01)

    def _receive(self) -> Frame | None:
        """Return the next frame; when the router has died, connect to its successor and resend what was not confirmed."""
        while True:
            assert self.line is not None
            if self._has_news and not self.line.has_frame():
                self._report()  # idle: what waited for a snapshot goes now
            got = self.line.receive()
            if got is not None:
                return got
            self.line.close()
            self._enter()
            for _, _, data in self.unconfirmed:
                self._write(data)

    @property
    def _has_news(self) -> bool:
        """Say whether something waits for a snapshot that is not due."""
        return bool(self.unsaved or self.failures or self.filtered)

    def _deliveries(self) -> Iterator[tuple[Deliver, bytes]]:
        while (got := self._receive()) is not None:
            kind, header, body = got
            if kind == frames.STOP:
                return
            if kind == frames.DELIVER:
                deliver = _deliver.decode(header)
                self._forget_confirmed(deliver.confirmed)
                if deliver.generation < self.generation:
                    continue  # handed out before this process gave everything back
                self.generation = deliver.generation
                self.claims.append((deliver.number, deliver.count, deliver.chosen))
                yield deliver, body
            else:
                self._digest(kind, header, body)

    def _digest(self, kind: int, header: bytes, _: bytes) -> None:
        if kind == frames.REPORT_CONFIRM:
            self._forget_confirmed(_confirmed.decode(header))

    def _forget_confirmed(self, frame: int) -> None:
        upto = 0
        while self.unconfirmed and self.unconfirmed[0][0] <= frame:
            upto = self.unconfirmed.popleft()[1]
        while self.claims and self.claims[0][0] + self.claims[0][1] <= upto:
            self.claims.popleft()

    def _runs_claimed(self) -> Iterator[tuple[int, int]]:
        """Yield (first delivery number, count) of what is claimed: what lies in between may be another replica's."""
        for first, count, chosen in self.claims:
            runs = [(0, count)] if chosen is None else spans_of(offset for offset in chosen if offset < count)
            yield from ((first + a, b - a) for a, b in runs)

    def _send(self, kind: int, header: bytes = b"") -> None:
        self._write(frames.frame(kind, header))

    def _write(self, data: bytes) -> None:
        assert self.line is not None
        failpoints.hit("worker.half_sent", self.line.sock.send, data)
        try:
            self.line.sock.sendall(data)
        except OSError:
            return  # the router is gone: reading finds out, after what it had sent

    # -- handling

    def _handle(self, deliver: Deliver, body: bytes) -> None:
        """Run the handler for the events of one frame, and report."""
        failpoints.hit("worker.read")
        self.batch = None
        self.deliver, self.offsets = deliver, deliver.chosen if deliver.chosen is not None else range(deliver.count)
        self.last = deliver.number + self.offsets[-1]
        self.loads = self.codec.load_any if is_alone(deliver) else self.codec.loads
        self.events = self._from_blob(deliver) if deliver.batch.blob is not None else split(body)
        self.started = time.perf_counter()
        self._run(deliver)
        if deliver.generation != self.generation:
            return  # the rest was given back, and that was reported
        self.upto = deliver.number + deliver.count
        self._measure(len(self.events))
        if self.spec.snapshot is None or self._snapshot_is_due():
            self._report()

    def _measure(self, ran: int) -> None:
        """Note how long some events of the frame took."""
        self.ran += ran
        self.seconds += time.perf_counter() - self.started

    def _from_blob(self, deliver: Deliver) -> list[Any]:
        data = self.blobs.read(deliver.batch.blob or "")
        if deliver.batch.count == 1:
            return [data]
        events = views(data)
        return [events[deliver.index + i] for i in self.offsets]

    def _run(self, deliver: Deliver) -> None:
        """Run all events, going on behind each that fails."""
        run = self._run_plain if self.plain and not deliver.batch.reply else self._run_fully
        slots = slots_of(deliver.number, self.offsets)
        at = 0
        while at < len(slots):
            failed = run(slots, at)
            if failed is None or self.generation != deliver.generation:
                return
            at = failed + 1

    def _run_plain(self, slots: Sequence[int], at: int) -> int | None:
        """Run events whose results nobody wants; return the place of one that raised.

        No clock, no context variable and no method call per event: this loop is the rate.
        """
        states, call, loads, fresh = self.board.map, self.runner.call, self.loads, self.outputs.fresh
        slot = slots[at]
        try:
            for data, slot in zip(self.events[at:], slots[at:], strict=True):
                if states[RECALLED]:
                    break
                states[slot] = RUNNING
                call(loads(data))
                if fresh:
                    states[slot] = HANDLED
                    self._after_output(slots.index(slot))
                else:
                    states[slot] = DONE
            else:
                return None
        except BaseException as error:
            return self._raised(slots.index(slot), error)
        return self._give_back(slots.index(slot))

    def _run_fully(self, slots: Sequence[int], at: int) -> int | None:
        """Run events that a filter may not want, whose results go somewhere, or whose state is kept by snapshots."""
        states, call, loads, fresh = self.board.map, self.runner.call, self.loads, self.outputs.fresh
        saves, wants = self.spec.snapshot is not None, self.runner.wants
        slot = slots[at]
        try:
            for data, slot in zip(self.events[at:], slots[at:], strict=True):
                if states[RECALLED]:
                    break
                states[slot] = RUNNING
                place = slots.index(slot)
                payload = loads(data)
                if wants is not None and not wants(payload):
                    states[slot] = FILTERED
                    self._filter_out(place)
                    continue
                if self._keep_result(self.offsets[place], call(payload)) or fresh or saves:
                    states[slot] = HANDLED
                    self._after_output(place)
                else:
                    states[slot] = DONE
            else:
                return None
        except BaseException as error:
            return self._raised(slots.index(slot), error)
        return self._give_back(slots.index(slot))

    def _filter_out(self, place: int) -> None:
        """Note an event that is not wanted, for the next report."""
        assert self.deliver is not None
        self.outputs.fresh.clear()
        self.filtered.append(self.deliver.number + self.offsets[place])
        self.unsaved += self.spec.snapshot is not None

    def _keep_result(self, offset: int, result: object) -> bool:
        """Publish a result under ``to`` and answer a request; say whether it did the latter."""
        assert self.deliver is not None
        deliver = self.deliver
        if self.work.to is not None and result is not None:
            self.outputs.publish(self.work.to, self.codec.encode_apart(result, "result"), None)
        if not deliver.batch.reply:
            return False
        data, blob = self.blobs.spill(self.codec.encode_apart(result, "result"))
        number = deliver.batch.number + deliver.index + offset
        self.replies.append(ReplyRow(deliver.batch.publisher, number, "ok", data, blob))
        return True

    def _after_output(self, place: int) -> None:
        """Let outputs go as one report once they are many or a millisecond old; the frame's last go with its end."""
        assert self.deliver is not None
        self.outputs.keep(self.deliver.epoch)
        number = self.deliver.number + self.offsets[place]
        self.upto = number + 1
        if self.spec.snapshot is not None:
            self.unsaved += 1
            if number != self.last and self._snapshot_is_due():
                self._report()
        elif number != self.last and (self.outputs.size > OUTPUT_BYTES or time.monotonic() - self.last_report > REPORT_AFTER):
            self._report()

    def _snapshot_is_due(self) -> bool:
        rule = self.spec.snapshot
        assert rule is not None
        return self.unsaved >= rule.every or time.monotonic() - self.last_snapshot >= rule.period

    # -- failing

    def _raised(self, place: int, error: BaseException) -> int:
        """Deal with what a handler raised; what ends a process ends this one."""
        assert self.deliver is not None
        number = self.deliver.number + self.offsets[place]
        self.outputs.fresh.clear()
        if not isinstance(error, SystemExit | Stopped):
            self._failed(place, error)
            return place
        self.upto = number
        if self.spec.snapshot is None and (self.outputs.kept or self.outputs.size or self.replies or self.failures):
            self._report()  # what is finished is committed first
        raise error

    def _failed(self, place: int, error: BaseException) -> None:
        """Note a failure; a retry without delay goes before everything that this process holds, an ordered one before its key's events."""
        assert self.deliver is not None
        number = self.deliver.number + self.offsets[place]
        self.board.map[Board.base + number % SLOTS] = FAILED
        retry, delay = handlers.retry_after(self.work, error, self._attempt(number))
        reason = {Reject: "rejected", RetryLater: "later"}.get(type(error), "exception")
        text = codec.traceback_text(error)
        self.failures.append(Failure.here(number, reason, codec.encode_error(error), text, retry, delay))
        self.upto = number + 1
        if retry and (delay <= 0 or self.spec.ordered):
            self._return_rest(place + 1)
        elif len(self.failures) >= 16:
            self._report()

    def _give_back(self, place: int) -> int:
        """Return what has not started, from one place of the frame on: the router wants it back."""
        assert self.deliver is not None
        self.upto = self.deliver.number + self.offsets[place]
        self._return_rest(place)
        return place

    def _return_rest(self, ran: int) -> None:
        """Report what has run, and that all the rest that this process holds, here and under way, is the router's again."""
        first, _, chosen = self.claims.pop()
        if self.upto > first:  # else nothing of the frame was started
            self.claims.append((first, self.upto - first, chosen))
        self._measure(ran)
        self._report(returned=True)
        self.generation += 1

    def _attempt(self, number: int) -> int:
        assert self.deliver is not None
        index = self.deliver.index + number - self.deliver.number
        return (self.deliver.attempts or {}).get(index, 1)

    # -- reporting

    def _report(self, *, returned: bool = False) -> None:
        """Send acks, failures, outputs, replies and snapshot as one numbered frame."""
        failpoints.hit("worker.reporting")
        snapshot, blob = self._take_snapshot()
        self.frame += 1
        report = Report(
            self.frame, self.upto, self.ran, self.seconds, self.failures, self.outputs.take(), self.replies,
            snapshot, blob, returned, self.generation, self.filtered,
        )  # fmt: skip
        data = frames.frame(frames.REPORT, encode(report))
        self.failures, self.replies, self.filtered, self.ran, self.seconds = [], [], [], 0, 0.0
        self.last_report = time.monotonic()
        self.unconfirmed.append((self.frame, self.upto, data))
        self._write(data)
        failpoints.hit("worker.reported")

    def _take_snapshot(self) -> tuple[bytes | None, str | None]:
        if self.spec.snapshot is None or self.runner.subscriber is None or not self.unsaved:
            return None, None
        self.unsaved = 0
        self.last_snapshot = time.monotonic()
        data, blob = self.blobs.spill(codec.encode_apart(self.runner.subscriber.snapshot(), "snapshot"))
        return (data, None) if blob is None else (None, blob)

    # -- what a handler may ask (Context)

    def publish(self, key: str, payload: object, extra: frames.Extra | None, *, now: bool) -> EventId:
        if now:
            epoch = self.deliver.epoch if self.deliver is not None else 0
            return connection_to(self.address).publish(key, payload, extra, epoch=epoch)
        data = self.codec.encode_apart(payload)
        if isinstance(data, codec.Parts):
            data = bytes(data)  # it goes out when the handler returns, which may change the payload until then
        return EventId.make(self.incarnation, self.outputs.publish(key, data, extra))

    def publish_together(self, events: list[tuple[str, bytes, frames.Extra | None]]) -> None:
        self.outputs.publish_together(events)

    def request(self, key: str, payload: object, target: str | None, extra: frames.Extra | None = None) -> Reply[object]:
        handlers.check_other(self.spec, key, target)
        return connection_to(self.address).request(key, payload, target, extra)

    def current_event(self) -> Event:
        """Build the event from the delivery and the state bytes."""
        slot = self.board.running_slot()
        if self.deliver is None or slot is None:
            raise HubError("mphub.current_event: no event is being handled; it works in handle(payload), not in setup or teardown")
        offset = (slot - self.deliver.number) % SLOTS
        data = self.events[self.offsets.index(offset)]
        if is_alone(self.deliver):  # the handler may have changed what it got: a view of that map
            data = self.blobs.read(self.deliver.batch.blob or "")
        if self.batch is None:
            self.batch = self.deliver.batch.read()
        payload = self.loads(data)
        attempt = self._attempt(self.deliver.number + offset)
        cancelled = self.board.is_cancelled(self.deliver.number + offset)
        return event_of(self.batch, self.deliver.index + offset, payload, attempt, self.replica, cancelled=cancelled)


def is_alone(deliver: Deliver) -> bool:
    """Say whether it is one event that is a file of its own; the file of several holds a body."""
    return deliver.batch.blob is not None and deliver.batch.count == 1


def slots_of(number: int, offsets: Sequence[int]) -> Sequence[int]:
    """Return where in the board's map the states of delivery numbers are."""
    first = number % SLOTS
    if isinstance(offsets, range) and first + len(offsets) <= SLOTS:
        return range(Board.base + first, Board.base + first + len(offsets))
    return [Board.base + (first + offset) % SLOTS for offset in offsets]


def _raise_stopped(*_: object) -> None:
    raise Stopped


def _end_as_usual() -> None:
    """Give a process that a handler forks the usual SIGTERM back, unless the handler has set its own."""
    if signal.getsignal(signal.SIGTERM) is _raise_stopped:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_worker(address: Address, spec: Spec, incarnation: int, replica: int, board: Path, crash: Path) -> int:
    """Be a subscriber's process; return its exit code. What ``setup`` raised is left in the crash file."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mphub.subscriber").setLevel(logging.INFO)
    with open(crash, "wb", buffering=0) as file:
        faulthandler.enable(file)
        worker = Worker(address, spec, incarnation, replica, board)
        try:
            worker.run()
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        except Stopped:
            return 128 + signal.SIGTERM
        except BaseException as error:
            file.write(encode((codec.encode_error(error), codec.traceback_text(error))))
            return 1
        finally:
            faulthandler.disable()
    return 0
