"""Every result is drawn, twice alike; where matplotlib is not installed, it is asked for before anything is measured."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import bench
import families
import figures
import plots
import pytest
import results


def report() -> results.Report:
    """Return made-up rounds of a family on each side of its target, with and without peers, and of figures and a curve."""
    values = {"baseline": [100.0, 110.0], "mphub": [900.0, 1000.0]}
    found: list[results.Result | results.Absolute] = [
        families.FAMILIES["throughput-1"].result("throughput-1", 10, {**values, "pyzmq": [300.0, 310.0]}),
        families.FAMILIES["roundtrip"].result("roundtrip", 10, values),
        families.FAMILIES["stuck-FATAL"].result("stuck-FATAL", 10, values),
        figures.FIGURES["recovery"].result("recovery", 10, {"p50": [51.0]}),
        figures.FIGURES["cpu-backlog"].result("cpu-backlog", 10, {"0": [2.0, 3.0], "10000": [2.5, 2.0]}),
    ]
    return results.Report.of(found)


def words_of(svg: Path) -> str:
    return " ".join(text for element in ElementTree.parse(svg).iter() if (text := (element.text or "").strip()))


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(report().as_json())
    assert results.load(tmp_path / "results.json") == report()


def test_everything_is_drawn_and_words_stay_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.json").write_text(report().as_json())
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / "results.json"), str(tmp_path / "plots")])
    assert plots.main() == 0
    names = ["throughput-1", "roundtrip", "stuck-FATAL", "cpu-backlog", "speed", "limits"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    drawn = {name: words_of(tmp_path / "plots" / f"{name}.svg") for name in names}
    assert all(report().machine in words for words in drawn.values())
    assert all(word in drawn["throughput-1"] for word in ("mphub", "baseline", "pyzmq", "950", "more is better", "expected: 8 or more"))
    assert all(name in drawn["speed"] for name in names[:3])
    assert "recovery, p50" in drawn["limits"] and "51 of 50 ms" in drawn["limits"]


def test_the_same_results_give_the_same_file(tmp_path: Path) -> None:
    one = results.Report("machine", report().results[:1], [])
    for folder in ("a", "b"):
        plots.draw(one, tmp_path / folder)
    assert (tmp_path / "a" / "speed.svg").read_bytes() == (tmp_path / "b" / "speed.svg").read_bytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("", "expected what bench.py --json has written"),
        ('{"machine": 1}', "expected what bench.py --json has written"),
    ],
)
def test_what_is_no_result_is_told(content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as caught:
        plots.parse([str(tmp_path / "results.json"), str(tmp_path / "plots")])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "is_there", lambda: False)
    with pytest.raises(SystemExit):
        bench.parse(["--plots", str(tmp_path)])
    assert "--plots: got no matplotlib; expected it to be installed: pip install 'mphub[bench]'" in capsys.readouterr().err
