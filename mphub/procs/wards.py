"""The supervisor's books: one ward a subscription, one child an incarnation."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import psutil

from mphub.core.restarts import RestartCounter
from mphub.options import Recycle
from mphub.procs import fork
from mphub.store.board import Board
from mphub.wire.codec import shortened
from mphub.wire.specs import Spec

LOG_BYTES = 1 << 20
"""What an output file may grow to before it is cut, and what may wait unread."""
LINE_BYTES = 64 << 10
"""A longer line is broken."""
RECENT = 50
"""Lines of stderr that a dead letter has."""
WEIGH_EVERY = 0.5
"""Seconds between two looks at how much memory a process takes, if that matters."""
BEST_FIRST = ("STOPPING", "RUNNING", "STARTING", "BACKOFF", "FATAL", "STOPPED")
PAUSABLE = ("RUNNING", "STARTING", "BACKOFF")
WORST_FIRST = ("STOPPING", "FATAL", "BACKOFF", "STARTING", "STOPPED", "RUNNING")


class Tail:
    """Reads what is appended to a file, line by line, and remembers the last ones."""

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)  # looked at ten times a second
        self.recent: deque[str] = deque(maxlen=RECENT)
        self._at = 0
        self._part = b""

    def lines(self, *, last: bool = False) -> list[str]:
        """Return the new whole lines (with ``last`` also the rest)."""
        try:
            if os.stat(self.path).st_size == self._at and not last:
                return []
            data = self._part + self._read()
        except OSError:
            return []
        *whole, self._part = data.split(b"\n")
        if (last and self._part) or len(self._part) >= LINE_BYTES:
            whole, self._part = [*whole, self._part], b""
        found = [piece.decode(errors="replace") for line in whole for piece in pieces_of(line)]
        self.recent.extend(found)
        return found

    def _read(self) -> bytes:
        with open(self.path, "r+b") as file:
            file.seek(self._at)
            data = file.read(LOG_BYTES)
            self._at = file.tell()
            if self._at <= LOG_BYTES:
                return data
            dropped = os.fstat(file.fileno()).st_size - self._at
            file.truncate(0)  # the child appends: it goes on at the start
            self._at = 0
        return data + (b"\n... %d bytes dropped: more than can be told\n" % dropped if dropped else b"")

    @property
    def last_words(self) -> str:
        return shortened("\n".join(self.recent))


def pieces_of(line: bytes) -> Iterator[bytes]:
    """Break a long line."""
    for at in range(0, len(line) or 1, LINE_BYTES):
        yield line[at : at + LINE_BYTES]


@dataclass(eq=False)
class Child:
    """One incarnation, from fork to the router's word that its events are settled."""

    name: str
    incarnation: int
    pid: int
    pidfd: int
    board: Board
    folder: Path
    outputs: dict[str, Tail]
    replica: int = 0
    started: float = field(default_factory=time.monotonic)
    predecessor: int | None = None
    """The incarnation that it follows, if that was still at work when it was started."""
    ready: bool = False
    waits: bool = False
    """An heir that is set up: it begins when its predecessor is settled."""
    since: float = 0.0
    """When it began."""
    due: bool = False
    """Another is to take its place."""
    ending: str | None = None
    """Why we end it: stop, restart, recycle, limit, start_timeout; None while it lives its own life."""
    kill_at: list[tuple[float, int]] = field(default_factory=list)
    """The rest of the stop ladder: (when, signal)."""
    overran: int | None = None
    running_since: dict[int, float] = field(default_factory=dict)
    """slot -> when it was first seen running."""
    weigh_at: float = 0.0
    """When to look next at how much memory it takes."""
    frost: fork.Frost = field(default_factory=fork.Frost)
    unmet: bool = False
    """A new router waits for its word."""
    frozen: bool = False
    """The router knows that it holds no publisher."""
    ooms: int = field(default_factory=fork.oom_kills)
    """What the kernel had counted when it started."""

    @property
    def crash_file(self) -> Path:
        return self.folder / "logs" / f"{self.incarnation:x}.crash"

    @property
    def record(self) -> Path:
        return self.folder / "children" / f"{self.incarnation:x}.{self.replica}.{self.name}"

    @property
    def is_starting(self) -> bool:
        """Say whether it still has to be set up, or to take up its state."""
        return not self.ready and not self.waits

    @property
    def goes_on(self) -> bool:
        """Say whether nothing ends it, or only that it has finished what it runs."""
        return self.ending in (None, "recycle")

    def is_due(self, rule: Recycle, now: float) -> bool:
        """Say whether another is to take its place; the router counts the events.

        One that is too large before it has finished anything is not: the next would be no smaller.
        """
        if rule.max_age is not None and now - self.since >= rule.max_age:
            self.due = True
        if isinstance(rule.max_rss, int) and now >= self.weigh_at:
            self.weigh_at = now + WEIGH_EVERY
            self.due |= self.measure()[1] > rule.max_rss and self.board.finished_any()
        return self.due

    def sample(self, now: float) -> tuple[int, float] | None:
        """Note what runs; return (slot, seconds since it was first seen) of what has run longest."""
        self.running_since = {slot: self.running_since.get(slot, now) for slot in self.board.running_slots()}
        first = min(self.running_since.items(), key=itemgetter(1), default=None)
        return None if first is None else (first[0], now - first[1])

    def forgive(self, seconds: float) -> None:
        """Do not count a time in which nobody could have done anything."""
        self.started += seconds
        self.kill_at = [(at + seconds, number) for at, number in self.kill_at]
        self.running_since = {slot: since + seconds for slot, since in self.running_since.items()}

    def measure(self) -> tuple[float, int]:
        """Return percent of a core since the start, and resident bytes."""
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self.pid)
            times = process.cpu_times()
            age = max(1e-3, time.time() - process.create_time())
            return 100 * (times.user + times.system) / age, process.memory_info().rss
        return 0.0, 0

    def was_out_of_memory(self, exit_: str | int) -> bool:
        """Say whether the kernel's OOM killer is likely to have ended it: SIGKILL, not ours, and the kernel counts one more."""
        return exit_ == "SIGKILL" and self.ending is None and fork.oom_kills() > self.ooms

    def last_words(self) -> tuple[bytes, str]:
        """Return (pickled exception, traceback) of what ``setup`` raised, or the stack that a fatal signal left."""
        try:
            data = self.crash_file.read_bytes()
        except OSError:
            return b"", ""
        try:
            error, text = msgspec.msgpack.decode(data, type=tuple[bytes, str])
        except msgspec.MsgspecError:
            return b"", shortened(data.decode(errors="replace"))
        return error, text

    def remove_files(self) -> None:
        """Remove what is left of it, once its events are settled."""
        self.board.close()
        for path in (self.board.path, self.crash_file, self.record, *(Path(tail.path) for tail in self.outputs.values())):
            path.unlink(missing_ok=True)


@dataclass(eq=False)
class Ward:
    """One replica of a subscriber under supervision."""

    spec: Spec
    replica: int
    counter: RestartCounter
    state: str = "STARTING"
    told_router: bool = True
    """The router is to know this state."""
    child: Child | None = None
    heir: Child | None = None
    """The next one, started while ``child`` goes on."""
    heir_at: float = 0.0
    """When one may be started at the earliest."""
    failed_heirs: int = 0
    """In a row."""
    restarts: int = 0
    start_at: float | None = None
    error: tuple[bytes, str] = (b"", "")
    """What the last failed start left."""
    told: str = ""
    """The traceback in the last notice of a death."""
    leaving: bool = False
    put_off: bool = False
    """It could not be started for want of something, and a notice has said so."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def children(self) -> list[Child]:
        """Return its processes: the one that is given events first."""
        return [child for child in (self.child, self.heir) if child is not None]

    @classmethod
    def make(cls, spec: Spec, replica: int) -> Ward:
        return cls(spec, replica, RestartCounter(spec.restart))


class Group:
    """A subscriber under supervision: its replicas, which live and die one by one."""

    def __init__(self, spec: Spec, *, paused: bool = False) -> None:
        self.spec = spec
        self.wards = [Ward.make(spec, replica) for replica in range(spec.replicas)]
        self.paused, self.leaving = paused, False
        self.stopped = False
        """By its user, until it is started or restarted."""
        self._complete = False
        """All have been RUNNING together."""

    def scale(self, spec: Spec) -> tuple[list[Ward], list[Ward]]:
        """Follow a spec with another number of replicas; return the wards that are new and those that are to go."""
        self.spec = spec
        there = {ward.replica for ward in self.wards}  # some of them may still be going
        new = [Ward.make(spec, replica) for replica in range(spec.replicas) if replica not in there]
        self.wards = sorted([*self.wards, *new], key=lambda ward: ward.replica)
        return new, [ward for ward in self.wards if ward.replica >= spec.replicas]

    def adopt(self, spec: Spec) -> None:
        """Follow another subscription of the same name."""
        self._complete = False
        for ward in self.wards:
            ward.spec, ward.counter = spec, RestartCounter(spec.restart)

    def note_state(self, ward: Ward, state: str) -> None:
        ward.state = state
        self._complete |= all(each.state == "RUNNING" for each in self.wards)

    @property
    def children(self) -> list[Child]:
        """Return those that are given events."""
        return [ward.child for ward in self.wards if ward.child is not None]

    @property
    def is_setting_up_an_heir(self) -> bool:
        return any(ward.heir is not None and ward.heir.is_starting for ward in self.wards)

    @property
    def state(self) -> str:
        """What its user sees: that of the replica that is worst off until all have been RUNNING, then that of the one that is best off."""
        return self._state(BEST_FIRST if self._complete else WORST_FIRST)

    @property
    def status(self) -> str:
        """What its inbox has to expect: one replica that is RUNNING is enough."""
        if self.stopped:
            return "STOPPED"  # already while its processes end: a supervisor that dies meanwhile leaves it so
        return "FROZEN" if self.frozen and not self.paused else self._state(BEST_FIRST)

    def _state(self, order: tuple[str, ...]) -> str:
        states = {ward.state for ward in self.wards}
        found = next(state for state in order if state in states)
        return "PAUSED" if self.paused and found in PAUSABLE else found

    @property
    def frozen(self) -> bool:
        """Say whether nothing of it moves: all processes are frozen, or one without whose word a new router gives the others nothing."""
        return bool(self.children) and (
            all(child.frozen for child in self.children) or any(child.frozen and child.unmet for child in self.children)
        )

    @property
    def error(self) -> tuple[bytes, str]:
        """Return what the last failed start of a FATAL replica left."""
        return next((ward.error for ward in self.wards if ward.state == "FATAL"), (b"", ""))

    def public(self) -> dict[str, Any]:
        """Return what the hub's statistics add to the router's counters."""
        measured = [child.measure() for child in self.children]
        return {
            "state": self.state,
            "pids": [child.pid for child in self.children],
            "restarts": sum(ward.restarts for ward in self.wards),
            "cpu": sum(cpu for cpu, _ in measured),
            "rss": sum(rss for _, rss in measured),
        }


def orphans(folder: Path) -> Iterator[Child]:
    """Yield what a dead supervisor's children have left: their boards say what became of their events."""
    for record in (folder / "children").glob("*.*.*"):
        number, replica, name = record.name.split(".")
        board, logs = folder / "boards" / number, folder / "logs" / number
        if board.exists():
            yield Child(name, int(number, 16), 0, -1, Board(board), folder, tails(logs), int(replica))


def tails(logs: Path) -> dict[str, Tail]:
    return {stream: Tail(Path(f"{logs}.{stream}")) for stream in ("out", "err")}


def make_child(spec: Spec, folder: Path) -> tuple[int, Board]:
    """Draw an incarnation's number and make its board."""
    incarnation = int.from_bytes(os.urandom(8), "big")
    scattered = spec.concurrency > 1 or spec.batch is not None or spec.hosts
    return incarnation, Board(folder / "boards" / f"{incarnation:x}", create=True, scattered=scattered)
