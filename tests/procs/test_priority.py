"""``publish(priority=)``: higher ones start first, equal ones in the order published."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Inbox
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_an_urgent_one_passes_all_that_waits(tmp_path: Path) -> None:
    """Also what the router does not have in memory; less urgent ones come when all else is done."""
    log = tmp_path / "log"
    hub = EventHub()
    sub = hub.subscribe("k", lambda n: note(log, n) if n < 0 or n % 1000 == 0 else None, inbox=Inbox(maxsize=1_000_000))
    with hub:
        sub.pause()
        for n in range(-150, 0):
            hub.publish("k", n, priority=-1)
        hub.publish_batch("k", range(1, 50_000))
        hub.publish("k", -1000, priority=5)
        hub.flush()
        sub.resume()
        assert eventually(lambda: lines(log)[:1] == ["-1000"], 20)
        hub.drain(30)
    assert lines(log)[1:] == [str(n) for n in (*range(1000, 50_000, 1000), *range(-150, 0))]


def test_they_start_while_their_subscriber_is_busy_with_many(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, n)

    hub = EventHub()
    hub.subscribe("k", handle, inbox=Inbox(maxsize=1_000_000))
    with hub:
        hub.publish_batch("k", range(60_000))
        for n in range(5):
            hub.publish("k", -1 - n, priority=1)
        hub.flush()
        hub.drain(30)
    found = [int(line) for line in lines(log)]
    assert [n for n in found if n < 0] == [-1, -2, -3, -4, -5]
    assert found[-1] == 59_999, "they were not the last"
    assert [n for n in found if n >= 0] == list(range(60_000))


def test_none_is_lost_and_the_order_stays_when_router_and_subscriber_die(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        event = mphub.current_event()
        note(log, f"{event.priority} {n} {event.attempt}")
        if event.attempt == 1 and n in (3, 700):
            os.kill(os.getpid(), signal.SIGKILL)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        sub.pause()
        for n in range(900):
            hub.publish("k", n, priority=n % 3 - 1)
        hub.flush()
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        sub.resume()
        hub.drain(30)
    found = [line.split() for line in lines(log)]
    first = [(int(p), int(n)) for p, n, attempt in found if attempt == "1"]
    assert first == sorted(first, key=lambda each: (-each[0], each[1]))
    assert len(first) == 900
    assert sorted(int(n) for _, n, attempt in found if attempt == "2") == [3, 700]


def test_what_is_given_back_stays_behind_what_is_more_urgent(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> None:
        note(log, n)
        if n == 1:
            assert eventually((tmp_path / "go").exists, 20)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        list(sub.map([0] * 200))  # from here on several are given to it together
        log.unlink()
        with hub.transaction() as together:
            for n in range(1, 4):
                together.publish("k", n)
        assert eventually(lambda: lines(log) == ["1"], 20)
        sub.pause()
        hub.publish("k", 4, priority=1)
        hub.flush()
        (tmp_path / "go").touch()
        assert eventually(lambda: sub.statistics().running == 0, 20)
        sub.resume()
        hub.drain(20)
    assert lines(log) == ["1", "4", "2", "3"]
