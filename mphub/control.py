"""A hub that another program runs, called over its control socket."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mphub.asking import Asking
from mphub.connection import Address, connection_to
from mphub.core.keys import nearest
from mphub.errors import HubClosed, InvalidOption, NoSubscriber
from mphub.procs.boot import OPEN
from mphub.reader import SILENCE, is_alive
from mphub.store.blobs import Blobs
from mphub.wire import frames
from mphub.wire.frames import Answer, Call, decoder, encode
from mphub.wire.payloads import CODECS
from mphub.wire.stream import Line

LOOK_EVERY = 0.02
"""Seconds between looks whether a hub has ended, or listens again."""
_answer = decoder(Answer)


class Control(Asking):
    """Calls a hub's supervisor, or the one that follows it; no thread of its own, one call at a time."""

    def __init__(self, address: Address) -> None:
        self.address, self.codec = address, CODECS[address.codec]
        self.connection = connection_to(address)
        self.blobs = Blobs(f"{address.folder}/blobs", int.from_bytes(os.urandom(8), "big"))
        self._line: Line | None = None
        self._number = 0

    # -- calls

    def begin(self, op: str, **args: object) -> Callable[[float | None], Any]:
        self._number += 1
        call = Call(self._number, op, args)
        self._send(call)
        return partial(self._wait, call)

    def _send(self, call: Call) -> None:
        """Send a call, on a new line if need be; wait while the hub is between two supervisors.

        Raises HubClosed.
        """
        deadline = time.monotonic() + SILENCE
        while True:
            try:
                if self._line is None:
                    self._line = Line.connect(self.address.control)
                    self._line.send(frames.HELLO_CONTROL, self.address.token)
                self._line.send(frames.CALL, encode(call))
                return
            except OSError:
                self._hang_up()
                if not self.runs() or time.monotonic() > deadline:
                    raise HubClosed(f"hub {self.address.name!r} is not running any more") from None
            time.sleep(LOOK_EVERY)

    def _wait(self, call: Call, timeout: float | None) -> Any:
        """Wait for an answer; what is pushed meanwhile is for others.

        Raises TimeoutError, HubClosed.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            got = self._line.receive(until) if self._line is not None else None
            if got is None:
                self._hang_up()
                self._send(call)
            elif got[0] == frames.ANSWER and (answer := _answer.decode(got[1])).id == call.id:
                return answer.result

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    # -- to subscribers

    def start(self, name: str) -> None:
        """Start what was stopped, or is FATAL."""
        host, _ = self.place_of(name)
        if host is None:
            self.call("start", name=name)
        else:
            self.restart(name)

    def stop(self, name: str) -> None:
        """End a subscriber's processes until it is started again; what comes for it waits, as with ``pause``.

        Raises InvalidOption.
        """
        if self.place_of(name)[0] is not None:
            raise InvalidOption(f"{name!r} shares a process (process=), which goes on for the others: pause it instead")
        self.call("stop", name=name)

    # -- the hub

    def place_of(self, name: str) -> tuple[str | None, str]:
        """Say where a subscriber is.

        Raises NoSubscriber.
        """
        found = self.call("statistics")["subscribers"]
        self.check_name(name, found)
        return found[name]["process"], found[name]["own"]

    def state_of(self, name: str) -> tuple[str, bytes, str]:
        host, own = self.place_of(name)
        found = self.call("states")[name if own else host or name]
        return found["state"], found["error"], found["traceback"]

    def check_name(self, name: str, names: Any) -> None:
        """Refuse a name that nobody has.

        Raises NoSubscriber.
        """
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}?" if near else f"its subscribers: {', '.join(names) or 'none'}"
            raise NoSubscriber(f"name: got {name!r}, which nobody of hub {self.address.name!r} is called; {hint}")

    def seconds_up(self) -> float:
        """Return since when it can be found."""
        return max(0.0, time.time() - Path(self.address.folder, OPEN).stat().st_mtime)

    def runs(self) -> bool:
        return os.path.exists(self.address.folder) and is_alive(self.address.pid, self.address.started)

    def end(self, timeout: float | None) -> None:
        """Ask its process to stop, as a service manager does, and wait until it has ended; seconds.

        Raises TimeoutError.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.address.pid, signal.SIGTERM)
        while self.runs():
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"hub {self.address.name!r} has not ended within {timeout:g} s: a second SIGTERM ends it at once")
            time.sleep(LOOK_EVERY)
