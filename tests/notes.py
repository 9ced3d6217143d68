"""Notes that handlers of several processes leave in a file. Subscribers' processes import this, so it imports hardly anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mphub
from mphub import EventHub


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


class Record:
    """Notes lines in a file, from whatever process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: object) -> None:
        note(self.path, text)

    @property
    def lines(self) -> list[str]:
        return lines(self.path)


def burst(n: int) -> None:
    """Publish from one handler: all of it is accepted at once."""
    for i in range(n):
        mphub.publish("k", i)


def publish_together(hub: EventHub, payloads: Any, key: str = "k") -> None:
    """Let events come in one frame, so that they are in a batch as far as they fit."""
    with hub.transaction() as together:
        for payload in payloads:
            together.publish(key, payload)
