"""Restart counting: deaths in a row with nothing finished in between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mphub.core.restarts import Decision, RestartCounter
from mphub.options import Restart


def die(counter: RestartCounter, *, finished: bool = False, exit_ok: bool = False) -> Decision:
    return counter.died(finished_any=finished, by_itself=True, exit_ok=exit_ok)


def test_nine_deaths_in_a_row_are_fatal_by_default() -> None:
    counter = RestartCounter(Restart())
    assert [die(counter).state for _ in range(9)] == ["BACKOFF"] * 8 + ["FATAL"]


def test_a_finished_event_begins_the_count_and_the_delay_anew() -> None:
    counter = RestartCounter(Restart(max_restarts=2, delay=1.0))
    assert [die(counter).delay for _ in range(2)] == [0.0, 1.0]
    assert die(counter, finished=True) == Decision("BACKOFF", 0.0)
    assert [die(counter).state for _ in range(2)] == ["BACKOFF", "FATAL"]


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 10))
def test_it_is_fatal_exactly_when_more_than_max_restarts_are_in_a_row(history: list[bool], most: int) -> None:
    counter, row = RestartCounter(Restart(max_restarts=most)), 0
    for finished in history:
        row = 1 if finished else row + 1
        assert (die(counter, finished=finished).state == "FATAL") == (row > most)


def test_what_an_operator_ends_does_not_count() -> None:
    counter = RestartCounter(Restart(max_restarts=0))
    assert counter.died(finished_any=False, by_itself=False, exit_ok=False) == Decision("BACKOFF")
    assert counter.in_a_row == 0


def test_modes() -> None:
    assert die(RestartCounter(Restart("never"))).state == "STOPPED"
    assert die(RestartCounter(Restart("on-failure")), exit_ok=True).state == "STOPPED"
    assert die(RestartCounter(Restart("on-failure"))).state == "BACKOFF"
    assert die(RestartCounter(Restart("always")), exit_ok=True).state == "BACKOFF"


def test_reset_begins_anew() -> None:
    counter = RestartCounter(Restart(max_restarts=1))
    die(counter)
    counter.reset()
    assert die(counter).state == "BACKOFF"
