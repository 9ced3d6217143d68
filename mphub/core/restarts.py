"""Restart counting: deaths in a row with nothing finished in between."""

from __future__ import annotations

from dataclasses import dataclass

from mphub.options import Restart


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about a death: start again after ``delay`` seconds, or stay in ``state``."""

    state: str
    """BACKOFF, FATAL or STOPPED."""
    delay: float = 0.0


class RestartCounter:
    """Counts the deaths in a row of one process."""

    def __init__(self, rule: Restart) -> None:
        self.rule = rule
        self.in_a_row = 0

    def died(self, *, finished_any: bool, by_itself: bool, exit_ok: bool) -> Decision:
        """Decide about a death; those that an operator or the hub caused do not count."""
        if finished_any:
            self.in_a_row = 0
        if not by_itself:
            return Decision("BACKOFF")
        if self.rule.mode == "never" or (self.rule.mode == "on-failure" and exit_ok):
            return Decision("STOPPED")
        self.in_a_row += 1
        if self.in_a_row > self.rule.max_restarts:
            return Decision("FATAL")
        return Decision("BACKOFF", self.rule.delay_for(self.in_a_row))

    def reset(self) -> None:
        """Begin anew: an operator restarts it."""
        self.in_a_row = 0
