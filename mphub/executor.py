"""A pool of processes with the interface of ``concurrent.futures``, on a hub's subscriber."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mphub.reply import Reply, give_up
from mphub.wire.functions import Functions

if TYPE_CHECKING:
    from mphub.subscription import Subscription

P = ParamSpec("P")
R = TypeVar("R")
FEW = 1000
POLL = 0.01
"""Seconds between two looks at what still runs."""
Task = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A function, or what is one once it is loaded, and its arguments."""


def run(task: Task) -> Any:
    """Make one call; what the pool's processes handle."""
    function, args, kwargs = task
    return function(*args, **kwargs)


class HubExecutor(Executor):
    """Runs calls in the replicas of a subscriber; made by ``hub.executor()``.

    Unlike a ``ProcessPoolExecutor`` it outlives the death of a process: the call that ran ends with HandlerCrashed, all others go on.
    Functions and arguments travel like payloads, so lambdas and what ``__main__`` defines work.
    """

    def __init__(self, subscription: Subscription[Task, Any]) -> None:
        self._subscription = subscription
        self._functions = Functions()
        self._lock = threading.Lock()
        self._is_shut = False
        self._end: threading.Thread
        self._calls: deque[Reply[Any]] = deque()
        self._many = FEW
        """Calls from which those that have ended are let go: a callback for each would cost a third of a call."""

    @property
    def subscription(self) -> Subscription[Task, Any]:
        """The subscriber whose replicas run the calls: scale it, look at its statistics."""
        return self._subscription

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Reply[R]:
        """Have a call made; the reply ends with its result or with why there is none.

        Raises PayloadError, RuntimeError after ``shutdown``.
        """
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        reply: Reply[R] = self._subscription.request((self._functions.pack(fn), args, kwargs))
        self._calls.append(reply)
        if len(self._calls) >= self._many:
            self._forget_done()
        return reply

    def _forget_done(self) -> None:
        for _ in range(len(self._calls)):  # other threads add at its end meanwhile
            with contextlib.suppress(IndexError):
                reply = self._calls.popleft()
                if not reply.done():
                    self._calls.append(reply)
        self._many = FEW + 2 * len(self._calls)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the processes once all are done; with ``wait`` return then.

        ``cancel_futures``: calls that have not started are cancelled.
        """
        with self._lock:
            first, self._is_shut = not self._is_shut, True
            if first:
                self._end = threading.Thread(target=self._finish, args=(cancel_futures,), name="mphub-shutdown")
                self._end.start()
        if wait:
            self._end.join()

    def _finish(self, cancel_futures: bool) -> None:
        if cancel_futures:
            self._cancel_what_waits()
        self._subscription.unsubscribe(drain=not cancel_futures)

    def _cancel_what_waits(self) -> None:
        """Let what runs end; all that is pending then has not started."""
        self._subscription.pause()
        while True:
            statistics = self._subscription.statistics()
            waits = [reply for reply in list(self._calls) if not reply.done()]
            if not statistics.running and len(waits) <= statistics.waiting:
                break
            time.sleep(POLL)
        give_up(waits)
