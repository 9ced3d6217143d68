"""What ``bench.py`` measures side by side: the families, each with its sides and its way to a figure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from peers import DURABLE_PEERS, PEERS
from results import Result
from sides import (
    KEYS,
    PATTERNS,
    Opened,
    Side,
    archived,
    array,
    bare,
    batches,
    beside_a_stuck_one,
    crew,
    crowded,
    durable,
    executor,
    lines,
    many_keys,
    many_patterns,
    mphub,
    process_pool,
    rows,
    two_hop,
    with_peer,
    workers,
)

from mphub.store.archive import JsonLinesArchive, SqliteArchive

WARM_UP = 1000
CONFIRMED = 10_000
"""Events after which a publisher waits for the confirms."""
IDLE = 0.0003
"""Seconds before each question, in which everybody has gone to sleep."""

Sides = dict[str, Callable[[], Opened]]


@dataclass(frozen=True)
class Family:
    """Something to measure on two sides: ``baseline``, whatever that is here, and ``mphub``."""

    unit: str
    events: int
    measure: Callable[[Side, int], float]
    sides: Sides
    target: float | None = None  # times better than the baseline, at least
    less_is_better: bool = False

    @property
    def runs(self) -> list[str]:
        return list(self.sides)

    def run(self, side: str, events: int) -> dict[str, float]:
        """Open a side, one of the two or a peer, and measure it."""
        opened = self.sides[side] if side in self.sides else partial(with_peer, PEERS[side])
        with opened() as one:
            return {side: self.measure(one, events)}

    def result(self, name: str, events: int, values: dict[str, list[float]]) -> Result:
        """Put the rounds side by side."""
        ratios = {side: self.ratios(values["mphub"], values[side]) for side in values if side != "mphub"}
        medians = {side: statistics.median(found) for side, found in ratios.items()}
        ratio = medians.pop("baseline")
        return Result(name, self.unit, events, values, ratios["baseline"], ratio, medians, self.target, self.less_is_better)

    def ratios(self, ours: list[float], theirs: list[float]) -> list[float]:
        """Return, round by round, how many times better ours is."""
        pairs = zip(theirs, ours, strict=True) if self.less_is_better else zip(ours, theirs, strict=True)
        return [a / b for a, b in pairs]


# -- ways to a figure


def throughput(side: Side, events: int, warm_up: int = WARM_UP) -> float:
    """Return deliveries a second."""
    side.publish(min(warm_up, events))
    before = side.ask()
    began = time.perf_counter()
    side.publish(events)
    after = side.ask()
    seconds = time.perf_counter() - began
    must_be(after, [handled + events for handled in before])
    return events * len(after) / seconds


def roundtrip(side: Side, events: int, share: float, pause: float) -> float:
    """Return a percentile of the microseconds from a question to its answer, one after the other, with a pause (seconds) before each."""
    side.publish(WARM_UP)
    took, warm_up = [], min(WARM_UP, events)
    for _ in range(warm_up + events):
        if pause:
            time.sleep(pause)
        began = time.perf_counter()
        answers = side.ask()
        took.append(time.perf_counter() - began)
        must_be(answers, [WARM_UP])
    return sorted(took[warm_up:])[int(share * events)] * 1e6


def must_be(got: Sequence[object], expected: Sequence[object]) -> None:
    """Refuse the figure of a run that lost or doubled something."""
    if got != expected:
        raise SystemExit(f"bench: counted {got}, expected {expected}: no figure")


# -- the families


def against_two_hop(unit: str, subscribers: int, target: float, events: int = 300_000) -> Family:
    return Family(unit, events, throughput, {"baseline": lambda: two_hop(subscribers), "mphub": lambda: mphub(subscribers)}, target)


def by_publishers(publishers: int, family: Family) -> Family:
    """Let other processes publish."""
    return replace(family, sides={name: partial(crowded, publishers, opened) for name, opened in family.sides.items()})


def asked(unit: str, share: float, pause: float, target: float | None = None) -> Family:
    sides: Sides = {"baseline": lambda: two_hop(1), "mphub": lambda: mphub(1)}
    return Family(unit, 5_000, partial(roundtrip, share=share, pause=pause), sides, target, less_is_better=True)


def against_itself(unit: str, special: Callable[[], Opened], target: float | None = None) -> Family:
    return Family(unit, 300_000, throughput, {"baseline": lambda: mphub(1), "mphub": special}, target)


def at_work(unit: str, processes: int, target: float, opened: Callable[[int], Opened] = workers) -> Family:
    sides: Sides = {"baseline": lambda: bare(processes), "mphub": lambda: opened(processes)}
    return Family(unit, 2_000, partial(throughput, warm_up=100), sides, target)


def called(unit: str, *, by_value: bool) -> Family:
    sides: Sides = {"baseline": process_pool, "mphub": lambda: executor(by_value=by_value)}
    return Family(unit, 40_000, throughput, sides, target=8)


def archiving(where: str, opened: Callable[[], Opened]) -> Family:
    sides: Sides = {"baseline": batches, "mphub": opened}
    return Family(f"events/s into {where}, against batches that are counted", 300_000, throughput, sides)


FAMILIES = {
    "throughput-1": against_two_hop("events/s to 1 subscriber", 1, target=8),
    "throughput-4": against_two_hop("deliveries/s to 4 subscribers", 4, target=26),
    "throughput-16": against_two_hop("deliveries/s to 16 subscribers", 16, target=32, events=60_000),
    "publishers-4": by_publishers(4, against_two_hop("events/s from 4 publishers to 1 subscriber", 1, target=7)),
    "roundtrip": asked("us from question to answer, median", 0.5, IDLE, target=1 / 1.2),
    "roundtrip-p99": asked("us from question to answer, 99th percentile", 0.99, IDLE, target=1 / 1.5),
    "array-4": Family(
        "deliveries/s of an 8 MB array to 4 subscribers, each looks at a part",
        200,
        throughput,
        {"baseline": lambda: two_hop(4, array()), "mphub": lambda: mphub(4, payload=array())},
        target=15,
    ),
    "keys": against_itself(f"events/s of {KEYS:,} keys in turn, against one key", many_keys, target=0.6),
    "patterns": against_itself(f"events/s of a key among {PATTERNS:,} patterns, against one", many_patterns, target=0.7),
    "executor": called("calls/s of a tiny function, against a ProcessPoolExecutor", by_value=False),
    "executor-main": called("calls/s of a tiny function of a script, against a ProcessPoolExecutor", by_value=True),
    "archive-sqlite": archiving("a SQLite archive", lambda: archived(SqliteArchive, rows)),
    "archive-jsonl": archiving("an archive of JSON lines", lambda: archived(JsonLinesArchive, lines)),
    "work-1ms": at_work("events/s of 1 ms of work, against a bare process", 1, target=0.97),
    "work-1ms-2": at_work("events/s of 1 ms of work to 2 subscribers, against 2 bare processes", 2, target=0.95),
    "work-1ms-replicas": at_work("events/s of 1 ms of work to 2 replicas, against 2 bare processes", 2, target=0.95, opened=crew),
}
FAMILIES |= {
    "durable-process": Family(
        "events/s to 1 subscriber, journal on a disk, against one in memory",
        300_000,
        throughput,
        {"baseline": lambda: durable(None), "mphub": lambda: durable("process")},
        target=0.8,
    ),
    "durable-power": Family(
        f"events/s, each commit synced, all confirmed after each {CONFIRMED:,}, against a hub in memory",
        300_000,
        throughput,
        {"baseline": lambda: durable(None, CONFIRMED), "mphub": lambda: durable("power", CONFIRMED)},
    ),
}
USUAL = list(FAMILIES)
FAMILIES |= {
    "roundtrip-hot": asked("us from question to answer, no pause between, median", 0.5, pause=0),
    "roundtrip-hot-p99": asked("us from question to answer, no pause between, 99th percentile", 0.99, pause=0),
}
FAMILIES |= {
    f"stuck-{how.replace(' ', '-')}": against_itself(
        f"events/s beside a stuck one ({how}), against alone", partial(beside_a_stuck_one, how)
    )
    for how in ("own key", "drop_oldest", "drop_newest", "dead_letter", "FATAL", "frozen")
}
PEERS_IN = {
    **dict.fromkeys(("throughput-1", "roundtrip", "roundtrip-p99"), tuple(PEERS)),
    "durable-process": ("Redis Streams", "Redis everysec", "JetStream on disk", "Huey", "persist-queue"),
    "durable-power": ("Redis always", "Huey synced", "persist-queue"),
}
"""Families in which other packages can be measured too, and which."""
PEERS |= DURABLE_PEERS
