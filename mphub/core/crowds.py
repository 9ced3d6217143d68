"""Subscribers that share a process: what of a row is for which of them, and the books that they have together. Pure.

An event for ten thousand of them is one row. Its *pairs* (event and member) are numbered event by event, so that whatever is known of them,
who holds them and who is through, is a few spans, as it is of the events of any other row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from mphub.core.spans import Spans, spans_of


class Member(Protocol):
    """One of those that share a process; as a crowd of one it is an audience too."""

    @property
    def id(self) -> int: ...
    @property
    def members(self) -> tuple[Self, ...]: ...
    @property
    def places(self) -> Mapping[Self, int]: ...
    @property
    def max_attempts(self) -> int: ...
    def take_in(self, events: int) -> None: ...
    def note_handled(self, events: int, first: int, end: int) -> None: ...


M = TypeVar("M", bound=Member)


class Crowd(Generic[M]):
    """Members that the same events are for; their books are kept together, as what one has accepted and handled in the end all have."""

    __slots__ = ("accepted", "handled", "id", "members", "places")

    def __init__(self, id: int, members: tuple[M, ...], accepted: int = 0, handled: dict[int, int] | None = None) -> None:
        self.id, self.members, self.accepted = id, members, accepted
        self.places = {member: place for place, member in enumerate(members)}
        self.handled: dict[int, int] = handled or {}
        """place -> by how many events more that member has handled than the one before it: one number, once all have handled the same."""

    def take_in(self, events: int) -> None:
        self.accepted += events

    def note_handled(self, events: int, first: int, end: int) -> None:
        """Count so many events for each, one less for those before place ``first``, and one more for those before ``end``."""
        for place, by in ((0, events - (first > 0) + (end > 0)), (first, first > 0), (end, -(end > 0))):
            self.handled[place] = self.handled.get(place, 0) + by
            if not self.handled[place]:
                del self.handled[place]

    def handled_each(self) -> Iterator[int]:
        """Yield how many events each member has handled."""
        return accumulate(self.handled.get(place, 0) for place in range(len(self.members)))


class Stretch(NamedTuple):
    """Events of a row, one after the other, that are for the same members."""

    first: int
    end: int
    audience: Any
    """A crowd, or one member."""


Run = tuple[int, int, int, int, int]
"""Pairs of one event, one after the other: (the first one's index, event, audience, first place in that, end)."""


class Pairs(Generic[M]):
    """The pairs of one row."""

    __slots__ = ("bases", "count", "stretches")

    def __init__(self, stretches: list[Stretch]) -> None:
        self.stretches = stretches
        sizes = [(each.end - each.first) * len(each.audience.members) for each in stretches]
        *self.bases, self.count = accumulate(sizes, initial=0)

    def _within(self, spans: Spans) -> Iterator[tuple[Stretch, int, int, int]]:
        """Yield parts of some spans: (stretch, index of its first pair, [first, end) of the part as seen from there)."""
        for a, b in spans:
            while a < b:
                at = bisect_right(self.bases, a) - 1
                base, stretch = self.bases[at], self.stretches[at]
                end = self.bases[at + 1] if at + 1 < len(self.bases) else self.count
                yield stretch, base, a - base, min(b, end) - base
                a = min(b, end)

    def at(self, index: int) -> tuple[int, M]:
        """Return the event and the member of a pair."""
        place = bisect_right(self.bases, index) - 1
        stretch = self.stretches[place]
        event, who = divmod(index - self.bases[place], len(stretch.audience.members))
        return stretch.first + event, stretch.audience.members[who]

    def runs(self, spans: Spans) -> Iterator[Run]:
        """Yield what some pairs are, event by event."""
        for stretch, base, a, b in self._within(spans):
            size = len(stretch.audience.members)
            while a < b:
                event, first = divmod(a, size)
                end = min(size, first + b - a)
                yield base + a, stretch.first + event, stretch.audience.id, first, end
                a += end - first

    def events(self, spans: Spans) -> Spans:
        """Return which events some pairs are of."""
        return spans_of(dict.fromkeys(event for _, event, *_ in self.runs(spans)))

    def of_events(self, events: Iterable[int]) -> list[int]:
        """Return the pairs of some events, ascending."""
        found: list[int] = []
        for event in events:
            for base, stretch in zip(self.bases, self.stretches, strict=True):
                if stretch.first <= event < stretch.end:
                    size = len(stretch.audience.members)
                    first = base + (event - stretch.first) * size
                    found += range(first, first + size)
        return found

    def by_member(self, members: Collection[M], spans: Spans) -> dict[M, Spans]:
        """Return which of some pairs are of some members."""
        found: dict[M, list[int]] = {}
        for stretch, base, a, b in self._within(spans):
            audience = stretch.audience.members
            if b - a < len(members):  # each pair is looked at, or else each member
                for index in range(a, b):
                    if (member := audience[index % len(audience)]) in members:
                        found.setdefault(member, []).append(base + index)
                continue
            known = stretch.audience.places
            for member in members:
                if (place := known.get(member)) is not None:
                    first = a + (place - a) % len(audience)
                    found.setdefault(member, []).extend(range(base + first, base + b, len(audience)))
        return {member: spans_of(indexes) for member, indexes in found.items() if indexes}

    def note_handled(self, spans: Spans) -> set[Any]:
        """Enter in the books that some pairs have been handled; return whose."""
        changed = set()
        for stretch, _, a, b in self._within(spans):
            size = len(stretch.audience.members)
            (before, first), (until, end) = divmod(a, size), divmod(b, size)
            stretch.audience.note_handled(until - before, first, end)
            changed.add(stretch.audience)
        return changed
