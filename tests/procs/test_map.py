"""Asking for many: in order or as they are done, with failures in place, with progress, in a loop of either kind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from mphub import EventHub, HandlerCrashed, InvalidOption, Progress, Retry, Subscription
from tests.helpers import halve

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def half(engine: str) -> Iterator[Subscription[int, int]]:
    hub = EventHub(engine=engine, check=False)
    found: Subscription[int, int] = hub.subscribe("half", halve, name="half")
    with hub:
        yield found


def sleep_for(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def after(seconds: float, n: int) -> int:
    time.sleep(seconds)
    return n


def test_results_come_in_the_order_of_the_payloads(half: Subscription[int, int]) -> None:
    assert list(half.map(range(0, 400, 2))) == list(range(200))
    assert list(half.map([])) == []


def test_unordered_results_are_the_same_ones(half: Subscription[int, int]) -> None:
    assert sorted(half.map(range(0, 400, 2), ordered=False)) == list(range(200))


def test_unordered_results_come_as_they_are_done() -> None:
    hub = EventHub()
    sleeper = hub.subscribe("k", sleep_for, replicas=2)
    with hub:
        assert list(sleeper.map([0.5, 0.01, 0.02], ordered=False)) == [0.01, 0.02, 0.5]


def test_the_first_exception_ends_the_loop(half: Subscription[int, int]) -> None:
    results = half.map(itertools.count(), ordered=True)
    assert next(results) == 0
    with pytest.raises(ValueError, match="1 is odd"):
        next(results)
    assert list(results) == []


@pytest.mark.parametrize("ordered", [True, False])
def test_exceptions_can_stand_in_the_place_of_results(half: Subscription[int, int], ordered: bool) -> None:
    found = dict(half.map(range(100), errors="return", ordered=ordered).pairs())
    assert {n: result for n, result in found.items() if n % 2 == 0} == {n: n // 2 for n in range(0, 100, 2)}
    assert {n: str(result) for n, result in found.items() if n % 2} == {n: f"{n} is odd" for n in range(1, 100, 2)}


def test_payloads_are_taken_a_bounded_number_ahead(half: Subscription[int, int]) -> None:
    taken = itertools.count()
    results = half.map(n * 2 for n in taken)
    for _ in range(10):
        next(results)
    assert next(taken) <= 10 + 64 + 1
    results.close()
    assert list(results) == []


def test_progress_is_told_to_a_callable(half: Subscription[int, int]) -> None:
    told: list[Progress] = []
    list(half.map((n for n in range(100)), errors="return", progress=told.append, total=100))
    assert (told[-1].done, told[-1].total, told[-1].dead) == (100, 100, 50)
    assert [each.done for each in told] == sorted(each.done for each in told)


def test_payloads_with_a_length_need_no_total(half: Subscription[int, int]) -> None:
    told: list[Progress] = []
    list(half.map([0, 2, 4], progress=told.append))
    assert told[0].total == 3


def test_progress_can_be_lines(half: Subscription[int, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 11)
    monkeypatch.setattr("mphub.observe.progress.time.monotonic", lambda: float(next(clock)))
    list(half.map([0, 2], progress=True))
    assert "2 of 2, 0 dead" in capsys.readouterr().err


@pytest.mark.parametrize("ordered", [True, False])
def test_a_loop_of_asyncio_goes_on_meanwhile(ordered: bool) -> None:
    hub = EventHub()
    slow = hub.subscribe("k", partial(after, 0.01))

    async def program() -> tuple[list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        found = [n async for n in slow.map(range(30), ordered=ordered)]
        ticking.cancel()
        return found, ticks

    with hub:
        found, ticks = asyncio.run(program())
    assert sorted(found) == list(range(30))
    assert not ordered or found == list(range(30))
    assert ticks > 10


def test_a_cancelled_wait_loses_no_result() -> None:
    hub = EventHub()
    slow = hub.subscribe("k", partial(after, 0.2))

    async def program() -> list[int]:
        results = slow.map(range(3))
        waiting: Any = asyncio.ensure_future(results._first_done())
        await asyncio.sleep(0.05)
        waiting.cancel()
        return [n async for n in results]

    with hub:
        assert asyncio.run(program()) == [0, 1, 2]


def test_a_loop_that_is_left_takes_no_more(half: Subscription[int, int]) -> None:
    taken = itertools.count()
    for _ in half.map(n * 2 for n in taken):
        break
    gc.collect()
    assert next(taken) <= 66


@pytest.mark.parametrize(("option", "value"), [("errors", "ignore"), ("progress", "bar"), ("total", -1), ("total", "ten")])
def test_wrong_options_of_a_map_are_named(half: Subscription[int, int], option: str, value: object) -> None:
    with pytest.raises(InvalidOption, match=option):
        half.map([1], **{option: value})  # type: ignore[arg-type]


def test_gather_can_be_awaited_and_waits_for_the_slowest() -> None:
    hub = EventHub()
    hub.subscribe("k", partial(after, 0.2), name="slow")
    hub.subscribe("k", partial(after, 0.0), name="fast")

    async def program() -> dict[str, object]:
        return await hub.gather("k", 7)

    with hub:
        assert asyncio.run(program()) == {"slow": 7, "fast": 7}


@pytest.mark.faults
def test_gather_ends_though_one_dies() -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda _: os._exit(3), name="dies", retry=Retry(max_attempts=1))
    hub.subscribe("k", lambda n: n, name="lives")
    with hub:
        found = hub.gather("k", 1).result(20)
    assert found["lives"] == 1
    assert isinstance(found["dies"], HandlerCrashed)
