"""Frames: cut anywhere they are the same; what no process of ours sends is refused on receipt."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mphub.wire import frames
from mphub.wire.frames import (
    BLOB_MIN,
    HEAD,
    MAX_FRAME,
    WIRE_KINDS,
    Batch,
    ProtocolError,
    ReplyRow,
    decoder,
    encode,
    frame,
    in_rows,
    join,
    split,
)
from mphub.wire.stream import Frame, cut

FRAMES = st.lists(st.tuples(st.sampled_from(sorted(WIRE_KINDS)), st.binary(max_size=40), st.binary(max_size=40)), max_size=5)


@given(FRAMES, st.lists(st.integers(1, 60)))
def test_frames_cut_anywhere_are_the_same(sent: list[Frame], sizes: list[int]) -> None:
    data = b"".join(frame(*one) for one in sent)
    received: list[Frame] = []
    rest = b""
    while data:
        size = sizes.pop(0) if sizes else len(data)
        found, rest = cut(rest + data[:size])
        received += found
        data = data[size:]
    assert (received, rest) == (sent, b"")


@pytest.mark.parametrize(
    "head",
    [
        HEAD.pack(MAX_FRAME + 1, frames.BATCH, 0),
        HEAD.pack(10, frames.BATCH, 11),
        HEAD.pack(10, 255, 0),
        HEAD.pack(10, 0, 0),
        b"\xff" * HEAD.size,
    ],
)
def test_a_head_that_none_of_ours_sends_is_refused_before_its_body_comes(head: bytes) -> None:
    with pytest.raises(ProtocolError):
        cut(head)


def test_the_largest_frame_passes() -> None:
    found, rest = cut(frame(frames.BATCH, b"h", bytes(MAX_FRAME - 1)))
    assert (len(found), rest) == (1, b"")


@given(st.lists(st.binary(max_size=300), max_size=300))
def test_a_body_is_a_list_of_opaque_bytes(events: list[bytes]) -> None:
    assert split(join(events)) == events


@given(st.binary(max_size=60))
def test_garbage_for_a_header_is_an_error_and_nothing_worse(data: bytes) -> None:
    try:
        found = decoder(Batch).decode(data)
    except Exception as error:
        assert type(error).__module__.startswith("msgspec")
    else:
        assert isinstance(found, Batch)


def test_a_header_travels_as_it_is() -> None:
    batch = Batch(1, 2, 3, 3, ["a", "b"], [0, 1], 4.5, 6, "target", True, True, "blob", 7, {0: frames.Extra("key", {"h": "v"})})
    assert decoder(Batch).decode(encode(batch)) == batch
    assert list(batch.runs()) == [("a", 0, 1), ("b", 1, 3)]
    assert [batch.key(index) for index in range(3)] == ["a", "b", "b"]


def test_random_bytes_never_do_more_than_end_a_stream() -> None:
    for _ in range(2000):
        try:
            cut(os.urandom(64))
        except ProtocolError:
            continue


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0, 1, 9, BLOB_MIN // 3, BLOB_MIN]), st.booleans()), max_size=12))
def test_replies_go_together_by_requester_and_none_gets_too_large(replies: list[tuple[int, int, bool]]) -> None:
    rows = [
        ReplyRow(publisher, number, "ok", b"" if is_file else bytes([number]) * size, f"file{number}" if is_file else None)
        for number, (publisher, size, is_file) in enumerate(replies)
    ]
    found = in_rows(rows)
    each = [
        ReplyRow(row.publisher, number, "ok", body, row.blob)
        for row in found
        for number, body in zip((row.number, *row.more), split(row.body) if row.more else [row.body], strict=True)
    ]
    assert sorted(each, key=lambda row: row.number) == rows
    assert all(len(row.body) < BLOB_MIN + 1000 for row in found if row.more)
    assert all(size < BLOB_MIN or not any(row.more for row in found if row.number == n) for n, (_, size, _) in enumerate(replies))
    if all(size < 10 for _, size, _ in replies):
        assert len([row for row in found if row.blob is None]) == len({publisher for publisher, _, is_file in replies if not is_file})
