"""Subscriptions that change while they run: paused, scaled, with other keys."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Inbox, InvalidOption
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_what_a_paused_process_held_and_had_not_started_waits(tmp_path: Path) -> None:
    def handle(n: int) -> None:
        note(tmp_path / "log", str(n))
        if n == 500:
            while not (tmp_path / "go").exists():
                time.sleep(0.01)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        hub.publish_batch("k", range(5000))
        assert eventually(lambda: "500" in lines(tmp_path / "log"))
        sub.pause()
        (tmp_path / "go").touch()
        assert eventually(lambda: sub.statistics().running == 0)
        assert lines(tmp_path / "log") == [str(n) for n in range(501)]
        sub.resume()
        hub.drain(30)
    assert lines(tmp_path / "log") == [str(n) for n in range(5000)]


def test_a_paused_subscriber_holds_no_publisher() -> None:
    hub = EventHub(check=False)
    sub = hub.subscribe("k", len, inbox=Inbox(maxsize=10))
    with hub:
        sub.pause()
        hub.publish_batch("k", ["a"] * 100)
        hub.flush()
        assert eventually(lambda: sub.statistics().dead > 0)
        sub.resume()
        hub.drain()
        statistics = sub.statistics()
    assert statistics.handled + statistics.dead == 100


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["subscriber", "router", "supervisor"])
def test_it_stays_paused_whoever_dies(victim: str, tmp_path: Path) -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)))
    with hub:
        sub.pause()
        pids = hub.statistics().pids
        before = sub.statistics().pids[0]
        os.kill(pids.get(victim, before), signal.SIGKILL)
        hub.publish("k", 1)
        hub.flush()
        if victim != "router":
            assert eventually(lambda: (now := sub.statistics().pids) and now[0] != before, 10)
        time.sleep(0.3)
        assert (sub.state, lines(tmp_path / "log")) == ("PAUSED", [])
        sub.resume()
        hub.drain(20)
    assert lines(tmp_path / "log") == ["1"]


def test_scaled_up_more_work_side_by_side(tmp_path: Path) -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda _: mphub.current_event().replica)
    with hub:
        sub.scale(3)
        assert eventually(lambda: len(set(sub.statistics().pids)) == 3)
        sub.wait_ready(10)
        assert eventually(lambda: set(hub.map("k", range(300))) == {0, 1, 2})


def test_scaled_down_and_up_nothing_is_lost_and_what_runs_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, str(n))
        time.sleep(0.002)

    hub = EventHub()
    sub = hub.subscribe("k", handle, replicas=4)
    with hub:
        publisher = threading.Thread(target=hub.publish_batch, args=("k", range(3000)))
        publisher.start()
        for replicas in (2, 6, 1, 3, 1, 5):
            sub.scale(replicas)
            time.sleep(0.1)
        publisher.join()
        statistics = hub.drain(40).subscribers[sub.name]
        assert eventually(lambda: len(set(sub.statistics().pids)) == 5)
    assert Counter(lines(log)) == Counter(str(n) for n in range(3000))
    assert (statistics.handled, statistics.restarts) == (3000, 0)


@pytest.mark.faults
def test_the_number_of_replicas_outlives_the_supervisor() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", len)
    with hub:
        sub.scale(3)
        os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
        assert eventually(lambda: len(sub.statistics().pids) == 3, 10)


def test_scaling_before_the_start_counts_from_the_start() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", len)
    sub.scale(2)
    with hub:
        assert len(sub.statistics().pids) == 2
        with pytest.raises(InvalidOption, match="replicas"):
            sub.scale(0)


def test_a_scaled_subscriber_can_be_unsubscribed_at_once() -> None:
    hub = EventHub()
    with hub:
        sub = hub.subscribe("k", len, replicas=3)
        sub.scale(1)
        sub.scale(4)
        sub.unsubscribe()
        folder = Path(hub._address.folder)
        assert list((folder / "boards").iterdir()) == []


@pytest.mark.faults
def test_other_keys_outlive_router_and_supervisor() -> None:
    hub = EventHub()
    sub = hub.subscribe("a", len)
    with hub:
        sub.set_keys("b")
        for victim in ("router", "supervisor"):
            os.kill(hub.statistics().pids[victim], signal.SIGKILL)
            assert hub.request("b", "abc").result(10) == 3
