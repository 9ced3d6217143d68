"""What the engines without processes share: an exchange in memory, and posts that run handlers in this process."""

from __future__ import annotations

import itertools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from mphub.connection import settle
from mphub.core.delivery import Held
from mphub.core.keys import check_target
from mphub.core.rows import Head, Row, event_of, head_of
from mphub.core.spans import indexes, length
from mphub.errors import HubError, NoSubscriber, Reject, RetryLater
from mphub.events import Event, EventId
from mphub.observe.limiter import Limiter
from mphub.procs import handlers
from mphub.procs.consumer import Consumer
from mphub.procs.exchange import Exchange, News
from mphub.procs.mailbox import Mailbox
from mphub.procs.outputs import Outputs
from mphub.reply import Reply
from mphub.store.blobs import Blobs
from mphub.subscriber import own
from mphub.tap import Basin
from mphub.wire import codec as pickles
from mphub.wire import frames
from mphub.wire.codec import Parts
from mphub.wire.frames import Batch, Extra, Failure, ReplyRow, Report, encode, join
from mphub.wire.open_batch import OpenBatch
from mphub.wire.payloads import Codec
from mphub.wire.specs import Spec

T = TypeVar("T")
NO_FILE = 1 << 62
"""Bytes from which something would be a file."""


class NoBlobs(Blobs):
    """Events stay in memory, whatever their size."""

    def spill(self, data: bytes | Parts) -> tuple[bytes, str | None]:
        return bytes(data), None

    def write(self, data: bytes | Parts) -> str:
        raise HubError("an engine without processes writes no files")

    def of_writer(self, writer: int) -> list[str]:
        return []


class Local(ABC):
    """A hub in one process: its books, and the replies that its users wait for."""

    def __init__(self, folder: str, exchange: Exchange, tell: Callable[..., None], codec: Codec) -> None:
        self.folder, self.exchange, self.tell, self.codec = folder, exchange, tell, codec
        self.limiter = Limiter()
        self.id = random_id()
        self._numbers, self._sequence = itertools.count(1), 0
        self._together = self.new_outputs(random_id())
        """Of transactions: a batch has numbers in a row, whoever publishes beside it."""
        self._replies: dict[int, Reply[object]] = {}

    # -- life

    @abstractmethod
    def subscribe(self, specs: Sequence[Spec]) -> None:
        """Route to some subscribers, and set them up."""

    @abstractmethod
    def replace(self, spec: Spec) -> None:
        """Let another handler have what waits."""

    @abstractmethod
    def unsubscribe(self, name: str, *, drain: bool) -> None: ...

    @abstractmethod
    def restart(self, name: str) -> None: ...

    @abstractmethod
    def pause(self, name: str) -> None: ...

    @abstractmethod
    def resume(self, name: str) -> None: ...

    @abstractmethod
    def scale(self, name: str, replicas: int) -> None: ...

    @abstractmethod
    def set_keys(self, name: str, patterns: list[str]) -> None: ...

    @abstractmethod
    def state_of(self, name: str) -> tuple[str, bytes, str]:
        """Return (state, exception, traceback), the latter of what could not be set up."""

    @abstractmethod
    def stop(self) -> int:
        """End all subscribers; return how many events were given up."""

    @abstractmethod
    def listen(self, patterns: list[str], basin: Basin) -> None:
        """Let a tap have what is accepted from now on."""

    def end_taps(self) -> None:
        """Let their loops end."""
        for listener in self.exchange.taps.listeners:
            listener.end()

    # -- the books

    @abstractmethod
    def look(self, question: Callable[[], T]) -> T:
        """Answer a question about the books."""

    @abstractmethod
    def do(self, act: Callable[[], T]) -> T:
        """Change the books in a turn, and go on with what follows from it."""

    @abstractmethod
    def send(
        self, key: str, data: bytes, extra: Extra | None = None, *, target: str | None = None,
        reply: Reply[object] | None = None, strict: bool = False, epoch: int = 0,
    ) -> EventId:  # fmt: skip
        """Publish one event.

        Raises PayloadError, HubClosed, and if it is strict NoSubscriber.
        """

    @abstractmethod
    def send_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        """Publish events, all or none, before any is handled.

        Raises PayloadError, HubClosed.
        """

    def request(self, key: str, payload: object, target: str | None, extra: Extra | None) -> Reply[object]:
        """Ask a subscriber.

        Raises InvalidOption, PayloadError, HubClosed.
        """
        check_target(target)
        reply: Reply[object] = Reply()
        reply._asked = self
        self.send(key, self.codec.encode(payload), extra, target=target, reply=reply)
        return reply

    @abstractmethod
    def cancel(self, ids: Collection[int]) -> int:
        """Drop events that have not started; return how many."""

    @abstractmethod
    def withdraw(self, numbers: list[int], *, kill: bool) -> None:
        """Drop own requests that have not started, and with ``kill`` do what can be done about those that have."""

    def withdraw_from(self, posts: Iterable[Post], ids: Collection[int]) -> int:
        """Drop events that have not started, and those that have should they come back; inside a turn."""
        self.exchange.withdrawals.held_by(posts, ids)
        return self.exchange.withdrawals.withdraw(ids)

    @abstractmethod
    def request_inside(self, post: Post, key: str, payload: object, target: str | None, extra: Extra | None) -> Reply[object]:
        """Ask from a handler."""

    def number_of(self, reply: Reply[object] | None) -> int:
        """Return the next event's number, by which its reply is known."""
        number = next(self._numbers)
        if reply is not None:
            reply.id = EventId.make(self.id, number)
            self._replies[number] = reply
        return number

    def accept(self, events: OpenBatch, *, strict: bool) -> None:
        """Take in some events; inside a turn.

        Raises NoSubscriber.
        """
        self._sequence += 1
        target, reply, epoch = events.mode
        batch = Batch(
            self.id, self._sequence, events.first, len(events.events), events.runs[::2], events.runs[1::2], self.exchange.clock(),
            epoch, target, reply, strict, size=events.size, extras=events.extras or None,
        )  # fmt: skip
        refused = self.exchange.accept(batch, encode(batch), join(events.events))
        if refused is not None:
            raise NoSubscriber(refused[1])

    def accept_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        """Take in several events; inside a turn."""
        self._together.publish_together(events)
        self.take_in(self._together)

    def take_in(self, outputs: Outputs) -> None:
        """Take in what was published beside any event; inside a turn."""
        outputs.keep(0)
        for output in outputs.take():
            self.exchange.take_in(output.batch, encode(output.batch), output.body, self.exchange.epoch)

    def take_replies(self) -> list[frames.Reply]:
        """Take what has been answered off the books; inside a turn."""
        replies = self.exchange.letters.replies.pop(self.id, [])
        self.exchange.letters.taken(self.id, [reply.number for reply in replies])
        return replies

    def settle(self, replies: list[frames.Reply]) -> None:
        """Hand replies to who waits for them."""
        for reply in replies:
            settle(self._replies, reply, self.exchange.blobs, self.codec)
            self._replies.pop(reply.number, None)

    def tell_news(self) -> None:
        """Tell what has happened."""
        news, self.exchange.news = self.exchange.news, []
        for one in news:
            if not self.is_known(one) and (notice := one.notice(self.limiter, time.monotonic())) is not None:
                self.tell(**notice)

    def is_known(self, news: News) -> bool:
        """Say whether its user is told of it in another way."""
        return False

    # -- posts

    def new_outputs(self, publisher: int) -> Outputs:
        return Outputs(publisher, self.exchange.blobs, self.exchange.admitted, large=NO_FILE, clock=self.exchange.clock)

    def leave(self, post: Post, trace: str) -> None:
        """Take over what a post leaves behind, and tell what its teardown raised; inside a turn."""
        if trace:
            self.exchange.tell("failure", post.name, trace, key="", id="teardown", attempt=1, reason="exception")
        self.take_in(post.outputs)
        self.exchange.forget_incarnation(post.incarnation)

    def call(self, post: Post, payload: object) -> object:
        """Call a handler."""
        return post.runner.call(payload)

    @abstractmethod
    def failed(self, number: int, row: Row, error: BaseException, *, last: bool) -> None:
        """Hear what an event raised, by its delivery number; ``last``: it is not tried again."""

    def is_interrupt(self, error: BaseException) -> bool:
        """Say whether it is meant for more than the handler in which it was raised."""
        return False

    def figures_of(self, name: str) -> dict[str, object]:
        """Return what the statistics add to the counters of the exchange."""
        return {"state": self.state_of(name)[0], "running": 0, "pids": [], "restarts": 0, "cpu": 0.0, "rss": 0}


@dataclass(slots=True, eq=False)
class Taken:
    """An event that is being handled."""

    row: Row
    index: int
    number: int
    attempt: int
    payload: object = None

    @classmethod
    def of(cls, held: Held, index: int) -> Taken:
        portion = held.portion
        return cls(portion.row, index, held.number + index - held.index, portion.attempts.get(index, 1))

    @property
    def data(self) -> bytes:
        return self.row.events()[self.index]


class Post(Consumer):
    """A subscriber, or a replica of one, in this process: runs its handler, and is what surrounds that (Context)."""

    def __init__(self, home: Local, box: Mailbox, replica: int = 0) -> None:
        super().__init__(random_id(), box, replica)
        self.home, self.name, self.folder = home, box.name, home.folder
        self.codec, self.clock = home.codec, home.exchange.clock
        self.outputs = home.new_outputs(self.incarnation)
        self.runner = handlers.Runner(lambda _: None)  # none yet
        self.frame = self.upto = 0
        self.failures: list[Failure] = []
        self.replies: list[ReplyRow] = []
        self.filtered: list[int] = []
        self.ran, self.seconds = 0, 0.0
        """Events run since the last report, and how long they took."""
        self._current: list[Taken] = []

    # -- life

    def set_up(self, snapshot: bytes = b"") -> None:
        """Load the handler from its pickle, as every engine does, and let it prepare and take up its last state."""
        self.work = handlers.loads(self.box.spec.handler)
        self.runner = handlers.load(self.work, self.name, self.replica, batched=self.box.spec.batch is not None)
        subscriber = self.runner.subscriber
        if subscriber is not None:
            self._inside(subscriber.setup)
            if snapshot:
                state = pickles.load_any(snapshot)
                self._inside(lambda: subscriber.restore(state))

    def tear_down(self) -> str:
        """Let it clean up; return the traceback of what that raised, which disturbs no other."""
        try:
            if self.runner.subscriber is not None:
                self._inside(self.runner.subscriber.teardown)
        except Exception as error:
            return pickles.traceback_text(error)
        finally:
            self.runner.close()
        return ""

    def snapshot(self) -> bytes:
        """Return the state that another post in its place begins with."""
        if self.box.spec.snapshot is None or self.runner.subscriber is None:
            return b""
        return pickles.encode(self._inside(self.runner.subscriber.snapshot), "snapshot")

    def _inside(self, call: Callable[[], object]) -> object:
        """Call something as inside a handler; if it raises, nothing of what it has published is left."""
        before, own.context = own.context, self
        try:
            return call()
        except BaseException:
            self.outputs.fresh.clear()
            raise
        finally:
            own.context = before

    # -- an event, or a batch

    @property
    def batch_size(self) -> int:
        return self.box.spec.batch.size if self.box.spec.batch is not None else 1

    def take_next(self, now: float) -> list[Held]:
        """Take the next event, or what waits as far as it fits one batch."""
        taken: list[Held] = []
        room = self.batch_size
        while room and (held := self.take(room, now)) is not None:
            taken.append(held)
            room -= length(held.spans)
        return taken

    def run(self, events: list[Held]) -> None:
        """Run one event, or those of a batch, and note for the report what came of it."""
        started = time.perf_counter()
        taken = [Taken.of(held, index) for held in events for index in indexes(held.spans)]
        self._inside(lambda: self._handle_wanted(taken))
        self._current = []
        self.upto = events[-1].number + events[-1].count
        self.ran += len(taken)
        self.seconds += time.perf_counter() - started

    def _handle_wanted(self, events: list[Taken]) -> None:
        wanted = [event for event in events if self._is_wanted(event)]
        if wanted:
            self._handle(wanted)
        self.failures.sort(key=lambda failure: -failure.number if failure.is_for_now else -inf)  # each goes before all that waits

    def _is_wanted(self, event: Taken) -> bool:
        """Load an event, and ask the filter; say whether it is to be handled."""
        self._current = [event]
        try:
            event.payload = self.codec.loads(event.data)
            if self.runner.wants is None:
                return True
            wanted = bool(self.runner.wants(event.payload))
            if self.box.spec.batch is not None:
                handlers.check_asked_only(self.outputs.fresh)
            if wanted:
                return True
            self.filtered.append(event.number)
        except BaseException as error:
            self._failed(event, error)
        self.outputs.fresh.clear()
        return False

    def _handle(self, events: list[Taken]) -> None:
        """Handle events together; if they fail as a whole, one by one."""
        self._current, replies = events, len(self.replies)
        try:
            results, errors = self._results(events)
            for place, (event, result) in enumerate(zip(events, results, strict=True)):
                if place not in errors and (error := self._keep_result(event, result)) is not None:
                    errors[place] = error
        except BaseException as error:
            self.outputs.fresh.clear()
            del self.replies[replies:]
            if len(events) > 1 and not self.home.is_interrupt(error):
                for event in events:
                    self._handle_again(event)
                return
            errors = dict.fromkeys(range(len(events)), error)
        if len(errors) == len(events):
            self.outputs.fresh.clear()
        for place in sorted(errors):
            self._failed(events[place], errors[place])
        self.outputs.keep(min(event.row.epoch for event in events))

    def _handle_again(self, event: Taken) -> None:
        """Handle one event of several, with a payload of its own: the handler may have changed what it got."""
        self._current = [event]
        try:
            event.payload = self.codec.loads(event.data)
        except BaseException as error:
            self._failed(event, error)
        else:
            self._handle([event])

    def _results(self, events: list[Taken]) -> tuple[Sequence[object], dict[int, BaseException]]:
        if self.box.spec.batch is None:
            return [self.home.call(self, events[0].payload)], {}
        asked = [event.row.batch.reply for event in events]
        return handlers.call_batch(lambda payloads: self.home.call(self, payloads), [event.payload for event in events], asked)

    def _keep_result(self, event: Taken, result: object) -> Exception | None:
        """Publish a result under ``to`` and answer a request; return why that cannot be done."""
        batch, before = event.row.batch, len(self.outputs.fresh)
        try:
            if self.work.to is not None and result is not None:
                self.outputs.publish(self.work.to, self.codec.encode(result, "result"), None)
            if batch.reply:
                self.replies.append(ReplyRow(batch.publisher, batch.number + event.index, "ok", self.codec.encode(result, "result")))
        except Exception as error:
            del self.outputs.fresh[before:]
            return error
        return None

    def _failed(self, event: Taken, error: BaseException) -> None:
        retry, delay = handlers.retry_after(self.work, error, event.attempt)
        reason = {Reject: "rejected", RetryLater: "later"}.get(type(error), "exception")
        trace = pickles.traceback_text(error)
        self.failures.append(Failure.here(event.number, reason, pickles.encode_error(error), trace, retry, delay))
        self.home.failed(event.number, event.row, error, last=not retry or event.attempt >= self.box.spec.max_attempts)

    def report(self, snapshot: bytes | None = None) -> Report:
        """Return what came of the events since the last report."""
        self.frame += 1
        report = Report(
            self.frame,
            self.upto,
            self.ran,
            self.seconds,
            self.failures,
            self.outputs.take(),
            self.replies,
            snapshot,
            filtered=self.filtered,
        )
        self.failures, self.replies, self.filtered, self.ran, self.seconds = [], [], [], 0, 0.0
        return report

    # -- what a handler may ask (Context)

    def publish(self, key: str, payload: object, extra: Extra | None, *, now: bool) -> EventId:
        data = self.codec.encode(payload)
        if now:
            return self.home.send(key, data, extra, epoch=min((event.row.epoch for event in self._current), default=0))
        return EventId.make(self.incarnation, self.outputs.publish(key, data, extra))

    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        self.outputs.publish_together(events)

    def request(self, key: str, payload: object, target: str | None, extra: Extra | None = None) -> Reply[object]:
        return self.home.request_inside(self, key, payload, target, extra)

    def is_at(self, ids: Collection[int]) -> bool:
        """Say whether it runs one of some events."""
        return any((event.row.batch.publisher << 40 | event.row.batch.number + event.index) in ids for event in self._current)

    def current_events(self) -> list[Event]:
        withdrawn = self.box.withdrawn
        return [
            event_of(
                event.row.batch, event.index, event.payload, event.attempt, self.replica, cancelled=(event.row.id, event.index) in withdrawn
            )
            for event in self._current
        ]  # fmt: skip

    def current_heads(self) -> list[Head]:
        return [head_of(event.row.batch, event.index) for event in self._current]


def random_id() -> int:
    """Draw the id of a publisher or an incarnation."""
    return int.from_bytes(os.urandom(8), "big")
