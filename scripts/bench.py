"""Measure mphub against the queues that people wire by hand, side by side in one run.

    python scripts/bench.py                                             everything, five rounds: some twenty minutes
    python scripts/bench.py --families throughput-1 --check 5           exit code 1 below five times the baseline
    python scripts/bench.py --families throughput-1,roundtrip --peers   other packages too, as far as they are installed
    python scripts/bench.py --families start-8,recovery --rounds 3      figures of one hub
    python scripts/bench.py --json results.json --plots plots           all values, and drawings of them; make bench: docs/plots

Each family has two sides: "baseline", mostly plain multiprocessing queues in two hops, and "mphub". Of "keys", "patterns", "archive-*" and
"stuck-*" the baseline is mphub itself, in the usual case; of "work-*" it is the same work in bare processes, with no queue. "roundtrip"
asks a hub that idles, "roundtrip-hot" one that has just answered. Figures of one hub ("start-8" and those that follow) have a limit instead
of a baseline.

Rates differ from machine to machine and from minute to minute: what counts is the ratio within a round. Each measurement is a process of
its own, and the sides take turns. What they start is started and warm before the clock runs; everything else is measured, until each
subscriber has told how many events it has handled. A miscount is an error, never a figure.

sides.py is what is opened, families.py what is measured on it, figures.py what is measured of one hub (shared.py: of many
subscribers in few processes; past.py: of history), peers.py the other packages, results.py what is told, plots.py what is drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import plots
from families import FAMILIES, PEERS_IN, USUAL, Family
from figures import FIGURES, Curve, Figure
from peers import PEERS
from results import Absolute, Report, Result, form_of
from sides import loops_of_a_millisecond

MEASURED: dict[str, Family | Figure | Curve] = {**FAMILIES, **FIGURES}


def measure(name: str, rounds: int, events: int | None, peers: Sequence[str] = ()) -> Result | Absolute:
    """Let the sides, or the points of a curve, take turns."""
    loops_of_a_millisecond()  # found here, so that both sides do the same work
    what = MEASURED[name]
    events = amount(name, events)
    runs = [*what.runs, *(peer for peer in peers if peer in PEERS_IN.get(name, ()))]
    values: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        for run in runs:
            for part, value in measure_apart(name, run, events).items():
                values.setdefault(part, []).append(value)
        told = (f"{part} {found[-1]:{form_of(found)}}" for part, found in values.items())
        print(f"{name} {number}/{rounds}:", ", ".join(told), file=sys.stderr)
    return what.result(name, events, values)


def amount(name: str, events: int | None) -> int:
    """Return how many events: no more than usual for a figure of one hub, whose limit is for so many."""
    usual = MEASURED[name].events
    return usual if events is None or (name in FIGURES and events > usual) else events


def measure_apart(name: str, run: str, events: int) -> dict[str, float]:
    """Measure in a fresh process, which leaves none behind, whatever happens."""
    events = max(1, int(events * (PEERS[run].share if run in PEERS else 1)))
    command = [sys.executable, __file__, "--one", f"{name}/{run}", "--events", str(events)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            out, err = process.communicate(timeout=60 + events / 500)
        except subprocess.TimeoutExpired as error:
            raise SystemExit(f"bench: {name}/{run} has not ended after {error.timeout:.0f} s: no figure") from None
        finally:
            end(process)
    if process.returncode:
        raise SystemExit(f"bench: {name}/{run} ended with {process.returncode}: no figure\n{err}")
    return dict(json.loads(out))


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


def falls_short(report: Report, least: float) -> bool:
    """Tell whether ``throughput-1`` is below the least ratio, and say so."""
    found = next(one.ratio for one in report.results if one.family == "throughput-1")
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
        if name not in MEASURED:
            raise argparse.ArgumentTypeError(f"got {name!r}; expected some of {','.join(MEASURED)}")
    return text.split(",")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with 2 on nonsense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    usual = [*USUAL, *FIGURES]
    others = ",".join(name for name in MEASURED if name not in usual)
    add = parser.add_argument
    add("--families", type=families, default=usual, metavar="A,B", help=f"default: {','.join(usual)}; there are also {others}")
    add("--rounds", type=whole, default=5, metavar="N", help="measurements of each side; default: 5")
    add("--events", type=whole, metavar="N", help="events a measurement; default, and the most for figures of one hub: what suits it")
    add("--json", metavar="FILE", help="write all values there; - for stdout, instead of the table")
    add("--plots", type=Path, metavar="FOLDER", help="draw there, each figure as PNG and as SVG; needs pip install 'mphub[bench]'")
    add("--check", type=float, metavar="RATIO", help="exit with 1 if throughput-1 is less than so many times the baseline")
    add("--one", choices=[f"{name}/{run}" for name, what in MEASURED.items() for run in (*what.runs, *PEERS)], help=argparse.SUPPRESS)
    add("--peers", action="store_true", help="measure the other packages that are installed too")
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"got {unknown[0]!r}; expected --families, --rounds, --events, --json, --plots, --check or --peers")
    if found.check is not None and "throughput-1" not in found.families:
        parser.error(f"--check: got --families {','.join(found.families)}; expected throughput-1 among them")
    if found.json is not None and not Path(found.json).parent.is_dir():
        parser.error(f"--json: got {found.json!r}; expected a file in an existing folder, or -")
    if found.plots is not None and (reason := plots.why_not(found.plots)):
        parser.error(f"--plots: {reason}")
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
    report = Report.of([measure(name, options.rounds, options.events, peers) for name in options.families])
    print(report.as_json() if options.json == "-" else report.as_table())
    if options.json not in (None, "-"):
        Path(options.json).write_text(report.as_json() + "\n")
    if options.plots:
        plots.draw(report, options.plots)
    return int(options.check is not None and falls_short(report, options.check))


def measure_here(what: str, events: int | None) -> int:
    """Measure in this process, and print the figures as a line of JSON."""
    name, run = what.split("/")
    print(json.dumps(MEASURED[name].run(run, amount(name, events))))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)  # a Queue interrupted in put() may have kept its lock, for which multiprocessing would wait at exit
