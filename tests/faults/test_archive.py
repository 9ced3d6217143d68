"""An archive's process is killed at whatever moment: each event is kept, and kept once."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mphub import Batch, EventHub, Restart, Retry
from mphub.store.archive import Archive, JsonLinesArchive, SqliteArchive
from tests.helpers import eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]
KILLS = 4


def rows(folder: Path) -> list[str]:
    return [row[0] for row in sqlite3.connect(folder / "events.db").execute("SELECT payload FROM events")]


def lines(folder: Path) -> list[str]:
    files = [(gzip.open if path.suffix == ".gz" else open)(path, "rb") for path in folder.glob("events.*")]
    return [json.dumps(json.loads(line)["payload"]) for file in files for line in file]


def in_sqlite(folder: Path) -> Archive:
    return SqliteArchive(folder / "events.db")


def in_lines(folder: Path) -> Archive:
    return JsonLinesArchive(folder / "events.jsonl", max_bytes="200KB")


@pytest.mark.parametrize(("made", "kept"), [(in_sqlite, rows), (in_lines, lines)])
def test_an_archive_that_is_killed_holds_each_event_once(
    made: Callable[[Path], Archive], kept: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    hub, restart = EventHub(), Restart(max_restarts=1000, delay=0)
    archive = hub.subscribe(">", made(tmp_path), name="archive", batch=Batch(500, 0.02), retry=Retry(1000), restart=restart)
    enough, count = threading.Event(), itertools.count()

    def publish() -> None:
        while not enough.is_set():
            hub.publish_batch("numbers", list(itertools.islice(count, 100)))

    with hub:
        publisher = threading.Thread(target=publish)
        publisher.start()
        for _ in range(KILLS):
            archive.wait_ready(20)
            before = archive.statistics().handled
            assert eventually(lambda before=before: archive.statistics().handled > before, 20)  # type: ignore[misc]
            time.sleep(random.expovariate(30))  # whatever moment that is
            os.kill(archive.statistics().pids[0], signal.SIGKILL)
        enough.set()
        publisher.join()
        statistics = hub.drain(60).subscribers["archive"]
    events = next(count)
    assert (statistics.handled, statistics.dead, statistics.restarts) == (events, 0, KILLS)
    assert sorted(map(int, kept(tmp_path))) == list(range(events))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
