"""``EventHub(codec=...)``: how payloads and results travel, whoever sends them, and that nothing else is unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, InvalidOption, PayloadError
from mphub.wire.frames import BLOB_MIN
from tests.helpers import size
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


SMALL = {"msgpack": (1, b"x"), "json": (1, "x"), "raw": bytearray(b"x")}


LARGE = {"msgpack": [b"x" * BLOB_MIN], "json": ["x" * BLOB_MIN], "raw": memoryview(b"x" * BLOB_MIN)}


ARRIVES = {"msgpack": [1, b"x"], "json": [1, "x"], "raw": b"x"}


codecs = pytest.mark.parametrize("codec", SMALL)


@codecs
def test_payloads_results_and_dead_letters_go_by_the_codec(engine: str, codec: str, tmp_path: Path) -> None:
    def bad(payload: object) -> None:
        raise ValueError(mphub.current_event().payload)

    hub = EventHub(engine=engine, codec=codec, check=False, propagate=None if engine == "process" else False)
    hub.subscribe("echo", lambda payload: payload, to="out")
    hub.subscribe("out", lambda payload: note(tmp_path / "out", repr(payload)[:40]), name="out")
    sub = hub.subscribe("bad", bad)
    with hub:
        assert hub.request("echo", SMALL[codec]).result(10) == ARRIVES[codec]
        assert size(hub.request("echo", LARGE[codec]).result(10)) == BLOB_MIN
        for payload in (SMALL[codec], LARGE[codec]):
            hub.publish("bad", payload)
        with hub.transaction() as together:
            together.publish("bad", SMALL[codec])
        hub.drain(20)
        small, large, _ = letters = sub.dead_letters()
        assert lines(tmp_path / "out")[0] == repr(ARRIVES[codec])
    for found in (letters, hub.dead_letters(), pickle.loads(pickle.dumps(letters))):
        assert [found[0].payload, found[2].payload] == [ARRIVES[codec]] * 2
        assert size(found[1].payload) == BLOB_MIN
    assert isinstance(small.error, ValueError)
    assert small.error.args == (ARRIVES[codec],)
    assert size(large.payload) == BLOB_MIN


def test_what_cannot_be_sent_raises_in_the_caller_and_in_a_handler(engine: str, tmp_path: Path) -> None:
    def publish(_: object) -> str:
        try:
            mphub.publish("out", {1j})
        except PayloadError as error:
            return str(error)
        return "nothing"

    hub = EventHub(engine=engine, codec="json", check=False, propagate=None if engine == "process" else False)
    hub.subscribe("in", publish)
    hub.subscribe("out", print)
    hub.subscribe("result", lambda _: 1j, name="result")
    with hub, hub.transaction() as together:
        for call in (
            lambda: hub.publish("out", 1j), lambda: hub.publish("out", 1j, headers={"a": "b"}), lambda: hub.request("out", 1j),
            lambda: hub.publish_batch("out", [1j]), lambda: hub.map("out", [1j]), lambda: together.publish("out", 1j),
        ):  # fmt: skip
            with pytest.raises(PayloadError, match=r"payload cannot be sent with codec='json': got complex 1j .*expected None, bool"):
                call()
        assert "got set {1j}" in hub.request("in", None).result(10)
        with pytest.raises(PayloadError, match=r"^result cannot be sent with codec='json'"):
            hub.request("result", None).result(10)
        assert hub.drain(10).subscribers["print"].accepted == 0


def test_a_pool_needs_pickles(engine: str) -> None:
    with pytest.raises(InvalidOption, match=r"executor.*codec='msgpack'.*codec='pickle'"):
        EventHub(engine=engine, codec="msgpack").executor()
