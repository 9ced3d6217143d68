"""Measure mphub against the queues that people wire by hand, side by side in one run.

    python scripts/bench.py                                          every family, five rounds: some minutes
    python scripts/bench.py --families throughput-1 --check 5        exit code 1 below five times the baseline
    python scripts/bench.py --events 20000 --rounds 3 --json -       all values, for a program

The baseline is "two-hop": the producer puts (key, payload) into one multiprocessing.Queue, a router process gets each and puts the payload
into each subscriber's own multiprocessing.Queue. Its answers come straight back in one hop, by a third queue; those of mphub come through
the router. mphub's journal is on.

Rates differ from machine to machine and from minute to minute: what counts is the ratio within a round. Each measurement is a process of
its own, and the sides take turns. What they start is started and warm before the clock runs; everything else is measured, until each
subscriber has told how many events it has handled. A miscount is an error, never a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NoReturn

from mphub import EventHub, Subscriber

KEY, PAYLOAD = "orders.created", b"x" * 100
WARM_UP = 1000
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Side:
    """A way to subscribers that count, each in a process of its own."""

    publish: Callable[[int], None]  # so many events
    ask: Callable[[], list[int]]  # what each subscriber has counted so far, this question with it
    settle: Callable[[], list[int]]  # waits until everything published is handled, then asks


@contextlib.contextmanager
def two_hop(subscribers: int) -> Iterator[Side]:
    """Open the baseline: plain queues, processes by fork, nothing else."""
    ingress, answers = FORK.Queue(), FORK.Queue()
    inboxes = [FORK.Queue() for _ in range(subscribers)]
    processes = [FORK.Process(target=count, args=(inbox, answers), daemon=True) for inbox in inboxes]
    processes.append(FORK.Process(target=route, args=(ingress, {KEY: inboxes}), daemon=True))

    def publish(events: int) -> None:
        for _ in range(events):
            ingress.put((KEY, PAYLOAD))

    def ask() -> list[int]:
        ingress.put((KEY, None))
        return [answers.get() for _ in inboxes]

    for process in processes:
        process.start()
    try:
        yield Side(publish, ask, settle=ask)  # what was put before is got before
    finally:
        ingress.cancel_join_thread()  # nobody reads it any more
        for process in processes:
            process.kill()
            process.join()


def route(ingress: Queue[Any], table: dict[str, list[Queue[Any]]]) -> NoReturn:
    while True:
        key, payload = ingress.get()
        for inbox in table[key]:
            inbox.put(payload)


def count(inbox: Queue[Any], answers: Queue[int]) -> NoReturn:
    handled = 0
    while True:
        payload = inbox.get()
        handled += 1
        if payload is None:  # a question
            answers.put(handled)


@contextlib.contextmanager
def mphub(subscribers: int) -> Iterator[Side]:
    """Open a hub with its defaults."""
    hub = EventHub()
    names = [hub.subscribe(KEY, Counter, name=f"counter-{number}").name for number in range(subscribers)]

    def publish(events: int) -> None:
        for _ in range(events):
            hub.publish(KEY, PAYLOAD)

    def ask() -> list[int]:
        return [hub.request(KEY, None, to=name).result() for name in names]

    def settle() -> list[int]:
        hub.drain()
        return ask()

    with hub:
        yield Side(publish, ask, settle)


class Counter(Subscriber[bytes | None, int]):
    """Does next to nothing, so that the way there is what is measured."""

    handled = 0

    def handle(self, payload: bytes | None) -> int:
        self.handled += 1
        return self.handled


SIDES = {"baseline": two_hop, "mphub": mphub}


@dataclass(frozen=True)
class Family:
    """Something to measure on both sides."""

    unit: str
    events: int
    subscribers: int
    measure: Callable[[Side, int], float]
    less_is_better: bool = False


def throughput(side: Side, events: int) -> float:
    """Return deliveries a second."""
    side.publish(WARM_UP)
    before = side.settle()
    began = time.perf_counter()
    side.publish(events)
    after = side.settle()
    seconds = time.perf_counter() - began
    must_be(before + after, [WARM_UP + 1] * len(before) + [WARM_UP + 1 + events + 1] * len(after))
    return events * len(after) / seconds


def roundtrip(side: Side, events: int) -> float:
    """Return the median microseconds from a question to its answer, one after the other."""
    took = []
    for number in range(1, WARM_UP + events + 1):
        began = time.perf_counter()
        answers = side.ask()
        took.append(time.perf_counter() - began)
        must_be(answers, [number])
    return statistics.median(took[WARM_UP:]) * 1e6


FAMILIES = {
    "throughput-1": Family("events/s to 1 subscriber", 300_000, 1, throughput),
    "throughput-4": Family("deliveries/s to 4 subscribers", 300_000, 4, throughput),
    "roundtrip": Family("us from question to answer", 5_000, 1, roundtrip, less_is_better=True),
}


def must_be(got: list[int], expected: list[int]) -> None:
    """Refuse the figure of a run that lost or doubled something."""
    if got != expected:
        raise SystemExit(f"bench: counted {got}, expected {expected}: no figure")


@dataclass(frozen=True)
class Result:
    """What the rounds of one family gave; a ratio says how many times better than the baseline mphub is."""

    family: str
    unit: str
    events: int
    values: dict[str, list[float]]
    ratios: list[float]
    ratio: float


def compare(name: str, events: int, values: dict[str, list[float]]) -> Result:
    """Put the rounds of one family side by side."""
    family = FAMILIES[name]
    better, worse = ("baseline", "mphub") if family.less_is_better else ("mphub", "baseline")
    ratios = [a / b for a, b in zip(values[better], values[worse], strict=True)]
    return Result(name, family.unit, events, values, ratios, statistics.median(ratios))


def measure(name: str, rounds: int, events: int | None) -> Result:
    """Let the sides take turns."""
    events = events or FAMILIES[name].events
    values: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(1, rounds + 1):
        for side, found in values.items():
            found.append(measure_apart(name, side, events))
        print(f"{name} {number}/{rounds}:", ", ".join(f"{side} {found[-1]:,.0f}" for side, found in values.items()), file=sys.stderr)
    return compare(name, events, values)


def measure_apart(name: str, side: str, events: int) -> float:
    """Measure in a fresh process, which leaves none behind, whatever happens."""
    command = [sys.executable, __file__, "--one", f"{name}/{side}", "--events", str(events)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            out, err = process.communicate(timeout=60 + events / 500)
        except subprocess.TimeoutExpired as error:
            raise SystemExit(f"bench: {name}/{side} has not ended after {error.timeout:.0f} s: no figure") from None
        finally:
            end(process)
    if process.returncode:
        raise SystemExit(f"bench: {name}/{side} ended with {process.returncode}: no figure\n{err}")
    return float(json.loads(out)["value"])


def end(process: subprocess.Popen[str]) -> None:
    """Interrupt a measurement that still runs, then kill its process group; a hub's processes follow the hub within 2 s."""
    try:
        if process.poll() is None:
            process.terminate()  # which it takes for an interrupt
            process.wait(10)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def table(results: Sequence[Result]) -> str:
    """Lay out medians, each with the least and the greatest."""
    rows = [f"{'median (min..max)':<18}{'baseline':>28}{'mphub':>34}{'times better':>22}"]
    for one in results:
        baseline, mphub = (spread(one.values[side]) for side in SIDES)
        rows.append(f"{one.family:<18}{baseline:>28}{mphub:>34}{spread(one.ratios, '.2f'):>22}  {one.unit}")
    return "\n".join(rows)


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}..{max(values):{form}})"


def as_json(results: Sequence[Result]) -> str:
    return json.dumps({"machine": machine(), "results": [asdict(one) for one in results]}, indent=2)


def machine() -> str:
    """Say where and when: a figure without that means nothing."""
    models = []
    with contextlib.suppress(OSError):  # no such file on macOS
        models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    model, kernel = models[0] if models else platform.machine(), f"{platform.system()} {platform.release()}"
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {kernel}, {time.strftime('%Y-%m-%d')}"


def falls_short(results: Sequence[Result], least: float) -> bool:
    """Tell whether ``throughput-1`` is below the least ratio, and say so."""
    found = next(one.ratio for one in results if one.family == "throughput-1")
    if found >= least:
        return False
    print(f"bench: got {found:.2f} times the baseline in throughput-1; expected at least {least:g}", file=sys.stderr)
    return True


def whole(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")


def families(text: str) -> list[str]:
    for name in text.split(","):
        if name not in FAMILIES:
            raise argparse.ArgumentTypeError(f"got {name!r}; expected some of {','.join(FAMILIES)}")
    return text.split(",")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with 2 on nonsense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--families", type=families, default=list(FAMILIES), metavar="A,B", help=f"default: {','.join(FAMILIES)}")
    add("--rounds", type=whole, default=5, metavar="N", help="measurements of each side; default: 5")
    add("--events", type=whole, metavar="N", help="events a measurement; default: as many as suit the family")
    add("--json", metavar="FILE", help="write all values there; - for stdout, instead of the table")
    add("--check", type=float, metavar="RATIO", help="exit with 1 if throughput-1 is less than so many times the baseline")
    add("--one", choices=[f"{family}/{side}" for family in FAMILIES for side in SIDES], help=argparse.SUPPRESS)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"got {unknown[0]!r}; expected --families, --rounds, --events, --json or --check")
    if found.check is not None and "throughput-1" not in found.families:
        parser.error(f"--check: got --families {','.join(found.families)}; expected throughput-1 among them")
    if found.json is not None and not Path(found.json).parent.is_dir():
        parser.error(f"--json: got {found.json!r}; expected a file in an existing folder, or -")
    return found


def main() -> int:
    """Measure and tell; return the exit code."""
    options = parse()
    if options.one:
        return measure_here(options.one, options.events)
    results = [measure(name, options.rounds, options.events) for name in options.families]
    print(as_json(results) if options.json == "-" else f"{machine()}\n{table(results)}")
    if options.json not in (None, "-"):
        Path(options.json).write_text(as_json(results) + "\n")
    return int(options.check is not None and falls_short(results, options.check))


def measure_here(what: str, events: int | None) -> int:
    """Measure in this process, and print the figure as a line of JSON."""
    name, side = what.split("/")
    family = FAMILIES[name]
    events = events or family.events
    with SIDES[side](family.subscribers) as opened:
        value = family.measure(opened, events)
    print(json.dumps({"family": name, "side": side, "events": events, "value": value}))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
