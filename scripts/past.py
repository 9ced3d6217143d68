"""What ``bench.py`` measures of a durable hub's history: how soon it opens and answers, and how much room it takes."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from families import must_be
from peers import DISK
from sides import PAYLOAD

from mphub import EventHub, Retention

KEYS = 100
MB = 10**6
SMALL = 100 * MB
"""Bytes that a hub may keep to which several times as much is published."""
SMALL_EVENTS = 2_000_000


def history(events: int) -> dict[str, float]:
    """Keep so many events, then open the hub anew and look one key up from the middle on."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=DISK) as folder:
        began, late = time.time(), key_of(events * 3 // 4)
        took = fill(f"{folder}/hub", Retention(max_bytes="16GB"), events)
        hub = EventHub(f"{folder}/hub", retention=Retention(max_bytes="16GB"))
        start = time.perf_counter()
        with hub:
            opened = time.perf_counter()
            first = next(hub.history(late, since=began + took / 2))
            found = time.perf_counter()
            must_be([first.key], [late])
    with tempfile.TemporaryDirectory(prefix="bench-", dir=DISK) as folder:
        fill(f"{folder}/hub", Retention(max_bytes=SMALL), min(events, SMALL_EVENTS))
        size = sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())
    return {
        "s to open": opened - start, "ms to the first row": (found - opened) * 1e3, "folder to max_bytes": size / SMALL,
        "us to keep one": took / events * 1e6,
    }  # fmt: skip


def key_of(number: int) -> str:
    """Return the key of an event: a thousand have one, then the next."""
    return f"key.{number // 1000 % KEYS}"


def fill(folder: str, retention: Retention, events: int) -> float:
    """Publish events under some keys; return the seconds that took."""
    keys = [key_of(number) for number in range(0, 1000 * KEYS, 1000)]
    with EventHub(folder, retention=retention, unmatched="ignore", max_bytes=SMALL) as hub:
        start = time.perf_counter()
        for number in range(events):
            hub.publish(keys[number // 1000 % KEYS], PAYLOAD)
        hub.flush()
        os.sync()
        return time.perf_counter() - start
