"""A new folder is made of what can be read of a damaged one; nothing that is read of it ends the caller."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mphub import EventHub, HubExists, InvalidOption, JournalError
from mphub.procs.exchange import Exchange
from mphub.store import pages
from mphub.store.blobs import Blobs
from mphub.store.journal import TABLES, Journal
from mphub.store.salvage import salvage
from mphub.store.verify import Findings, read_tables, verify
from tests.notes import Record, lines

PAGE = mmap.PAGESIZE
EVENTS = 400
ALL = EVENTS + 3
"""With one that is late, one that is urgent, and one that is a file."""
pytestmark = pytest.mark.timeout(60)

PROGRAM = """
import os, signal, sys
from mphub import EventHub, Reject, Retention
from tests.notes import Record
def refuse(payload):
    raise Reject("no")
hub = EventHub(sys.argv[1], check=False, retention=Retention())
for name in ("notes", "others"):
    hub.subscribe("k", Record(sys.argv[2]), name=name)
hub.subscribe("dead", refuse, name="refuses")
hub.subscribe("done", len, name="done")
hub.start()
for n in range(200):
    hub.publish("done", "y" * 500, confirm=True)
hub.drain()
for name in ("notes", "others"):
    hub.subscription(name).pause()
for n in range(20):
    hub.publish("dead", n)
while hub.statistics().subscribers["refuses"].dead < 20:
    pass
for n in range(EVENTS):
    hub.publish("k", f"{n} " + "x" * 300, confirm=n % 4 == 0)
hub.publish("k", "late", delay=0.5)
hub.publish("k", "urgent", priority=5)
hub.publish("k", "blob" * 50_000)
hub.flush()
for pid in (*hub.statistics().pids.values(), os.getpid()):
    os.kill(pid, signal.SIGKILL)
""".replace("EVENTS", str(EVENTS))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a hub whose processes were killed while events of each kind waited."""
    path = tmp_path_factory.mktemp("filled")
    subprocess.run([sys.executable, "-c", PROGRAM, path / "hub", path / "notes"], check=False)
    return path / "hub"


def data_of(path: Path) -> Path:
    return path / "journal" / "data.mdb"


def tables(path: Path) -> dict[str, dict[bytes, bytes]]:
    journal = Journal(path / "journal", 1 << 24)
    with journal.turn():
        found = {name: dict(journal.scan(name)) for name in TABLES}
    journal.close()
    return found


def test_of_a_whole_folder_nothing_is_lost(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "old")
    found = salvage(tmp_path / "old", tmp_path / "new")
    assert (found.lost, found.lost_events, found.problems) == ({}, {}, [])
    assert found.waiting == {"notes": ALL, "others": ALL}
    old, new = tables(tmp_path / "old"), tables(tmp_path / "new")
    for name in set(TABLES) - {"meta", "publishers", "frames", "replies"}:
        assert (name, new[name]) == (name, old[name])
    assert all(new["meta"][key] == old["meta"][key] for key in (b"counters", b"history"))
    assert verify(tmp_path / "new").problems == []


def test_a_hub_handles_what_could_be_read_and_what_could_not_is_told(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "old")
    damage_pages(data_of(tmp_path / "old"), random.Random(7), share=0.15)
    before = contents(tmp_path / "old")
    found = salvage(tmp_path / "old", tmp_path / "new")
    assert contents(tmp_path / "old") == before
    with EventHub(tmp_path / "new", check=False) as hub:
        for name in ("notes", "others"):
            hub.subscribe("k", Record(tmp_path / name), name=name)
        hub.drain(20)
        hub.publish("k", "new", confirm=True)
        hub.drain(20)
        counts, letters = hub.statistics().subscribers, hub.dead_letters()
    least = ALL - (8 if any("last turn" in problem for problem in found.problems) else 0)
    for name in ("notes", "others"):
        handled = [text.split()[0] for text in lines(tmp_path / name)]
        told = found.waiting[name] + found.lost_events[name]
        assert least <= told <= ALL and 0 < found.waiting[name] == len(handled) - 1 < ALL
        assert len(set(handled)) == len(handled)
        assert counts[name].dropped == {"damaged": found.lost_events[name]}
        assert counts[name].accepted == told + 1 == counts[name].handled + found.lost_events[name]
    assert len(letters) == found.rows["dead"] == sum(one.dead for one in counts.values())  # who has them may be lost with them


def test_whatever_is_damaged_the_new_folder_is_whole_and_adds_up(filled: Path, tmp_path: Path) -> None:
    whole, salvaged = data_of(filled).read_bytes(), []
    shutil.copytree(filled, tmp_path / "old")
    for seed in range(50):
        dice = random.Random(seed)
        data_of(tmp_path / "old").write_bytes(whole)
        harm = dice.choice([damage_pages, flip_bits, cut_off, mix_pages])
        harm(data_of(tmp_path / "old"), dice)
        try:
            found = salvage(tmp_path / "old", tmp_path / f"{seed}")
        except JournalError:
            continue
        salvaged.append(found)
        assert (seed, problems_of(tmp_path / f"{seed}")) == (seed, [])
        assert harm is mix_pages or "done" not in found.waiting  # what was handled stays handled
        assert (seed, drop_all(tmp_path / f"{seed}")) == (seed, found.waiting)
    assert len(salvaged) > 40
    assert sum(sum(found.waiting.values()) for found in salvaged) > len(salvaged) * ALL  # more than half of it


def test_rows_below_a_damaged_branch_are_found_and_those_on_free_pages_are_not(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "old")
    data = data_of(tmp_path / "old")
    whole = bytearray(data.read_bytes())
    roots = roots_of(whole)
    for page in roots:
        whole[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    data.write_bytes(whole)
    found = salvage(tmp_path / "old", tmp_path / "new")
    assert found.waiting == {"notes": ALL, "others": ALL}
    assert roots and found.problems and not found.lost_events and not found.lost
    old, new = tables(filled), tables(tmp_path / "new")
    assert all(new[name] == old[name] for name in ("rows", "singles", "dead", "history", "history_ends"))


def test_what_a_disk_cannot_read_is_lost_like_what_is_damaged(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, size = os.pread, data_of(filled).stat().st_size
    bad = range(size // 2 // PAGE * PAGE, size // 2 // PAGE * PAGE + 9 * PAGE)

    def pread(file: int, length: int, at: int) -> bytes:
        if at < bad.stop and at + length > bad.start:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, length, at)

    monkeypatch.setattr(os, "pread", pread)
    found = salvage(filled, tmp_path / "new")
    monkeypatch.undo()
    shutil.copytree(filled, tmp_path / "old")
    with open(data_of(tmp_path / "old"), "r+b") as file:
        file.seek(bad.start)
        file.write(bytes(len(bad)))
    assert found == salvage(tmp_path / "old", tmp_path / "other") and found.problems


def test_events_whose_subscriber_cannot_be_read_wait_for_a_name_that_is_told(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "old")
    whole = bytearray(data_of(filled).read_bytes())
    walk = pages.Walk(whole)  # type: ignore[arg-type]
    for _, _, _, main in walk.metas():
        whole[main.root * PAGE : (main.root + 1) * PAGE] = bytes(PAGE)
    data_of(tmp_path / "old").write_bytes(whole)
    found = salvage(tmp_path / "old", tmp_path / "new")
    assert sum("salvaged-" in problem for problem in found.problems) >= 2
    name = next(name for name, count in found.waiting.items() if count == ALL)
    with EventHub(tmp_path / "new", check=False) as hub:
        hub.subscribe("k", Record(tmp_path / "notes"), name=name)
        hub.drain(20)
    assert len(lines(tmp_path / "notes")) == ALL


def test_a_row_whose_file_is_gone_is_told_and_not_written(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "old")
    for file in (tmp_path / "old" / "blobs").iterdir():
        file.unlink()
    found = salvage(tmp_path / "old", tmp_path / "new")
    assert found.lost_events == {"notes": 1, "others": 1}
    assert found.lost == {"rows": 1, "history": 1}
    assert "missing or cut off" in found.problems[0]


def test_what_cannot_be_salvaged_is_refused(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "old")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    for into in (tmp_path / "full", tmp_path / "full" / "thesis.txt", tmp_path / "old" / "new", tmp_path / "old"):
        with pytest.raises(InvalidOption, match="into: got"):
            salvage(tmp_path / "old", into)
    with pytest.raises(JournalError, match="no journal"):
        salvage(tmp_path / "full", tmp_path / "new")
    with EventHub(tmp_path / "old", check=False) as hub:
        with pytest.raises(HubExists, match="stop it first"):
            salvage(tmp_path / "old", tmp_path / "new")
        hub.stop(drain=False)
    (tmp_path / "old" / "format").write_text("99")
    with pytest.raises(JournalError, match="'99'"):
        salvage(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old" / "format").unlink()
    data_of(tmp_path / "old").write_bytes(bytes(3 * PAGE))
    with pytest.raises(JournalError, match="nothing of the journal"):
        salvage(tmp_path / "old", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["full", "old"]


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(path.rglob("*")) if file.is_file()}


def problems_of(path: Path) -> list[str]:
    """Verify a folder whose file is whole, in this process."""
    pages.check(data_of(path))
    found = Findings()
    read_tables(path / "journal", found)
    return found.problems


def drop_all(path: Path) -> dict[str, int]:
    """Take a folder up as a router does, and drop what waits; return how many that was, for each subscriber whose books add up."""
    exchange = Exchange(Journal(path / "journal", 1 << 24), Blobs(path / "blobs"), 1 << 24, time.time)
    with exchange.turn():
        exchange.begin_run(b"next")
    counts = {}
    for name, box in exchange.boxes.items():
        books = box.counters
        assert books.accepted == books.handled + books.dead + sum(books.dropped.values()) + books.unfinished
        with exchange.turn():
            counts[name] = exchange.drop_pending(box, "forgotten")
        assert not books.pending
    with exchange.turn():
        exchange.letters.purge(None, None)
        assert not list(exchange.journal.scan("rows")) and not list(exchange.journal.scan("singles"))
    assert all(not box.counters.dead for box in exchange.boxes.values())
    exchange.journal.close()
    return {name: count for name, count in counts.items() if count}


def roots_of(data: bytearray) -> list[int]:
    """Return the first pages of the tables in a file that have several."""
    walk = pages.Walk(data)  # type: ignore[arg-type]
    _, walk.last, _, main = max(walk.metas(), key=lambda meta: meta[0])
    walk.used = bytearray(len(data) // PAGE)
    trees = [pages.Tree.at(bytes(value), 0) for key, value in walk._entries(main) if bytes(key) in (b"rows", b"history", b"dead")]
    return [tree.root for tree in trees if tree.depth > 1]


def damage_pages(data: Path, dice: random.Random, share: float = 0.05) -> None:
    whole = bytearray(data.read_bytes())
    there = range(len(whole) // PAGE)
    for page in dice.sample(there, max(1, int(len(there) * share))):
        whole[page * PAGE : (page + 1) * PAGE] = dice.choice([dice.randbytes(PAGE), bytes(PAGE)])
    data.write_bytes(whole)


def flip_bits(data: Path, dice: random.Random) -> None:
    whole = bytearray(data.read_bytes())
    for _ in range(dice.choice([1, 10, 300])):
        whole[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
    data.write_bytes(whole)


def cut_off(data: Path, dice: random.Random) -> None:
    os.truncate(data, dice.randrange(data.stat().st_size // 2, data.stat().st_size))


def mix_pages(data: Path, dice: random.Random) -> None:
    """Put pages in each other's places, with their numbers as they were or as they should be."""
    whole = bytearray(data.read_bytes())
    for _ in range(5):
        a, b = dice.sample(range(len(whole) // PAGE), 2)
        first = dice.choice([0, 8])
        whole[a * PAGE + first : (a + 1) * PAGE] = whole[b * PAGE + first : (b + 1) * PAGE]
    data.write_bytes(whole)
