"""The answer to a request."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

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
from mphub.observe import html

if TYPE_CHECKING:
    from mphub.reader import Reader


class Asked(Protocol):
    """What a request went to."""

    def withdraw(self, numbers: list[int], *, kill: bool) -> None:
        """Let events not start, or end the processes that run them."""


log = logging.getLogger("mphub")
R = TypeVar("R")
_changing = threading.RLock()
"""Who has it changes the state of a reply; nothing is called under it."""
OPEN, CANCELLED = ("PENDING", "RUNNING"), ("CANCELLED", "CANCELLED_AND_NOTIFIED")
"""States of a ``Future``; the other one is FINISHED."""


class Firm(threading.Condition):
    """A condition that an interrupt cannot leave locked: entering it and leaving it are one step each, in C.

    What ``Condition`` copies from its lock into each instance is looked up when it is needed: hardly any reply needs it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiters: deque[object] = deque()
        self.watchers: list[Any] = []
        """Those of ``concurrent.futures.wait`` and ``as_completed``."""
        self.callbacks: list[Callable[[Any], object]] = []

    __enter__ = property(lambda self: self._lock.__enter__)
    __exit__ = property(lambda self: self._lock.__exit__)
    acquire = property(lambda self: self._lock.acquire)
    release = property(lambda self: self._lock.release)
    _release_save = property(lambda self: self._lock._release_save)
    _acquire_restore = property(lambda self: self._lock._acquire_restore)
    _is_owned = property(lambda self: self._lock._is_owned)


class Reply(concurrent.futures.Future[R]):
    """A handler's answer: a future that can also be awaited in any running loop.

    ``result(timeout)`` raises the handler's own exception (remote traceback as ``__cause__``), HandlerCrashed, HandlerTimeout,
    SubscriberFatal, Dropped, NoSubscriber, AmbiguousKey or HubClosed; it always ends.
    """

    id: EventId
    _reader: Reader | None = None
    """What reads the stream that it comes by; who waits for it may do that too."""
    _asked: Asked | None = None
    """Whom to tell that it is not wanted any more."""

    # most are asked for their result when it is there: what it takes to wait is made by the first who does
    _firm: Firm | None = None
    _condition = property(lambda self: self._firm or self.__dict__.setdefault("_firm", Firm()))
    _waiters = property(lambda self: self._condition.watchers)
    _done_callbacks = property(lambda self: self._condition.callbacks)
    _state, _result, _exception = "PENDING", None, None

    def __init__(self) -> None:
        """Leave all that ``Future`` makes for later."""

    def _repr_html_(self) -> str:
        """Show how it stands, without waiting; of what came of it the type alone, whose text may be long or raise."""
        with self._condition:
            state, error = self._state.lower(), self._exception
            came = error if error is not None else self._result
        kind = type(came).__name__ if state == "finished" else ""
        return html.table("Reply", ("id", "state", "result"), [(getattr(self, "id", ""), state, kind)])

    def done(self) -> bool:
        return self._state not in OPEN

    def result(self, timeout: float | None = None) -> R:
        if self._state == "FINISHED" and self._exception is None:  # it is, last of all
            return self._result  # type: ignore[return-value]
        return super().result(self._read(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return super().exception(self._read(timeout))

    def _read(self, timeout: float | None) -> float | None:
        return timeout if self._reader is None or self.done() or not self._reader.is_ours else self._reader.read_for(self, timeout)

    def cancel(self) -> bool:
        """Give it up, unless it has ended; its event is withdrawn if it has not started, else nobody gets the result.

        A handler that runs can see that by ``current_event().cancelled``.
        """
        return give_up([self])

    def kill(self) -> bool:
        """Give it up, unless it has ended, and end the process that runs its event: at once, charged to nobody.

        What else that process had in hand runs again in the next one.
        """
        return give_up([self], kill=True)

    def _let_go(self) -> bool:
        """Cancel the future alone; say whether it had not ended."""
        with _changing:
            was = self._state
            if was == "PENDING":
                self._state = "CANCELLED"
        if was != "PENDING":
            return was in CANCELLED
        if self._firm is not None:
            with self._firm:
                self._firm.notify_all()
            self._invoke_callbacks()
        if self._reader is not None:
            self._reader.give_up(self)
        return True

    def _settle(self, result: R | None, error: BaseException | None = None) -> None:
        """End it, unless it has been cancelled. Once more it is told again: an interrupt may have come between the end and that.

        Who begins to wait makes a condition first and looks at the state then: either that is seen here, or the end there.
        """
        with _changing:
            if self._state in OPEN:
                self._result, self._exception = result, error
                self._state = "FINISHED"
            elif self._state == "CANCELLED":
                self._state = "CANCELLED_AND_NOTIFIED"
        if self._firm is not None:
            self._tell(self._firm)

    def _tell(self, firm: Firm) -> None:
        """Let all know who wait for the end."""
        with firm:
            for watcher in firm.watchers:
                if self not in watcher.finished_futures:
                    if self._state != "FINISHED":
                        watcher.add_cancelled(self)
                    elif self._exception is not None:
                        watcher.add_exception(self)
                    else:
                        watcher.add_result(self)
            firm.notify_all()
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        """Call each once, also if this is called once more."""
        while self._done_callbacks:
            callback = self._done_callbacks.pop(0)
            try:
                callback(self)
            except Exception:
                log.exception("calling %r for %r failed", callback, self)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[R]], object]) -> None:
        super().add_done_callback(fn)
        if self._reader is not None and not self.done():
            self._reader.hand_back(self)

    def __await__(self) -> Generator[Any, None, R]:
        return asyncio.wrap_future(self).__await__()


def give_up(replies: Iterable[Reply[Any]], *, kill: bool = False) -> bool:
    """Cancel replies, and tell those whom they were asked of together; say whether all had not ended."""
    asked: dict[Asked, list[int]] = {}
    complete = True
    for reply in replies:
        if not reply._let_go():
            complete = False
        elif reply._asked is not None:
            asked.setdefault(reply._asked, []).append(reply.id.number)
    for each, numbers in asked.items():
        each.withdraw(numbers, kill=kill)
    return complete


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


def _reset() -> None:
    """Begin anew in a forked child, whichever thread of the parent had it."""
    global _changing
    _changing = threading.RLock()


os.register_at_fork(after_in_child=_reset)
