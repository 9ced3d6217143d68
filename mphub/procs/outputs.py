"""What a handler publishes, until it is committed with the ack."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from mphub.store.blobs import Blobs
from mphub.wire.codec import Parts, check_size
from mphub.wire.frames import BLOB_MIN, MAX_EVENTS, Batch, Extra, Output, join


class Outputs:
    """Collects per event (``fresh``), then per report (``kept``): a failing event takes only its own back."""

    def __init__(
        self, incarnation: int, blobs: Blobs, largest: int, large: int = BLOB_MIN, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self.incarnation, self.blobs, self.largest, self.large, self.clock = incarnation, blobs, largest, large, clock
        self.fresh: list[tuple[str, bytes | Parts, Extra | None]] = []
        self.kept: list[Output] = []
        self.size = 0
        """Bytes kept."""
        self._number = 0
        self._events: list[tuple[str, Any, Extra | None]] = []
        self._header = 0
        """Bytes of their keys and headers."""
        self._epoch = 0

    def publish(self, key: str, data: bytes | Parts, extra: Extra | None) -> int:
        """Note an output of the running event; return its running number in this incarnation.

        Raises PayloadError.
        """
        check_size(data, self.largest)
        self.fresh.append((key, data, extra))
        return self._number + len(self._events) + len(self.fresh)

    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        """Note outputs of the running event, all or none.

        Raises PayloadError.
        """
        for _, data, _ in events:
            check_size(data, self.largest)
        self.fresh += events

    def keep(self, epoch: int) -> None:
        """Adopt the outputs of an event that has returned; they inherit its epoch.

        Raises OSError: a file cannot be written; nothing is adopted.
        """
        if not self.fresh:
            return
        blobs = self._write_files()
        if epoch != self._epoch:
            self._pack()
            self._epoch = epoch
        for (key, data, extra), blob in zip(self.fresh, blobs, strict=True):
            size = len(key) + 8 + (extra.size if extra is not None else 0)
            self.size += len(data) + size
            if blob is not None or self._header + size > self.large or len(self._events) >= MAX_EVENTS:
                self._pack()
            if blob is not None:
                self._emit([(key, extra)], b"", blob, len(data))
            else:
                self._events.append((key, data, extra))
                self._header += size
        self.fresh.clear()

    def _write_files(self) -> list[str | None]:
        """Write what is large to files of its own; a body of one event would be larger than that by some bytes."""
        names: list[str | None] = []
        try:
            for _, data, _ in self.fresh:
                alone = not isinstance(data, bytes) or len(data) >= self.large - 16
                names.append(self.blobs.write(data) if alone else None)
        except BaseException:
            for name in filter(None, names):
                self.blobs.remove(name)
            raise
        return names

    def take(self) -> list[Output]:
        """Return what is kept, as batches, and begin anew."""
        self._pack()
        taken, self.kept, self.size = self.kept, [], 0
        return taken

    def _pack(self) -> None:
        """Make a batch of the events that belong together; if it is large it becomes a file, or travels in parts if that fails."""
        events = self._events
        if not events:
            return
        body, blob = join([data for _, data, _ in events]), None
        size = len(body)
        if size >= self.large:
            with contextlib.suppress(OSError):
                blob, body = self.blobs.write(body), b""  # of several events: one as large as that has a file already
        self._events, self._header = [], 0
        self._emit([(key, extra) for key, _, extra in events], body, blob, size)

    def _emit(self, events: list[tuple[str, Extra | None]], body: bytes, blob: str | None, size: int) -> None:
        starts = [i for i, (key, _) in enumerate(events) if i == 0 or key != events[i - 1][0]]
        keys = [events[i][0] for i in starts]
        extras = {i: extra for i, (_, extra) in enumerate(events) if extra is not None}
        batch = Batch(
            self.incarnation, 0, self._number + 1, len(events), keys, starts, self.clock(), self._epoch, blob=blob, size=size,
            extras=extras or None,
        )  # fmt: skip
        self._number += len(events)
        self.kept.append(Output(batch, body))
