"""Archives as subscribers of a hub: what they keep, whom they answer, how they fail."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mphub import Batch, EventHub, Restart, StartFailed
from mphub.store.archive import JsonLinesArchive, SqliteArchive
from tests.archives import SOON, lines, rows

pytestmark = pytest.mark.timeout(60)


def test_both_keep_what_is_published_by_every_engine(tmp_path: Path, engine: str) -> None:
    began = time.time()
    hub = EventHub(engine=engine)
    hub.subscribe(">", SqliteArchive(tmp_path / "events.db"), name="rows", batch=Batch(100, 0.02))
    hub.subscribe(">", JsonLinesArchive(tmp_path / "events.jsonl"), name="lines", batch=Batch(100, 0.02))
    with hub:
        ids = [str(hub.publish("orders.eu", {"number": 1, "total": 2.5}, headers={"trace": "7"})), str(hub.publish("orders.us", None))]
        hub.publish_batch("more", range(250))
    kept, told = rows(tmp_path / "events.db"), lines(tmp_path / "events.jsonl")
    assert [(row[0], *row[2:]) for row in kept[:2]] == [
        (ids[0], "orders.eu", '{"trace":"7"}', '{"number":1,"total":2.5}', None),
        (ids[1], "orders.us", None, "null", None),
    ]
    assert [int(row[4]) for row in kept[2:]] == list(range(250))
    assert told[0] == {
        "id": ids[0],
        "time": kept[0][1],
        "key": "orders.eu",
        "headers": {"trace": "7"},
        "payload": {"number": 1, "total": 2.5},
    }
    assert told[1] == {"id": ids[1], "time": kept[1][1], "key": "orders.us", "payload": None}
    assert [line["payload"] for line in told[2:]] == list(range(250))
    assert began <= kept[0][1] <= time.time()


def test_they_answer_nobody_who_asks_a_key_and_all_who_ask_them(tmp_path: Path, engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe(">", SqliteArchive(tmp_path / "events.db"), name="archive", batch=SOON)
    hub.subscribe("double", lambda n: 2 * n)
    with hub:
        assert hub.request("double", 4).result(20) == 8
        assert hub.request("other", 5, to="archive").result(20) is None
        assert "5" in [row[4] for row in rows(tmp_path / "events.db")], "an answer comes once it is written"


def test_a_place_that_cannot_be_written_fails_the_start(tmp_path: Path, engine: str) -> None:
    hub = EventHub(engine=engine, check=False)
    hub.subscribe(">", SqliteArchive(tmp_path / "missing" / "events.db"), name="archive", batch=SOON, restart=Restart(max_restarts=0))
    try:
        with pytest.raises(StartFailed) as caught:
            hub.start()
        assert f"SqliteArchive({tmp_path / 'missing' / 'events.db'}): there is no folder" in str(caught.value.__cause__)
    finally:
        hub.stop(drain=False)
