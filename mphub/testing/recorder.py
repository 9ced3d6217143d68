"""Events as a subscriber got them, for the test to look at: exact, also if that subscriber is killed."""

from __future__ import annotations

import itertools
import shutil
import struct
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mphub.errors import InvalidKey
from mphub.events import Event, EventId, Topic
from mphub.hub import EventHub
from mphub.options import Retry, check_number
from mphub.subscriber import Subscriber, current_event
from mphub.subscribing import check_types
from mphub.testing.faults import spare
from mphub.testing.traces import eventually
from mphub.wire import codec

_HEAD = struct.Struct(">Q")


class Recorder:
    """Records every event of some keys or patterns, in order and each once, from here on.

    It is a subscriber like any other, called ``recorder`` (``recorder-2``, ...) unless it has a ``name``; requests are not for it. With
    processes an event is recorded a moment after it was published: ``wait``, or ``hub.drain()`` first.
    Raises InvalidKey, NameTaken.
    """

    def __init__(self, hub: EventHub, *keys: str | Topic[Any], name: str | None = None) -> None:
        check_types(hub=(hub, EventHub))
        if not keys:
            raise InvalidKey("keys: got none; expected keys or patterns to record, '>' for all")
        names = ("recorder" if n == 1 else f"recorder-{n}" for n in itertools.count(1))
        self.name = name if name is not None else next(free for free in names if free not in hub.subscriptions)
        """Of its subscription."""
        self._folder = Path(tempfile.mkdtemp(prefix="mphub-recorder-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._events: dict[EventId, Event] = {}
        self._read: dict[Path, int] = {}
        hub.subscribe(list(keys), Tape(str(self._folder)), name=self.name, retry=Retry(max_attempts=1_000_000))

    def __repr__(self) -> str:
        return f"<Recorder {self.name!r}: {len(self.events)} events>"

    @property
    def events(self) -> list[Event]:
        """The events so far."""
        for file in sorted(self._folder.iterdir()):
            for event in self._news_of(file):
                self._events.setdefault(event.id, event)
        return list(self._events.values())

    @property
    def payloads(self) -> list[Any]:
        return [event.payload for event in self.events]

    @property
    def keys(self) -> list[str]:
        return [event.key for event in self.events]

    def wait(self, count: int = 1, timeout: float = 5.0) -> list[Event]:
        """Wait until there are so many events, and return all; seconds.

        Raises TimeoutError with the keys that came.
        """
        check_number("wait", "count", count, 0, whole=True)
        check_number("wait", "timeout", timeout, 0)
        if not eventually(lambda: len(self.events) >= count, timeout):
            raise TimeoutError(f"{self.name}: got {len(self.keys)} of {count} events within {timeout:g} s: {', '.join(self.keys[-10:])}")
        return self.events

    def _news_of(self, file: Path) -> Iterator[Event]:
        """Read on where the last look at a file ended; a torn end is of a process that died as it wrote."""
        data = file.read_bytes()
        at = self._read.get(file, 0)
        while at + _HEAD.size <= len(data):
            (length,) = _HEAD.unpack_from(data, at)
            if at + _HEAD.size + length > len(data):
                break
            at += _HEAD.size + length
            yield codec.loads(data[at - length : at])
        self._read[file] = at


class Tape(Subscriber[Any, None]):
    """The recording end: each of its processes has a file of its own, as one that was killed may have torn its last line."""

    answers = False

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self) -> None:
        spare()
        self.file = self._next_file()

    def _next_file(self) -> IO[bytes]:
        for number in itertools.count():
            try:
                return open(f"{self.folder}/{number:09}", "xb", buffering=0)
            except FileExistsError:
                continue
        raise AssertionError("unreachable")

    def handle(self, payload: Any) -> None:
        data = codec.encode(current_event())
        self.file.write(_HEAD.pack(len(data)) + data)

    def teardown(self) -> None:
        self.file.close()
