"""What a hub may have left behind: processes, its runtime folder, descriptors."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator

import psutil

from mphub.procs import fork

WITHIN = 2.0
"""Seconds after its end in which all of a hub is gone."""
LOOK_EVERY = 0.01


def eventually(condition: Callable[[], object], timeout: float = 15.0, interval: float = LOOK_EVERY) -> bool:
    """Look until the condition is true, at most some seconds; return whether it became true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True


class Traces:
    """What is there of one hub."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._known: set[tuple[int, int]] = set()
        """(pid, start time) of its processes, as it ran."""

    def note(self, supervisor: int) -> None:
        """Remember the supervisor and what descends from it: a subscriber's own children hold nothing of the hub."""
        with contextlib.suppress(psutil.NoSuchProcess):
            pids = [supervisor, *(child.pid for child in psutil.Process(supervisor).children(recursive=True))]
            self._known |= {(pid, fork.start_ticks(pid)) for pid in pids}

    def check(self) -> None:
        """Give all of it two seconds to go.

        Raises AssertionError with what is still there.
        """
        if any(self._left()):
            gc.collect()  # a socket in a reference cycle, of a caught exception say, is no leak
            if not eventually(lambda: not any(self._left()), WITHIN):
                lines = "\n".join(f"  {line}" for line in self._left())
                raise AssertionError(f"left behind {WITHIN:g} s after the hub's end:\n{lines}")

    def _left(self) -> Iterator[str]:
        for pid in sorted(self._pids()):
            yield f"process {described(pid)}"
        if os.path.exists(self.folder):
            yield f"folder {self.folder}: {', '.join(sorted(os.listdir(self.folder)))}"
        for number, target in descriptors(os.getpid()):
            if target.startswith(self.folder) or (target.startswith("socket:") and self._is_peer_of(number)):
                yield f"descriptor {number} of this process: {target}"

    def _pids(self) -> Iterator[int]:
        """Yield the hub's processes: those known, and all that hold a file of its folder."""
        known = {pid for pid, ticks in self._known if fork.is_same(pid, ticks)}
        yield from known
        for pid in psutil.pids():
            if pid != os.getpid() and pid not in known and any(target.startswith(self.folder) for _, target in descriptors(pid)):
                yield pid

    def _is_peer_of(self, number: int) -> bool:
        """Say whether a socket of this process is connected to the hub."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as copy:
            return str(copy.getpeername()).startswith(self.folder)
        return False


def descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """Yield (number, what it is) of a process's open files."""
    with contextlib.suppress(OSError):  # gone, or another user's
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield int(name), os.readlink(f"/proc/{pid}/fd/{name}")


def described(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"{pid} ({process.status()}, parent {process.ppid()}): {' '.join(process.cmdline())[:200]}"
    except psutil.Error as error:
        return f"{pid}: {error}"
