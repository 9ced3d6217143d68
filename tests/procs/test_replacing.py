"""New code for an old name: what waits stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mphub import EventHub, Restart, Retry
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_what_waits_and_what_was_handed_out_is_for_the_new_code(tmp_path: Path) -> None:
    def old(n: int) -> None:
        note(tmp_path / "log", f"old {n}")
        if n == 300:
            while not (tmp_path / "go").exists():
                time.sleep(0.01)

    hub = EventHub()
    hub.subscribe("k", old, name="sub")
    with hub:
        hub.publish_batch("k", range(2000))
        assert eventually(lambda: "old 300" in lines(tmp_path / "log"))
        hub.subscribe("k", lambda n: note(tmp_path / "log", f"new {n}"), name="sub", replace=True)
        (tmp_path / "go").touch()
        hub.drain(30)
    assert lines(tmp_path / "log") == [*(f"old {n}" for n in range(301)), *(f"new {n}" for n in range(301, 2000))]


def test_good_code_revives_a_fatal_subscriber(tmp_path: Path) -> None:
    hub = EventHub(check=False)
    bad = hub.subscribe(
        "k", lambda _: os._exit(1), name="sub", restart=Restart(max_restarts=1, delay=0), retry=Retry(max_attempts=100)
    )  # fmt: skip
    with hub:
        hub.publish_batch("k", range(5))
        assert eventually(lambda: bad.state == "FATAL", 20)
        hub.subscribe("k", lambda n: note(tmp_path / "log", str(n)), name="sub", replace=True)
        hub.drain(20)
    assert lines(tmp_path / "log") == [str(n) for n in range(5)]


def test_keys_and_replicas_are_those_of_the_new_one() -> None:
    hub = EventHub(unmatched="ignore")
    hub.subscribe("old", len, name="sub", replicas=3)
    with hub:
        new = hub.subscribe("new", len, name="sub", replicas=2, replace=True)
        assert hub.request("new", "abc").result(10) == 3
        hub.publish("old", "a")
        hub.drain()
        assert new.statistics().handled == 1
        assert eventually(lambda: len(new.statistics().pids) == 2)
        assert new.keys == ("new",)


def test_what_is_under_way_ends_as_it_began_when_the_next_one_is_ordered(tmp_path: Path) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: note(tmp_path / "log", n), name="s")
    told: list[str] = []
    hub.on_notice(lambda notice: told.append(notice.kind))
    with hub:
        hub.publish_batch("k", range(2000))
        hub.subscribe("k", lambda n: note(tmp_path / "log", n), name="s", ordered=True, replace=True)
        hub.drain(20)
    assert lines(tmp_path / "log") == [str(n) for n in range(2000)]
    assert "death" not in told, "the router's, say"
