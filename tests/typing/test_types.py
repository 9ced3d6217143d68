"""Type checkers accept what is right and report what is wrong, line by line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USES = Path(__file__).with_name("uses.py")
LINES = list(enumerate(USES.read_text().splitlines(), 1))


def mypy() -> dict[int, str]:
    """Return what mypy reports, by line."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", "", "--python-version", "3.11", str(USES)]
    found = run(command)
    rows = re.findall(rf"^.*{USES.name}:(\d+): error: (.*)$", found.stdout, re.MULTILINE)
    assert rows, found.stdout + found.stderr
    return {int(number): text for number, text in rows}


def basedpyright() -> dict[int, str]:
    """Return what basedpyright reports, by line."""
    found = run([sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(ROOT), "--pythonpath", sys.executable, str(USES)])
    rows = json.loads(found.stdout)["generalDiagnostics"]
    return {row["range"]["start"]["line"] + 1: row["message"] for row in rows if row["severity"] == "error"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("checker", [mypy, basedpyright])
def test_checkers_report_the_planted_errors_and_nothing_else(checker: Callable[[], dict[int, str]]) -> None:
    planted = {number for number, line in LINES if line.endswith("# error") or f"# error in {checker.__name__}" in line}
    found = checker()
    extra = {number: text for number, text in found.items() if number not in planted}
    assert not extra, extra
    assert not planted - set(found), f"lines that pass but must not: {sorted(planted - set(found))}"
