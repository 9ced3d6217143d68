"""A clock that a test turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mphub.errors import HubError
from mphub.options import check_number

DIGITS = 6
"""Of a second: ten times 0.1 s are to be one second."""


class Clock:
    """Stands still until a test moves it, or until its hub is drained; what is due by then runs, at its time and in its order.

    now: seconds since the epoch; by default the time at which it is made.
    """

    def __init__(self, now: float | None = None) -> None:
        if now is not None:
            check_number("Clock", "now", now, 0)
        self._now = self._until = round(time.time() if now is None else now, DIGITS)
        self._work_off: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Clock at {self._now:.6f}>"

    def __call__(self) -> float:
        return self._now

    @property
    def now(self) -> float:
        """Seconds since the epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass, and run what is due meanwhile.

        Raises what a handler raised, after all else has run; InvalidOption.
        """
        check_number("clock.advance", "seconds", seconds, 0)
        self._until = round(self._now + seconds, DIGITS)
        try:
            self._go_on()
        finally:
            self._now = max(self._now, self._until)
            self._go_on()  # drops what is too late to start by now

    def wait_until(self, due: float, *, patient: bool) -> bool:
        """Jump there, if that is before the time to which a test moves this clock, or somebody waits for it."""
        if due > max(self._now, self._until) + 10**-DIGITS and not patient:
            return False
        self._now = max(self._now, due)
        return True

    def _go_on(self) -> None:
        if self._work_off is not None:
            self._work_off()

    @contextmanager
    def _drives(self, work_off: Callable[[], None]) -> Iterator[None]:
        """Be the clock of a hub."""
        if self._work_off is not None:
            raise HubError("clock: it is the clock of another hub that runs: make one for each hub")
        self._work_off = work_off
        try:
            yield
        finally:
            self._work_off = None
