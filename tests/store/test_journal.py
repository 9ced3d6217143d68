"""The journal: both kinds say the same, a turn is all or nothing, and one process at a time has it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mphub.errors import JournalError
from mphub.store.journal import Counters, Journal, MemoryJournal

TABLE = st.sampled_from(["rows", "singles", "progress"])
KEY = st.integers(0, 12).map(lambda n: n.to_bytes(8, "big"))
VALUE = st.one_of(st.binary(max_size=50), st.integers(1900, 9000).map(bytes))
CALL = st.one_of(st.tuples(st.just("put"), TABLE, KEY, VALUE), st.tuples(st.just("delete"), TABLE, KEY))
MB = 1 << 20


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path, MB)
    yield journal
    journal.close()


def contents(journal: Journal | MemoryJournal) -> dict[str, list[tuple[bytes, bytes]]]:
    with journal.turn():
        return {table: list(journal.scan(table)) for table in ("rows", "singles", "progress")}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(CALL, max_size=8), max_size=8))
def test_both_kinds_hold_the_same_also_after_reopening(turns: list[list[tuple[str, str, bytes, bytes]]]) -> None:
    memory = MemoryJournal()
    with TemporaryDirectory() as folder:
        journal = Journal(folder, MB)
        before = journal.used
        for calls in turns:
            for kind in (journal, memory):
                with kind.turn():
                    for op, *args in calls:
                        getattr(kind, op)(*args)
        assert contents(journal) == contents(memory)
        assert journal.used - before == memory.used
        journal.close()
        again = Journal(folder, MB)
        assert contents(again) == contents(memory)
        assert again.used == journal.used
        again.close()


def test_a_turn_that_raises_leaves_nothing(journal: Journal) -> None:
    used = journal.used
    with pytest.raises(ZeroDivisionError), journal.turn():
        journal.put("rows", b"k", b"v")
        raise ZeroDivisionError
    assert contents(journal)["rows"] == []
    assert journal.used == used


def test_rows_are_scanned_in_order_from_and_to(journal: Journal) -> None:
    with journal.turn():
        for n in (3, 1, 2, 5):
            journal.put("rows", bytes([n]), b"")
        assert [key[0] for key, _ in journal.scan("rows", b"\x02", b"\x05")] == [2, 3]
        for key, _ in journal.scan("rows"):
            journal.delete("rows", key)  # while it is scanned
        assert list(journal.scan("rows")) == []


def test_appending_out_of_order_is_no_silence(journal: Journal) -> None:
    with journal.turn():
        journal.append("rows", b"b", b"")
        with pytest.raises(JournalError, match="not behind the last"):
            journal.append("rows", b"a", b"")


def test_outside_a_turn_nothing_is_touched(journal: Journal) -> None:
    with pytest.raises(JournalError, match="outside a turn"):
        journal.get("rows", b"k")


def test_no_second_process_opens_it(journal: Journal) -> None:
    code = f"from mphub.store.journal import Journal; Journal({str(journal.folder)!r}, 1 << 20)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "BlockingIOError" in found.stderr


def test_what_it_cannot_hold_raises_and_what_was_committed_stays(journal: Journal) -> None:
    with journal.turn():
        journal.put("rows", b"kept", b"v")
    with pytest.raises(lmdb.MapFullError), journal.turn():
        for n in range(1000):
            journal.put("rows", n.to_bytes(8, "big"), bytes(MB))
    assert contents(journal)["rows"] == [(b"kept", b"v")]


def test_a_format_from_elsewhere_is_refused(journal: Journal) -> None:
    with journal.turn():
        journal.put("meta", b"format", b"99")
    journal.close()
    with pytest.raises(JournalError, match="format b'99'"):
        Journal(journal.folder, MB)


def test_books_add_up() -> None:
    books = Counters()
    books.take_in(1, 5)
    books.take_in(2, 3)
    books.settle(1, 5)
    books.settle(2, 1)
    books.drop("purged", 1)
    assert (books.accepted, books.unfinished, books.pending, books.dropped) == (8, 2, {2: 2}, {"purged": 1})
