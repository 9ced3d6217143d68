"""A subscriber that its user has stopped stays so, whichever process dies, and loses nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mphub import EventHub, HubClosed, Restart, SubscriberFatal
from mphub.control import Control
from tests.helpers import eventually
from tests.notes import Record, lines

pytestmark = [pytest.mark.faults, pytest.mark.timeout(60)]


@pytest.mark.parametrize("victim", ["router", "supervisor", "nobody"])
def test_one_that_is_stopped_stays_so_and_goes_on_when_it_is_started(victim: str, tmp_path: Path) -> None:
    hub = EventHub()
    sub = hub.subscribe("k", Record(tmp_path / "notes"), name="notes", replicas=2)
    with hub:
        control = Control(hub._address)
        hub.publish_batch("k", range(1000))
        control.stop("notes")
        hub.publish_batch("k", range(1000, 2000))
        hub.flush()
        if victim != "nobody":
            os.kill(hub.statistics().pids[victim], signal.SIGKILL)
        assert eventually(lambda: (sub.state, sub.statistics().pids) == ("STOPPED", ()))
        assert (sub.statistics().restarts, sub.statistics().waiting) == (0, 2000 - sub.statistics().handled)
        with pytest.raises(SubscriberFatal, match="STOPPED"):
            hub.drain(20)
        control.stop("notes")  # once more changes nothing
        control.start("notes")
        control.start("notes")
        assert hub.drain(30).subscribers["notes"].handled == 2000
    assert sorted(map(int, lines(tmp_path / "notes"))) == list(range(2000))


def test_one_that_dies_again_and_again_can_be_stopped() -> None:
    hub = EventHub(check=False)
    sub = hub.subscribe("k", lambda _: os.kill(os.getpid(), signal.SIGKILL), name="dies", restart=Restart(max_restarts=10**6, delay=0.05))
    with hub:
        hub.publish_batch("k", range(100))
        control = Control(hub._address)
        assert eventually(lambda: sub.statistics().restarts > 2)
        control.stop("dies")
        assert eventually(lambda: (sub.state, sub.statistics().pids) == ("STOPPED", ()))
        before = sub.statistics().restarts
        assert not eventually(lambda: sub.state != "STOPPED", 0.3)
        assert sub.statistics().restarts == before
        hub.stop(drain=False)
        with pytest.raises(HubClosed, match="not running any more"):
            control.start("dies")
