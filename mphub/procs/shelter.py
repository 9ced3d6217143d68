"""SIGTERM ends a subscriber's process at the next bytecode, but where that would take half of what belongs together."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import TracebackType


class Stopped(SystemExit):
    """SIGTERM came: leave at the next bytecode; asyncio lets this kind through."""


class Shelter:
    """``with shelter:`` is done whole before the process leaves. The main thread's; it may be entered several times."""

    def __init__(self) -> None:
        self.depth = 0
        self.is_called = False

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.depth -= 1
        if self.is_called:
            self._leave()

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Let users' code in there be ended anywhere."""
        depth, self.depth = self.depth, 0
        if self.is_called:
            self._leave()
        try:
            yield
        finally:
            self.depth = depth

    def call(self, *_: object) -> None:
        """Leave here, or at the end of what is to be done whole."""
        self.is_called = True
        self._leave()

    def _leave(self) -> None:
        if not self.depth:
            self.is_called = False
            raise Stopped


shelter = Shelter()
_call = shelter.call  # a bound method is another one each time


def listen() -> None:
    """Let SIGTERM end this process."""
    signal.signal(signal.SIGTERM, _call)


def end_at_once() -> None:
    """Let SIGTERM end this process where it is: it leaves anyway."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_as_usual() -> None:
    """Give a process that a handler forks the usual SIGTERM back, unless the handler has set its own."""
    shelter.depth, shelter.is_called = 0, False
    if signal.getsignal(signal.SIGTERM) is _call:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
