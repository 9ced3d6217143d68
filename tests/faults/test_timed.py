"""Delayed, expiring and recalled events, and subscribers that change, while processes die: what a review found, and its neighbours."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Inbox, NoSubscriber, Restart, Retry, Snapshot, Subscriber
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]
AGAIN = Retry(5, on=ValueError, delay=0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_what_is_cut_out_of_a_row_has_a_number_of_its_own(tmp_path: Path) -> None:
    """One output waits for its time and is retried at once; the others must not be taken for it by the next router."""

    def stage(_: int) -> None:
        mphub.publish("k", "delayed", delay=0.2)
        for n in range(30):
            mphub.publish("k", n)

    def handle(payload: object) -> None:
        note(tmp_path / "log", str(payload))
        if payload == "delayed" and mphub.current_event().attempt == 1:
            raise ValueError
        time.sleep(0.5 if payload == "delayed" else 0.03)

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, retry=AGAIN)
    hub.subscribe("stage", stage)
    with hub:
        hub.publish("stage", 0, confirm=True)
        assert eventually(lambda: lines(tmp_path / "log").count("delayed") == 2, 20)
        kill(hub.statistics().pids["router"])
        assert hub.drain(30).subscribers[sub.name].handled == 31
    assert set(lines(tmp_path / "log")) == {"delayed", *map(str, range(30))}


def test_the_file_of_a_row_outlives_what_was_cut_out_of_it(tmp_path: Path) -> None:
    def stage(_: int) -> None:
        mphub.publish("k", b"delayed", delay=0.1)
        for n in range(20):
            mphub.publish("k", b"%05d-" % n * 5000)

    def handle(payload: bytes) -> None:
        note(tmp_path / "log", payload[:5].decode())
        time.sleep(0.03)

    hub = EventHub()
    hub.subscribe("k", handle)
    hub.subscribe("stage", stage)
    with hub:
        hub.publish("stage", 0)
    assert len(lines(tmp_path / "log")) == 21


def test_a_give_back_before_the_first_event_of_a_frame_can_be_told_to_the_next_router(tmp_path: Path) -> None:
    def handle(n: int) -> None:
        note(tmp_path / "log", str(n))
        time.sleep(1.0 if n == 100 else 0.0005)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        hub.publish_batch("k", range(100))  # so that its speed is known
        hub.drain()
        for n in range(100, 120):
            hub.publish("k", n, confirm=True)  # a frame each
        sub.pause()
        kill(hub.statistics().pids["router"])
        assert eventually(lambda: sub.statistics().running == 0, 20)
        sub.resume()
        hub.drain(20)
    assert lines(tmp_path / "log") == [str(n) for n in range(120)]


def test_a_failure_does_not_wait_for_a_snapshot() -> None:
    class Fails(Subscriber[int, None]):
        def handle(self, payload: int) -> None:
            raise ValueError(payload)

        def snapshot(self) -> int:
            return 0

    hub = EventHub(check=False)
    hub.subscribe("k", Fails, snapshot=Snapshot(every=1000, period=3600))
    with hub:
        with pytest.raises(ValueError, match="7"):
            hub.request("k", 7).result(10)
        hub.publish("k", 8)
        assert hub.drain(10).subscribers["Fails"].dead == 2


@pytest.mark.parametrize("victim", ["router", "supervisor"])
def test_what_started_in_time_does_not_expire_while_others_die(victim: str, tmp_path: Path) -> None:
    def handle(n: int) -> int:
        note(tmp_path / "log", str(n))
        time.sleep(1.0)
        return n

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        hub.publish("k", 1, expires=0.5)
        assert eventually(lambda: lines(tmp_path / "log"))
        kill(hub.statistics().pids[victim])
        time.sleep(0.5)  # it is too late to start now
        statistics = hub.drain(20).subscribers[sub.name]
    assert (statistics.handled, dict(statistics.dropped)) == (1, {})


@pytest.mark.parametrize("delay", [0.0, 0.1])
@pytest.mark.parametrize(("state", "runs"), [("done", ["1"]), ("running", ["1", "2"])])
def test_a_process_that_died_before_it_met_the_next_router_is_believed(state: str, runs: list[str], delay: float, tmp_path: Path) -> None:
    def handle(_: int) -> None:
        note(tmp_path / "log", str(mphub.current_event().attempt))
        time.sleep(0.5)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        hub.publish("k", 1, delay=delay)
        assert eventually(lambda: lines(tmp_path / "log"))
        router, worker = hub.statistics().pids["router"], sub.statistics().pids[0]
        os.kill(router, signal.SIGSTOP)  # it does not hear of what follows
        time.sleep(0.8 if state == "done" else 0.1)
        kill(worker)
        time.sleep(0.1)
        kill(router)
        hub.drain(20)
    assert lines(tmp_path / "log") == runs


def test_attempts_of_delayed_events_are_counted_over_a_routers_death(tmp_path: Path) -> None:
    def handle(_: int) -> None:
        note(tmp_path / "log", str(mphub.current_event().attempt))
        time.sleep(0.2)
        kill(os.getpid())

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, retry=Retry(max_attempts=3), restart=Restart(max_restarts=100, delay=0))
    with hub:
        hub.publish("k", 1, delay=0.05)
        assert eventually(lambda: lines(tmp_path / "log") == ["1", "2"])
        kill(hub.statistics().pids["router"])
        assert hub.drain(20).subscribers[sub.name].dead == 1
    assert lines(tmp_path / "log") == ["1", "2", "3"]


def test_retried_events_in_rows_of_their_own_leave_nothing(tmp_path: Path) -> None:
    def handle(_: int) -> None:
        if mphub.current_event().attempt == 1:
            raise ValueError

    hub = EventHub()
    sub = hub.subscribe("k", handle, retry=AGAIN)
    with hub:
        for n in range(50):
            hub.publish("k", n, delay=0.05)
        hub.drain(20)
        kill(hub.statistics().pids["router"])  # the next one reads what is there
        hub.publish("k", 1)
        statistics = hub.drain(20).subscribers[sub.name]
    assert (statistics.handled, statistics.failed, statistics.waiting) == (51, 51, 0)


def test_events_that_are_due_together_start_in_the_order_of_their_times(tmp_path: Path) -> None:
    def handle(n: int) -> None:
        time.sleep(0.05)
        note(tmp_path / "log", str(n))

    hub = EventHub()
    hub.subscribe("k", handle)
    with hub:
        hub.publish("k", -1)
        for n in range(20):
            hub.publish("k", n, delay=0.02 + n / 1000)
    assert lines(tmp_path / "log") == [str(n) for n in range(-1, 20)]


def test_delayed_events_have_a_bound_of_their_own() -> None:
    hub = EventHub(check=False)
    sub = hub.subscribe("k", len, inbox=Inbox(maxsize=10, overflow="drop_oldest"))
    with hub:
        for _ in range(100):
            hub.publish("k", "later", delay=1000)
        hub.flush()
        assert sub.statistics().waiting == 10
        hub.publish("k", "now")
        assert eventually(lambda: sub.statistics().handled == 1), "it is not dropped for those that wait for their time"
        hub.stop(drain=False)


def test_a_redriven_letter_is_not_too_late(tmp_path: Path) -> None:
    def handle(_: int) -> None:
        if not (tmp_path / "mended").exists():
            raise ValueError

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle)
    with hub:
        hub.publish("k", 1, expires=0.2)
        assert eventually(lambda: sub.statistics().dead == 1)
        time.sleep(0.3)
        (tmp_path / "mended").touch()
        sub.redrive()
        assert hub.drain(20).subscribers[sub.name].handled == 1


# -- changes of what is about to go


def test_one_that_is_being_unsubscribed_cannot_be_changed() -> None:
    hub = EventHub()
    with hub:
        sub = hub.subscribe("k", time.sleep, replicas=2)
        hub.publish("k", 0.6)
        hub.publish("k", 0.6)
        leaving = threading.Thread(target=sub.unsubscribe)
        leaving.start()
        time.sleep(0.2)
        for change in (lambda: sub.scale(5), sub.restart, sub.pause, lambda: sub.set_keys("other"), sub.unsubscribe):
            with pytest.raises(NoSubscriber, match="being unsubscribed"):
                change()
        leaving.join(20)
        assert hub.subscriptions == {}
        assert list((Path(hub._address.folder) / "boards").iterdir()) == []


def test_one_that_is_being_unsubscribed_gets_nothing_new_from_the_next_router() -> None:
    hub = EventHub(unmatched="ignore")
    with hub:
        sub = hub.subscribe("k", time.sleep)
        hub.publish("k", 1.0)
        leaving = threading.Thread(target=sub.unsubscribe)
        leaving.start()
        time.sleep(0.3)
        kill(hub.statistics().pids["router"])
        hub.publish("k", 0.0)
        hub.flush()
        assert hub.statistics().subscribers[sub.name].accepted == 1
        leaving.join(20)


def test_a_paused_one_can_be_unsubscribed() -> None:
    hub = EventHub()
    with hub:
        sub = hub.subscribe("k", len)
        sub.pause()
        hub.publish_batch("k", ["a"] * 5)
        sub.unsubscribe()
        assert hub.statistics().subscribers[sub.name].dropped == {"unsubscribed": 5}


def test_what_is_paused_starts_nothing_while_the_hub_stops(tmp_path: Path) -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)), replicas=4)
    hub.start()
    sub.pause()
    hub.publish_batch("k", range(100))
    hub.flush()
    hub.stop(drain=False)
    assert lines(tmp_path / "log") == []


# -- replicas


def test_a_replica_in_its_setup_is_not_waited_for_by_the_next_router(tmp_path: Path) -> None:
    class Slow(Subscriber[int, int]):
        def setup(self) -> None:
            while self.replica == 2 and not (tmp_path / "go").exists():
                time.sleep(0.01)

        def handle(self, payload: int) -> int:
            return payload

    hub = EventHub()
    sub = hub.subscribe("k", Slow, replicas=2)
    with hub:
        sub.scale(3)
        assert eventually(lambda: len(sub.statistics().pids) == 3)
        kill(hub.statistics().pids["router"])
        assert list(sub.map(range(50))) == list(range(50))
        (tmp_path / "go").touch()


def test_one_replica_that_cannot_start_does_not_stop_the_others_under_another_supervisor(tmp_path: Path) -> None:
    class Half(Subscriber[int, int]):
        def setup(self) -> None:
            if self.replica == 1:
                os._exit(3)

        def handle(self, payload: int) -> int:
            return payload

    hub = EventHub(check=False)
    with hub:
        sub = hub.subscribe("k", Half, replicas=2, restart=Restart(max_restarts=1, delay=0))
        assert eventually(lambda: sub.state == "FATAL", 20)
        assert sub.request(1).result(10) == 1, "one that runs answers"
        kill(hub.statistics().pids["supervisor"])
        assert sub.request(2).result(20) == 2


def test_a_frozen_replica_that_a_router_waits_for_holds_no_publisher() -> None:
    hub = EventHub(check=False)
    sub = hub.subscribe("k", len, replicas=2, inbox=Inbox(maxsize=20))
    with hub:
        frozen = sub.statistics().pids[0]
        os.kill(frozen, signal.SIGSTOP)
        try:
            kill(hub.statistics().pids["router"])
            publisher = threading.Thread(target=hub.publish_batch, args=("k", ["a"] * 200))
            publisher.start()
            publisher.join(20)
            assert not publisher.is_alive()
        finally:
            os.kill(frozen, signal.SIGCONT)
        hub.drain(20)
        statistics = sub.statistics()
    assert statistics.handled + statistics.dead == 200
    assert Counter(statistics.dropped) == {}
