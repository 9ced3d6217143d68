"""A publisher that is frozen or killed in the middle of what it says: the others do not notice."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mphub import EventHub
from mphub.wire import codec, frames
from mphub.wire.frames import Batch, HelloPublisher, encode, frame, join
from tests.faults.beats import KEY, beating
from tests.helpers import eventually

pytestmark = pytest.mark.faults
FORK = multiprocessing.get_context("fork")
LARGE = 50_000_000


def say_half(hub: EventHub) -> None:
    """Send a whole frame and half of another one, and say no more."""
    me = psutil.Process()
    body = join([codec.encode(bytes(60_000))])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(hub._address.data)
        sock.sendall(frame(frames.HELLO_PUBLISHER, encode(HelloPublisher(hub._address.token, 7, me.pid, me.create_time()))))
        for number in (1, 2):
            whole = frame(frames.BATCH, encode(Batch(7, number, number, 1, ["k"], [0], 0.0, size=len(body))), body)
            sock.sendall(whole if number == 1 else whole[: len(whole) // 2])
        signal.pause()


def write_much(hub: EventHub) -> None:
    """Publish large payloads for ever."""
    data = bytes(LARGE)
    while True:
        hub.publish("large", data)
        hub.flush()


@pytest.mark.parametrize("work", [say_half, write_much])
def test_a_publisher_frozen_and_killed_in_the_middle_holds_no_other(work: Callable[[EventHub], None]) -> None:
    hub = EventHub()
    blobs = Path(hub._address.folder, "blobs")
    hub.subscribe(KEY, lambda _: None, name="beats")
    k = hub.subscribe(["k", "large"], lambda _: None, name="k")
    with hub, beating(hub) as longest:
        publisher = FORK.Process(target=work, args=(hub,))
        publisher.start()
        assert eventually(lambda: half_written(blobs) if work is write_much else k.statistics().handled, 20, interval=0)
        os.kill(publisher.pid or 0, signal.SIGSTOP)
        time.sleep(1.0)
        publisher.kill()
        publisher.join()
        publisher.close()
        assert eventually(lambda: not list(blobs.iterdir()), 10), "what it had half written goes with it"
        print(f"longest gap {longest():.3f} s")
        assert longest() < 0.9
    assert work is write_much or k.statistics().handled == 1


def half_written(blobs: Path) -> bool:
    """Say whether a large file is being written right now."""
    with contextlib.suppress(FileNotFoundError):
        return any(0 < path.stat().st_size < LARGE for path in blobs.iterdir())
    return False
