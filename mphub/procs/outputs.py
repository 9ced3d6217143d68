"""What a handler publishes, until it is committed with the ack."""

from __future__ import annotations

import time
from typing import cast

from mphub.store.blobs import Blobs
from mphub.wire.codec import Parts, check_size
from mphub.wire.frames import BLOB_MIN, MAX_EVENTS, Batch, Extra, Output, join


class Outputs:
    """Collects per event (``fresh``), then per report (``kept``): a failing event takes only its own back."""

    def __init__(self, incarnation: int, blobs: Blobs, largest: int, large: int = BLOB_MIN) -> None:
        self.incarnation, self.blobs, self.largest, self.large = incarnation, blobs, largest, large
        self.fresh: list[tuple[str, bytes | Parts, Extra | None]] = []
        self.kept: list[Output] = []
        self.size = 0
        """Bytes kept."""
        self._number = 0
        self._events: list[tuple[str, bytes | Parts, Extra | None]] = []
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

    def keep(self, epoch: int) -> None:
        """Adopt the outputs of an event that has returned; they inherit its epoch."""
        if not self.fresh:
            return
        if epoch != self._epoch:
            self._pack()
            self._epoch = epoch
        for key, data, extra in self.fresh:
            large = len(data) >= self.large
            size = len(key) + 8 + (extra.size if extra is not None else 0)
            if large or self._header + size > self.large or len(self._events) >= MAX_EVENTS:
                self._pack()
            self._events.append((key, data, extra))
            self._header += size
            self.size += len(data) + size
            if large:
                self._pack()
        self.fresh.clear()

    def take(self) -> list[Output]:
        """Return what is kept, as batches, and begin anew."""
        self._pack()
        taken, self.kept, self.size = self.kept, [], 0
        return taken

    def _pack(self) -> None:
        """Make a batch of the events that belong together; what is large becomes a file."""
        events = self._events
        if not events:
            return
        body, blob = b"", None
        if len(events) == 1 and len(events[0][1]) >= self.large:
            size, blob = len(events[0][1]), self.blobs.write(events[0][1])
        else:
            body = join(cast("list[bytes]", [data for _, data, _ in events]))  # parts are large, and go alone
            size = len(body)
            if size >= self.large:
                blob, body = self.blobs.write(body), b""
        runs: list[tuple[str, int]] = []
        for key, _, _ in events:
            if runs and runs[-1][0] == key:
                runs[-1] = (key, runs[-1][1] + 1)
            else:
                runs.append((key, 1))
        extras = {i: extra for i, (_, _, extra) in enumerate(events) if extra is not None}
        batch = Batch(
            self.incarnation,
            0,
            self._number + 1,
            runs,
            time.time(),
            self._epoch,
            blob=blob,
            size=size,
            extras=extras or None,
        )
        self._number += len(events)
        self.kept.append(Output(batch, body))
        self._events, self._header = [], 0
