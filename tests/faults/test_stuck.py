"""A subscriber that is stuck, however: the others get all of theirs in order, publishers go on, no process spins."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from mphub import EventHub, Inbox, Limits, Restart, Stop, Subscription
from mphub.procs.exchange import Exchange
from mphub.store.blobs import Blobs
from mphub.store.journal import Journal
from mphub.wire.frames import Batch, encode, join
from mphub.wire.specs import Spec, Surroundings
from tests.faults.beats import KEY, beating
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.faults
EVENTS = 5000
SMALL = 100
"""Events that the stuck one's inbox takes."""


def sleep_for_ever(_: object) -> None:
    time.sleep(3600)


def die(_: object) -> None:
    os._exit(1)


def stuck_one(hub: EventHub, how: str) -> Subscription[object, None]:
    """Subscribe one that will be stuck."""
    if how == "own key":
        return hub.subscribe("own", sleep_for_ever, name="stuck")
    if how in ("frozen", "FATAL"):
        once = Restart(max_restarts=0)
        return hub.subscribe("k", die if how == "FATAL" else sleep_for_ever, name="stuck", inbox=Inbox(maxsize=SMALL), restart=once)
    return hub.subscribe("k", sleep_for_ever, name="stuck", inbox=Inbox(maxsize=SMALL, overflow=how))


def publish(hub: EventHub) -> None:
    """Publish a few at a time: what is under way when a hold comes is taken in all the same."""
    for first in range(0, EVENTS, SMALL // 2):
        hub.publish_batch("k", range(first, first + SMALL // 2))
        hub.flush(20)


def busy(pids: list[int], seconds: float) -> float:
    """Return the share of a core that some processes take together."""
    processes = [psutil.Process(pid) for pid in pids]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(seconds)
    return sum(sum(process.cpu_times()[:2]) - was for process, was in zip(processes, before, strict=True)) / seconds


@pytest.mark.parametrize("how", ["own key", "drop_oldest", "drop_newest", "dead_letter", "FATAL", "frozen"])
def test_one_that_is_stuck_holds_nobody(how: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False, stop=Stop(ask=0.1, term=0.1))
    hub.subscribe("k", lambda n: note(log, n), name="healthy")
    stuck = stuck_one(hub, how)
    with hub:
        if how == "frozen":
            os.kill(stuck.statistics().pids[0], signal.SIGSTOP)
        hub.publish("own" if how == "own key" else "k", -1)
        if how == "FATAL":
            assert eventually(lambda: stuck.state == "FATAL", 10)
        began = time.monotonic()
        publish(hub)
        assert time.monotonic() - began < 12, "a frozen one holds publishers for five seconds, no other at all"
        assert eventually(lambda: len(lines(log)) >= EVENTS, 10)
        assert busy(list(hub.statistics().pids.values()), 0.5) < 0.2
        found = stuck.statistics()
        assert found.accepted == found.waiting + found.running + found.dead + sum(found.dropped.values())
        if how != "own key":
            lost = found.dropped.get("overflow", 0) if how.startswith("drop") else found.dead
            assert lost > EVENTS // 2, "what exceeds its inbox does not wait"
        hub.stop(drain=False)
    assert [line for line in lines(log) if line != "-1"] == [str(n) for n in range(EVENTS)]


def test_one_that_is_frozen_with_much_to_read_is_not_waited_for() -> None:
    hub = EventHub(stop=Stop(ask=0.1, term=0.1))
    hub.subscribe(KEY, lambda _: None, name="beats")
    k = hub.subscribe("k", lambda data: None, name="k")
    with hub, beating(hub) as longest:
        for _ in range(3):
            hub.publish_batch("k", range(EVENTS))
            hub.drain(20)
        (pid,) = k.statistics().pids
        os.kill(pid, signal.SIGSTOP)
        hub.publish_batch("k", (bytes(10_000) for _ in range(2000)))
        hub.flush(10)
        time.sleep(1)
        print(f"longest gap {longest():.3f} s")
        assert longest() < 0.9
        os.kill(pid, signal.SIGCONT)
        hub.drain(20)
        assert k.statistics().handled == 3 * EVENTS + 2000


def test_one_that_thaws_goes_on_where_it_was(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)
    k = hub.subscribe("k", lambda n: note(log, n), name="k", inbox=Inbox(maxsize=SMALL))
    with hub:
        (pid,) = k.statistics().pids
        os.kill(pid, signal.SIGSTOP)
        publish(hub)
        dead = k.statistics().dead
        assert dead > EVENTS // 2
        os.kill(pid, signal.SIGCONT)
        hub.drain(20)
        assert k.statistics().handled + dead == EVENTS
        assert k.statistics().pids == (pid,)
        assert hub.redrive("k") == dead
        hub.drain(20)
        assert k.statistics().handled == EVENTS
    assert lines(log) == [str(n) for n in range(EVENTS)], "the last ones died first, and came back last"


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "dead_letter"])
def test_what_a_stuck_one_does_not_take_leaves_nothing_behind(overflow: str, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    exchange = Exchange(Journal(tmp_path, 64 << 20), Blobs(tmp_path / "blobs"), 64 << 20, time.time)
    nowhere = Surroundings(b"", [], {})
    spec = Spec("k", ["k"], b"", nowhere, Inbox(maxsize=25, overflow=overflow), Limits(), Restart(), 3)
    with exchange.turn():
        exchange.subscribe(spec)
    box = exchange.boxes["k"]
    sizes = []
    for turn in range(200):
        batch = Batch(7, turn + 1, 10 * turn + 1, 10, ["k"], [0], 0.0)
        with exchange.turn():
            exchange.accept(batch, encode(batch), join([b"x"] * 10))
            exchange.letters.purge(None, None)
            tables = {table: len(list(exchange.journal.scan(table))) for table in ("rows", "progress", "dead")}
        sizes.append((len(box.open), len(box.closed), len(box.noted), *tables.values()))
    exchange.journal.close()
    assert (box.unfinished, box.counters.accepted, sum(box.counters.dropped.values())) == (25, 2000, 1975)
    assert all(max(column) <= 5 for column in zip(*sizes, strict=True)), "no more than what waits, however much has come"
