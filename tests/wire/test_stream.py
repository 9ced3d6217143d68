"""Streams over real sockets: one side never blocks, the other reads whole frames."""

from __future__ import annotations

import itertools
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mphub.wire import frames
from mphub.wire.frames import ProtocolError, frame
from mphub.wire.stream import Frame, Line, Stream


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


def test_what_the_socket_does_not_take_is_kept_and_goes_later(pair: tuple[socket.socket, socket.socket]) -> None:
    stream, line = Stream(pair[0]), Line(pair[1])
    bodies = [bytes([n]) * 300_000 for n in range(40)]
    for body in bodies:
        stream.send(frames.DELIVER, b"", body)
    assert stream.out, "more than a socket takes"
    got: list[Frame | None] = []
    reader = threading.Thread(target=lambda: got.extend(line.receive() for _ in bodies))
    reader.start()
    while stream.out:
        stream.flush()
    reader.join(10)
    assert got == [(frames.DELIVER, b"", body) for body in bodies]


def test_reading_never_waits_and_tells_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    stream = Stream(pair[0])
    assert stream.read() == []
    pair[1].sendall(frame(frames.READY)[:4])
    assert stream.read() == []
    pair[1].sendall(frame(frames.READY)[4:])
    assert stream.read() == [(frames.READY, b"", b"")]
    pair[1].close()
    assert stream.read() is None


def test_garbage_is_a_protocol_error(pair: tuple[socket.socket, socket.socket]) -> None:
    stream = Stream(pair[0])
    pair[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ProtocolError):
        stream.read()


def test_sending_to_a_peer_that_is_gone_raises_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    stream = Stream(pair[0])
    pair[1].close()
    stream.send(frames.STOP)
    assert not stream.out


def test_a_line_says_whether_a_frame_is_there(pair: tuple[socket.socket, socket.socket]) -> None:
    line = Line(pair[1])
    assert not line.has_frame()
    pair[0].sendall(frame(frames.STOP) * 2)
    assert line.has_frame()
    assert line.receive() == (frames.STOP, b"", b"")
    assert line.has_frame(), "the second was read with the first"
    line.receive()
    assert not line.has_frame()
    pair[0].close()
    assert line.receive() is None


def test_a_frame_of_any_size_arrives_whole_between_others(pair: tuple[socket.socket, socket.socket]) -> None:
    stream, line = Stream(pair[0]), Line(pair[1])
    large = bytes(range(256)) * 12_000  # three times what one frame takes
    sent = [(frames.CALL, b"before", b""), (frames.ANSWER, large, b"!"), (frames.PUSH, b"", large), (frames.CALL, b"after", b"")]
    for each in sent:
        stream.send(*each)
    got: list[Frame | None] = []
    reader = threading.Thread(target=lambda: got.extend(line.receive() for _ in sent))
    reader.start()
    while stream.out:
        stream.flush()
    reader.join(10)
    assert got == sent


def test_parts_without_end_are_a_protocol_error(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mphub.wire.stream.MAX_WHOLE", 1000)
    stream = Stream(pair[0])
    pair[1].sendall(frame(frames.PART, frames.MORE, b"x" * 300) * 4)
    with pytest.raises(ProtocolError, match="in parts"):
        stream.read()


class Stopped(BaseException):
    """What a signal's handler raises, wherever the program is."""


def interrupted(step: int, call: Callable[[], Frame | None]) -> tuple[Frame | None, bool]:
    """Call something, and raise right before or behind its n-th call; return its result and whether that has come before."""
    left = step

    def count(_: object, event: str, __: object) -> None:
        nonlocal left
        left -= event in ("call", "c_return")
        if left == 0:
            sys.setprofile(None)
            raise Stopped

    sys.setprofile(count)
    try:
        return call(), False
    except Stopped:
        return None, True
    finally:
        sys.setprofile(None)


def first_of(line: Line) -> Frame | None:
    """Return the next frame, if it is there."""
    try:
        return line.first(time.monotonic())
    except TimeoutError:
        return None


def test_an_interrupt_at_any_step_of_reading_loses_and_doubles_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    line = Line(pair[1])
    bodies = [bytes([n]) * (n * 1000) for n in range(60)]
    whole = b"".join(frame(frames.DELIVER, b"", body) for body in bodies)
    got: list[bytes] = []
    steps, interrupts = itertools.cycle(range(1, 40)), 0
    for at in range(0, len(whole), 7919):
        pair[0].sendall(whole[at : at + 7919])
        while select.select([pair[1]], [], [], 0)[0] or line._ready or line._sizes:
            found, came = interrupted(next(steps), lambda: first_of(line))
            interrupts += came
            if found is not None:
                got.append(found[2])
                line.drop(found)
            elif not came:
                break  # half a frame
    assert got == bodies
    assert interrupts > 20


def test_a_stream_that_is_closed_disturbs_no_loop(pair: tuple[socket.socket, socket.socket]) -> None:
    unsent: set[Stream] = set()
    stream = Stream(pair[0], unsent)
    with selectors.DefaultSelector() as selector:
        selector.register(pair[0], selectors.EVENT_READ)
        for _ in range(40):
            stream.send(frames.PUSH, b"", bytes(300_000))
        stream.flush_or_watch(selector)
        assert unsent == {stream}
        selector.unregister(pair[0])
        stream.close()
        stream.send(frames.ANSWER)
        stream.put(frames.ANSWER)
    assert not unsent
