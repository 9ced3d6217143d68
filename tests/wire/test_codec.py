"""The codec: pickle where it does, cloudpickle where it must, and errors that name the object."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading

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
