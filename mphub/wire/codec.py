"""Payloads, handlers and exceptions as bytes: pickle 5, cloudpickle where pickle cannot."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import traceback
from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import cache
from types import CodeType
from typing import Any

from mphub.errors import PayloadError, RemoteError
from mphub.wire.frames import BLOB_MIN

loads = pickle.loads
MOST_CHARS, MOST_BYTES = 20_000, 64 << 10
"""Of an exception's text and pickle: they go into notices and dead letters."""
MAGIC = b"\0mphub\0\1"
"""No pickle begins like this."""
ALIGNED = 64
SHORT_BYTES, STOP = tuple(pickle.PROTO + b"\5" + pickle.SHORT_BINBYTES + bytes([length]) for length in range(256)), pickle.STOP
"""Pickles of bytes, by length, around the bytes: half the time of ``dumps``, which makes a pickler for each."""
SCALARS = frozenset({bytes, str, int, float, bool, type(None)})
"""Types that pickle as they are, and never change: nothing of ``__main__`` can be in them."""
_HEAD = struct.Struct("<8sQ")
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Parts:
    """A pickle and the large buffers that it leaves out (PEP 574), as they lie in a file: nothing is copied on the way there.

    The file is a head (magic, lengths), the pickle, and each buffer at a multiple of 64 bytes.
    """

    def __init__(self, data: bytes, buffers: Sequence[memoryview]) -> None:
        parts = [memoryview(data), *buffers]
        lengths = [part.nbytes for part in parts]
        head = _HEAD.pack(MAGIC, len(lengths)) + struct.pack(f"<{len(lengths)}Q", *lengths)
        self.pieces = [memoryview(head)]
        self._size = len(head)
        for part in parts:
            padding = memoryview(bytes(-self._size % ALIGNED))
            self.pieces += [padding, part]
            self._size += padding.nbytes + part.nbytes

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        """Copy all: what must not change when its owner goes on."""
        return b"".join(self.pieces)


def encode(payload: object, what: str = "payload") -> bytes:
    """Pickle an object so that any process can load it.

    Classes and functions of ``__main__`` travel by value, as no other process imports it (35 + 21 us against 4).

    Raises PayloadError: it cannot be pickled.
    """
    try:
        data = pickle.dumps(payload, 5)
    except Exception:
        return encode_by_value(payload, what)
    return encode_by_value(payload, what) if names_main(data) else data


def encode_apart(payload: object, what: str = "payload") -> bytes | Parts:
    """Pickle an object; large buffers in it (of NumPy arrays, say) stay where they are until they are written to a file.

    Raises PayloadError: it cannot be pickled.
    """
    large: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= BLOB_MIN:
            large.append(raw)
        return raw.nbytes < BLOB_MIN

    try:
        data = pickle.dumps(payload, 5, buffer_callback=stays)
        by_value = names_main(data)
    except Exception:
        by_value = True
    if by_value:
        large.clear()
        data = encode_by_value(payload, what, stays)
    return Parts(data, large) if large else data


def load_any(data: Any) -> Any:
    """Load what ``encode`` or ``encode_apart`` made; of the latter, buffers are views of ``data``: writable if that is."""
    view = memoryview(data)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        return loads(view)
    _, count = _HEAD.unpack_from(view)
    at = _HEAD.size + 8 * count
    parts = []
    for length in struct.unpack_from(f"<{count}Q", view, _HEAD.size):
        at += -at % ALIGNED
        parts.append(view[at : at + length])
        at += length
    return loads(parts[0], buffers=parts[1:])


def names_main(data: bytes) -> bool:
    """Say whether a pickle may name what is in ``__main__``; one search, mostly: it costs as much as pickling."""
    return b"main__" in data and (b"__main__" in data or b"__mp_main__" in data)


def check_size(data: bytes | Parts, largest: int) -> None:
    """Refuse a pickle that no journal of the hub could take.

    Raises PayloadError.
    """
    if len(data) > largest:
        raise PayloadError(f"a payload of {len(data)} bytes exceeds what this hub admits ({largest} bytes): raise max_bytes")


def encode_by_value(payload: object, what: str, stays: Callable[[pickle.PickleBuffer], bool] | None = None) -> bytes:
    """Pickle with cloudpickle: lambdas, closures and what ``__main__`` defines."""
    try:
        file = io.BytesIO()
        _pickler()(file, 5, buffer_callback=stays).dump(payload)
        return file.getvalue()
    except Exception as error:
        raise PayloadError(
            f"{what} cannot be pickled: got {short(payload)} ({type(error).__name__}: {error}); "
            "expected plain data, or objects whose parts can be pickled; open files, locks, sockets and generators cannot be sent"
        ) from error


def encode_error(error: BaseException) -> bytes:
    """Pickle an exception; what cannot be pickled and loaded again, or is large, becomes a RemoteError with its text."""
    try:
        data = encode(error, "exception")
        loads(data)
    except Exception:
        data = b""
    if 0 < len(data) <= MOST_BYTES:
        return data
    return pickle.dumps(RemoteError(f"{type(error).__name__}: {_text(error)}"), 5)


def _text(error: BaseException) -> str:
    try:
        return shortened(str(error))
    except Exception as reason:
        return f"<str() raised {type(reason).__name__}>"


def shortened(text: str, most: int = MOST_CHARS) -> str:
    """Cut the middle out of a long text; its two ends tell most. What utf-8 cannot say is escaped."""
    if len(text) > most:
        text = f"{text[: most // 2]}\n... {len(text) - most} characters left out ...\n{text[-most // 2 :]}"
    return text.encode(errors="backslashreplace").decode()


def traceback_text(error: BaseException) -> str:
    """Format a traceback from the first frame that is not ours on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
        trace = trace.tb_next
    return shortened("".join(traceback.format_exception(type(error), error, trace)))


def _pickler() -> type[pickle.Pickler]:
    import cloudpickle  # 20 ms that most publishers never need

    script = sys.modules.get("__mp_main__")
    if script is not None and "__mp_main__" not in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.register_pickle_by_value(script)
    return _with_file_names(cloudpickle.Pickler)


@cache
def _with_file_names(base: Any) -> type[pickle.Pickler]:
    """Let code know the file that it is from: cloudpickle 3.1.3 leaves that out, and a traceback then shows no line."""
    reduce = base.dispatch_table[CodeType]

    class Pickler(base):  # type: ignore[misc]
        dispatch_table = ChainMap({CodeType: lambda code: (_code, (code.co_filename, *reduce(code)))}, base.dispatch_table)

    return Pickler


def _code(file: str, make: Callable[..., CodeType], args: tuple[Any, ...]) -> CodeType:
    return make(*args).replace(co_filename=file)


def short(value: object) -> str:
    return f"{type(value).__name__} {repr_of(value)[:80]}"


def repr_of(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<repr raised {type(error).__name__}>"
