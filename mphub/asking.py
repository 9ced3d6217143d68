"""What any process of its user may ask of a hub that runs in processes, and tell it to do: calls, and what their answers mean."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import TimeoutError as WaitTimeout
from typing import Any, TypeVar

from mphub.connection import Connection
from mphub.errors import DrainTimeout, InvalidOption, SubscriberFatal, SubscriberPaused
from mphub.events import DeadLetter, EventId, HistoryRow, Progress
from mphub.observe.progress import Watcher, watching
from mphub.observe.statistics import HubStatistics, SubscriberStatistics
from mphub.past import events_of
from mphub.store.blobs import Blobs
from mphub.store.journal import Dead
from mphub.wire.frames import PastRow, decoder, split
from mphub.wire.payloads import Codec

T = TypeVar("T")
KEPT_PAYLOADS = 16 << 20
"""Bytes of dead letters' payloads that outlive an in-memory hub."""
AGAIN = 0.01
"""Seconds between looks whether an inbox has room again."""
_dead, _past = decoder(Dead), decoder(PastRow)


class Asking(ABC):
    """Calls a hub's supervisor."""

    connection: Connection
    codec: Codec
    blobs: Blobs

    @abstractmethod
    def begin(self, op: str, **args: object) -> Callable[[float | None], Any]:
        """Make a call; return what waits for its answer, at most some seconds.

        Raises (and so does that) TimeoutError, HubClosed, HubFailed.
        """

    @abstractmethod
    def place_of(self, name: str) -> tuple[str | None, str]:
        """Return the process that a subscriber shares, if any, and its state if that is another than the process has."""

    @abstractmethod
    def state_of(self, name: str) -> tuple[str, bytes, str]:
        """Return a subscriber's state, and of one that is FATAL the pickled error and the traceback."""

    def call(self, op: str, **args: object) -> Any:
        """Make a call and return the answer."""
        return self.begin(op, **args)(None)

    # -- to subscribers

    def restart(self, name: str) -> None:
        host, state = self.place_of(name)
        if host is not None and state == "FATAL":
            self.call("set_member", name=name, status="")
        else:
            self.call("restart", name=host or name)

    def pause(self, name: str) -> None:
        host, state = self.place_of(name)
        if host is None:
            self.call("pause", name=name)
        elif state != "FATAL":
            self.call("set_member", name=name, status="PAUSED")

    def resume(self, name: str) -> None:
        host, state = self.place_of(name)
        if host is None:
            self.call("resume", name=name)
        elif state == "PAUSED":
            self.call("set_member", name=name, status="")

    def scale(self, name: str, replicas: int) -> None:
        if self.place_of(name)[0] is not None:
            raise InvalidOption(f"replicas: {name!r} shares a process (process=), of which there is one; subscribe it without")
        self.call("scale", name=name, replicas=replicas)

    # -- about all that there is

    def drain(self, timeout: float | None, progress: Watcher) -> None:
        began = time.monotonic()
        self.connection.flush(timeout)
        result = drained(self.begin("drain"), began, timeout, progress, self.statistics)
        for name, status in result["statuses"].items():
            raise stuck_error(name, status)

    def statistics(self) -> HubStatistics:
        found = self.call("statistics")
        subscribers = {name: statistics_of(counters) for name, counters in found["subscribers"].items()}
        return HubStatistics(found["accepted"], sum(found["unmatched"].values()), found["pids"], subscribers)

    def dead_letters(self, name: str | None) -> list[DeadLetter]:
        letters: list[DeadLetter] = []
        after, room = 0, KEPT_PAYLOADS
        while True:
            page = self.call("dead_letters", name=name, after=after)
            for data in page["letters"]:
                letter = letter_of(_dead.decode(data), self.blobs, room, self.codec)
                room -= len(letter._payload)
                letters.append(letter)
            after = page["next"]
            if not after:
                return letters

    def redrive(self, name: str | None, ids: Collection[int] | None) -> int:
        return int(self.call("redrive", name=name, ids=packed(ids)))

    def purge(self, name: str | None, ids: Collection[int] | None) -> int:
        return int(self.call("purge", name=name, ids=packed(ids)))

    def history(self, patterns: list[str], since: float, until: float) -> Iterator[HistoryRow]:
        self.connection.flush()  # what was published before is history
        after = -1
        while after:
            page = self.call("history", patterns=patterns, since=since, until=until, after=max(0, after))
            for row in page["rows"]:
                yield from events_of(_past.decode(row), self.blobs, self.codec)
            after = page["next"]

    def replay(self, name: str, patterns: list[str], since: float, until: float) -> int:
        self.connection.flush()
        run, after, before = os.urandom(8), 0, 0
        count = 0
        while True:
            step = self.call(
                "replay", name=name, run=run, patterns=patterns, since=since, until=until, after=after, before=before
            )  # fmt: skip
            after, before = step["next"], step["before"]
            count += int(step["count"])
            if not after:
                return count
            if step["full"]:
                self._wait_for_inbox(name)

    def _wait_for_inbox(self, name: str) -> None:
        """Wait a moment for room in an inbox.

        Raises SubscriberPaused, SubscriberFatal: there will be none.
        """
        if (state := self.state_of(name)[0]) in ("FATAL", "STOPPED", "PAUSED"):
            raise stuck_error(name, state)
        time.sleep(AGAIN)


def drained(
    wait: Callable[[float], T], began: float, timeout: float | None, progress: Watcher, statistics: Callable[[], HubStatistics]
) -> T:  # fmt: skip
    """Wait for the end of a drain (``wait``: at most so many seconds, or TimeoutError), telling how far it is.

    Raises DrainTimeout.
    """
    deadline = None if timeout is None else began + timeout
    with watching(progress) as tell:
        began = time.monotonic()
        while True:
            left = 0.1 if tell is not None else 1.0  # a Ctrl-C right before a wait is seen only behind it
            if deadline is not None:
                left = min(left, max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(WaitTimeout):
                result = wait(left)
                break
            if tell is not None:
                tell(progress_of(statistics(), began))
            if deadline is not None and time.monotonic() >= deadline:
                raise late_drain(timeout, statistics())
        if tell is not None:
            tell(progress_of(statistics(), began))
    return result


def late_drain(timeout: float | None, statistics: HubStatistics) -> DrainTimeout:
    """Say what was not done in time."""
    pending = {n: s.waiting + s.running for n, s in statistics.subscribers.items() if s.waiting + s.running}
    words = ", ".join(f"{name}: {count}" for name, count in pending.items())
    return DrainTimeout(f"not drained within {timeout} s; still to be handled: {words or 'nothing any more'}", pending)


def statistics_of(counters: dict[str, Any]) -> SubscriberStatistics:
    """Build the public figures from the router's counters and the supervisor's states."""
    handled = counters["handled"] + counters["failed"]
    p50, p95, p99 = counters.pop("percentiles")
    unfinished, seconds = counters.pop("unfinished"), counters.pop("seconds")
    for key in ("process", "own"):
        counters.pop(key, None)
    counters["pids"] = tuple(counters["pids"])
    waiting = unfinished - counters["running"]
    return SubscriberStatistics(**counters, waiting=waiting, mean=seconds / handled if handled else 0.0, p50=p50, p95=p95, p99=p99)


def letter_of(dead: Dead, blobs: Blobs, room: int, codec: Codec) -> DeadLetter:
    """Build a public dead letter; its payload is kept if there is room for it."""
    batch = dead.batch
    payload = b""
    loads: Callable[[bytes], Any] = _nothing
    if batch.blob is None:
        (payload,), loads = map(bytes, split(dead.body)), codec.load_any
    elif batch.size <= room:
        with contextlib.suppress(OSError):
            payload, loads = bytes(blobs.read(batch.blob)), codec.load_any
    return DeadLetter(
        id=EventId.make(batch.publisher, batch.number), key=batch.key(0), subscriber=dead.subscriber, reason=dead.reason,
        attempts=dead.attempts, traceback=dead.traceback, exit=dead.exit, pid=dead.pid, at=dead.at, rss=dead.rss,
        stderr=dead.stderr, told=dead.told, _payload=payload, _error=dead.error, _loads=loads,
    )  # fmt: skip


def _nothing(_: bytes) -> None:
    """Stand for a payload that is not kept."""


def check_ids(ids: Collection[int] | None) -> None:
    if ids is not None and not (isinstance(ids, Collection) and all(isinstance(i, int) for i in ids)):
        raise InvalidOption(f"ids: got {ids!r:.80}; expected EventIds, as in dead_letter.id")


def packed(ids: Collection[int] | None) -> list[bytes] | None:
    check_ids(ids)
    if ids is None:
        return None
    return [int(i).to_bytes(16, "big") for i in ids if 0 <= i < 1 << 128]


def progress_of(statistics: HubStatistics, began: float) -> Progress:
    subscribers = statistics.subscribers.values()
    done = sum(s.handled + s.dead + sum(s.dropped.values()) for s in subscribers)
    rate = done / max(1e-3, time.monotonic() - began)
    return Progress(done, sum(s.accepted for s in subscribers), sum(s.dead for s in subscribers), rate)


def stuck_error(name: str, status: str) -> SubscriberPaused | SubscriberFatal:
    """Say why what waits for a subscriber does not move."""
    return SubscriberPaused(name) if status == "PAUSED" else SubscriberFatal(name, status)
