"""What archives write, what they refuse, and how the files of one that died are taken up again."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import pytest

from mphub import ArchiveError, EventHub, InvalidOption
from mphub.store import archive as archives
from mphub.store.archive import JsonLinesArchive, SqliteArchive
from tests.archives import lines, rows


@dataclass
class Order:
    number: int
    total: float


class Strange:
    def __repr__(self) -> str:
        raise ValueError("no")


def rotated(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.0*"))


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (Order(1, 2.5), '{"number":1,"total":2.5}'),
        (("a", {1}), '["a",[1]]'),
        (datetime(2026, 1, 2, tzinfo=UTC), '"2026-01-02T00:00:00Z"'),
        ("größe\n", '"größe\\n"'),
        (2**70, str(2**70)),
        (float("nan"), "null"),
        ({"of": b"\0\1"}, '{"of":"AAE="}'),
    ],
)
def test_what_json_can_say_is_json(payload: object, expected: str) -> None:
    assert archives.as_json(payload) == (expected, None)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"ab", "b'ab'"),
        (bytearray(b"ab"), "bytearray(b'ab')"),
        ("\ud800", "'\\ud800'"),
        (numpy.arange(3), "array([0, 1, 2])"),
        ([numpy.float32(1)], "[1.0]"),
        (1 + 2j, "(1+2j)"),
        (Strange(), "<repr raised ValueError>"),
    ],
)
def test_what_json_cannot_say_is_described_beside_its_pickle(payload: Any, expected: str) -> None:
    text, data = archives.as_json(payload)
    assert data is not None
    assert json.loads(text).replace("np.float32(1.0)", "1.0") == expected
    copy = pickle.loads(data)
    assert type(copy) is type(payload) and (isinstance(payload, Strange) or numpy.array_equal(copy, payload))


def test_a_long_description_is_cut() -> None:
    text, data = archives.as_json(b"x" * 1_000_000)
    assert len(text) < 1100 and data is not None and len(data) > 1_000_000


def test_an_event_that_comes_again_is_kept_once(tmp_path: Path) -> None:
    entries = [archives.Entry(f"{n:026x}", 1.0, "k", None, str(n), None) for n in range(250)]
    for part in (entries[:150], entries):
        for archive in (SqliteArchive(tmp_path / "events.db"), JsonLinesArchive(tmp_path / "events.jsonl", max_bytes="8KB", gzip=True)):
            archive.setup()
            archive.write(part)
            archive.teardown()
    assert [int(row[4]) for row in rows(tmp_path / "events.db")] == list(range(250))
    assert [line["payload"] for line in lines(*rotated(tmp_path), tmp_path / "events.jsonl")] == list(range(250))


def write(archive: JsonLinesArchive, first: int, last: int) -> None:
    """Be one life of an archive, for some events in batches of ten."""
    archive.setup()
    for start in range(first, last, 10):
        archive.write([archives.Entry(f"{n:026x}", 1.0, "k", None, str(n), None) for n in range(start, start + 10)])
    archive.teardown()


def test_files_are_rotated_and_compressed(tmp_path: Path) -> None:
    archive = JsonLinesArchive(tmp_path / "events.jsonl", max_bytes=3000)
    write(archive, 0, 200)
    assert [path.name for path in rotated(tmp_path)] == [f"events.{n:06d}.jsonl.gz" for n in range(1, len(rotated(tmp_path)) + 1)]
    assert len(rotated(tmp_path)) >= 4
    for path in rotated(tmp_path):
        assert 1500 < len(gzip.decompress(path.read_bytes())) <= 3000
    assert [line["payload"] for line in lines(*rotated(tmp_path), tmp_path / "events.jsonl")] == list(range(200))


@pytest.mark.parametrize("moment", ["renamed", "compressing", "compressed", "replaced", "cut", "nothing"])
def test_a_file_is_taken_up_wherever_a_death_left_it(moment: str, tmp_path: Path) -> None:
    current, first = tmp_path / "events.jsonl", tmp_path / "events.000001.jsonl"
    write(JsonLinesArchive(current), 0, 100)
    if moment == "cut":
        current.write_bytes(current.read_bytes()[:-20])
    elif moment != "nothing":
        current.rename(first)
        packed = gzip.compress(first.read_bytes())
        if moment == "compressing":
            Path(f"{first}.tmp").write_bytes(packed[: len(packed) // 2])
        elif moment == "compressed":
            Path(f"{first}.tmp").write_bytes(packed)
        elif moment == "replaced":
            first.write_bytes(packed)
    write(JsonLinesArchive(current), 50, 150)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["events.jsonl"] if moment in ("cut", "nothing") else [f"{first.name}.gz", "events.jsonl"]
    )
    assert [line["payload"] for line in lines(*rotated(tmp_path), current)] == list(range(150))


def test_what_a_process_may_hold_is_looked_for_over_files(tmp_path: Path) -> None:
    write(JsonLinesArchive(tmp_path / "events.jsonl", max_bytes=3000), 0, 100)
    paths = [tmp_path / "events.jsonl", *reversed(rotated(tmp_path))]
    for most in (5, 45, 100, 200):
        ids = list(archives.last_ids([str(path) for path in paths], most))
        assert sorted(int(each, 16) for each in ids) == list(range(max(0, 100 - most), 100))


def test_without_gzip_files_stay_plain(tmp_path: Path) -> None:
    write(JsonLinesArchive(tmp_path / "events.jsonl", max_bytes=3000, gzip=False, sync=True), 0, 100)
    assert {path.suffix for path in rotated(tmp_path)} == {".jsonl"}
    assert [line["payload"] for line in lines(*rotated(tmp_path), tmp_path / "events.jsonl")] == list(range(100))


@pytest.mark.parametrize("made", [SqliteArchive, JsonLinesArchive])
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"path": ""}, "path"),
        ({"path": 3}, "path"),
        ({"path": b"x"}, "path"),
        ({"path": "a\0"}, "path"),
        ({"path": "x", "sync": 1}, "sync"),
    ],
)
def test_nonsense_is_refused_at_once(made: Any, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidOption, match=rf"{made.__name__}\({field}\): got .*; expected"):
        made(**arguments)


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_bytes": "10%"}, {"max_bytes": float("nan")}, {"gzip": "yes"}])
def test_options_of_json_lines_are_checked(options: Any) -> None:
    with pytest.raises(InvalidOption, match=r"JsonLinesArchive\((max_bytes|gzip)\): got"):
        JsonLinesArchive("x", **options)


def test_an_archive_needs_batches(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="pass batch="):
        EventHub().subscribe(">", SqliteArchive(tmp_path / "events.db"), name="archive")


@pytest.mark.parametrize("made", [SqliteArchive, JsonLinesArchive])
@pytest.mark.parametrize(
    ("path", "reason"), [("missing/events", "no folder .*missing: make it first"), (".", "it is a folder"), ("/proc/events", "expected")]
)
def test_a_place_that_cannot_be_written_fails_the_start(made: Any, path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=rf"{made.__name__}\(.*\): .*{reason}"):
        made(tmp_path / path).setup()


@pytest.mark.parametrize("content", ["garbage" * 1000, None])
def test_somebody_elses_file_is_no_database_of_events(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "other"
    if content is not None:
        path.write_text(content)
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE events (name)")
    with pytest.raises(ArchiveError, match=r"(not a database|no (such )?column).*; expected a database of events"):
        SqliteArchive(path).setup()


def test_two_archives_do_not_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "PATIENCE", 0.05)
    first, second = JsonLinesArchive(tmp_path / "events.jsonl"), JsonLinesArchive(tmp_path / "events.jsonl")
    first.setup()
    first.write([])
    second.setup()
    with pytest.raises(ArchiveError, match="another process writes it"):
        second.write([])
    first.teardown()
    second.write([])
    second.teardown()


def test_what_finds_no_room_fails_whole_and_is_kept_once_there_is_some(tmp_path: Path) -> None:
    archive = JsonLinesArchive(tmp_path / "events.jsonl")
    write(archive, 0, 10)
    entries = [archives.Entry(f"{n:026x}", 1.0, "k", None, str(n), None) for n in range(10, 20)]
    size = (tmp_path / "events.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    archive.setup()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    try:
        with pytest.raises(ArchiveError, match="File too large; nothing of the batch was written"):
            archive.write(entries)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.path.getsize(archive.path) == size
    archive.write(entries)
    archive.teardown()
    assert [line["payload"] for line in lines(tmp_path / "events.jsonl")] == list(range(20))
