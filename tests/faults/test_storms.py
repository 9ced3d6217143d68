"""Floods, comings and goings, and a whole hub that is put to sleep: nobody else pays, nothing is lost."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from mphub import EventHub, HubStatistics, Limits
from tests.faults.beats import KEY, beating
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.faults
FORK = multiprocessing.get_context("fork")


def flood(hub: EventHub) -> None:
    while True:
        hub.publish("flood", bytes(100))


def pids_of(found: HubStatistics) -> list[int]:
    return [*found.pids.values(), *(pid for subscriber in found.subscribers.values() for pid in subscriber.pids)]


def test_a_publisher_that_floods_leaves_another_calm() -> None:
    hub = EventHub(max_bytes="64MB")
    hub.subscribe(KEY, lambda _: None, name="beats")
    hub.subscribe("flood", lambda data: time.sleep(0.0001), name="slow")
    with hub:
        flooder = FORK.Process(target=flood, args=(hub,))
        flooder.start()
        with beating(hub) as longest:
            time.sleep(3)
            print(f"longest gap {longest():.3f} s")
            assert longest() < 0.9
        largest = max(psutil.Process(pid).memory_info().rss for pid in (*pids_of(hub.statistics()), flooder.pid or 0))
        assert largest < 300 << 20
        flooder.kill()
        flooder.join()
        flooder.close()
        hub.stop(drain=False)


def test_subscriptions_that_come_and_go_cost_nobody_anything(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    over = threading.Event()
    published = itertools.count()

    def publish() -> None:
        while not over.is_set():
            hub.publish("k", next(published))
            time.sleep(0.0002)

    steady = hub.subscribe("k", lambda n: note(log, n), name="steady")
    with hub:
        publisher = threading.Thread(target=publish)
        publisher.start()
        for turn in range(25):
            late = hub.subscribe("k", lambda n: None, name=f"late-{turn}")
            steady.restart()
            late.unsubscribe(drain=turn % 2 == 0)
            if turn == 4:
                before = [psutil.Process(pid).num_fds() for pid in hub.statistics().pids.values()]
        over.set()
        publisher.join()
        hub.drain(20)
        after = [psutil.Process(pid).num_fds() for pid in hub.statistics().pids.values()]
        found = hub.statistics().subscribers
        assert all(n <= was + 1 for n, was in zip(after, before, strict=True)), (before, after)
        assert steady.statistics().dead == 0
    assert lines(log) == [str(n) for n in range(next(published))]
    for s in found.values():
        assert s.accepted == s.handled + s.dead + sum(s.dropped.values()) + s.waiting + s.running


def test_a_hub_that_is_put_to_sleep_as_a_whole_kills_nobody_when_it_wakes() -> None:
    hub = EventHub()
    k = hub.subscribe("k", time.sleep, name="k", limits=Limits(timeout=1.0, start_timeout=1.0))
    with hub:
        hub.publish_batch("k", [0.5] * 4)
        hub.flush()
        pids = pids_of(hub.statistics())
        time.sleep(0.2)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.0)
        for pid in pids:  # the supervisor first: it sees the others as they were
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)
        hub.drain(20)
        found = k.statistics()
        assert (found.handled, found.restarts, found.pids[0]) == (4, 0, pids[-1])


def test_the_thread_that_starts_a_hub_may_end() -> None:
    hub = EventHub()
    k = hub.subscribe("k", lambda n: n, name="k")
    starter = threading.Thread(target=hub.start)
    starter.start()
    starter.join()
    pids = pids_of(hub.statistics())
    time.sleep(0.3)
    assert hub.request("k", 1).result(10) == 1
    assert (pids_of(hub.statistics()), k.statistics().restarts) == (pids, 0)
    stopper = threading.Thread(target=hub.stop)
    stopper.start()
    stopper.join()


def test_memory_that_runs_out_fails_the_event_that_asked_for_it() -> None:
    hub = EventHub(check=False)

    def take(megabytes: int) -> int:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return len(bytearray(megabytes << 20))

    k = hub.subscribe("k", take, name="k")
    with hub:
        with pytest.raises(MemoryError):
            hub.request("k", 4000).result(10)
        assert hub.request("k", 1).result(10) == 1 << 20
        assert (k.statistics().restarts, k.statistics().failed) == (0, 1)
