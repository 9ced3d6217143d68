"""The inline engine: the same exchange and core in the caller's thread; the outermost publish returns when all that followed is handled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf
from typing import TypeVar

import msgspec

from mphub.clock import Clock
from mphub.core.delivery import Held
from mphub.core.rows import Row
from mphub.errors import HubError
from mphub.events import EventId
from mphub.procs.exchange import Exchange, News
from mphub.procs.local import Local, NoBlobs, Post
from mphub.reply import Reply
from mphub.store.journal import MemoryJournal
from mphub.subscriber import own
from mphub.tap import Basin
from mphub.wire import codec as pickles
from mphub.wire.frames import Extra
from mphub.wire.open_batch import OpenBatch
from mphub.wire.payloads import Codec
from mphub.wire.specs import Spec

T = TypeVar("T")


class Inline(Local):
    """Runs handlers in the caller's thread, one outermost publish at a time."""

    def __init__(
        self, folder: str, max_bytes: int, tell: Callable[..., None], codec: Codec, clock: Clock, *, propagate: bool
    ) -> None:  # fmt: skip
        super().__init__(folder, Exchange(MemoryJournal(), NoBlobs("/nonexistent"), max_bytes, clock), tell, codec)
        self.clock, self.propagate = clock, propagate
        self.posts: dict[str, Post] = {}
        self.errors: dict[str, tuple[bytes, str]] = {}
        """(exception, traceback) of what could not be set up."""
        self._lock = threading.RLock()
        self._guest = 0
        """The thread that runs a coroutine, while the one that has the lock waits for it."""
        self._raise: BaseException | None = None
        self._interrupt: BaseException | None = None
        self._busy = False

    # -- life

    def subscribe(self, specs: Sequence[Spec]) -> None:
        """Set up each once all are routed to."""
        with self.exchange.turn():
            for spec in specs:
                self.exchange.subscribe(spec)
        for spec in specs:
            self._begin(spec)
        self.work_off()

    def replace(self, spec: Spec) -> None:
        post = self.posts.get(spec.name)
        if post is not None and (state := post.snapshot()):
            with self.exchange.turn():
                self.exchange.letters.keep_snapshot(post.snapshot_key, state, None)
        self._close(spec.name)
        self.subscribe([spec])

    def restart(self, name: str) -> None:
        """Set up again what could not be set up."""
        if name in self.errors:
            self._begin(self.exchange.boxes[name].spec)
            self.work_off()

    def pause(self, name: str) -> None:
        if name in self.posts:
            self._set_status(name, "PAUSED")

    def resume(self, name: str) -> None:
        if self.exchange.boxes[name].status == "PAUSED":
            self._set_status(name, "RUNNING")
            self.work_off()

    def scale(self, name: str, replicas: int) -> None:
        """There is one thread, whatever the number."""

    def set_keys(self, name: str, patterns: list[str]) -> None:
        with self.exchange.turn():
            self.exchange.subscribe(msgspec.structs.replace(self.exchange.boxes[name].spec, patterns=patterns))

    def state_of(self, name: str) -> tuple[str, bytes, str]:
        box = self.exchange.boxes.get(name)
        return (box.status if box else "STOPPED", *self.errors.get(name, (b"", "")))

    def _begin(self, spec: Spec) -> None:
        post = Post(self, self.exchange.boxes[spec.name])
        with self.exchange.turn():
            data, _ = self.exchange.letters.snapshot(post.snapshot_key) or (b"", None)
        try:
            post.set_up(data)
        except Exception as error:
            self.errors[spec.name] = pickles.encode_error(error), pickles.traceback_text(error)
            self._set_status(spec.name, "FATAL")
            return
        self.errors.pop(spec.name, None)
        self.posts[spec.name] = post
        with self.exchange.turn():
            self.take_in(post.outputs)
        self._set_status(spec.name, "RUNNING")

    def _set_status(self, name: str, status: str) -> None:
        with self.exchange.turn():
            self.exchange.set_status(name, status)

    def unsubscribe(self, name: str, *, drain: bool) -> None:
        with self.exchange.turn():
            self.exchange.unsubscribe(name)
            self.exchange.forget(name, "unsubscribed")
        self.errors.pop(name, None)
        self._close(name)
        self.work_off()

    def stop(self) -> int:
        for name in list(self.posts):
            self._close(name)
        with self.exchange.turn():
            given_up = sum(self.exchange.drop_pending(box, "stopped") for box in self.exchange.boxes.values())
        for name in self.exchange.boxes:
            self._set_status(name, "STOPPED")
        self._answer()
        self.tell_news()
        return given_up

    def _close(self, name: str) -> None:
        """End a subscriber; a teardown that fails disturbs no other."""
        post = self.posts.pop(name, None)
        if post is None:
            return
        trace = post.tear_down()
        with self.exchange.turn():
            self.leave(post, trace)

    def listen(self, patterns: list[str], basin: Basin) -> None:
        with self._turn():
            self.exchange.taps.add(patterns, basin)

    # -- publishing

    def _turn(self) -> AbstractContextManager[object]:
        """Let one thread after the other publish."""
        return nullcontext() if threading.get_ident() == self._guest else self._lock

    def look(self, question: Callable[[], T]) -> T:
        with self.exchange.turn():
            return question()

    def do(self, act: Callable[[], T]) -> T:
        result = self.look(act)
        self.work_off()
        return result

    def send(
        self, key: str, data: bytes, extra: Extra | None = None, *, target: str | None = None,
        reply: Reply[object] | None = None, strict: bool = False, epoch: int = 0,
    ) -> EventId:  # fmt: skip
        """Take in one event and, if this is the outermost call, handle it and all that follows."""
        pickles.check_size(data, self.exchange.admitted)
        with self._turn():
            number = self.number_of(reply)
            with self.exchange.turn():
                event = OpenBatch(self.id << 40, number, (target, reply is not None, epoch))
                event.append(key, data, extra)
                self.accept(event, strict=strict)
            self.work_off(reply)
        return EventId.make(self.id, number)

    def send_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        for _, data, _ in events:
            pickles.check_size(data, self.exchange.admitted)
        with self._turn():
            with self.exchange.turn():
                self.accept_together(events)
            self.work_off()

    def cancel(self, ids: Collection[int]) -> int:
        with self._turn(), self.exchange.turn():
            return self.withdraw_from(self.posts.values(), ids)

    def withdraw(self, numbers: list[int], *, kill: bool) -> None:
        self.cancel([EventId.make(self.id, number) for number in numbers])

    @property
    def largest_batch(self) -> int:
        """Events that a handler gets at once at most."""
        return max((post.batch_size for post in self.posts.values()), default=1)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Handle what is published inside once all of it is there."""
        with self._turn():
            before, self._busy = self._busy, True
            try:
                yield
            finally:
                self._busy = before
                self.work_off()

    def work_off(self, reply: Reply[object] | None = None, *, patient: bool = False) -> None:
        """Handle what waits, in the order published, until nothing moves; what is to start later is waited for as the clock has it.

        A patient caller has nothing else to do; so has who asked, until there is a reply.
        """
        with self._turn():
            if self._busy:
                return  # a handler published: its event waits its turn
            self._busy = True
            try:
                while self._step(reply, patient=patient):
                    pass
            finally:
                self._busy = False
                error, self._raise = self._raise, None
                self.tell_news()  # of what nobody is told by an exception
            if error is not None:
                raise error

    def _step(self, reply: Reply[object] | None, *, patient: bool = False) -> bool:
        self._answer()
        posts = self.posts.values()  # but those of handlers that wait for an answer
        waiting = [post for post in posts if post.box.window.waiting and not post.delivery.held and post.box.status != "PAUSED"]
        for post in sorted(waiting, key=lambda post: post.box.window.waiting[0].portion.row.id):
            events = post.take_next(self.clock())
            if events:
                self._run(post, events)
                return True
        return self._wait(patient or (reply is not None and not reply.done()))

    def _wait(self, patient: bool) -> bool:
        """Go on to when a retry is due or a rate lets more start, and drop what is too late by now; say whether there was something."""
        due = min((post.box.starts_at for post in self.posts.values() if not post.box.is_at_rest), default=inf)
        if not (due < inf and self.clock.wait_until(due, patient=patient)) and not self.exchange.is_due(self.clock()):
            return False
        with self.exchange.turn():
            self.exchange.wake(self.clock())
        return True

    def _answer(self) -> None:
        if self.exchange.letters.replies:
            with self.exchange.turn():
                replies = self.take_replies()
            self.settle(replies)

    # -- handling

    def _run(self, post: Post, events: list[Held]) -> None:
        """Run one event, or a batch, and commit what came of it."""
        post.run(events)
        with self.exchange.turn():
            self.exchange.report(post, post.report(), self.clock())
        self.exchange.told = None
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt

    def failed(self, number: int, row: Row, error: BaseException, *, last: bool) -> None:
        """Keep what is raised to the caller."""
        if last and self.propagate and not row.batch.reply and self._raise is None:
            self._raise = error
            self.exchange.told = number
        if not isinstance(error, Exception):
            self._interrupt = error

    def is_interrupt(self, error: BaseException) -> bool:
        return isinstance(error, KeyboardInterrupt)

    def is_known(self, news: News) -> bool:
        return self.propagate and news.kind in ("failure", "dead_letter") and news.details["id"] != "teardown"

    def call(self, post: Post, payload: object) -> object:
        """Call the handler; beside a running loop a coroutine runs in a thread of its own, as asyncio allows one loop a thread."""
        if not post.runner.is_async or not is_in_a_loop():
            return post.runner.call(payload)

        def call() -> object:
            before, self._guest = self._guest, threading.get_ident()
            own.context = post
            try:
                return post.runner.call(payload)
            finally:
                self._guest = before

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call).result()

    def request_inside(self, post: Post, key: str, payload: object, target: str | None, extra: Extra | None) -> Reply[object]:
        """Ask, and handle what waits until there is the answer: the handler is going to wait for that."""
        reply = self.request(key, payload, target, extra)
        while self._busy and not reply.done() and self._step(reply):
            self._answer()
        if self._busy and not reply.done() and self._replies.pop(reply.id.number, None) is not None:
            reply._settle(None, HubError(f"subscriber {post.name!r} asks itself: with the inline engine it would wait for ever"))
        return reply


def is_in_a_loop() -> bool:
    """Say whether asyncio runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
