"""``process=``: subscribers that share a process have everything of their own but that."""

from __future__ import annotations

from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Retry
from tests.helpers import eventually
from tests.notes import lines, note

pytestmark = pytest.mark.timeout(60)


def test_each_has_its_own_keys_and_figures(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)

    async def first(n: int) -> None:
        note(tmp_path / "first", f"{n} {mphub.current_event().key}")

    def second(n: int) -> None:
        note(tmp_path / "second", f"{n} {mphub.current_event().key}")

    hub.subscribe("a", first, process="one")
    hub.subscribe(["a", "b"], second, process="one")
    with hub:
        for n in range(100):
            hub.publish("ab"[n % 2], n)
        statistics = hub.drain(20).subscribers
    assert lines(tmp_path / "first") == [f"{n} a" for n in range(0, 100, 2)]
    assert lines(tmp_path / "second") == [f"{n} {'ab'[n % 2]}" for n in range(100)]
    assert {name: (s.accepted, s.handled) for name, s in statistics.items()} == {"first": (50, 50), "second": (100, 100)}


def test_failures_are_each_ones_own(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine, propagate=False, check=False)

    def fail(n: int) -> None:
        note(tmp_path / "log", f"{n} {mphub.current_event().attempt}")
        raise ValueError(n) if n < 3 else KeyError(n)

    async def succeed(n: int) -> None: ...

    hub.subscribe("k", fail, process="one", retry=Retry(max_attempts=2, on=KeyError, delay=0.01))
    hub.subscribe("k", succeed, process="one")
    with hub:
        hub.publish_batch("k", range(5))
        found = hub.drain(20).subscribers
        assert (found["fail"].dead, found["fail"].failed, found["fail"].retried, found["fail"].handled) == (5, 7, 2, 0)
        assert (found["succeed"].handled, found["succeed"].dead) == (5, 0)
        assert {(letter.subscriber, letter.attempts) for letter in hub.dead_letters()} == {("fail", 1), ("fail", 2)}
        assert hub.subscription("fail").redrive() == 5
        found = hub.drain(20).subscribers
        assert (found["fail"].dead, found["succeed"].handled) == (5, 5)
        assert hub.subscription("fail").purge() == 5
        assert dict(hub.statistics().subscribers["fail"].dropped) == {"purged": 5}


def test_requests_filters_and_outputs_are_each_ones_own(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    doubled = hub.subscribe("n", lambda n: 2 * n, name="doubled", process="one", to="out")
    odd = hub.subscribe("n", lambda n: -n, name="odd", process="one", where=lambda n: n % 2)
    hub.subscribe("out", lambda n: note(tmp_path / "out", n), name="out", process="one")
    with hub:
        assert doubled.request(21).result(5) == 42
        assert list(odd.map(range(1, 9, 2))) == [-1, -3, -5, -7]
        hub.publish_batch("n", range(4))
        found = hub.drain(20).subscribers
    assert sorted(map(int, lines(tmp_path / "out"))) == [0, 2, 4, 6, 42]
    assert (found["odd"].handled, dict(found["odd"].dropped)) == (6, {"filtered": 2})


def test_delayed_and_urgent_events_are_counted_for_each(engine: str) -> None:
    hub = EventHub(engine=engine)
    for name in ("first", "second"):
        hub.subscribe("k", lambda n: None, name=name, process="one")
    with hub:
        hub.publish("k", 1, delay=0.05)
        hub.publish("k", 2, priority=5)
        found = hub.drain(20).subscribers
    assert {(s.accepted, s.handled) for s in found.values()} == {(2, 2)}


def test_they_come_and_go_by_themselves(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda n: note(tmp_path / "stays", n), name="stays", process="one")
    with hub:
        hub.publish("k", 1)
        goes = hub.subscribe("k", lambda n: note(tmp_path / "goes", n), name="goes", process="one")
        hub.publish("k", 2)
        goes.unsubscribe()
        hub.publish("k", 3)
        hub.subscription("stays").set_keys("other")
        hub.publish("k", 4)
        hub.publish("other", 5)
        hub.drain(20)
        hub.subscribe("other", lambda n: note(tmp_path / "stays", -n), name="stays", process="one", replace=True)
        hub.publish("other", 6)
        hub.drain(20)
        hub.subscription("stays").unsubscribe()
        again = hub.subscribe("k", lambda n: note(tmp_path / "again", n), name="again", process="one")
        hub.publish("k", 7)
        found = hub.drain(20).subscribers
        assert again.statistics().handled == 1
    assert [lines(tmp_path / name) for name in ("stays", "goes", "again")] == [["1", "2", "3", "5", "-6"], ["2"], ["7"]]
    assert (found["goes"].accepted, found["goes"].handled, found["goes"].state) == (1, 1, "STOPPED")


def test_one_that_is_paused_does_not_hold_the_others(engine: str) -> None:
    hub = EventHub(engine=engine)
    paused, other = (hub.subscribe("k", lambda n: n, name=name, process="one") for name in ("paused", "other"))
    with hub:
        paused.pause()
        hub.publish_batch("k", range(1000))
        assert eventually(lambda: other.statistics().handled == 1000)
        assert (paused.state, other.state, paused.statistics().waiting) == ("PAUSED", "RUNNING", 1000)
        with pytest.raises(mphub.SubscriberPaused):
            hub.drain(20)
        paused.resume()
        assert hub.drain(20).subscribers["paused"].handled == 1000
        assert paused.state == "RUNNING"
