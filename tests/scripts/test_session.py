"""The terminal session of the docs is what comes today, but for numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import session

from tests.scripts.test_soak import environment


def words(page: str) -> list[str]:
    """Return the words of a page; numbers, and what they are the width of, differ each time."""
    return re.sub(r"[0-9a-f]*[0-9][0-9a-f,.:-]*", "N", page).split()


@pytest.mark.timeout(120)
def test_the_session_of_the_docs_is_what_comes_today() -> None:
    command = [sys.executable, str(Path(session.__file__)), "--print"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100, check=True).stdout
    assert words(found) == words(session.PAGE.read_text(encoding="utf-8"))
