"""A listening socket in a selector loop, and those who have not said who they are."""

from __future__ import annotations

import errno
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterator

from mphub.wire.frames import ProtocolError
from mphub.wire.stream import Frame, Stream, peer_uid

HELLO_WITHIN = 5.0
"""Seconds after which a connection that has not said who it is is closed."""
LONGEST_HELLO = 64 << 10
"""Bytes that it may have sent by then."""
AT_ONCE = 100
"""Connections accepted in one turn: those who are in have their turn too."""
RESERVE = 32
"""Descriptors that are left to serve those who are in: for boards, files, processes."""
REST = 0.5
"""Seconds without a look at who knocks while nobody can be let in: a listening socket that is not accepted from wakes its loop at once."""


class Door:
    """Lets in who is of this user, and says who has been silent for too long."""

    def __init__(self, listener: socket.socket, selector: selectors.BaseSelector, data: object, tell: Callable[[str], None]) -> None:
        self.listener, self.selector, self.data, self.tell = listener, selector, data, tell
        self.strangers: dict[Stream, float] = {}
        self.unsent: set[Stream] = set()
        """Streams to which something has been written that may not be sent yet."""
        self._opens_at: float | None = None
        self._told = False
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, data)

    def accept(self) -> Iterator[Stream]:
        """Yield who comes in; when descriptors or memory run out, rest."""
        try:
            for _ in range(AT_ONCE):
                self._check_reserve()
                sock, _ = self.listener.accept()
                if peer_uid(sock) == os.geteuid():
                    stream = Stream(sock, self.unsent)
                    self.strangers[stream] = time.monotonic()
                    yield stream
                else:
                    sock.close()
                self._told = False
        except BlockingIOError:
            return
        except OSError as error:
            self._rest(error)

    def _check_reserve(self) -> None:
        """Raise OSError if too few descriptors are left: a new one has the lowest number that is free."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        free = os.dup(self.listener.fileno())
        os.close(free)
        if limit != resource.RLIM_INFINITY and free >= limit - min(RESERVE, limit // 4):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def _rest(self, error: OSError) -> None:
        self.selector.unregister(self.listener)
        self._opens_at = time.monotonic() + REST
        if not self._told:
            self._told = True
            self.tell(f"nobody can connect ({error.strerror}): tried again every {REST} s")

    def read(self, stream: Stream) -> list[Frame] | None:
        """Read a stream; a stranger must not fill the memory.

        Raises ProtocolError.
        """
        found = stream.read()
        if not found and stream in self.strangers and stream.unfinished > LONGEST_HELLO:
            raise ProtocolError(f"{stream.unfinished} bytes and no hello")
        return found

    def welcome(self, stream: Stream) -> None:
        """It has said who it is, or is gone."""
        self.strangers.pop(stream, None)

    def flush(self) -> None:
        """Write what waits, as far as the others read it."""
        for stream in list(self.unsent):
            stream.flush_or_watch(self.selector)

    def overdue(self) -> list[Stream]:
        """Open again if it is time; return who has been silent for too long."""
        now = time.monotonic()
        if self._opens_at is not None and self._opens_at <= now:
            self._opens_at = None
            self.selector.register(self.listener, selectors.EVENT_READ, self.data)
        return [stream for stream, since in self.strangers.items() if now - since >= HELLO_WITHIN]

    def due(self) -> list[float]:
        """Return when (by the monotonic clock) there is something to do here, if so."""
        times = [since + HELLO_WITHIN for since in self.strangers.values()][:1]  # the first is the oldest
        return times if self._opens_at is None else [*times, self._opens_at]
