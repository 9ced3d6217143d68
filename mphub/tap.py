"""Listening in: a tap sees events as they are accepted, as far as its reader keeps up; it holds nobody and is no subscriber."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mphub.core.rows import Row, event_of
from mphub.core.spans import Spans, indexes, length
from mphub.errors import HubClosed, HubError
from mphub.events import Event
from mphub.options import check_timeout
from mphub.reader import SILENCE, Dialer
from mphub.store.blobs import Blobs
from mphub.wire import frames
from mphub.wire.frames import Batch, HelloTap, Tapped, decoder, encode, split, views
from mphub.wire.payloads import CODECS
from mphub.wire.stream import Line, shut

if TYPE_CHECKING:
    from mphub.connection import Address

MOST_BYTES = 16 << 20
"""Of events that wait for a reader; one larger event is let in by itself."""
_tapped = decoder(Tapped)


class Basin:
    """What has come and is not read yet; what it has no room for is lost, and counted. One thread fills it, any may draw from it."""

    def __init__(self, maxsize: int, load: Callable[[Any], Any]) -> None:
        self.maxsize, self._load = maxsize, load
        self.dropped = 0
        self.is_over = False
        """Nobody will draw from it any more."""
        self.wakes: set[Callable[[], object]] = set()
        """What tells coroutines that something has come."""
        self._queue: queue.SimpleQueue[tuple[Batch, int, Any] | None] = queue.SimpleQueue()
        self._filled = self._drawn = 0
        """Bytes, ever."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._queue.qsize()

    def offer(self, row: Row, spans: Spans) -> None:
        """Take events of a row (inline)."""
        self.fill(row.batch, spans, lambda: split(row.picked(spans)))

    def fill(self, batch: Batch, spans: Spans, events: Callable[[], Iterable[Any]]) -> None:
        """Take events, as far as there is room; else they need not even be looked at."""
        if len(self) >= self.maxsize:
            self.dropped += length(spans)
            return
        for index, data in zip(indexes(spans), events(), strict=True):
            if self._has_room(len(data)):
                self._filled += len(data)
                self._queue.put((batch, index, data))
            else:
                self.dropped += 1
        self._wake()

    def _has_room(self, size: int) -> bool:
        waiting = len(self)
        return not waiting or (waiting < self.maxsize and self._filled - self._drawn + size <= MOST_BYTES)

    def end(self) -> None:
        """Let readers end once they have what has come."""
        self._queue.put(None)
        self._wake()

    def close(self) -> None:
        """Let readers end at once."""
        self.is_over = True
        self.end()

    def _wake(self) -> None:
        for wake in list(self.wakes):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                wake()

    def draw(self, *, block: bool = True, timeout: float | None = None) -> Event:
        """Return the next event.

        Raises HubClosed after the end, queue.Empty; also what its payload cannot be loaded for: it is gone then.
        """
        if not self.is_over:
            item = self._queue.get(block, timeout)
            if item is not None and not self.is_over:
                return self._event(*item)
            self._queue.put(None)  # for the next reader
        raise HubClosed("this tap has ended: it was closed, or its hub was stopped")

    def _event(self, batch: Batch, index: int, data: Any) -> Event:
        with self._lock:
            self._drawn += len(data)
        return event_of(batch, index, self._load(data), 1)


class Tap:
    """Events of some keys as they are accepted: for ``for`` and ``async for``, which end when the hub stops. Made by ``hub.listen``.

    Events come in the order in which the hub has accepted them. Those that its reader is too slow for are lost, and counted. A payload
    that cannot be loaded here raises where it is read; the next read goes on behind it.
    """

    def __init__(self, keys: Sequence[str], basin: Basin, close: Callable[[], None]) -> None:
        self.keys: tuple[str, ...] = tuple(keys)
        """Its patterns."""
        self._basin, self._pid = basin, os.getpid()
        self._close = weakref.finalize(self, close)
        self._close.atexit = False  # the threads are daemons, and the hub stops by itself

    def __repr__(self) -> str:
        return f"<Tap on {', '.join(self.keys)}: {len(self._basin)} waiting, {self.dropped} dropped>"

    @property
    def dropped(self) -> int:
        """How many events were lost because the reader was slow, as far as is known."""
        return self._basin.dropped

    def get(self, timeout: float | None = None) -> Event:
        """Return the next event; seconds.

        Raises TimeoutError, and HubClosed when the tap is closed or the hub stopped.
        """
        self._must_own()
        seconds = check_timeout(timeout)
        try:
            return self._basin.draw(timeout=seconds if seconds is None else min(max(0.0, seconds), threading.TIMEOUT_MAX))
        except queue.Empty:
            raise TimeoutError(f"no event of {', '.join(self.keys)} came within {timeout} s") from None

    def _must_own(self) -> None:
        if self._pid != os.getpid():
            raise HubError("a tap works in the process that made it: call hub.listen() in this one")

    def __iter__(self) -> Tap:
        return self

    def __next__(self) -> Event:
        try:
            return self.get()
        except HubClosed:
            raise StopIteration from None

    def __aiter__(self) -> Tap:
        return self

    async def __anext__(self) -> Event:
        self._must_own()
        loop = asyncio.get_running_loop()
        while True:
            came = asyncio.Event()
            wake = functools.partial(loop.call_soon_threadsafe, came.set)
            self._basin.wakes.add(wake)
            try:
                return self._basin.draw(block=False)
            except queue.Empty:
                await came.wait()
            except HubClosed:
                raise StopAsyncIteration from None
            finally:
                self._basin.wakes.discard(wake)

    def close(self) -> None:
        """End it; what has come and was not read is gone."""
        self._close()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TapDialer(Dialer):
    """Says hello to the router as one who listens."""

    def __init__(self, address: Address, patterns: list[str]) -> None:
        super().__init__(address, 0)
        self.patterns = patterns

    def hello(self) -> tuple[int, bytes]:
        return frames.HELLO_TAP, encode(HelloTap(self.address.token, self.patterns))


class Pipe:
    """Fills a basin from a stream of its own, so that nobody's confirms wait behind a flood; found again when the router has died."""

    def __init__(self, address: Address, patterns: list[str], basin: Basin) -> None:
        self.basin = basin
        self._dialer, self._blobs = TapDialer(address, patterns), Blobs(f"{address.folder}/blobs")
        self._stays = True
        self._line: Line | None = None
        self._connect()
        _pipes.add(self)
        threading.Thread(target=self._run, name="mphub-tap", daemon=True).start()

    def _connect(self) -> None:
        """Find a router, and wait until it has taken note.

        Raises HubClosed.
        """
        deadline = time.monotonic() + SILENCE
        while self._stays:
            self._line = line = self._dialer.dial_first()
            if not self._stays:
                break
            if line.receive() is not None:
                return
            line.close()
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        raise HubClosed(f"hub {self._dialer.address.name!r} is gone")

    def _run(self) -> None:
        """Read until the hub or the tap ends."""
        try:
            while (line := self._line) is not None:
                got = line.receive()
                if got is None:
                    line.close()
                    self._connect()
                elif got[0] == frames.CLOSED:
                    break
                else:
                    self._take(_tapped.decode(got[1]), got[2])
        except HubClosed:
            return  # that is what its readers are told
        finally:
            self.basin.end()
            if self._line is not None:
                self._line.close()

    def _take(self, tapped: Tapped, body: bytes) -> None:
        self.basin.dropped += tapped.dropped
        batch, spans, blob = tapped.batch, tapped.spans, tapped.blob
        if batch is None:
            return
        if blob is None:
            self.basin.fill(batch, spans, lambda: split(body))
            return
        try:
            self.basin.fill(batch, spans, lambda: events_of(self._blobs.read(blob), batch, spans))
        except OSError:
            self.basin.dropped += length(spans)
        finally:
            with contextlib.suppress(OSError):  # the hub's folder is gone
                self._blobs.remove(blob)

    def leave(self) -> None:
        """Read what is still to come from this router, and look for no other: the hub stops."""
        self._stays = False

    def close(self) -> None:
        """End at once. A forked child has not the thread, and must not end its parent's stream."""
        if self._dialer.pid != os.getpid():
            return
        self._stays = False
        self.basin.close()
        line = self._line
        if line is not None:
            shut(line.sock)

    def let_go(self) -> None:
        """Close a forked child's copy of the descriptor: a shutdown would end the parent's stream."""
        line, self._line = self._line, None
        if line is not None:
            with contextlib.suppress(OSError):
                socket.close(line.sock.detach())


def events_of(data: memoryview, batch: Batch, spans: Spans) -> Sequence[bytes | memoryview]:
    """Return events that a file holds: it is the one event, or has the events of a batch."""
    if batch.count == 1:
        return [data]
    events = views(data)
    return [bytes(events[index]) for index in indexes(spans)]  # a view would keep the whole file's room


def tap_on(address: Address, patterns: list[str], maxsize: int) -> tuple[Tap, Pipe]:
    """Listen to a hub that runs in other processes; return when its router has taken note.

    Raises HubClosed.
    """
    pipe = Pipe(address, patterns, Basin(maxsize, CODECS[address.codec].load_any))
    return Tap(patterns, pipe.basin, pipe.close), pipe


def _let_all_go() -> None:
    for pipe in list(_pipes):
        pipe.let_go()


_pipes: weakref.WeakSet[Pipe] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_all_go)
