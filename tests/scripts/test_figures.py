"""One small run of each figure of one hub, and what refuses a wrong one; no figure is judged here."""

from __future__ import annotations

import os
import time

import bench
import figures
import pytest
import results
import sides
import steps

from tests.helpers import eventually

SMALL = {
    "start-8": 1,
    "recycle": 3000,
    "idle-cpu": 100,
    "idle-uss": 1,
    "array-4-memory": 5,
    "backlog": 5000,
    "sharing-10000": 100,
    "history-10M": 2000,
}
"""Events of a run; what is not here, a test of its own measures."""
NOBODY = 2**22 + 1
"""No process has so high a number."""


@pytest.mark.parametrize("name", list(SMALL))
def test_a_figure_has_every_part_that_has_a_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SETTLE", 0.1)
    found = figures.FIGURES[name].run("mphub", SMALL[name])
    result = figures.FIGURES[name].result(name, SMALL[name], {part: [value] for part, value in found.items()})
    assert found.keys() == result.limits.keys()
    assert all(value > 0 for value in found.values())


def test_a_figure_is_measured_in_a_process_of_its_own() -> None:
    result = bench.measure("recovery", 2, 1)
    assert isinstance(result, results.Absolute)
    assert (result.events, list(result.values), len(result.values["p50"])) == (1, ["p50"], 2)


@pytest.mark.parametrize(("name", "point"), [("cpu-subscribers", "2"), ("cpu-backlog", "0"), ("cpu-backlog", "10000")])
def test_a_point_of_a_curve_is_measured(name: str, point: str) -> None:
    assert point in figures.FIGURES[name].runs
    found = figures.FIGURES[name].run(point, 2000)
    assert list(found) == [point]
    assert 0 < found[point] < 10_000


def test_every_figure_is_measured_here() -> None:
    others = {"recovery", "cpu-subscribers", "cpu-backlog", "steps", "roundtrip-steps"}
    assert {*SMALL, *others} == set(figures.FIGURES)


def test_a_figure_of_one_hub_is_not_of_more_than_its_limit_is_for() -> None:
    assert [bench.amount("recovery", events) for events in (None, 3, 10**6)] == [60, 3, 60]
    assert bench.amount("throughput-1", 10**6) == 10**6


def test_a_curve_may_not_rise_above_its_least() -> None:
    values = {"1": [3.0, 4.0, 5.0], "2": [2.0], "4": [2.2], "8": [2.3]}
    result = figures.FIGURES["cpu-subscribers"].result("cpu-subscribers", 10, values)
    assert [result.limits[part] for part in values] == [None, pytest.approx(4.4), pytest.approx(2.2), pytest.approx(2.2)]
    assert ["FAILS" in result.verdict(part) for part in values] == [False, False, False, True]


def test_the_table_has_each_part_and_its_limit() -> None:
    limits: dict[str, float | None] = {"router": 300, "disk": 2000}
    table = results.table_of_absolutes([results.Absolute("backlog", "MB", 10, {"router": [20.04, 21], "disk": [2500]}, limits)])
    assert [row.split() for row in table.splitlines()[1:]] == [
        ["backlog", "router", "20.5", "(20..21)", "<=", "300", "holds", "MB"],
        ["backlog", "disk", "2,500", "(2,500..2,500)", "<=", "2,000", "FAILS", "MB"],
    ]


def test_what_cannot_be_sampled_is_no_peak() -> None:
    with pytest.raises(FileNotFoundError), figures.peaks(lambda: {"nobody": figures.own_memory(NOBODY)}, 0.001):
        pass


def test_the_greatest_sample_is_the_peak() -> None:
    heights = iter([1.0, 5.0, *[2.0] * 1_000_000])
    seen: list[float] = []

    def sample() -> dict[str, float]:
        seen.append(next(heights))
        return {"height": seen[-1]}

    with figures.peaks(sample, 0.001) as greatest:
        assert eventually(lambda: len(seen) > 2)
    assert greatest == {"height": 5.0}


@pytest.mark.parametrize(("name", "whole"), [("steps", "publisher"), ("roundtrip-steps", "who asks")])
def test_steps_name_what_each_process_used(name: str, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TIMES", 2000)
    found = figures.FIGURES[name].run("mphub", 200)
    assert {whole, "router", "subscriber"} <= found.keys()
    assert all(found[part] > 0 for part in (whole, "router", "subscriber"))


def test_cpu_is_that_of_the_process() -> None:
    assert steps.cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.01)
    with pytest.raises(OSError):
        steps.cpu_seconds(NOBODY)


def test_lost_events_give_no_figure() -> None:
    with figures.backlogged(len, 10) as hub:
        hub.publish(sides.KEY, b"", confirm=True)
        figures.must_be_there(hub, 1)
        with pytest.raises(SystemExit, match=r"counted \[1, 1\], expected \[2, 2\]: no figure"):
            figures.must_be_there(hub, 2)
