"""What ``bench.py`` measures of one hub, beside no baseline: each figure with its limit.

CPU time is that of all processes of a hub and of the one that publishes, by the kernel's clock of each, in nanoseconds. Memory is what a
process has for itself: without pages of files and of shared memory.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from families import WARM_UP, must_be
from past import history
from results import Absolute
from shared import sharing
from sides import KEY, PAYLOAD, Counter, array, side_of
from steps import cpu_seconds, roundtrip_steps, steps

from mphub import EventHub, Inbox, Recycle, Restart, Retry, Stop, Subscriber

MB = 1e6
KEPT = 2000
"""MB that the hub of "backlog" may keep on disk."""
SLOW = 50e-6
"""Seconds that its handler takes."""
AHEAD = 5000
"""Events that are under way beside a backlog, so that nobody waits for the publisher."""
SETTLE = 1.0
"""Seconds until a hub idles."""
HASTY = Stop(ask=0.2, term=0.2)
RECYCLED = 1000
"""Events after which "recycle" has a process replaced."""


@dataclass(frozen=True)
class Figure:
    """Something to measure on one hub, part by part, each with what it may be at most."""

    unit: str
    events: int  # or whatever it counts: kills, milliseconds
    measure: Callable[[int], dict[str, float]]
    limits: dict[str, float | None]
    runs: Sequence[str] = ("mphub",)

    def run(self, _: str, events: int) -> dict[str, float]:
        return self.measure(events)

    def result(self, name: str, events: int, values: dict[str, list[float]]) -> Absolute:
        return Absolute(name, self.unit, events, values, self.limits)


@dataclass(frozen=True)
class Curve:
    """Something to measure point by point, which is not to rise: by ``rise`` times what was less, at most, as no two runs are alike."""

    unit: str
    events: int
    measure: Callable[[int, int], float]  # point, events
    along: str
    points: tuple[int, ...]
    rise: float = 1.1

    @property
    def runs(self) -> Sequence[str]:
        return [str(point) for point in self.points]

    def run(self, point: str, events: int) -> dict[str, float]:
        return {point: self.measure(int(point), events)}

    def result(self, name: str, events: int, values: dict[str, list[float]]) -> Absolute:
        medians = [statistics.median(found) for found in values.values()]
        limits = [None, *(self.rise * min(medians[:place]) for place in range(1, len(medians)))]
        return Absolute(name, self.unit, events, values, dict(zip(values, limits, strict=True)), self.along)


# -- the hub that is looked at


def hub_of(subscribers: int, handler: Callable[[Any], Any] | type[Subscriber[Any, Any]] = len, **options: Any) -> EventHub:
    hub = EventHub(check=False, stop=HASTY)
    for number in range(subscribers):
        hub.subscribe(KEY, handler, name=f"subscriber-{number}", **options)
    return hub


def pids_of(hub: EventHub) -> dict[str, int]:
    """Return all processes that a hub has, and this one, which publishes."""
    found = hub.statistics()
    return {**found.pids, **{name: one.pids[0] for name, one in found.subscribers.items()}, "publisher": os.getpid()}


def cpu_of(pids: Mapping[str, int]) -> float:
    """Return the CPU seconds that they have used until now."""
    return sum(map(cpu_seconds, pids.values()))


def own_memory(pid: int) -> float:
    """Return the MB that a process shares with no file."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024 / MB


@contextlib.contextmanager
def peaks(sample: Callable[[], dict[str, float]], every: float = 0.02) -> Iterator[dict[str, float]]:
    """Sample again and again, every so many seconds and once more at the end; what is yielded has the greatest by then."""
    greatest: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = over.wait(every)
            for part, value in sample().items():
                greatest[part] = max(value, greatest.get(part, value))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield greatest
        finally:
            over.set()
        watching.result()  # what could not be sampled is no figure


# -- start, recovery, idleness


def start(_: int) -> dict[str, float]:
    """Return the seconds until eight subscribers are RUNNING."""
    hub = hub_of(8)
    began = time.perf_counter()
    with hub:
        took = time.perf_counter() - began
        must_be([one.state for one in hub.statistics().subscribers.values()], ["RUNNING"] * 8)
    return {"start": took}


def recovery(kills: int) -> dict[str, float]:
    """Return the median of the milliseconds from a SIGKILL until the subscriber has handled again."""
    logging.getLogger("mphub").setLevel(logging.CRITICAL)  # each death is a notice
    hub = hub_of(1, lambda _: os.getpid(), restart=Restart(max_restarts=kills, delay=0), retry=Retry(kills + 1))
    with hub:
        return {"p50": statistics.median(seconds_to_recover(hub) for _ in range(kills)) * 1000}


def seconds_to_recover(hub: EventHub) -> float:
    victim = hub.request(KEY, None).result()
    began = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    successor = hub.request(KEY, None).result()
    took = time.perf_counter() - began
    if successor == victim:
        raise SystemExit(f"bench: the process {victim} has handled after its SIGKILL: no figure")
    return took


class Noting(Subscriber[int, None]):
    """Works for a moment, and notes in shared memory what it was given, when and by which process; behind them how many there are."""

    def __init__(self, path: str) -> None:
        self.path = path

    def setup(self) -> None:
        self.notes = mapped(self.path)

    def handle(self, payload: int) -> None:
        now, count = time.monotonic_ns(), self.notes[-1]
        self.notes[3 * count], self.notes[3 * count + 1], self.notes[3 * count + 2] = payload, now, os.getpid()
        self.notes[-1] = count + 1
        while time.monotonic_ns() - now < SLOW * 1e9:
            pass


def recycle(events: int) -> dict[str, float]:
    """Return the longest milliseconds between two starts of a handler, by one process after the other; all in order, or no figure."""
    with shared_numbers(3 * events + 1) as path:
        with hub_of(1, partial(Noting, path), recycle=Recycle(max_events=RECYCLED), inbox=Inbox(maxsize=2 * events)) as hub:
            hub.publish_batch(KEY, range(events))
            hub.drain()
        notes = mapped(path).tolist()
    must_be([notes[-1], notes[0:-1:3] == list(range(events))], [events, True])
    starts, pids = notes[1::3], notes[2::3]
    if (processes := len(set(pids))) < events // (5 * RECYCLED):
        raise SystemExit(f"bench: {processes} processes have handled {events} events, too few of them: no figure")
    pauses = [(after - before) / 1e6 for before, after in itertools.pairwise(starts)]
    within = max(pause for pause, pair in zip(pauses, itertools.pairwise(pids), strict=True) if len(set(pair)) == 1)
    return {"longest": max(pauses), "longest within one process": within, "processes": processes}


@contextlib.contextmanager
def idle_hub() -> Iterator[EventHub]:
    """Open a hub with eight subscribers that had something to do a while ago."""
    with hub_of(8) as hub:
        for _ in range(WARM_UP):
            hub.publish(KEY, PAYLOAD)
        hub.drain()
        time.sleep(SETTLE)
        yield hub


def idle_cpu(milliseconds: int) -> dict[str, float]:
    """Return the percentage of a core."""
    with idle_hub() as hub:
        pids = pids_of(hub)
        began, before = time.perf_counter(), cpu_of(pids)
        time.sleep(milliseconds / 1000)
        return {"all processes": (cpu_of(pids) - before) / (time.perf_counter() - began) * 100}


def idle_uss(_: int) -> dict[str, float]:
    """Return the MB of the largest subscriber."""
    with idle_hub() as hub:
        pids = [one.pids[0] for one in hub.statistics().subscribers.values()]
        return {"subscriber": max(psutil.Process(pid).memory_full_info().uss for pid in pids) / MB}


# -- memory under load


def array_memory(arrays: int) -> dict[str, float]:
    """Return the router's greatest memory while large arrays go to four subscribers."""
    with hub_of(4, Counter) as hub:
        side = side_of(hub, list(hub.subscriptions), payload=array())
        router = psutil.Process(hub.statistics().pids["router"])

        def sample() -> dict[str, float]:
            found = router.memory_info()
            return {"router": (found.rss - found.shared) / MB}

        with peaks(sample) as greatest:
            side.publish(arrays)
            must_be(side.ask(), [arrays] * 4)
        return greatest


def backlog(events: int) -> dict[str, float]:
    """Return everybody's greatest memory, and that of journal and blobs on disk, while events come faster than they are handled."""
    with backlogged(partial(busy_for, SLOW), events) as hub:
        pids, folders = pids_of(hub), [Path(hub._address.folder, name) for name in ("journal", "blobs")]

        def sample() -> dict[str, float]:
            return {**{name.partition("-")[0]: own_memory(pid) for name, pid in pids.items()}, "disk": sum(map(on_disk, folders))}

        with peaks(sample, 0.05) as greatest:
            for _ in range(events):
                hub.publish(KEY, PAYLOAD)
            hub.flush()
        must_be_there(hub, events)
        return greatest


@contextlib.contextmanager
def backlogged(handler: Callable[..., Any], events: int) -> Iterator[EventHub]:
    """Open a hub whose one subscriber's inbox takes so many events; what it has not handled in the end is given up."""
    hub = EventHub(check=False, max_bytes=int(KEPT * MB), stop=HASTY)
    hub.subscribe(KEY, handler, name="subscriber-0", inbox=Inbox(maxsize=events + 1, max_bytes=int(KEPT * MB)))
    with hub:
        yield hub
        hub.stop(drain=False)


def busy_for(seconds: float, _: object) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def on_disk(folder: Path) -> float:
    """Return the MB that a folder's files take: the journal is a sparse one."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir()) / MB


def must_be_there(hub: EventHub, events: int) -> None:
    """Refuse the figure if the one subscriber has lost or doubled anything."""
    found = hub.statistics().subscribers["subscriber-0"]
    must_be([found.accepted, found.waiting + found.running + found.handled], [events, events])


# -- CPU of a delivery


def cpu_to(subscribers: int, deliveries: int) -> float:
    """Return the microseconds of a delivery among so many."""
    events = max(1, deliveries // subscribers)
    with hub_of(subscribers, Counter) as hub:
        side = side_of(hub, list(hub.subscriptions))
        side.publish(WARM_UP)
        must_be(side.ask(), [WARM_UP] * subscribers)
        pids = pids_of(hub)
        before = cpu_of(pids)
        side.publish(events)
        counted = side.ask()
        took = cpu_of(pids) - before
        must_be(counted, [WARM_UP + events] * subscribers)
    return took / (events * subscribers) * 1e6


class Gated(Subscriber[object, None]):
    """Handles nothing until the gate is open, then says in shared memory how much it has handled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def setup(self) -> None:
        self.gate, self.handled = mapped(self.path), 0

    def handle(self, payload: object) -> None:
        while not self.gate[0]:
            time.sleep(0.001)
        self.handled += 1
        self.gate[1] = self.handled


def mapped(path: str) -> memoryview:
    """Map a file as numbers."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")


@contextlib.contextmanager
def shared_numbers(count: int) -> Iterator[str]:
    """Yield a file for some numbers."""
    with tempfile.NamedTemporaryFile(prefix="bench-") as file:
        file.truncate(8 * count)
        yield file.name


def cpu_behind(waiting: int, events: int) -> float:
    """Return the microseconds of a delivery while so many others wait: one is published for each that is handled."""
    warm_up = min(20_000, events)
    with gated() as (handler, gate), backlogged(handler, waiting + AHEAD + warm_up + 2 * events) as hub:
        for _ in range(waiting):
            hub.publish(KEY, PAYLOAD)
        hub.flush()
        pids, gate[0] = pids_of(hub), 1
        published = keep_up(hub, gate, waiting, waiting, warm_up)
        handled, before = gate[1], cpu_of(pids)
        published = keep_up(hub, gate, waiting, published, handled + events)
        handled, took = gate[1] - handled, cpu_of(pids) - before
        hub.flush()
        must_be_there(hub, published)
    return took / handled * 1e6


@contextlib.contextmanager
def gated() -> Iterator[tuple[Callable[[], Gated], memoryview]]:
    """Yield a handler and its gate, two numbers: whether it is open, and how many have passed."""
    with shared_numbers(2) as path:
        yield partial(Gated, path), mapped(path)


def keep_up(hub: EventHub, gate: memoryview, waiting: int, published: int, handled: int) -> int:
    """Keep so many waiting until so many are handled; return how many are published."""
    while gate[1] < handled:
        missing = gate[1] + waiting + AHEAD - published
        for _ in range(missing):
            hub.publish(KEY, PAYLOAD)
        published += missing
        time.sleep(0.002)
    return published


FIGURES: dict[str, Figure | Curve] = {
    "start-8": Figure("s until 8 subscribers are RUNNING", 1, start, {"start": 0.4}),
    "recovery": Figure("ms from a SIGKILL until the subscriber has handled again", 60, recovery, {"p50": 50}),
    "recycle": Figure(
        f"ms between two starts of a handler, and processes, one replaced every {RECYCLED:,} events",
        100_000,
        recycle,
        {"longest": 100, "longest within one process": None, "processes": None},
    ),
    "idle-cpu": Figure("% of a core, an idle hub with 8 subscribers", 10_000, idle_cpu, {"all processes": 0.5}),
    "idle-uss": Figure("MB of an idle subscriber, the largest of 8", 1, idle_uss, {"subscriber": 12}),
    "array-4-memory": Figure("MB at most, while 8 MB arrays go to 4 subscribers", 200, array_memory, {"router": 80}),
    "backlog": Figure(
        "MB at most, while 5,000,000 events come faster than they are handled",
        5_000_000,
        backlog,
        {"supervisor": 300, "router": 300, "subscriber": 300, "publisher": 300, "disk": KEPT},
    ),
    "sharing-10000": Figure(
        "10,000 subscribers in two processes", 10_000, sharing, {"s to start": 10, "MB in all": 250, "us a delivery": 5}
    ),
    "history-10M": Figure(
        "history of 10,000,000 events on a disk, and one that exceeds its bound",
        10_000_000,
        history,
        {"s to open": 1, "ms to the first row": 100, "folder to max_bytes": 1.2, "us to keep one": None},
    ),
    "cpu-subscribers": Curve("us of CPU a delivery, all processes", 2_560_000, cpu_to, "subscribers", (1, 2, 4, 8, 16, 64)),
    "steps": Figure("ns of CPU an event, among many", 300_000, steps, {}),
    "roundtrip-steps": Figure("us of a round trip of an idle hub, and of CPU in it", 3_000, roundtrip_steps, {}),
    "cpu-backlog": Curve(
        "us of CPU a delivery, all processes", 200_000, cpu_behind, "events that wait", (0, 10_000, 100_000, 10**6, 5 * 10**6)
    ),
}
