"""Whoever connects and does not behave: only its own connection ends, nobody else waits."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mphub import EventHub
from mphub.wire import codec, frames
from mphub.wire.frames import Batch, Call, HelloPublisher, HelloSubscriber, encode, frame, join
from tests.faults.beats import KEY, beating
from tests.helpers import eventually

pytestmark = pytest.mark.faults
WHOLE = (1 << 32) - 1


@pytest.fixture
def hub() -> Iterator[EventHub]:
    hub = EventHub()
    hub.subscribe(KEY, lambda _: None, name="beats")
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        yield hub


@contextlib.contextmanager
def connected(hub: EventHub, door: str = "data") -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(f"{hub._address.folder}/{door}")
        yield sock


def is_closed(sock: socket.socket) -> bool:
    """Read to the end of the stream; whatever comes before is of no interest."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def send(sock: socket.socket, data: bytes) -> None:
    """Send to one who may have closed already."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)


@contextlib.contextmanager
def crowd(hub: EventHub, count: int, doors: tuple[str, ...]) -> Iterator[list[socket.socket]]:
    """Connect many times; the limit of this process is raised for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, count + 500)), hard))
    socks = [socket.socket(socket.AF_UNIX) for _ in range(count)]
    try:
        for number, sock in enumerate(socks):
            sock.settimeout(10)
            sock.connect(f"{hub._address.folder}/{doors[number % len(doors)]}")
        yield socks
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def drip(socks: list[socket.socket], data: bytes, seconds: float) -> None:
    """Send byte by byte, never a whole hello."""
    for byte in data:
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(bytes([byte]))
        time.sleep(seconds / len(data))


@pytest.mark.timeout(60)
def test_a_thousand_that_never_say_hello_hold_nobody_and_are_closed(hub: EventHub) -> None:
    router, supervisor = (psutil.Process(hub.statistics().pids[name]) for name in ("router", "supervisor"))
    before = router.num_fds(), supervisor.num_fds()
    hello = frame(frames.HELLO_PUBLISHER, encode(HelloPublisher(hub._address.token, 1, 1, 0.0)))
    with beating(hub) as longest, crowd(hub, 1000, ("data", "data", "data", "control")) as socks:
        drip(socks[: len(socks) // 2], hello[:8], 1.5)
        assert eventually(lambda: router.num_fds() <= before[0] + 1 and supervisor.num_fds() <= before[1], 8, interval=0.1)
        assert all(is_closed(sock) for sock in socks)
        print(f"longest gap {longest():.3f} s")
        assert longest() < 1.0
    assert hub.request("k", 1).result(10) == 1


def token_of(hub: EventHub) -> bytes:
    return hub._address.token


def hello_of(peer: str, hub: EventHub) -> bytes:
    """Say hello as one of ours would."""
    if peer == "publisher":
        return frame(frames.HELLO_PUBLISHER, encode(HelloPublisher(token_of(hub), 7, os.getpid(), psutil.Process().create_time())))
    if peer == "subscriber":
        (board, *_) = Path(hub._address.folder, "boards").iterdir()
        return frame(frames.HELLO_SUBSCRIBER, encode(HelloSubscriber(token_of(hub), int(board.name, 16), True)))
    return frame(frames.HELLO_CONTROL, token_of(hub)) if peer == "client" else b""


TAKEN = {
    "stranger": set(),
    "publisher": {frames.BATCH, frames.REPLIES_TAKEN},
    "subscriber": {frames.REPORT, frames.READY},
    "client": {frames.CALL},
}
"""Kinds that the hub takes from whom."""
BATCH = Batch(7, 1, 1, 1, ["k"], [0], 0.0, size=1)


def insults(peer: str) -> Iterator[bytes]:
    """Yield what ends a connection at once, whoever it is with."""
    for kind in sorted(frames.WIRE_KINDS - TAKEN[peer] - {frames.PART}):
        yield frame(kind)
    for kind in sorted(TAKEN[peer] - {frames.READY}):
        yield frame(kind, b"\xc1")
        yield frame(kind, encode(["no", "such", "fields"]))
    yield frames.HEAD.pack(frames.MAX_FRAME + 1, frames.BATCH, 0)
    yield frames.HEAD.pack(WHOLE, frames.BATCH, 0)
    yield frames.HEAD.pack(1, frames.BATCH, 2)
    yield frames.HEAD.pack(0, 255, 0)
    yield frame(frames.PART, frames.LAST, frames.HEAD.pack(WHOLE, frames.BATCH, 0))
    yield frame(frames.PART, frames.LAST, frame(min(frames.WIRE_KINDS - TAKEN[peer] - {frames.PART})))


def lies(peer: str) -> Iterator[bytes]:
    """Yield frames of the right kind that say what cannot be."""
    if peer == "publisher":
        for batch in (
            Batch(8, 1, 1, 1, ["k"], [0], 0.0),
            Batch(7, 0, 1, 1, ["k"], [0], 0.0),
            Batch(7, 1, 1, 1, [], [], 0.0),
            Batch(7, 1, 1, 0, ["k"], [0], 0.0),
            Batch(7, 1, 1, 1, ["k", "k"], [0, -1], 0.0),
            Batch(7, 1, 1, 1, ["k"], [1], 0.0),
            Batch(7, 1, 1, 1, ["k"], [0, 0], 0.0),
            Batch(7, 1, 1, 1, ["k", "k"], [0, 2], 0.0),
            Batch(7, 1, 1, 1, ["k", "k", "k"], [0, 1, 0], 0.0),
            Batch(7, 1, 1, 1, [""], [0], 0.0),
            Batch(7, 1, 1, 1, ["k" * 300], [0], 0.0),
            Batch(7, 1, 1, 1 << 40, ["k"], [0], 0.0),
            Batch(7, 1, 1, 2, ["k"], [0], 0.0),
        ):
            yield frame(frames.BATCH, encode(batch), join([b"x"]))
        yield frame(frames.BATCH, encode(BATCH), b"")
        yield frame(frames.BATCH, encode(BATCH), b"\x91\xff")
        yield frame(frames.BATCH, encode(BATCH), join([b"x"]) + b"more")
    if peer == "client":
        for call in (Call(1, "no_such"), Call(1, "restart"), Call(1, "restart", {"nobody": 1}), Call(1, "subscribe", {"spec": b"?"})):
            yield frame(frames.CALL, encode(call))
        for call in (Call(1, "status", {"name": "k", "status": "FATAL"}), Call(1, "died"), Call(1, "redrive", {"name": 1, "ids": 2})):
            yield frame(frames.CALL, encode(call))


@pytest.mark.parametrize("peer", TAKEN)
def test_what_none_of_ours_would_say_ends_its_own_connection_only(hub: EventHub, peer: str) -> None:
    before, pids = hub.statistics().pids, hub.subscription("k").statistics().pids
    for insult in [*insults(peer), *lies(peer)]:
        for door in ("control",) if peer == "client" else ("data",) if peer != "stranger" else ("data", "control"):
            with connected(hub, door) as sock:
                send(sock, hello_of(peer, hub) + insult)
                assert is_closed(sock), (door, insult[:80])
    assert hub.request("k", 1).result(10) == 1
    assert (hub.statistics().pids, hub.subscription("k").statistics().pids) == (before, pids)
    assert hub.subscription("k").state == "RUNNING"


def test_a_wrong_token_opens_no_door(hub: EventHub) -> None:
    (board, *_) = Path(hub._address.folder, "boards").iterdir()
    for token in (b"", b"x" * 16, token_of(hub)[:15], token_of(hub) + b"x"):
        for door, hello in (
            ("data", frame(frames.HELLO_PUBLISHER, encode(HelloPublisher(token, 7, 1, 0.0)))),
            ("data", frame(frames.HELLO_SUBSCRIBER, encode(HelloSubscriber(token, int(board.name, 16), True)))),
            ("control", frame(frames.HELLO_CONTROL, token)),
        ):
            with connected(hub, door) as sock:
                send(sock, hello + frame(frames.CALL, encode(Call(1, "close"))))
                assert is_closed(sock), (door, token)
    assert hub.request("k", 1).result(10) == 1


@pytest.mark.parametrize("door", ["data", "control"])
def test_a_stranger_cannot_fill_the_memory(hub: EventHub, door: str) -> None:
    with connected(hub, door) as sock:
        part = frame(frames.PART, frames.MORE, bytes(1 << 19))
        with pytest.raises(OSError):
            for _ in range(20):
                sock.sendall(part)
        assert is_closed(sock)
    assert hub.request("k", 1).result(10) == 1


def test_frames_with_random_damage_end_their_own_connections_only(hub: EventHub) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    before, pids = hub.statistics().pids, hub.subscription("k").statistics().pids
    whole = frame(frames.BATCH, encode(BATCH), join([codec.encode(1)]))
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        with connected(hub) as sock:
            send(sock, hello_of("publisher", hub) + bytes(damaged[: dice.randint(1, len(damaged))]))
    assert hub.request("k", 1).result(10) == 1
    assert (hub.statistics().pids, hub.subscription("k").statistics().pids) == (before, pids)
    hub.purge()  # a damaged pickle is a dead letter
