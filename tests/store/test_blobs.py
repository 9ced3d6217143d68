"""Blob files: written whole, mapped privately, gone with their last reference and not before."""

from __future__ import annotations

from pathlib import Path

import pytest

from mphub.store.blobs import Blobs, References
from mphub.wire.frames import BLOB_MIN


def test_what_is_large_goes_to_a_file(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, 7)
    assert blobs.spill(bytes(BLOB_MIN - 1)) == (bytes(BLOB_MIN - 1), None)
    data, name = blobs.spill(bytes(BLOB_MIN))
    assert data == b""
    assert name is not None
    assert blobs.read(name) == bytes(BLOB_MIN)
    assert blobs.of_writer(7) == [name]
    assert blobs.of_writer(8) == []


def test_a_reader_may_write_and_nobody_sees_it(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    name = blobs.write(b"abc")
    blobs.read(name)[0:1] = b"x"
    assert bytes(blobs.read(name)) == b"abc"
    assert bytes(blobs.read(blobs.write(b""))) == b""


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", ".", "..", "a/b"])
def test_a_name_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no name of a blob"):
        Blobs(tmp_path).read(name)


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Blobs(tmp_path).write("no bytes")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_goes_with_its_last_reference_after_the_commit(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, 1)
    references = References(blobs)
    name = blobs.write(bytes(100))
    references.hold_for(5, name)
    references.hold(name)
    references.release(5)
    references.sweep()
    assert (references.bytes, len(list(tmp_path.iterdir()))) == (100, 1)
    references.drop(name)
    assert (references.bytes, len(list(tmp_path.iterdir()))) == (0, 1), "not before the commit"
    references.sweep()
    assert list(tmp_path.iterdir()) == []


def test_of_a_dead_writer_only_what_is_referred_to_stays(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, 1)
    references = References(blobs)
    kept, left, others = blobs.write(b"1"), blobs.write(b"2"), Blobs(tmp_path, 2).write(b"3")
    references.hold(kept)
    references.end_of_writer(1)
    references.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {kept, others}
    assert left not in {kept, others}
