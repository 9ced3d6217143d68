"""What waits for some of those that share a process while they are given nothing, so that it does not hold the others. Pure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Generic, TypeVar

from mphub.core.crowds import Member
from mphub.core.delivery import Held, Range, Verdict
from mphub.core.scattered import Scattered
from mphub.core.spans import length, subtract
from mphub.core.window import Piece, Portion, Window
from mphub.options import MOST

M = TypeVar("M", bound=Member)


class Lane:
    """What waits for one of them."""

    __slots__ = ("count", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.count = 0

    def put(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.count += length(piece.spans)

    def empty(self) -> list[Piece]:
        found, self.pieces, self.count = self.pieces, [], 0
        return found


class Aside(Generic[M]):
    """Takes it out of what comes next."""

    def __init__(self) -> None:
        self.lanes: dict[M, Lane] = {}
        self.slow: set[M] = set()
        """Those that are put aside until what they run has ended."""
        self.resting: set[M] = set()
        """Those that are for another reason: paused, FATAL, gone."""
        self.fresh: list[tuple[M, Piece]] = []
        """What has been found for the latter: it may not be kept."""
        self._sifted: Piece | None = None

    def close(self, member: M, *, slow: bool = False) -> None:
        (self.slow if slow else self.resting).add(member)
        self.lanes.setdefault(member, Lane())
        self._sifted = None

    def open(self, member: M, *, slow: bool = False) -> list[Piece]:
        """Return what has waited for a member, if it is given events again."""
        (self.slow if slow else self.resting).discard(member)
        if member in self.slow or member in self.resting or member not in self.lanes:
            return []
        self._settle_in()
        return self.lanes.pop(member).pieces

    def empty(self) -> list[Piece]:
        """Take out all that waits here; nobody is given events again by that."""
        self._settle_in()
        self._sifted = None
        return list(chain.from_iterable(lane.empty() for lane in self.lanes.values()))

    def _settle_in(self) -> None:
        for member, piece in self.fresh:
            self.lanes[member].put(piece)
        self.fresh.clear()

    @property
    def kept(self) -> int:
        """Return how much waits for those that rest."""
        return sum(self.lanes[member].count for member in self.resting)

    def sift(self, piece: Piece) -> bool:
        """Put aside what a piece has for those members; say whether there is anything else in it."""
        if self.lanes and piece is not self._sifted and piece.portion.pairs is not None:
            for member, lane in self.lanes.items():
                if spans := piece.portion.pairs.of_members((member,), piece.spans):
                    piece.spans = subtract(piece.spans, spans)
                    apart = Piece(piece.portion, spans)
                    if member in self.resting:
                        self.fresh.append((member, apart))
                    else:
                        lane.put(apart)
            self._sifted = piece
        return bool(piece.spans)


class Hosted(Scattered, Generic[M]):
    """Delivery to the process of several subscribers."""

    def take(self, most: int = MOST) -> Held | None:
        sift(self.window, self.aside)
        return super().take(most) if self.window.waiting else None

    def _runs_alone(self, portion: Portion, index: int) -> bool:
        """Let a retry that has waited for its time run beside the events of others."""
        return index in portion.attempts and not portion.due

    def _most_attempts(self, portion: Portion, index: int) -> int:
        assert portion.pairs is not None
        member: M = portion.pairs.at(index)[1]
        return member.max_attempts

    @property
    def aside(self) -> Aside[M]:
        assert self.window.aside is not None
        return self.window.aside

    def died(self, states: Callable[[int, int], bytes], charged: Callable[[int], bool]) -> Verdict:
        self._forget_slow()
        return super().died(states, charged)

    def died_unseen(self, ranges: list[Range], states: Callable[[int, int], bytes], charged: Callable[[int], bool]) -> Verdict:
        self._forget_slow()
        return super().died_unseen(ranges, states, charged)

    def _forget_slow(self) -> None:
        for member in list(self.aside.slow):
            self.window.extend_left(self.aside.open(member, slow=True))


def sift(window: Window, aside: Aside[M]) -> None:
    """Let what comes next be for somebody who is given events."""
    while window.waiting and not aside.sift(window.waiting[0]):
        window.waiting.popleft()
