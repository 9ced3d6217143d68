"""Draw what ``bench.py`` measured, each figure as PNG and as SVG.

    python scripts/plots.py results.json docs/plots

The file is what ``bench.py --json`` wrote. There is one figure for each family (bars are medians, each dot is a round), "speed" with all
ratios against what is expected of them, "limits" with the figures of one hub against their limits, and one for each curve.
Needs matplotlib: pip install 'mphub[bench]'
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import Absolute, Report, Result, form_of, load

OURS, THEIRS, MISSED, INK = "#1f77a4", "#b4b9be", "#d9822b", "#333333"
WIDTH = 8.0
"""Inches, 100 pixels each where a figure is shown 800 pixels wide."""
ROW = 0.34
"""Inches of a bar with its gap."""
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": THEIRS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e8eaec",
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mphub",  # the same results give the same file
}


def is_there() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Report, folder: Path) -> None:
    """Draw everything into a folder, which is made if need be."""
    folder.mkdir(exist_ok=True)
    curves = [one for one in report.figures if one.along]
    limited = [one for one in report.figures if not one.along]
    with importlib.import_module("matplotlib").rc_context(STYLE):
        for result in report.results:
            save(family_of(result), report, folder / result.family)
        for curve in curves:
            save(curve_of(curve), report, folder / curve.figure)
        if report.results:
            save(speed_of(report.results), report, folder / "speed")
        if limited:
            save(limits_of(limited), report, folder / "limits")


def save(figure: Any, report: Report, path: Path) -> None:
    figure.supxlabel("\n".join(textwrap.wrap(report.machine, 120)), fontsize=7.5, x=0.01, ha="left")
    figure.savefig(f"{path}.png", dpi=200)
    figure.savefig(f"{path}.svg", metadata={"Date": None})


# -- the figures


def family_of(result: Result) -> Any:
    """Draw each side's median as a bar, its rounds as dots; peers too, the best first."""
    sides = ["mphub", "baseline", *sorted(result.peers, key=lambda peer: result.peers[peer])]
    better = "less is better" if result.less_is_better else "more is better"
    expected = f"; expected: {result.target:.3g} or more" if result.target is not None else ""
    figure, (axes,) = sheet(f"{result.family}: {result.unit}", [len(sides)])
    medians = [statistics.median(result.values[side]) for side in sides]
    labels = [f"{median:{form_of([median])}}" for median in medians]
    bars(axes, sides, medians, labels, [max(result.values[side]) for side in sides], [OURS, *[THEIRS] * (len(sides) - 1)])
    for place, side in enumerate(sides):
        axes.plot(result.values[side], [place] * len(result.values[side]), "o", color=INK, markersize=3, alpha=0.7)
    axes.set_xlabel(f"{better}; mphub is {result.ratio:.3g} times as good as the baseline{expected}", loc="left", fontsize=9)
    return figure


def speed_of(results: Sequence[Result]) -> Any:
    """Draw the ratios, those that are to be large apart from those that are to be near one."""
    large = [one for one in results if one.target is not None and one.target >= 2]
    panels = [panel for panel in (large, [one for one in results if one not in large]) if panel]
    figure, all_axes = sheet("How many times as good as the baseline mphub is", [len(panel) for panel in panels])
    for axes, panel in zip(all_axes, panels, strict=True):
        ratios = [one.ratio for one in panel]
        reach = [max(one.ratio, one.target or 0) for one in panel]
        colors = [MISSED if "FAILS" in one.verdict else OURS for one in panel]
        bars(axes, [one.family for one in panel], ratios, [f"{ratio:.3g}" for ratio in ratios], reach, colors)
        for place, one in enumerate(panel):
            mark(axes, one.target, place)
    all_axes[-1].set_xlabel("line: expected, at least; other color: missed", loc="left", fontsize=9)
    return figure


def limits_of(figures: Sequence[Absolute]) -> Any:
    """Draw each part as a share of its limit."""
    parts = [(one, part, limit) for one in figures for part, limit in one.limits.items() if limit is not None and part in one.values]
    figure, (axes,) = sheet("What one hub takes, in % of its limit", [len(parts)])
    medians = [statistics.median(one.values[part]) for one, part, _ in parts]
    shares = [100 * median / limit for median, (_, _, limit) in zip(medians, parts, strict=True)]
    names = [f"{one.figure}, {part}" for one, part, _ in parts]
    labels = [
        f"{median:{form_of([median])}} of {limit:,.4g} {one.unit.split()[0]}"
        for median, (one, _, limit) in zip(medians, parts, strict=True)
    ]
    bars(axes, names, shares, labels, [max(share, 100) for share in shares], [MISSED if share > 100 else OURS for share in shares])
    axes.axvline(100, color=INK, linewidth=2)
    return figure


def curve_of(curve: Absolute) -> Any:
    """Draw medians as a line, rounds as dots, over evenly spaced points."""
    figure, (axes,) = sheet(f"{curve.figure}: {curve.unit}", [9])
    for place, found in enumerate(curve.values.values()):
        axes.plot([place] * len(found), found, "o", color=INK, markersize=3, alpha=0.7)
    axes.plot([statistics.median(found) for found in curve.values.values()], "-", color=OURS, linewidth=2)
    axes.set_xticks(range(len(curve.values)), [f"{int(point):,}" for point in curve.values])
    axes.set_xlabel(curve.along)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    return figure


# -- what they are made of


def sheet(title: str, rows: Sequence[int]) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its axes, one below the other, each with room for so many bars."""
    height = 1.2 + sum(ROW * count + 0.3 for count in rows)
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, figure.subplots(len(rows), squeeze=False, height_ratios=rows)[:, 0]


def bars(
    axes: Any, names: Sequence[str], lengths: Sequence[float], labels: Sequence[str], reach: Sequence[float], colors: Sequence[str]
) -> None:
    """Draw bars from the top, each with its label behind all that reaches further."""
    axes.barh(range(len(names)), lengths, color=colors, height=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(*reach, 1e-9) * 1.2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    for place, (label, end) in enumerate(zip(labels, reach, strict=True)):
        axes.annotate(label, (end, place), (6, 0), textcoords="offset points", va="center")


def mark(axes: Any, value: float | None, place: int) -> None:
    if value is not None:
        axes.plot([value, value], [place - 0.42, place + 0.42], color=INK, linewidth=2)


# -- from a file


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with 2 on nonsense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("results", type=Path, metavar="FILE", help="what bench.py --json has written")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to draw; it is made if need be")
    found = parser.parse_args(arguments)
    try:
        found.report = load(found.results)
    except (OSError, ValueError) as error:
        parser.error(f"got {str(found.results)!r} ({error}); expected what bench.py --json has written")
    if reason := why_not(found.folder):
        parser.error(reason)
    return found


def why_not(folder: Path) -> str:
    """Say what is in the way of drawing into a folder."""
    if folder.exists() and not folder.is_dir():
        return f"got {str(folder)!r}, which is a file; expected a folder"
    if not folder.parent.is_dir():
        return f"got {str(folder)!r}; expected a folder in an existing one"
    return "" if is_there() else "got no matplotlib; expected it to be installed: pip install 'mphub[bench]'"


def main() -> int:
    """Draw a file of results; return the exit code."""
    options = parse()
    draw(options.report, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
