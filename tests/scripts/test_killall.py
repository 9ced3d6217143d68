"""A few rounds of killing every process of a durable hub find nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import killall
import pytest

from tests.scripts.test_soak import environment


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_some_rounds_find_nothing() -> None:
    command = [sys.executable, str(Path(killall.__file__)), "--rounds", "3"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=55, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    assert "lost 0" in found.stdout
