"""Events that are not wanted any more: withdrawn before they start, told to handlers that ask, ended with their process."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Inbox
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("options", [{"delay": 60.0}, {"priority": -1}, {"priority": 3}, {"ordering_key": "o"}, {}])
def test_wherever_it_waits(options: dict[str, object]) -> None:
    """For its time, by its priority, or where the router does not have it in memory: also after that has died."""
    hub = EventHub()
    sub = hub.subscribe("k", lambda _: None, inbox=Inbox(maxsize=1_000_000), ordered="ordering_key" in options)
    with hub:
        sub.pause()
        hub.publish_batch("k", range(12_000))
        ids = [hub.publish("k", n, **options) for n in range(2)]  # type: ignore[arg-type]
        assert hub.cancel(ids[0])
        hub.flush()
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        assert eventually(lambda: hub.cancel(ids[1])), "once the next router knows what runs"
        sub.resume()
        found = hub.drain(30).subscribers[sub.name]
    assert (found.accepted, found.handled, dict(found.dropped)) == (12_002, 12_000, {"cancelled": 2})


def test_a_handler_that_runs_can_see_it_and_its_process_lives(tmp_path: Path) -> None:
    def handle(_: int) -> None:
        (tmp_path / "runs").touch()
        while not mphub.current_event().cancelled:
            time.sleep(0.005)
        (tmp_path / "seen").touch()

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        reply = sub.request(1)
        assert eventually((tmp_path / "runs").exists, 20)
        assert reply.cancel()
        assert eventually((tmp_path / "seen").exists, 20)
        hub.drain(10)
        assert (sub.statistics().handled, sub.statistics().restarts) == (1, 0)


def test_what_a_process_has_in_hand_is_taken_back(tmp_path: Path) -> None:
    def handle(n: int) -> None:
        if n == 0:
            (tmp_path / "runs").touch()
            assert eventually((tmp_path / "go").exists, 20)
        note(tmp_path / "log", n)

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        list(sub.map(range(1, 200)))  # from here on many are given to it together
        (tmp_path / "log").unlink()
        with hub.transaction() as together:
            for n in range(20):
                together.publish("k", n)
        assert eventually((tmp_path / "runs").exists, 20)
        replies = [sub.request(n) for n in range(20, 40)]
        hub.flush()
        for reply in replies[::2]:
            assert not hub.cancel(reply.id), "it does not wait"
        (tmp_path / "go").touch()
        hub.drain(20)
        assert sub.statistics().dropped == {"cancelled": 10}
    assert lines(tmp_path / "log") == [str(n) for n in (*range(20), *range(21, 40, 2))]


def test_a_reply_that_is_killed_ends_the_process_that_works_for_it(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def handle(n: int) -> int:
        note(log, f"{n} {mphub.current_event().attempt}")
        if n == 1:
            time.sleep(60)
        return n

    hub = EventHub()
    sub = hub.subscribe("k", handle)
    with hub:
        stuck, behind = sub.request(1), sub.request(2)
        assert eventually(lambda: lines(log) == ["1 1"], 20)
        before = sub.statistics().pids
        assert stuck.kill()
        assert behind.result(20) == 2
        assert sub.statistics().pids != before
        assert (sub.statistics().dropped, sub.statistics().dead) == ({"cancelled": 1}, 0)
        assert not behind.kill(), "it has ended"
    assert lines(log) == ["1 1", "2 1"]


@pytest.mark.parametrize("ordered", [True, False])
def test_leaving_a_map_withdraws_what_has_not_started(tmp_path: Path, ordered: bool) -> None:
    def work(n: int) -> int:
        note(tmp_path / "log", n)
        time.sleep(0.03)  # so that one is given to it at a time
        return n

    hub = EventHub()
    sub = hub.subscribe("k", work)
    with hub:
        for n in sub.map(itertools.count(), ordered=ordered):
            if n == 5:
                break
        hub.drain(20)
        found = sub.statistics()
    assert found.dropped["cancelled"] > 40
    assert len(lines(tmp_path / "log")) == found.handled < 20


def test_a_cancelled_task_withdraws_what_it_awaits() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda n: n)

    async def program() -> None:
        async def ask() -> int:
            found: int = await sub.request(1)
            return found

        task = asyncio.create_task(ask())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with hub:
        sub.pause()
        asyncio.run(program())
        assert eventually(lambda: sub.statistics().dropped == {"cancelled": 1})
        sub.resume()
