"""What an exchange does when its journal fills up: blank what nobody needs any more, let go what nobody will take soon."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from mphub.core.spans import Spans, contains, length
from mphub.store.journal import Progress, Stored
from mphub.wire.frames import decoder, encode, join, split

if TYPE_CHECKING:
    from mphub.procs.exchange import Exchange
    from mphub.procs.mailbox import Mailbox

BEGIN = 0.25
"""Share of what is admitted from which rows are looked at."""
ROWS, EVENTS = 64, 1000
"""Rows looked at, and events let go, in one turn."""
WORTH = 1000
"""Bytes that blanking a row must save."""
REST = 20
"""Times as long as a pass took until the next one: a twentieth of the router's time at most."""
_stored, _progress = decoder(Stored), decoder(Progress)


class Room:
    """A subscriber that lags behind keeps its own events, not the frames that they came in; one that does not run keeps what fits."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._next: int | None = None
        """The row to go on from; None between two passes."""
        self._began = self._rest_until = 0.0
        self._looked = False
        """A whole pass has been made since the journal is full."""

    def is_needed(self) -> bool:
        """Say whether there is anything to look after."""
        if self._next is None and self.exchange.used < self.exchange.admitted * BEGIN:
            self._looked = False
            return False
        return True

    @property
    def is_full(self) -> bool:
        return self.exchange.used >= self.exchange.admitted

    @property
    def is_busy(self) -> bool:
        """Say whether another turn would make more room, though nothing arrives."""
        return self._next is not None or (self.is_full and (not self._looked or self._stuck() is not None))

    # -- blanking

    def compact(self) -> None:
        """Look at some rows, oldest first; to be called when all progress of a turn is written."""
        exchange = self.exchange
        if self._next is None:
            urgent = self.is_full and not self._looked
            if not urgent and time.monotonic() < self._rest_until:
                return
            self._next, self._began = 0, time.monotonic()
        found = list(islice(exchange.journal.scan("rows", self._next.to_bytes(8, "big")), ROWS))
        for key, value in found:
            self._blank(key, value)
        self._next = int.from_bytes(found[-1][0], "big") + 1 if found else 0
        if len(found) < ROWS or all(self._next <= box.state.cursor for box in exchange.boxes.values()):
            now = time.monotonic()
            self._next, self._rest_until = None, now + REST * (now - self._began)
            self._looked = self.is_full

    def _blank(self, key: bytes, value: bytes) -> None:
        """Empty the events of a row that everyone has finished; numbers and places stay."""
        stored = _stored.decode(value)
        if stored.batch.blob is not None or len(value) < WORTH:
            return
        needed = [spans for box in self.exchange.boxes.values() for spans in self._needed(box, key, stored)]
        events = split(stored.body)
        left = [event if any(contains(spans, i) for spans in needed) else b"" for i, event in enumerate(events)]
        body = join(left)
        if len(stored.body) - len(body) < max(WORTH, len(value) // 2):
            return
        self.exchange.replace_body(int.from_bytes(key, "big"), body)
        self.exchange.journal.put("rows", key, encode(msgspec.structs.replace(stored, body=body)))

    def _needed(self, box: Mailbox, key: bytes, stored: Stored) -> list[Spans]:
        number = int.from_bytes(key, "big")
        if box.number not in stored.matched or number < box.state.cursor or number in box.closed:
            return []
        todo: Spans | None
        if number in box.noted and (value := self.exchange.journal.get("progress", box.number.to_bytes(4, "big") + key)) is not None:
            todo = _progress.decode(value).todo
        else:
            todo = stored.matched[box.number]
        return [box.events(stored, todo)]

    # -- letting go

    def relieve(self) -> None:
        """Make dead letters of what waits longest for those that do not run, while a full journal holds every publisher."""
        exchange = self.exchange
        self._looked &= self.is_full
        while self._looked and self.is_full and (box := self._stuck()) is not None:
            taken = list(box.window.take_oldest(EVENTS))
            for portion, spans in taken:
                exchange.letters.bury_untried(box, portion, spans, "overflow")
                exchange.settle(box, portion, spans)
            exchange.refill(box)
            if sum(length(spans) for _, spans in taken) == EVENTS:
                return  # the rest in the next turn

    def _stuck(self) -> Mailbox | None:
        """Return the one of those that do not run for which most waits."""
        boxes = [box for box in self.exchange.boxes.values() if box.stuck and box.has_waiting and not box.unmet]
        return max(boxes, key=lambda box: box.bytes, default=None)
