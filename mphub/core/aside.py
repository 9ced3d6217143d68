"""What waits for some of those that share a process while they are given nothing, so that it does not hold the others. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from mphub.core.crowds import Member
from mphub.core.delivery import Held, Range, Verdict
from mphub.core.scattered import Scattered
from mphub.core.spans import Spans, first_of, indexes, length, spans_of, subtract
from mphub.core.window import Piece, Portion, Window
from mphub.options import MOST

M = TypeVar("M", bound=Member)


class Lane:
    """What waits for one of them."""

    __slots__ = ("count", "pieces")

    def __init__(self) -> None:
        self.pieces: deque[Piece] = deque()
        self.count = 0

    def put(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.count += length(piece.spans)

    def first(self) -> Piece | None:
        """Take out the first event, if there is one."""
        if not self.pieces:
            return None
        piece = self.pieces[0]
        taken = first_of(piece.spans, 1)
        piece.spans = subtract(piece.spans, taken)
        if not piece.spans:
            self.pieces.popleft()
        self.count -= 1
        return Piece(piece.portion, taken)

    def empty(self) -> Iterable[Piece]:
        found, self.pieces, self.count = self.pieces, deque(), 0
        return found


class Aside(Generic[M]):
    """Takes it out of what comes next."""

    def __init__(self) -> None:
        self.lanes: dict[M, Lane] = {}
        self.slow: set[M] = set()
        """Those that are given one event after the other."""
        self.resting: set[M] = set()
        """Those that are given none: they are paused, FATAL or gone."""
        self.fresh: list[tuple[M, Piece]] = []
        """What has been found for the latter: it may not be kept."""
        self.next: deque[Piece] = deque()
        """What slow ones are given, in turn with all that waits."""
        self.is_their_turn = True
        self._sifted: Piece | None = None

    def close(self, member: M, *, slow: bool = False) -> None:
        (self.slow if slow else self.resting).add(member)
        self.lanes.setdefault(member, Lane())
        self._sifted = None

    def open(self, member: M, *, slow: bool = False) -> list[Piece]:
        """Return what has waited for a member, if it is given events as they come again."""
        (self.slow if slow else self.resting).discard(member)
        if member in self.slow or member in self.resting or member not in self.lanes:
            return []
        self._settle_in()
        return list(self.lanes.pop(member).pieces)

    def go_on(self, member: M) -> None:
        """Let a slow member have the next event that has waited for it."""
        if member not in self.slow:
            return
        if member in self.resting:
            self.slow.discard(member)  # nothing of it is under way, whose end would let it go on once it rests no more
        elif (piece := self.lanes[member].first()) is not None:
            self.next.append(piece)
        else:
            self.open(member, slow=True)

    def empty(self) -> list[Piece]:
        """Take out all that waits here; only those whose next event is under way are given events as they come again."""
        self._settle_in()
        self._sifted = None
        found = [*self.next, *chain.from_iterable(lane.empty() for lane in self.lanes.values())]
        for piece in self.next:
            self.open(member_of(piece), slow=True)
        self.next.clear()
        return found

    def recall(self, members: Collection[M]) -> list[Piece]:
        """Take out what waits for some members, who stay aside: it is to be put aside anew, behind what comes before it."""
        self._settle_in()
        self._sifted = None
        found = [piece for piece in self.next if member_of(piece) in members]
        if found:
            self.next = deque(piece for piece in self.next if member_of(piece) not in members)
        return [*found, *chain.from_iterable(self.lanes[member].empty() for member in members)]

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
            found = piece.portion.pairs.by_member(self.lanes, piece.spans)
            for member, spans in found.items():
                apart = Piece(piece.portion, spans)
                if member in self.resting:
                    self.fresh.append((member, apart))
                else:
                    self.lanes[member].put(apart)
            piece.spans = subtract(piece.spans, spans_of(sorted(chain.from_iterable(map(indexes, found.values())))))
            self._sifted = piece
        return bool(piece.spans)


class Hosted(Scattered, Generic[M]):
    """Delivery to the process of several subscribers."""

    def take(self, most: int = MOST) -> Held | None:
        aside, waiting = self.aside, self.window.waiting
        sift(self.window, aside)
        aside.is_their_turn = bool(aside.next) and (not aside.is_their_turn or not waiting)
        if not aside.is_their_turn:
            return super().take(most) if waiting else None
        room = min(self._room(), most)
        return self._take(aside.next, room) if room > 0 else None

    def give_back(self, still: Spans | None = None) -> None:
        """Return what is held but for what still runs; a slow member that runs nothing is given its next event."""
        before = len(self.window.waiting)
        parts = [(held, held.without(still) if still else held.spans) for held in self.held]
        back = self._make_way([(held.portion, goes) for held, goes in parts])
        busy = self._aside_in([(held.portion, subtract(held.spans, goes)) for held, goes in parts])
        super().give_back(still)
        for piece in list(islice(self.window.waiting, len(self.window.waiting) - before)):
            self.aside.sift(piece)
        for member in back - busy:
            self.aside.go_on(member)

    def _make_way(self, parts: list[tuple[Portion, Spans]]) -> set[M]:
        """Let what waits apart come behind what is put back for the same members; return these."""
        members = self._aside_in(parts)
        self.window.extend_left(self.aside.recall(members))
        return members

    def _aside_in(self, parts: list[tuple[Portion, Spans]]) -> set[M]:
        """Return for whom of those that are put aside some events are."""
        lanes = self.aside.lanes
        return {member for portion, spans in parts if portion.pairs is not None for member in portion.pairs.by_member(lanes, spans)}

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
        self._make_way([(held.portion, held.spans) for held in self.held])
        return charge(super().died(states, charged))

    def died_unseen(self, ranges: list[Range], states: Callable[[int, int], bytes], charged: Callable[[int], bool]) -> Verdict:
        self._forget_slow()
        return charge(super().died_unseen(ranges, states, charged))

    def _forget_slow(self) -> None:
        for member in list(self.aside.slow):
            self.window.extend_left(self.aside.open(member, slow=True))


def charge(verdict: Verdict) -> Verdict:
    """Let what is charged for a death run alone, also a retry, which else runs beside others."""
    for portion in verdict.changed:
        portion.due = 0.0
    return verdict


def member_of(piece: Piece) -> Any:
    """Return whose the first event of a piece is."""
    assert piece.portion.pairs is not None
    return piece.portion.pairs.at(piece.spans[0][0])[1]


def sift(window: Window, aside: Aside[M]) -> None:
    """Let what comes next be for somebody who is given events."""
    while window.waiting and not aside.sift(window.waiting[0]):
        window.waiting.popleft()
