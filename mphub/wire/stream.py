"""Framed unix streams: ``Stream`` for single-threaded loops (never blocks), ``Line`` for a process with one connection (blocks)."""

from __future__ import annotations

import socket
import struct

from mphub.wire.frames import HEAD, MAX_FRAME, WIRE_KINDS, ProtocolError, frame

Frame = tuple[int, bytes, bytes]
"""(kind, header, body)."""
READ_SIZE = 256 << 10
SOCKET_BUFFER = 1 << 20


def cut(data: bytes) -> tuple[list[Frame], bytes]:
    """Cut whole frames off the front; return them and the rest.

    Raises ProtocolError: a head that none of ours sends.
    """
    found, at, end = [], 0, len(data)
    while end - at >= HEAD.size:
        size, kind, header = HEAD.unpack_from(data, at)
        if size > MAX_FRAME or header > size or kind not in WIRE_KINDS:
            raise ProtocolError(f"a frame of kind {kind} with {size} bytes, header {header}")
        body = at + HEAD.size + header
        if end - at - HEAD.size < size:
            break
        found.append((kind, data[at + HEAD.size : body], data[body : at + HEAD.size + size]))
        at += HEAD.size + size
    return found, data[at:] if at else data


class Stream:
    """One peer of a selector loop: reads what is there, keeps what the socket does not take."""

    __slots__ = ("_in", "out", "peer", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        enlarge(sock)
        self.sock = sock
        self.peer: object = None
        self._in = b""
        self.out = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    def read(self) -> list[Frame] | None:
        """Return the frames that arrived, or None at the end of the stream."""
        try:
            got = self.sock.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not got:
            return None
        found, self._in = cut(self._in + got if self._in else got)
        return found

    def send(self, kind: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        """Send, or keep for the next ``flush``."""
        self.out += frame(kind, header, body)
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the socket takes it."""
        try:
            while self.out:
                del self.out[: self.sock.send(self.out)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the peer is gone: reading will say so
            self.out.clear()

    def close(self) -> None:
        self.sock.close()


class Line:
    """The one connection of a process, used by blocking calls."""

    __slots__ = ("_in", "_ready", "sock")

    def __init__(self, sock: socket.socket) -> None:
        enlarge(sock)
        self.sock = sock
        self._in = b""
        self._ready: list[Frame] = []

    @classmethod
    def connect(cls, address: str) -> Line:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def receive(self) -> Frame | None:
        """Return the next frame, or None at the end of the stream."""
        while not self._ready:
            try:
                got = self.sock.recv(READ_SIZE)
            except OSError:
                return None
            if not got:
                return None
            found, self._in = cut(self._in + got if self._in else got)
            found.reverse()
            self._ready = found
        return self._ready.pop()

    def has_frame(self) -> bool:
        """Say whether a frame can be read without waiting."""
        if self._ready:
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
        shut(self.sock)
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
