"""``where``: what a subscriber does not want is dropped in its process, and counted."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, InvalidOption, Retry, Snapshot, Subscriber
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_with_snapshots_what_is_not_wanted_ends_too() -> None:
    class Count(Subscriber[int, None]):
        count = 0

        def handle(self, payload: int) -> None:
            self.count += 1

        def snapshot(self) -> int:
            return self.count

    hub = EventHub()
    sub = hub.subscribe("k", Count, where=lambda n: n < 0, snapshot=Snapshot(every=1000, period=100))
    with hub:
        hub.publish_batch("k", range(50))
        assert hub.drain(20).subscribers[sub.name].dropped == {"filtered": 50}


@pytest.mark.faults
def test_what_was_filtered_counts_as_that_after_a_death(tmp_path: Path) -> None:
    def handle(n: int) -> None:
        note(tmp_path / "log", str(n))
        if n == 1000 and mphub.current_event().attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    hub = EventHub()
    sub = hub.subscribe("k", handle, where=lambda n: n % 10 == 0, retry=Retry(max_attempts=3))
    with hub:
        hub.publish_batch("k", range(3000))
        statistics = hub.drain(20).subscribers[sub.name]
    assert (statistics.accepted, statistics.handled, dict(statistics.dropped)) == (3000, 300, {"filtered": 2700})
    assert lines(tmp_path / "log") == [*map(str, range(0, 1001, 10)), *map(str, range(1000, 3000, 10))]


@pytest.mark.faults
def test_a_router_that_dies_changes_no_count() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda _: None, where=lambda n: n % 2)
    with hub:
        hub.publish_batch("k", range(20_000))
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        hub.publish_batch("k", range(20_000))
        assert eventually(lambda: sub.statistics().handled > 0)
        statistics = hub.drain(30).subscribers[sub.name]
    assert (statistics.handled, dict(statistics.dropped)) == (20_000, {"filtered": 20_000})


@pytest.mark.parametrize("where", [3, "key", [], {}, {1: 2}])
def test_a_filter_is_a_function_or_a_mapping(where: object) -> None:
    assert not isinstance(where, Mapping) or not all(isinstance(name, str) for name in where) or not where
    with pytest.raises(InvalidOption, match="where: got"):
        EventHub().subscribe("k", print, where=where)  # type: ignore[call-overload]
