"""Corners of the public names: what is refused, what is told, what ends; in all engines where all can."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import EventHub, Restart, Subscriber
from tests.helpers import eventually, script
from tests.procs.test_hub import lines, note


def test_keys_in_a_handler_are_checked(engine: str) -> None:
    hub = EventHub(engine=engine, check=False, propagate=False)

    def h(key: Any) -> None:
        mphub.publish(key, 1)

    hub.subscribe("h", h)
    hub.subscribe(">", lambda n: None, name="all")
    with hub:
        hub.publish_batch("h", ["a b", "a.*", "", 3, None, "x" * 300])
        hub.drain()
        assert [type(x.error).__name__ for x in hub.dead_letters()] == ["InvalidKey"] * 6


def test_a_teardown_that_fails_is_seen(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    class Late(Subscriber[int, None]):
        def handle(self, payload: int) -> None: ...

        def teardown(self) -> None:
            raise LookupError("no end")

    hub = EventHub(engine=engine)
    hub.subscribe("k", Late)
    with hub:
        hub.publish("k", 1)
    assert "Late: teardown failed:\nTraceback" in caplog.text
    assert "no end" in caplog.text


def test_a_setup_that_fails_fails_the_start(engine: str) -> None:
    class Broken(Subscriber[int, None]):
        def setup(self) -> None:
            raise LookupError("x")

        def handle(self, payload: int) -> None: ...

    hub = EventHub(engine=engine)
    hub.subscribe("k", Broken, restart=Restart(max_restarts=0))
    with pytest.raises(mphub.StartFailed) as failed:
        hub.start()
    assert isinstance(failed.value.__cause__, LookupError)
    assert "stopped" in repr(hub)


def test_coroutine_handlers_in_a_program_with_a_loop(engine: str) -> None:
    async def h(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    async def program() -> int:
        hub = EventHub(engine=engine)
        hub.subscribe("k", h)
        async with hub:
            hub.publish("k", 1)
            found: int = await hub.request("k", 1)
            return found

    assert asyncio.run(program()) == 2


def test_drain_tells_its_progress(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda n: n, name="k")
    seen: list[mphub.Progress] = []
    with hub:
        hub.publish("k", 1)
        hub.drain(progress=seen.append)
    assert (seen[-1].done, seen[-1].total) == (1, 1)


def test_a_request_in_a_handler_ends(engine: str) -> None:
    done = script(
        f"""
        import mphub, sys, types
        m = types.ModuleType("m"); sys.modules["m"] = m
        m.hub = hub = mphub.EventHub(engine={engine!r}, check=False)
        hub.subscribe("inner", lambda n: 10 * n, name="inner")
        def outer(n):
            if {engine!r} != "process":
                import m
                return m.hub.request("inner", n).result(3)
            return hub.request("inner", n).result(3)
        if {engine!r} != "process":
            del outer.__globals__["hub"]
        m.hub.subscribe("outer", outer)
        with m.hub as h:
            print(h.request("outer", 1).result(6))
    """,
        12,
    )
    assert done.stdout == "10\n", done.stdout + done.stderr[-800:]


def test_a_teardown_that_fails_ends_nothing_else(engine: str, tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Bad(Subscriber[int, None]):
        def handle(self, payload: int) -> None: ...

        def teardown(self) -> None:
            raise LookupError("no end")

    class Good(Subscriber[int, None]):
        def handle(self, payload: int) -> None: ...

        def teardown(self) -> None:
            note(log, "good")

    hub = EventHub(engine=engine)
    hub.subscribe("k", Bad)
    hub.subscribe("k", Good)
    with hub:
        hub.publish("k", 1)
    assert lines(log) == ["good"]
    assert hub.statistics().accepted == 1


def test_final_states_are_stopped(engine: str) -> None:
    hub = EventHub(engine=engine)
    a = hub.subscribe("k", lambda n: n, name="k")
    b = hub.subscribe("q", lambda n: n, name="q")
    with hub:
        b.unsubscribe()
        assert (b.state, hub.statistics().subscribers["q"].state) == ("STOPPED", "STOPPED")
    assert a.statistics().state == "STOPPED"


def test_setup_publishes_to_those_subscribed_later(engine: str) -> None:
    class Early(Subscriber[int, None]):
        def setup(self) -> None:
            mphub.publish("out", 1)

        def handle(self, payload: int) -> None: ...

    hub = EventHub(engine=engine)
    hub.subscribe("k", Early)
    for i in range(8):
        hub.subscribe(f"other.{i}", lambda n: n, name=f"o{i}")
    last = hub.subscribe("out", lambda n: n, name="out")
    with hub:
        assert eventually(lambda: hub.statistics().accepted == 1, 5)
        assert hub.statistics().unmatched == 0
        hub.drain()
        assert last.statistics().handled == 1


@pytest.mark.parametrize("way", ["publish", "to"])
def test_an_output_too_large_fails_its_event(engine: str, way: str) -> None:
    def grow(n: int) -> bytes | None:
        data = bytes(n)
        if way == "to":
            return data
        mphub.publish("z", data)
        return None

    hub = EventHub(engine=engine, max_bytes="4MB", check=False, propagate=False)
    hub.subscribe("k", grow, to="z" if way == "to" else None)
    hub.subscribe("z", len)
    hub.start()
    try:
        hub.publish("k", 10 << 20)
        hub.drain(5)
        assert [type(x.error) for x in hub.dead_letters()] == [mphub.PayloadError]
    finally:
        hub.stop(drain=False)
