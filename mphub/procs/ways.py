"""What the ways to run have in common: how a subscriber's process handles what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mphub.core.rows import Head
from mphub.events import Event

if TYPE_CHECKING:
    from mphub.procs.worker import Worker


class Way(ABC):
    """One of them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Take up what is needed before the first event."""

    def finish(self) -> None:  # noqa: B027
        """Give back what is needed no more."""

    @abstractmethod
    def run(self) -> None:
        """Handle what comes until asked to stop."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """That of what runs now."""

    @abstractmethod
    def current_events(self) -> list[Event]:
        """Return what runs now."""

    def current_heads(self) -> list[Head]:
        """Return the same without payloads."""
        return [(event.id, event.key, event.published_at, event.headers or None) for event in self.current_events()]

    def claims(self) -> Iterator[tuple[int, int]]:
        """Yield (first delivery number, count) of what has been read and is not known to be committed."""
        return self.worker.claimed_frames()
