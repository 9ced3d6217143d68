"""Analyse source files on all cores, each analysis a process of its own, while those processes may be killed at any moment.

One event per file goes to three CPU-heavy subscribers; what they find goes on to a fourth, which keeps the final tables by snapshots. The
tables on stdout are the same, byte for byte, however many processes died on the way; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from analyses import Finding, Skipped, Source, Tally, complexity, compressibility, fingerprints

from mphub import EventHub, HubStatistics, MphubError, Restart, Retry, Subscriber

ANALYSES: dict[str, Callable[[Source], Finding]] = {
    "complexity": complexity,
    "fingerprints": fingerprints,
    "compressibility": compressibility,
}
# A subscriber that is killed every other second is not at fault, nor is the event that it was working on.
RETRY = Retry(max_attempts=1000)
RESTART = Restart(max_restarts=10_000, delay=0.0)
EPILOG = (
    "The standard library is taken with its test folders, without site-packages: some 1,800 files, half a minute of CPU time. "
    "Files that cannot be read, decoded or parsed are counted as skipped. Exit code: 0; 1 if events were left as dead letters."
)


class Options(NamedTuple):
    folder: Path
    kill_every: float
    """Seconds; 0 for never."""


class Report(Subscriber[Finding | None, str | None]):
    """Keeps the tally: committed with the events that it contains, so that each counts once, whenever this process dies."""

    def setup(self) -> None:
        self.tally = Tally()

    def handle(self, payload: Finding | None) -> str | None:
        """Take in a finding; asked with None, answer with the tables."""
        if payload is None:
            return self.tally.tables()
        self.tally.add(payload)
        return None

    def snapshot(self) -> Tally:
        return self.tally

    def restore(self, state: object) -> None:
        assert isinstance(state, Tally)
        self.tally = state


class Killer(threading.Thread):
    """Sends SIGKILL to the process of a random subscriber again and again, until the ``with`` block is left."""

    def __init__(self, hub: EventHub, period: float) -> None:
        super().__init__(name="killer", daemon=True)
        self.hub, self.period, self.kills = hub, period, 0
        self._over = threading.Event()

    def run(self) -> None:
        while self.period and not self._over.wait(self.period):
            pids = [pid for subscriber in self.hub.statistics().subscribers.values() for pid in subscriber.pids]
            if pids:  # else all of them are being restarted
                self.kill(random.choice(pids))

    def kill(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it has ended since
        self.kills += 1

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self.join()


def main() -> int:
    """Print the tables; return the exit code."""
    options = parse_options()
    hub = make_hub()
    began = time.monotonic()
    try:
        with hub, Killer(hub, options.kill_every) as killer:
            for item in scan(options.folder):
                hub.publish("report.skipped" if isinstance(item, Skipped) else "source.python", item)
            hub.drain(progress=True)
            tables = hub.request("report.tables", None).result()
    except MphubError as error:  # among them: DeadLettersLeft
        print(f"no tables: {error}", file=sys.stderr)
        return 1
    print(tables, end="")
    print(f"{time.monotonic() - began:.1f} s; {outcome(killer.kills, hub.statistics())}", file=sys.stderr)
    return 0


def parse_options() -> Options:
    """Read the command line, whose defaults come from the environment; exits with 2 on nonsense."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "--folder",
        type=Path,
        default=os.environ.get("FOLDER") or sysconfig.get_path("stdlib"),
        help="where to look for *.py files, folders named site-packages left out; the standard library by default [env: FOLDER]",
    )
    parser.add_argument(
        "--kill-every",
        type=float,
        default=os.environ.get("KILL_EVERY") or 0.0,
        metavar="SECONDS",
        help="how often to kill the process of a random subscriber; 0, the default, for never [env: KILL_EVERY]",
    )
    found = parser.parse_args()
    if not found.folder.is_dir():
        parser.error(f"--folder: got {found.folder}; expected an existing folder with *.py files")
    if not 0 <= found.kill_every < threading.TIMEOUT_MAX:
        parser.error(f"--kill-every: got {found.kill_every}; expected seconds, or 0 for never")
    return Options(found.folder, found.kill_every)


def make_hub() -> EventHub:
    """Wire the stages: files to the analyses, their findings to the report."""
    hub = EventHub()
    for name, analysis in ANALYSES.items():
        hub.subscribe("source.python", analysis, name=name, to=f"report.{name}", retry=RETRY, restart=RESTART)
    hub.subscribe("report.>", Report, name="report", retry=RETRY, restart=RESTART)
    return hub


def scan(folder: Path) -> Iterator[Source | Skipped]:
    """Yield the Python files of a folder, sorted."""
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.relative_to(folder).parts or not path.is_file():
            continue
        name = path.relative_to(folder).as_posix().encode("utf-8", "backslashreplace").decode()  # any bytes can be a file's name
        try:
            yield Source(name, path.read_bytes())
        except OSError:  # not ours to read
            yield Skipped(name)


def outcome(kills: int, statistics: HubStatistics) -> str:
    """Say what the hub went through."""
    subscribers = statistics.subscribers.values()
    restarts, redeliveries = sum(one.restarts for one in subscribers), sum(one.retried for one in subscribers)
    return f"{kills} kills, {restarts} restarts, {redeliveries} redeliveries"


if __name__ == "__main__":
    sys.exit(main())
