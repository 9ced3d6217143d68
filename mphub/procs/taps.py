"""Who listens in: events go to them once they are accepted, as far as they keep up."""

from __future__ import annotations

from typing import Protocol

import msgspec

from mphub.core.rows import Row
from mphub.core.spans import Spans, length
from mphub.core.table import RoutingTable
from mphub.store.blobs import Blobs
from mphub.wire import frames
from mphub.wire.frames import UNREADABLE, Batch, TappedRaw, encode
from mphub.wire.stream import Stream

MOST_AHEAD = 1 << 20
"""Bytes that wait for a tap's socket."""
MOST_FILES = 16 << 20
"""Bytes of files that are kept for one that has not read them; a larger one is kept by itself."""


class Listener(Protocol):
    """A tap's near end. What it cannot take it counts; it never raises."""

    @property
    def is_over(self) -> bool: ...
    def offer(self, row: Row, spans: Spans) -> None: ...
    def end(self) -> None: ...


class Taps:
    """All that listen to an exchange."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.noted: list[Row] = []
        """Rows of this turn."""
        self._table: RoutingTable[Listener] = RoutingTable()

    def add(self, patterns: list[str], listener: Listener) -> None:
        self.listeners.append(listener)
        for pattern in patterns:
            self._table.add(pattern, listener)

    def remove(self, listener: Listener) -> None:
        self.listeners.remove(listener)
        self._table.remove(listener)

    def note(self, batch: Batch, header: bytes, body: bytes) -> None:
        """Remember what is accepted if this turn is committed; in a row of its own, as the kept one may be blanked in this very turn."""
        self.noted.append(Row(0, 0, batch, header, body))

    def offer(self) -> None:
        """Pass on what this turn has accepted."""
        noted, self.noted = self.noted, []
        for row in noted:
            for listener, spans in self._wanted(row).items():
                listener.offer(row, spans)
        for listener in [each for each in self.listeners if each.is_over]:
            self.remove(listener)

    def _wanted(self, row: Row) -> dict[Listener, Spans]:
        wanted: dict[Listener, Spans] = {}
        for listeners, (_, first, end) in zip(self._table.match_all(row.batch.keys), row.batch.runs(), strict=True):
            for listener in listeners:
                spans = wanted.setdefault(listener, [])
                if spans and spans[-1][1] == first:
                    first = spans.pop()[0]
                spans.append((first, end))
        return wanted


class TapPeer:
    """A tap at the other end of a stream."""

    is_over = False

    def __init__(self, stream: Stream, blobs: Blobs) -> None:
        self.stream, self.blobs = stream, blobs
        self._files: dict[str, int] = {}
        """Names and sizes of files that are its own, the oldest first; it removes them in this order."""
        self._dropped = 0
        """Events that it has not been told of."""

    def offer(self, row: Row, spans: Spans) -> None:
        try:
            if not self._send(row, spans):
                self._dropped += length(spans)
        except (*UNREADABLE, OSError, ValueError):  # a file that is gone, or what no process of ours sends
            self._dropped += length(spans)

    def _send(self, row: Row, spans: Spans) -> bool:
        """Pass events on; say whether there was room for them."""
        blob = row.batch.blob
        body = row.picked(spans) if blob is None else b""
        if len(self.stream.out) + len(row.header) + len(body) > MOST_AHEAD:
            return False
        name = None
        if blob is not None and (name := self._share(blob)) is None:
            return False
        self._tell(TappedRaw(self._dropped, msgspec.Raw(row.header), spans, name), body)
        return True

    def _share(self, blob: str) -> str | None:
        """Let the tap have a file under a name of its own, which outlives the event's, unless it has too many.

        Raises OSError.
        """
        size = self.blobs.size(blob)
        while self._files and not self.blobs.has(next(iter(self._files))):
            del self._files[next(iter(self._files))]
        if self._files and sum(self._files.values()) + size > MOST_FILES:
            return None
        name = self.blobs.link(blob)
        self._files[name] = size
        return name

    def catch_up(self) -> bool:
        """Tell one that keeps up again how many events it was not told of; say whether there was something to tell."""
        if not self._dropped or self.stream.out:
            return False
        self._tell(TappedRaw(self._dropped))
        return True

    def _tell(self, tapped: TappedRaw, body: bytes = b"") -> None:
        self._dropped = 0
        self.stream.put(frames.TAPPED, encode(tapped), body)

    def end(self) -> None:
        """Tell it that the hub stops."""
        self.stream.send(frames.CLOSED)

    def close(self) -> None:
        """Remove what it has not read."""
        for name in self._files:
            self.blobs.remove(name)
