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

from mphub import failpoints
from mphub.procs import fork
from mphub.procs.router import Router
from mphub.wire import frames
from mphub.wire.frames import Answer, Call, Push, decoder, encode
from mphub.wire.stream import Stream

if TYPE_CHECKING:
    from mphub.procs.supervisor import Supervisor

DEATHS, PERIOD = 10, 10.0
"""Deaths of routers within seconds after which the hub is FAILED."""
_answer, _push = decoder(Answer), decoder(Push)


class Link:
    """The router's process as its parent sees it; each new one is told who died unsettled, what is still asked, and who lives."""

    def __init__(self, owner: Supervisor) -> None:
        self.owner = owner
        self.calls: dict[int, tuple[Call, Callable[[Any], None]]] = {}
        self.deaths: list[float] = []
        self._numbers = 0
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        owner = self.owner
        self.pid = fork.fork(
            lambda: run_router(owner.folder, owner.address.token, owner.data, theirs, owner.charter.max_bytes),
            owner.folder / "children" / "router",
            keep=(owner.data.fileno(), theirs.fileno()),
        )
        theirs.close()
        self.stream = Stream(ours)
        owner.selector.register(ours, selectors.EVENT_READ, self._read)
        self.pidfd = os.pidfd_open(self.pid)
        owner.selector.register(self.pidfd, selectors.EVENT_READ, self._reap)
        owner.tell_of_the_dead(self)
        for call, _ in self.calls.values():
            self._send(call)
        owner.tell_of_the_living(self)

    def _reap(self) -> None:
        self.owner.selector.unregister(self.pidfd)
        os.close(self.pidfd)
        _, status = os.waitpid(self.pid, 0)
        failpoints.hit("supervisor.reaped_router")
        self._read()
        self.owner.selector.unregister(self.stream.sock)
        self.stream.close()
        if self.owner.stopping:
            return
        now = time.monotonic()
        self.deaths = [t for t in self.deaths if now - t < PERIOD] + [now]
        if len(self.deaths) >= DEATHS:
            self.owner.fail(f"the router died {DEATHS} times in {PERIOD:.0f} s, last with {fork.exit_word(status)}")
            return
        self.owner.notice("death", None, f"the router (pid {self.pid}) ended with {fork.exit_word(status)}; its successor takes over")
        self._start()

    def _read(self) -> None:
        for kind, header, _ in self.stream.read() or ():
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
        self.stream.send(frames.CALL, encode(call))

    def let_close(self, deadline: float) -> None:
        """Let what was told be written, and give the router a moment to say goodbye to publishers."""
        while self.stream.out and time.monotonic() < deadline:
            self.stream.flush()
        with contextlib.suppress(ChildProcessError):  # it is dead and reaped
            while time.monotonic() < deadline and not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.002)


def run_router(folder: Path, token: bytes, listener: socket.socket, link: socket.socket, max_bytes: int) -> int:
    """Be the router's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Router(folder, token, listener, link, max_bytes).run()
    return 0
