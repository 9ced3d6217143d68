"""The benchmark's arithmetic, and one small run of each family; no figure is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench
import pytest

BENCH = Path(bench.__file__)
ROUNDS = [{"two-hop": 100.0, "mphub": 500.0}, {"two-hop": 200.0, "mphub": 1600.0}, {"two-hop": 100.0, "mphub": 600.0}]


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    result = bench.compare("throughput-1", ROUNDS, 10)
    assert result.ratios == [5.0, 8.0, 6.0]
    assert result.ratio == 6.0
    assert result.values["mphub"] == [500.0, 1600.0, 600.0]


def test_where_less_is_better_the_ratio_is_turned_round() -> None:
    assert bench.compare("roundtrip", ROUNDS[:1], 10).ratio == pytest.approx(0.2)


def test_a_spread_is_the_median_and_its_range() -> None:
    assert bench.spread([3.0, 1.0, 2.0], "{:.1f}") == "2.0 (1.0..3.0)"


@pytest.mark.parametrize(("least", "good"), [(None, True), (6.0, True), (6.1, False)])
def test_the_check_is_of_throughput_to_one(least: float | None, good: bool) -> None:
    results = [bench.compare("roundtrip", ROUNDS, 1), bench.compare("throughput-1", ROUNDS, 1)]
    assert (bench.check(results, least) == "") is good


def test_a_check_without_its_family_fails() -> None:
    assert "6" in bench.check([bench.compare("roundtrip", ROUNDS, 1)], 6.0)


def test_a_miscount_gives_no_figure() -> None:
    with pytest.raises(SystemExit, match="counted 9, expected 10"):
        bench.must_be(9, 10)


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--families", "throughput"], ["--events", "many"], ["--check", "x"], ["--round-s"]]
)
def test_a_typo_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_every_family_is_measured_on_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH), "--rounds", "1", "--events", "500", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH.parents[1]), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    results = json.loads(file.read_text())["results"]
    assert [result["family"] for result in results] == list(bench.FAMILIES)
    assert all(len(result["values"][side]) == 1 and result["values"][side][0] > 0 for result in results for side in bench.SIDES)
