"""``hub.listen``: events as they are accepted, for whoever looks on; it holds nobody and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mphub import Event, EventHub, HubClosed, InvalidKey, InvalidOption, Tap
from mphub.wire.frames import BLOB_MIN
from tests.helpers import eventually

pytestmark = pytest.mark.timeout(60)


def take(tap: Tap, count: int) -> list[Event]:
    return [tap.get(10) for _ in range(count)]


def ended(tap: Tap) -> None:
    """See that nothing more comes, and that the loop ends."""
    assert list(tap) == []
    with pytest.raises(HubClosed):
        tap.get(1)


def test_two_taps_see_what_their_patterns_match_as_it_is_accepted(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    hub.subscribe("a.>", lambda n: n + 1, name="a", to="out")
    with hub:
        every, some = hub.listen(">"), hub.listen(["a.*", "out"])
        ids = [hub.publish("a.b", 1, headers={"x": "y"}), hub.publish("a.b.c", 2), hub.publish("none", 3)]
        statistics = hub.drain(10)
        seen = take(every, 5)
        assert {(event.key, event.payload) for event in seen} == {("a.b", 1), ("a.b.c", 2), ("none", 3), ("out", 2), ("out", 3)}
        assert [event.id for event in seen if event.key in ("a.b", "a.b.c", "none")] == ids
        first, *rest = take(some, 3)
        assert (first.id, first.key, first.payload, first.headers) == (ids[0], "a.b", 1, {"x": "y"})
        assert time.time() - 10 < first.published_at <= time.time()
        assert [event.payload for event in rest] == [2, 3]
        assert (every.dropped, some.dropped, statistics.unmatched, statistics.accepted) == (0, 0, 3, 5)
        assert sorted(statistics.subscribers) == ["a"]
        with pytest.raises(TimeoutError, match=r"no event of a\.\*, out came within 0\.01 s"):
            some.get(0.01)
    ended(every)
    ended(some)


def test_a_tap_sees_requests_transactions_and_large_payloads(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    hub.subscribe("k", len)
    with hub, hub.listen("*") as tap:
        assert hub.request("k", "ab").result(10) == 2
        with hub.transaction() as together:
            for key in ("k", "none", "k"):
                together.publish(key, key * BLOB_MIN)
        hub.publish("none", bytearray(3 * BLOB_MIN))
        assert [len(event.payload) for event in take(tap, 5)] == [2, BLOB_MIN, 4 * BLOB_MIN, BLOB_MIN, 3 * BLOB_MIN]


def test_a_slow_reader_loses_events_and_nobody_else_does(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda _: None)
    with hub:
        tap = hub.listen("k", maxsize=10)
        hub.publish_batch("k", range(500))
        assert hub.drain(20).subscribers[sub.name].handled == 500
        assert eventually(lambda: tap.dropped == 490)
        assert [event.payload for event in take(tap, 10)] == list(range(10))
        hub.publish("k", "more")
        assert tap.get(10).payload == "more"


def test_a_closed_tap_ends_for_all_who_wait_and_costs_nothing_any_more(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    with hub, ThreadPoolExecutor(2) as threads:
        tap = hub.listen("k")
        waiting = [threads.submit(list, tap) for _ in range(2)]
        forgotten = hub.listen("k")
        tap.close()
        tap.close()
        assert [found.result(10) for found in waiting] == [[], []]
        del forgotten
        gc.collect()
        hub.publish("k", 1)
        with pytest.raises(HubClosed):
            tap.get(1)


def test_it_can_be_read_in_asyncio_beside_others(engine: str) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")

    async def read() -> list[object]:
        tap = hub.listen("k")
        reader = asyncio.create_task(collect(tap))
        for n in range(3):
            await hub.publish_async("k", n)
        await asyncio.to_thread(hub.stop)
        return await reader

    async def collect(tap: Tap) -> list[object]:
        return [event.payload async for event in tap]

    hub.start()
    assert asyncio.run(asyncio.wait_for(read(), 20)) == [0, 1, 2]


def test_payloads_arrive_as_the_codec_has_them(engine: str) -> None:
    hub = EventHub(engine=engine, codec="json", unmatched="ignore")
    with hub, hub.listen("k") as tap:
        for payload in (("a",), ["x" * BLOB_MIN]):
            hub.publish("k", payload)
            assert tap.get(10).payload == list(payload)


def test_what_cannot_be_listened_to_is_refused(engine: str) -> None:
    hub = EventHub(engine=engine)
    with pytest.raises(HubClosed, match="start"):
        hub.listen("k")
    with hub:
        wrong: list[Any] = ["a..b", [], None]
        for keys in wrong:
            with pytest.raises(InvalidKey):
                hub.listen(keys)
        for maxsize in (0, -1, 1.5, "10", float("nan"), True):
            with pytest.raises(InvalidOption, match=r"listen\(maxsize\): got"):
                hub.listen("k", maxsize=maxsize)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption, match=r"keys: got .* bytes of patterns"):
            hub.listen([f"{'k' * 200}.{n}" for n in range(1000)])
        with hub.listen("k") as tap:
            for timeout in (float("nan"), "1", True):
                with pytest.raises(InvalidOption, match="timeout: got"):
                    tap.get(timeout)  # type: ignore[arg-type]
            with pytest.raises(TimeoutError):
                tap.get(-1)
