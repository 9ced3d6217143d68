"""Let one process of a hub die at each named step in turn, and check each time that nothing was lost, reordered or doubled without cause.

    python scripts/killsteps.py                                         each step, the first three times it is passed
    python scripts/killsteps.py --steps router. --passes 40             the router's, up to the 40th time or until nobody gets that far
    python scripts/killsteps.py --points router.committed:3,worker.read:2 --times 20       these two deaths in one run, twenty runs
    python scripts/killsteps.py --points 'router.read:20>router.recovered:1'               the second one only once the first has happened
    python scripts/killsteps.py --pairs 200 --seed 7                    two or three at random, two hundred runs
    KILLSTEPS_STOPS=1 KILLSTEPS_BATCH=100 python scripts/killsteps.py   with a stop without drain in the middle, and larger batches

Each run is a small program in an interpreter of its own: a publisher (its process is forked; one that dies is followed by another)
publishes numbered events under ``in``, ``pass`` hands each on to ``out``, where ``log`` writes it down and ``count`` counts it into a
snapshot. Their processes are recycled. Between them: requests, retries, a crash, payloads in files, a subscription that comes and goes, a
restart.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from soak import AT_ONCE, FORK, PATIENT, Count, Event, books_add_up, check, judged, note, notes, ranges

import mphub
from mphub import (
    Dropped,
    EventHub,
    HubClosed,
    HubStatistics,
    Inbox,
    MphubError,
    Recycle,
    Retry,
    RetryLater,
    Snapshot,
    StartFailed,
    failpoints,
)

BATCH = int(os.environ.get("KILLSTEPS_BATCH", "10"))
EVENTS = 30 * BATCH
SMALL = Inbox(maxsize=4 * BATCH)
"""So that publishers are held now and then."""
OFTEN = Recycle(max_events=7 * BATCH)
TOGETHER = 2
"""Of five batches the one that is a transaction."""
RETRIED, LATER, CRASHES, LARGE, ASKS = 40, 70, 150, 30, 20
"""Numbers (modulo 100; CRASHES as it is) of events that something special happens to."""
STOPS = bool(os.environ.get("KILLSTEPS_STOPS"))
"""Stop without drain in the middle, instead of draining."""
STOP_WITHIN = 10.0
WITHIN = 40.0
"""Seconds that a program may take."""
GONE = 2.0
"""Seconds after its end in which everything must be gone."""
MARK = "MPHUB_KILLSTEPS"
KEEP = "KILLSTEPS_KEEP"
"""Names a folder for the notes of runs in which something was wrong."""
PACKAGE = Path(mphub.__file__).parent


# -- the program


def hand_on(folder: Path, hub: EventHub, event: tuple[int, int, bytes]) -> tuple[int, int, bytes]:
    """Be ``pass``: note the start, have its troubles, hand on."""
    publisher, number, _ = event
    attempt = mphub.current_event().attempt
    note(folder / "passed", publisher, number, attempt, os.getpid())
    if number == CRASHES and attempt == 1:
        os._exit(3)
    if number % 100 == RETRIED and attempt == 1:
        raise KeyError(number)
    if number % 100 == LATER and attempt == 1:
        raise RetryLater(0.01)
    if number % 100 == ASKS:
        assert hub.request("ask", number).result(20) == number + 1
    return event


def ask(number: int) -> int | bytes:
    return bytes(100_000) if number < 0 else number + 1


def make_hub(folder: Path) -> EventHub:
    hub = EventHub()
    troubles = Retry(PATIENT.max_attempts, on=KeyError, delay=0.0)
    hub.subscribe(
        "in", lambda event: hand_on(folder, hub, event), name="pass", to="out", retry=troubles, restart=AT_ONCE, inbox=SMALL, recycle=OFTEN
    )

    def write_down(event: tuple[int, int, bytes]) -> None:
        note(folder / "delivered", *event[:2], mphub.current_event().attempt, os.getpid())

    hub.subscribe("out", write_down, name="log", retry=PATIENT, restart=AT_ONCE, recycle=OFTEN)
    hub.subscribe("out", Count, name="count", snapshot=Snapshot(every=50, period=0.05), retry=PATIENT, restart=AT_ONCE, recycle=OFTEN)
    hub.subscribe("ask", ask, name="ask", retry=PATIENT, restart=AT_ONCE)

    def heal(number: int) -> None:
        if not (folder / "healed").exists():
            raise ValueError(number)
        note(folder / "redriven", number)

    hub.subscribe("ill", heal, name="ill", retry=PATIENT, restart=AT_ONCE)
    return hub


def publish_numbers(hub: EventHub, folder: Path, publisher: int) -> None:
    """Be a publisher: note what is attempted, publish it one way or another, note what is accepted."""
    failpoints.arm(str(folder / "points"))
    with contextlib.suppress(*(HubClosed, Dropped) if STOPS else ()):
        publish_all(hub, folder, publisher)


def publish_all(hub: EventHub, folder: Path, publisher: int) -> None:
    for first in range(0, EVENTS, BATCH):
        note(folder / "attempted", publisher, first, first + BATCH)
        events = [(publisher, number, padding_of(number)) for number in range(first, first + BATCH)]
        publish_somehow(hub, first // BATCH, events)
        hub.flush(30)
        note(folder / "accepted", publisher, first, first + BATCH)
        if first % 70 == 0:
            assert hub.request("ask", first).result(20) == first + 1


def padding_of(number: int) -> bytes:
    return bytes(80_000 if number % 100 == LARGE else 30_000 if number // BATCH == 17 else 10)


def publish_somehow(hub: EventHub, turn: int, events: list[tuple[int, int, bytes]]) -> None:
    if turn % 5 == TOGETHER:
        with hub.transaction() as together:
            for event in events:
                together.publish("in", event)
    elif turn % 5 == 3:
        hub.publish_batch("in", events)
    else:
        for event in events:
            hub.publish("in", event)


def see_to_publishers(hub: EventHub, folder: Path) -> None:
    """Let publishers follow each other until one has come through."""
    for number in itertools.count(1):
        process = FORK.Process(target=publish_numbers, args=(hub, folder, number))
        process.start()
        process.join()
        if process.exitcode != -9:
            assert process.exitcode == 0, f"a publisher ended with {process.exitcode}"
            return


def run_program(folder: Path) -> list[str]:
    """Be the hub's process; return what is wrong."""
    os.environ["MPHUB_FAILPOINTS"] = str(folder / "points")  # for the others: this one has decided at import
    steps = [point.partition(":")[0] for point in (folder / "wanted").read_text().split(",")]
    hub = make_hub(folder)
    threading.Thread(target=tell_where_it_hangs, args=(hub,), daemon=True).start()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hub)
        except StartFailed:
            if any(step.startswith("supervisor.") for step in steps):
                return []  # as it should: the first supervisor died before it had heard of the hub
            raise
        return run_hub(hub, folder, steps)


def run_hub(hub: EventHub, folder: Path, steps: Sequence[str]) -> list[str]:
    print(hub._address.folder, flush=True)
    crowd = threading.Thread(target=see_to_publishers, args=(hub, folder))
    crowd.start()
    wrong = come_and_go(hub, folder)
    if STOPS:
        return wrong + stop_midway(hub, folder, crowd, steps)
    crowd.join()
    hub.drain(30)
    counted = hub.request("out", None, to="count").result(20)
    found = hub.statistics()
    wrong += files_left(Path(hub._address.folder) / "blobs")
    return wrong + judge(folder, found, counted, steps)


def stop_midway(hub: EventHub, folder: Path, crowd: threading.Thread, steps: Sequence[str]) -> list[str]:
    """Stop without drain while events flow; return what is wrong."""
    while crowd.is_alive() and len(list(notes(folder / "delivered"))) < EVENTS // 3:
        time.sleep(0.002)
    began = time.monotonic()
    hub.stop(drain=False)
    took = time.monotonic() - began
    crowd.join()
    found = hub.statistics()
    sure = len(set(ranges(folder / "accepted")))
    wrong = [f"it took {took:.1f} s to stop"] if took > STOP_WITHIN else []
    if found.subscribers["pass"].accepted < sure:
        wrong.append(f"{sure} were accepted, the books know of {found.subscribers['pass'].accepted}")
    wrong += [f"{name} has something left: {s}" for name, s in found.subscribers.items() if s.waiting or s.running or s.dead]
    return wrong + judge_notes(folder, found, steps)


def come_and_go(hub: EventHub, folder: Path) -> list[str]:
    """Subscribe, ask, restart and unsubscribe while events flow."""
    answers = [hub.request("ask", number).result(20) for number in (1, -1, 2)]
    late = hub.subscribe("late", lambda number: number * 2, name="late")
    answers.append(late.request(21).result(20))
    hub.subscription("log").restart()
    late.unsubscribe()
    bury_and_redrive(hub, folder)
    return [f"answers: {answers}"] if answers != [2, bytes(100_000), 3, 42] else []


def bury_and_redrive(hub: EventHub, folder: Path) -> None:
    hub.publish("ill", 1, confirm=True)
    while not (letters := hub.dead_letters("ill")):
        time.sleep(0.005)
    assert [letter.payload for letter in letters] == [1]
    (folder / "healed").touch()
    hub.redrive("ill")
    assert not hub.dead_letters("ill")


def tell_where_it_hangs(hub: EventHub) -> None:
    """Leave word on stderr when the program takes too long."""
    time.sleep(WITHIN - 10)
    with contextlib.suppress(MphubError, TimeoutError):
        print(hub.statistics(), file=sys.stderr, flush=True)


# -- the judgement


def judge(folder: Path, found: HubStatistics, counted: object, steps: Sequence[str]) -> list[str]:
    """Compare notes and books of a hub that was drained; return what is wrong."""
    wrong = [*judge_notes(folder, found, steps), *unfinished(found)]
    came = {(publisher, number) for publisher, number, *_ in notes(folder / "delivered")}
    log, into = found.subscribers["log"], found.subscribers["pass"]
    if not into.handled == log.accepted == len(came) == counted == found.subscribers["count"].accepted - 1:
        books = {name: (s.accepted, s.handled) for name, s in found.subscribers.items()}
        wrong.append(f"the second stage: {len(came)} came, {counted} counted, books {books}")
    return wrong


def judge_notes(folder: Path, found: HubStatistics, steps: Sequence[str]) -> list[str]:
    """Compare notes and books; return what is wrong."""
    passed, delivered = list(notes(folder / "passed")), list(notes(folder / "delivered"))
    came = [(publisher, number) for publisher, number, *_ in delivered]
    whole = check(ranges(folder / "attempted"), () if STOPS else ranges(folder / "accepted"), came)
    whole.reordered = check([], [], [event for event in came if event[1] % 100 != LATER]).reordered
    wrong = [f"{len(events)} {what}: {events[:3]}" for what, events in judged(whole) if events]
    wrong += books_add_up(found)
    if not STOPS:
        wrong += [] if set(notes_of(folder / "redriven")) == {1} else ["what was redriven did not come"]
        wrong += torn(set(came))
    wrong += [f"pass: {each}" for each in repeats(passed, unsaved=True)] + [f"log: {each}" for each in repeats(delivered, unsaved=False)]
    return [*wrong, *charges(passed, delivered, steps)]


def unfinished(found: HubStatistics) -> Iterator[str]:
    for name, s in found.subscribers.items():
        if s.dead or s.dropped or s.handled != s.accepted:
            yield f"{name} has not handled everything: {s}"


def repeats(rows: list[list[int]], *, unsaved: bool) -> Iterator[str]:
    """Name events that ran again though they had neither failed nor been running (``unsaved``: nor left what was not committed).

    Of one process's events those that run again in another are its last one, or a tail of them.
    """
    runs: dict[int, list[Event]] = collections.defaultdict(list)
    for publisher, number, _, pid in rows:
        if not special(number):
            runs[pid].append((publisher, number))
    pids = list(runs)
    for place, pid in enumerate(pids):
        later = {event for after in pids[place + 1 :] for event in runs[after]}
        again = [event in later for event in runs[pid]]
        if again != sorted(again) or (not unsaved and sum(again) > 1):
            yield f"process {pid} had run {[event for event in runs[pid] if event in later][:3]} and more"
        if len(set(runs[pid])) != len(runs[pid]):
            yield f"process {pid} ran an event twice"


def torn(came: set[Event]) -> Iterator[str]:
    """Name transactions of which only a part came."""
    for (publisher, turn), found in collections.Counter((publisher, number // BATCH) for publisher, number in came).items():
        if turn % 5 == TOGETHER and found != BATCH:
            yield f"{found} events of a transaction came: {publisher, turn}"


def notes_of(path: Path) -> list[int]:
    return [number for (number,) in notes(path)]


def special(number: int) -> bool:
    return number == CRASHES or number % 100 in (RETRIED, LATER)


def charges(passed: list[list[int]], delivered: list[list[int]], steps: Sequence[str]) -> Iterator[str]:
    """Name events with more attempts than deaths while they ran."""
    deaths = sum(not step.startswith(("router.", "supervisor.")) for step in steps)
    for what, rows in (("pass", passed), ("log", delivered)):
        for publisher, number, attempt, _ in rows:
            if attempt > 1 + deaths + (special(number) and what == "pass"):
                yield f"{what}: {publisher, number} is in its attempt {attempt}"


def files_left(folder: Path) -> list[str]:
    """Name payload files that nobody needs any more and that stay."""
    deadline = time.monotonic() + 3
    while (names := os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [f"files left: {names}"] if names else []


# -- who runs it


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    points: str
    reached: bool
    wrong: list[str]
    seconds: float


def run(points: str) -> Outcome:
    """Run the program with some deaths; ``points`` is like ``router.committed:3,worker.read:2`` or ``router.read:3>router.recovered:1``."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="killsteps-") as name:
        folder, mark = Path(name), uuid.uuid4().hex
        (folder / "points").mkdir()
        (folder / "wanted").write_text(points.replace(">", ","))
        over, waiting = threading.Event(), points.split(">")
        lay(folder / "points", waiting.pop(0))
        layer = threading.Thread(target=lay_in_turn, args=(folder / "points", waiting, over))
        layer.start()
        wrong = [*run_alone(folder, mark), *left_behind(mark)]
        over.set()
        layer.join()
        reached = not waiting and not list((folder / "points").iterdir())
        if wrong and (keep := os.environ.get(KEEP)):
            shutil.copytree(folder, Path(keep) / folder.name)
    return Outcome(points, reached, wrong, time.monotonic() - began)


def lay(folder: Path, points: str) -> None:
    for point in points.split(","):
        (folder / point).touch()


def lay_in_turn(folder: Path, waiting: list[str], over: threading.Event) -> None:
    """Want the next deaths as soon as the ones before have happened."""
    while waiting and not over.wait(0.0005):
        if not any(folder.iterdir()):
            lay(folder, waiting.pop(0))


def run_alone(folder: Path, mark: str) -> list[str]:
    """Run the program in an interpreter of its own; return what is wrong."""
    path = os.pathsep.join([str(PACKAGE.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, MARK: mark}
    with open(folder / "told", "w+b") as told:
        command = [sys.executable, __file__, "--program", str(folder)]
        done = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=told, text=True)
        said, _ = done.communicate()
        told.seek(0)
        words = told.read().decode(errors="replace")
    home, *wrong = said.splitlines() or [""]
    if done.returncode and not wrong:
        wrong.append(f"ended with {done.returncode}: {words[-6000:]}")
    if home and Path(home).exists():
        wrong.append(f"left {home}")
    return wrong


def left_behind(mark: str) -> list[str]:
    """Name processes of a run that live on."""
    deadline = time.monotonic() + GONE
    while (left := list(marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [f"left {process}" for process in left]


def marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                yield process


def steps() -> list[str]:
    """List the names of all steps, as the package's sources have them."""
    sources = "".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))
    calls = re.findall(r"failpoints\.(?:hit|between)\((.*)\)", sources)
    return sorted({step for call in calls for step in re.findall(r'"(\w+\.\w+)"', call)})


def run_step(step: str, passes: Sequence[int], times: int) -> list[Outcome]:
    """Let a step kill at one pass after the other, until nobody gets that far."""
    found: list[Outcome] = []
    for number in passes:
        found += [run_and_tell(f"{step}:{number}") for _ in range(times)]
        if not any(outcome.reached for outcome in found[-times:]):
            break
    return found


def drawn(dice: random.Random, count: int) -> Iterator[str]:
    """Draw deaths that fall into one run, side by side or one after the other; those that come early are more likely."""
    names = steps()
    for _ in range(count):
        chosen = dice.sample(names, dice.choice((2, 2, 3)))
        yield dice.choice(",>").join(f"{name}:{int(dice.paretovariate(0.5))}" for name in chosen)


def run_and_tell(points: str) -> Outcome:
    outcome = run(points)
    tell(outcome)
    return outcome


def tell(outcome: Outcome) -> None:
    word = "not reached" if not outcome.reached else "fine"
    print(f"{outcome.points:<36}{outcome.seconds:6.1f} s  {'WRONG' if outcome.wrong else word}", flush=True)
    for each in outcome.wrong:
        print(f"    {each}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", default="", help="only those whose names begin so")
    parser.add_argument("--passes", type=int, default=3, help="how many passes of each step are tried; default: 3")
    parser.add_argument("--stride", type=int, default=1, help="try each so-many-th pass; default: 1")
    parser.add_argument("--times", type=int, default=1, help="how often each is tried; default: 1")
    parser.add_argument("--points", default="", help="instead: these deaths, in one run")
    parser.add_argument("--pairs", type=int, default=0, help="instead: so many runs with two or three deaths drawn at random")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="for --pairs; default: another one each time")
    parser.add_argument("--jobs", type=int, default=2, help="programs that run at a time; default: 2")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        faulthandler.dump_traceback_later(WITHIN, exit=True)
        wrong = run_program(Path(options.program))
        for each in wrong:
            print(each, flush=True)
        return int(bool(wrong))
    passes = range(1, options.passes * options.stride + 1, options.stride)
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.points:
            found = list(pool.map(run_and_tell, [options.points] * options.times))
        elif options.pairs:
            print("seed", options.seed, flush=True)
            found = list(pool.map(run_and_tell, drawn(random.Random(options.seed), options.pairs)))
        else:
            chosen = [step for step in steps() if step.startswith(options.steps)]
            found = [outcome for each in pool.map(lambda step: run_step(step, passes, options.times), chosen) for outcome in each]
    print(f"{len(found)} runs, {sum(o.reached for o in found)} with all their deaths, {sum(bool(o.wrong) for o in found)} wrong")
    return int(any(outcome.wrong for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
