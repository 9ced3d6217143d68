"""One subscriber as the exchange keeps it: its books, its window of the journal, its cursor."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import msgspec

from mphub.core.order import Order
from mphub.core.rate import Quota
from mphub.core.rows import Row, share
from mphub.core.spans import Spans, indexes, length, spans_of
from mphub.core.window import Portion, Window
from mphub.options import MOST
from mphub.store.journal import Counters, Single, Stored, SubscriberState
from mphub.wire.frames import Batch, encode
from mphub.wire.specs import NOWHERE, Spec

WINDOW_EVENTS = 10_000
WINDOW_BYTES = 8_000_000
ABSENT = "ABSENT"
"""The state of one that an earlier run has left and that nobody has subscribed in this one: its events wait for that."""
STUCK = ("FATAL", "PAUSED", "STOPPED", "FROZEN", ABSENT)
"""States in which a subscriber never holds a publisher."""

LASTING = ("FATAL", "PAUSED", "STOPPED", ABSENT)
"""States that outlive supervisor and router."""


Entry = tuple[bytes, bytes]
"""Of a table: (key, value)."""


class Named:
    """A subscriber, as far as its events go."""

    spec: Spec
    state: SubscriberState

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def number(self) -> int:
        return self.state.number

    @property
    def counters(self) -> Counters:
        return self.state.counters

    @property
    def gone(self) -> bool:
        return not self.spec.patterns

    @property
    def condition(self) -> str:
        """What its user sees of its state, as far as it is known here."""
        raise NotImplementedError

    @property
    def given_up(self) -> bool:
        """Say whether nobody will start it again unasked."""
        return self.condition in ("FATAL", "STOPPED")

    def changed_box(self) -> Mailbox:
        """Return the inbox that its events wait in; its books are to be written."""
        raise NotImplementedError

    def forget_code(self) -> None:
        """Keep the books of one that is unsubscribed, and nothing else."""
        self.spec = msgspec.structs.replace(self.spec, patterns=[], handler=b"", handler_blob=None, surroundings=NOWHERE)


@dataclass(eq=False)
class Mailbox(Named):
    """A subscriber's inbox: a window in memory, the rest its cursor in the journal."""

    window_events: ClassVar[int] = WINDOW_EVENTS
    spec: Spec
    state: SubscriberState
    window: Window
    status: str = "STARTING"
    unfinished: int = 0
    bytes: int = 0
    full: bool = False
    open: list[int] = field(default_factory=list)
    """Heap of the window's rows."""
    closed: set[int] = field(default_factory=set)
    """Finished rows that the cursor has not passed."""
    delayed: list[tuple[float, int, int]] = field(default_factory=list)
    """Heap of (due, single, event id)."""
    ranked: list[tuple[int, float, int, int]] = field(default_factory=list)
    """Heap of (rank, due, single, event id) of events with a priority that are not in the window."""
    unmet: set[int] = field(default_factory=set)
    """Live incarnations that have not told this router what they hold: that looks as if it waited."""
    withdrawn: set[tuple[int, int]] = field(default_factory=set)
    """(row, index) of events that a process has in hand and that are to be dropped if they come back."""
    newest: dict[str, tuple[int, int]] = field(default_factory=dict)
    """key -> (row, index) of its last event, which may be through by now; kept if each key has only that."""
    noted: set[int] = field(default_factory=set)
    """Rows with a progress row in the journal."""
    max_bytes: int = 0
    quota: Quota | None = None
    """Of what starts."""
    sieve: Quota | None = None
    """Of what is taken in; the rest is dropped."""
    even_at: float = 0.0
    """When ordering keys may be dealt out anew, by the monotonic clock."""
    hot_key: str = ""
    """The last one that a notice has named."""
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    """Seconds a handler took, a mean for each report."""

    @classmethod
    def make(cls, spec: Spec, state: SubscriberState, admitted: int) -> Mailbox:
        box = cls(spec, state, Window(), unfinished=state.counters.unfinished)
        box.adopt(spec, admitted)
        return box

    def adopt(self, spec: Spec, admitted: int) -> None:
        """Follow another subscription of the same name."""
        self.spec = spec
        quota = None if spec.rate is None else Quota(spec.rate.count, spec.rate.per, self.state.grants)
        drops = spec.rate is not None and spec.rate.excess == "drop"
        self.quota, self.sieve = (None, quota) if drops else (quota, None)
        if spec.ordered != (self.window.order is not None):
            self.window.gather()
            self.window.order = Order() if spec.ordered else None
        self.max_bytes = min(int(spec.inbox.max_bytes), admitted // 2)

    def bury(self) -> None:
        """Keep the books of one that is unsubscribed, and nothing else."""
        self.forget_code()
        self.status = "STOPPED"

    @property
    def tail(self) -> int | None:
        """The first row that is not in the window."""
        return self.window.tail

    @tail.setter
    def tail(self, row: int | None) -> None:
        self.window.tail = row

    @property
    def is_absent(self) -> bool:
        return self.status == ABSENT

    @property
    def patterns(self) -> list[str]:
        """Whose publishers wait when it is full."""
        return self.spec.patterns

    @property
    def maxsize(self) -> int:
        """Events that it takes."""
        return self.spec.inbox.maxsize

    @property
    def stuck(self) -> bool:
        return self.status in STUCK

    @property
    def is_at_rest(self) -> bool:
        """Say whether its processes are to start nothing: it is paused, or all of them are to end."""
        return self.status in ("PAUSED", "STOPPING")

    @property
    def condition(self) -> str:
        return self.status

    @property
    def overflow(self) -> str:
        """What becomes of events that exceed the inbox; nobody waits for a subscriber that does not run."""
        rule = self.spec.inbox.overflow
        return "dead_letter" if rule == "block" and self.stuck else rule

    @property
    def has_waiting(self) -> bool:
        return self.window.loaded > 0 or self.tail is not None or bool(self.ranked)

    @property
    def due(self) -> float:
        """When there is something to do though nothing arrives: seconds since the epoch."""
        if self.is_absent:
            return self.ends_at
        return self.starts_at if self.unmet else min(self.window.expires, self.starts_at)

    @property
    def ends_at(self) -> float:
        """When it is given up if nobody subscribes it until then."""
        lasts = self.spec.inbox.expires
        return inf if lasts is None else self.state.absent_since + lasts

    @property
    def starts_at(self) -> float:
        """When something may start that waits for its time or for the subscriber's rate."""
        delayed = self.delayed[0][0] if self.delayed and self.window_room() else inf
        return delayed if self.quota is None or not self.window.loaded else min(delayed, self.quota.opens_at)

    @property
    def pending(self) -> int:
        """Return how many events are in it; those that wait for their time have a bound of their own."""
        return self.unfinished - len(self.delayed)

    def room(self) -> int:
        """Return how many events still fit."""
        return 0 if self.bytes >= self.max_bytes else max(0, self.maxsize - self.pending)

    @property
    def excess(self) -> int:
        """Return how many events are more than fit."""
        too_many = max(0, self.pending - self.maxsize)
        too_heavy = max(0, self.bytes - self.max_bytes)
        return max(too_many, -(-too_heavy * self.pending // self.bytes)) if too_heavy else too_many

    def wants_more(self) -> bool:
        window = self.window
        return window.loaded < self.window_events and window.loaded_bytes < WINDOW_BYTES

    def window_room(self) -> int:
        """Return how many events of their own rows the window takes; all, if what it has may wait for one of them."""
        if self.spec.ordered:
            return MOST
        return self.window_events - self.window.loaded if self.wants_more() else 0

    def runs_low(self) -> bool:
        return self.tail is not None and self.window.loaded < self.window_events // 2 and self.wants_more()

    # -- books: those of the subscriber that an event is for

    def who(self, portion: Portion, index: int) -> Named:
        """Return whose an event is."""
        return self

    def changed_box(self) -> Mailbox:
        return self

    def single(self, number: int, single: Single) -> Portion:
        """Return an event in a row of its own."""
        row = Row(number, single.epoch, single.batch, encode(single.batch), single.body, single=True, origin=single.origin)
        attempts = {0: single.attempt} if single.attempt > 1 else {}
        return Portion(row, [(0, 1)], share(single.batch), attempts, single.due, rank_of(single.batch))

    def portion(self, row: Row, stored: Stored) -> Portion:
        """Return what is for it of a row, as it was accepted."""
        spans = stored.matched[self.number]
        return Portion(row, [(0, row.count)] if spans is None else list(spans), row.share)

    def events(self, stored: Stored, spans: Spans | None) -> Spans:
        """Return which events of a row some are that are for it, or all."""
        return spans if spans is not None else [(0, stored.batch.count)]

    def weight(self, stored: Stored, spans: Spans | None) -> int:
        """Return the bytes that some events of a row take, or all that are for it."""
        return (length(spans) if spans is not None else stored.batch.count) * share(stored.batch)

    def account(self, portion: Portion) -> None:
        """Enter new events in the books."""
        self.take_in(portion.row.epoch, portion.count, portion.size)

    def account_apart(self, portion: Portion, index: int, size: int) -> None:
        """Enter a new event that gets a row of its own."""
        self.take_in(portion.row.epoch, 1, size)

    def note_refused(self, portion: Portion, spans: Spans) -> None:
        """Enter new events that end before they wait; how, is another entry."""
        self.counters.accepted += length(spans)

    def note_handled(self, portion: Portion, spans: Spans) -> None:
        self.counters.handled += length(spans)

    def note_dropped(self, portion: Portion, spans: Spans, reason: str) -> None:
        self.counters.drop(reason, length(spans))

    def public(self) -> dict[str, dict[str, Any]]:
        """Return the figures of its subscribers, by name."""
        return {self.name: {**self.counters.public(), "unfinished": self.unfinished}}

    def changed_books(self) -> Iterator[Entry]:
        """Yield rows of the journal to be written."""
        yield b"s" + self.name.encode(), encode(self.state)

    def left_until(self, epoch: int) -> dict[str, int]:
        """Return the unfinished events of an epoch and older ones, by whom they are for."""
        return {self.name: sum(count for each, count in self.counters.pending.items() if each <= epoch)}

    def take_in(self, epoch: int, count: int, size: int) -> None:
        """Enter events of so many bytes each."""
        self.counters.take_in(epoch, count)
        self.unfinished += count
        self.bytes += count * size

    def enqueue(self, portion: Portion) -> None:
        """Let a new portion wait: in the window if there is room, else behind it in the journal."""
        if self.tail is None and self.wants_more():
            self.load(portion)
        elif self.tail is None:
            self.tail = portion.row.id

    def load(self, portion: Portion) -> None:
        self.window.add(portion)
        if not portion.row.single:
            heapq.heappush(self.open, portion.row.id)

    def note_newest(self, portion: Portion) -> dict[int, list[int]]:
        """Note the last event of each key; return those before them in earlier rows: row -> indexes."""
        batch, number = portion.row.batch, portion.row.id
        older: dict[int, list[int]] = {}
        if len(self.newest) > 2 * self.unfinished + WINDOW_EVENTS:
            self._forget_gone()
        for index in indexes(portion.todo):
            key = batch.key(index)
            row, before = self.newest.get(key, (number, 0))
            if row != number:
                older.setdefault(row, []).append(before)
            self.newest[key] = (number, index)
        return older

    def newest_of(self, portion: Portion) -> Spans:
        """Return which events of a portion are the last ones of their keys."""
        batch, number = portion.row.batch, portion.row.id
        return spans_of(index for index in indexes(portion.todo) if self.newest[batch.key(index)] == (number, index))

    def has_newer(self, portion: Portion, index: int) -> bool:
        """Say whether only the newest event of each key is wanted, and there is a newer one than this."""
        if self.overflow != "latest":
            return False
        own = portion.row.id, index
        newest = self.newest.get(portion.row.batch.key(index), own)
        return newest[0] > own[0] if portion.row.single else newest != own

    def _forget_gone(self) -> None:
        """Forget keys of which nothing waits."""
        self.window.gather()
        waiting = {(piece.portion.row.id, index) for piece in self.window.waiting for index in indexes(piece.spans)}
        tail = inf if self.tail is None else self.tail
        self.newest = {key: place for key, place in self.newest.items() if place in waiting or place[0] >= tail}

    def wait_by_rank(self, batch: Batch, number: int, due: float = 0.0) -> None:
        """Let an event with a priority, in a row of its own, wait for its turn."""
        heapq.heappush(self.ranked, (rank_of(batch), due, number, event_id(batch)))

    def settle(self, portion: Portion, count: int) -> None:
        self.counters.settle(portion.row.epoch, count)
        self.unfinished -= count
        self.bytes -= count * portion.size

    def advance(self, newest: int) -> Iterator[int]:
        """Move the cursor over finished rows; yield those whose progress rows are now void."""
        while self.open and self.open[0] in self.closed and (self.tail is None or self.open[0] < self.tail):
            row = heapq.heappop(self.open)
            self.closed.discard(row)
            if row in self.noted:
                self.noted.discard(row)
                yield row
        first = self.open[0] if self.open else newest
        self.state.cursor = first if self.tail is None else min(first, self.tail)

    def update_full(self) -> None:
        """Recompute whether publishers wait for it (released at 80 %)."""
        least = 0.8 if self.full else 1.0
        most = self.maxsize * least
        over = self.pending >= most or len(self.delayed) >= most or self.bytes >= self.max_bytes * least
        self.full = over and self.overflow == "block"


def event_id(batch: Batch) -> int:
    """Return the id of a batch's first event, as a plain int."""
    return batch.publisher << 40 | batch.number


def hex_id(batch: Batch, index: int) -> str:
    """Return the id of an event as it is shown."""
    return f"{event_id(batch) + index:026x}"


def rank_of(batch: Batch, index: int = 0) -> int:
    """Return the priority of an event, turned round: lower ones start first."""
    extra = batch.extras.get(index) if batch.extras else None
    return 0 if extra is None else -extra.priority
