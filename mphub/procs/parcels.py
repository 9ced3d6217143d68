"""What a subscriber's process is given: the events of one frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mphub.core.rows import Head, event_of, head_of
from mphub.events import Event
from mphub.store.blobs import Blobs
from mphub.store.board import SLOTS, Board
from mphub.wire.frames import Batch, Deliver, split, views
from mphub.wire.payloads import Codec


class Parcel:
    """Events that were delivered together; event ``place`` has the delivery number ``deliver.number + offsets[place]``."""

    __slots__ = ("_batch", "_blobs", "deliver", "events", "loads", "offsets")

    def __init__(self, deliver: Deliver, body: bytes, blobs: Blobs, codec: Codec) -> None:
        self.deliver, self._blobs = deliver, blobs
        self.offsets: Sequence[int] = deliver.chosen if deliver.chosen is not None else range(deliver.count)
        self.loads: Callable[[Any], Any] = codec.load_any if self._is_alone else codec.loads
        self.events: list[Any] = self._from_blob() if deliver.batch.blob is not None else split(body)
        self._batch: Batch | None = None
        """That of the delivery, once somebody has asked for a key of it."""

    @property
    def _is_alone(self) -> bool:
        """Say whether it is one event that is a file of its own; the file of several holds a body."""
        return self.deliver.batch.blob is not None and self.deliver.batch.count == 1

    def _from_blob(self) -> list[Any]:
        deliver = self.deliver
        data = self._blobs.read(deliver.batch.blob or "")
        if self._is_alone:
            return [data]
        events = views(data)
        return [events[deliver.index + i] for i in self.offsets]

    @property
    def end(self) -> int:
        """The delivery number behind it."""
        return self.deliver.number + self.deliver.count

    def number(self, place: int) -> int:
        return self.deliver.number + self.offsets[place]

    def index(self, place: int) -> int:
        """Return where an event is in its batch."""
        return self.deliver.index + self.offsets[place]

    @property
    def batch(self) -> Batch:
        if self._batch is None:
            self._batch = self.deliver.batch.read()
        return self._batch

    def slots(self) -> Sequence[int]:
        """Return where in the board's map the states of its events are."""
        first, offsets = self.deliver.number % SLOTS, self.offsets
        if isinstance(offsets, range) and first + len(offsets) <= SLOTS:
            return range(Board.base + first, Board.base + first + len(offsets))
        return [Board.base + (first + offset) % SLOTS for offset in offsets]

    def attempt(self, place: int) -> int:
        attempts = self.deliver.attempts
        return attempts.get(self.index(place), 1) if attempts else 1

    def head(self, place: int) -> Head:
        return head_of(self.batch, self.index(place))

    def event(self, place: int, replica: int, *, cancelled: bool) -> Event:
        """Build an event as handlers see it, with a payload of its own: they may have changed what they got."""
        return event_of(self.batch, self.index(place), self._payload(place), self.attempt(place), replica, cancelled=cancelled)

    def _payload(self, place: int) -> Any:
        data = self.events[place]
        if self._is_alone:  # what they got is a view of that map
            data = self._blobs.read(self.deliver.batch.blob or "")
        return self.loads(data)


class SharedParcel(Parcel):
    """Events for several subscribers: an event is at its ``place`` once, and has a delivery number for each of them."""

    __slots__ = ("indexes",)

    def __init__(self, deliver: Deliver, body: bytes, blobs: Blobs, codec: Codec) -> None:
        self.indexes = list(dict.fromkeys(event for _, event, *_ in deliver.runs))
        super().__init__(deliver, body, blobs, codec)

    def _from_blob(self) -> list[Any]:
        data = self._blobs.read(self.deliver.batch.blob or "")
        if self._is_alone:
            return [data]
        events = views(data)
        return [events[index] for index in self.indexes]

    def index(self, place: int) -> int:
        return self.indexes[place]

    def attempt_of(self, number: int) -> int:
        """Return how many times the event of a delivery number runs with this one."""
        deliver = self.deliver
        return deliver.attempts.get(deliver.index + number - deliver.number, 1) if deliver.attempts else 1

    def event_for(self, place: int, attempt: int, *, cancelled: bool) -> Event:
        """Build an event as the handler of one of them sees it."""
        return event_of(self.batch, self.index(place), self._payload(place), attempt, cancelled=cancelled)
