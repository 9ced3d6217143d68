"""Ordering keys keep their order while replicas die, come and go, and while the router dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Restart, Retry
from tests.procs.test_hub import lines, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]
PATIENT, AT_ONCE = Retry(max_attempts=1000, on=KeyError, delay=0.01), Restart(max_restarts=1000, delay=0)


def starts(log: Path) -> dict[str, list[int]]:
    """Return, by key, the events in the order of their starts; one that starts anew right away counts once."""
    found: dict[str, list[int]] = {}
    for line in lines(log):
        key, number = line.split()
        of_key = found.setdefault(key, [])
        if of_key[-1:] != [int(number)]:
            of_key.append(int(number))
    return found


def publish(hub: EventHub, count: int, keys: int) -> None:
    for n in range(count):
        hub.publish("k", n, ordering_key=f"o{n % keys}")


def in_order(count: int, keys: int) -> dict[str, Iterable[int]]:
    return {f"o{key}": list(range(key, count, keys)) for key in range(keys)}


@pytest.mark.parametrize("router", [False, True])
def test_each_key_keeps_its_order_over_deaths_retries_and_scaling(tmp_path: Path, router: bool) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        event = mphub.current_event()
        note(log, f"{event.ordering_key} {n}")
        if n % 501 == 500 and event.attempt == 1:
            raise KeyError(n)

    hub = EventHub()
    several = hub.subscribe("k", handle, replicas=4, ordered=True, retry=PATIENT, restart=AT_ONCE)
    ended, killed = threading.Event(), list[int]()

    def disturb() -> None:
        dice = random.Random(5)
        for step in range(20):
            if ended.wait(0.03):
                return
            if step % 3 == 2:
                several.scale(dice.choice([2, 3, 6]))
            elif router and step in (1, 4, 7):
                os.kill(hub.statistics().pids["router"], signal.SIGKILL)
            if pids := several.statistics().pids:
                killed.append(dice.choice(pids))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    with hub:
        thread = threading.Thread(target=disturb)
        thread.start()
        publish(hub, 12_000, 100)
        hub.drain(90)
        ended.set()
        thread.join()
    assert len(killed) >= 2
    assert starts(log) == in_order(12_000, 100)
