"""What ``bench.py`` measures of very many subscribers in few processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mphub import EventHub

PROCESSES = 2
EVENTS = 100
KEY = "event"


async def take(payload: object) -> None:
    """Do as little as can be."""


def sharing(subscribers: int) -> dict[str, float]:
    """Return the seconds that they take to start, the MB that all processes take then, and the microseconds of a delivery."""
    hub = EventHub()
    began = time.perf_counter()
    for number in range(subscribers):
        hub.subscribe(KEY, take, name=f"subscriber-{number}", process=f"shared-{number % PROCESSES}")
    with hub:
        started = time.perf_counter()
        found = hub.statistics()
        pids = {os.getpid(), *found.pids.values(), *(pid for one in found.subscribers.values() for pid in one.pids)}
        memory = sum(map(proportional_memory, pids))
        hub.publish(KEY, 0)
        hub.drain()
        before = time.perf_counter()
        hub.publish_batch(KEY, range(EVENTS))
        handled = {one.handled for one in hub.drain().subscribers.values()}
        took = time.perf_counter() - before
    if handled != {EVENTS + 1}:
        raise SystemExit(f"bench: handled {handled}, expected {EVENTS + 1} each: no figure")
    return {"s to start": started - began, "MB in all": memory, "us a delivery": took / EVENTS / subscribers * 1e6}


def proportional_memory(pid: int) -> float:
    """Return the MB that a process takes, of what it shares its part."""
    line = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024
