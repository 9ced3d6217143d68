"""Delivery to a process that runs several events at a time: they end in any order, and each is let go of by itself. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

from mphub.core.credit import Credit
from mphub.core.delivery import Delivery, Held
from mphub.core.spans import Spans, indexes, spans_of, subtract
from mphub.core.window import Piece, Portion, Window

FEW: Final = 16
"""Ranges with nothing left in them that are not worth a tidy-up."""


class Scattered(Delivery):
    """What a process holds that may be long at work on one event and through with thousands behind it.

    So its delivery numbers go round the slots that are taken, and its board remembers of each slot whose it is.
    """

    def __init__(self, window: Window, max_attempts: int, credit: Credit, slots: int, at_a_time: int) -> None:
        super().__init__(window, max_attempts, credit, slots, at_a_time)
        self._by_number: dict[int, Held] = {}
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
        for number in numbers_of(held, held.spans):
            self._by_number[number] = held
            self._taken[number % self.slots] = 1

    def find(self, number: int) -> tuple[Portion, int] | None:
        held = self._by_number.get(number)
        return None if held is None else (held.portion, held.index + number - held.number)

    # -- what came of it

    def _release_within(self, numbers: Spans) -> list[tuple[Portion, Spans]]:
        found: dict[Held, list[int]] = {}
        for first, end in numbers:
            some = range(first, end) if end - first <= len(self._by_number) else sorted(n for n in self._by_number if first <= n < end)
            for number in some:
                if number in self._by_number:
                    held = self._by_number[number]
                    found.setdefault(held, []).append(held.index + number - held.number)
        released = []
        for held, ended in found.items():
            spans = spans_of(ended)
            held.spans = subtract(held.spans, spans)
            self._let_go(held, spans)
            released.append((held.portion, spans))
        self._tidy()
        return released

    def _let_go(self, held: Held, spans: Spans) -> None:
        super()._let_go(held, spans)
        for number in numbers_of(held, spans):
            del self._by_number[number]
            self._taken[number % self.slots] = 0

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
        self._by_number.clear()
        self._taken[:] = bytes(self.slots)


def numbers_of(held: Held, spans: Spans) -> list[int]:
    """Return the delivery numbers of some of its events."""
    offset = held.number - held.index
    return [offset + index for index in indexes(spans)]
