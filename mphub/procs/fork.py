"""Making, watching and ending processes: fork from the template, sessions, exit words. Linux."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from mphub import failpoints
from mphub.wire.specs import Surroundings

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SHORT = 75
"""Exit code of a child that could not begin, or go on, for want of descriptors, memory or room on the disk."""
LOOKS_APART = 2.5
"""Seconds between two looks from which nothing is known of the time between."""
FROZEN_AFTER = 5.0
"""Seconds after which a stopped process counts as frozen."""
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Let orphans of our children come to us instead of to init."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def fork(run: Callable[[], int], record: Path, keep: Collection[int] = (), out: Path | None = None) -> int:
    """Fork a child that leads its own session, runs, and ends without returning here; return its pid.

    Its record (pid, start time) is in the folder before ``run`` begins. It dies with this process.
    """
    parent = os.getpid()
    flush_output()
    pid = os.fork()
    if pid:
        failpoints.hit("supervisor.forked")
        return pid
    code = SHORT
    try:
        _settle_in(parent, record, keep, out)
        code = 70
        code = run()
    except BaseException:
        if code != SHORT:
            sys.excepthook(*sys.exc_info())
    finally:
        _leave(code)
    raise AssertionError("unreachable")


def _settle_in(parent: int, record: Path, keep: Collection[int], out: Path | None) -> None:
    os.setsid()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    failpoints.hit("child.forked")
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    _close_others({0, 1, 2, *keep})
    if out is not None:
        sys.stdout = _redirect(1, f"{out}.out")
        sys.stderr = _redirect(2, f"{out}.err")
    enter(record)  # last: who is on record has begun
    failpoints.hit("child.recorded")


def enter(record: Path) -> None:
    """Put this process on record."""
    record.write_text(f"{os.getpid()} {start_ticks(os.getpid())}")


def has_begun(record: Path) -> bool:
    """Say whether a child of this record came to its own work."""
    with contextlib.suppress(OSError):
        return record.stat().st_size > 0
    return False


class Output(io.FileIO):
    """A file for what is printed; what a full disk does not take is lost, and nobody's work fails for it."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as without standard streams
            stream.flush()


def begin_afresh() -> None:
    """Undo what the hub's process may have handed down: ignored and blocked signals, missing standard streams."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(number, True)
    os.close(number)


def _redirect(number: int, path: str) -> TextIO:
    """Let a standard stream go to a file, line by line, so that a death takes no line with it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, number)
    os.close(file)
    output = io.BufferedWriter(Output(number, "w", closefd=False))
    return io.TextIOWrapper(output, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _close_others(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _leave(code: int) -> None:
    """End without unwinding into the parent's frames, after finalizers and non-daemon threads."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        flush_output()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code & 0xFF)


def take_surroundings(surroundings: Surroundings) -> None:
    """Begin with the hub's cwd, sys.path and environment, and an empty ``__main__``."""
    with contextlib.suppress(OSError):
        os.chdir(surroundings.cwd)
    sys.path[:] = map(os.fsdecode, surroundings.path)
    os.environ.clear()
    os.environb.update(surroundings.environment)
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv[:] = [""]


def start_ticks(pid: int) -> int:
    """Return a process's start time in clock ticks since boot (0 if it is gone): pid and this name it for ever."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else 0


def stat_fields(pid: int | str) -> list[str]:
    """Return /proc/<pid>/stat from the state on (empty if the process is gone)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def session_of(leader: int) -> Iterator[int]:
    """Yield the processes of a session."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := stat_fields(name)) and int(fields[3]) == leader and fields[0] != "Z":
            yield int(name)


def kill_session(leader: int) -> set[int]:
    """SIGKILL every process of a session and return them; to be called before its leader is reaped: the number is still its own."""
    killed: set[int] = set()
    with contextlib.suppress(OSError):
        os.killpg(leader, signal.SIGKILL)  # needs no descriptor: they may have run out
    with contextlib.suppress(OSError):
        for _ in range(3):  # what forks while we look
            found = set(session_of(leader))
            for pid in found:
                kill(pid)
            killed |= found
            if not found:
                break
    return killed


def kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def kill_children(within: float = 1.5) -> None:
    """Kill and reap until this process has no child left, at most some seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not children:
            return
        for pid in map(int, children):
            end(pid)


def end(pid: int) -> None:
    """Kill and reap a child."""
    kill(pid)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def is_gone(pid: int, ticks: int) -> bool:
    """Say whether that very process has ended, reaped or not."""
    fields = stat_fields(pid)
    return not fields or fields[0] in "ZX" or int(fields[19]) != ticks


class Frost:
    """Sees that a process has been stopped (state T) for too long, by looks at it one soon after the other."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._looked = 0.0

    def lasts(self, pid: int, now: float) -> bool:
        """Look; say whether it was stopped at every look for some seconds."""
        fields = stat_fields(pid)
        if not fields or fields[0] != "T":
            self._since = None
        elif self._since is None or now - self._looked > LOOKS_APART:
            self._since = now
        self._looked = now
        return self._since is not None and now - self._since >= FROZEN_AFTER


def is_same(pid: int, ticks: int) -> bool:
    return ticks != 0 and start_ticks(pid) == ticks


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since boot (0 where it does not say)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def exit_word(status: int) -> str | int:
    """Return a signal by name, or the exit code."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
