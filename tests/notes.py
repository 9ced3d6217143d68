"""Notes that handlers of several processes leave in a file. Subscribers' processes import this, so it imports hardly anything."""

from __future__ import annotations

import os
from pathlib import Path

import mphub


def note(path: Path, text: object) -> None:
    """Append a line by one write, so that lines of several processes never mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def note_batch(path: Path) -> list[int]:
    """Note what runs together, and the attempt where it is not the first; return the attempts."""
    events = mphub.current_events()
    note(path, " ".join(f"{event.payload}" + (f"({event.attempt})" if event.attempt > 1 else "") for event in events))
    return [event.attempt for event in events]
