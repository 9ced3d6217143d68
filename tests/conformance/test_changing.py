"""Subscriptions that change while they run: paused, scaled, with other keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from mphub import EventHub, InvalidKey, SubscriberPaused
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_a_paused_subscriber_starts_nothing(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)))
    other = hub.subscribe("k", len, name="other")
    with hub:
        hub.publish("k", "before")
        hub.drain()
        sub.pause()
        assert sub.state == "PAUSED"
        hub.publish("k", "meanwhile")
        with pytest.raises(SubscriberPaused):
            hub.drain()
        assert lines(tmp_path / "log") == ["before"]
        assert other.statistics().handled == 2
        assert sub.statistics().waiting == 1
        sub.resume()
        hub.drain()
        assert sub.state == "RUNNING"
    assert lines(tmp_path / "log") == ["before", "meanwhile"]


def test_pausing_twice_and_resuming_what_runs_change_nothing(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", len)
    with hub:
        sub.resume()
        sub.pause()
        sub.pause()
        sub.resume()
        assert hub.request("k", "abc").result(10) == 3


def test_other_keys_count_from_then_on(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    sub = hub.subscribe("a", lambda text: note(tmp_path / "log", text))
    with hub:
        hub.publish("a", "1")
        hub.publish("b", "no")
        sub.set_keys(["b", "c.*"])
        hub.publish("a", "no")
        hub.publish("b", "2")
        hub.publish("c.x", "3")
        assert sub.keys == ("b", "c.*")
        assert hub.subscribers("c.y") == [sub.name]
        with pytest.raises(InvalidKey):
            sub.set_keys("c..x")
    assert lines(tmp_path / "log") == ["1", "2", "3"]
    with hub:
        hub.publish("b", "4")
    assert lines(tmp_path / "log")[-1] == "4"
