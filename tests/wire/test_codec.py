"""The codec: pickle where it does, cloudpickle where it must, and errors that name the object."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest

from mphub.errors import PayloadError, RemoteError, RemoteTraceback, load_error
from mphub.wire import codec


def test_plain_data_is_a_plain_pickle() -> None:
    payload = {"a": [1, 2.5, None, b"x"], "b": ("é", {1})}
    assert codec.encode(payload) == pickle.dumps(payload, 5)


def test_lambdas_and_closures_travel_by_value() -> None:
    factor = 3
    assert pickle.loads(codec.encode(lambda n: n * factor))(2) == 6


def test_what_travels_by_value_knows_the_file_that_it_is_from() -> None:
    def outer() -> object:
        return lambda: None

    sent = pickle.loads(codec.encode(outer))
    assert sent.__code__.co_filename == sent().__code__.co_filename == __file__


def test_a_word_that_looks_like_main_does_no_harm() -> None:
    for payload in ("__main__", b"__mp_main__", {"main__": 1}):
        assert pickle.loads(codec.encode(payload)) == payload


def test_classes_of_a_script_can_be_loaded_where_the_script_is_not() -> None:
    script = (
        "import sys, enum\nfrom mphub.wire import codec\n"
        "class Point:\n    def __init__(self, x): self.x = x\n"
        "class Color(enum.Enum):\n    RED = 1\n"
        "sys.stdout.buffer.write(codec.encode((Point(3), Color.RED)))\n"
    )
    data = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    point, color = pickle.loads(data)
    assert (point.x, color.name) == (3, "RED")


@pytest.mark.parametrize("payload", [threading.Lock(), [iter(range(3)), (n for n in range(3))], {"lock": threading.Condition()}])
def test_what_cannot_be_pickled_is_named(payload: object) -> None:
    with pytest.raises(PayloadError, match="payload cannot be pickled: got") as caught:
        codec.encode(payload)
    assert type(payload).__name__ in str(caught.value)


def test_a_repr_that_raises_does_not_hide_the_error() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

        def __reduce__(self) -> str:
            raise TypeError("no")

    with pytest.raises(PayloadError, match="repr raised RuntimeError"):
        codec.encode(Mute())


class TwoArguments(Exception):
    """Pickles, but cannot be made again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} {second}")


def test_an_exception_that_cannot_be_loaded_again_travels_as_text() -> None:
    found = load_error(codec.encode_error(TwoArguments(1, 2)))
    assert isinstance(found, RemoteError)
    assert "TwoArguments: 1 2" in str(found)


def test_an_exception_comes_with_its_remote_traceback() -> None:
    found = load_error(codec.encode_error(KeyError("k")), "Traceback: there")
    assert isinstance(found, KeyError)
    assert isinstance(found.__cause__, RemoteTraceback)
    assert "there" in str(found.__cause__)


def array(size: int, **options: Any) -> Any:
    numpy = pytest.importorskip("numpy")
    return numpy.arange(size, dtype="u1", **options)


def file_of(data: bytes | codec.Parts) -> memoryview:
    """Return what a file of it holds, writable as a private map is."""
    return memoryview(bytearray(b"".join(data.pieces) if isinstance(data, codec.Parts) else data))


def test_large_buffers_are_left_where_they_are_and_small_ones_are_not() -> None:
    small, large = array(1000), array(100_000)
    assert isinstance(codec.encode_apart({"a": small}), bytes)
    data = codec.encode_apart({"small": small, "large": [large, large[::-1].copy()]})
    assert isinstance(data, codec.Parts)
    assert any(piece.obj is large or getattr(piece.obj, "base", None) is large for piece in data.pieces)
    assert len(data) == len(bytes(data)) == sum(piece.nbytes for piece in data.pieces)
    loaded = codec.load_any(file_of(data))
    assert loaded["small"].tobytes() == small.tobytes()
    assert [each.tobytes() for each in loaded["large"]] == [large.tobytes(), large[::-1].tobytes()]
    assert all(each.ctypes.data % codec.ALIGNED == loaded["large"][0].ctypes.data % codec.ALIGNED for each in loaded["large"])


def test_loaded_buffers_are_views_of_the_file_and_can_be_written_if_it_can() -> None:
    data = file_of(codec.encode_apart(array(100_000)))
    codec.load_any(data)[5] = 77
    assert codec.load_any(data)[5] == 77
    assert not codec.load_any(data.toreadonly()).flags.writeable


def test_parts_of_main_travel_by_value_and_their_buffers_apart() -> None:
    script = (
        "import sys, numpy\nfrom mphub.wire import codec\n"
        "class Named:\n    def __init__(self, data): self.data = data\n"
        "data = codec.encode_apart(Named(numpy.ones(100_000)))\n"
        "assert isinstance(data, codec.Parts)\n"
        "sys.stdout.buffer.write(bytes(data))\n"
    )
    pytest.importorskip("numpy")
    data = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    loaded = codec.load_any(data)
    assert (type(loaded).__name__, loaded.data.sum()) == ("Named", 100_000)


@pytest.mark.parametrize("payload", [None, b"", b"\0mphub\0\1", "x" * 100_000, bytes(100_000)])
def test_what_has_no_buffers_is_a_plain_pickle(payload: object) -> None:
    data = codec.encode_apart(payload)
    assert isinstance(data, bytes)
    assert codec.load_any(data) == payload
