"""Named steps at which a test lets a process die, in the place where it hurts.

``MPHUB_FAILPOINTS`` names a folder with one empty file for each death wanted: ``router.committed:3`` is the third time that one process
passes that step. Whoever passes it removes the file and kills itself, so that its successor lives. Without the variable a step is a call
that does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Write = Callable[[bytes], object]


def pass_by(step: str, write: Write | None = None, data: bytes | bytearray = b"") -> None:
    """Do nothing: no death is wanted."""


def die_if_due(step: str, write: Write | None = None, data: bytes | bytearray = b"") -> None:
    """Die if this is the time, having written half of some data."""
    _passed[step] += 1
    try:
        os.unlink(_folder / f"{step}:{_passed[step]}")
    except FileNotFoundError:
        return
    if write is not None:
        with contextlib.suppress(OSError):
            write(bytes(data[: len(data) // 2]))
    os.kill(os.getpid(), signal.SIGKILL)


def arm(folder: str | None) -> None:
    """Decide, once for a process and its children, what a step is."""
    global hit, _folder
    _folder = Path(folder or "")
    hit = die_if_due if folder else pass_by


def between(before: str, call: Callable[[T], R], after: str) -> Callable[[T], R]:
    """Put steps around a call that is made for each event; without deaths it stays as it is."""
    if hit is pass_by:
        return call

    def stepped(value: T) -> R:
        hit(before)
        result = call(value)
        hit(after)
        return result

    return stepped


hit: Callable[..., None] = pass_by
_folder = Path()
_passed: Counter[str] = Counter()
arm(os.environ.get("MPHUB_FAILPOINTS"))
