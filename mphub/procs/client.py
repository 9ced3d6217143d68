"""The hub's side of its processes: starts the supervisor, calls it, hears what it pushes."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from pathlib import Path
from typing import Any

from mphub.connection import Address
from mphub.errors import HubClosed, HubFailed
from mphub.procs import boot, fork
from mphub.wire import frames
from mphub.wire.frames import Answer, Call, Push, decoder, encode
from mphub.wire.stream import Line

_answer, _push = decoder(Answer), decoder(Push)


class Client:
    """A hub's line to its supervisor. Thread-safe."""

    def __init__(self, address: Address, max_bytes: int, ask: float, term: float, hear: Callable[[str, dict[str, Any]], None]) -> None:
        self.address, self._hear = address, hear
        self.states: dict[str, tuple[str, bytes, str]] = {}
        self.changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._ended: Exception | None = None
        self._lock = threading.Lock()
        boot.make_folder(Path(address.folder))
        pid = os.getpid()
        try:
            self.process = boot.launch(boot.Charter(address, pid, fork.start_ticks(pid), max_bytes, ask, term))
        except BaseException:
            remove_folder(address.folder)
            raise
        self._line = Line.connect(address.control)
        self._line.send(frames.HELLO_CONTROL, address.token)
        self._thread = threading.Thread(target=self._read, name="mphub-control", daemon=True)
        self._thread.start()

    def call(self, op: str, timeout: float | None = None, **args: object) -> Any:
        """Call the supervisor (or through it the router) and return the answer.

        Raises TimeoutError, HubClosed, HubFailed.
        """
        return self.ask(op, **args).result(timeout)

    def ask(self, op: str, **args: object) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            number = next(self._numbers)
            self._waiting[number] = future
            with contextlib.suppress(OSError):  # the reader ends what waits
                self._line.send(frames.CALL, encode(Call(number, op, args)))
        return future

    def wait_for_state(self, name: str, wanted: Callable[[str], bool], timeout: float | None) -> tuple[str, bytes, str]:
        """Wait until a subscriber's state pleases; return (state, error, traceback).

        Raises TimeoutError, HubClosed.
        """
        with self.changed:
            found = self.changed.wait_for(
                lambda: wanted(self.states.get(name, ("STARTING", b"", ""))[0]) or self._ended is not None, timeout
            )
            if self._ended is not None:
                raise self._ended
            if not found:
                raise WaitTimeout(f"subscriber {name!r} is {self.states.get(name, ('STARTING',))[0]} after {timeout} s")
            return self.states[name]

    def close(self) -> None:
        """End the hub's processes and wait for them."""
        with contextlib.suppress(HubClosed, HubFailed, WaitTimeout):
            self.call("close", timeout=5.0)
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            boot.kill_recorded(Path(self.address.folder))
        self._thread.join(2.0)
        remove_folder(self.address.folder)

    def _read(self) -> None:
        while (got := self._line.receive()) is not None:
            kind, header, _ = got
            if kind == frames.ANSWER:
                answer = _answer.decode(header)
                waiting = self._waiting.pop(answer.id, None)
                if waiting is not None:
                    waiting.set_result(answer.result)
            elif kind == frames.PUSH:
                push = _push.decode(header)
                self._heard(push.what, push.args)
        self._end(HubClosed(f"hub {self.address.name!r} is not running any more: its supervisor ended"))
        self._line.close()
        self._bury_supervisor()

    def _bury_supervisor(self) -> None:
        """End what a supervisor that was killed leaves: its children die with it, what they had started does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.process.wait(5.0) != 0:
                boot.kill_recorded(Path(self.address.folder))

    def _heard(self, what: str, args: dict[str, Any]) -> None:
        if what == "state":
            with self.changed:
                self.states[args["name"]] = (args["state"], args["error"], args["traceback"])
                self.changed.notify_all()
        elif what == "failed":
            self._end(HubFailed(args["message"]))
        else:
            self._hear(what, args)

    def _end(self, reason: Exception) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = reason
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(self._ended)
        with self.changed:
            self.changed.notify_all()


def remove_folder(folder: str) -> None:
    """Remove what is left of a runtime folder, once its supervisor is gone."""
    deadline = time.monotonic() + 1.0
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
