"""Replicas: processes that share one subscriber's inbox."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, InvalidOption, Snapshot, StartFailed, Subscriber
from mphub.procs import boot
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_replicas_work_side_by_side(tmp_path: Path) -> None:
    """Each handler ends once both have begun: one process alone would never get there."""

    def meet(n: int) -> int:
        (tmp_path / str(n)).touch()
        assert eventually(lambda: len(list(tmp_path.iterdir())) == 2, 20)
        return mphub.current_event().replica

    hub = EventHub()
    pair = hub.subscribe("k", meet, replicas=2)
    with hub:
        assert len(set(pair.statistics().pids)) == 2
        replies = [hub.request("k", n) for n in range(2)]
        assert {reply.result(30) for reply in replies} == {0, 1}
    assert pair.statistics().handled == 2


def test_a_subscriber_knows_which_replica_it_is(tmp_path: Path) -> None:
    class Who(Subscriber[int, int]):
        def setup(self) -> None:
            note(tmp_path / "log", f"{self.replica}")

        def handle(self, payload: int) -> int:
            return self.replica

    hub = EventHub()
    hub.subscribe("k", Who, replicas=3)
    with hub:
        assert sorted(lines(tmp_path / "log")) == ["0", "1", "2"], "start() returns when all are set up"
        assert hub.request("k", 1).result(10) in (0, 1, 2)


def test_what_waits_is_shared_out_evenly() -> None:
    def work(_: int) -> int:
        time.sleep(0.1)
        return mphub.current_event().replica

    hub = EventHub()
    hub.subscribe("k", work, replicas=4)
    with hub:
        assert Counter(hub.map("k", range(16))) == {0: 4, 1: 4, 2: 4, 3: 4}


def test_fast_events_are_shared_too() -> None:
    """Nobody is given all of what waits because its credit allows it."""

    def work(_: int) -> int:
        time.sleep(0.001)
        return mphub.current_event().replica

    hub = EventHub()
    hub.subscribe("k", work, replicas=2)
    with hub:
        list(hub.map("k", range(500)))  # from here on their speed is known
        shares = Counter(hub.map("k", range(2000)))
    assert min(shares[0], shares[1]) > 600


def test_a_replica_that_cannot_be_set_up_fails_the_start(tmp_path: Path) -> None:
    class Second(Subscriber[int, None]):
        def setup(self) -> None:
            if self.replica == 1:
                raise RuntimeError("no room for two")

        def handle(self, payload: int) -> None:
            pass

    hub = EventHub()
    hub.subscribe("k", Second, replicas=2, restart=mphub.Restart(max_restarts=0))
    with pytest.raises(StartFailed) as caught:
        hub.start()
    assert "no room for two" in str(caught.value.__cause__)


def test_restart_renews_all_of_them() -> None:
    hub = EventHub()
    pair = hub.subscribe("k", len, replicas=2)
    with hub:
        before = set(pair.statistics().pids)
        pair.restart()
        assert eventually(lambda: len(after := set(pair.statistics().pids)) == 2 and not after & before)
        pair.wait_ready(10)
        assert hub.request("k", "abc").result(10) == 3


def test_each_replica_has_a_snapshot_of_its_own() -> None:
    class Count(Subscriber[int, tuple[int, int]]):
        count = 0

        def handle(self, payload: int) -> tuple[int, int]:
            time.sleep(0.03)
            self.count += 1
            return self.replica, self.count

        def snapshot(self) -> int:
            return self.count

        def restore(self, state: object) -> None:
            assert isinstance(state, int)
            self.count = state

    hub = EventHub()
    pair = hub.subscribe("k", Count, replicas=2, snapshot=Snapshot(every=1))
    with hub:
        before = dict(sorted(hub.map("k", range(6))))
        hub.drain()
        pair.restart()
        assert eventually(lambda: pair.statistics().restarts == 2)
        pair.wait_ready(10)
        after = dict(sorted(hub.map("k", range(6))))
    assert sum(before.values()) == 6
    assert sum(after.values()) == 12


def test_the_files_and_processes_of_all_go_with_the_subscriber() -> None:
    hub = EventHub()
    with hub:
        trio = hub.subscribe("k", len, name="trio", replicas=3)
        trio.wait_ready(10)
        folder = Path(hub._address.folder)
        assert len(list((folder / "boards").iterdir())) == 3
        trio.unsubscribe()
        assert list((folder / "boards").iterdir()) == []


@pytest.mark.parametrize("replicas", [0, -1, 1.5, True, "many", None, 100_000])
def test_replicas_are_a_number_or_auto(replicas: object) -> None:
    with pytest.raises(InvalidOption, match=r"replicas: got .*; expected an int from 1 to 1000, or 'auto'"):
        EventHub().subscribe("k", print, replicas=replicas)  # type: ignore[call-overload]


def test_auto_is_as_many_as_there_are_cores() -> None:
    cores = os.sched_getaffinity(0)
    assert boot.cpu_limit() <= len(cores)
    os.sched_setaffinity(0, {min(cores)})
    try:
        hub = EventHub()
        alone = hub.subscribe("k", len, replicas="auto")
        with hub:
            assert len(alone.statistics().pids) == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_what_a_slow_event_keeps_from_starting_goes_to_a_replica_that_is_free(tmp_path: Path) -> None:
    """They looked fast, so that one replica was given several: it gives back what it has not started."""

    def work(seconds: float) -> None:
        time.sleep(seconds)
        if seconds:
            note(tmp_path / "log", mphub.current_event().replica)

    hub = EventHub()
    hub.subscribe("k", work, replicas=2)
    with hub:
        list(hub.map("k", [0.0] * 500))  # from here on they are known to be fast
        with hub.transaction() as together:
            for seconds in [0.15] * 6 + [0.0] * 6:
                together.publish("k", seconds)
        hub.drain(20)
    assert set(lines(tmp_path / "log")) == {"0", "1"}
