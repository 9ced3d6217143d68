"""Options: what they accept, what they refuse and in which words, and that they travel."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mphub.errors import InvalidOption
from mphub.options import Inbox, Limits, Recycle, Restart, Retry, Snapshot, Stop, backoff, parse_share, parse_size

Struct = Restart | Inbox | Limits | Stop | Snapshot | Recycle
Option = Struct | Retry
STRUCTS: list[Struct] = [Restart(), Inbox(), Limits(1.0), Stop(), Snapshot(), Recycle()]
COUNTS = st.integers(0, 10**6)
DELAYS = st.floats(0, 1e6)
FACTORS = st.floats(1, 2)
RESTARTS = st.builds(Restart, max_restarts=COUNTS, delay=DELAYS, factor=FACTORS, max_delay=DELAYS)


def test_defaults_are_those_of_the_contract() -> None:
    assert Restart() == Restart("always", 8, 0.1, 2.0, 30.0)
    assert Retry() == Retry(3, on=(), delay=1.0, factor=2.0, max_delay=30.0)
    assert Inbox() == Inbox(100_000, 256_000_000, "block", None)
    assert Limits() == Limits(None, 60.0)
    assert Stop() == Stop(5.0, 2.0)
    assert Snapshot() == Snapshot(1000, 1.0)
    assert Recycle() == Recycle(None, None, None)


@pytest.mark.parametrize("option", STRUCTS, ids=repr)
def test_options_are_frozen_hashable_and_pickle(option: Struct) -> None:
    assert pickle.loads(pickle.dumps(option)) == option
    assert hash(option) == hash(pickle.loads(pickle.dumps(option)))
    with pytest.raises(AttributeError):
        setattr(option, option.__struct_fields__[0], 1)


@pytest.mark.parametrize(
    "option", [Restart("never", delay=1), Inbox(max_bytes="1MiB"), Limits(1), Stop(0, 0), Snapshot(5), Recycle(1, 2.5, "9%")], ids=repr
)
def test_options_travel_as_msgpack(option: Struct) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(option), type=type(option)) == option


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Restart(mode="sometimes"), "Restart(mode)"),
        (lambda: Restart(mode=["always"]), "Restart(mode)"),  # type: ignore[arg-type]
        (lambda: Restart(max_restarts=-1), "Restart(max_restarts)"),
        (lambda: Restart(max_restarts=1.5), "Restart(max_restarts)"),  # type: ignore[arg-type]
        (lambda: Restart(delay=-0.1), "Restart(delay)"),
        (lambda: Restart(factor=0.5), "Restart(factor)"),
        (lambda: Restart(factor="2"), "Restart(factor)"),  # type: ignore[arg-type]
        (lambda: Restart(max_delay=float("nan")), "Restart(max_delay)"),
        (lambda: Retry(0), "Retry(max_attempts)"),
        (lambda: Retry(True), "Retry(max_attempts)"),
        (lambda: Retry("3"), "Retry(max_attempts)"),  # type: ignore[arg-type]
        (lambda: Retry(on="KeyError"), "Retry(on)"),  # type: ignore[arg-type]
        (lambda: Retry(on=(KeyError, int)), "Retry(on)"),  # type: ignore[arg-type]
        (lambda: Retry(on=KeyError("x")), "Retry(on)"),  # type: ignore[arg-type]
        (lambda: Retry(delay=float("inf")), "Retry(delay)"),
        (lambda: Inbox(maxsize=0), "Inbox(maxsize)"),
        (lambda: Inbox(max_bytes="lots"), "Inbox(max_bytes)"),
        (lambda: Inbox(max_bytes="125%"), "Inbox(max_bytes)"),
        (lambda: Inbox(overflow="explode"), "Inbox(overflow)"),
        (lambda: Limits(timeout=0), "Limits(timeout)"),
        (lambda: Limits(timeout="1s"), "Limits(timeout)"),  # type: ignore[arg-type]
        (lambda: Limits(start_timeout=-1), "Limits(start_timeout)"),
        (lambda: Limits(start_timeout=None), "Limits(start_timeout)"),  # type: ignore[arg-type]
        (lambda: Stop(ask=-1), "Stop(ask)"),
        (lambda: Stop(term=None), "Stop(term)"),  # type: ignore[arg-type]
        (lambda: Snapshot(every=0), "Snapshot(every)"),
        (lambda: Snapshot(period=-1), "Snapshot(period)"),
        (lambda: Recycle(0), "Recycle(max_events)"),
        (lambda: Recycle(1.5), "Recycle(max_events)"),  # type: ignore[arg-type]
        (lambda: Recycle(True), "Recycle(max_events)"),
        (lambda: Recycle(max_age=0), "Recycle(max_age)"),
        (lambda: Recycle(max_age="1h"), "Recycle(max_age)"),  # type: ignore[arg-type]
        (lambda: Recycle(max_age=float("nan")), "Recycle(max_age)"),
        (lambda: Recycle(max_rss=0), "Recycle(max_rss)"),
        (lambda: Recycle(max_rss="101%"), "Recycle(max_rss)"),
        (lambda: Recycle(max_rss=1.5), "Recycle(max_rss)"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(make: Callable[[], Option], field: str) -> None:
    with pytest.raises(InvalidOption, match=f"^{re.escape(field)}: got .+; expected "):
        make()


@pytest.mark.parametrize("seconds", [-1, float("nan"), "1h", True])
def test_expires_is_a_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(InvalidOption, match=r"Inbox\(expires\)"):
        Inbox(expires=seconds)


def test_retry_takes_everything_but_attempts_by_keyword() -> None:
    with pytest.raises(TypeError):
        Retry(3, KeyError)  # type: ignore[call-arg]


def test_retry_is_frozen_and_compares_by_value() -> None:
    assert Retry(2, on=KeyError) == Retry(2, on=(KeyError,)) != Retry(2)
    assert hash(Retry(2, on=KeyError)) == hash(Retry(2, on=(KeyError,)))
    with pytest.raises(AttributeError, match="cannot assign"):
        Retry().delay = 2.0  # type: ignore[misc]


def test_retry_pickles_and_copies() -> None:
    rule = Retry(2, on=KeyError, delay=0.5)
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule


@pytest.mark.parametrize(
    "make",
    [
        lambda: Restart(delay=10**400),
        lambda: Stop(ask=10**30),
        lambda: Inbox(max_bytes="9" * 300),
        lambda: Inbox(10**40),
        lambda: Recycle(10**40),
    ],
)
def test_absurd_numbers_are_refused_like_others(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidOption):
        make()


def test_a_backoff_that_would_overflow_is_the_greatest() -> None:
    assert backoff(1.0, 1e300, 5, 30.0) == 30.0
    assert backoff(1, 10**6, 10**9, 30.0) == 30.0
    assert backoff(0.0, 1e300, 5, 30.0) == 0.0
    assert Restart(factor=1e18).delay_for(10**6) == 30.0


def test_retry_holds_one_class_as_a_tuple() -> None:
    assert Retry(on=KeyError).on == (KeyError,)
    assert Retry(on=(KeyError, OSError)).on == (KeyError, OSError)


def test_the_first_restart_is_immediate_and_the_delay_grows_from_the_second_death() -> None:
    restart = Restart(delay=0.1, factor=2.0, max_delay=0.5)
    assert [restart.delay_for(deaths) for deaths in range(6)] == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0.5])


@given(RESTARTS, st.integers(0, 10**6))
def test_a_restart_delay_never_shrinks_nor_passes_its_bound(restart: Restart, deaths: int) -> None:
    assert 0 <= restart.delay_for(deaths) <= restart.delay_for(deaths + 1) <= restart.max_delay


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512 * 10**6),
        ("512 mb", 512 * 10**6),
        ("1MiB", 1 << 20),
        ("1.5GiB", 3 << 29),
        ("0.1GB", 10**8),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
        ("7B", 7),
        ("7", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(1, 2**40))
def test_a_size_in_bytes_is_itself_in_every_form(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size}B") == parse_share(size, 10) == size


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "", "MB", "-1MB", "1 XB", "0.1B", "1e3MB"])
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOption, match=r"^max_bytes: got .+; expected bytes as a positive int"):
        parse_size(value, "max_bytes")


def test_a_share_is_of_the_total() -> None:
    assert parse_share("25%", 1000) == 250
    assert parse_share("12.5 %", 1000) == 125
    assert parse_share("1MB", 1000) == 10**6


@given(st.integers(1, 100), st.integers(1, 2**50))
def test_a_share_is_never_nothing_nor_more_than_all(percent: int, total: int) -> None:
    assert 1 <= parse_share(f"{percent}%", total) <= total


@pytest.mark.parametrize("share", ["0%", "101%", "-5%", "%", "x%", "nan%"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(InvalidOption, match="expected a percentage above 0%"):
        parse_share(share, 1000)
