"""One thread that does what others ask, one thing after the other: who is interrupted while asking leaves nothing half done."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from mphub.errors import HubError, HubFailed, MphubError

log = logging.getLogger("mphub")
T = TypeVar("T")
MANY = 64
"""Things that are done in one turn."""


class Answer(Generic[T]):
    """What comes of something that was asked. No lock of Python's is in it: an interrupt that comes while one waits harms nobody."""

    __slots__ = ("_box",)

    def __init__(self) -> None:
        self._box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def give(self, result: T | None, error: BaseException | None = None) -> None:
        self._box.put((result, error))

    @property
    def is_there(self) -> bool:
        return not self._box.empty()

    def take(self, timeout: float | None = None) -> T:
        """Wait for it; seconds.

        Raises TimeoutError, or what it says.
        """
        try:
            result, error = self._box.get(timeout=None if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        found: T = result
        return found


Task = tuple[Callable[[], Any], Answer[Any]]


class Work(Protocol):
    """What a clerk's employer does."""

    def timeout(self) -> float | None:
        """Return after how many seconds there is something to do though nobody asks."""
        ...

    def work(self, tasks: list[Task]) -> None:
        """Do what is asked, and what is due."""
        ...


class Clerk:
    """The thread, and what it has been asked."""

    def __init__(self, name: str, employer: Work, lock: Any) -> None:
        self._employer = employer
        self._is_locked_here: Callable[[], bool] = lock._is_owned  # as Condition uses it
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        """With None to be looked at and nothing more. An interrupt comes before or behind a ``put``, which is one step."""
        self._in_hand: list[Task] = []
        self._conditions: dict[Answer[Any], Callable[[], Any]] = {}
        self._ended: MphubError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- in any thread

    @property
    def is_behind(self) -> bool:
        """Say whether more is asked than is done in one turn."""
        return self._tasks.qsize() > MANY

    def ask(self, act: Callable[[], T]) -> Answer[T]:
        """Have something done after all that was asked before."""
        answer: Answer[T] = Answer()
        self._tasks.put((act, answer))
        if self._ended is not None:
            self._refuse()
        return answer

    def ring(self) -> None:
        """Let the thread look what there is to do."""
        self._tasks.put(None)

    def wait(self, answer: Answer[T], timeout: float | None = None) -> T:
        """Wait for an answer; seconds. In the clerk's own thread, in something that a reply calls say, go on with what is asked.

        Raises TimeoutError, HubError, or what the answer says.
        """
        if self._is_locked_here():
            raise HubError("this call, of a finalizer, interrupts the hub's own bookkeeping: set a flag there, or let another thread call")
        while self._thread is threading.current_thread() and not answer.is_there:
            self._look()
        return answer.take(timeout)

    @contextlib.contextmanager
    def expecting(self, condition: Callable[[], T | None]) -> Iterator[Answer[T]]:
        """Yield what a condition returns at the end of the first turn in which that is not None."""
        answer: Answer[T] = Answer()
        self._conditions[answer] = condition
        try:
            self.ring()
            self.check()
            yield answer
        finally:
            self._conditions.pop(answer, None)

    def end(self, reason: MphubError) -> None:
        """End the thread; what is asked from now on, and who still waits, is told why."""
        self._ended = self._ended or reason
        self.ring()
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def is_over(self) -> bool:
        return self._ended is not None

    def check(self) -> None:
        """Raise what the thread ended with, if it has."""
        if self._ended is not None:
            raise self._ended

    # -- with the employer's lock

    def look_at_conditions(self) -> None:
        """Answer those who wait for something that is so now."""
        for answer, condition in list(self._conditions.items()):
            found = condition()
            if found is not None and self._conditions.pop(answer, None) is not None:
                answer.give(found)

    # -- the thread

    def _run(self) -> None:
        """Work until told to end; whatever ends it, nobody waits for ever."""
        try:
            while self._ended is None:
                self._look()
        except BaseException as error:
            self._ended = HubFailed(f"the hub's own thread failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._refuse()

    def _look(self) -> None:
        """Wait until there is something to do, and do it."""
        found: list[Task | None] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._tasks.get(timeout=self._employer.timeout()))
            while len(found) < MANY:
                found.append(self._tasks.get_nowait())
        self._in_hand = [task for task in found if task is not None]
        self._employer.work(self._in_hand)
        self._in_hand = []

    def _refuse(self) -> None:
        """Tell all that ask or wait that nothing is done any more."""
        answers = [*self._conditions, *(answer for _, answer in self._in_hand)]
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                answers += [task[1]] if task is not None else []
        for answer in answers:
            answer.give(None, self._ended)


def perform(tasks: list[Task]) -> list[tuple[Answer[Any], Any, Exception | None]]:
    """Do some things; return what is to be answered."""
    outcomes: list[tuple[Answer[Any], Any, Exception | None]] = []
    for act, answer in tasks:
        try:
            outcomes.append((answer, act(), None))
        except Exception as error:
            if not isinstance(error, MphubError):  # a mistake of ours: perhaps nobody waits for the answer
                log.exception("something that a hub was asked has failed")
            outcomes.append((answer, None, error))
    return outcomes
