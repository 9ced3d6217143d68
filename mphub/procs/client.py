"""The hub's side of its processes: starts the supervisor, calls it, hears what it pushes."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from pathlib import Path
from typing import Any

from mphub.errors import HubClosed, HubError, HubFailed, StartFailed
from mphub.procs import boot, fork
from mphub.wire import frames
from mphub.wire.frames import Answer, Call, Push, decoder, encode
from mphub.wire.stream import Line

DEATHS, PERIOD = 10, 10.0
"""Deaths of supervisors within seconds after which the hub is FAILED."""
TORN = 3
"""Times that a client comes back to a supervisor that says nothing."""
CLOSED_WITHIN = 5.0
"""Seconds for a supervisor to answer that it ends, and to end."""
LOOK_EVERY = 1.0
"""Seconds between looks whether the supervisor is frozen, while somebody waits for it."""
AGAIN_EVERY = 0.2
"""Seconds between tries to start a successor."""
_answer, _push = decoder(Answer), decoder(Push)


class Client:
    """A hub's line to its supervisor. Thread-safe."""

    def __init__(self, charter: boot.Charter, durable: Path | None, hear: Callable[[str, dict[str, Any]], None]) -> None:
        self.address, self._hear, self._charter = charter.address, hear, charter
        self.folder = Path(self.address.folder)
        self.states: dict[str, tuple[str, bytes, str]] = {}
        self.changed = threading.Condition()
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Future[Any], Call]] = {}
        self._ended: Exception | None = None
        self._closing = False
        self._deaths: list[float] = []
        self._torn = 0
        self._frost = fork.Frost()
        self._lock = threading.Lock()
        with contextlib.ExitStack() as undo:
            self.durable = (
                None if durable is None else undo.enter_context(contextlib.closing(boot.take_over(durable, synced=charter.power)))
            )
            boot.sweep(self.folder.parent)
            self._lock_of_folder = boot.make_folder(self.address, durable)
            undo.callback(self._remove_folder)
            self.process, self._line = self._launch()
            undo.pop_all()
        self._thread = threading.Thread(target=self._run, name="mphub-control", daemon=True)
        self._thread.start()

    def _launch(self) -> tuple[subprocess.Popen[bytes], Line]:
        process = boot.launch(self._charter)
        try:
            return process, self._connect()
        except BaseException as error:
            process.kill()
            code = process.wait()
            if isinstance(error, ConnectionError | FileNotFoundError):  # it died right after it had said that it lives
                raise StartFailed(f"the hub's supervisor ended as soon as it had started (exit {code})") from error
            raise

    def _connect(self) -> Line:
        line = Line.connect(self.address.control)
        line.send(frames.HELLO_CONTROL, self.address.token)
        return line

    def call(self, op: str, timeout: float | None = None, **args: object) -> Any:
        """Call the supervisor (or through it the router) and return the answer.

        Raises TimeoutError, HubClosed, HubFailed, HubError: this process was forked from the hub's.
        """
        return self.wait(self.ask(op, **args), timeout)

    def wait(self, answer: Future[Any], timeout: float | None = None) -> Any:
        """Wait for an answer; of a supervisor that is frozen meanwhile it comes from a successor.

        Raises TimeoutError, HubClosed, HubFailed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = LOOK_EVERY if deadline is None else min(LOOK_EVERY, max(0.0, deadline - time.monotonic()))
            try:
                return answer.result(left)
            except WaitTimeout:
                if self._frost.lasts(self.process.pid, time.monotonic()):
                    self.process.kill()
                if deadline is not None and time.monotonic() >= deadline:
                    raise

    def ask(self, op: str, **args: object) -> Future[Any]:
        if os.getpid() != self._pid:
            raise HubError(f"this process was forked from the hub's; {op} works in the one that made the hub")
        future: Future[Any] = Future()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            call = Call(next(self._numbers), op, args)
            self._waiting[call.id] = future, call
            with contextlib.suppress(OSError):  # the next supervisor hears it again
                self._line.send(frames.CALL, encode(call))
        return future

    def check(self) -> None:
        """Raise why there is no supervisor any more, if so."""
        if self._ended is not None:
            raise self._ended

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
        self._closing = True
        with contextlib.suppress(HubClosed, HubFailed, WaitTimeout):
            self.call("close", timeout=CLOSED_WITHIN)
        try:
            self.process.wait(CLOSED_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            boot.kill_recorded(self.folder)
        self._thread.join(2.0)
        self._remove_folder()
        if self.durable is not None:
            self.durable.close()

    def _run(self) -> None:
        """Read until the hub ends; whatever ends it, nobody waits for ever."""
        try:
            self._read()
        except BaseException as error:
            self._end(HubFailed(f"what the supervisor said cannot be read: {type(error).__name__}: {error}"))
            raise

    def _read(self) -> None:
        """Hear one supervisor after the other."""
        while True:
            while (got := self._line.receive()) is not None:
                self._torn = 0
                self._take(*got)
            self._line.close()
            if not self._reconnect() and not self._succeed():
                return

    def _take(self, kind: int, header: bytes, _: bytes) -> None:
        if kind == frames.ANSWER:
            answer = _answer.decode(header)
            waiting = self._waiting.pop(answer.id, None)
            if waiting is not None:
                waiting[0].set_result(answer.result)
        elif kind == frames.PUSH:
            push = _push.decode(header)
            self._heard(push.what, push.args)

    def _reconnect(self) -> bool:
        """Come back to a supervisor that lives: an interrupt in the middle of a call tears the stream."""
        if self._closing or self._ended is not None or self._torn >= TORN or self.process.poll() is not None:
            return False
        self._torn += 1
        try:
            self._go_on(self.process, self._connect())
        except OSError:
            return False
        return True

    def _go_on(self, process: subprocess.Popen[bytes], line: Line) -> None:
        """Repeat what is not answered; ask for what was pushed to nobody."""
        with self._lock:
            self.process, self._line = process, line
            for _, call in self._waiting.values():
                with contextlib.suppress(OSError):
                    line.send(frames.CALL, encode(call))
        with contextlib.suppress(HubClosed, HubFailed):
            self.ask("states").add_done_callback(self._learn)

    def _succeed(self) -> bool:
        """Start a supervisor in place of one that died, unless the hub ends; say whether there is one."""
        status = self._bury()
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < PERIOD] + [now]
        if self._closing or self._ended is not None or self._has_ended(status):
            self._end(HubClosed(f"hub {self.address.name!r} is not running any more: its supervisor ended"))
            return False
        word = fork.exit_word(status)
        if len(self._deaths) >= DEATHS:
            self._end(HubFailed(f"the supervisor died {DEATHS} times in {PERIOD:.0f} s, last with {word}"))
            return False
        message = f"the supervisor (pid {self.process.pid}) ended with {word}; its successor takes over, the subscribers start anew"
        self._hear("notice", {"kind": "death", "subscriber": None, "message": message, "details": {}})
        try:
            process, line = self._launch_again()
        except Exception as error:
            self._end(HubFailed(f"the supervisor ended with {word}, and no successor could be started: {error}"))
            return False
        self._go_on(process, line)
        return True

    def _learn(self, answer: Future[dict[str, dict[str, Any]]]) -> None:
        """Take in what a new supervisor may have pushed before it knew this client."""
        if answer.exception() is None:
            for name, found in answer.result().items():
                self._heard("state", {"name": name, **found})

    def _has_ended(self, status: int) -> bool:
        """Say whether a supervisor ended in order; a process that ignores SIGCHLD, or reaps all by itself, does not learn how."""
        return status == 0 and not self.folder.exists()

    def _launch_again(self) -> tuple[subprocess.Popen[bytes], Line]:
        """Start a successor; one that dies at its start is followed by the next, and what the machine lacks it may have again soon."""
        deadline = time.monotonic() + PERIOD
        while True:
            try:
                return self._launch()
            except (OSError, StartFailed):
                if self._closing or time.monotonic() > deadline:
                    raise
            boot.kill_recorded(self.folder)
            time.sleep(AGAIN_EVERY)

    def _bury(self) -> int:
        """Reap a supervisor and end what it leaves: its children die with it, what they had started does not. Return its wait status."""
        try:
            code = self.process.wait(5.0)
        except subprocess.TimeoutExpired:  # it closed its end, and lives
            self.process.kill()
            code = self.process.wait()
        if code or self.folder.exists():
            boot.kill_recorded(self.folder)
        return code << 8 if code >= 0 else -code

    def _remove_folder(self) -> None:
        """Remove what is left of the runtime folder, once its supervisor is gone."""
        boot.remove_folder(self.folder, self._lock_of_folder)

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
        for future, _ in waiting:
            future.set_exception(self._ended)
        with self.changed:
            self.changed.notify_all()
