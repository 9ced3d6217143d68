"""A process dies with several events under way: exactly those run again, and nothing that had ended, in whatever order."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Limits, Restart, Retry
from tests.helpers import eventually, let_die
from tests.notes import lines, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]
PATIENT, AT_ONCE = Retry(max_attempts=1000), Restart(max_restarts=1000, delay=0)
SLOW = (0, 3, 7)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("router", "is_async"), [("lives", False), ("dies first", True), ("dies unseeing", False)])
def test_what_was_running_runs_again_and_nothing_that_had_ended(router: str, is_async: bool, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"

    def is_held(n: int) -> bool:
        note(log, f"{n} {mphub.current_event().attempt}")
        return n in SLOW and mphub.current_event().attempt == 1

    def handle(n: int) -> int | None:
        while is_held(n):
            time.sleep(60)
        return n if n % 2 else None

    async def handle_async(n: int) -> int | None:
        while is_held(n):
            await asyncio.sleep(60)
        return n if n % 2 else None

    hub = EventHub()
    sub = hub.subscribe("k", handle_async if is_async else handle, name="sub", concurrency=5, to="out")
    hub.subscribe("out", lambda n: note(out, n), name="out")
    with hub:
        for n in range(30):
            hub.publish("k", n)
        assert eventually(lambda: sub.statistics().handled == 27)
        pids = hub.statistics().pids["router"], sub.statistics().pids[0]

        def meet() -> None:
            """Wait until the next router is there, and has met the process."""
            hub.publish("k", 30, confirm=True)
            assert eventually(lambda: sub.statistics().handled == 28)

        let_die(router, *pids, meet)
        statistics = hub.drain(20).subscribers
    count = 30 + (router == "dies first")
    assert Counter(lines(log)) == Counter([*(f"{n} 1" for n in range(count)), *(f"{n} 2" for n in SLOW)])
    assert sorted(map(int, lines(out))) == list(range(1, 30, 2))
    assert (statistics["sub"].handled, statistics["sub"].dead) == (count, 0)


def test_a_limit_charges_the_one_that_overran_and_none_beside_it(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, f"{n} {mphub.current_event().attempt}")
        if n == 1 or (n == 2 and lines(log).count("2 1") == 1):
            time.sleep(60)

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, concurrency=3, limits=Limits(timeout=0.3), retry=Retry(2), restart=AT_ONCE)
    with hub:
        hub.publish_batch("k", range(2))
        assert eventually(lambda: "1 1" in lines(log))
        time.sleep(0.15)
        hub.publish("k", 2)  # begun later, it still runs when the other has overrun
        hub.drain(20)
        (letter,) = sub.dead_letters()
    assert (letter.payload, letter.reason, letter.attempts) == (1, "timeout", 2)
    assert sorted(lines(log)) == ["0 1", "1 1", "1 2", "2 1", "2 1"]


def test_a_handler_that_ends_its_process_leaves_the_others_their_acks(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def handle(n: int) -> int:
        note(log, f"{n} {mphub.current_event().attempt}")
        if n == 5:
            await asyncio.sleep(0.05)
            raise SystemExit(3)
        return n

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, concurrency=20, to="out", retry=Retry(2), restart=AT_ONCE)
    hub.subscribe("out", lambda n: note(tmp_path / "out", n), name="out")
    with hub:
        hub.publish_batch("k", range(10))
        hub.drain(20)
        (letter,) = sub.dead_letters()
    assert (letter.payload, letter.exit, letter.attempts) == (5, 3, 2)
    assert Counter(lines(log)) == Counter([*(f"{n} 1" for n in range(10)), "5 2"])
    assert sorted(map(int, lines(tmp_path / "out"))) == [n for n in range(10) if n != 5]


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "coroutines"])
def test_random_kills_lose_nothing_and_double_nothing(is_async: bool, tmp_path: Path) -> None:
    chance = random.Random(is_async)
    log, out = tmp_path / "log", tmp_path / "out"

    def handle(n: int) -> int:
        note(log, f"{n} {mphub.current_event().attempt}")
        time.sleep(0.001 * (n % 5))
        return n

    async def handle_async(n: int) -> int:
        note(log, f"{n} {mphub.current_event().attempt}")
        await asyncio.sleep(0.001 * (n % 5))
        return n

    hub = EventHub()
    sub = hub.subscribe("k", handle_async if is_async else handle, name="sub", concurrency=8, to="out", retry=PATIENT, restart=AT_ONCE)
    hub.subscribe("out", lambda n: note(out, n), name="out")
    kills = 0
    with hub:
        publisher = threading.Thread(target=hub.publish_batch, args=("k", range(800)))
        publisher.start()
        for _ in range(8):
            time.sleep(chance.uniform(0.02, 0.04))
            victim = hub.statistics().pids["router"] if chance.random() < 0.4 else chance.choice(sub.statistics().pids or (0,))
            if victim:
                kill(victim)
                kills += 1
        publisher.join()
        hub.drain(20)
    assert Counter(map(int, lines(out))) == Counter(range(800)), "outputs are committed with the ack of their own event"
    charged = [line for line in lines(log) if not line.endswith(" 1")]
    assert len(charged) <= 8 * kills, "only what ran is charged; what was being committed runs again for nothing"
