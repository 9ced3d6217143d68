"""Credit: how many events a subscriber's process may hold at once."""

from __future__ import annotations

SLOW = 0.025
"""Seconds a handler takes from which it is given one event at a time."""
WORTH = 0.05
"""Seconds of work that a process holds."""


class Credit:
    """One event until a time is known and while handlers are slow; else about 50 ms of work, at most ``cap`` events."""

    def __init__(self, cap: int, least: int = 1, at_a_time: int = 1) -> None:
        self.cap, self.least, self.at_a_time = cap, min(least, cap), at_a_time
        self.limit = self.least
        self._estimate = 0.0

    def measured(self, events: int, seconds: float) -> None:
        """Take in how long some events took, each by itself; slowness is believed at once, speed by and by."""
        each = seconds / events / self.at_a_time
        self._estimate = each if each > self._estimate else 0.5 * self._estimate + 0.5 * each
        wanted = 1 if self._estimate > SLOW else min(self.cap, int(WORTH / max(self._estimate, 1e-9)))
        self.limit = max(self.least, wanted)
