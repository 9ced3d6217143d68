"""What ``bench.py`` measures side by side: the families, each with its sides and its way to a figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from peers import PEERS
from results import SIDES
from sides import (
    KEYS,
    PATTERNS,
    Opened,
    Side,
    array,
    beside_a_stuck_one,
    crowded,
    many_keys,
    many_patterns,
    mphub,
    two_hop,
    with_peer,
)

WARM_UP = 1000


@dataclass(frozen=True)
class Family:
    """Something to measure on two sides: ``baseline``, whatever that is here, and ``mphub``."""

    unit: str
    events: int
    measure: Callable[[Side, int], float]
    sides: Mapping[str, Callable[[], Opened]]
    less_is_better: bool = False


# -- ways to a figure


def throughput(side: Side, events: int) -> float:
    """Return deliveries a second."""
    side.publish(min(WARM_UP, events))
    before = side.ask()
    began = time.perf_counter()
    side.publish(events)
    after = side.ask()
    seconds = time.perf_counter() - began
    must_be(after, [handled + events for handled in before])
    return events * len(after) / seconds


def roundtrip(side: Side, events: int, share: float) -> float:
    """Return a percentile of the microseconds from a question to its answer, one after the other."""
    side.publish(WARM_UP)
    took = []
    for _ in range(WARM_UP + events):
        began = time.perf_counter()
        answers = side.ask()
        took.append(time.perf_counter() - began)
        must_be(answers, [WARM_UP])
    return sorted(took[WARM_UP:])[int(share * events)] * 1e6


def must_be(got: list[int], expected: list[int]) -> None:
    """Refuse the figure of a run that lost or doubled something."""
    if got != expected:
        raise SystemExit(f"bench: counted {got}, expected {expected}: no figure")


# -- the families


def against_two_hop(unit: str, subscribers: int, events: int = 300_000, publishers: int = 0) -> Family:
    sides: dict[str, Callable[[], Opened]] = {"baseline": lambda: two_hop(subscribers), "mphub": lambda: mphub(subscribers)}
    if publishers:
        sides = {name: partial(crowded, publishers, opened) for name, opened in sides.items()}
    return Family(unit, events, throughput, sides)


def asked(unit: str, share: float) -> Family:
    sides = {"baseline": lambda: two_hop(1), "mphub": lambda: mphub(1)}
    return Family(unit, 5_000, partial(roundtrip, share=share), sides, less_is_better=True)


def against_itself(unit: str, special: Callable[[], Opened], usual: Callable[[], Opened] = lambda: mphub(1)) -> Family:
    return Family(unit, 300_000, throughput, {"baseline": usual, "mphub": special})


FAMILIES = {
    "throughput-1": against_two_hop("events/s to 1 subscriber", 1),
    "throughput-4": against_two_hop("deliveries/s to 4 subscribers", 4),
    "throughput-16": against_two_hop("deliveries/s to 16 subscribers", 16, 60_000),
    "publishers-4": against_two_hop("events/s from 4 publishers to 1 subscriber", 1, publishers=4),
    "roundtrip": asked("us from question to answer, median", 0.5),
    "roundtrip-p99": asked("us from question to answer, 99th percentile", 0.99),
    "array-4": Family(
        "deliveries/s of an 8 MB array to 4 subscribers, each looks at a part",
        200,
        throughput,
        {"baseline": lambda: two_hop(4, array()), "mphub": lambda: mphub(4, payload=array())},
    ),
    "keys": against_itself(f"events/s of {KEYS:,} keys in turn, against one key", many_keys),
    "patterns": against_itself(f"events/s of a key among {PATTERNS:,} patterns, against one", many_patterns),
}
FAMILIES |= {
    f"stuck-{how.replace(' ', '-')}": against_itself(
        f"events/s beside a stuck one ({how}), against alone", partial(beside_a_stuck_one, how)
    )
    for how in ("own key", "drop_oldest", "drop_newest", "dead_letter", "FATAL", "frozen")
}
PEERS_IN = ("throughput-1", "roundtrip", "roundtrip-p99")
"""Families in which other packages can be measured too."""
USUAL = [name for name in FAMILIES if not name.startswith("stuck-")]


def opener(family: str, side: str) -> Callable[[], Opened]:
    """Return what opens a side: one of the family's two, or a peer."""
    return FAMILIES[family].sides[side] if side in SIDES else partial(with_peer, PEERS[side])
