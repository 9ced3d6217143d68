"""``Inbox(overflow="latest")``: of each key only the newest event waits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mphub import Dropped, EventHub, Inbox
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


LATEST = Inbox(overflow="latest")


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


def test_keys_of_which_nothing_waits_are_forgotten() -> None:
    hub = EventHub(engine="inline")
    sub = hub.subscribe("k.*", lambda _: None, inbox=LATEST)
    with hub:
        for n in range(10_100):
            hub.publish(f"k.{n}", n)
        assert sub.statistics().handled == 10_100
