"""What tests of several folders share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from mphub.testing.traces import eventually

__all__ = ["eventually", "without_address"]


def without_address(value: object) -> str:
    """Name a test's parameter the same in each process: run side by side, they compare what they have collected."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def script(source: str, timeout: float = 15.0) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own, which may hang."""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    p = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, 9)
        out, err = p.communicate()
        pytest.fail(f"hangs; {out[-500:]} {err[-500:]}")
    return subprocess.CompletedProcess(p.args, p.returncode, out, err)


class Cells(HTMLParser):
    """Reads a table back, and sees that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.caption = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open[-1] == "caption":
            self.caption += data


def size(payload: object) -> int:
    return len(payload) if isinstance(payload, bytes) else len(payload[-1])  # type: ignore[index]


def halve(n: int) -> int:
    if n % 2:
        raise ValueError(f"{n} is odd")
    return n // 2


def let_die(how: str, router: int, pid: int, meet: Callable[[], object]) -> None:
    """Kill a process: alone, after its router and once ``meet`` has waited for the next one, or before one that does not see it."""
    if how == "dies first":
        os.kill(router, signal.SIGKILL)
        meet()
    elif how == "dies unseeing":
        os.kill(router, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    if how == "dies unseeing":
        os.kill(router, signal.SIGKILL)
