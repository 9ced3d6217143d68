"""``hub.listen``: events as they are accepted, for whoever looks on; it holds nobody and leaves nothing."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from mphub import EventHub, HubError, Tap
from mphub.core.spans import length
from mphub.wire import frames
from mphub.wire.frames import BLOB_MIN, HelloTap, Tapped, encode, frame
from mphub.wire.stream import Line
from tests.helpers import eventually

pytestmark = pytest.mark.timeout(60)


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
            for each in (tap, other):  # which come back one after the other
                assert eventually(lambda killed=killed, each=each: comes(each, killed), 20)  # type: ignore[misc]
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
