"""The supervisor's control socket: hub objects and other clients call it here, and hear what happens."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable
from functools import partial

from mphub.procs.door import Door
from mphub.wire import frames
from mphub.wire.calls import check
from mphub.wire.frames import UNREADABLE, Answer, Call, ProtocolError, Push, decoder, encode
from mphub.wire.stream import Frame, Stream

UNREAD = 1 << 20
"""Bytes of output lines that may wait for a client that does not read; what exceeds them is dropped."""
_call = decoder(Call)
Reply = Callable[..., None]
"""Answers a call: ``reply(result)``."""


class Desk:
    """Takes calls of clients that know the token; pushes to all of them."""

    def __init__(
        self, listener: socket.socket, token: bytes, selector: selectors.BaseSelector, serve: Callable[[Call, Reply], None]
    ) -> None:
        self.token, self.selector, self.serve = token, selector, serve
        self.clients: set[Stream] = set()
        self.door = Door(listener, selector, self._accept, lambda message: self.push("log", level="error", message=message))

    def push(self, what: str, **args: object) -> None:
        """Tell every client."""
        frame = encode(Push(what, args))
        for stream in self.clients:
            if what != "output" or len(stream.out) < UNREAD:
                stream.send(frames.PUSH, frame)

    def flush(self) -> None:
        self.door.flush()

    def _accept(self) -> None:
        for stream in self.door.accept():
            self.selector.register(stream.sock, selectors.EVENT_READ, partial(self._read, stream))

    def close_silent(self) -> None:
        """Close who has not said who it is for too long."""
        for stream in self.door.overdue():
            self._drop(stream)

    def _read(self, stream: Stream) -> None:
        try:
            found = self.door.read(stream)
            for frame in found or ():
                self._handle(stream, frame)
        except UNREADABLE:
            found = None
        if found is None:
            self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        self.clients.discard(stream)
        self.door.welcome(stream)
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(stream.sock)
        stream.close()

    def _handle(self, stream: Stream, frame: Frame) -> None:
        kind, header, _ = frame
        if kind == frames.HELLO_CONTROL and header == self.token:
            self.clients.add(stream)
            self.door.welcome(stream)
            return
        if stream not in self.clients or kind != frames.CALL:
            raise ProtocolError(f"kind {kind} from a stranger")
        call = _call.decode(header)
        check(call)
        self.serve(call, partial(self._answer, stream, call.id))

    def _answer(self, stream: Stream, number: int, result: object = None) -> None:
        stream.send(frames.ANSWER, encode(Answer(number, result)))
