"""``EventHub(codec=...)``: how payloads and results travel, whoever sends them, and that nothing else is unpickled."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil
import pytest

import mphub
from mphub import EventHub, InvalidOption, PayloadError
from mphub.errors import load_error
from mphub.wire import frames
from mphub.wire.codec import encode_apart
from mphub.wire.frames import BLOB_MIN, Batch, HelloPublisher, encode, frame, join
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)
SMALL = {"msgpack": (1, b"x"), "json": (1, "x"), "raw": bytearray(b"x")}
LARGE = {"msgpack": [b"x" * BLOB_MIN], "json": ["x" * BLOB_MIN], "raw": memoryview(b"x" * BLOB_MIN)}
ARRIVES = {"msgpack": [1, b"x"], "json": [1, "x"], "raw": b"x"}
codecs = pytest.mark.parametrize("codec", SMALL)


def size(payload: object) -> int:
    return len(payload) if isinstance(payload, bytes) else len(payload[-1])  # type: ignore[index]


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


def publish_all(hub: EventHub, publisher: mphub.Publisher, queue: mphub.HubQueue) -> None:
    hub.publish("k", (1,))
    publisher.publish("k", (2,))
    queue.put(("k", (3,)))
    with publisher.transaction() as together:
        together.publish("k", (4,))
    with hub.transaction() as together:
        together.publish("k", (5,))
    hub.publish("k", ["x" * BLOB_MIN], confirm=True)
    assert hub.request("k", (6,)).result(10) == [6]
    with pytest.raises(PayloadError, match="codec='json'"):
        publisher.publish("k", 1j)


@pytest.mark.procs
def test_handles_in_other_processes_know_the_codec(tmp_path: Path) -> None:
    def handle(payload: list[object]) -> list[object]:
        note(tmp_path / "log", repr(payload)[:6])
        return payload

    hub = EventHub(codec="json")
    hub.subscribe("k", handle)
    with hub:
        handles = hub, hub.publisher(), hub.queue
        for given in (handles, pickle.loads(ForkingPickler.dumps(handles))):
            process = multiprocessing.get_context("fork").Process(target=publish_all, args=given)
            process.start()
            process.join(30)
            assert process.exitcode == 0
            process.close()
    assert lines(tmp_path / "log") == ["[1]", "[2]", "[3]", "[4]", "[5]", "['xxxx", "[6]"] * 2


class Hostile:
    def __init__(self, path: Path, fill: bytes) -> None:
        self.path, self.fill = path, fill

    def __reduce__(self) -> tuple[object, ...]:
        return note, (self.path, "unpickled", pickle.PickleBuffer(self.fill))


@pytest.mark.procs
def test_a_hub_that_does_not_pickle_unpickles_no_payload_anywhere(tmp_path: Path) -> None:
    hub = EventHub(codec="json", check=False)
    hub.subscribe("k", len, name="k")
    small, large = (encode_apart(Hostile(tmp_path / "log", bytes(size))) for size in (1, 2 * BLOB_MIN))
    blob = "0000000000000007-1"
    with hub, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(hub._address.data)
        Path(hub._address.folder, "blobs", blob).write_bytes(bytes(large))
        sock.sendall(
            frame(
                frames.HELLO_PUBLISHER, encode(HelloPublisher(hub._address.token, 7, psutil.Process().pid, psutil.Process().create_time()))
            )
        )
        sock.sendall(frame(frames.BATCH, encode(Batch(7, 1, 1, 1, ["k"], [0], 0.0, size=len(small))), join([small])))
        sock.sendall(frame(frames.BATCH, encode(Batch(7, 2, 2, 1, ["k"], [0], 0.0, blob=blob, size=len(large)))))
        sub = hub.subscription("k")
        assert eventually(lambda: sub.statistics().dead == 2)
        for letter in sub.dead_letters():
            with pytest.raises(Exception, match=r"malformed|invalid|truncated"):
                _ = letter.payload
            assert "DecodeError" in letter.traceback
            assert not isinstance(load_error(letter._error), mphub.RemoteError)
    assert not (tmp_path / "log").exists()
