"""``Inbox(overflow="latest")``: of each key only the newest event waits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import mphub
from mphub import Dropped, EventHub, Inbox, RetryLater
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)
LATEST = Inbox(overflow="latest")


def keyed(log: Path, n: int) -> None:
    note(log, f"{mphub.current_event().key} {n}")


def test_only_the_newest_event_of_each_key_waits(engine: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k.*", lambda n: keyed(log, n), inbox=LATEST)
    with hub:
        sub.pause()
        for n in range(10):
            hub.publish(f"k.{n % 2}", n)
        hub.flush()
        hub.publish_batch("k.2", range(5))
        hub.flush()
        sub.resume()
        found = hub.drain(10).subscribers[sub.name]
        assert (found.accepted, found.handled, dict(found.dropped)) == (15, 3, {"overflow": 12})
        hub.publish("k.0", 10)
    assert lines(log) == ["k.0 8", "k.1 9", "k.2 4", "k.0 10"]


def test_a_slow_handler_gets_what_is_new_when_it_is_free(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, n)
        if n == 0:
            assert eventually((tmp_path / "go").exists, 20)

    hub = EventHub()
    sub = hub.subscribe("k", handle, inbox=LATEST)
    with hub:
        hub.publish("k", 0)
        assert eventually(lambda: lines(log) == ["0"], 20)
        late = sub.request(1)
        hub.publish_batch("k", range(2, 1000))
        hub.flush()
        with pytest.raises(Dropped, match="overflow"):
            late.result(10)
        (tmp_path / "go").touch()
        hub.drain(10)
    assert lines(log) == ["0", "999"]


def test_more_keys_than_the_router_has_in_memory_and_its_death() -> None:
    hub = EventHub()
    sub = hub.subscribe("k.*", lambda _: None, inbox=LATEST)
    with hub:
        sub.pause()
        for n in range(12_000):
            hub.publish(f"k.{n}", n)
        for n in range(11_000, 12_000):
            hub.publish(f"k.{n}", n)
        hub.flush()
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        for n in range(10_500, 12_000):
            hub.publish(f"k.{n}", n)
        hub.flush()
        assert sub.statistics().waiting == 12_000
        sub.resume()
        found = hub.drain(30).subscribers[sub.name]
    assert (found.accepted, found.handled, dict(found.dropped)) == (14_500, 12_000, {"overflow": 2_500})


def test_beyond_its_size_the_oldest_keys_go(engine: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k.*", lambda n: keyed(log, n), inbox=Inbox(maxsize=3, overflow="latest"))
    with hub:
        sub.pause()
        for n in range(6):
            hub.publish(f"k.{n}", n)
        hub.flush()
        sub.resume()
        assert hub.drain(10).subscribers[sub.name].dropped == {"overflow": 3}
    assert lines(log) == ["k.3 3", "k.4 4", "k.5 5"]


@pytest.mark.parametrize("engine", ["thread", "process"])
def test_a_retry_that_a_newer_event_has_overtaken_is_dropped(engine: str, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, n)
        if n == 0:
            raise RetryLater(0.3)

    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", handle, inbox=LATEST)
    with hub:
        hub.publish("k", 0)
        assert eventually(lambda: sub.statistics().failed == 1, 20)
        hub.publish("k", 1)
        found = hub.drain(10).subscribers[sub.name]
    assert lines(log) == ["0", "1"]
    assert (found.accepted, found.handled, found.dropped) == (2, 1, {"overflow": 1})


def test_keys_of_which_nothing_waits_are_forgotten() -> None:
    hub = EventHub(engine="inline")
    sub = hub.subscribe("k.*", lambda _: None, inbox=LATEST)
    with hub:
        for n in range(10_100):
            hub.publish(f"k.{n}", n)
        assert sub.statistics().handled == 10_100
