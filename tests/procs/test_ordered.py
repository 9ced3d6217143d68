"""``ordered=True``: events of one ordering key one after the other, whatever the replicas do."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, InvalidOption, Notice
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def test_the_key_of_an_event_is_its_ordering_key_unless_it_has_another(tmp_path: Path) -> None:
    """Two replicas: what has one ordering key is never handled side by side, what has another is."""

    def handle(n: int) -> None:
        event = mphub.current_event()
        note(tmp_path / (event.ordering_key or event.key), f"begin {n}")
        time.sleep(0.02)
        note(tmp_path / (event.ordering_key or event.key), f"end {n}")

    hub = EventHub()
    hub.subscribe("k.*", handle, ordered=True, replicas=2)
    with hub:
        for n in range(8):
            hub.publish(f"k.{n % 2}", n)
            hub.publish(f"k.{n}", n, ordering_key="one")
    for name, numbers in {"k.0": range(0, 8, 2), "k.1": range(1, 8, 2), "one": range(8)}.items():
        assert lines(tmp_path / name) == [word for n in numbers for word in (f"begin {n}", f"end {n}")]


def test_replicas_share_the_keys() -> None:
    def work(_: int) -> int:
        time.sleep(0.001)
        return mphub.current_event().replica

    hub = EventHub()
    hub.subscribe("k.*", work, ordered=True, replicas=2)
    with hub:
        replies = [hub.request(f"k.{n % 50}", n) for n in range(1500)]
        shares = Counter(reply.result(30) for reply in replies)
    assert min(shares[0], shares[1]) > 450


def test_a_key_that_keeps_one_replica_busy_alone_is_named() -> None:
    hub = EventHub()
    told: list[Notice] = []
    hub.on_notice(told.append)
    hub.subscribe("k.*", lambda _: time.sleep(0.0005), ordered=True, replicas=2)
    with hub:
        hub.publish_batch("k.hot", range(4000))
        assert eventually(lambda: [notice.details["key"] for notice in told if notice.kind == "hot_key"] == ["k.hot"], 20)
        hub.drain(30)


def test_a_typo_is_refused() -> None:
    with pytest.raises(InvalidOption, match="ordered: got 'yes'"):
        EventHub().subscribe("k", print, ordered="yes")  # type: ignore[call-overload]
