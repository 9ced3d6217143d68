"""``rate``: how many events may start in a period; more wait, or are dropped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mphub import Dropped, EventHub, Rate
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_what_exceeds_a_rate_waits(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: note(tmp_path / "log", f"{n} {time.time()}"), rate=Rate(4, per=0.3))
    with hub:
        hub.publish_batch("k", range(12))
        assert hub.drain(30).subscribers[sub.name].handled == 12
    starts = [line.split() for line in lines(tmp_path / "log")]
    assert [int(n) for n, _ in starts] == list(range(12)), "in their order"
    at = [float(when) for _, when in starts]
    assert at[8] - at[0] > 0.5, "two whole periods lie between"


def test_what_exceeds_a_rate_is_dropped_and_counted_if_wanted(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: n, rate=Rate(3, per=60, excess="drop"))
    with hub:
        assert [hub.request("k", n).result(10) for n in range(3)] == [0, 1, 2]
        with pytest.raises(Dropped, match="rate"):
            hub.request("k", 3).result(10)
        hub.publish_batch("k", range(5))
        statistics = hub.drain(10).subscribers[sub.name]
    assert (statistics.accepted, statistics.handled, dict(statistics.dropped)) == (9, 3, {"rate": 6})
