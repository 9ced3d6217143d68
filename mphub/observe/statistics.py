"""Frozen figures of a hub and its subscribers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mphub.observe import html


@dataclass(frozen=True, slots=True)
class SubscriberStatistics:
    """One subscriber; accepted = handled + dead + dropped + waiting + running, always."""

    state: str
    pids: tuple[int, ...] = ()
    accepted: int = 0
    waiting: int = 0
    running: int = 0
    """Started or finished, but not committed yet."""
    handled: int = 0
    failed: int = 0
    """Attempts that raised."""
    retried: int = 0
    """Runs beyond the first, charged or not."""
    dead: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    restarts: int = 0
    mean: float = 0.0
    """Seconds a handler took; p50, p95 and p99 over the last samples."""
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    cpu: float = 0.0
    """Percent of a core, since its start."""
    rss: int = 0
    """Bytes."""


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """The hub: events taken in, events for nobody, its own processes, its subscribers."""

    accepted: int
    unmatched: int
    pids: Mapping[str, int]
    """``supervisor`` and ``router``."""
    subscribers: Mapping[str, SubscriberStatistics]

    def _repr_html_(self) -> str:
        caption = f"{self.accepted:,} accepted, {self.unmatched:,} unmatched"
        rows = [(name, one.state, *html.figures(one)) for name, one in self.subscribers.items()]
        return html.table(caption, ("name", "state", *html.FIGURES), rows)


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """Return p50, p95 and p99 of samples (0.0 without any)."""
    if not samples:
        return 0.0, 0.0, 0.0
    ranked = sorted(samples)
    last = len(ranked) - 1
    return ranked[last // 2], ranked[int(last * 0.95)], ranked[int(last * 0.99)]
