"""The suite finds what it is for: faults of the kinds that a hub like this could have are put in, and the test for each fails."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers import eventually

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]
MARK = "MPHUB_TEST_PLANT"

BLOCKING_SEND = """
from mphub.wire.stream import Stream

def flush(self):
    self.sock.setblocking(True)
    try:
        self.sock.sendall(self.out)
    except OSError:
        pass
    self.out.clear()
    self.sock.setblocking(False)

Stream.flush = flush
"""
ACK_BEFORE_THE_HANDLER = """
from mphub.procs.one_by_one import OneByOne

handle = OneByOne._handle

def ack_first(self, parcel):
    self.worker.upto = parcel.end
    self.worker.report()
    handle(self, parcel)

OneByOne._handle = ack_first
"""
REDELIVERY_ON_EOF = """
from mphub.procs.exchange import Exchange

Exchange.claim = lambda self, box, incarnation, claims, ranges: None  # what it held when its stream ended has been given back
"""
UNNUMBERED_ACK_FRAMES = """
from mphub.procs.exchange import Exchange

report = Exchange.report

def take_repeats(self, box, incarnation, found, now):
    try:
        return report(self, box, incarnation, found, now)
    finally:
        self.frames[incarnation] = (0, found.upto)

Exchange.report = take_repeats
"""
A_LOCK_SHARED_BY_PUBLISHERS = """
import multiprocessing
from mphub.connection import Connection

lock = multiprocessing.get_context("fork").Lock()
write_file, write = Connection._write_file, Connection._write

def write_file_alone(self, data):
    with lock:
        return write_file(self, data)

def write_alone(self):
    with lock:
        write(self)

Connection._write_file, Connection._write = write_file_alone, write_alone
"""
PLANTS = {
    "blocking send in the router": (BLOCKING_SEND, "test_stuck.py::test_one_that_is_frozen_with_much_to_read_is_not_waited_for"),
    "ack before the handler": (ACK_BEFORE_THE_HANDLER, "test_deaths.py::test_only_the_event_that_was_running_is_delivered_again"),
    "redelivery on EOF": (REDELIVERY_ON_EOF, "test_deaths.py::test_a_stream_that_ends_is_no_death"),
    "unnumbered ack frames": (UNNUMBERED_ACK_FRAMES, "test_failpoints.py::test_reports_that_are_sent_again_to_the_next_router_count_once"),
    "a lock shared by publishers": (
        A_LOCK_SHARED_BY_PUBLISHERS,
        "test_frozen.py::test_a_publisher_frozen_and_killed_in_the_middle_holds_no_other[write_much]",
    ),
}


def run_with(plant: str, test: str, folder: Path) -> tuple[int, str]:
    """Run one test in a Python, and so with all processes of its hubs, that has something planted; return (exit code, output)."""
    (folder / "sitecustomize.py").write_text(plant)
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, MARK: str(folder)}
    command = [sys.executable, "-m", "pytest", "--timeout=8", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
    try:
        found = subprocess.run(
            [*command, f"tests/faults/{test}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return found.returncode, found.stdout
    except subprocess.TimeoutExpired:
        return 1, "1 failed: it has not ended after 60 s"
    finally:
        end_what_is_left(str(folder))


def end_what_is_left(mark: str) -> None:
    """What a planted fault leaves hanging is not the fault of this test; folders go with the next hub."""
    for process in psutil.process_iter():
        if bears(process, mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
    assert eventually(lambda: not any(bears(process, mark) for process in psutil.process_iter()), 5)


def bears(process: psutil.Process, mark: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    return False


@pytest.mark.parametrize("name", PLANTS)
def test_the_suite_finds_what_is_planted(name: str, tmp_path: Path) -> None:
    plant, test = PLANTS[name]
    code, said = run_with(plant, test, tmp_path)
    print(said)
    assert code == 1, "the test ran, and failed"
    assert "1 failed" in said, "for the fault, not at its start"


def test_nothing_planted_nothing_found(tmp_path: Path) -> None:
    code, said = run_with("", PLANTS["ack before the handler"][1], tmp_path)
    assert (code, "1 passed" in said) == (0, True), said
