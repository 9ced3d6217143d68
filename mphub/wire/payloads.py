"""How a hub's payloads and results become bytes and back: by one codec, which its maker chooses and no message can change.

Handlers, exceptions and snapshots are pickled in any case: they come from the user's own program.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec

from mphub.errors import PayloadError
from mphub.wire import codec
from mphub.wire.codec import Parts
from mphub.wire.frames import BLOB_MIN

B_co = TypeVar("B_co", covariant=True)


class Encode(Protocol[B_co]):
    def __call__(self, payload: object, what: str = ...) -> B_co: ...


@dataclass(frozen=True)
class Codec:
    """Two functions each way: for what lies in a frame, and for what lies in a file."""

    name: str
    encode: Encode[bytes]
    """Raises PayloadError."""
    encode_apart: Encode[bytes | Parts]
    """The same; large buffers stay where they are until they are written to a file."""
    loads: Callable[[Any], Any]
    """Load what ``encode`` made."""
    load_any: Callable[[Any], Any]
    """Load what ``encode_apart`` made."""
    has_views: bool = False
    """What is loaded may be views of what it was loaded from."""


class Buffer(Parts):
    """One large buffer, which lies in a file as it is."""

    def __init__(self, buffer: memoryview) -> None:
        self.pieces = [buffer]
        self._size = buffer.nbytes


def _by_msgspec(name: str, encoded: Callable[[object], bytes], loads: Callable[[Any], Any], takes: str) -> Codec:
    def encode(payload: object, what: str = "payload") -> bytes:
        try:
            return encoded(payload)
        except Exception as error:
            raise _refusal(name, takes, payload, what, error) from error

    return Codec(name, encode, encode, loads, loads)


def _raw(payload: object, what: str = "payload") -> bytes:
    if type(payload) is bytes:
        return payload
    return _copied(payload, what)


def _raw_apart(payload: object, what: str = "payload") -> bytes | Parts:
    if type(payload) is bytes:
        return payload
    if isinstance(payload, bytearray | memoryview):
        try:
            buffer = pickle.PickleBuffer(payload).raw()  # bytes, whatever its items are
        except (BufferError, ValueError):  # it has gaps, or is released
            return _copied(payload, what)
        if buffer.nbytes >= BLOB_MIN and memoryview(payload).c_contiguous:
            return Buffer(buffer)
    return _copied(payload, what)


def _copied(payload: object, what: str) -> bytes:
    try:
        if isinstance(payload, bytes | bytearray | memoryview):
            return bytes(payload)
        raise TypeError("it is none of them")
    except Exception as error:
        raise _refusal("raw", "bytes, bytearray or memoryview", payload, what, error) from error


def _refusal(name: str, takes: str, payload: object, what: str, error: Exception) -> PayloadError:
    return PayloadError(
        f"{what} cannot be sent with codec={name!r}: got {codec.short(payload)} ({type(error).__name__}: {error}); "
        f"expected {takes}; EventHub(codec='pickle') takes any Python object"
    )


CODECS: Final = {
    each.name: each
    for each in (
        Codec("pickle", codec.encode, codec.encode_apart, codec.loads, codec.load_any, has_views=True),
        _by_msgspec(
            "msgpack", msgspec.msgpack.encode, msgspec.msgpack.decode,
            "None, bool, int of 64 bits, float, str, bytes, and lists and dicts of them (or what becomes that: tuples, sets, dataclasses)",
        ),
        _by_msgspec(
            "json", msgspec.json.encode, msgspec.json.decode,
            "None, bool, int, float, str, and lists and dicts of them (or what becomes that: tuples, sets, dataclasses)",
        ),
        Codec("raw", _raw, _raw_apart, bytes, bytes),
    )
}  # fmt: skip
"""By name."""
