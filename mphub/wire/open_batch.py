"""The batch that a publisher is filling."""

from __future__ import annotations

from operator import sub
from typing import Any

from mphub.wire.frames import Extra

Mode = tuple[str | None, bool, int]
"""(target, is a request, epoch): what all events of a frame have in common."""
PLAIN: Mode = (None, False, 0)


class OpenBatch:
    """Events that go out as one frame; an interrupt leaves each of them wholly inside or outside."""

    __slots__ = ("events", "extras", "first", "first_id", "key", "mode", "runs", "size")

    def __init__(self, base: int, first: int, mode: Mode = PLAIN) -> None:
        self.mode = mode
        self.first, self.first_id = first, base + first
        """The number and the id of the first event."""
        self.events: list[bytes] = []
        self.runs: list[str | int] = []
        """A key, the place of its first event, a key, ...: one list, so that one step adds both."""
        self.key: str | None = None
        """That of the last run."""
        self.extras: dict[int, Extra] = {}
        self.size = 0
        """Bytes."""

    def append(self, key: str, data: bytes, extra: Extra | None) -> int:
        """Put one event in and return its number."""
        if self.key != key:
            self.begin_run(key)
        place = len(self.events)
        size = len(data) + (extra.size if extra is not None else 0)
        # no call from here on: an interrupt comes after one
        if extra is not None:
            self.extras[place] = extra
        self.size += size
        self.events += [data]
        return self.first + place

    def begin_run(self, key: str) -> None:
        self.key = None  # an interrupt in here must not leave the next event to this run
        self.runs += (key, len(self.events))
        self.key = key
        self.size += len(key) + 8

    def counts(self) -> list[tuple[str, int]]:
        """Return the runs as (key, count)."""
        keys: list[Any] = self.runs[::2]
        starts: list[Any] = self.runs[1::2]
        counts = list(map(sub, [*starts[1:], len(self.events)], starts))
        found = list(zip(keys, counts, strict=True))
        return found if 0 not in counts else [run for run in found if run[1]]
