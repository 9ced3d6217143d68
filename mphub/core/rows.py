"""A journal row in memory: the events of one frame, as opaque bytes."""

from __future__ import annotations

import msgspec

from mphub.events import Event, EventId
from mphub.wire.frames import Batch, Extra, join, split

Head = tuple[int, str, float, dict[str, str] | None]
"""Of an event: its id, its key, when it was published, its headers."""
Place = tuple[int, int]
"""Where history has an event: (row, index)."""
ROW = 200
"""Bytes of a row beside its events: header, key, its places in the books."""


class Row:
    """A row that somebody's window holds; ``header`` is its publisher's, ready to be passed on."""

    __slots__ = ("__weakref__", "_events", "batch", "body", "count", "epoch", "header", "id", "origin", "single")

    def __init__(
        self, number: int, epoch: int, batch: Batch, header: bytes, body: bytes, *, single: bool = False, origin: Place | None = None
    ) -> None:
        self.id, self.epoch, self.batch, self.header, self.body, self.single = (
            number,
            epoch,
            batch,
            header,
            body,
            single,
        )
        self.count = batch.count
        self.origin = (number, 0) if origin is None else origin
        self._events: list[bytes] | None = None

    def place(self, index: int) -> Place:
        """Return where history has an event."""
        row, first = self.origin
        return row, first + index

    def picked(self, spans: list[tuple[int, int]]) -> bytes:
        """Return a body with these events: the row's own if that is all of them."""
        return self.body if spans == [(0, self.count)] else self.cut(spans)

    def cut(self, spans: list[tuple[int, int]]) -> bytes:
        """Return a body with some of the events alone; a row that is cut once is cut again and again."""
        events = self.events()
        return join([event for a, b in spans for event in events[a:b]])

    def events(self) -> list[bytes]:
        events = self._events
        if events is None:  # not asked twice: another thread may replace the body
            events = self._events = split(self.body)
        return events

    def replace(self, body: bytes) -> None:
        """Follow a row whose finished events have been blanked."""
        self.body, self._events = body, None

    @property
    def share(self) -> int:
        """Bytes that each event takes, about."""
        return (self.batch.size + ROW) // self.count

    @property
    def is_blob(self) -> bool:
        """Say whether it is one event that is a file of its own; the file of several holds a body."""
        return self.batch.blob is not None and self.count == 1


def part_of(batch: Batch, first: int, last: int, size: int, blob: str | None = None) -> Batch:
    """Return the header of some events alone."""
    runs = [(key, max(first, a) - first) for key, a, b in batch.runs() if max(first, a) < min(last, b)]
    keys, starts = map(list, zip(*runs, strict=True))
    extras = {i - first: extra for i, extra in (batch.extras or {}).items() if first <= i < last}
    return msgspec.structs.replace(
        batch, number=batch.number + first, count=last - first, keys=keys, starts=starts, extras=extras or None, size=size, blob=blob
    )


def share(batch: Batch) -> int:
    """Return the bytes that each event of a batch takes, about."""
    return (batch.size + ROW) // batch.count


def head_of(batch: Batch, index: int) -> Head:
    """Return what is known of one event without looking at its payload."""
    extra = batch.extras.get(index) if batch.extras else None
    return batch.publisher << 40 | batch.number + index, batch.key(index), batch.published_at, extra.headers if extra else None


def event_of(batch: Batch, index: int, payload: object, attempt: int, replica: int = 0, *, cancelled: bool = False) -> Event:
    """Describe one event of a batch as handlers see it."""
    extra = (batch.extras or {}).get(index, Extra())
    return Event(
        id=EventId.make(batch.publisher, batch.number + index), key=batch.key(index), payload=payload,
        ordering_key=extra.ordering_key, priority=extra.priority, headers=extra.headers or {}, published_at=batch.published_at,
        attempt=attempt, replica=replica, cancelled=cancelled,
    )  # fmt: skip
