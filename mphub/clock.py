"""What time it is and how to wait for it, as one thing that is passed in: a test turns a clock of its own (``mphub.testing``)."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the epoch."""

    def __call__(self) -> float: ...

    def wait_until(self, due: float, *, patient: bool) -> bool:
        """Wait, if this clock does so; say whether it is that time. ``patient``: the caller has nothing else to do."""
        ...


class SystemClock:
    """The machine's."""

    def __call__(self) -> float:
        return time.time()

    def wait_until(self, due: float, *, patient: bool) -> bool:
        time.sleep(max(0.0, due - time.time()))
        return True
