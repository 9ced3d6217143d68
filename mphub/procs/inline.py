"""The inline engine: the same exchange and core in the caller's thread; the outermost publish returns when all that followed is handled."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any

import msgspec

from mphub.clock import Clock
from mphub.connection import settle_reply
from mphub.core.delivery import Held
from mphub.core.keys import check_target
from mphub.core.rows import Row, event_of
from mphub.errors import HubError, NoSubscriber, Reject, RetryLater
from mphub.events import Event, EventId
from mphub.procs import handlers
from mphub.procs.consumer import Consumer
from mphub.procs.exchange import Exchange
from mphub.procs.mailbox import Mailbox
from mphub.procs.outputs import Outputs
from mphub.reply import Reply
from mphub.store.blobs import Blobs
from mphub.store.journal import MemoryJournal
from mphub.subscriber import holder
from mphub.tap import Basin
from mphub.wire import codec
from mphub.wire.codec import Parts
from mphub.wire.frames import Batch, Extra, Failure, ReplyRow, Report, encode, join, split
from mphub.wire.payloads import Codec
from mphub.wire.specs import Spec


class NoBlobs(Blobs):
    """Inline events stay in memory, whatever their size."""

    def spill(self, data: bytes | Parts) -> tuple[bytes, str | None]:
        return bytes(data), None

    def write(self, data: bytes | Parts) -> str:
        raise HubError("the inline engine writes no files")

    def of_writer(self, writer: int) -> list[str]:
        return []


class Post(Consumer):
    """A subscriber in this process."""

    def __init__(self, incarnation: int, box: Mailbox, work: handlers.Work, runner: handlers.Runner) -> None:
        super().__init__(incarnation, box)
        self.work, self.runner = work, runner
        self.frame = 0


class Inline:
    """Runs handlers in the caller's thread, one outermost publish at a time."""

    def __init__(self, folder: str, max_bytes: int, codec: Codec, clock: Clock, *, propagate: bool) -> None:
        self.folder, self.codec, self.clock, self.propagate = folder, codec, clock, propagate
        self.id = int.from_bytes(os.urandom(8), "big")
        self.exchange = Exchange(MemoryJournal(), NoBlobs("/nonexistent"), max_bytes, clock)
        self.posts: dict[str, Post] = {}
        self.errors: dict[str, tuple[bytes, str]] = {}
        """(exception, traceback) of what could not be set up."""
        self._incarnations = itertools.count(1)
        self.outputs = self._no_outputs()
        self.name, self.thread = "", 0
        self._lock = threading.RLock()
        self._guest = 0
        """The thread that runs a coroutine, while the one that has the lock waits for it."""
        self._number = 0
        """Of the last event, which is the sequence of its batch too."""
        self._replies: dict[int, Reply[object]] = {}
        self._current: tuple[Row, int, int, object] | None = None
        self._raise: BaseException | None = None
        self._busy = False

    def _no_outputs(self) -> Outputs:
        return Outputs(int.from_bytes(os.urandom(8), "big"), self.exchange.blobs, self.exchange.admitted, large=1 << 62, clock=self.clock)

    # -- life

    def subscribe(self, specs: Sequence[Spec]) -> None:
        """Load each handler from its pickle, as every engine does, and set it up once all are routed to."""
        with self.exchange.turn():
            for spec in specs:
                self.exchange.subscribe(spec)
        for spec in specs:
            self._begin(spec)
        self.work_off()

    def replace(self, spec: Spec) -> None:
        """Let another handler have what waits."""
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

    def set_keys(self, name: str, patterns: list[str]) -> None:
        with self.exchange.turn():
            self.exchange.subscribe(msgspec.structs.replace(self.exchange.boxes[name].spec, patterns=patterns))

    def _begin(self, spec: Spec) -> None:
        try:
            work = handlers.loads(spec.handler)
            runner = handlers.load(work, spec.name)
            if runner.subscriber is not None:
                self._inside(spec.name, runner.subscriber.setup)
        except Exception as error:
            self.errors[spec.name] = codec.encode_error(error), codec.traceback_text(error)
            self._set_status(spec.name, "FATAL")
            return
        self.errors.pop(spec.name, None)
        self.posts[spec.name] = Post(next(self._incarnations), self.exchange.boxes[spec.name], work, runner)
        self._set_status(spec.name, "RUNNING")

    def _set_status(self, name: str, status: str) -> None:
        with self.exchange.turn():
            self.exchange.set_status(name, status)

    def unsubscribe(self, name: str) -> None:
        with self.exchange.turn():
            self.exchange.unsubscribe(name)
            self.exchange.forget(name, "unsubscribed")
        self.errors.pop(name, None)
        self._close(name)
        self.work_off()

    def stop(self) -> int:
        """Tear all down; return how many events were given up."""
        for name in list(self.posts):
            self._close(name)
        with self.exchange.turn():
            given_up = sum(self.exchange.drop_pending(box, "stopped") for box in self.exchange.boxes.values())
        for name in self.exchange.boxes:
            self._set_status(name, "STOPPED")
        self._answer()
        return given_up

    def _close(self, name: str) -> None:
        """End a subscriber; a teardown that fails disturbs no other."""
        post = self.posts.pop(name, None)
        if post is None:
            return
        try:
            if post.runner.subscriber is not None:
                self._inside(name, post.runner.subscriber.teardown)
        except Exception as error:
            text = codec.traceback_text(error)
            self.exchange.tell("failure", name, text, key="", id="teardown", attempt=1, reason="exception")
        finally:
            post.runner.close()
            with self.exchange.turn():
                self.exchange.forget_incarnation(post.incarnation)

    def _inside(self, name: str, call: Any) -> None:
        """Run a hook as inside a handler; what it published waits."""
        self.name, self.thread = name, threading.get_ident()
        before, holder.context = holder.context, self
        try:
            call()
        except BaseException:
            self.outputs.fresh.clear()
            raise
        finally:
            holder.context = before
        self.outputs.keep(0)
        with self.exchange.turn():
            for output in self.outputs.take():
                self.exchange.take_in(output.batch, encode(output.batch), output.body, self.exchange.epoch)

    # -- taps

    def listen(self, patterns: list[str], basin: Basin) -> None:
        with self._turn():
            self.exchange.taps.add(patterns, basin)

    def end_taps(self) -> None:
        """Let their loops end."""
        for listener in self.exchange.taps.listeners:
            listener.end()

    # -- publishing

    def _turn(self) -> AbstractContextManager[object]:
        """Let one thread after the other publish."""
        return nullcontext() if threading.get_ident() == self._guest else self._lock

    def send(
        self, key: str, data: bytes, extra: Extra | None = None, *, target: str | None = None,
        reply: Reply[object] | None = None, strict: bool = False,
    ) -> EventId:  # fmt: skip
        """Take in one event and, if this is the outermost call, handle it and all that follows."""
        codec.check_size(data, self.exchange.admitted)
        with self._turn():
            number = self._take_in(key, data, extra, target, reply, strict)
            self.work_off(reply)
            return EventId.make(self.id, number)

    def send_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        """Take in several events, all or none, before any is handled."""
        for _, data, _ in events:
            codec.check_size(data, self.exchange.admitted)
        with self._turn():
            for key, data, extra in events:
                self._take_in(key, data, extra)
            self.work_off()

    def _take_in(
        self, key: str, data: bytes, extra: Extra | None, target: str | None = None, reply: Reply[object] | None = None,
        strict: bool = False,
    ) -> int:  # fmt: skip
        """Take in one event as a batch of its own; return its number."""
        self._number = number = self._number + 1
        batch = Batch(
            self.id, number, number, 1, [key], [0], self.clock(), 0, target, reply is not None, strict,
            size=len(data), extras={0: extra} if extra else None,
        )  # fmt: skip
        if reply is not None:
            reply.id = EventId.make(self.id, number)
            self._replies[number] = reply
        with self.exchange.turn():
            refused = self.exchange.accept(batch, encode(batch), join([data]))
        if refused is not None:
            raise NoSubscriber(refused[1])
        return number

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
            if error is not None:
                raise error

    def _step(self, reply: Reply[object] | None, *, patient: bool = False) -> bool:
        self._answer()
        posts = self.posts.values()  # but those of handlers that wait for an answer
        waiting = [post for post in posts if post.box.window.waiting and not post.delivery.held and post.box.status != "PAUSED"]
        for post in sorted(waiting, key=lambda post: post.box.window.waiting[0].portion.row.id):
            held = post.take(1, self.clock())
            if held is not None:
                self._run(post, held)
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
        replies = self.exchange.letters.replies.pop(self.id, [])
        for reply in replies:
            future = self._replies.pop(reply.number, None)
            if future is not None and future.set_running_or_notify_cancel():
                settle_reply(future, reply, self.exchange.blobs, self.codec)
        if replies:
            with self.exchange.turn():
                self.exchange.letters.taken(self.id, [reply.number for reply in replies])

    # -- handling

    def _run(self, post: Post, held: Held) -> None:
        """Run one event and commit what came of it; credit is one, as there is no process to run ahead."""
        row, index = held.portion.row, held.index
        self.name, self.thread = post.box.name, threading.get_ident()
        attempt = held.portion.attempts.get(index, 1)
        failures, replies, filtered = [], [], []
        interrupt: BaseException | None = None
        before, holder.context = holder.context, self
        started = time.perf_counter()
        try:
            data = split(row.body)[index]
            payload = self.codec.loads(data)
            self._current = (row, index, attempt, payload)
            if post.runner.wants is not None and not post.runner.wants(payload):
                self.outputs.fresh.clear()
                filtered = [held.number]
            else:
                replies = self._keep_result(post, row, index, self._call(post.runner, payload))
        except BaseException as error:
            self.outputs.fresh.clear()
            failures = [self._failure(post, held.number, attempt, error, row)]
            interrupt = None if isinstance(error, Exception) else error
        finally:
            holder.context, self._current = before, None
        self.outputs.keep(row.epoch)
        post.frame += 1
        report = Report(post.frame, held.number + held.count, 0, 0.0, failures, self.outputs.take(), replies, filtered=filtered)
        seconds = time.perf_counter() - started
        with self.exchange.turn():
            self.exchange.report(post, report, self.clock())
            post.box.counters.seconds += seconds
            post.box.samples.append(seconds)
        self.exchange.told = False
        if interrupt is not None:
            raise interrupt

    def _call(self, runner: handlers.Runner, payload: object) -> object:
        """Call the handler; beside a running loop a coroutine runs in a thread of its own, as asyncio allows one loop a thread."""
        if not runner.is_async or not is_in_a_loop():
            return runner.call(payload)

        def call() -> object:
            before, self._guest = self._guest, threading.get_ident()
            self.thread = self._guest
            try:
                return runner.call(payload)
            finally:
                self._guest = before

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call).result()

    def _keep_result(self, post: Post, row: Row, index: int, result: object) -> list[ReplyRow]:
        if post.work.to is not None and result is not None:
            self.outputs.publish(post.work.to, self.codec.encode(result, "result"), None)
        if not row.batch.reply:
            return []
        return [ReplyRow(row.batch.publisher, row.batch.number + index, "ok", self.codec.encode(result, "result"))]

    def _failure(self, post: Post, number: int, attempt: int, error: BaseException, row: Row) -> Failure:
        retry, delay = handlers.retry_after(post.work, error, attempt)
        reason = {Reject: "rejected", RetryLater: "later"}.get(type(error), "exception")
        last = not retry or attempt >= post.box.spec.max_attempts
        if last and self.propagate and not row.batch.reply and self._raise is None:
            self._raise = error
            self.exchange.told = True
        return Failure.here(number, reason, codec.encode_error(error), codec.traceback_text(error), retry, delay)

    # -- what a handler may ask (Context)

    def publish(self, key: str, payload: object, extra: Extra | None, *, now: bool) -> EventId:
        data = self.codec.encode(payload)
        if now:
            return self.send(key, data, extra)
        return EventId.make(self.outputs.incarnation, self.outputs.publish(key, data, extra))

    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        self.outputs.publish_together(events)

    def request(self, key: str, payload: object, target: str | None, extra: Extra | None = None) -> Reply[object]:
        check_target(target)
        reply: Reply[object] = Reply()
        reply._asked = self
        self.send(key, self.codec.encode(payload), extra, target=target, reply=reply)
        if self._busy:
            self._work_for(reply)
        return reply

    def cancel(self, ids: Collection[int]) -> int:
        """Drop events that have not started; return how many."""
        with self._turn(), self.exchange.turn():
            return self.exchange.withdrawals.withdraw(ids)

    def withdraw(self, numbers: list[int], *, kill: bool) -> None:
        self.cancel([self.id << 40 | number for number in numbers])

    def _work_for(self, reply: Reply[object]) -> None:
        """Handle what waits until a handler's own request is answered: it is going to wait for that."""
        before = self.name, self.thread, self._current, self.outputs
        self.outputs = self._no_outputs()
        try:
            while not reply.done() and self._step(reply):
                self._answer()
        finally:
            self.name, self.thread, self._current, self.outputs = before
        if not reply.done() and self._replies.pop(reply.id.number, None) is not None:
            reply.set_exception(HubError(f"subscriber {self.name!r} asks itself: with the inline engine it would wait for ever"))

    def current_event(self) -> Event:
        if self._current is None:
            raise HubError("mphub.current_event: no event is being handled; it works in handle(payload), not in setup or teardown")
        row, index, attempt, payload = self._current
        return event_of(row.batch, index, payload, attempt)


def is_in_a_loop() -> bool:
    """Say whether asyncio runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
