"""A process dies with a batch in hand: what had ended is not repeated, and whoever is guilty is found, at nobody else's cost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from mphub import Batch, EventHub, Limits, Restart, Retry
from tests.helpers import eventually
from tests.notes import lines, note, note_batch, publish_together

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]
PATIENT, AT_ONCE = Retry(max_attempts=1000), Restart(max_restarts=1000, delay=0)


def test_the_ones_that_kill_are_found_among_those_that_ran_together(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(numbers: list[int]) -> None:
        note_batch(log)
        if 2 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        if 5 in numbers:
            time.sleep(60)

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, batch=Batch(4, wait=0.02), retry=Retry(2), restart=AT_ONCE, limits=Limits(timeout=0.2))
    with hub:
        publish_together(hub, range(8))
        statistics = hub.drain(20).subscribers[sub.name]
        letters = [(letter.payload, letter.reason, letter.exit, letter.attempts) for letter in sub.dead_letters()]
    assert letters == [(2, "crash", "SIGKILL", 2), (5, "timeout", "SIGABRT", 2)]
    assert (statistics.handled, statistics.dead) == (6, 2)
    assert lines(log) == ["0 1 2 3", "0", "1", "2", "2(2)", "3", "4 5 6 7", "4", "5", "5(2)", "6", "7"]


def test_a_new_router_believes_a_process_that_died_with_a_batch_before_they_met(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(numbers: list[int]) -> None:
        note_batch(log)
        while 2 in numbers and not (tmp_path / "go").exists():
            time.sleep(0.01)

    hub = EventHub()
    sub = hub.subscribe("k", handle, batch=Batch(size=2, wait=0.02))
    with hub:
        publish_together(hub, range(6))
        assert eventually(lambda: "2 3" in lines(log))
        router, worker = hub.statistics().pids["router"], sub.statistics().pids[0]
        os.kill(router, signal.SIGSTOP)  # it does not hear of the death
        os.kill(worker, signal.SIGKILL)
        (tmp_path / "go").touch()
        os.kill(router, signal.SIGKILL)
        hub.drain(20)
    assert lines(log) == ["0 1", "2 3", "2", "3", "4 5"]


def test_whoever_dies_each_event_ends_once_with_its_outputs(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"

    def handle(numbers: list[int]) -> list[int]:
        for attempt, n in zip(note_batch(log), numbers, strict=True):
            if n % 300 == 299 and attempt == 1 and len(numbers) == 1:
                os._exit(1)
        if any(n % 300 == 299 for n in numbers) and len(numbers) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbers

    hub = EventHub()
    sub = hub.subscribe("k", handle, batch=Batch(size=16, wait=0.005), to="out", retry=PATIENT, restart=AT_ONCE)
    hub.subscribe("out", lambda n: note(out, n), name="out")
    with hub:
        publisher = threading.Thread(target=hub.publish_batch, args=("k", range(1500)))
        publisher.start()
        for _ in range(3):
            before = sub.statistics().handled
            os.kill(hub.statistics().pids["router"], signal.SIGKILL)
            assert eventually(lambda before=before: sub.statistics().handled > before + 100 or not publisher.is_alive(), 20)  # type: ignore[misc]
        publisher.join()
        statistics = hub.drain(60).subscribers[sub.name]
    assert Counter(map(int, lines(out))) == Counter(range(1500))
    assert (statistics.handled, statistics.dead, statistics.restarts) == (1500, 0, 10)
    attempts = Counter(word for line in lines(log) for word in line.split() if "(" in word)
    assert attempts == Counter(f"{n}(2)" for n in range(299, 1500, 300)), "nobody else is charged"


def test_a_new_router_knows_what_waits_for_company_since_long_ago(tmp_path: Path) -> None:
    """Hundreds of frames ago it was handed out, and nothing of them was wanted."""
    log = tmp_path / "log"
    hub = EventHub()
    sub = hub.subscribe("k", lambda _: note_batch(log), batch=Batch(size=2, wait=3600), where=lambda n: n in (0, 5000))
    with hub:
        for n in range(1100):
            hub.publish("k", n)
            hub.flush()
        assert eventually(lambda: sub.statistics().dropped == {"filtered": 1099})
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        hub.publish("k", 5000)
        hub.drain(20)
    assert lines(log) == ["0 5000"]
