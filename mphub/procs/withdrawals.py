"""What an exchange does when events are cancelled or replaced: drop what nobody has started, and what comes back of the rest."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from mphub.core.order import ordering_key
from mphub.core.spans import Spans, contains, length, spans_of, subtract
from mphub.core.window import Portion
from mphub.procs.consumer import Consumer
from mphub.procs.mailbox import Mailbox, event_id
from mphub.store.journal import Single, Stored
from mphub.wire.frames import Batch, decoder

if TYPE_CHECKING:
    from mphub.procs.exchange import Exchange

CANCELLED, OVERFLOW = "cancelled", "overflow"


class Head(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """As much of a batch as tells its events apart."""

    publisher: int
    sequence: int
    number: int
    count: int


class StoredHead(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """As much of a row."""

    epoch: int
    batch: Head


_head, _stored, _single = decoder(StoredHead), decoder(Stored), decoder(Single)


class Wanted:
    """Ids of events, to be found in batches."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = set(ids)
        self._numbers: dict[int, list[int]] = {}
        for each in sorted(self.ids):
            self._numbers.setdefault(each >> 40, []).append(each & ((1 << 40) - 1))

    def within(self, batch: Head | Batch) -> list[int]:
        """Return the indexes that they have in a batch."""
        numbers = self._numbers.get(batch.publisher)
        if numbers is None:
            return []
        first, end = bisect_left(numbers, batch.number), bisect_left(numbers, batch.number + batch.count)
        return [number - batch.number for number in numbers[first:end]]


class Withdrawals:
    """Finds them wherever they wait; every call belongs inside a turn of the exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def withdraw(self, ids: Iterable[int]) -> int:
        """Drop what has not been given to a process; return how many events, each counted for each of its subscribers."""
        wanted = Wanted(ids)
        return sum(self._withdraw(box, wanted) for box in self.exchange.boxes.values())

    def _withdraw(self, box: Mailbox, wanted: Wanted) -> int:
        if box.unmet or not self.exchange.informed:
            return 0  # what looks as if it waited may run
        found = self._take(box, wanted)
        for portion, spans in found:
            self.exchange.drop(box, portion, spans, CANCELLED)
        return sum(length(spans) for _, spans in found)

    def _take(self, box: Mailbox, wanted: Wanted) -> list[tuple[Portion, Spans]]:
        """Take events out of wherever they wait."""
        found = box.window.withdraw(lambda portion: portion.of_events(wanted.within(portion.row.batch)))
        return [*found, *self._from_journal(box, wanted), *self._from_singles(box, wanted)]

    def _from_journal(self, box: Mailbox, wanted: Wanted) -> Iterator[tuple[Portion, Spans]]:
        """Find them behind the window."""
        if box.tail is None:
            return
        rows = {
            int.from_bytes(key, "big"): indexes
            for key, value in self.exchange.journal.scan("rows", box.tail.to_bytes(8, "big"))
            if (indexes := wanted.within(_head.decode(value).batch))
        }
        yield from self._from_rows(box, rows)

    def _from_rows(self, box: Mailbox, rows: dict[int, list[int]]) -> Iterator[tuple[Portion, Spans]]:
        for number, indexes in rows.items():
            portion = self.exchange.portion_of(box, number)
            spans = spans_of(i for i in portion.of_events(sorted(indexes)) if contains(portion.todo, i)) if portion is not None else []
            if portion is not None and spans:
                if spans == portion.todo:
                    heapq.heappush(box.open, number)  # the cursor passes it like one that was in the window
                yield portion, spans

    def _from_singles(self, box: Mailbox, wanted: Wanted) -> Iterator[tuple[Portion, Spans]]:
        """Find those that wait for their time or by their priority."""
        apart = [entry for queue in (box.delayed, box.ranked) for entry in queue if entry[-1] in wanted.ids]
        if not apart:
            return
        box.delayed = [entry for entry in box.delayed if entry[-1] not in wanted.ids]
        box.ranked = [entry for entry in box.ranked if entry[-1] not in wanted.ids]
        heapq.heapify(box.delayed)
        heapq.heapify(box.ranked)
        portions: list[Portion] = []
        for entry in apart:
            self.exchange.load_single(box, entry[-2], portions.append)
        for portion in portions:
            if portion.attempts:
                box.window.resume(ordering_key(portion.row.batch, 0))
            yield portion, [(0, 1)]

    def requests_of(self, box: Mailbox) -> list[tuple[Portion, Spans]]:
        """Take out all requests."""
        journal, number = self.exchange.journal, box.number.to_bytes(4, "big")
        box.window.gather()
        batches = [piece.portion.row.batch for piece in box.window.waiting]
        following = (box.number + 1).to_bytes(4, "big")
        batches += [_single.decode(value).batch for _, value in journal.scan("singles", number, following)]
        if box.tail is not None:
            batches += [_stored.decode(value).batch for _, value in journal.scan("rows", box.tail.to_bytes(8, "big"))]
        ids = (event_id(batch) + index for batch in batches if batch.reply for index in range(batch.count))
        return self._take(box, Wanted(ids))

    def replace(self, box: Mailbox, portion: Portion) -> None:
        """Drop of new events all but the last of each key, and what has waited of these keys."""
        older = box.note_newest(portion)
        if box.unmet or not self.exchange.informed:
            older = {}  # what looks as if it waited may run
        earlier = subtract(portion.todo, box.newest_of(portion))
        if earlier:
            self.exchange.drop(box, portion, earlier, OVERFLOW)
        found = box.window.withdraw(lambda portion: sorted(older.get(portion.row.id, ())))
        if box.tail is not None:
            found += self._from_rows(box, {row: indexes for row, indexes in older.items() if row >= box.tail})
        for each, spans in found:
            self.exchange.drop(box, each, spans, OVERFLOW)

    def held_by(self, consumers: Iterable[Consumer], ids: Iterable[int]) -> list[tuple[Consumer, int]]:
        """Note what processes have in hand, so that it is dropped if it comes back; return (process, delivery number)."""
        wanted = Wanted(ids)
        found = []
        for consumer in consumers:
            for held in consumer.delivery.held:
                for index in held.portion.of_events(wanted.within(held.portion.row.batch)):
                    if contains(held.spans, index):
                        consumer.box.withdrawn.add((held.portion.row.id, index))
                        found.append((consumer, held.number + index - held.index))
        return found

    def came_back(self, box: Mailbox) -> None:
        """Drop what was cancelled while a process had it, and waits again."""
        withdrawn = box.withdrawn
        for portion, spans in box.window.withdraw(lambda portion: sorted(i for row, i in withdrawn if row == portion.row.id)):
            self.exchange.drop(box, portion, spans, CANCELLED)
