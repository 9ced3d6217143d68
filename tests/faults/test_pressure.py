"""Full inboxes, full journals, circles: publishers wait or are told, nothing grows without bound, nothing locks up."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Inbox, Restart
from tests.helpers import eventually

pytestmark = pytest.mark.faults


def kill_router(hub: EventHub) -> None:
    os.kill(hub.statistics().pids["router"], signal.SIGKILL)


def size_of(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # its last event has just been handled
            size += path.stat().st_size
    return size


def test_subscribers_that_publish_to_each_other_with_full_inboxes_never_lock_up() -> None:
    hub = EventHub(max_bytes="8MB")
    small = Inbox(maxsize=10)
    hub.subscribe("a", lambda n: hub.publish("b", n - 1) and None if n else None, name="a", inbox=small)
    hub.subscribe("b", lambda n: hub.publish("a", n - 1) and None if n else None, name="b", inbox=small)
    hub.subscribe("self", lambda n: [hub.publish("self", n - 1) for _ in range(2 if n else 0)] and None, name="self", inbox=small)
    with hub:
        for _ in range(300):
            hub.publish("a", 20)
        hub.publish("self", 11)
        hub.drain(50)
        found = hub.statistics().subscribers
    assert (found["a"].handled, found["b"].handled, found["self"].handled) == (300 * 11, 300 * 10, 2**12 - 1)


def test_a_request_to_oneself_raises_instead_of_waiting_for_ever() -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: hub.request("k", n).result(), name="k")
    with hub, pytest.raises(mphub.HubError, match="would wait for itself"):
        hub.request("k", 1).result(10)


def test_outputs_that_cannot_be_kept_are_tried_again_and_nothing_grows(capfd: pytest.CaptureFixture[str]) -> None:
    hub = EventHub(max_bytes="4MB", check=False)
    folder = Path(hub._address.folder)
    notices: list[mphub.Notice] = []
    hub.on_notice(notices.append)
    hub.subscribe("k", lambda n: [hub.publish("k", bytes(30_000)) for _ in range(2)] and None, name="k")
    with hub:
        hub.publish("k", b"")
        assert eventually(lambda: [n.kind for n in notices].count("full") >= 2, 20)
        assert size_of(folder / "blobs") < 8_000_000
        found = hub.statistics().subscribers["k"]
        assert found.accepted == found.handled + found.waiting + found.running
        assert found.dead == 0
        hub.stop(drain=False)


def test_memory_and_files_stay_level_while_a_slow_one_is_fed(tmp_path: Path) -> None:
    hub = EventHub(max_bytes="4MB")
    folder = Path(hub._address.folder)
    hub.subscribe("k", lambda data: time.sleep(0.0005), name="slow")
    with hub:
        for _ in range(300):
            hub.publish("k", bytes(100_000))
            assert size_of(folder / "blobs") < 8_000_000
        hub.drain(60)
        assert eventually(lambda: not list((folder / "blobs").iterdir()), 5), "the last reference is gone"


def fail(payload: object) -> None:
    os._exit(1)


def test_a_fatal_one_with_few_events_among_many_holds_nobody() -> None:
    hub = EventHub(max_bytes="4MB", check=False)
    bad = hub.subscribe("bad", fail, name="bad", restart=Restart(max_restarts=0))
    good = hub.subscribe("good", lambda data: None, name="good")
    with hub:
        hub.publish("bad", b"")
        assert eventually(lambda: bad.state == "FATAL", 20)
        for number in range(100_000):
            hub.publish("good", bytes(100))
            if number % 450 == 0:
                hub.publish("bad", number)
        hub.flush(60)
        assert eventually(lambda: good.statistics().handled == 100_000, 30)
        found = bad.statistics()
        assert found.accepted == found.waiting + found.dead == 100_000 // 450 + 2
        assert found.dead <= 1, "what it lags behind by is far less than the journal holds"
        hub.stop(drain=False)


def test_a_fatal_one_that_fills_the_journal_alone_gets_its_oldest_as_dead_letters() -> None:
    hub = EventHub(max_bytes="2MB", check=False)
    bad = hub.subscribe("bad", fail, name="bad", restart=Restart(max_restarts=0), inbox=Inbox(maxsize=10**6))
    good = hub.subscribe("good", lambda data: None, name="good")
    with hub:
        for number in range(30_000):
            hub.publish("bad", number)
            if number % 100 == 0:
                hub.publish("good", number)
                hub.flush(30)
        hub.publish("bad", bytes(3_000))
        hub.flush(30)
        assert eventually(lambda: good.statistics().handled == 300, 30)
        found = bad.statistics()
        assert bad.state == "FATAL"
        assert found.accepted == found.waiting + found.dead + sum(found.dropped.values()) == 30_001
        hub.stop(drain=False)


def test_what_a_stuck_one_lags_behind_by_keeps_order_and_payload_when_the_rest_is_blanked(tmp_path: Path) -> None:
    hub = EventHub(max_bytes="2MB")
    seen, go = tmp_path / "seen", tmp_path / "go"

    def keep(payload: tuple[int, bytes]) -> None:
        eventually(go.exists, 120)
        with seen.open("a") as file:
            print(payload[0], len(payload[1]), payload[1][-1], file=file)

    hub.subscribe("slow", keep, name="slow")
    fast = hub.subscribe("fast", lambda data: None, name="fast")
    with hub:
        expected = []
        for number in range(60_000):
            hub.publish("fast", bytes(100))
            if number % 600 == 0:
                data = bytes([number % 251]) * (number % 1_000 + 1)
                hub.publish("slow", (number, data))
                expected.append(f"{number} {len(data)} {data[-1]}")
            if number in (30_000, 59_000):
                kill_router(hub)
        hub.flush(60)
        assert eventually(lambda: fast.statistics().handled == 60_000, 30), "it is never held by the one that lags"
        kill_router(hub)
        go.touch()
        hub.drain(30)
    assert seen.read_text().splitlines() == expected
