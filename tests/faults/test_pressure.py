"""Full inboxes, full journals, circles: publishers wait or are told, nothing grows without bound, nothing locks up."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Inbox
from tests.helpers import eventually

pytestmark = pytest.mark.faults


def size_of(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # its last event has just been handled
            size += path.stat().st_size
    return size


def test_subscribers_that_publish_to_each_other_with_full_inboxes_never_lock_up() -> None:
    hub = EventHub(max_bytes="8MB")
    small = Inbox(maxsize=10)
    hub.subscribe("a", lambda n: hub.publish("b", n - 1) and None if n else None, name="a", inbox=small)
    hub.subscribe("b", lambda n: hub.publish("a", n - 1) and None if n else None, name="b", inbox=small)
    hub.subscribe("self", lambda n: [hub.publish("self", n - 1) for _ in range(2 if n else 0)] and None, name="self", inbox=small)
    with hub:
        for _ in range(300):
            hub.publish("a", 20)
        hub.publish("self", 11)
        hub.drain(50)
        found = hub.statistics().subscribers
    assert (found["a"].handled, found["b"].handled, found["self"].handled) == (300 * 11, 300 * 10, 2**12 - 1)


def test_a_request_to_oneself_raises_instead_of_waiting_for_ever() -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: hub.request("k", n).result(), name="k")
    with hub, pytest.raises(mphub.HubError, match="would wait for itself"):
        hub.request("k", 1).result(10)


def test_outputs_that_cannot_be_kept_are_tried_again_and_nothing_grows(capfd: pytest.CaptureFixture[str]) -> None:
    hub = EventHub(max_bytes="4MB", check=False)
    folder = Path(hub._address.folder)
    notices: list[mphub.Notice] = []
    hub.on_notice(notices.append)
    hub.subscribe("k", lambda n: [hub.publish("k", bytes(30_000)) for _ in range(2)] and None, name="k")
    with hub:
        hub.publish("k", b"")
        assert eventually(lambda: [n.kind for n in notices].count("full") >= 2, 20)
        assert size_of(folder / "blobs") < 8_000_000
        found = hub.statistics().subscribers["k"]
        assert found.accepted == found.handled + found.waiting + found.running
        assert found.dead == 0
        hub.stop(drain=False)


def test_memory_and_files_stay_level_while_a_slow_one_is_fed(tmp_path: Path) -> None:
    hub = EventHub(max_bytes="4MB")
    folder = Path(hub._address.folder)
    hub.subscribe("k", lambda data: time.sleep(0.0005), name="slow")
    with hub:
        for _ in range(300):
            hub.publish("k", bytes(100_000))
            assert size_of(folder / "blobs") < 8_000_000
        hub.drain(60)
        assert eventually(lambda: not list((folder / "blobs").iterdir()), 5), "the last reference is gone"
