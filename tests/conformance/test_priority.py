"""``publish(priority=)``: higher ones start first, equal ones in the order published."""

from __future__ import annotations

from pathlib import Path

import pytest

import mphub
from mphub import EventHub, InvalidOption
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_higher_ones_start_first_and_equal_ones_in_their_order(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: note(tmp_path / "log", n))
    with hub:
        sub.pause()
        for n, priority in enumerate([0, -1, 3, 0, 10, 3, -10, 0, -1]):
            hub.publish("k", n, priority=priority)
        hub.flush()
        sub.resume()
        hub.drain(10)
    assert lines(tmp_path / "log") == [str(n) for n in (4, 2, 5, 0, 3, 7, 1, 8, 6)]


def test_a_handler_sees_the_priority(engine: str) -> None:
    hub = EventHub(engine=engine)
    seen = hub.subscribe("seen", lambda p: p)
    hub.subscribe("k", lambda _: mphub.publish("seen", mphub.current_event().priority, priority=2))
    with hub:
        hub.publish("k", 0, priority=-7)
        hub.drain(10)
    assert seen.statistics().handled == 1


@pytest.mark.parametrize("priority", [11, -11, 1.5, True, "high", float("nan")])
def test_a_typo_is_refused(engine: str, priority: object) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", print)
    with hub, pytest.raises(InvalidOption, match=r"priority: got .*expected an int from -10 to 10"):
        hub.publish("k", 1, priority=priority)  # type: ignore[arg-type]
