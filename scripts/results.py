"""What the rounds of ``bench.py`` gave: as a table, and as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

SIDES = ("baseline", "mphub")


@dataclass(frozen=True)
class Result:
    """What the rounds of one family gave; a ratio says how many times better than the baseline mphub is."""

    family: str
    unit: str
    events: int
    values: dict[str, list[float]]
    ratios: list[float]
    ratio: float
    peers: dict[str, float]
    """Median of how many times better mphub is than each."""
    target: float | None = None
    """The ratio that is expected, at least."""
    less_is_better: bool = False
    """Of the values; of ratios more is."""

    @property
    def verdict(self) -> str:
        return verdict(self.target, self.target is None or self.ratio >= self.target, ">=")


@dataclass(frozen=True)
class Absolute:
    """What the rounds of one figure gave, part by part, and the most that is expected of each."""

    figure: str
    unit: str
    events: int
    values: dict[str, list[float]]
    limits: dict[str, float | None]
    along: str = ""
    """What the parts count, if they are the points of a curve."""

    def verdict(self, part: str) -> str:
        limit = self.limits.get(part)
        return verdict(limit, limit is None or statistics.median(self.values[part]) <= limit, "<=")


def verdict(expected: float | None, holds: bool, sign: str) -> str:
    return "" if expected is None else f"{sign} {expected:<6,.4g} {'holds' if holds else 'FAILS'}"


@dataclass(frozen=True)
class Report:
    """All that was measured, and where and when: a figure without that means nothing."""

    machine: str
    results: list[Result]
    figures: list[Absolute]

    @classmethod
    def of(cls, found: Sequence[Result | Absolute]) -> Report:
        return cls(machine(), [one for one in found if isinstance(one, Result)], [one for one in found if isinstance(one, Absolute)])

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_table(self) -> str:
        """Lay out medians, each with the least and the greatest, and what is expected of them."""
        tables = [table_of_ratios(self.results)] * bool(self.results) + [table_of_absolutes(self.figures)] * bool(self.figures)
        return "\n\n".join([self.machine, *tables])


def load(path: Path) -> Report:
    """Read what ``as_json`` gave.

    Raises OSError, ValueError.
    """
    return msgspec.json.decode(path.read_bytes(), type=Report)


def machine() -> str:
    """Name the machine, what runs on it, and the day."""
    models = []
    with contextlib.suppress(OSError):  # no such file on macOS
        models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    model, kernel = models[0] if models else platform.machine(), f"{platform.system()} {platform.release()}"
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {kernel}, {time.strftime('%Y-%m-%d')}"


def table_of_ratios(results: Sequence[Result]) -> str:
    rows = [f"{'median (min..max)':<18}{'baseline':>28}{'mphub':>34}{'times better':>22}  {'expected':<15}"]
    for one in results:
        baseline, mphub = (spread(one.values[side]) for side in SIDES)
        rows.append(f"{one.family:<18}{baseline:>28}{mphub:>34}{spread(one.ratios, '.2f'):>22}  {one.verdict:<15}  {one.unit}")
        rows += [f"  {peer:<16}{spread(one.values[peer]):>28}{'':>34}{ratio:>10.2f}" for peer, ratio in one.peers.items()]
    return "\n".join(rows)


def table_of_absolutes(results: Sequence[Absolute]) -> str:
    rows = [f"{'median (min..max)':<32}{'mphub':>26}  {'expected':<15}"]
    for one in results:
        for part, values in one.values.items():
            name = f"{one.figure} {int(part):,}" if one.along else f"{one.figure} {part}"
            rows.append(f"{name:<32}{spread(values, form_of(values)):>26}  {one.verdict(part):<15}  {one.unit}")
    return "\n".join(rows)


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}..{max(values):{form}})"


def form_of(values: Sequence[float]) -> str:
    """Return how to write them: whole, or three digits of what is small."""
    return ",.0f" if statistics.median(values) >= 100 else ".3g"
