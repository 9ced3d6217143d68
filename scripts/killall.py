"""Kill -9 every process of a durable hub at a random moment, again and again, and check that the next run goes on where it stopped.

    python scripts/killall.py                                     a hundred rounds
    python scripts/killall.py --rounds 20 --seed 7 --durability power

Each round is the program of ``soak.py`` on one and the same folder, with a publisher in its own process and one that is forked from it. At
some moment after its first accepted events, or in one round of four while it is still starting, all its processes are killed in a random
order: hub, publisher, supervisor, router, subscribers. Then every row of the journal is read. The last round publishes nothing and is
drained; then the notes of all rounds must agree, and so must the hub's books.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
from soak import (
    FORK,
    MOST_REPLICAS,
    Findings,
    books_add_up,
    check,
    events_in,
    judged,
    make_hub,
    notes,
    number,
    publish_numbers,
    ranges,
    send,
)

from mphub import JournalError, Retention
from mphub.procs.boot import recorded
from mphub.store.verify import verify

STARTING = 0.25
"""Share of rounds that are killed within a second of their start, most of them before anything is accepted."""
SPAN = 0.6
"""Seconds from the first accepted events within which the others are killed."""
PAUSE = 0.003
"""Seconds between two kills of a round, at most."""
RATE = 20_000.0
"""Events a second of each publisher, at most."""
KEPT = Retention(max_bytes="20MB")
"""History, of which there is more than that after some rounds: it grows and goes beside all else."""
STARTS_WITHIN = 30.0
ENDS_WITHIN = 300.0


# -- the program


def run(folder: Path, durability: str, round_: int) -> None:
    """Be the program of a round: publish until killed."""
    hub = make_hub(folder, path=folder / "hub", durability=durability, retention=KEPT)
    hub.start()
    FORK.Process(target=publish_numbers, args=(hub, folder, 2 * round_ + 1, RATE, threading.Event()), daemon=True).start()
    publish_numbers(hub, folder, 2 * round_, RATE, threading.Event())


def finish(folder: Path, durability: str) -> None:
    """Be the program of the last round: handle what is left, and print (what is wrong with the books, what was counted)."""
    hub = make_hub(folder, path=folder / "hub", durability=durability, retention=KEPT)
    with hub:
        hub.drain(ENDS_WITHIN)
        counted = hub.request("out", None, to="count").result(30)
        found = hub.statistics()
    wrong, entered = books_add_up(found), found.subscribers["count"].accepted - 1  # less the question
    if not counted == entered == found.subscribers["log"].accepted == 2 * found.subscribers["pass"].handled:
        wrong.append(f"counted {counted}, accepted {entered}, made {2 * found.subscribers['pass'].handled}")
    sys.stdout.buffer.write(msgspec.json.encode((wrong, counted, found.subscribers["share"].handled)))


def start(folder: Path, call: str) -> subprocess.Popen[bytes]:
    """Start a program in an interpreter and a session of its own."""
    here = Path(__file__).resolve().parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; import killall; from pathlib import Path; killall.{call}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=open(folder / "stderr", "ab"), start_new_session=True
    )


# -- the kills


def has_accepted(folder: Path, round_: int) -> bool:
    """Say whether something that a round's program has published is accepted."""
    return any(publisher // 2 == round_ for publisher, _, _ in notes(folder / "accepted"))


def wait_for_first(folder: Path, round_: int, program: subprocess.Popen[bytes]) -> None:
    """Wait until it has published; not for one that ends by itself."""
    until = time.monotonic() + STARTS_WITHIN
    while not has_accepted(folder, round_) and program.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def kill_all(program: subprocess.Popen[bytes], folder: Path, dice: random.Random) -> None:
    """Kill a program, what it has forked, and the hub's processes, in a random order."""
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(program.pid)
        victims = {own.pid, *(child.pid for child in own.children(recursive=True)), *(pid for pid, _ in recorded(folder / "hub"))}
        for pid in dice.sample(sorted(victims), len(victims)):
            send(pid, signal.SIGKILL)
            time.sleep(dice.uniform(0, PAUSE))
    program.kill()
    program.communicate()


@dataclass
class Rounds:
    """What was done."""

    cut_starts: int = 0
    """Killed before anything was accepted."""
    damaged: int = 0
    refused: int = 0
    """Programs that ended by themselves."""


def kill_rounds(folder: Path, durability: str, count: int, dice: random.Random) -> Rounds:
    """Run and kill."""
    done = Rounds()
    for round_ in range(count):
        program = start(folder, f"run(Path({str(folder)!r}), {durability!r}, {round_})")
        if dice.random() < STARTING:
            time.sleep(dice.uniform(0, 1))
        else:
            wait_for_first(folder, round_, program)
            time.sleep(dice.uniform(0, SPAN))
        done.refused += program.poll() is not None
        kill_all(program, folder, dice)
        with contextlib.suppress(JournalError):  # killed before there was one
            done.damaged += bool(verify(folder / "hub").problems)
        done.cut_starts += not has_accepted(folder, round_)
    return done


def kill_and_check(folder: Path, durability: str, count: int, seed: int) -> tuple[str, list[str]]:
    """Run, kill and compare; return the summary and what is wrong."""
    began = time.monotonic()
    done = kill_rounds(folder, durability, count, random.Random(seed))
    out, _ = start(folder, f"finish(Path({str(folder)!r}), {durability!r})").communicate(timeout=ENDS_WITHIN + 60)
    try:
        wrong, counted, shared_handled = msgspec.json.decode(out, type=tuple[list[str], int, int])
    except msgspec.MsgspecError:
        return "the last round failed", [(folder / "stderr").read_text(errors="replace")[-3000:]]
    found = check(ranges(folder / "attempted", 2), ranges(folder / "accepted", 2), events_in(folder / "delivered"))
    shared = check(ranges(folder / "attempted"), ranges(folder / "accepted"), events_in(folder / "shared"))
    wrong += [f"{len(events)} events {what}: {events[:3]}" for what, events in judged(found) if events]
    wrong += [f"{len(events)} events {what} by replicas: {events[:3]}" for what, events in judged(shared)[:2] if events]
    if counted != found.delivered or shared_handled != shared.delivered:
        wrong.append(f"counted {counted}, noted {found.delivered}; replicas handled {shared_handled}, noted {shared.delivered}")
    if found.doubled > count or shared.doubled > count * MOST_REPLICAS:
        wrong.append(f"run again: {found.doubled}, by replicas {shared.doubled}; only what was running may be")
    wrong += [f"{done.damaged} journals damaged"] * bool(done.damaged) + [f"{done.refused} programs ended by themselves"] * bool(
        done.refused
    )
    return summary(count, done, found, shared, time.monotonic() - began), wrong


def summary(count: int, done: Rounds, found: Findings, shared: Findings, seconds: float) -> str:
    lost, unexpected = len(found.lost) + len(shared.lost), len(found.unexpected) + len(shared.unexpected)
    return (
        f"rounds {count} ({done.cut_starts} killed before anything was accepted), accepted {found.accepted:,}, "
        f"delivered {found.delivered:,}, lost {lost}, unexpected {unexpected}, out of order {len(found.reordered)}, "
        f"run again {found.doubled} and {shared.doubled} by replicas, damaged {done.damaged}; {seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=number(1, int), default=100, help="how many; default: 100")
    parser.add_argument("--durability", choices=("process", "power"), default="process", help="default: process")
    parser.add_argument("--seed", type=number(0, int), default=random.randrange(1 << 32), help="default: another one each time")
    parser.add_argument("--folder", type=Path, default=None, help="where the hub's folder is made; default: the folder for temporary files")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.rounds} rounds, durability {options.durability}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="killall-", dir=options.folder))
    told, wrong = kill_and_check(folder, options.durability, options.rounds, options.seed)
    print(told)
    for each in wrong:
        print(f"wrong: {each} (see {folder})", file=sys.stderr)
    if not wrong:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
