"""``ordered=True``: events of one ordering key one after the other, whatever the replicas do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Retry, RetryLater
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("later", [True, False])
def test_a_retry_that_waits_holds_its_own_key_alone(engine: str, tmp_path: Path, later: bool) -> None:
    """By ``RetryLater``, or by the delay of ``Retry``."""
    log = tmp_path / "log"

    def handle(n: int) -> None:
        event = mphub.current_event()
        note(log, f"{event.ordering_key} {n} {event.attempt}")
        if (n, event.attempt) == (1, 1):
            raise RetryLater(0.2) if later else KeyError(n)

    hub = EventHub(engine=engine)
    hub.subscribe("k", handle, ordered=True, retry=Retry(on=KeyError, delay=0.2))
    with hub:
        with hub.transaction() as together:
            for n in range(4):
                for key in "ab":
                    together.publish("k", n if key == "a" else n + 10, ordering_key=key)
    assert [line for line in lines(log) if line.startswith("a")] == ["a 0 1", "a 1 1", "a 1 2", "a 2 1", "a 3 1"]
    assert lines(log)[-3:] == ["a 1 2", "a 2 1", "a 3 1"], "the other key goes on meanwhile"
    assert Counter(lines(log))["b 13 1"] == 1
