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
from mphub import EventHub, PayloadError
from mphub.errors import load_error
from mphub.wire import frames
from mphub.wire.codec import encode_apart
from mphub.wire.frames import BLOB_MIN, Batch, HelloPublisher, encode, frame, join
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


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
