"""The thread engine: the same exchange and core in the hub's process, one thread for each replica of a subscriber.

Ctrl-C strikes the main thread anywhere, and a finalizer runs in the midst of anything. So no thread of the user's touches the books: it has
the clerk do what it wants done.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from math import inf
from typing import TypeVar

import msgspec

from mphub.connection import Address
from mphub.core.keys import matches
from mphub.core.rows import Row
from mphub.errors import HubClosed
from mphub.events import EventId
from mphub.procs import handlers
from mphub.procs.clerk import MANY, Answer, Clerk, Task, perform
from mphub.procs.exchange import Exchange
from mphub.procs.lives import Lives
from mphub.procs.local import Local, NoBlobs, Post
from mphub.procs.mailbox import LASTING, Mailbox
from mphub.procs.wards import Group
from mphub.reply import Reply
from mphub.store.journal import MemoryJournal
from mphub.tap import Basin
from mphub.wire import frames
from mphub.wire.codec import check_size
from mphub.wire.frames import BLOB_MIN, Extra
from mphub.wire.open_batch import Mode, OpenBatch
from mphub.wire.payloads import Codec
from mphub.wire.specs import Spec

T = TypeVar("T")
HELD_AFTER = 5.0
"""Seconds that a publisher waits before a notice names whom it waits for."""
LONGEST_WAIT = 3600.0


class Books(Exchange):
    """An exchange that knows which inboxes are nearly full: until then publishers need not wait for what they publish to be taken in."""

    def __init__(self, max_bytes: int, clock: Callable[[], float]) -> None:
        self.tight: set[Mailbox] = set()
        super().__init__(MemoryJournal(), NoBlobs("/nonexistent"), max_bytes, clock)

    def _note_full(self, box: Mailbox) -> None:
        super()._note_full(box)
        is_tight = box.overflow == "block" and (box.room() <= MANY or box.bytes + MANY * BLOB_MIN > box.max_bytes)
        (self.tight.add if is_tight else self.tight.discard)(box)

    @property
    def is_tight(self) -> bool:
        return bool(self.tight) or self.used + MANY * BLOB_MIN > self.admitted


class Threads(Local):
    """Runs handlers in threads of this process."""

    def __init__(self, address: Address, max_bytes: int, codec: Codec, ask: float, tell: Callable[..., None]) -> None:
        self.books = Books(max_bytes, time.time)
        super().__init__(address.folder, self.books, tell, codec)
        self.name, self.ask = address.name, ask
        self.lock = threading.RLock()  # of an owner: a finalizer must not wait for what it interrupts
        self.lives = Lives(self)
        self._held: list[str] = []
        """Patterns whose publishers wait."""
        self._publishers: deque[queue.SimpleQueue[None]] = deque()
        """Those that do."""
        self._named: set[str] = set()
        """For whom they wait so long that a notice has said so."""
        self._closing = False
        self._batch = OpenBatch(0, 0)
        self.clerk = Clerk("mphub-clerk", self, self.lock)
        self.clerk.start()

    # -- what users ask

    def look(self, question: Callable[[], T]) -> T:
        return self.do(question)

    def do(self, act: Callable[[], T]) -> T:
        return self.clerk.wait(self.clerk.ask(partial(self._act, act)))

    def _act(self, act: Callable[[], T]) -> T:
        self._close_batch()
        return act()

    def subscribe(self, specs: Sequence[Spec]) -> None:
        """Route to all before the first is set up: what that publishes is for the others too."""
        self.do(partial(self._subscribe, specs))

    def _subscribe(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            self.exchange.subscribe(spec)
        for spec in specs:
            self.lives.begin(spec)

    def replace(self, spec: Spec) -> None:
        self.do(partial(self._change, spec.name, self._replace, spec))

    def _replace(self, group: Group, spec: Spec) -> None:
        self.exchange.subscribe(spec)
        group.adopt(spec)
        self.lives.rescale(group, spec)
        self.lives.restart(group)

    def restart(self, name: str) -> None:
        self.do(partial(self._change, name, self.lives.restart))

    def pause(self, name: str) -> None:
        self.do(partial(self._change, name, self._set_paused, True))

    def resume(self, name: str) -> None:
        self.do(partial(self._change, name, self._set_paused, False))

    def _set_paused(self, group: Group, paused: bool) -> None:
        group.paused = paused
        self.lives.announce(group)

    def scale(self, name: str, replicas: int) -> None:
        self.do(partial(self._change, name, lambda group: self._scale(group, msgspec.structs.replace(group.spec, replicas=replicas))))

    def _scale(self, group: Group, spec: Spec) -> None:
        self.exchange.subscribe(spec)
        self.lives.rescale(group, spec)

    def set_keys(self, name: str, patterns: list[str]) -> None:
        self.do(partial(self._change, name, self._set_keys, patterns))

    def _set_keys(self, group: Group, patterns: list[str]) -> None:
        group.spec = msgspec.structs.replace(group.spec, patterns=patterns)
        self.exchange.subscribe(group.spec)

    def _change(self, name: str, act: Callable[..., object], *args: object) -> None:
        """Do something with a subscriber, unless it is gone."""
        group = self.lives.groups.get(name)
        if group is not None:
            act(group, *args)

    def unsubscribe(self, name: str, *, drain: bool) -> None:
        box = self.exchange.boxes[name]
        self.do(partial(self.exchange.unsubscribe, name))
        if drain:
            self._until(lambda: True if not box.unfinished or self.lives.groups[name].state in LASTING else None)
        places = self.do(partial(self.lives.end_all, self.lives.groups[name].wards))
        self._until(lambda: None if places & set(self.lives.places.values()) else True)
        self.do(partial(self._forget, name))
        self._join({place.thread for place in places if not place.is_abandoned})

    def _forget(self, name: str) -> None:
        del self.lives.groups[name]
        self.exchange.forget(name, "unsubscribed")
        self.books.tight.discard(self.exchange.boxes[name])

    def stop(self) -> int:
        """Ask all to end; those that do not in time are abandoned, and their events given up."""
        self._closing = True  # before the clerk does it: whoever asks behind that waits for what it says
        given_up = self.do(self._begin_end)
        self._until(lambda: None if self.lives.places else True)
        given_up += self.do(self._finish_end)
        self._join(self.lives.threads)
        return given_up

    def _begin_end(self) -> int:
        """Take nothing more in, and drop what waits: a handler that waits for a reply has it."""
        self.exchange.close()
        self._let_publishers_look()
        self.lives.end_all(self.lives.wards)
        return self._drop_all()

    def _finish_end(self) -> int:
        """Drop what the last handlers published, and what was taken from those that were abandoned."""
        given_up = self._drop_all()
        for name in self.exchange.boxes:
            self.exchange.set_status(name, "STOPPED")
        return given_up

    def _drop_all(self) -> int:
        return sum(self.exchange.drop_pending(box, "stopped") for box in self.exchange.boxes.values())

    def close(self) -> None:
        """End the clerk, and let everyone go who still waits: after a stop that was interrupted that may be many."""
        with self.lock:
            self.lives.let_go()
        closed = self._closed()
        self.clerk.end(closed)
        for number in list(self._replies):
            reply = self._replies.pop(number, None)
            if reply is not None:
                reply._settle(None, closed)

    def _closed(self) -> HubClosed:
        return HubClosed(f"hub {self.name!r} was stopped")

    def _join(self, threads: set[threading.Thread]) -> None:
        """Wait for the last steps of threads; not for ours, if this is called by what a reply calls."""
        for thread in threads - {threading.current_thread()}:
            thread.join(self.ask)

    def _until(self, condition: Callable[[], T | None], timeout: float | None = None) -> T:
        with self.clerk.expecting(condition) as answer:
            return self.clerk.wait(answer, timeout)

    def wait_ready(self, name: str, timeout: float | None) -> tuple[str, bytes, str]:
        """Wait until a subscriber is RUNNING, or will not be; seconds.

        Raises TimeoutError.
        """
        if (now := self.state_of(name))[0] == "RUNNING":
            return now
        try:
            return self._until(lambda: found if (found := self.state_of(name))[0] in ("RUNNING", "FATAL", "STOPPED") else None, timeout)
        except TimeoutError:
            raise TimeoutError(f"subscriber {name!r} is {self.state_of(name)[0]} after {timeout} s") from None

    @contextlib.contextmanager
    def draining(self) -> Iterator[Callable[[float], dict[str, str]]]:
        """Begin a drain; yield what waits so many seconds until all has moved as far as it can, and says who is stuck: name to state."""
        epoch = self.do(self.exchange.advance_epoch)

        def stuck() -> dict[str, str] | None:
            left = {name: self.exchange.boxes[name].status for name in self.exchange.left_until(epoch)}
            return left if set(left.values()) <= set(LASTING) else None

        with self.clerk.expecting(stuck) as answer:
            yield partial(self.clerk.wait, answer)

    def state_of(self, name: str) -> tuple[str, bytes, str]:
        group = self.lives.groups.get(name)
        if group is None:
            return "STOPPED", b"", ""
        return (group.state, *(group.error if group.state == "FATAL" else (b"", "")))

    def figures_of(self, name: str) -> dict[str, object]:
        group = self.lives.groups.get(name)
        figures = super().figures_of(name) if group is None else group.public()
        return {**figures, "running": sum(place.delivery.holding for place in self.lives.places.values() if place.name == name)}

    # -- publishing

    def send(
        self, key: str, data: bytes, extra: Extra | None = None, *, target: str | None = None,
        reply: Reply[object] | None = None, strict: bool = False, epoch: int = 0,
    ) -> EventId:  # fmt: skip
        """Let the clerk take in one event; wait while its key is held, and as long as an inbox is nearly full until it is taken in.

        Our own threads do not wait: what their handlers and replies publish is always taken. But what goes out in the midst of an event is
        to be there before that has ended, for a drain.
        """
        check_size(data, self.exchange.admitted)
        is_ours = getattr(_here, "home", None) is self
        if not is_ours and self._held:
            self._wait_released(key)
        number = self.number_of(reply)
        answer = self.clerk.ask(partial(self._accept, number, key, data, extra, (target, reply is not None, epoch), strict))
        is_long = self.books.is_tight or self.clerk.is_behind or len(data) >= BLOB_MIN
        if strict or epoch or self._closing or self.clerk.is_over or (is_long and not is_ours):
            self._outcome(answer, number)
        return EventId.make(self.id, number)

    def claim_thread(self) -> None:
        """Note that the calling thread is one of ours."""
        _here.home = self

    def cancel(self, ids: Collection[int]) -> int:
        return self.do(partial(self._withdraw, ids))

    def withdraw(self, numbers: list[int], *, kill: bool) -> None:
        """Have that done some time: who lets go of what it has asked may be a finalizer, which cannot wait."""
        self.clerk.ask(partial(self._act, partial(self._withdraw, [EventId.make(self.id, number) for number in numbers], kill=kill)))

    def listen(self, patterns: list[str], basin: Basin) -> None:
        self.do(partial(self.exchange.taps.add, patterns, basin))

    def _withdraw(self, ids: Collection[int], *, kill: bool = False) -> int:
        places = list(self.lives.places.values())
        withdrawn = self.withdraw_from(places, ids)
        for place in places if kill else ():
            if place.is_at(ids):
                self.lives.kill(place)
        return withdrawn

    def _outcome(self, answer: Answer[None], number: int) -> None:
        try:
            self.clerk.wait(answer)
        except BaseException:
            self._replies.pop(number, None)
            raise

    def _accept(self, number: int, key: str, data: bytes, extra: Extra | None, mode: Mode, strict: bool) -> None:
        """Take in an event, in one batch with those before it if they are alike."""
        if self.exchange.closed:
            raise self._closed()
        batch = self._batch
        if strict or batch.mode != mode or number != batch.first + len(batch.events) or (mode[1] and key != batch.key):
            self._close_batch()
            batch = self._batch = OpenBatch(self.id << 40, number, mode)
        batch.append(key, data, extra)
        if strict:
            self._close_batch(strict=True)

    def _close_batch(self, *, strict: bool = False) -> None:
        """Take in the batch.

        Raises NoSubscriber.
        """
        batch, self._batch = self._batch, OpenBatch(0, 0)
        if batch.events:
            self.accept(batch, strict=strict)

    def send_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        for _, data, _ in events:
            check_size(data, self.exchange.admitted)
        self.do(partial(self._accept_together, events))

    def _accept_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        if self.exchange.closed:
            raise self._closed()
        self.accept_together(events)

    def _wait_released(self, key: str) -> None:
        """Wait while a key is held: a subscriber that it is for has a full inbox.

        Raises HubClosed.
        """
        while not self._closing and self._is_held(key):
            released: queue.SimpleQueue[None] = queue.SimpleQueue()
            self._publishers.append(released)
            if self._closing or not self._is_held(key):
                break
            try:
                released.get(timeout=HELD_AFTER)
            except queue.Empty:
                self.clerk.ask(self._name_holders)
        if self._closing:
            raise self._closed()

    def _is_held(self, key: str) -> bool:
        return any(matches(pattern, key) for pattern in self._held)

    def _name_holders(self) -> None:
        """Say whom publishers have waited for so long, once until they are let go."""
        who: dict[str, Mailbox | None] = {box.name: box for box in self.exchange.full}
        if self._held and not who:
            who = {"the journal, which is full": None}
        for name, box in who.items():
            if name not in self._named:
                keys = ", ".join(box.spec.patterns) if box else "all keys"
                message = f"publishers of {keys} have waited {HELD_AFTER:g} s for {name}" + (": its inbox is full" if box else "")
                self.tell(kind="held", subscriber=box and name, message=message, details={})
        self._named |= set(who)

    def request_inside(self, post: Post, key: str, payload: object, target: str | None, extra: Extra | None) -> Reply[object]:
        handlers.check_other(post.box.spec, key, target)
        return self.request(key, payload, target, extra)

    def failed(self, number: int, row: Row, error: BaseException, *, last: bool) -> None:
        """Nobody is told by an exception."""

    # -- the clerk

    def timeout(self) -> float | None:
        with self.lock:
            due, at = self.exchange.next_due(), self.lives.due()
        until = at - time.monotonic()
        if due is not None:
            until = min(until, due - self.exchange.clock())
        return None if until == inf else max(0.0, min(until, LONGEST_WAIT))

    def work(self, tasks: list[Task]) -> None:
        """Do what is asked, and what is due, in one turn; answer when all is as it is to be."""
        self.claim_thread()
        with self.lock:
            with self.exchange.turn():
                outcomes = perform(tasks)
                self._close_batch()
                self.exchange.wake(self.exchange.clock())
                self.lives.tend(time.monotonic())
            replies = self._look_around()
        for answer, result, error in outcomes:
            answer.give(result, error)
        self.settle(replies)

    def turn(self, act: Callable[[], T]) -> T:
        """Change the books in a thread of a subscriber's own."""
        with self.lock:
            with self.exchange.turn():
                result = act()
            replies = self._look_around()
        self.settle(replies)
        return result

    def _look_around(self) -> list[frames.Reply]:
        """Let everybody know what concerns them; return the replies, to be handed over once the lock is free."""
        if self.exchange.news:
            self.tell_news()
        held = self.exchange.held_patterns()
        if held != self._held:
            self._held = held
            self._named &= {box.name for box in self.exchange.full}
            self._let_publishers_look()
            self.clerk.ring()  # what makes room in a full journal goes on though nothing arrives
        self.lives.wake_idle()
        self.clerk.look_at_conditions()
        return self.take_replies() if self.exchange.letters.replies else []

    def _let_publishers_look(self) -> None:
        while self._publishers:
            self._publishers.popleft().put(None)


_here = threading.local()
"""Whose thread this is."""
