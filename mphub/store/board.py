"""The progress board of one incarnation: a mapped file that tells, without asking the process, what it holds and how far it is.

Layout: flags and the count of events that were run, a ring of ranges (delivery number, count, batch row, index of the first event), a ring
of state bytes, one per delivery number. The router writes ranges before it sends and counts what is committed, the subscriber writes
states, the supervisor reads. A process that runs several events at a time may be long at work on one of them: so its board has, in place of
the ranges, of each slot whose event it is.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mphub.core.spans import Spans, indexes

SLOTS: Final = 16384
"""State bytes; a subscriber holds at most this many events."""
RANGES: Final = 1024
READY, COMMITTED, RECALLED = 0, 1, 2
"""Offsets of flags: set up; something that it has handled is in the journal; what it has not started is wanted back."""
_RAN: Final = struct.Struct("<Q")
_RAN_AT: Final = 16
_RANGE: Final = struct.Struct("<QIQI8x")
_RINGS_AT: Final = 64
_STATES_AT: Final = _RINGS_AT + RANGES * _RANGE.size
SIZE: Final = _STATES_AT + SLOTS
_HEAD: Final = struct.Struct("<Q")
_HEAD_AT: Final = 8
_PLACE: Final = struct.Struct("<QQIB3x")
"""Of one slot: delivery number, batch row, index of the event, whether it is cancelled."""
LARGE: Final = SIZE + SLOTS * _PLACE.size
_CANCELLED_AT: Final = 16
_CANCELLED: Final = 6
"""Delivery numbers of events that are not wanted any more, the last ones; plus one, as 0 is none."""
_FLAG_AT: Final = 20
_ZEROES: Final = bytes(SLOTS)


class Board:
    """A mapped board; ``states`` starts at ``base`` of the map."""

    base: Final = _STATES_AT

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False, scattered: bool = False) -> None:
        """Map a board, or make one: ``scattered`` for a process that runs several events at a time."""
        self.path = Path(path)
        with open(path, "x+b" if create else "r+b") as file:
            try:
                if create:
                    os.posix_fallocate(file.fileno(), 0, LARGE if scattered else SIZE)  # a full tmpfs must say so here, not by SIGBUS later
                self.map = mmap.mmap(file.fileno(), 0)
            except OSError:
                if create:
                    self.path.unlink()
                raise

        self._has_places = len(self.map) > SIZE

    def close(self) -> None:
        self.map.close()

    def flag(self, which: int) -> bool:
        return self.map[which] != 0

    def set_flag(self, which: int, up: bool = True) -> None:
        self.map[which] = up

    def add_ran(self, count: int) -> int:
        """Count events that it has run, and that are committed; return how many by now."""
        (ran,) = _RAN.unpack_from(self.map, _RAN_AT)
        _RAN.pack_into(self.map, _RAN_AT, ran + count)
        return int(ran + count)

    def hand_out(self, number: int, count: int, row: int, index: int, spans: Spans | None = None) -> None:
        """Note a range and clear its states, before the frame is sent; ``spans``: which indexes of it are meant, if not all."""
        self._clear(number, count)
        if self._has_places:
            for i in indexes(spans) if spans is not None else range(index, index + count):
                n = number + i - index
                _PLACE.pack_into(self.map, self._place_of(n), n, row, i, False)
            return
        (written,) = _HEAD.unpack_from(self.map, _HEAD_AT)
        _RANGE.pack_into(self.map, _RINGS_AT + written % RANGES * _RANGE.size, number, count, row, index)
        _HEAD.pack_into(self.map, _HEAD_AT, written + 1)

    def ranges(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield the ranges that the ring still has, oldest first, or the last event of each slot."""
        if self._has_places:
            yield from sorted((number, 1, row, index) for number, row, index, _ in _PLACE.iter_unpack(self.map[SIZE:]) if row)
            return
        (written,) = _HEAD.unpack_from(self.map, _HEAD_AT)
        for i in range(max(0, written - RANGES), written):
            number, count, row, index = _RANGE.unpack_from(self.map, _RINGS_AT + i % RANGES * _RANGE.size)
            yield number, count, row, index

    def state(self, number: int) -> int:
        return self.map[_STATES_AT + number % SLOTS]

    def states(self, number: int, count: int) -> bytes:
        """Return the states of ``count`` delivery numbers."""
        first = number % SLOTS
        part = self.map[_STATES_AT + first : _STATES_AT + min(SLOTS, first + count)]
        return part + self.map[_STATES_AT : _STATES_AT + first + count - SLOTS] if first + count > SLOTS else part

    def cancel(self, number: int) -> None:
        """Tell a handler that asks that its event is not wanted any more."""
        if self._has_places:
            self.map[self._place_of(number) + _FLAG_AT] = True
            return
        _HEAD.pack_into(self.map, _CANCELLED_AT + number % _CANCELLED * _HEAD.size, number + 1)

    def is_cancelled(self, number: int) -> bool:
        if self._has_places:
            return self.map[self._place_of(number) + _FLAG_AT] != 0
        return bool(_HEAD.unpack_from(self.map, _CANCELLED_AT + number % _CANCELLED * _HEAD.size)[0] == number + 1)

    def finished_any(self) -> bool:
        """Say whether this incarnation has finished an event for good: what is handled but not committed runs again."""
        return self.flag(COMMITTED) or self.map.find(b"\x03", _STATES_AT, SIZE) >= 0

    def running_slot(self) -> int | None:
        """Return the slot of the first event that runs now, if any."""
        found = self.map.find(b"\x01", _STATES_AT, SIZE)
        return None if found < 0 else found - _STATES_AT

    def number_at(self, slot: int) -> int | None:
        """Return the newest delivery number that uses a slot."""
        if self._has_places:
            number, row, _, _ = _PLACE.unpack_from(self.map, self._place_of(slot))
            return int(number) if row else None
        newest = None
        for number, count, _, _ in self.ranges():
            offset = (slot - number) % SLOTS
            if offset < count:
                newest = number + offset
        return newest

    def running_slots(self) -> Iterator[int]:
        """Yield the slots of all events that run now."""
        found = self.map.find(b"\x01", _STATES_AT, SIZE)
        while found >= 0:
            yield found - _STATES_AT
            found = self.map.find(b"\x01", found + 1, SIZE)

    def is_running(self, slot: int) -> bool:
        return self.map[_STATES_AT + slot] == 1

    def _place_of(self, number: int) -> int:
        return SIZE + number % SLOTS * _PLACE.size

    def _clear(self, number: int, count: int) -> None:
        first = number % SLOTS
        fits = min(count, SLOTS - first)
        self.map[_STATES_AT + first : _STATES_AT + first + fits] = _ZEROES[:fits]
        if fits < count:
            self.map[_STATES_AT : _STATES_AT + count - fits] = _ZEROES[: count - fits]
