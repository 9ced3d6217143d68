"""A process that subscribers share dies: each runs again what it ran, nothing that had ended, and those of other processes go on."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import EventHub, Restart, Retry, Subscriber
from tests.helpers import eventually, let_die
from tests.notes import lines, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]
PATIENT, AT_ONCE = Retry(max_attempts=1000), Restart(max_restarts=1000, delay=0)
SLOW = (1, 4, 6)
"""Members that stay at event 2, so that the following ones wait behind it."""


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("router", ["lives", "dies first", "dies unseeing"])
def test_what_each_was_running_runs_again_and_nothing_that_had_ended(router: str, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"

    def member(i: int) -> Callable[[int], Coroutine[Any, Any, int | None]]:
        async def handle(n: int) -> int | None:
            attempt = mphub.current_event().attempt
            note(log, f"{i} {n} {attempt}")
            while i in SLOW and n == 2 and attempt == 1:
                await asyncio.sleep(60)
            return n if i == 3 else None

        return handle

    hub = EventHub()
    for i in range(8):
        hub.subscribe("k", member(i), name=f"s{i}", process="one", to="out")
    other = hub.subscribe("k", lambda n: None, name="other", process="two")
    hub.subscribe("out", lambda n: note(out, n), name="out", process="two")
    with hub:
        for n in range(10):
            hub.publish("k", n)
        assert eventually(lambda: sum(s.handled for name, s in hub.statistics().subscribers.items() if name[0] == "s") == 56)
        pids = hub.statistics().pids["router"], hub.subscription("s0").statistics().pids[0]

        def meet() -> None:
            """Wait until the next router is there, and has met the process."""
            hub.publish("k", 10, confirm=True)
            assert eventually(lambda: hub.subscription("s0").statistics().handled == 11)

        let_die(router, *pids, meet)
        found = hub.drain(20).subscribers
        assert other.statistics().restarts == 0
    count = 10 + (router == "dies first")
    once, twice = {f"{i} {n} 1" for i in range(8) for n in range(count)}, {f"{i} 2 2" for i in SLOW}
    assert Counter(lines(log)) == Counter([*once, *twice])
    assert sorted(map(int, lines(out))) == list(range(count))
    assert {(s.accepted, s.handled, s.dead) for name, s in found.items() if name[0] == "s"} == {(count, count, 0)}


def test_an_event_that_kills_the_process_is_a_dead_letter_of_its_one(tmp_path: Path) -> None:
    def kill_itself(n: int) -> None:
        if n == 3:
            kill(os.getpid())

    hub = EventHub(check=False)
    deadly = hub.subscribe("k", kill_itself, process="one", retry=Retry(max_attempts=2))
    harmless = hub.subscribe("k", lambda n: note(tmp_path / "log", n), name="harmless", process="one")
    with hub:
        hub.publish_batch("k", range(20))
        found = hub.drain(20).subscribers
        assert [(letter.payload, letter.attempts, letter.exit) for letter in deadly.dead_letters()] == [(3, 2, "SIGKILL")]
        assert (found["kill_itself"].handled, found["harmless"].handled, harmless.state) == (19, 20, "RUNNING")
    assert Counter(map(int, lines(tmp_path / "log"))) == Counter(range(20))


def test_the_books_add_up_whatever_dies_however_often(tmp_path: Path) -> None:
    hub = EventHub()

    async def wait(n: int) -> None:
        await asyncio.sleep(0.001 * (n % 3))

    def work(n: int) -> None:
        if n % 7 == 0 and mphub.current_event().attempt == 1:
            raise ValueError(n)

    names = []
    for i in range(12):
        handler: Callable[[int], Any] = (wait, work, abs)[i % 3]
        keys = ["all", f"one.{i}"] if i % 4 else ["all", ">"]
        sub = hub.subscribe(
            keys, handler, name=f"s{i}", process="ab"[i % 2], retry=Retry(1000, on=ValueError, delay=0.001), restart=AT_ONCE
        )
        names.append(sub.name)
    expected: Counter[str] = Counter()
    rng = random.Random(5)
    with hub:
        for n in range(600):
            key = "all" if n % 2 else f"one.{rng.randrange(12)}"
            hub.publish(key, n)
            for name in hub.subscribers(key):
                expected[name] += 1
            if n % 60 == 59:
                pids = hub.statistics()
                victims = [*pids.pids.values(), *(pid for s in pids.subscribers.values() for pid in s.pids)]
                kill(rng.choice(victims))
            time.sleep(0.001)
        found = hub.drain(30).subscribers
        assert {name: s.accepted for name, s in found.items()} == dict(expected)
        assert {name: (s.handled, s.waiting, s.running, s.dead) for name, s in found.items()} == {
            n: (c, 0, 0, 0) for n, c in expected.items()
        }


@pytest.mark.parametrize("works", [True, False], ids=["sets up", "fails to"])
def test_a_router_that_dies_while_one_sets_up_loses_nothing_of_that_and_repeats_nothing(works: bool, tmp_path: Path) -> None:
    class Late(Subscriber[int, None]):
        def setup(self) -> None:
            if not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                kill(int((tmp_path / "router").read_text()))
                mphub.publish("out", 1)
            if not works:
                raise ValueError

        def handle(self, n: int) -> None: ...

    async def occupy(n: int) -> None:
        note(tmp_path / "log", n)
        while not (tmp_path / "go").exists():
            time.sleep(0.001)  # this process reads nothing before the other one has come

    hub = EventHub(check=False)
    hub.subscribe("k", occupy, process="one")
    out = hub.subscribe("out", lambda n: None, name="out", process="two")
    with hub:
        hub.publish("k", 1)
        assert eventually(lambda: lines(tmp_path / "log") == ["1"])
        (tmp_path / "router").write_text(str(hub.statistics().pids["router"]))
        late = hub.subscribe("late", Late, process="one")
        (tmp_path / "go").touch()
        assert eventually((tmp_path / "killed").exists)
        assert eventually(lambda: late.state == ("RUNNING" if works else "FATAL"))
        assert eventually(lambda: out.statistics().handled == int(works))  # no event is behind that, so no drain waits for it
        hub.drain(20)
        assert (lines(tmp_path / "log"), out.statistics().handled) == (["1"], int(works))


def test_one_that_was_fatal_when_its_process_began_gets_what_comes_for_all_once_it_is_mended(tmp_path: Path) -> None:
    class Model(Subscriber[int, None]):
        def setup(self) -> None:
            if (tmp_path / self.name).exists():
                raise ValueError

        def handle(self, n: int) -> None: ...

    hub = EventHub(check=False)
    first = hub.subscribe("k", Model, name="first", process="one")
    with hub:
        (tmp_path / "second").touch()
        second = hub.subscribe("k", Model, name="second", process="one")
        assert eventually(lambda: second.state == "FATAL")
        kill(first.statistics().pids[0])
        hub.publish("k", 1)
        assert eventually(lambda: first.statistics().handled == 1)
        (tmp_path / "second").unlink()
        second.restart()
        hub.publish("k", 2)
        assert [one.handled for one in hub.drain(20).subscribers.values()] == [2, 2]
