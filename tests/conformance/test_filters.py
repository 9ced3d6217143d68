"""``where``: what a subscriber does not want is dropped in its process, and counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import mphub
from mphub import Dropped, EventHub
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


@dataclass
class Order:
    country: str
    total: int


def test_a_function_says_what_is_wanted(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)), where=lambda n: n % 3 == 0)
    with hub:
        hub.publish_batch("k", range(30))
        statistics = hub.drain().subscribers[sub.name]
    assert lines(tmp_path / "log") == [str(n) for n in range(0, 30, 3)]
    assert (statistics.accepted, statistics.handled, dict(statistics.dropped)) == (30, 10, {"filtered": 20})


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [
        ({"country": "de", "total": 3}, True),
        ({"country": "fr", "total": 3}, False),
        ({"total": 3}, False),
        (Order("de", 3), True),
        (Order("de", 4), False),
        ("text", False),
    ],
)
def test_a_mapping_compares_items_or_attributes(engine: str, payload: object, wanted: bool) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda _: None, where={"country": "de", "total": 3})
    with hub:
        hub.publish("k", payload)
        assert hub.drain().subscribers[sub.name].handled == wanted


def test_a_filter_can_look_at_the_event(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k.*", lambda _: None, where=lambda _: mphub.current_event().key == "k.yes")
    with hub:
        for key in ("k.yes", "k.no", "k.yes"):
            hub.publish(key, 1)
        assert hub.drain().subscribers[sub.name].handled == 2


def test_a_request_that_is_not_wanted_is_dropped(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda n: n, where=lambda n: n > 1)
    with hub:
        assert hub.request("k", 2).result(10) == 2
        with pytest.raises(Dropped, match="filtered"):
            hub.request("k", 1).result(10)


def test_a_filter_that_raises_is_a_failure_of_the_event(engine: str) -> None:
    hub = EventHub(engine=engine, check=False, propagate=False)
    sub = hub.subscribe("k", lambda n: n, where=lambda n: 1 / n)
    with hub:
        hub.publish("k", 0)
        hub.publish("k", 1)
        hub.drain()
        letter = sub.dead_letters()[0]
    assert isinstance(letter.error, ZeroDivisionError)
    assert sub.statistics().handled == 1


def test_a_filter_publishes_with_what_it_lets_pass_only(engine: str, tmp_path: Path) -> None:
    def wants(n: int) -> bool:
        mphub.publish("out", n)
        return n % 2 == 0

    hub = EventHub(engine=engine)
    hub.subscribe("in", lambda _: None, where=wants, name="in")
    hub.subscribe("out", lambda n: note(tmp_path / "log", str(n)), name="out")
    with hub:
        hub.publish_batch("in", range(4))
    assert lines(tmp_path / "log") == ["0", "2"]
