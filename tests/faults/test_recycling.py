"""Whoever dies while one process replaces another: nothing is lost, the order stays, nobody is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Recycle, Restart, Retry, Snapshot, Subscriber
from tests.helpers import eventually
from tests.procs.test_hub import lines, note
from tests.procs.test_recycling import is_asked_to_stop

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]
PATIENT, AT_ONCE = Retry(max_attempts=1000), Restart(max_restarts=1000, delay=0)
OFTEN = Recycle(max_events=40)


class Sum(Subscriber[int, int]):
    """Keeps its sum by snapshots."""

    def setup(self) -> None:
        self.total = 0

    def handle(self, payload: int) -> int:
        self.total += payload
        return self.total

    def snapshot(self) -> int:
        return self.total

    def restore(self, state: object) -> None:
        assert isinstance(state, int)
        self.total = state


@contextmanager
def flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *steps: str) -> Iterator[EventHub]:
    """Publish to two subscribers that are recycled, one of them with snapshots, until each step has been somebody's last; then judge."""
    points, log = tmp_path / "points", tmp_path / "log"
    points.mkdir()
    monkeypatch.setenv("MPHUB_FAILPOINTS", str(points))
    hub = EventHub(check=False)
    sub = hub.subscribe("k", lambda n: note(log, n), name="log", recycle=OFTEN, retry=PATIENT, restart=AT_ONCE)
    total = hub.subscribe("k", Sum, name="sum", recycle=OFTEN, snapshot=Snapshot(every=10), retry=PATIENT, restart=AT_ONCE)
    count = 0
    with hub:
        yield hub
        for step in steps:  # in one process they come in this order: each has passed none of them when its time comes
            (points / f"{step}:1").touch()
        while list(points.iterdir()):
            hub.publish_batch("k", range(count, count + 20))
            hub.flush(30)
            count += 20
        hub.drain(30)
        assert total.request(0).result(20) == sum(range(count))
        assert hub.drain(30).subscribers[sub.name].handled == count
        assert eventually(lambda: (sub.state, total.state) == ("RUNNING", "RUNNING"))
        assert eventually(lambda: len(list((Path(hub._address.folder) / "boards").iterdir())) <= 4)
    rows = [int(line) for line in lines(log)]
    assert rows == sorted(rows), "in order, and an event that runs again does so at once"
    assert set(rows) == set(range(count))
    assert len(rows) - count <= len(steps)


STEPS = {
    "the old one": ["worker.stopping", "worker.running"],
    "the heir": ["worker.set_up", "worker.welcome", "worker.begun"],
    "the router": ["router.heir_waits", "router.settling"],
    "the supervisor": ["supervisor.heir_waits", "supervisor.taken_over"],
}


@pytest.mark.parametrize("victim", STEPS)
def test_a_death_on_the_way_loses_and_reorders_nothing(victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flow(tmp_path, monkeypatch, *STEPS[victim]):
        pass


def test_an_old_one_that_dies_leaves_its_place_at_once(tmp_path: Path) -> None:
    """Be it to one that is being set up, or to one that waits until it has finished what it runs."""
    gate = tmp_path / "gate"

    class Slow(Subscriber[int, tuple[int, int]]):
        def setup(self) -> None:
            note(tmp_path / self.name, os.getpid())
            if self.name == "begins" and len(lines(tmp_path / self.name)) > 1:
                assert eventually(gate.exists, 20)

        def handle(self, payload: int) -> tuple[int, int]:
            attempt = mphub.current_event().attempt
            if payload == 1 and attempt == 1:
                assert not eventually(gate.exists, 20)
            return os.getpid(), attempt

    hub = EventHub()
    begins, waits = (hub.subscribe(name, Slow, name=name, recycle=Recycle(max_events=1)) for name in ("begins", "waits"))
    with hub:
        first = {sub: sub.request(0).result(10)[0] for sub in (begins, waits)}
        replies = {sub: [sub.request(n) for n in (1, 2)] for sub in (begins, waits)}
        assert eventually(lambda: len(lines(tmp_path / "begins")) == 2 and is_asked_to_stop(hub))
        for sub in (begins, waits):
            os.kill(first[sub], signal.SIGKILL)
        assert eventually(lambda: begins.state == "STARTING")
        gate.touch()
        for sub in (begins, waits):
            heir = int(lines(tmp_path / sub.name)[1])
            assert replies[sub][0].result(10) == (heir, 2)
            assert replies[sub][1].result(10)[1] == 1
            assert sub.statistics().restarts == 1
