"""Events that start later, and events that are too late to start."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, InvalidOption
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_a_delayed_event_starts_at_its_time(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda text: note(tmp_path / "log", f"{text} {time.time()}"))
    with hub:
        published = time.time()
        hub.publish("k", "later", delay=0.3)
        hub.publish("k", "now")
    started = {text: float(at) - published for text, at in (line.split() for line in lines(tmp_path / "log"))}
    assert set(started) == {"later", "now"}, "leaving the block waited for it"
    assert started["later"] >= 0.3


def test_a_handler_can_publish_for_later(engine: str, tmp_path: Path) -> None:
    def handle(n: int) -> None:
        note(tmp_path / "log", f"{n}")
        if n < 3:
            mphub.publish("k", n + 1, delay=0.05)

    hub = EventHub(engine=engine)
    hub.subscribe("k", handle)
    with hub:
        hub.publish("k", 0)
    assert lines(tmp_path / "log") == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("option", "value"), [("delay", -1), ("delay", "1"), ("delay", float("nan")), ("expires", 0), ("expires", -1), ("expires", "1")]
)
def test_times_are_numbers_of_seconds(engine: str, option: str, value: object) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", len)
    with hub, pytest.raises(InvalidOption, match=option):
        hub.publish("k", "a", **{option: value})  # type: ignore[arg-type]


def test_an_event_must_not_expire_before_its_delay_ends(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", len)
    with hub, pytest.raises(InvalidOption, match="expires"):
        hub.publish("k", "a", delay=2, expires=1)
