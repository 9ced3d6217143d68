"""How often a subscriber may start events. Pure: no clock, times go in."""

from __future__ import annotations

from math import inf

Grant = tuple[float, int]
"""(when, how many events)."""
GRAIN = 100
"""Parts of the period within which grants count as one, of the last moment: what is remembered is bounded."""


class Quota:
    """At most ``count`` events in any ``per`` seconds."""

    def __init__(self, count: int, per: float, grants: list[Grant]) -> None:
        self.count, self.per = count, per
        self.grants = grants
        """The last ones, oldest first; the list is its owner's, who keeps it."""
        self.used = sum(n for _, n in grants)

    def room(self, now: float) -> int:
        """Return how many events may start now."""
        grants = self.grants
        if grants and grants[-1][0] > now:  # the clock has been set back
            grants[:] = [(now, self.used)]
        while grants and grants[0][0] + self.per <= now:
            self.used -= grants.pop(0)[1]
        return self.count - self.used

    def spend(self, now: float, events: int) -> None:
        self.used += events
        if self.grants and now - self.grants[-1][0] < self.per / GRAIN:
            events += self.grants.pop()[1]
        self.grants.append((now, events))

    def give_back(self, events: int) -> None:
        """Take back what was spent on events that have not started."""
        self.used -= events
        while events and self.grants:
            now, spent = self.grants.pop()
            if spent > events:
                self.grants.append((now, spent - events))
            events = max(0, events - spent)

    @property
    def opens_at(self) -> float:
        """When more may start, if nothing may now."""
        return self.grants[0][0] + self.per if self.used >= self.count else inf
