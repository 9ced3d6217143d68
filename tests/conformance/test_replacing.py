"""New code for an old name: what waits stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mphub import EventHub, InvalidOption, NameTaken
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_the_next_event_is_handled_by_the_new_code(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda n: note(tmp_path / "log", f"old {n}"), name="sub")
    with hub:
        hub.publish("k", 1)
        hub.drain()
        new = hub.subscribe("k", lambda n: note(tmp_path / "log", f"new {n}"), name="sub", replace=True)
        hub.publish("k", 2)
        hub.drain()
        assert new.statistics().handled == 2
        assert hub.subscriptions == {"sub": new}
    assert lines(tmp_path / "log") == ["old 1", "new 2"]


def test_before_the_start_it_just_takes_the_place(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda n: n, name="sub")
    hub.subscribe("k", lambda n: n + 1, name="sub", replace=True)
    with hub:
        assert hub.request("k", 1).result(10) == 2


def test_without_it_a_name_is_taken(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", len, name="sub")
    with pytest.raises(NameTaken, match="replace=True"):
        hub.subscribe("k", len, name="sub")
    with pytest.raises(InvalidOption, match="replace"):
        hub.subscribe("k", len, name="sub", replace="yes")  # type: ignore[call-overload]


def test_a_cell_that_is_run_again_replaces(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    hub = EventHub(engine=engine)

    def cell(step: int) -> None:
        @hub.subscriber("k")
        def count(n: int) -> int:
            return n + step

    cell(1)
    with hub:
        assert hub.request("k", 1).result(10) == 2
        cell(10)
        assert hub.request("k", 1).result(10) == 11
        assert list(hub.subscriptions) == ["count"]


def test_lambdas_of_a_prompt_stand_side_by_side(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    hub = EventHub(engine=engine)
    hub.subscribe("a", lambda n: n)
    hub.subscribe("b", lambda n: n + 1)
    with hub:
        assert [hub.request(key, 1).result(10) for key in "ab"] == [1, 2]
