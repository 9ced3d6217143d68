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

    @property
    def verdict(self) -> str:
        return verdict(self.target, self.target is None or self.ratio >= self.target, ">=")


def verdict(expected: float | None, holds: bool, sign: str) -> str:
    return "" if expected is None else f"{sign} {expected:<5.3g} {'holds' if holds else 'FAILS'}"


def table(results: Sequence[Result]) -> str:
    """Lay out medians, each with the least and the greatest, and what is expected of the ratio."""
    rows = [f"{'median (min..max)':<18}{'baseline':>28}{'mphub':>34}{'times better':>22}  {'expected':<14}"]
    for one in results:
        baseline, mphub = (spread(one.values[side]) for side in SIDES)
        rows.append(f"{one.family:<18}{baseline:>28}{mphub:>34}{spread(one.ratios, '.2f'):>22}  {one.verdict:<14}  {one.unit}")
        rows += [f"  {peer:<16}{spread(one.values[peer]):>28}{'':>34}{ratio:>10.2f}" for peer, ratio in one.peers.items()]
    return "\n".join(rows)


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}..{max(values):{form}})"


def as_json(results: Sequence[Result]) -> str:
    return json.dumps({"machine": machine(), "results": [asdict(one) for one in results]}, indent=2)


def machine() -> str:
    """Say where and when: a figure without that means nothing."""
    models = []
    with contextlib.suppress(OSError):  # no such file on macOS
        models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    model, kernel = models[0] if models else platform.machine(), f"{platform.system()} {platform.release()}"
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {kernel}, {time.strftime('%Y-%m-%d')}"
