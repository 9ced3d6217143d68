"""Answers to requests: ``Reply`` for one, ``Results`` for a stream of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from mphub.errors import (
    AmbiguousKey,
    Dropped,
    HandlerCrashed,
    HandlerTimeout,
    HubClosed,
    NoSubscriber,
    SubscriberFatal,
    load_error,
)
from mphub.events import EventId

if TYPE_CHECKING:
    from mphub.reader import Reader

R = TypeVar("R")
AHEAD = 64
"""Requests that ``map`` has under way before the consumer takes a result."""


class Reply(concurrent.futures.Future[R]):
    """A handler's answer: a future that can also be awaited in any running loop.

    ``result(timeout)`` raises the handler's own exception (remote traceback as ``__cause__``), HandlerCrashed, HandlerTimeout,
    SubscriberFatal, Dropped, NoSubscriber, AmbiguousKey or HubClosed; it always ends.
    """

    id: EventId
    _reader: Reader | None = None
    """What reads the stream that it comes by; who waits for it may do that too."""

    def result(self, timeout: float | None = None) -> R:
        return super().result(self._read(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return super().exception(self._read(timeout))

    def _read(self, timeout: float | None) -> float | None:
        return timeout if self._reader is None or self.done() else self._reader.read_for(self, timeout)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[R]], object]) -> None:
        super().add_done_callback(fn)
        if self._reader is not None and not self.done():
            self._reader.hand_back(self)

    def __await__(self) -> Generator[Any, None, R]:
        return asyncio.wrap_future(self).__await__()


class Results(Generic[R]):
    """Results of ``map`` in the order of the payloads; leaving the loop takes no further payloads."""

    def __init__(self, ask: Callable[[Any], Reply[R]], payloads: Iterable[object]) -> None:
        self._ask = ask
        self._payloads = iter(payloads)
        self._under_way: deque[Reply[R]] = deque()
        self._fill()

    def _fill(self) -> None:
        while len(self._under_way) < AHEAD:
            try:
                payload = next(self._payloads)
            except StopIteration:
                return
            self._under_way.append(self._ask(payload))

    def __iter__(self) -> Iterator[R]:
        return self

    def __next__(self) -> R:
        if not self._under_way:
            raise StopIteration
        try:
            result = self._under_way[0].result()
        except BaseException:
            self.close()
            raise
        self._under_way.popleft()
        self._fill()
        return result

    def close(self) -> None:
        """Take no further payloads; answers that are under way are not waited for."""
        self._payloads = iter(())
        self._under_way.clear()

    def __enter__(self) -> Results[R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def failure_of(outcome: str, body: bytes) -> BaseException:
    """Turn the end of a request that is no result into its exception."""
    detail = msgspec.msgpack.decode(body)
    if outcome == "exception":
        error, trace = detail
        raised = load_error(error, trace)
        # asyncio cannot carry a StopIteration: the await would never end
        return RuntimeError(f"StopIteration raised in the handler: {raised}") if isinstance(raised, StopIteration) else raised
    makers: dict[str, Callable[[], BaseException]] = {
        "crashed": lambda: HandlerCrashed(*detail),
        "timeout": lambda: HandlerTimeout(detail),
        "fatal": lambda: SubscriberFatal(*detail),
        "dropped": lambda: Dropped(detail),
        "nobody": lambda: NoSubscriber(detail),
        "ambiguous": lambda: AmbiguousKey(detail),
    }
    return makers.get(outcome, lambda: HubClosed(str(detail)))()
