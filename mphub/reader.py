"""The reading end of a process's one stream: found, found again, and read by a thread of its own or by who waits for a reply."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil

from mphub import failpoints
from mphub.errors import HubClosed
from mphub.reply import Reply
from mphub.wire import frames
from mphub.wire.frames import HelloPublisher, encode
from mphub.wire.stream import Line, shut

if TYPE_CHECKING:
    from mphub.connection import Address, Connection

SILENCE = 10.0
"""Seconds without any answer after which a hub counts as gone."""
ASIDE = 0.005
"""Seconds after which the thread reads again when nobody else has."""


class Dialer:
    """Says hello to the router of a hub, in one publisher's name."""

    def __init__(self, address: Address, publisher: int) -> None:
        self.address, self.publisher = address, publisher
        self.pid = os.getpid()
        self._born = 0.0
        """When this process was; asked once, as that takes a descriptor."""

    def dial(self) -> Line:
        """Connect once.

        Raises OSError.
        """
        hello = self.hello()
        line = Line.connect(self.address.data)
        line.send(*hello)
        failpoints.hit("publisher.met")
        return line

    def hello(self) -> tuple[int, bytes]:
        """Return what it says, and as what."""
        if not self._born:
            self._born = psutil.Process().create_time()
        return frames.HELLO_PUBLISHER, encode(HelloPublisher(self.address.token, self.publisher, self.pid, self._born))

    def dial_first(self) -> Line:
        """Connect; wait while the hub is between two routers or two supervisors.

        Raises HubClosed.
        """
        deadline = time.monotonic() + SILENCE
        while True:
            try:
                return self.dial()
            except OSError as error:
                gone = isinstance(error, FileNotFoundError | ConnectionError)
                if not gone or not self.hub_lives() or time.monotonic() > deadline:
                    what = "is not running: start it first" if gone else "cannot be reached"
                    raise HubClosed(f"hub {self.address.name!r} {what} ({error.strerror})") from None
            time.sleep(0.01)

    def hub_lives(self) -> bool:
        """Say whether there is a hub at all: a stopped one has no folder."""
        return os.path.exists(self.address.folder) and is_alive(self.address.pid, self.address.started)


class Reader:
    """Reads for a connection until that ends.

    Whoever waits for a reply reads for itself while the thread stands aside (leader and follower): a reply that comes by way of a second
    thread costs another wake-up and a change of the GIL's owner, a fifth of a round trip. What is not for who waits makes the thread read
    again.
    """

    def __init__(self, owner: Connection, dialer: Dialer, line: Line) -> None:
        self._owner, self._dialer, self._line = owner, dialer, line
        self.is_ours = True
        """This is the process that reads: in a forked child no reply comes."""
        self._lock = threading.Lock()
        self._leader = 0
        """The thread that reads for itself; set and cleared without a call on the way, which an interrupt could follow."""
        self._led: Reply[Any] | None = None
        """The reply that it waits for."""
        self._aside = False
        """The thread does not read."""
        self._came = False
        """Somebody has wanted to lead since it last looked."""
        self._stirred = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mphub-publisher", daemon=True)
        self._thread.start()

    # -- the thread

    def _run(self) -> None:
        """Read until the connection ends; whatever ends it, nobody waits for ever."""
        try:
            self._read()
        except BaseException as error:
            name = self._dialer.address.name
            self._owner.end(HubClosed(f"this process's connection to hub {name!r} failed: {type(error).__name__}: {error}"))
            raise

    def _read(self) -> None:
        line: Line | None = self._line
        while line is not None and self.is_ours:
            self._stand_aside()
            got = line.first()
            if got is None:
                line = self._reconnect(line)
            else:
                self._owner.take(line, *got)
                line.drop(got)

    def _stand_aside(self) -> None:
        while not self._takes_over():
            self._stirred.wait(ASIDE)

    def _takes_over(self) -> bool:
        """Say whether it is this thread that reads now."""
        with self._lock:
            urgent = self._stirred.is_set()
            self._stirred.clear()
            self._aside = bool(self._leader) or (self._came and not urgent)
            self._came = False
            return not self._aside

    def stir(self) -> None:
        """Let the thread read again: somebody waits for something who does not read."""
        if self._aside:
            self._stirred.set()

    def hand_back(self, reply: Reply[Any]) -> None:
        """Let the thread read: somebody waits for a reply who does not."""
        self._owner.follow(reply)
        self.stir()

    # -- who waits for a reply

    def read_for(self, reply: Reply[Any], timeout: float | None) -> float | None:
        """Read in the calling thread, if nobody else does, until a reply is there; return what is left of the timeout (seconds)."""
        until = None if timeout is None else time.monotonic() + timeout
        me = threading.get_ident()
        nested = self._leader == me  # in a callback of another reply
        try:
            with self._lock:
                self._came = True
                if self._aside and not self._leader:
                    self._leader, self._led = me, reply
            if self._leader == me:
                with contextlib.suppress(TimeoutError):
                    self._read_until(reply, until, me)
            if not reply.done():
                self._owner.follow(reply)
        finally:
            if self._leader == me and not (nested and reply.done()):
                self._leader, self._led = 0, None
            if not reply.done() or self._owner.is_waited_for:
                self.stir()
        return None if until is None else max(0.0, until - time.monotonic())

    def _read_until(self, reply: Reply[Any], until: float | None, me: int) -> None:
        """Take what is for who waits; leave all else, and the end of the stream, to the thread.

        A frame is dropped when it has been taken: if an interrupt comes before, the thread takes it again.
        """
        line = self._line
        while self._leader == me and not reply.done():
            got = line.first(until)
            if got is None or not self._owner.take_for(reply, line, *got):
                return
            if self._leader == me:
                line.drop(got)

    def give_up(self, reply: Reply[Any]) -> None:
        """Let go who reads for a reply that is cancelled; on a new stream all that is unanswered comes again."""
        if self._led is reply and self._leader != threading.get_ident():
            shut(self._line.sock)

    # -- between two routers

    def _reconnect(self, old: Line) -> Line | None:
        """Connect again for as long as the hub lives; the owner resends what is unconfirmed."""
        old.close()
        self._owner.lose_line()
        deadline = time.monotonic() + SILENCE
        while not self._owner.is_over:
            try:
                line = self._dialer.dial()
                first = self._first_answer(line)
            except OSError:  # nobody holds the listening socket: between two supervisors
                if not self._dialer.hub_lives() or time.monotonic() > deadline:
                    break
                time.sleep(0.01)
                continue
            if first:
                self._line = line
                self._owner.adopt_line(line)
                return line
            line.close()
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self._owner.end(HubClosed(f"hub {self._dialer.address.name!r} is gone"))
        return None

    def _first_answer(self, line: Line) -> bool:
        """Take what a router says first, up to its confirm; say whether one reads this stream."""
        line.sock.settimeout(SILENCE)  # no MSG_DONTWAIT is used on it while it is timed
        try:
            while (got := line.receive()) is not None:
                self._owner.take(line, *got)
                if got[0] == frames.CONFIRM:
                    return True
            return False
        finally:
            line.sock.settimeout(None)


def is_alive(pid: int, started: float) -> bool:
    """Say whether that very process lives (numbers are reused)."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 0.5 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
