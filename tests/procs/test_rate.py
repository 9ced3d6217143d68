"""``rate``: how many events may start in a period; more wait, or are dropped."""

from __future__ import annotations

import time

import pytest

from mphub import EventHub, InvalidOption, Rate

pytestmark = pytest.mark.timeout(60)


def test_replicas_share_one_rate() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda n: n, rate=Rate(5, per=60), replicas=2)
    with hub:
        hub.publish_batch("k", range(20))
        hub.flush()
        time.sleep(0.3)
        statistics = sub.statistics()
        assert (statistics.handled, statistics.waiting) == (5, 15)
        sub.unsubscribe(drain=False)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Rate(0, 1), "count"),
        (lambda: Rate(1.5, 1), "count"),  # type: ignore[arg-type]
        (lambda: Rate(1, 0), "per"),
        (lambda: Rate(1, float("nan")), "per"),
        (lambda: Rate(1, 1, "drp"), "excess.*'wait', 'drop'"),
        (lambda: EventHub().subscribe("k", print, rate=5), "rate: got 5"),  # type: ignore[call-overload]
    ],
)
def test_a_typo_is_refused(make: object, match: str) -> None:
    with pytest.raises(InvalidOption, match=match):
        make()  # type: ignore[operator]
