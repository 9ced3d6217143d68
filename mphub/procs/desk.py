"""The supervisor's control socket: hub objects and other clients call it here, and hear what happens."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Callable
from functools import partial

import msgspec

from mphub.wire import frames
from mphub.wire.frames import Answer, Call, ProtocolError, Push, decoder, encode
from mphub.wire.stream import Frame, Stream, peer_uid

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
        self.listener, self.token, self.selector, self.serve = listener, token, selector, serve
        self.clients: set[Stream] = set()
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def push(self, what: str, **args: object) -> None:
        """Tell every client."""
        frame = encode(Push(what, args))
        for stream in self.clients:
            if what != "output" or len(stream.out) < UNREAD:
                stream.send(frames.PUSH, frame)

    def flush(self) -> None:
        for stream in self.clients:
            stream.flush_or_watch(self.selector)

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        if peer_uid(sock) != os.getuid():
            sock.close()
            return
        stream = Stream(sock)
        self.selector.register(sock, selectors.EVENT_READ, partial(self._read, stream))

    def _read(self, stream: Stream) -> None:
        try:
            found = stream.read()
            for frame in found or ():
                self._handle(stream, frame)
        except (ProtocolError, msgspec.MsgspecError):
            found = None
        if found is None:
            self.clients.discard(stream)
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(stream.sock)
            stream.close()

    def _handle(self, stream: Stream, frame: Frame) -> None:
        kind, header, _ = frame
        if kind == frames.HELLO_CONTROL and header == self.token:
            self.clients.add(stream)
            return
        if stream not in self.clients or kind != frames.CALL:
            raise ProtocolError(f"kind {kind} from a stranger")
        call = _call.decode(header)
        self.serve(call, partial(self._answer, stream, call.id))

    def _answer(self, stream: Stream, number: int, result: object = None) -> None:
        stream.send(frames.ANSWER, encode(Answer(number, result)))
