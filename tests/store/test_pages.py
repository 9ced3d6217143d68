"""A journal's pages are checked without LMDB: one that does not belong to the others is found."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import pytest

from mphub.store import pages
from mphub.store.journal import Journal

PAGE = mmap.PAGESIZE
TABLES = ("rows", "singles", "progress", "dead")


def write_some(journal: Journal, dice: random.Random, rows: dict[bytes, str]) -> None:
    """Put and delete in some turns, so that pages are free, and used again."""
    for _ in range(40):
        with journal.turn():
            for _ in range(10):
                key = dice.randbytes(8)
                rows[key] = dice.choice(TABLES)
                journal.put(rows[key], key, dice.randbytes(dice.choice([10, 100, 1000, 9000])))
            while len(rows) > 100:
                key = dice.choice(sorted(rows))
                journal.delete(rows.pop(key), key)
            journal.put("meta", b"turns", dice.randbytes(8))


def test_a_whole_file_is_whole_and_one_with_pages_of_another_time_is_not(tmp_path: Path) -> None:
    journal, dice, rows = Journal(tmp_path, 1 << 24), random.Random(3), dict[bytes, str]()
    data = tmp_path / "data.mdb"
    write_some(journal, dice, rows)
    before = data.read_bytes()
    pages.check(data)
    write_some(journal, dice, rows)
    after = data.read_bytes()
    pages.check(data)
    journal.close()
    found = 0
    for _ in range(40):
        mixed = bytearray(after)
        for place in dice.sample(range(0, len(before), PAGE), 20):
            mixed[place : place + PAGE] = before[place : place + PAGE]
        data.write_bytes(mixed)
        try:
            pages.check(data)
        except pages.DamagedError:
            found += 1
    assert found >= 38  # of twenty that are put back some are used, nearly always


@pytest.mark.parametrize("left", [0, PAGE, 3 * PAGE])
def test_a_file_that_is_cut_off_is_damaged(left: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1 << 24)
    write_some(journal, random.Random(1), {})
    journal.close()
    (tmp_path / "data.mdb").write_bytes((tmp_path / "data.mdb").read_bytes()[:left])
    with pytest.raises(pages.DamagedError):
        pages.check(tmp_path / "data.mdb")
