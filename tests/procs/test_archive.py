"""Archives as subscribers of a hub: what they keep, whom they answer, how they fail."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from mphub import ArchiveError, Batch, EventHub, Restart, Retry, StartFailed
from mphub.store.archive import Entry, JsonLinesArchive, SqliteArchive
from tests.archives import SOON, lines, rows

pytestmark = pytest.mark.timeout(60)


@pytest.mark.procs
def test_replicas_share_a_database_but_no_file_of_lines(tmp_path: Path) -> None:
    with EventHub() as hub:
        hub.subscribe(">", SqliteArchive(tmp_path / "events.db"), name="rows", batch=SOON, replicas=2)
        hub.publish_batch("k", range(1000))
    assert sorted(int(row[4]) for row in rows(tmp_path / "events.db")) == list(range(1000))
    hub = EventHub()
    hub.subscribe(">", JsonLinesArchive(tmp_path / "a"), name="lines", batch=SOON, replicas=2, restart=Restart(max_restarts=0))
    with pytest.raises(StartFailed) as caught:
        hub.start()
    assert "replica 1 of 'lines' cannot write it too: subscribe it with replicas=1" in str(caught.value.__cause__)


class Full:
    """A disk on which a process has room for so many bytes, until there is a file that says otherwise."""

    def __init__(self, room: int, emptied: Path) -> None:
        self.room, self.emptied = room, emptied

    def __call__(self) -> None:
        if not self.emptied.exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.RLIM_INFINITY))


@pytest.mark.procs
def test_what_finds_no_room_is_a_dead_letter_and_is_kept_once_it_is_redriven(tmp_path: Path) -> None:
    path, emptied = tmp_path / "events", tmp_path / "emptied"
    hub = EventHub(check=False, initializer=Full(200_000, emptied))
    archive = hub.subscribe(">", SqliteArchive(path), name="archive", batch=SOON)
    with hub:
        hub.publish_batch("k", ["x" * 1000 + str(n) for n in range(400)])
        statistics = hub.drain(30).subscribers["archive"]
        assert 0 < statistics.dead < 400 == statistics.dead + statistics.handled
        error = archive.dead_letters()[0].error
        assert isinstance(error, ArchiveError) and "nothing of the batch was written" in str(error)
        emptied.touch()
        archive.restart()
        archive.wait_ready(20)
        archive.redrive()
        assert hub.drain(30).subscribers["archive"].dead == 0
    assert sorted(int(json.loads(row[4]).lstrip("x")) for row in rows(path)) == list(range(400))


class Moment:
    """Lets a process die, once, after it has written something before."""

    def __init__(self, mark: Path) -> None:
        self.mark, self.passed = mark, 0

    def come(self) -> bool:
        self.passed += 1
        if self.passed < 2 or self.mark.exists():
            return False
        self.mark.touch()
        return True

    def die(self) -> None:
        if self.come():
            os.kill(os.getpid(), signal.SIGKILL)


class DiesHalfway(JsonLinesArchive):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "events", sync=True)
        self.moment = Moment(folder / "mark")

    def _append(self, file: Any, data: bytes) -> None:
        if self.moment.come():
            file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super()._append(file, data)


class DiesWithLines(JsonLinesArchive):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "events")
        self.moment = Moment(folder / "mark")

    def write(self, entries: list[Entry]) -> None:
        super().write(entries)
        self.moment.die()


class DiesWithRows(SqliteArchive):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "events", sync=True)
        self.moment = Moment(folder / "mark")

    def write(self, entries: list[Entry]) -> None:
        super().write(entries)
        self.moment.die()


@pytest.mark.procs
def test_what_is_written_when_its_process_dies_is_not_written_again(tmp_path: Path) -> None:
    hub = EventHub()
    for kind in (DiesHalfway, DiesWithLines, DiesWithRows):
        (tmp_path / kind.__name__).mkdir()
        hub.subscribe(">", kind(tmp_path / kind.__name__), batch=Batch(20, 0.02), retry=Retry(5))
    with hub:
        hub.publish_batch("k", range(100))
        counts = hub.drain(30).subscribers.values()
    assert [(each.handled, each.restarts) for each in counts] == [(100, 1)] * 3
    assert [line["payload"] for line in lines(tmp_path / "DiesHalfway" / "events")] == list(range(100))
    assert [line["payload"] for line in lines(tmp_path / "DiesWithLines" / "events")] == list(range(100))
    assert [int(row[4]) for row in rows(tmp_path / "DiesWithRows" / "events")] == list(range(100))
