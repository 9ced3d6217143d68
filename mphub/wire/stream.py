"""Framed unix streams: ``Stream`` for single-threaded loops (never blocks), ``Line`` for a process with one connection (blocks)."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import selectors
import socket
import struct
import time

from mphub.wire.frames import HEAD, LAST, MAX_FRAME, MAX_WHOLE, PART, WIRE_KINDS, ProtocolError, frame

Frame = tuple[int, bytes, bytes]
"""(kind, header, body)."""
READ_SIZE = 256 << 10
SOCKET_BUFFER = 1 << 20
LONGEST_POLL = 86_400.0
"""Seconds; poll() knows milliseconds of 31 bits."""


_arrived = memoryview(bytearray(READ_SIZE))
"""Where what a loop reads arrives, one stream after the other: a new object of this size for each read costs a map, faults and an unmap."""


def cut(data: bytes, largest: int = MAX_FRAME) -> tuple[list[Frame], bytes]:
    """Cut whole frames off the front; return them and the rest.

    Raises ProtocolError: a head that none of ours sends.
    """
    found, at, end = [], 0, len(data)
    while end - at >= HEAD.size:
        size, kind, header = HEAD.unpack_from(data, at)
        if size > largest or header > size or kind not in WIRE_KINDS:
            raise ProtocolError(f"a frame of kind {kind} with {size} bytes, header {header}")
        body = at + HEAD.size + header
        if end - at - HEAD.size < size:
            break
        found.append((kind, data[at + HEAD.size : body], data[body : at + HEAD.size + size]))
        at += HEAD.size + size
    return found, data[at:] if at else data


class Intake:
    """Makes frames of the bytes that arrive."""

    __slots__ = ("_parts", "_rest", "_size")

    def __init__(self) -> None:
        self._rest = b""
        self._parts: list[bytes] = []
        self._size = 0

    def __len__(self) -> int:
        return len(self._rest) + self._size

    def copy(self) -> Intake:
        other = Intake()
        other._rest, other._parts, other._size = self._rest, list(self._parts), self._size
        return other

    def take(self, got: bytes) -> list[Frame]:
        """Return the frames that are whole now."""
        found, self._rest = cut(self._rest + got if self._rest else got)
        for each in found:
            if each[0] == PART:
                return [whole for each in found for whole in self._joined(each)]
        return found

    def _joined(self, each: Frame) -> list[Frame]:
        kind, header, body = each
        if kind != PART:
            return [each]
        self._parts.append(body)
        self._size += len(body)
        if self._size > MAX_WHOLE:
            raise ProtocolError(f"a frame in parts of more than {MAX_WHOLE} bytes")
        if header != LAST:
            return []
        found, _ = cut(b"".join(self._parts), MAX_WHOLE)
        self._parts, self._size = [], 0
        return found


class Stream:
    """One peer of a selector loop: reads what is there, keeps what the socket does not take."""

    __slots__ = ("_in", "_unsent", "_watched", "out", "peer", "sock")

    def __init__(self, sock: socket.socket, unsent: set[Stream] | None = None) -> None:
        """Take a socket; ``unsent`` is where its loop finds the streams to flush."""
        sock.setblocking(False)
        enlarge(sock)
        self.sock = sock
        self.peer: object = None
        self._in = Intake()
        self._unsent = unsent if unsent is not None else set()
        self._watched = False
        self.out = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def unfinished(self) -> int:
        """Bytes that have arrived of a frame that is not whole."""
        return len(self._in)

    def read(self) -> list[Frame] | None:
        """Return the frames that arrived, or None at the end of the stream."""
        try:
            got = bytes(_arrived[: self.sock.recv_into(_arrived)])
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not got:
            return None
        return self._in.take(got)

    def send(self, kind: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        """Send, or keep for the next ``flush`` what the socket does not take; a body is not copied on the way."""
        size = len(header) + len(body)
        if self.out or size > MAX_FRAME:
            self.put(kind, header, body)
            self.flush()
            return
        head = HEAD.pack(size, kind, len(header)) + header
        try:
            sent = self.sock.sendmsg((head, body))
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:  # the peer is gone: reading will say so
            return
        if sent < len(head) + len(body):
            self.out += memoryview(head + body)[sent:]
            self._unsent.add(self)

    def put(self, kind: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        """Keep for the next ``flush``."""
        self.out += frame(kind, header, body)
        self._unsent.add(self)

    def flush(self) -> None:
        """Write what waits, as far as the socket takes it."""
        try:
            while self.out:
                del self.out[: self.sock.send(self.out)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the peer is gone: reading will say so
            self.out.clear()

    def flush_or_watch(self, selector: selectors.BaseSelector) -> None:
        """Write what waits; let the selector watch for room while something is left, and only then."""
        if self.out:
            self.flush()
        waits = bool(self.out)
        if waits != self._watched:
            self._watched = waits
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if waits else 0)
            selector.modify(self.sock, events, selector.get_key(self.sock).data)
        if not waits:
            self._unsent.discard(self)

    def close(self) -> None:
        self._unsent.discard(self)
        self._unsent = set()  # what is still written goes nowhere, and nobody flushes it
        self.sock.close()


class Line:
    """The one connection of a process, used by blocking calls."""

    __slots__ = ("_in", "_ready", "_sizes", "_view", "sock")

    def __init__(self, sock: socket.socket) -> None:
        enlarge(sock)
        self.sock = sock
        self._view = memoryview(bytearray(READ_SIZE))
        self._sizes: list[int] = []
        """How many bytes have arrived there, until frames are made of them."""
        self._in = Intake()
        self._ready: list[Frame] = []

    @classmethod
    def connect(cls, address: str) -> Line:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
            if peer_uid(sock) != os.geteuid():  # the folder has ended, and somebody else has made one of its name
                raise PermissionError(errno.EPERM, "it belongs to another user")
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def receive(self, until: float | None = None) -> Frame | None:
        """Return the next frame, or None at the end of the stream.

        Raises TimeoutError: it has not come by then, on the monotonic clock.
        """
        got = self.first(until)
        if got is not None:
            self.drop(got)
        return got

    def first(self, until: float | None = None) -> Frame | None:
        """Return the next frame and keep it, or None at the end of the stream; an interrupt (Ctrl-C) at any moment loses nothing.

        Raises TimeoutError: it has not come by then, on the monotonic clock.
        """
        while not self._ready:
            if not self._sizes:
                if until is not None and not self._is_readable(until - time.monotonic()):
                    raise TimeoutError
                try:
                    self._sizes.extend(map(self.sock.recv_into, (self._view,)))  # one step: read, and known to be
                except OSError:
                    return None
            if not self._sizes[0]:
                return None
            intake = self._in.copy()
            found = intake.take(bytes(self._view[: self._sizes[0]]))
            found.reverse()
            # no call in this line: an interrupt comes after one
            self._in, self._ready, self._sizes = intake, found, []
        return self._ready[-1]

    def drop(self, frame: Frame) -> None:
        """Take off the next frame, if it is still this one."""
        if self._ready and self._ready[-1] is frame:
            self._ready.pop()

    def _is_readable(self, seconds: float) -> bool:
        """Wait so long until something arrives, be it the end; say whether it has."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(min(max(0.0, seconds), LONGEST_POLL) * 1000))

    def has_frame(self) -> bool:
        """Say whether a frame can be read without waiting."""
        if self._ready or self._sizes:
            return True
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except OSError:
            return True

    def send(self, kind: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        """Send a whole frame; an exception in the middle closes the stream, as half a frame tears it."""
        try:
            self.sock.sendall(frame(kind, header, body))
        except BaseException:
            shut(self.sock)
            raise

    def close(self) -> None:
        """End the connection, also if user code has closed its descriptor."""
        shut(self.sock)
        with contextlib.suppress(OSError):
            self.sock.close()


def enlarge(sock: socket.socket) -> None:
    """Ask for room for some batches, so that a busy peer does not stop the other side."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)


def shut(sock: socket.socket) -> None:
    """End a connection for both sides, whoever else holds its descriptor."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def peer_uid(sock: socket.socket) -> int:
    """Return the user id at the other end (SO_PEERCRED)."""
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
