"""Measure mphub against the queues that people wire by hand, side by side in one run.

    python scripts/bench.py                                          every family, five rounds: some minutes
    python scripts/bench.py --families throughput-1 --check 5        exit code 1 below five times the baseline
    python scripts/bench.py --families throughput-1,roundtrip --peers   other packages too, as far as they are installed
    python scripts/bench.py --events 20000 --rounds 3 --json -       all values, for a program

The baseline is mostly "two-hop": the producer puts (key, payload) into one multiprocessing.Queue, a router process gets each and puts the
payload into each subscriber's own multiprocessing.Queue. Its answers come straight back in one hop, by a third queue; those of mphub come
through the router. mphub's journal is on. Of the families "keys", "patterns" and "stuck-*" the baseline is mphub itself, in the usual
case.

Rates differ from machine to machine and from minute to minute: what counts is the ratio within a round. Each measurement is a process of
its own, and the sides take turns. What they start is started and warm before the clock runs; everything else is measured, until each
subscriber has told how many events it has handled. A miscount is an error, never a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NoReturn

from peers import PEERS, Peer

from mphub import EventHub, Inbox, Restart, Stop, Subscriber

KEY, PAYLOAD = "orders.created", b"x" * 100
WARM_UP = 1000
FORK = multiprocessing.get_context("fork")
KEYS = 100_000
PATTERNS = 1000
LARGE = 10_000
"""Elements of a payload that is looked at."""
STUCK = 1000
"""Events that a stuck subscriber's inbox takes."""


@dataclass(frozen=True)
class Side:
    """A way to subscribers that count, each in a process of its own."""

    publish: Callable[[int], object]  # so many events
    ask: Callable[[], list[int]]  # what each subscriber has counted of all that was published before


Opened = AbstractContextManager[Side]


# -- the sides


@contextlib.contextmanager
def two_hop(subscribers: int, payload: object = PAYLOAD) -> Iterator[Side]:
    """Open the baseline: plain queues, processes by fork, nothing else."""
    ingress, answers = FORK.Queue(), FORK.Queue()
    inboxes = [FORK.Queue() for _ in range(subscribers)]
    processes = [FORK.Process(target=count, args=(inbox, answers), daemon=True) for inbox in inboxes]
    processes.append(FORK.Process(target=route, args=(ingress, {KEY: inboxes}), daemon=True))

    def publish(events: int) -> None:
        for _ in range(events):
            ingress.put((KEY, payload))

    def ask() -> list[int]:
        ingress.put((KEY, None))  # what was put before is got before
        return [answers.get() for _ in inboxes]

    for process in processes:
        process.start()
    try:
        yield Side(publish, ask)
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
        if payload is None:
            answers.put(handled)
        else:
            handled += 1
            if len(payload) > LARGE:
                look_at(payload)


class Counter(Subscriber[Any, int]):
    """Does next to nothing, so that the way there is what is measured."""

    handled = 0

    def handle(self, payload: Any) -> int:
        if payload is not None:
            self.handled += 1
            if len(payload) > LARGE:
                look_at(payload)
        return self.handled


def look_at(payload: Any) -> object:
    """Touch a large one here and there."""
    return payload[:: LARGE // 8].sum()


@contextlib.contextmanager
def mphub(subscribers: int, patterns: str | list[str] = KEY, keys: Sequence[str] = (KEY,), payload: object = PAYLOAD) -> Iterator[Side]:
    """Open a hub with its defaults."""
    hub = EventHub(name="bench")
    names = [hub.subscribe(patterns, Counter, name=f"counter-{number}").name for number in range(subscribers)]
    with hub:
        yield side_of(hub, names, keys, payload)


def side_of(hub: EventHub, names: list[str], keys: Sequence[str] = (KEY,), payload: object = PAYLOAD) -> Side:
    def publish(events: int) -> None:
        if len(keys) == 1:
            for _ in range(events):
                hub.publish(KEY, payload)
        else:
            for key in itertools.islice(itertools.cycle(keys), events):
                hub.publish(key, payload)

    def ask() -> list[int]:
        return [hub.request(KEY, None, to=name).result() for name in names]

    return Side(publish, ask)


@contextlib.contextmanager
def beside_a_stuck_one(how: str) -> Iterator[Side]:
    """Open a hub with a healthy subscriber and one of the same key that does not get on."""
    hub = EventHub(name="bench", check=False, stop=Stop(ask=0.1, term=0.1))
    hub.subscribe(KEY, Counter, name="counter")
    rule = how if how in ("drop_oldest", "drop_newest", "dead_letter") else "block"
    work = {"FATAL": die, "frozen": len}.get(how, sleep_for_ever)
    inbox, once = Inbox(maxsize=STUCK, overflow=rule), Restart(max_restarts=0)
    patterns = ["stuck"] if how == "own key" else [KEY, "stuck"]
    stuck = hub.subscribe(patterns, work, name="stuck", inbox=inbox, restart=once)
    with hub:
        if how == "frozen":
            os.kill(stuck.statistics().pids[0], signal.SIGSTOP)
        hub.publish("stuck", PAYLOAD)
        while how == "FATAL" and stuck.state != "FATAL":
            time.sleep(0.01)
        if how != "own key":
            for _ in range(2 * STUCK):
                hub.publish("stuck", PAYLOAD, confirm=True)  # a frozen one holds its publishers for five seconds
        yield side_of(hub, ["counter"])
        hub.stop(drain=False)


def die(_: object) -> None:
    os._exit(1)


def sleep_for_ever(_: object) -> None:
    time.sleep(3600)


@contextlib.contextmanager
def published_by(processes: int, opened: Opened) -> Iterator[Side]:
    """Let other processes publish, all at once."""
    with opened as side, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(publisher(side)) for _ in range(processes)]

        def all_do(what: str, events: int) -> list[Any]:
            for line in lines:
                line.send((what, events))
            return [line.recv() for line in lines]

        yield Side(lambda events: all_do("publish", events // processes), lambda: max(all_do("ask", 0)))


@contextlib.contextmanager
def publisher(side: Side) -> Iterator[Any]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=obey, args=(side, theirs), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def obey(side: Side, line: Any) -> NoReturn:
    while True:
        what, events = line.recv()
        line.send(side.publish(events) if what == "publish" else side.ask())


# -- what is measured


@dataclass(frozen=True)
class Family:
    """Something to measure on two sides: ``baseline``, whatever that is here, and ``mphub``."""

    unit: str
    events: int
    measure: Callable[[Side, int], float]
    sides: Mapping[str, Callable[[], Opened]]
    less_is_better: bool = False


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


def against_two_hop(unit: str, subscribers: int, events: int = 300_000, publishers: int = 0) -> Family:
    sides: dict[str, Callable[[], Opened]] = {"baseline": lambda: two_hop(subscribers), "mphub": lambda: mphub(subscribers)}
    if publishers:
        sides = {name: partial(crowded, publishers, opened) for name, opened in sides.items()}
    return Family(unit, events, throughput, sides)


@contextlib.contextmanager
def with_peer(peer: Peer) -> Iterator[Side]:
    with peer.open(KEY, PAYLOAD) as (publish, ask):
        yield Side(publish, ask)


def opener(family: str, side: str) -> Callable[[], Opened]:
    """Return what opens a side: one of the family's two, or a peer."""
    return FAMILIES[family].sides[side] if side in SIDES else partial(with_peer, PEERS[side])


def crowded(publishers: int, opened: Callable[[], Opened]) -> Opened:
    return published_by(publishers, opened())


def asked(unit: str, share: float) -> Family:
    sides = {"baseline": lambda: two_hop(1), "mphub": lambda: mphub(1)}
    return Family(unit, 5_000, partial(roundtrip, share=share), sides, less_is_better=True)


def against_itself(unit: str, special: Callable[[], Opened], usual: Callable[[], Opened] = lambda: mphub(1)) -> Family:
    return Family(unit, 300_000, throughput, {"baseline": usual, "mphub": special})


def array() -> object:
    import numpy

    return numpy.random.default_rng(1).random(1 << 20)


def many_keys() -> Opened:
    return mphub(1, [KEY, "many.>"], [f"many.{number}" for number in range(KEYS)])


def many_patterns() -> Opened:
    return mphub(1, [KEY, *(f"many.{number}.>" for number in range(PATTERNS - 1))])


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
SIDES = ("baseline", "mphub")


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
    peers: dict[str, float]
    """Median of how many times better mphub is than each."""


def compare(name: str, events: int, values: dict[str, list[float]]) -> Result:
    """Put the rounds of one family side by side."""
    family = FAMILIES[name]
    ratios = {side: ratios_of(values["mphub"], values[side], family.less_is_better) for side in values if side != "mphub"}
    peers = {side: statistics.median(found) for side, found in ratios.items() if side != "baseline"}
    return Result(name, family.unit, events, values, ratios["baseline"], statistics.median(ratios["baseline"]), peers)


def ratios_of(ours: list[float], theirs: list[float], less_is_better: bool) -> list[float]:
    """Return, round by round, how many times better ours is."""
    pairs = zip(theirs, ours, strict=True) if less_is_better else zip(ours, theirs, strict=True)
    return [a / b for a, b in pairs]


def measure(name: str, rounds: int, events: int | None, peers: Sequence[str] = ()) -> Result:
    """Let the sides take turns."""
    events = events or FAMILIES[name].events
    others = [peer for peer in peers if name in PEERS_IN]
    values: dict[str, list[float]] = {side: [] for side in (*FAMILIES[name].sides, *others)}
    for number in range(1, rounds + 1):
        for side, found in values.items():
            found.append(measure_apart(name, side, events))
        print(f"{name} {number}/{rounds}:", ", ".join(f"{side} {found[-1]:,.0f}" for side, found in values.items()), file=sys.stderr)
    return compare(name, events, values)


def measure_apart(name: str, side: str, events: int) -> float:
    """Measure in a fresh process, which leaves none behind, whatever happens."""
    events = max(1, int(events * (PEERS[side].share if side in PEERS else 1)))
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
        rows += [f"  {peer:<16}{spread(one.values[peer]):>28}{'':>34}{ratio:>10.2f}" for peer, ratio in one.peers.items()]
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
    add("--families", type=families, default=USUAL, metavar="A,B", help=f"default: {','.join(USUAL)}; or of: {','.join(FAMILIES)}")
    add("--rounds", type=whole, default=5, metavar="N", help="measurements of each side; default: 5")
    add("--events", type=whole, metavar="N", help="events a measurement; default: as many as suit the family")
    add("--json", metavar="FILE", help="write all values there; - for stdout, instead of the table")
    add("--check", type=float, metavar="RATIO", help="exit with 1 if throughput-1 is less than so many times the baseline")
    add("--one", choices=[f"{family}/{side}" for family in FAMILIES for side in (*SIDES, *PEERS)], help=argparse.SUPPRESS)
    add("--peers", action="store_true", help="measure the other packages that are installed too")
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"got {unknown[0]!r}; expected --families, --rounds, --events, --json, --check or --peers")
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
    peers = [name for name, peer in PEERS.items() if options.peers and peer.is_there]
    for name in PEERS if options.peers else ():
        if name not in peers:
            print(f"bench: {name} is not installed: not run", file=sys.stderr)
    results = [measure(name, options.rounds, options.events, peers) for name in options.families]
    print(as_json(results) if options.json == "-" else f"{machine()}\n{table(results)}")
    if options.json not in (None, "-"):
        Path(options.json).write_text(as_json(results) + "\n")
    return int(options.check is not None and falls_short(results, options.check))


def measure_here(what: str, events: int | None) -> int:
    """Measure in this process, and print the figure as a line of JSON."""
    name, side = what.split("/")
    family = FAMILIES[name]
    events = events or family.events
    with opener(name, side)() as opened:
        value = family.measure(opened, events)
    print(json.dumps({"family": name, "side": side, "events": events, "value": value}))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
