"""A process dies at each named step: nothing is lost, nothing comes out of order, nothing runs twice that was not running.

``KILLSTEPS_PASSES=40`` tries that many passes of each step; ``scripts/killsteps.py`` draws two or three deaths at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import killsteps
import pytest

from mphub import failpoints
from mphub.procs.exchange import Exchange
from mphub.store.blobs import Blobs
from mphub.store.journal import Journal
from mphub.wire.frames import Batch, encode

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
PASSES = int(os.environ.get("KILLSTEPS_PASSES", "2"))
PROCESSES = sorted({step.partition(".")[0] for step in killsteps.steps()})


def judge_each(points: list[str]) -> None:
    """Run one program for each; fail with what was wrong."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = {outcome.points: outcome.wrong for outcome in pool.map(killsteps.run, points) if outcome.wrong}
    assert not wrong, "\n".join(f"{points}: {text}" for points, texts in wrong.items() for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES)
def test_a_death_at_any_step_loses_doubles_and_leaves_nothing(process: str) -> None:
    steps = [step for step in killsteps.steps() if step.startswith(f"{process}.")]
    judge_each([f"{step}:{number}" for step in steps for number in range(1, PASSES + 1)])


@pytest.mark.slow
def test_deaths_one_after_the_other_are_survived_too() -> None:
    judge_each(
        [
            "supervisor.started:6>supervisor.settling:1>supervisor.adopting:1",
            "router.half_delivered:150>supervisor.reaped_router:1>router.recovered:1",
            "router.handed_out:100>router.committing:1>router.committed:1>worker.welcome:1",
            "worker.returned:20>router.settling:1>worker.running:5,publisher.sent:9",
        ]
    )


@pytest.mark.slow
def test_reports_that_are_sent_again_to_the_next_router_count_once() -> None:
    judge_each([f"router.committed:{number}" for number in range(30, 90, 5)])


def test_a_stop_beside_publishers_counts_all_that_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILLSTEPS_STOPS", "1")
    judge_each(["none.at_all:1", "none.at_all:2", "supervisor.settled:5", "router.committed:150", "supervisor.closing:1"])


def test_a_file_goes_though_its_router_dies_between_the_commit_and_its_removal(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blobs = Blobs(tmp_path / "blobs", 7)
    name = blobs.write(bytes(100_000))
    first = Exchange(Journal(tmp_path, 64 << 20), blobs, 64 << 20, time.time)
    first.references.sweep = lambda: None  # type: ignore[method-assign]
    with first.turn():
        batch = Batch(7, 1, 1, 1, ["nobody"], [0], 0.0, blob=name, size=100_000)
        first.accept(batch, encode(batch), b"")
    first.journal.close()
    assert blobs.of_writer(7) == [name]
    second = Exchange(Journal(tmp_path, 64 << 20), blobs, 64 << 20, time.time)
    with second.turn():
        second.advance_epoch()
    assert blobs.of_writer(7) == []
    second.journal.close()


def test_a_step_costs_nothing_unless_a_death_is_wanted() -> None:
    assert failpoints.hit is failpoints.pass_by
    assert failpoints.between("a", len, "b") is len


def test_only_the_first_that_gets_there_dies_and_only_once(tmp_path: Path) -> None:
    (tmp_path / "some.step:2").touch()
    code = "from mphub import failpoints\nfor n in range(3): print(n, flush=True); failpoints.hit('some.step')"
    environment = {**os.environ, "MPHUB_FAILPOINTS": str(tmp_path), "PYTHONPATH": os.getcwd()}
    runs = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [(run.returncode, run.stdout.split()) for run in runs] == [(-9, ["0", "1"]), (0, ["0", "1", "2"])]


def test_half_is_written_before_a_death(tmp_path: Path) -> None:
    (tmp_path / "some.step:1").touch()
    code = "import os\nfrom mphub import failpoints\nfailpoints.hit('some.step', lambda data: os.write(1, data), b'12345678')"
    environment = {**os.environ, "MPHUB_FAILPOINTS": str(tmp_path), "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (-9, b"1234")


def test_every_process_has_steps() -> None:
    assert {"publisher", "router", "worker", "supervisor", "blobs"} <= set(PROCESSES)
