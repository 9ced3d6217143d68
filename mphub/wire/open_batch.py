"""The batch that a publisher is filling."""

from __future__ import annotations

import sys
import threading
from typing import Any

from mphub.wire.frames import MAX_EVENTS, Extra

Mode = tuple[str | None, bool, int]
"""(target, is a request, epoch): what all events of a frame have in common."""
PLAIN: Mode = (None, False, 0)
RUN_BYTES = 8
"""That a run takes beside its key."""


class OpenBatch:
    """Events that go out as one frame; an interrupt leaves each of them wholly inside or outside.

    While it is open, any thread may put plain events in without the connection's lock, in steps between which no other thread can come
    (``Connection.publish_plain``). Whoever has the lock closes it before anything else.
    """

    __slots__ = ("events", "extras", "first", "first_id", "key", "last_id", "limit", "mode", "next_id", "runs", "size")

    def __init__(self, base: int, first: int, mode: Mode = PLAIN) -> None:
        self.mode = mode
        self.first, self.first_id = first, base + first
        """The number and the id of the first event."""
        self.next_id = self.first_id
        self.last_id = self.first_id + MAX_EVENTS - 1
        self.limit = 0
        """Bytes that it may reach without the lock; 0: it is closed."""
        self.events: list[bytes] = []
        self.runs: list[Any] = []
        """A key, the place of its first event, a key, ...: one list, so that one step adds both."""
        self.key: str | None = None
        """That of the last run."""
        self.extras: dict[int, Extra] = {}
        self.size = 0
        """Bytes."""

    def append(self, key: str, data: bytes, extra: Extra | None) -> int:
        """Put one event in while the batch is closed, and return its number."""
        if self.key != key:
            self.begin_run(key)
        place = len(self.events)
        size = len(data) + (extra.size if extra is not None else 0)
        # no call from here on: an interrupt comes after one
        if extra is not None:
            self.extras[place] = extra
        self.size += size
        self.next_id += 1
        self.events += [data]
        return self.first + place

    def begin_run(self, key: str) -> None:
        self.key = None  # an interrupt in here must not leave the next event to this run
        self.runs += (key, len(self.events))
        self.key = key
        self.size += len(key) + RUN_BYTES


def is_atomic() -> bool:
    """Say whether lines without a call or a loop run with no other thread in between.

    So they do under the GIL: CPython lets it go, and runs signal handlers, only at calls and backward jumps
    (Python/ceval.c, ``eval_breaker``); unless a debugger or a coverage tool has each line call something.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    watched = monitoring is not None and any(map(monitoring.get_tool, range(6)))
    return not watched and sys.gettrace() is None and threading.gettrace() is None
