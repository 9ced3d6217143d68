"""History: what was accepted and what became of it, kept beside the rows that are at work, so that these may change and go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from itertools import groupby, islice
from math import inf
from typing import TYPE_CHECKING

import msgspec

from mphub.core.keys import MAX_CACHED, matches
from mphub.core.rows import Row
from mphub.core.spans import Spans, indexes, spans_of
from mphub.core.window import Portion
from mphub.options import Retention
from mphub.procs.mailbox import Named
from mphub.store.journal import Dead, Past, cost_of_past, digest_of, on_disk
from mphub.wire.frames import Batch, End, PastRow, decoder, encode, join, split

if TYPE_CHECKING:
    from mphub.procs.exchange import Exchange
    from mphub.procs.hosts import Target

STEP = 0.01
"""Seconds of the router's time that one look into history takes, about."""
PAGE_BYTES = 512 << 10
"""What one answer holds, so that it fits a frame."""
GOING = 64
"""Rows that go in one turn at most, beside twice what has come in it."""
MAX_MERGED = 200
"""Keys under one pattern that are looked up one by one; of more all rows are read."""
MAX_NAMES = 10_000
"""Keys, of all, that are looked through for those under a pattern."""
_past, _end = decoder(Past), decoder(End)
_books = msgspec.msgpack.Decoder(tuple[int, float, int])


class History:
    """Writes, reads and ends it; every call belongs inside a turn of the exchange."""

    def __init__(self, exchange: Exchange, retention: Retention | None) -> None:
        self.exchange, self.journal, self.retention = exchange, exchange.journal, retention
        self.bytes = 0
        self.first = 0
        """The oldest row; 0 if there is none."""
        self.due = inf
        """When the oldest row is too old: seconds since the epoch."""
        self._at = 0.0
        """When the newest row was accepted, or the last event ended."""
        self._names = 0
        """Different keys."""
        self._added = 0
        """Rows of this turn."""
        self._known: dict[str, bytes] = {}
        """Keys that are entered -> their digests."""
        self._written = (0, 0.0, 0)
        self._under: dict[tuple[str, ...], list[bytes] | None] = {}
        """The digests of the last patterns that were asked for."""

    def load(self) -> None:
        if (found := self.journal.get("meta", b"history")) is not None:
            self._written = self.bytes, self._at, self._names = _books.decode(found)
        self._find_first()

    def write(self) -> None:
        """Write its own books, and let go what is too much; to be called before the commit."""
        if self.retention is not None and self._is_too_much():
            self._trim(GOING + 2 * self._added)
        self._added = 0
        books = self.bytes, self._at, self._names
        if books != self._written:
            self.journal.put("meta", b"history", encode(books))
            self._written = books

    # -- what was accepted

    def keep(self, row: Row, matched: Mapping[Target, Spans]) -> None:
        """Keep a new row, whoever it is for."""
        if self.retention is None:
            return
        whole, key = [(0, row.count)], row.id.to_bytes(8, "big")
        boxes = {box.number: None if spans == whole else spans for box, spans in matched.items() if isinstance(box, Named)}
        past = Past(self._tick(), row.epoch, msgspec.Raw(row.header), boxes, row.body)  # type: ignore[arg-type]
        value = encode(past)
        self.journal.append("history", key, value)
        self.bytes += cost_of_past(value, row.batch)
        for name in set(row.batch.keys):
            self.journal.put("history_keys", self._digest(name) + key, b"")
        if row.batch.blob is not None:
            self.journal.put("history_blobs", row.batch.blob.encode(), b"")
        self._added += 1
        if not self.first:
            self._begin_with(row.id, past)

    def has_file(self, name: str) -> bool:
        """Say whether a file is needed here, whoever else needs it."""
        return self.journal.get("history_blobs", name.encode()) is not None

    def _tick(self) -> float:
        """Return the time, later than that of all before: rows are found by it, and the last of several ends is the valid one."""
        self._at = max(self.exchange.clock(), self._at + 1e-6)
        return self._at

    def _digest(self, key: str) -> bytes:
        """Return what stands for a key, and enter a new one."""
        known = self._known.get(key)
        if known is not None:
            return known
        digest = digest_of(key)
        if self.journal.get("history_names", digest) is None:
            self.journal.put("history_names", digest, key.encode())
            self._names += 1
            self._under.clear()
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[key] = digest
        return digest

    # -- what became of it

    def ended(
        self, box: Named, portion: Portion, spans: Spans, state: str, reason: str = "", *, attempts: int = 0, seconds: float = 0.0
    ) -> None:
        """Note how events ended for a subscriber; ``attempts``: 0 for what the portion says, ``seconds`` of each."""
        if self.retention is None:
            return
        for a, b in spans:
            for tries, together in groupby(range(a, b), lambda index: attempts or portion.attempts.get(index, 1)):
                first, *rest = together
                self._note(portion.place_of(first), box.number, 1 + len(rest), state, reason, tries, seconds)

    def ended_letters(self, who: Named, dead: Dead, spans: Spans, reason: str) -> None:
        """Note that dead letters are dropped."""
        row, first = dead.origin
        for a, b in spans if self.retention is not None else ():
            self._note((row, first + a), who.number, b - a, "dropped", reason, dead.attempts, 0.0)

    def _note(self, place: tuple[int, int], number: int, count: int, state: str, reason: str, attempts: int, seconds: float) -> None:
        row, index = place
        if not self.first or row < self.first:
            return
        end = End(index + count, state, reason, attempts, seconds, self._tick())
        self._enter(row.to_bytes(8, "big") + number.to_bytes(4, "big"), index, end)

    def _enter(self, prefix: bytes, index: int, end: End) -> None:
        """Enter how events ended; of those that only an older entry has, what that says stays."""
        while True:
            key, value = prefix + index.to_bytes(4, "big"), encode(end)
            there = self.journal.get("history_ends", key)
            if there is None or (old := _end.decode(there)).at < end.at:
                self.journal.put("history_ends", key, value)
                self.bytes += on_disk(value) - (on_disk(there) if there is not None else 0)
            if there is None:
                return
            older, newer = sorted((old, end), key=lambda each: each.at)
            if older.behind <= newer.behind:
                return
            index, end = newer.behind, older

    def _ends(self, number: int) -> Iterator[tuple[int, int, End]]:
        """Yield (subscriber number, first index, how events from there on ended), as it happened."""
        found = [
            (int.from_bytes(key[8:12], "big"), int.from_bytes(key[12:], "big"), _end.decode(value))
            for key, value in self.journal.scan("history_ends", number.to_bytes(8, "big"), (number + 1).to_bytes(8, "big"))
        ]
        yield from sorted(found, key=lambda entry: entry[2].at)

    # -- what goes

    def _is_too_much(self) -> bool:
        assert self.retention is not None
        return bool(self.first) and (self.bytes > int(self.retention.max_bytes) or self.due <= self.exchange.clock())

    def _trim(self, most: int) -> None:
        """Let the oldest rows go."""
        for _ in range(most):
            if not self._is_too_much():
                return
            key, value = next(self.journal.scan("history"))
            self._remove(key, value, _past.decode(value))
            self._find_first()
        self.due = 0.0 if self._is_too_much() else self.due  # the rest in the next turn, though nothing arrives

    def _find_first(self) -> None:
        """Note which row is the oldest now."""
        self.first, self.due = 0, inf
        for key, value in islice(self.journal.scan("history"), 1):
            self._begin_with(number_of(key), _past.decode(value))

    def _begin_with(self, number: int, past: Past) -> None:
        self.first = number
        lasts = None if self.retention is None else self.retention.max_age
        self.due = inf if lasts is None else past.at + lasts

    def _remove(self, key: bytes, value: bytes, past: Past) -> None:
        self.journal.delete("history", key)
        self.bytes -= cost_of_past(value, past.batch)
        for name in set(past.batch.keys):
            self._remove_key(digest_of(name), key, name)
        for each, end in list(self.journal.scan("history_ends", b"", (number_of(key) + 1).to_bytes(8, "big"))):
            self.journal.delete("history_ends", each)
            self.bytes -= on_disk(end)
        if past.batch.blob is not None:
            self.journal.delete("history_blobs", past.batch.blob.encode())
            self.exchange.references.let_go(past.batch.blob)

    def _remove_key(self, digest: bytes, row: bytes, name: str) -> None:
        """Forget that a row has a key, and the key if no other row has it."""
        self.journal.delete("history_keys", digest + row)
        if not any(True for _ in islice(self._rows_of(digest, 0), 1)):
            self.journal.delete("history_names", digest)
            self._known.pop(name, None)
            self._names -= 1
            self._under.clear()

    # -- looking up

    def page(self, patterns: list[str], since: float, until: float, after: int) -> tuple[list[bytes], int]:
        """Return rows with events of some keys that were accepted in time, and the number to go on from (0: that was all)."""
        found: list[bytes] = []
        size, ends = 0, time.monotonic() + STEP
        for number, past, spans in self.find(Wanted(patterns), since, until, after):
            if (found and size > PAGE_BYTES) or (time.monotonic() > ends and number > after):
                return found, number
            if spans:
                found.append(self._row(number, past, spans))
                size += len(found[-1])
        return found, 0

    def find(self, wanted: Wanted, since: float, until: float, after: int) -> Iterator[tuple[int, Past, Spans]]:
        """Yield (number, row, which of its events are wanted) from a row on."""
        start = max(after, self._row_at(since))
        for number, past in self._rows(wanted.patterns, start) if start else ():
            if past.at >= until:
                return
            yield number, past, wanted.of(past.batch)

    def _rows(self, patterns: list[str], start: int) -> Iterator[tuple[int, Past]]:
        """Yield rows that may have events of some keys."""
        digests = self._digests(patterns)
        if digests is None:
            for key, row in self.journal.scan("history", start.to_bytes(8, "big")):
                yield number_of(key), _past.decode(row)
            return
        for number, _ in groupby(merge(*(self._rows_of(digest, start) for digest in digests))):
            if (value := self.journal.get("history", number.to_bytes(8, "big"))) is not None:
                yield number, _past.decode(value)

    def _rows_of(self, digest: bytes, start: int) -> Iterator[int]:
        """Yield the numbers of the rows that have a key."""
        for key, _ in self.journal.scan("history_keys", digest + start.to_bytes(8, "big"), digest + b"\xff" * 8):
            yield number_of(key[len(digest) :])

    def _digests(self, patterns: list[str]) -> list[bytes] | None:
        """Return what stands for the keys under some patterns, unless they are so many that all rows are to be read."""
        asked = tuple(patterns)
        if asked not in self._under:
            self._under = {asked: self._look_up(patterns)}
        return self._under[asked]

    def _look_up(self, patterns: list[str]) -> list[bytes] | None:
        digests = {digest_of(pattern) for pattern in patterns if "*" not in pattern and ">" not in pattern}
        if wild := [pattern for pattern in patterns if "*" in pattern or ">" in pattern]:
            if ">" in wild or self._names > MAX_NAMES:
                return None
            names = ((digest, name.decode()) for digest, name in self.journal.scan("history_names"))
            digests |= {digest for digest, name in names if any(matches(pattern, name) for pattern in wild)}
        return None if len(digests) > MAX_MERGED else list(digests)

    def _row_at(self, since: float) -> int:
        """Return the first row that was accepted at a time or later; 0 if there is none."""
        low, high = self.first, self.exchange.next_row
        if not low or since <= 0:
            return low
        while low < high:
            middle = (low + high) // 2
            key, found = next(self.journal.scan("history", middle.to_bytes(8, "big")), (b"", b""))
            if not key or _past.decode(found).at >= since:
                high = middle
            else:
                low = number_of(key) + 1
        return low

    def _row(self, number: int, past: Past, spans: Spans) -> bytes:
        names = {number: box.name for box in self.exchange.boxes.values() for number in (*box.state.former, box.number)}
        matched = {names[box]: found for box, found in past.matched.items() if box in names}
        ends = [(names[box], first, end) for box, first, end in self._ends(number) if box in names]
        whole = spans == [(0, past.batch.count)] or past.batch.blob is not None
        body = past.body if whole else blanked(past.body, spans)
        return encode(PastRow(past.at, past.batch, spans, body, matched, ends))


@dataclass
class Wanted:
    """Which events are: those under one of some patterns, and, if there are others, one of these too."""

    patterns: list[str]
    also: list[str] | None = None

    def __post_init__(self) -> None:
        self._known: dict[str, bool] = {}

    def of(self, batch: Batch) -> Spans:
        """Return which events of a batch."""
        if not all(map(self.has, batch.keys)):
            return spans_of(index for key, a, b in batch.runs() if self.has(key) for index in range(a, b))
        return [(0, batch.count)]

    def has(self, key: str) -> bool:
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = under(self.patterns, key) and (self.also is None or under(self.also, key))
        return found


def under(patterns: list[str], key: str) -> bool:
    return any(matches(pattern, key) for pattern in patterns)


def number_of(key: bytes) -> int:
    return int.from_bytes(key, "big")


def blanked(body: bytes, spans: Spans) -> bytes:
    """Return a body with some of its events alone; the places of the others stay."""
    wanted = set(indexes(spans))
    return join([event if index in wanted else b"" for index, event in enumerate(split(body))])
