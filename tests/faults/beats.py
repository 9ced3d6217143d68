"""A publisher in a process of its own that confirms one event after the other, and how long it ever had to wait."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import struct
import time
from collections.abc import Callable, Iterator

from mphub import EventHub

KEY = "beat"
PAUSE = 0.002
"""Seconds between two events."""
_FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def beating(hub: EventHub) -> Iterator[Callable[[], float]]:
    """Publish and confirm all the time; yield what tells the longest gap between two confirms so far, in seconds."""
    longest = mmap.mmap(-1, 16)
    process = _FORK.Process(target=_beat, args=(hub, longest))
    process.start()
    try:
        while not (began := struct.unpack_from("d", longest, 8)[0]):
            assert process.is_alive()
            time.sleep(0.005)
        yield lambda: max(struct.unpack_from("d", longest)[0], time.monotonic() - struct.unpack_from("d", longest, 8)[0])
        assert process.is_alive(), "the publisher must have gone on"
        assert struct.unpack_from("d", longest, 8)[0] > began
    finally:
        process.kill()
        process.join()
        process.close()
        longest.close()


def _beat(hub: EventHub, longest: mmap.mmap) -> None:
    hub.publish(KEY, None, confirm=True)
    gap, last = 0.0, time.monotonic()
    while True:
        struct.pack_into("dd", longest, 0, gap, last)
        time.sleep(PAUSE)
        hub.publish(KEY, None, confirm=True)
        now = time.monotonic()
        gap, last = max(gap, now - last), now
