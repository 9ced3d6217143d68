"""Kill everything at random, for as long as you like, and check that nothing was lost, reordered or doubled without cause.

    python scripts/soak.py --seconds 60                              a minute at the default rates
    python scripts/soak.py --seconds 600 --seed 7 --rates router=0.5,supervisor=0.1

Publishers (forked processes) publish numbered events under ``in``. ``pass`` makes two of each under ``out``, where ``log`` writes them down
and ``count`` counts them into a snapshot. ``share``, whose replicas grow more and fewer, writes down what is under ``in``. So do makers of
each other kind (threads, batches, several in a process) with what they make of every tenth event. Nobody is told of the kills: SIGKILL
for subscribers, publishers, router and supervisor, SIGTERM and SIGSTOP for subscribers, each at its own rate; some are restarted. What
publishers attempted and what the hub accepted is written down too, each note by one write() to a file opened for appending, with an end by
which one that a death has cut short is told; at the end the notes must agree, and so must the hub's books.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from mphub import Batch, EventHub, HubStatistics, MphubError, Restart, Retry, Snapshot, Subscriber

RATES = {
    "subscriber": 10.0, "terminate": 3.0, "publisher": 2.0, "router": 0.5, "supervisor": 0.1, "stop": 0.6, "scale": 0.5, "restart": 0.5,
}  # fmt: skip
"""Faults a second, on average. The hub gives up after ten deaths of a router, or of a supervisor, within ten seconds."""
LEAST = {"router": 1.2, "supervisor": 1.2}
"""Seconds between two faults of a kind, at least."""
PATIENT, AT_ONCE = Retry(max_attempts=1_000_000), Restart(max_restarts=1_000_000, delay=0.0)
BATCH = 100
SAMPLE = 10
"""Of so many events, one is for the makers of other kinds too."""
MOST_REPLICAS = 4
MOST_ENDED = {"subscriber": 1, "terminate": 1, "restart": MOST_REPLICAS, "supervisor": MOST_REPLICAS}
"""Processes of one subscriber that a fault ends."""
STOPPED = (0.05, 0.4)
"""Seconds that a stopped process stays so."""
FORK = multiprocessing.get_context("fork")
Event = tuple[int, int]
"""(publisher, number)."""
END = " ."
"""Of a note."""


# -- notes


def note(path: Path, *words: object) -> None:
    """Append one line by one write; the kernel may cut even that short, between two pages, when the process is killed."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, ("\n" + " ".join(map(str, words)) + END).encode())
    os.close(file)


def notes(path: Path) -> Iterator[list[int]]:
    """Yield the lines that are whole."""
    if path.exists():
        for line in path.read_text().splitlines():
            if line.endswith(END):
                yield [int(word) for word in line.removesuffix(END).split()]


@dataclass
class Findings:
    """What the notes say."""

    attempted: int = 0
    accepted: int = 0
    delivered: int = 0
    lost: list[Event] = field(default_factory=list)
    unexpected: list[Event] = field(default_factory=list)
    reordered: list[Event] = field(default_factory=list)
    doubled: int = 0
    """Deliveries of an event beyond its first."""


def check(attempted: Iterable[Event], accepted: Iterable[Event], delivered: Iterable[Event]) -> Findings:
    """Compare what was attempted (or not), accepted (surely) and delivered (in this order)."""
    tried, sure, times = set(attempted), set(accepted), collections.Counter[Event]()
    last: dict[int, int] = {}
    found = Findings(attempted=len(tried), accepted=len(sure))
    for event in delivered:
        times[event] += 1
        publisher, number = event
        if times[event] == 1:
            if number < last.get(publisher, -1):
                found.reordered.append(event)
            last[publisher] = max(number, last.get(publisher, -1))
    found.delivered = len(times)
    found.lost = sorted(sure - times.keys())
    found.unexpected = sorted(times.keys() - tried)
    found.doubled = times.total() - len(times)
    return found


def ranges(path: Path, times: int = 1) -> Iterator[Event]:
    """Yield what is noted; with ``times``, what a stage that makes so many of each has made of it."""
    for publisher, first, last in notes(path):
        yield from ((publisher, number) for number in range(times * first, times * last))


# -- the load


class Count(Subscriber[Event, int]):
    """Counts what it gets, exactly."""

    def setup(self) -> None:
        self.total = 0

    def handle(self, payload: Event | None) -> int:
        self.total += payload is not None
        return self.total

    def snapshot(self) -> int:
        return self.total

    def restore(self, state: object) -> None:
        assert isinstance(state, int)
        self.total = state


def make_hub(folder: Path, **options: Any) -> EventHub:
    """Subscribe what is to be killed, and ``beat``, which is not."""
    hub = EventHub(**options)

    def write_down(event: Event) -> None:
        note(folder / "delivered", *event)

    hub.subscribe("in", maker(hub, "out"), name="pass", to="out", retry=PATIENT, restart=AT_ONCE)
    hub.subscribe("out", write_down, name="log", retry=PATIENT, restart=AT_ONCE)
    hub.subscribe("out", Count, name="count", snapshot=Snapshot(every=200, period=0.1), retry=PATIENT, restart=AT_ONCE)
    hub.subscribe("in", lambda event: note(folder / "shared", *event), name="share", replicas=2, retry=PATIENT, restart=AT_ONCE)
    hub.subscribe("beat", lambda sent: note(folder / "beats", time.monotonic_ns(), sent), name="beat", retry=PATIENT)
    return hub


def maker(hub: EventHub, key: str) -> Callable[[Event], Event]:
    """Return what makes two of an event, and publishes one in each way."""

    def make_two(event: Event) -> Event:
        publisher, number = event
        hub.publish(key, (publisher, 2 * number))
        return (publisher, 2 * number + 1)

    return make_two


def function(make_two: Callable[[Event], Event]) -> Callable[..., object]:
    return make_two


def batches(make_two: Callable[[Event], Event]) -> Callable[..., object]:
    return lambda events: [make_two(event) for event in events]


def coroutine(make_two: Callable[[Event], Event]) -> Callable[..., object]:
    async def make_later(event: Event) -> Event:
        await asyncio.sleep(0)
        return make_two(event)

    return make_later


MAKERS: dict[str, tuple[Callable[..., Callable[..., object]], dict[str, Any]]] = {
    "threads": (function, {"concurrency": 8}),
    "batches": (batches, {"batch": Batch(size=8)}),
    "function": (function, {"process": "makers"}),
    "coroutine": (coroutine, {"process": "makers"}),
}
"""name -> how it makes what, and how it is subscribed."""


def add_makers(hub: EventHub, folder: Path) -> None:
    """Subscribe one of each kind, and what writes down what it makes."""
    always: dict[str, Any] = {"retry": PATIENT, "restart": AT_ONCE}
    for name, (kind, options) in MAKERS.items():
        key = f"made.{name}"
        hub.subscribe("in", kind(maker(hub, key)), to=key, name=name, where=is_in_sample, **options, **always)
        hub.subscribe(key, partial(write_to, folder / name), name=f"{name}-log", process="logs", **always)


def is_in_sample(event: Event) -> bool:
    return event[1] % SAMPLE == 0


def write_to(path: Path, event: Event) -> None:
    note(path, *event)


def wrong_of_makers(folder: Path, found: HubStatistics) -> list[str]:
    """Name those whose events and outputs, as noted and as counted, do not agree."""
    wrong = []
    for name in MAKERS:
        sample = [[e for e in ranges(folder / what) if is_in_sample(e)] for what in ("attempted", "accepted")]
        attempted, accepted = ([(p, m) for p, n in events for m in (2 * n, 2 * n + 1)] for events in sample)
        findings = check(attempted, accepted, events_in(folder / name))
        wrong += [f"{len(events)} events {what} by {name}" for what, events in judged(findings)[:2] if events]
        handled, entered = found.subscribers[name].handled, found.subscribers[f"{name}-log"].accepted
        if not 2 * handled == entered == findings.delivered:
            wrong.append(f"{name} handled {handled}, of which {entered} were accepted and {findings.delivered} noted")
    return wrong


def publish_numbers(hub: EventHub, folder: Path, publisher: int, rate: float, over: threading.Event) -> None:
    """Be a publisher: note what is attempted, publish, note what is accepted."""
    with contextlib.suppress(MphubError):  # the hub was stopped
        for first in itertools.count(0, BATCH):
            if over.is_set():
                return
            note(folder / "attempted", publisher, first, first + BATCH)
            for number in range(first, first + BATCH):
                hub.publish("in", (publisher, number))
            hub.flush(60)
            note(folder / "accepted", publisher, first, first + BATCH)
            time.sleep(BATCH / rate)


class Publishers:
    """Some publishing processes; one that was killed is followed by another."""

    def __init__(self, hub: EventHub, folder: Path, count: int, rate: float) -> None:
        self.hub, self.folder, self.rate = hub, folder, rate / count
        self.over = FORK.Event()
        self.numbers = itertools.count(1)
        self.processes: list[BaseProcess] = [self.start() for _ in range(count)]

    def start(self) -> BaseProcess:
        process = FORK.Process(target=publish_numbers, args=(self.hub, self.folder, next(self.numbers), self.rate, self.over))
        process.start()
        return process

    def replace_one(self, dice: random.Random) -> None:
        """Kill one in the middle of whatever it does."""
        place = dice.randrange(len(self.processes))
        self.processes[place].kill()
        self.processes[place].join()
        self.processes[place] = self.start()

    def stop(self) -> None:
        self.over.set()
        for process in self.processes:
            process.join(90)


# -- the faults


@dataclass
class Faults:
    """What was done to whom."""

    done: collections.Counter[str] = field(default_factory=collections.Counter)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    """victim -> seconds from a kill to the next confirmed event."""


class Tormentor:
    """Does each kind of fault at its rate, until the time is up."""

    def __init__(self, hub: EventHub, publishers: Publishers, rates: dict[str, float], dice: random.Random) -> None:
        self.hub, self.publishers, self.rates, self.dice = hub, publishers, rates, dice
        self.faults = Faults()

    def run(self, seconds: float) -> Faults:
        """Do the faults in this thread; between them, events go on."""
        began = time.monotonic()
        due = {kind: began + self.dice.expovariate(rate) for kind, rate in self.rates.items() if rate}
        while due and (now := time.monotonic()) - began < seconds:
            kind = min(due, key=lambda kind: due[kind])
            time.sleep(min(max(0.0, due[kind] - now), 1.0))
            if time.monotonic() < due[kind]:
                continue
            due[kind] = max(due[kind], now - 1.0) + max(self.dice.expovariate(self.rates[kind]), LEAST.get(kind, 0.0))
            getattr(self, f"hit_{kind}")()
            self.faults.done[kind] += 1
        return self.faults

    def hit_subscriber(self) -> None:
        self.signal_one(signal.SIGKILL)

    def hit_terminate(self) -> None:
        self.signal_one(signal.SIGTERM)

    def hit_restart(self) -> None:
        self.hub.subscription(self.dice.choice([name for name in self.hub.statistics().subscribers if name != "beat"])).restart()

    def hit_publisher(self) -> None:
        self.publishers.replace_one(self.dice)

    def hit_router(self) -> None:
        self.kill_and_time("router")

    def hit_supervisor(self) -> None:
        self.kill_and_time("supervisor")

    def hit_stop(self) -> None:
        pid = self.signal_one(signal.SIGSTOP)
        if pid is not None:
            threading.Timer(self.dice.uniform(*STOPPED), send, (pid, signal.SIGCONT)).start()

    def hit_scale(self) -> None:
        self.hub.subscription("share").scale(self.dice.randint(1, MOST_REPLICAS))

    def signal_one(self, number: int) -> int | None:
        found = self.hub.statistics().subscribers
        pids = [pid for name, subscriber in found.items() if name != "beat" for pid in subscriber.pids]
        pid = self.dice.choice(pids) if pids else None
        if pid is not None:
            send(pid, number)
        return pid

    def kill_and_time(self, victim: str) -> None:
        """Kill, then see how long it takes until an event is accepted again."""
        send(self.hub.statistics().pids[victim], signal.SIGKILL)
        began = time.monotonic()
        time.sleep(0.005)  # so that nothing is confirmed that was read before
        self.hub.publish("beat", time.monotonic_ns(), confirm=True)
        self.faults.recoveries[victim].append(time.monotonic() - began)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def beat(hub: EventHub, over: threading.Event) -> None:
    """Publish for the healthy subscriber, a hundred times a second."""
    while not over.wait(0.01):
        hub.publish("beat", time.monotonic_ns())


# -- the judgement


@dataclass
class Size:
    """Of router and supervisor: open descriptors and resident bytes."""

    descriptors: dict[str, int]
    rss: dict[str, int]

    @classmethod
    def of(cls, pids: Mapping[str, int]) -> Size:
        processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        return cls({name: p.num_fds() for name, p in processes.items()}, {name: p.memory_info().rss for name, p in processes.items()})


def longest_gap(times: Sequence[int]) -> float:
    """Return the longest time between two notes, in seconds."""
    return max((b - a for a, b in itertools.pairwise(times)), default=0) / 1e9


def books_add_up(found: HubStatistics) -> list[str]:
    """Name the subscribers whose counters do not."""
    wrong = []
    for name, s in found.subscribers.items():
        if s.accepted != s.handled + s.dead + sum(s.dropped.values()) + s.waiting + s.running:
            wrong.append(f"{name}: {s}")
    return wrong


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def table(faults: Faults, found: Findings, gap: float, counted: tuple[int, int], sizes: tuple[Size, Size], seconds: float) -> str:
    """Lay out what happened."""
    rows = [f"{kind + ' hit':<26}{faults.done[kind]:>12,}" for kind in RATES]
    rows += [
        f"{'attempted':<26}{found.attempted:>12,}   of the second stage, like all below",
        f"{'accepted for sure':<26}{found.accepted:>12,}   {found.accepted / seconds:,.0f} a second",
        f"{'delivered':<26}{found.delivered:>12,}",
        f"{'lost':<26}{len(found.lost):>12,}   {found.lost[:3] or ''}",
        f"{'unexpected':<26}{len(found.unexpected):>12,}   {found.unexpected[:3] or ''}",
        f"{'out of order':<26}{len(found.reordered):>12,}   {found.reordered[:3] or ''}",
        f"{'delivered again':<26}{found.doubled:>12,}   at most one for each kill of its process",
        f"{'counted, of accepted':<26}{counted[0]:>12,}   of {counted[1]:,}",
        f"{'longest gap, healthy':<26}{gap:>12.3f} s",
    ]
    for victim, took in faults.recoveries.items():
        rows.append(f"{victim + ' recovery p50, p99':<26}{statistics.median(took):>12.3f} s {percentile(took, 0.99):.3f} s")
    for name in sizes[0].rss:
        before, after = sizes[0], sizes[1]
        rows.append(f"{name + ' descriptors, MB':<26}{before.descriptors[name]:>5} -> {after.descriptors[name]},  "
                    f"{before.rss[name] / 1e6:.0f} -> {after.rss[name] / 1e6:.0f}")  # fmt: skip
    return "\n".join(rows)


def soak(folder: Path, seconds: float, rates: dict[str, float], publishers: int, rate: float, seed: int) -> tuple[str, list[str]]:
    """Run load and faults; return the table and what is wrong."""
    hub, over = make_hub(folder), threading.Event()
    add_makers(hub, folder)
    with hub:
        before = Size.of(hub.statistics().pids)
        crowd = Publishers(hub, folder, publishers, rate)
        heart = threading.Thread(target=beat, args=(hub, over))
        heart.start()
        faults = Tormentor(hub, crowd, rates, random.Random(seed)).run(seconds)
        over.set()
        heart.join()
        crowd.stop()
        hub.drain(300)
        counted = hub.request("out", None, to="count").result(30)
        found, after = hub.statistics(), Size.of(hub.statistics().pids)
    findings = check(ranges(folder / "attempted", 2), ranges(folder / "accepted", 2), events_in(folder / "delivered"))
    shared = check(ranges(folder / "attempted"), ranges(folder / "accepted"), events_in(folder / "shared"))
    gap = longest_gap([at for at, _ in notes(folder / "beats")])
    entered, made = found.subscribers["count"].accepted - 1, 2 * found.subscribers["pass"].handled  # less the question
    wrong = [f"{len(events)} events {what}" for what, events in judged(findings) if events] + books_add_up(found)
    if not counted == entered == found.subscribers["log"].accepted == findings.delivered == made:
        wrong.append(f"counted {counted}, accepted {entered}, noted {findings.delivered}, made {made}")
    wrong += [f"{len(events)} events {what} by replicas" for what, events in judged(shared)[:2] if events]
    if not found.subscribers["share"].handled == found.subscribers["pass"].handled == shared.delivered:
        wrong.append(f"replicas handled {found.subscribers['share'].handled} and noted {shared.delivered}")
    wrong += wrong_of_makers(folder, found)
    kills = sum(faults.done[kind] * most for kind, most in MOST_ENDED.items())
    if max(findings.doubled, shared.doubled) > kills:
        wrong.append(f"{findings.doubled} deliveries again, {shared.doubled} by replicas, more than kills")
    return table(faults, findings, gap, (counted, entered), (before, after), seconds), wrong


def events_in(path: Path) -> Iterator[Event]:
    return ((publisher, number) for publisher, number in notes(path))


def judged(findings: Findings) -> list[tuple[str, list[Event]]]:
    return [("lost", findings.lost), ("unexpected", findings.unexpected), ("out of order", findings.reordered)]


def parse_rates(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        kind, _, rate = part.partition("=")
        if kind not in RATES or not rate.replace(".", "", 1).isdigit():
            raise argparse.ArgumentTypeError(f"got {part!r}; expected kind=faults a second, of {', '.join(RATES)}")
        found[kind] = float(rate)
    return RATES | found


def number(least: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a number of at least {least:g}")
        return value

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    rates = ",".join(f"{kind}={rate:g}" for kind, rate in RATES.items())
    parser.add_argument("--seconds", type=number(1, float), default=30.0, help="how long; default: 30")
    parser.add_argument("--rates", type=parse_rates, default=RATES, help=f"faults a second; default: {rates}")
    parser.add_argument("--publishers", type=number(1, int), default=2, help="publishing processes; default: 2")
    parser.add_argument("--rate", type=number(1, float), default=3000.0, help="events a second of all of them, at most; default: 3000")
    parser.add_argument("--seed", type=number(0, int), default=random.randrange(1 << 32), help="default: another one each time")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.seconds:g} s, {json.dumps(options.rates)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        told, wrong = soak(Path(folder), options.seconds, options.rates, options.publishers, options.rate, options.seed)
    print(told)
    for each in wrong:
        print(f"wrong: {each}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
