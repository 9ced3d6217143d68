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
from pathlib import Path

import pytest

from mphub import Batch, EventHub, Restart, Retry
from mphub.store.archive import JsonLinesArchive, SqliteArchive
from tests.helpers import eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]
KILLS = 2


def rows(folder: Path) -> list[str]:
    return [row[0] for row in sqlite3.connect(folder / "events.db").execute("SELECT payload FROM events")]


def lines(folder: Path) -> list[int]:
    files = [(gzip.open if path.suffix == ".gz" else open)(path, "rb") for path in folder.glob("events.*jsonl*")]
    return [json.loads(line)["payload"] for file in files for line in file]


def test_archives_that_are_killed_hold_each_event_once(tmp_path: Path) -> None:
    made = {"rows": SqliteArchive(tmp_path / "events.db"), "lines": JsonLinesArchive(tmp_path / "events.jsonl", max_bytes="200KB")}
    hub, restart = EventHub(), Restart(max_restarts=1000, delay=0)
    kept = [hub.subscribe(">", each, name=name, batch=Batch(500, 0.02), retry=Retry(1000), restart=restart) for name, each in made.items()]
    enough, count = threading.Event(), itertools.count()

    def publish() -> None:
        while not enough.is_set():
            hub.publish_batch("numbers", list(itertools.islice(count, 100)))

    with hub:
        publisher = threading.Thread(target=publish)
        publisher.start()
        for archive in kept * KILLS:
            archive.wait_ready(20)
            before = archive.statistics().handled
            assert eventually(lambda archive=archive, before=before: archive.statistics().handled > before, 20)  # type: ignore[misc]
            time.sleep(random.expovariate(30))  # whatever moment that is
            os.kill(archive.statistics().pids[0], signal.SIGKILL)
        enough.set()
        publisher.join()
        statistics = hub.drain(60).subscribers
    events = list(range(next(count)))
    assert [(each.handled, each.dead, each.restarts) for each in statistics.values()] == [(len(events), 0, KILLS)] * 2
    assert sorted(map(int, rows(tmp_path))) == events
    assert sorted(lines(tmp_path)) == events
    assert not list(tmp_path.glob("*.tmp"))
