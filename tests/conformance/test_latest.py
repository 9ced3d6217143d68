"""``Inbox(overflow="latest")``: of each key only the newest event waits."""

from __future__ import annotations

from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Inbox, RetryLater
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
