"""A quota: never more than so many in any period."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mphub.core.rate import GRAIN, Quota

STEPS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 9)), max_size=60)


@given(st.integers(1, 10), st.floats(0.5, 20), STEPS)
def test_no_period_has_more_than_the_count(count: int, per: float, steps: list[tuple[float, int]]) -> None:
    quota, now, spent = Quota(count, per, []), 1000.0, list[tuple[float, int]]()
    for passed, wanted in steps:
        now += passed
        events = min(wanted, quota.room(now))
        if events:
            quota.spend(now, events)
            spent.append((now, events))
        assert len(quota.grants) <= GRAIN + 2
    for first, _ in spent:
        assert sum(n for at, n in spent if first <= at < first + per * 0.999) <= count


def test_it_says_when_it_opens() -> None:
    quota = Quota(2, 10.0, [])
    assert quota.opens_at > 1e9 and quota.room(1.0) == 2
    quota.spend(1.0, 1)
    quota.spend(2.0, 1)
    assert (quota.room(5.0), quota.opens_at) == (0, 11.0)
    assert (quota.room(11.0), quota.opens_at > 1e9) == (1, True)


def test_another_begins_where_one_ended_and_a_clock_set_back_does_not_stop_it() -> None:
    quota = Quota(2, 10.0, [(100.0, 1), (105.0, 1)])
    assert quota.room(109.0) == 0
    assert quota.room(50.0) == 0 and quota.opens_at == 60.0
    assert quota.room(60.0) == 2


def test_what_has_not_started_does_not_count() -> None:
    quota = Quota(5, 10.0, [])
    quota.spend(1.0, 2)
    quota.spend(2.0, 3)
    quota.give_back(4)
    assert (quota.room(3.0), quota.grants) == (4, [(1.0, 1)])
