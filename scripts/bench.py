"""Measure mphub against the queue set-up that people write by hand, side by side in one run.

The hand-written one is "two-hop": a multiprocessing.Queue into a router process, from there a multiprocessing.Queue to each subscriber.
Rates differ from machine to machine and from minute to minute; their ratio in one run is what counts. Each measurement is a fresh
process; the sides take turns. Start-up is not measured, everything else is: the clock runs until the last event is handled, and a
miscount is an error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from mphub import EventHub

KEY, PAYLOAD = "orders.created", b"x" * 100
SIDES = ("two-hop", "mphub")
WARM_UP = 1000
FORK = multiprocessing.get_context("fork")


# -- the sides


def handle(payload: bytes) -> None:
    """Do nothing: what is measured is the way there."""


def answer(payload: int) -> int:
    return payload


def hub_throughput(events: int, subscribers: int) -> float:
    """Return deliveries a second."""
    hub = EventHub()
    for i in range(subscribers):
        hub.subscribe(KEY, handle, name=f"s{i}")
    with hub:
        hub.publish_batch(KEY, [PAYLOAD] * WARM_UP)
        hub.drain()
        began = time.perf_counter()
        for _ in range(events):
            hub.publish(KEY, PAYLOAD)
        found = hub.drain()
        seconds = time.perf_counter() - began
    must_be([s.handled for s in found.subscribers.values()], [events + WARM_UP] * subscribers)
    return events * subscribers / seconds


def hub_roundtrip(events: int) -> float:
    """Return the median microseconds of a request."""
    hub = EventHub()
    hub.subscribe(KEY, answer)
    with hub:
        return median_of(events, lambda n: hub.request(KEY, n).result(10))


def queue_throughput(events: int, subscribers: int) -> float:
    """Return deliveries a second."""
    ingress, inboxes, done = two_hop(subscribers, count_all)
    began = time.perf_counter()
    for _ in range(events):
        ingress.put((KEY, PAYLOAD))
    ingress.put(None)
    counts = [done.get() for _ in inboxes]
    seconds = time.perf_counter() - began
    must_be(counts, [events] * subscribers)
    return events * subscribers / seconds


def queue_roundtrip(events: int) -> float:
    """Return the median microseconds of two hops there and one straight back."""
    ingress, _, answers = two_hop(1, echo)

    def ask(n: int) -> object:
        ingress.put((KEY, n))
        return answers.get()

    took = median_of(events, ask)
    ingress.put(None)
    return took


def two_hop(subscribers: int, work: Callable[[Queue[Any], Queue[Any]], None]) -> tuple[Queue[Any], list[Queue[Any]], Queue[Any]]:
    """Start a router and subscribers; return the way in, the inboxes and the way out, when all have said that they are ready."""
    ingress, out = FORK.Queue(), FORK.Queue()
    inboxes = [FORK.Queue() for _ in range(subscribers)]
    FORK.Process(target=route, args=(ingress, {KEY: inboxes}), daemon=True).start()
    for inbox in inboxes:
        FORK.Process(target=work, args=(inbox, out), daemon=True).start()
    ingress.put((KEY, None))
    must_be([out.get() for _ in inboxes], ["ready"] * subscribers)
    return ingress, inboxes, out


def route(ingress: Queue[Any], table: dict[str, list[Queue[Any]]]) -> None:
    for key, payload in iter(ingress.get, None):
        for inbox in table[key]:
            inbox.put(payload)
    for inboxes in table.values():
        for inbox in inboxes:
            inbox.put(StopIteration)


def count_all(inbox: Queue[Any], out: Queue[Any]) -> None:
    inbox.get()
    out.put("ready")
    count = 0
    for payload in iter(inbox.get, StopIteration):
        handle(payload)
        count += 1
    out.put(count)


def echo(inbox: Queue[Any], out: Queue[Any]) -> None:
    inbox.get()
    out.put("ready")
    for payload in iter(inbox.get, StopIteration):
        out.put(payload)


def median_of(events: int, ask: Callable[[int], object]) -> float:
    """Ask one after the other; return the median in microseconds."""
    took = []
    for n in range(events):
        began = time.perf_counter()
        must_be(ask(n), n)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def must_be(got: object, expected: object) -> None:
    """Refuse to tell a figure of a run that lost something."""
    if got != expected:
        raise SystemExit(f"bench: counted {got!r}, expected {expected!r}: no figure")


# -- what is measured


@dataclass(frozen=True)
class Family:
    """Something to measure on both sides."""

    unit: str
    events: int
    sides: dict[str, Callable[[int], float]]
    less_is_better: bool = False


FAMILIES = {
    "throughput-1": Family(
        "events/s to one subscriber",
        300_000,
        {"two-hop": lambda n: queue_throughput(n, 1), "mphub": lambda n: hub_throughput(n, 1)},
    ),
    "throughput-4": Family(
        "deliveries/s to four subscribers",
        100_000,
        {"two-hop": lambda n: queue_throughput(n, 4), "mphub": lambda n: hub_throughput(n, 4)},
    ),
    "roundtrip": Family(
        "us from request to result",
        3_000,
        {"two-hop": queue_roundtrip, "mphub": hub_roundtrip},
        less_is_better=True,
    ),
}


@dataclass(frozen=True)
class Result:
    """What the rounds of one family gave."""

    family: str
    unit: str
    events: int
    values: dict[str, list[float]]
    ratios: list[float]
    """mphub's advantage in each round: above 1 it is the better one."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def compare(name: str, rounds: Sequence[dict[str, float]], events: int) -> Result:
    """Put the rounds of one family side by side."""
    family = FAMILIES[name]
    values = {side: [found[side] for found in rounds] for side in SIDES}
    ratios = [found["mphub"] / found["two-hop"] for found in rounds]
    return Result(name, family.unit, events, values, [1 / r for r in ratios] if family.less_is_better else ratios)


def measure(name: str, rounds: int, events: int | None) -> Result:
    """Let the sides take turns, each time in a fresh process."""
    count = events or FAMILIES[name].events
    return compare(name, [{side: run_one(name, side, count) for side in SIDES} for _ in range(rounds)], count)


def run_one(name: str, side: str, events: int) -> float:
    command = [sys.executable, __file__, "--one", name, side, "--events", str(events)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"bench: {name} of {side} ended with {found.returncode}:\n{found.stderr}")
    return float(found.stdout)


# -- telling


def table(results: Sequence[Result]) -> str:
    """Format medians, the range of the rounds, and the ratio."""
    rows = [f"{'':14}{'two-hop':>30}{'mphub':>34}{'ratio':>20}"]
    for result in results:
        cells = [spread(result.values[side], "{:,.0f}") for side in SIDES]
        rows.append(f"{result.family:14}{cells[0]:>30}{cells[1]:>34}{spread(result.ratios, '{:.1f}'):>20}  {result.unit}")
    return "\n".join(rows)


def spread(values: Sequence[float], form: str) -> str:
    """Return the median, and the least and greatest."""
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}..{form.format(max(values))})"


def machine() -> str:
    """Say where and when: figures without that mean nothing."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}"


def check(results: Sequence[Result], least: float | None) -> str:
    """Say what is wrong with the ratio of ``throughput-1``, if anything."""
    if least is None:
        return ""
    for result in results:
        if result.family == "throughput-1" and result.ratio >= least:
            return ""
    found = ", ".join(f"{r.family} {r.ratio:.2f}" for r in results)
    return f"bench: the ratio of throughput-1 must be {least:g} or more; got {found}"


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return int(text)


def family_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in FAMILIES:
            raise argparse.ArgumentTypeError(f"got {name!r}; expected some of {','.join(FAMILIES)}")
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", type=family_names, default=list(FAMILIES), help=f"comma-separated; default: {','.join(FAMILIES)}")
    parser.add_argument("--rounds", type=positive, default=5, help="how often each side is measured; default: 5")
    parser.add_argument("--events", type=positive, help="events a measurement; default: as much as each family needs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    parser.add_argument("--check", type=float, metavar="RATIO", help="exit with 1 if throughput-1 is less than so many times two-hop")
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.one:
        family, side = options.one
        print(FAMILIES[family].sides[side](options.events))
        return 0
    results = [measure(name, options.rounds, options.events) for name in options.families]
    print(machine(), table(results), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": [asdict(r) | {"ratio": r.ratio} for r in results]}, indent=2))
    wrong = check(results, options.check)
    if wrong:
        print(wrong, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
