"""``hub.listen``: events as they are accepted, for whoever looks on; it holds nobody and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mphub import Event, EventHub, HubClosed, HubError, InvalidKey, InvalidOption, Tap
from mphub.core.spans import length
from mphub.wire import frames
from mphub.wire.frames import BLOB_MIN, HelloTap, Tapped, encode, frame
from mphub.wire.stream import Line
from tests.helpers import eventually

pytestmark = pytest.mark.timeout(60)


def take(tap: Tap, count: int) -> list[Event]:
    return [tap.get(10) for _ in range(count)]


def ended(tap: Tap) -> None:
    """See that nothing more comes, and that the loop ends."""
    assert list(tap) == []
    with pytest.raises(HubClosed):
        tap.get(1)


def test_two_taps_see_what_their_patterns_match_as_it_is_accepted(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    hub.subscribe("a.>", lambda n: n + 1, name="a", to="out")
    with hub:
        every, some = hub.listen(">"), hub.listen(["a.*", "out"])
        ids = [hub.publish("a.b", 1, headers={"x": "y"}), hub.publish("a.b.c", 2), hub.publish("none", 3)]
        statistics = hub.drain(10)
        seen = take(every, 5)
        assert {(event.key, event.payload) for event in seen} == {("a.b", 1), ("a.b.c", 2), ("none", 3), ("out", 2), ("out", 3)}
        assert [event.id for event in seen if event.key in ("a.b", "a.b.c", "none")] == ids
        first, *rest = take(some, 3)
        assert (first.id, first.key, first.payload, first.headers) == (ids[0], "a.b", 1, {"x": "y"})
        assert time.time() - 10 < first.published_at <= time.time()
        assert [event.payload for event in rest] == [2, 3]
        assert (every.dropped, some.dropped, statistics.unmatched, statistics.accepted) == (0, 0, 3, 5)
        assert sorted(statistics.subscribers) == ["a"]
        with pytest.raises(TimeoutError, match=r"no event of a\.\*, out came within 0\.01 s"):
            some.get(0.01)
    ended(every)
    ended(some)


def test_a_tap_sees_requests_transactions_and_large_payloads(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    hub.subscribe("k", len)
    with hub, hub.listen("*") as tap:
        assert hub.request("k", "ab").result(10) == 2
        with hub.transaction() as together:
            for key in ("k", "none", "k"):
                together.publish(key, key * BLOB_MIN)
        hub.publish("none", bytearray(3 * BLOB_MIN))
        assert [len(event.payload) for event in take(tap, 5)] == [2, BLOB_MIN, 4 * BLOB_MIN, BLOB_MIN, 3 * BLOB_MIN]


def test_a_slow_reader_loses_events_and_nobody_else_does(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda _: None)
    with hub:
        tap = hub.listen("k", maxsize=10)
        hub.publish_batch("k", range(500))
        assert hub.drain(20).subscribers[sub.name].handled == 500
        assert eventually(lambda: tap.dropped == 490)
        assert [event.payload for event in take(tap, 10)] == list(range(10))
        hub.publish("k", "more")
        assert tap.get(10).payload == "more"


def test_a_closed_tap_ends_for_all_who_wait_and_costs_nothing_any_more(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    with hub, ThreadPoolExecutor(2) as threads:
        tap = hub.listen("k")
        waiting = [threads.submit(list, tap) for _ in range(2)]
        forgotten = hub.listen("k")
        tap.close()
        tap.close()
        assert [found.result(10) for found in waiting] == [[], []]
        del forgotten
        gc.collect()
        hub.publish("k", 1)
        with pytest.raises(HubClosed):
            tap.get(1)


def test_it_can_be_read_in_asyncio_beside_others(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")

    async def read() -> list[object]:
        tap = hub.listen("k")
        reader = asyncio.create_task(collect(tap))
        for n in range(3):
            await hub.publish_async("k", n)
        await asyncio.to_thread(hub.stop)
        return await reader

    async def collect(tap: Tap) -> list[object]:
        return [event.payload async for event in tap]

    hub.start()
    assert asyncio.run(asyncio.wait_for(read(), 20)) == [0, 1, 2]


def test_payloads_arrive_as_the_codec_has_them(engine: str) -> None:
    hub = EventHub(engine=engine, codec="json", unmatched="ignore")
    with hub, hub.listen("k") as tap:
        for payload in (("a",), ["x" * BLOB_MIN]):
            hub.publish("k", payload)
            assert tap.get(10).payload == list(payload)


def test_what_cannot_be_listened_to_is_refused(engine: str) -> None:
    hub = EventHub(engine=engine)
    with pytest.raises(HubClosed, match="start"):
        hub.listen("k")
    with hub:
        wrong: list[Any] = ["a..b", [], None]
        for keys in wrong:
            with pytest.raises(InvalidKey):
                hub.listen(keys)
        for maxsize in (0, -1, 1.5, "10", float("nan"), True):
            with pytest.raises(InvalidOption, match=r"listen\(maxsize\): got"):
                hub.listen("k", maxsize=maxsize)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption, match=r"keys: got .* bytes of patterns"):
            hub.listen([f"{'k' * 200}.{n}" for n in range(1000)])
        with hub.listen("k") as tap:
            for timeout in (float("nan"), "1", True):
                with pytest.raises(InvalidOption, match="timeout: got"):
                    tap.get(timeout)  # type: ignore[arg-type]
            with pytest.raises(TimeoutError):
                tap.get(-1)


# -- processes


@pytest.mark.procs
def test_nothing_is_left_of_taps_that_are_closed(tmp_path: Path) -> None:
    hub = EventHub(unmatched="ignore")
    before = threading.active_count()
    with hub:
        for _ in range(3):
            with hub.listen(">") as tap:
                hub.publish("k", bytearray(2 * BLOB_MIN))
                assert len(tap.get(10).payload) == 2 * BLOB_MIN
        unread = hub.listen(">", maxsize=1)
        for _ in range(5):
            hub.publish("k", bytearray(2 * BLOB_MIN))
        assert eventually(lambda: unread.dropped == 4)
        unread.close()
        hub.flush()
        hub.publish("k", 1)
        hub.flush()
        assert eventually(lambda: not os.listdir(f"{hub._address.folder}/blobs"))
        assert eventually(lambda: threading.active_count() <= before + 3)


@pytest.mark.procs
def test_a_tap_sees_what_nobody_else_wants_of_a_row_also_when_the_journal_fills_up() -> None:
    hub = EventHub(unmatched="ignore", max_bytes="6MB")
    sub = hub.subscribe("k", lambda _: None)
    with hub, hub.listen("none") as tap:
        sub.pause()
        for _ in range(30):
            hub.publish("k", bytes(50_000), confirm=True)
        for _ in range(100):  # each with a look at what is not needed, if it is not too soon
            with hub.transaction() as together:
                together.publish("k", b"small")
                together.publish("none", bytes(6000))
            assert tap.get(10).payload == bytes(6000)
        sub.resume()


@pytest.mark.procs
@pytest.mark.faults
def test_a_tap_goes_on_when_router_and_supervisor_are_killed() -> None:
    hub = EventHub(unmatched="ignore")

    def comes(tap: Tap, payload: str) -> bool:
        hub.publish("k", payload)
        with contextlib.suppress(TimeoutError):
            return bool(tap.get(0.02).payload == payload)
        return False

    with hub, hub.listen("k") as tap, hub.listen("k") as other:
        for killed in ("router", "supervisor", "router"):
            os.kill(hub.statistics().pids[killed], signal.SIGKILL)
            assert eventually(lambda killed=killed: comes(tap, killed), 20)  # type: ignore[misc]
        assert "supervisor" in {other.get(10).payload for _ in range(2)}
        assert tap.dropped == other.dropped == 0
    assert list(tap) == []


@pytest.mark.procs
@pytest.mark.faults
def test_a_tap_that_does_not_read_holds_nobody_is_kept_little_for_and_learns_what_it_missed() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda _: None)
    with hub, contextlib.closing(Line.connect(hub._address.data)) as line:
        line.send(frames.HELLO_TAP, encode(HelloTap(hub._address.token, ["k"])))
        assert line.receive()
        router = rss(hub.statistics().pids["router"])
        for _ in range(40):
            hub.publish_batch("k", [b"x" * 1000] * 1000)
            hub.publish("k", bytearray(8 * BLOB_MIN))
        statistics = hub.drain(30)
        assert statistics.subscribers[sub.name].handled == 40_040
        assert rss(statistics.pids["router"]) - router < 30 << 20
        assert sum(entry.stat().st_size for entry in os.scandir(f"{hub._address.folder}/blobs")) <= 17 << 20
        seen = dropped = 0
        while seen + dropped < 40_040:
            frame = line.receive()
            assert frame is not None
            tapped = msgspec.msgpack.decode(frame[1], type=Tapped)
            seen, dropped = seen + length(tapped.spans), dropped + tapped.dropped
        assert seen + dropped == 40_040
        assert dropped > 30_000
        line.close()
        assert eventually(lambda: hub.publish("k", 1) and not os.listdir(f"{hub._address.folder}/blobs"))


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.procs
def test_who_does_not_know_the_token_or_speaks_hears_nothing() -> None:
    with EventHub(unmatched="ignore") as hub:
        token = hub._address.token
        for data in (HelloTap(b"wrong", ["k"]), HelloTap(token, [])):
            assert heard(hub, frame(frames.HELLO_TAP, encode(data))) == b""
        hello = frame(frames.HELLO_TAP, encode(HelloTap(token, ["k"])))
        assert heard(hub, hello + hello) == frame(frames.TAPPED, encode(Tapped(0)))
        with hub.listen("k") as tap:
            hub.publish("k", 1)
            assert tap.get(10).payload == 1


def heard(hub: EventHub, data: bytes) -> bytes:
    """Send something to the router, and return what it says until it closes the connection."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as file:
        sock.settimeout(10)
        sock.connect(hub._address.data)
        sock.sendall(data)
        return file.read()


def look_on(hub: EventHub, pipe: Connection) -> None:
    tap = hub.listen("k")
    pipe.send("ready")
    pipe.send([event.payload for event in tap])


@pytest.mark.procs
def test_a_handle_in_another_process_can_listen_too() -> None:
    hub = EventHub(unmatched="ignore")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=look_on, args=(hub, theirs))
    with hub:
        process.start()
        assert ours.recv() == "ready"
        hub.publish_batch("k", range(5))
    assert ours.recv() == [0, 1, 2, 3, 4]
    process.join(10)
    assert process.exitcode == 0
    process.close()


@pytest.mark.procs
def test_a_forked_child_does_not_read_and_does_not_disturb_its_parents_tap() -> None:
    hub = EventHub(unmatched="ignore")
    with hub, hub.listen("k") as tap:
        child = os.fork()
        if not child:
            os._exit(refuses(tap))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        hub.publish("k", 1)
        assert tap.get(10).payload == 1


def refuses(tap: Tap) -> int:
    """Return 0 if a tap of the parent's can neither be read nor ended here."""
    for read in (Tap.get, Tap.__next__):
        try:
            read(tap)
        except HubError as error:
            if "process" not in str(error):
                return 1
        else:
            return 2
    tap.close()
    del tap
    gc.collect()
    return 0
