"""Events that start later, and events that are too late to start."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import mphub
from mphub import Dropped, EventHub
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_a_delayed_event_holds_up_nobody(tmp_path: Path) -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)))
    with hub:
        hub.publish("k", "later", delay=0.5)
        hub.publish_batch("k", range(100))
        assert eventually(lambda: len(lines(tmp_path / "log")) == 100, 0.4) or lines(tmp_path / "log")[-1] == "later"
        assert (sub.statistics().waiting, sub.statistics().accepted) in ((1, 101), (0, 101))
    assert lines(tmp_path / "log") == [*map(str, range(100)), "later"]


def test_delays_of_one_publisher_sort_by_their_time(tmp_path: Path) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)))
    with hub:
        for n in (3, 1, 2):
            hub.publish("k", n, delay=n / 10)
    assert lines(tmp_path / "log") == ["1", "2", "3"]


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["router", "supervisor"])
def test_a_delayed_event_outlives_router_and_supervisor(victim: str, tmp_path: Path) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)))
    with hub:
        hub.publish("k", 1, delay=1.0)
        hub.flush()
        os.kill(hub.statistics().pids[victim], signal.SIGKILL)
        assert eventually(lambda: lines(tmp_path / "log") == ["1"], 10)
        hub.drain(10)
    assert lines(tmp_path / "log") == ["1"]


def test_what_is_delayed_is_given_up_by_a_stop_without_drain() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", len)
    hub.start()
    hub.publish("k", "a", delay=1000)
    hub.flush()
    hub.stop(drain=False)
    assert dict(sub.statistics().dropped) == {"stopped": 1}


def test_a_large_payload_can_be_delayed(tmp_path: Path) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda data: note(tmp_path / "log", str(len(data))))
    with hub:
        hub.publish("k", bytes(300_000), delay=0.1)
    assert lines(tmp_path / "log") == ["300000"]


def test_what_is_too_late_to_start_is_dropped_and_counted(tmp_path: Path) -> None:
    def handle(n: int) -> None:
        note(tmp_path / "log", str(n))
        if n == 0:
            time.sleep(0.4)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        hub.publish("k", 0)
        hub.publish("k", 1, expires=0.1)
        hub.publish("k", 2, expires=30)
        hub.publish("k", 3)
    assert lines(tmp_path / "log") == ["0", "2", "3"]
    statistics = sub.statistics()
    assert (statistics.accepted, statistics.handled, dict(statistics.dropped)) == (4, 3, {"expired": 1})


def test_a_request_that_is_too_late_ends_with_dropped() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", time.sleep)
    with hub:
        busy = sub.request(0.5)
        late = sub.request(0, expires=0.1)
        with pytest.raises(Dropped, match="expired"):
            late.result(10)
        assert not busy.done(), "it is told at its time, not when its turn comes"
        busy.result(10)


def test_what_becomes_too_late_in_the_journal_is_dropped_too() -> None:
    """More waits than the window in memory holds."""
    hub = EventHub()
    sub = hub.subscribe("k", time.sleep)
    with hub:
        hub.publish("k", 1.0)
        for _ in range(25_000):
            hub.publish("k", 0, expires=0.3)
        hub.publish("k", 0)
        statistics = hub.drain(30).subscribers[sub.name]
    assert statistics.handled + statistics.dropped["expired"] == 25_002
    assert statistics.dropped["expired"] > 10_000


def test_an_event_that_has_started_in_time_is_not_too_late_for_its_retry(tmp_path: Path) -> None:
    def handle(_: int) -> None:
        note(tmp_path / "log", "run")
        if len(lines(tmp_path / "log")) == 1:
            raise mphub.RetryLater(0.3)

    hub = EventHub()
    hub.subscribe("k", handle)
    with hub:
        hub.publish("k", 1, expires=0.2)
    assert lines(tmp_path / "log") == ["run", "run"]
