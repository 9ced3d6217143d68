"""Codecs: what each takes, what arrives, and what it says of all else."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass

import pytest

from mphub import EventHub, InvalidOption, PayloadError
from mphub.wire.codec import Parts
from mphub.wire.frames import BLOB_MIN
from mphub.wire.payloads import CODECS
from tests.helpers import without_address

DATA = [None, True, 0, -5, 1 << 62, 1.5, "", "größe", [], [1, [2]], {}, {"a": [None, {"b": "c"}]}]


@dataclass
class Order:
    total: int


@pytest.mark.parametrize("name", ["pickle", "msgpack", "json"])
@pytest.mark.parametrize("payload", DATA, ids=repr)
def test_plain_data_arrives_as_it_was(name: str, payload: object) -> None:
    codec = CODECS[name]
    for data in (codec.encode(payload), bytes(codec.encode_apart(payload))):
        assert codec.loads(data) == codec.load_any(memoryview(data)) == payload


@pytest.mark.parametrize(
    ("name", "payload", "arrives"),
    [
        ("msgpack", (1, {2: b"x"}), [1, {2: b"x"}]),
        ("msgpack", Order(3), {"total": 3}),
        ("msgpack", math.inf, math.inf),
        ("json", (1, {2: "x"}), [1, {"2": "x"}]),
        ("json", Order(3), {"total": 3}),
        ("json", b"x", "eA=="),
        ("json", math.nan, None),
        ("raw", bytearray(b"x"), b"x"),
        ("raw", memoryview(b"abcd")[::2], b"ac"),
        ("raw", b"", b""),
    ],
)
def test_what_a_format_lacks_arrives_as_what_it_has(name: str, payload: object, arrives: object) -> None:
    codec = CODECS[name]
    for data in (codec.encode(payload), bytes(codec.encode_apart(payload))):
        got = codec.load_any(memoryview(data))
        assert got == arrives
        assert type(got) is type(arrives)


@pytest.mark.parametrize("name", ["msgpack", "json", "raw"])
@pytest.mark.parametrize("payload", [object(), print, 1j, "\ud800", {frozenset: 1}], ids=without_address)
def test_what_cannot_be_encoded_is_refused_in_words(name: str, payload: object) -> None:
    for encode in (CODECS[name].encode, CODECS[name].encode_apart):
        with pytest.raises(
            PayloadError, match=rf"^result cannot be sent with codec='{name}': got {type(payload).__name__} .*expected .*pickle"
        ):
            encode(payload, "result")


def test_a_payload_that_contains_itself_or_is_too_large_a_number_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    for name, payload in (("json", endless), ("msgpack", endless), ("msgpack", 1 << 64)):
        with pytest.raises(PayloadError, match="expected"):
            CODECS[name].encode(payload)


def test_raw_takes_nothing_but_bytes() -> None:
    for payload in ("text", 5, None, [1], released()):
        with pytest.raises(PayloadError, match="expected bytes, bytearray or memoryview"):
            CODECS["raw"].encode_apart(payload)


def released() -> memoryview:
    view = memoryview(b"x" * BLOB_MIN)
    view.release()
    return view


def test_large_raw_buffers_are_written_from_where_they_are() -> None:
    buffer = bytearray(b"ab" * BLOB_MIN)
    apart = CODECS["raw"].encode_apart(memoryview(buffer).cast("H"))
    assert isinstance(apart, Parts)
    assert len(apart) == len(buffer)
    buffer[:2] = b"xy"
    assert bytes(apart) == bytes(buffer)
    assert isinstance(CODECS["raw"].encode(buffer), bytes)
    assert CODECS["raw"].encode_apart(whole := bytes(buffer)) is whole


def test_no_other_codec_loads_a_pickle() -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("unpickled",)

    data = pickle.dumps(Hostile())
    for name in ("msgpack", "json"):
        for load in (CODECS[name].loads, CODECS[name].load_any):
            with pytest.raises(Exception, match=r"malformed|invalid"):
                load(data)
    assert CODECS["raw"].load_any(memoryview(data)) == data


@pytest.mark.parametrize("codec", ["jsn", "", None, 5, ["json"], "PICKLE"], ids=repr)
def test_a_codec_is_one_of_four(codec: object) -> None:
    with pytest.raises(InvalidOption, match=r"EventHub\(codec\): got .*expected one of 'pickle', 'msgpack', 'json', 'raw'"):
        EventHub(codec=codec)  # type: ignore[arg-type]
