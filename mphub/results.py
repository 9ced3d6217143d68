"""Answers to a stream of requests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, TypeVar

from mphub.events import Progress
from mphub.observe import html
from mphub.observe.progress import Watcher, check_progress, watching
from mphub.options import check_choice, check_number
from mphub.reply import Reply, give_up

R = TypeVar("R")
AHEAD = 64
"""Requests under way before the consumer takes a result."""
TELL_EVERY = 0.1
"""Seconds between two words about the progress."""


class _Arrivals(Generic[R]):
    """Replies that somebody is told of: as they come, or the first one.

    They know this alone, not the results: who leaves the loop lets go of those, and so withdraws what is under way, at once.
    """

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
        self._wake: Callable[[], object] | None = None

    def came(self, reply: Future[R]) -> None:
        self.queue.put(reply)
        wake = self._wake
        if wake is not None:
            wake()

    async def next(self) -> Future[R]:
        loop = asyncio.get_running_loop()
        while True:
            came = asyncio.Event()
            wake = self._wake = functools.partial(loop.call_soon_threadsafe, came.set)
            try:
                return self.queue.get_nowait()
            except queue.Empty:
                await came.wait()
            finally:
                if self._wake is wake:  # else another wait has begun before this one's cancellation was seen
                    self._wake = None


class Results(Generic[R]):
    """Results of ``map``: for ``for`` and ``async for``; leaving the loop takes no more payloads, and withdraws what has not started."""

    def __init__(
        self, ask: Callable[[Any], Reply[R]], payloads: Iterable[object], *, ordered: bool = True, errors: str = "raise",
        progress: Watcher = False, total: int | None = None, ahead: int = AHEAD,
    ) -> None:  # fmt: skip
        check_choice("map", "errors", errors, ("raise", "return"))
        check_progress(progress)
        if total is not None:
            check_number("map", "total", total, 0, whole=True)
        self._ask, self._ordered, self._errors, self._ahead = ask, ordered, errors, ahead
        self._payloads = iter(payloads)
        self._total = total if total is not None else len(payloads) if isinstance(payloads, Sized) else None
        self._under_way: dict[Reply[R], object] = {}
        """With their payloads, in the order of asking."""
        self._done: _Arrivals[R] = _Arrivals()
        self._asked = self._given = self._failed = 0
        self._began, self._tell_at = time.monotonic(), 0.0
        self._watch = contextlib.ExitStack()
        self._tell = self._watch.enter_context(watching(progress))
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def _repr_html_(self) -> str:
        total = self._total if self._total is not None else "?"
        return html.table("Results", ("taken", "under way", "failed", "total"), [(self._given, len(self._under_way), self._failed, total)])

    def _fill(self) -> None:
        while len(self._under_way) < self._ahead:
            try:
                payload = next(self._payloads)
            except StopIteration:
                return
            reply = self._ask(payload)
            self._under_way[reply] = payload
            self._asked += 1
            if not self._ordered:
                reply.add_done_callback(self._done.came)

    # -- for

    def __iter__(self) -> Iterator[R]:
        return self

    def __next__(self) -> R:
        return self._next()[1]

    def pairs(self) -> Iterator[tuple[Any, R]]:
        """Yield (payload, result)."""
        with contextlib.suppress(StopIteration):
            while True:
                yield self._next()

    def _next(self) -> tuple[object, R]:
        if not self._under_way:
            self.close()
            raise StopIteration
        try:
            reply = next(iter(self._under_way)) if self._ordered else self._done.queue.get()
            return self._settled(reply)
        except BaseException:
            self.close()
            raise

    def _settled(self, reply: Future[R]) -> tuple[object, R]:
        """Return (payload, result), and ask for more."""
        try:
            result: Any = reply.result()
        except Exception as error:
            if self._errors == "raise":
                raise
            result = error
            self._failed += 1
        payload = self._under_way.pop(reply)  # type: ignore[call-overload]  # of ours
        self._given += 1
        self._fill()
        self._tell_progress()
        return payload, result

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if self._tell is None or (now < self._tell_at and self._under_way):
            return
        self._tell_at = now + TELL_EVERY
        rate = self._given / max(1e-3, now - self._began)
        self._tell(Progress(self._given, self._total if self._total is not None else self._asked, self._failed, rate))

    # -- async for

    def __aiter__(self) -> Results[R]:
        return self

    async def __anext__(self) -> R:
        if not self._under_way:
            self.close()
            raise StopAsyncIteration
        try:
            return self._settled(await (self._first_done() if self._ordered else self._done.next()))[1]
        except BaseException:
            self.close()
            raise

    async def _first_done(self) -> Future[R]:
        first = next(iter(self._under_way))
        first.add_done_callback(self._done.came)
        while await self._done.next() is not first:
            pass  # one that a cancelled wait has left
        return first

    # -- the end

    def close(self) -> None:
        """Take no further payloads, and withdraw those that have not started."""
        self._payloads = iter(())
        under_way, self._under_way = self._under_way, {}
        give_up(under_way)
        self._watch.close()

    def __del__(self) -> None:
        if "_watch" in self.__dict__:  # else it has not come that far
            self.close()

    def __enter__(self) -> Results[R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _All:
    """Those whom one request went to."""

    def __init__(self, replies: dict[str, Reply[Any]]) -> None:
        self._replies = replies

    def withdraw(self, numbers: list[int], *, kill: bool) -> None:
        give_up(self._replies.values(), kill=kill)


def together(replies: dict[str, Reply[Any]]) -> Reply[dict[str, object]]:
    """Return a reply that ends when all of some others have, with their results, or exceptions in the place of those."""
    whole: Reply[dict[str, object]] = Reply()
    whole.id, whole._asked = next(iter(replies.values())).id, _All(replies)
    left = set(replies)
    lock = threading.Lock()

    def ended(name: str) -> None:
        with lock:
            left.discard(name)
            complete = not left and not whole.done()
        if complete:
            whole._settle({each: reply.exception() or reply.result() for each, reply in replies.items()})

    for name, reply in replies.items():
        reply.add_done_callback(lambda _, name=name: ended(name))  # type: ignore[misc]
    return whole
