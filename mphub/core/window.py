"""What waits for one subscriber and is in memory: a window of its inbox. Pure: values in, values out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

from mphub.core.crowds import Pairs
from mphub.core.rows import Place, Row
from mphub.core.spans import Spans, contains, first_of, indexes, length, spans_of, subtract

if TYPE_CHECKING:
    from mphub.core.aside import Aside
    from mphub.core.order import Order


NORMAL = (0, inf)
"""The place of an event without priority that has not waited for its time."""


@dataclass(slots=True, eq=False)
class Portion:
    """The events of one row that are for one subscriber."""

    row: Row
    todo: Spans
    size: int
    """Bytes per event, on average."""
    attempts: dict[int, int] = field(default_factory=dict)
    """index -> number of its next run, of those that run alone: it is not their first, or they are suspected."""
    due: float = 0.0
    """When it was to start, if it had to wait for its time: seconds since the epoch."""
    rank: int = 0
    """Lower ones start first: the priority, turned round."""
    pairs: Pairs[Any] | None = None
    """What its indexes mean, if it is for several subscribers that share a process: (event, subscriber) pairs, not events."""

    def event(self, index: int) -> int:
        """Return which event of the row an index is."""
        return index if self.pairs is None else self.pairs.at(index)[0]

    def of_events(self, events: list[int]) -> list[int]:
        """Return the indexes of some events."""
        return events if self.pairs is None else self.pairs.of_events(events)

    def place_of(self, index: int) -> Place:
        """Return where history has an event."""
        return self.row.place(self.event(index))

    @property
    def count(self) -> int:
        return length(self.todo)

    @property
    def is_whole(self) -> bool:
        """Say whether it is all that there is of the row for whom it is."""
        return self.todo == [(0, self.row.count if self.pairs is None else self.pairs.count)]

    @property
    def place(self) -> tuple[int, float]:
        """Where it belongs among what waits."""
        return self.rank, self.due or inf

    def finish(self, spans: Spans) -> None:
        """Take events off the list."""
        self.todo = [] if spans == self.todo else subtract(self.todo, spans)
        if self.attempts:
            self.attempts = {i: n for i, n in self.attempts.items() if contains(self.todo, i)}


@dataclass(slots=True, eq=False)
class Piece:
    """Events of a portion that wait together."""

    portion: Portion
    spans: Spans


def insert(queue: deque[Piece], piece: Piece) -> None:
    """Let events wait behind all that are as urgent."""
    place, before = piece.portion.place, list[Piece]()
    if place < NORMAL:
        while queue and queue[0].portion.place <= place:
            before.append(queue.popleft())
        queue.extendleft([piece, *reversed(before)])
    else:
        while queue and queue[-1].portion.rank > piece.portion.rank:
            before.append(queue.pop())
        queue.extend([piece, *reversed(before)])


class Window:
    """The events that wait, in the order in which they start."""

    def __init__(self) -> None:
        self.order: Order | None = None
        """How ordering keys keep theirs, if they do."""
        self.aside: Aside[Any] | None = None
        """What waits for some of the subscribers that share a process, if they do."""
        self.waiting: deque[Piece] = deque()
        self.tail: int | None = None
        """The first row behind it, in the journal; until there is none, nothing starts that is less urgent than usual."""
        self.loaded = 0
        self.loaded_bytes = 0
        self.expires = inf
        """When the first of them is too late to start: seconds since the epoch."""

    def add(self, portion: Portion) -> None:
        """Let the events of a portion wait behind all that are as urgent."""
        if portion.rank or (self.waiting and self.waiting[-1].portion.rank > 0):
            self.put(Piece(portion, portion.todo), lambda piece: insert(self.waiting, piece))
        else:
            self.put(Piece(portion, portion.todo), self.waiting.append)

    def put_back(self, piece: Piece) -> None:
        """Let events wait again, before all that are as urgent."""
        before: list[Piece] = []
        while self.waiting and self.waiting[0].portion.place < piece.portion.place:
            before.append(self.waiting.popleft())
        self.put(piece, self.waiting.appendleft)
        self.waiting.extendleft(reversed(before))

    def add_early(self, portions: Iterable[Portion]) -> None:
        """Put what is urgent or due before all others: by priority, then in the order of their times."""
        early: list[Piece] = []
        while self.waiting and self.waiting[0].portion.place < NORMAL:
            early.append(self.waiting.popleft())
        for portion in portions:
            self.put(Piece(portion, portion.todo), early.append)
        self.waiting.extendleft(sorted(early, key=lambda piece: piece.portion.place)[::-1])

    def worst_urgent(self) -> tuple[int, int]:
        """Return how many urgent events come first, and the rank of the last of them."""
        count = rank = 0
        for piece in self.waiting:
            if piece.portion.rank >= 0:
                break
            count, rank = count + 1, piece.portion.rank
        return count, rank

    def ends_behind(self, rank: int) -> bool:
        """Say whether something waits last that is less urgent than that."""
        return bool(self.waiting) and self.waiting[-1].portion.rank > rank

    def put(self, piece: Piece, put: Callable[[Piece], None]) -> None:
        put(piece)
        count = length(piece.spans)
        self.loaded += count
        self.loaded_bytes += count * piece.portion.size
        if piece.portion.row.batch.extras:
            self.expires = min([self.expires, *(at for _, at in deadlines(piece))])

    def expire(self, now: float) -> list[tuple[Portion, Spans]]:
        """Take out what should have started before now."""
        found = []
        for piece in self.drop_waiting():
            late = spans_of(index for index, at in deadlines(piece) if at <= now)
            if late:
                found.append((piece.portion, late))
                piece.spans = subtract(piece.spans, late)
            if piece.spans:
                self.put(piece, self.waiting.append)
        return found

    def drop_waiting(self) -> list[Piece]:
        """Empty the inbox; what the process holds stays."""
        self.gather()
        pieces = [piece for piece in self.waiting if piece.spans]  # of what waits apart now nothing may be left here
        self.waiting.clear()
        self.loaded = self.loaded_bytes = 0
        self.expires = inf
        return pieces

    def gather(self) -> None:
        """Let what waits apart from the rest wait with it again."""
        if self.order is not None:
            self.extend_left(self.order.empty())
        if self.aside is not None:
            self.extend_left(self.aside.empty())

    def extend_left(self, pieces: list[Piece]) -> None:
        """Let what waited for one process alone, or behind a retry, go before all that is as urgent."""
        if any(piece.portion.rank for piece in pieces) or (self.waiting and self.waiting[0].portion.place != NORMAL):
            self.waiting = deque(sorted([*pieces, *self.waiting], key=lambda piece: piece.portion.place))
        else:
            self.waiting.extendleft(reversed(pieces))

    def resume(self, key: str) -> None:
        """Let what waited behind a retry of its ordering key go before all others."""
        if self.order is not None:
            self.extend_left(self.order.resume(key))

    def take_oldest(self, count: int) -> Iterator[tuple[Portion, Spans]]:
        """Take up to ``count`` events off the front of the inbox."""
        self.gather()
        while count and self.waiting:
            place = next((place for place, piece in enumerate(self.waiting) if piece.portion.rank >= 0), 0)  # what is urgent goes last
            piece = self.waiting[place]
            taken = first_of(piece.spans, count)
            piece.spans = subtract(piece.spans, taken)
            if not piece.spans:
                del self.waiting[place]
            gone = length(taken)
            count -= gone
            self.loaded -= gone
            self.loaded_bytes -= gone * piece.portion.size
            yield piece.portion, taken

    def withdraw(self, wanted: Callable[[Portion], list[int]]) -> list[tuple[Portion, Spans]]:
        """Take out events; ``wanted`` says which, in their order, as far as they wait."""
        found = []
        self.gather()
        for piece in self.waiting:
            spans = spans_of(index for index in wanted(piece.portion) if contains(piece.spans, index))
            if spans:
                found.append((piece.portion, spans))
                piece.spans = subtract(piece.spans, spans)
                self.loaded -= length(spans)
                self.loaded_bytes -= length(spans) * piece.portion.size
        if found:
            self.waiting = deque(piece for piece in self.waiting if piece.spans)
        return found

    def again(self, portion: Portion, index: int, attempt: int) -> None:
        """Put one event to the front, to be run alone."""
        portion.attempts[index] = attempt
        self.put_back(Piece(portion, [(index, index + 1)]))

    def taken(self, queue: deque[Piece], spans: Spans) -> None:
        """Take events off the first piece of a queue."""
        piece = queue[0]
        piece.spans = subtract(piece.spans, spans)
        if not piece.spans:
            queue.popleft()
        count = length(spans)
        self.loaded -= count
        self.loaded_bytes -= count * piece.portion.size


def expiring(portion: Portion) -> dict[int, float]:
    """Return when events are too late to start, of those that have such a time."""
    extras = portion.row.batch.extras
    times = {event: extra.expires for event, extra in extras.items() if extra.expires} if extras else {}
    if portion.pairs is None:
        return times
    return {index: at for event, at in times.items() for index in portion.of_events([event])}


def deadlines(piece: Piece) -> Iterator[tuple[int, float]]:
    """Yield (index, when it is too late to start) of events that have such a time; one that has started once is in time for ever."""
    times = expiring(piece.portion)
    for index in indexes(piece.spans) if times else ():
        if index in times and index not in piece.portion.attempts:
            yield index, times[index]
