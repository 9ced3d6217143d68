"""SIGTERM comes at any moment, as it does when a stop takes too long: an event has ended with all its outputs, or runs again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import Batch, EventHub, Restart, Retry
from tests.helpers import eventually
from tests.notes import lines, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(60)]
EACH = 12
"""Outputs of an event: the more, the longer a report takes."""


def publish_all(n: int) -> None:
    for i in range(EACH):
        mphub.publish("out", f"{n} {i}")


def publish_for_each(numbers: list[int]) -> None:
    for n in numbers:
        publish_all(n)


@pytest.mark.parametrize(
    ("handler", "options"),
    [
        (publish_all, {}),
        (publish_all, {"concurrency": 8}),
        (publish_for_each, {"batch": Batch(size=8)}),
    ],
    ids=["one by one", "threads", "batches"],
)
def test_outputs_go_with_their_events_whenever_a_process_is_terminated(handler: Any, options: dict[str, Any], tmp_path: Path) -> None:
    hub = EventHub()
    ended = hub.subscribe("k", handler, restart=Restart(max_restarts=1000, delay=0), retry=Retry(1000), **options)
    hub.subscribe("out", lambda text: note(tmp_path / "out", text), name="out")
    rng, count, end = random.Random(4), 6000, time.monotonic() + 1.2

    def has_gone_on(before: int) -> bool:
        return ended.statistics().handled > before

    with hub:
        hub.publish_batch("k", range(count))
        while time.monotonic() < end and (before := ended.statistics().handled) < count:
            assert eventually(partial(has_gone_on, before))
            time.sleep(rng.random() * 0.005)  # any moment will do
            for pid in ended.statistics().pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        found = hub.drain(30).subscribers
        assert (found[ended.name].handled, found["out"].handled) == (count, count * EACH)
    assert Counter(lines(tmp_path / "out")) == Counter(f"{n} {i}" for n in range(count) for i in range(EACH))
