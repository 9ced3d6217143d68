"""Delivery to a process that runs several events at a time: they end in any order, and each is let go of by itself. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from mphub.core.credit import Credit
from mphub.core.delivery import Delivery, Held
from mphub.core.spans import Spans, contains, subtract
from mphub.core.window import Piece, Portion, Window

FEW: Final = 16
"""Ranges with nothing left in them that are not worth a tidy-up."""


class Scattered(Delivery):
    """What a process holds that may be long at work on one event and through with thousands behind it.

    So its delivery numbers go round the slots that are taken, and its board remembers of each slot whose it is.
    """

    def __init__(self, window: Window, max_attempts: int, credit: Credit, slots: int, at_a_time: int) -> None:
        super().__init__(window, max_attempts, credit, slots, at_a_time)
        self._taken = bytearray(slots)

    # -- what the process holds

    def _is_closed(self) -> bool:
        return bool(self.held) and self.held[-1].alone

    def _stretch(self) -> int:
        """Go on to the next number whose slot is free, and return how many free ones there are from there on."""
        at = self.number % self.slots
        free = self._taken.find(0, at)
        if free < 0:
            free = self._taken.find(0)
            if free < 0:
                return 0
        self.number += (free - at) % self.slots
        end = self._taken.find(1, free)
        if end >= 0:
            return end - free
        first = self._taken.find(1)
        return self.slots if first < 0 else self.slots - free + first

    def _hand_over(self, queue: deque[Piece], taken: Spans, *, alone: bool, laned: bool = False) -> Held:
        held = super()._hand_over(queue, taken, alone=alone, laned=laned)
        self._note(held)
        return held

    def _hold(self, held: Held) -> None:
        super()._hold(held)
        self._note(held)

    def _note(self, held: Held) -> None:
        self._mark(held, held.spans, b"\1")

    def _mark(self, held: Held, spans: Spans, taken: bytes) -> None:
        offset = held.number - held.index
        for a, b in spans:
            first = (offset + a) % self.slots
            fits = min(b - a, self.slots - first)
            self._taken[first : first + fits] = taken * fits
            self._taken[: b - a - fits] = taken * (b - a - fits)

    def find(self, number: int) -> tuple[Portion, int] | None:
        at = bisect_right(self.held, number, key=number_of) - 1
        if at < 0:
            return None
        held = self.held[at]
        index = held.index + number - held.number
        return (held.portion, index) if contains(held.spans, index) else None

    # -- what came of it

    def _release_within(self, numbers: Spans) -> list[tuple[Portion, Spans]]:
        released = []
        for held in self._with(numbers):
            left = held.without(numbers)
            spans, held.spans = subtract(held.spans, left), left
            self._let_go(held, spans)
            released.append((held.portion, spans))
        self._tidy()
        return released

    def _with(self, numbers: Spans) -> Iterable[Held]:
        """Return what is held that some numbers may be of."""
        found: dict[Held, None] = {}
        for first, end in numbers:
            at = max(0, bisect_right(self.held, first, key=number_of) - 1)
            while at < len(self.held) and self.held[at].number < end:
                found[self.held[at]] = None
                at += 1
        return found

    def _let_go(self, held: Held, spans: Spans) -> None:
        super()._let_go(held, spans)
        self._mark(held, spans, b"\0")

    def _tidy(self) -> None:
        """Take ranges off in which nothing is left: those in the middle once they are many."""
        if len(self.held) > 2 * self.holding + FEW:
            kept = [held for held in self.held if held.spans]
            self.held.clear()
            self.held.extend(kept)
        while self.held and not self.held[0].spans:
            self.held.popleft()
        while self.held and not self.held[-1].spans:
            self.held.pop()

    def _forget(self) -> None:
        super()._forget()
        self._taken[:] = bytes(self.slots)


number_of = attrgetter("number")
