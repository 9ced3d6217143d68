"""The supervisor's line to its router: forks it, calls it, repeats to its successor what it did not answer."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from mphub import failpoints
from mphub.procs import fork
from mphub.procs.boot import Charter
from mphub.procs.router import Router
from mphub.store.journal import is_shortage
from mphub.wire import frames
from mphub.wire.frames import Answer, Call, Push, decoder, encode
from mphub.wire.stream import Stream

if TYPE_CHECKING:
    from mphub.procs.supervisor import Supervisor

DEATHS, PERIOD = 10, 10.0
"""Deaths of routers within seconds after which the hub is FAILED."""
LATER = 1.0
"""Seconds after which a router is started that could not be before."""
_answer, _push = decoder(Answer), decoder(Push)


class Link:
    """The router's process as its parent sees it; each new one is told who died unsettled, what is still asked, and who lives."""

    def __init__(self, owner: Supervisor) -> None:
        self.owner = owner
        self.calls: dict[int, tuple[Call, Callable[[Any], None]]] = {}
        self.deaths: list[float] = []
        self.pid = 0
        self.stream: Stream | None = None
        self.frost = fork.Frost()
        self._numbers = 0
        self._start_at: float | None = None
        self._put_off = False
        """It could not be started for want of something, and a notice has said so."""
        self._start()

    def _start(self) -> None:
        owner = self.owner
        ours, theirs = socket.socketpair()
        with theirs:
            self.stream = Stream(ours)
            self.pid, self.pidfd = self._fork(theirs)
        owner.selector.register(ours, selectors.EVENT_READ, self._read)
        owner.selector.register(self.pidfd, selectors.EVENT_READ, self._reap)
        owner.tell_of_the_dead(self)
        for call, _ in self.calls.values():
            self._send(call)
        owner.tell_of_the_living(self)

    def _fork(self, theirs: socket.socket) -> tuple[int, int]:
        owner = self.owner
        pid = fork.fork(
            lambda: run_router(owner.folder, owner.charter, owner.data, theirs),
            owner.folder / "children" / "router",
            keep=(owner.data.fileno(), theirs.fileno()),
        )
        try:
            return pid, os.pidfd_open(pid)
        except OSError:
            fork.end(pid)
            raise

    def waits(self, now: float) -> list[float]:
        """Return after how many seconds a router is to be started, if so."""
        return [] if self._start_at is None else [self._start_at - now]

    def tick(self, now: float) -> None:
        """Start a router if that is due; tried again later if the machine lacks something."""
        if self._start_at is None or self._start_at > now:
            return
        self._start_at = None
        try:
            self._start()
        except OSError as error:
            self._close()
            self._start_later(str(error.strerror))

    def end_frozen(self, now: float) -> None:
        """Kill a router that does not move: its successor does."""
        if self.pid and self.frost.lasts(self.pid, now):
            fork.kill(self.pid)

    def _start_later(self, why: str) -> None:
        self._start_at = time.monotonic() + LATER
        if not self._put_off:
            self.owner.notice("shortage", None, f"the router cannot be started ({why}): tried again every {LATER:.0f} s")
        self._put_off = True

    def _reap(self) -> None:
        self.owner.selector.unregister(self.pidfd)
        os.close(self.pidfd)
        pid, status = os.waitpid(self.pid, 0)
        self.pid = 0
        failpoints.hit("supervisor.reaped_router")
        self._read()
        self._close()
        if self.owner.stopping:
            return
        if os.waitstatus_to_exitcode(status) == fork.SHORT:
            self._start_later("no descriptor, memory or room in the hub's folder")
        else:
            self._replace(pid, fork.exit_word(status))

    def _close(self) -> None:
        if self.stream is not None:
            with contextlib.suppress(KeyError, ValueError):  # it was not registered yet
                self.owner.selector.unregister(self.stream.sock)
            self.stream.close()
        self.stream = None

    def _replace(self, pid: int, word: str | int) -> None:
        """Start a successor at once, unless too many have died."""
        now = time.monotonic()
        self.deaths = [t for t in self.deaths if now - t < PERIOD] + [now]
        if len(self.deaths) >= DEATHS:
            self.owner.fail(f"the router died {DEATHS} times in {PERIOD:.0f} s, last with {word}")
            return
        self.owner.notice("death", None, f"the router (pid {pid}) ended with {word}; its successor takes over")
        self._start_at = now
        self.tick(now)

    def _read(self) -> None:
        for kind, header, _ in (self.stream.read() if self.stream is not None else None) or ():
            self._put_off = False
            if kind == frames.ANSWER:
                answer = _answer.decode(header)
                waiting = self.calls.pop(answer.id, None)
                if waiting is not None:
                    waiting[1](answer.result)
            elif kind == frames.PUSH:
                push = _push.decode(header)
                self.owner.heard(push.what, push.args)

    def ask(self, op: str, then: Callable[[Any], None], **args: object) -> None:
        """Call the router; the call is repeated to its successor if it dies before it has answered."""
        self._numbers += 1
        call = Call(self._numbers, op, args)
        self.calls[call.id] = (call, then)
        self._send(call)

    def tell(self, op: str, **args: object) -> None:
        """Call the router, without an answer."""
        self._send(Call(0, op, args))

    def _send(self, call: Call) -> None:
        if self.stream is not None:  # else its successor is told
            self.stream.send(frames.CALL, encode(call))

    def flush(self) -> None:
        """Write what waits, as far as the router reads it."""
        if self.stream is not None:
            self.stream.flush_or_watch(self.owner.selector)

    def let_close(self, deadline: float) -> None:
        """Let what was told be written, and give the router a moment to say goodbye to publishers."""
        if self.stream is None:
            return
        while self.stream.out and time.monotonic() < deadline:
            self.stream.flush()
        with contextlib.suppress(ChildProcessError):  # it is dead and reaped
            while time.monotonic() < deadline and not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.002)


def run_router(folder: Path, charter: Charter, listener: socket.socket, link: socket.socket) -> int:
    """Be the router's process; return its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        router = Router(folder, charter, listener, link)
        router.watch_hub(charter.hub_pid)
        router.run()
    except (OSError, lmdb.Error) as error:
        if not is_shortage(error):
            raise
        return fork.SHORT
    return 0
