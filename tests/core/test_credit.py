"""Credit: one event for slow handlers, some 50 ms of work for fast ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mphub.core.credit import SLOW, WORTH, Credit


def test_it_begins_with_one_event() -> None:
    assert Credit(8192).limit == 1


def test_slowness_is_believed_at_once_and_speed_by_and_by() -> None:
    credit = Credit(8192)
    credit.measured(1, 0.001)
    assert credit.limit == 50
    credit.measured(1, 1.0)
    assert credit.limit == 1
    credit.measured(1, 0.001)
    assert credit.limit == 1


def test_a_snapshotting_subscriber_holds_at_least_one_snapshots_worth() -> None:
    credit = Credit(8192, least=1000)
    credit.measured(1, 1.0)
    assert credit.limit == 1000


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 100)), min_size=1), st.integers(1, 8192), st.integers(1, 9000))
def test_it_stays_within_its_bounds(history: list[tuple[int, float]], cap: int, least: int) -> None:
    credit = Credit(cap, least)
    for events, seconds in history:
        credit.measured(events, seconds)
        assert min(cap, least) <= credit.limit <= cap
    if events == 1 and seconds > SLOW:
        assert credit.limit == max(1, min(cap, least))
    assert credit.limit <= max(least, WORTH / max(seconds / events, 1e-9), 1) + 1 or len(history) > 1
