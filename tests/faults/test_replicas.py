"""Replicas die, freeze and lose their router: nothing is lost, only what ran is repeated, and the others go on."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Restart, Retry
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]
PATIENT, AT_ONCE = Retry(max_attempts=1000), Restart(max_restarts=1000, delay=0)


def test_one_dies_and_the_other_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        event = mphub.current_event()
        note(log, f"{n} {event.attempt}")
        if n == 100 and event.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    hub = EventHub()
    pair = hub.subscribe("k", handle, replicas=2)
    with hub:
        hub.publish_batch("k", range(1000))
        hub.drain(30)
        assert pair.statistics().restarts == 1
        assert len(pair.statistics().pids) == 2
    assert Counter(lines(log)) == Counter([*(f"{n} 1" for n in range(1000)), "100 2"])


def test_one_that_keeps_dying_is_given_up_and_the_other_goes_on(tmp_path: Path) -> None:
    class Weak(mphub.Subscriber[int, int]):
        def setup(self) -> None:
            if self.replica == 1 and (tmp_path / "weak").exists():
                os._exit(3)

        def handle(self, payload: int) -> int:
            return os.getpid()

    hub = EventHub(check=False)
    pair = hub.subscribe("k", Weak, replicas=2, restart=Restart(max_restarts=1, delay=0))
    told: list[mphub.Notice] = []
    hub.on_notice(told.append)
    with hub:
        (tmp_path / "weak").touch()
        weak = pair.statistics().pids[1]
        os.kill(weak, signal.SIGKILL)
        assert eventually(lambda: any(notice.kind == "FATAL" for notice in told), 20)
        assert pair.state == "RUNNING"
        assert len(pair.statistics().pids) == 1
        assert len(set(hub.map("k", range(100)))) == 1
        (tmp_path / "weak").unlink()
        pair.restart()
        assert eventually(lambda: len(pair.statistics().pids) == 2, 20)


def test_a_frozen_one_holds_only_what_it_has(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        time.sleep(0.03)
        note(log, str(n))

    hub = EventHub()
    pair = hub.subscribe("k", handle, replicas=2)
    with hub:
        hub.publish_batch("k", range(2))
        hub.drain()
        frozen = pair.statistics().pids[0]
        os.kill(frozen, signal.SIGSTOP)
        try:
            hub.publish_batch("k", range(2, 42))
            assert eventually(lambda: len(lines(log)) == 41, 20), "all but the one that it was given"
        finally:
            os.kill(frozen, signal.SIGCONT)
        hub.drain(20)
    assert Counter(lines(log)) == Counter(str(n) for n in range(42))


@pytest.mark.parametrize("seed", range(2))
def test_random_kills_lose_nothing_and_repeat_only_what_ran(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, str(n))
        if n % 500 == 0:
            time.sleep(0.01)

    hub = EventHub(check=False)
    trio = hub.subscribe("k", handle, replicas=3, retry=PATIENT, restart=AT_ONCE)
    kills = 0
    with hub:
        publisher = threading.Thread(target=hub.publish_batch, args=("k", range(20_000)))
        publisher.start()
        for _ in range(18):
            time.sleep(chance.uniform(0.02, 0.1))
            pids = hub.statistics().pids
            victim = pids["router"] if chance.random() < 0.2 else chance.choice(trio.statistics().pids or (0,))
            if victim:
                os.kill(victim, signal.SIGKILL)
                kills += 1
        publisher.join()
        statistics = hub.drain(60).subscribers[trio.name]
    counted = Counter(int(line) for line in lines(log))
    assert set(counted) == set(range(20_000))
    assert sum(counted.values()) - 20_000 <= kills, "each kill repeats at most what ran in one process"
    assert (statistics.handled, statistics.dead, statistics.waiting + statistics.running) == (20_000, 0, 0)


def test_a_new_router_gives_nobody_what_another_replica_still_has(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, f"{n} {mphub.current_event().attempt}")
        time.sleep(0.2)

    hub = EventHub()
    pair = hub.subscribe("k", handle, replicas=2)
    with hub:
        pids = pair.statistics().pids
        hub.publish_batch("k", range(12))
        assert eventually(lambda: len(lines(log)) >= 2)
        os.kill(pids[0], signal.SIGSTOP)
        try:
            os.kill(hub.statistics().pids["router"], signal.SIGKILL)
            time.sleep(0.7)  # the other one has met the new router and asks for more
        finally:
            os.kill(pids[0], signal.SIGCONT)
        hub.drain(30)
    assert Counter(lines(log)) == Counter(f"{n} 1" for n in range(12))


def test_what_runs_is_not_cancelled_by_a_router_that_does_not_know_it_yet(tmp_path: Path) -> None:
    def handle(_: int) -> None:
        (tmp_path / "runs").touch()
        assert eventually((tmp_path / "go").exists, 20)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        reply = sub.request(1)
        assert eventually((tmp_path / "runs").exists, 20)
        os.kill(sub.statistics().pids[0], signal.SIGSTOP)  # it cannot greet the next router
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        assert not hub.cancel(reply.id)
        os.kill(sub.statistics().pids[0], signal.SIGCONT)
        (tmp_path / "go").touch()
        assert reply.result(20) is None
    assert sub.statistics().handled == 1
