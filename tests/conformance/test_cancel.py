"""Events that are not wanted any more: withdrawn before they start, told to handlers that ask, ended with their process."""

from __future__ import annotations

from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import pytest

import mphub
from mphub import Dropped, EventHub, InvalidOption, Subscription
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def was_cancelled(sub: Subscription[int, int]) -> bool:
    return sub.statistics().dropped == {"cancelled": 1}


def test_an_event_that_waits_is_withdrawn_from_all_its_subscribers(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    several = [hub.subscribe("k", lambda n: note(tmp_path / "log", n), name=name) for name in ("a", "b")]
    with hub:
        for sub in several:
            sub.pause()
        ids = [hub.publish("k", n) for n in range(5)]
        assert hub.cancel(ids[2])
        assert not hub.cancel(ids[2]), "once is enough"
        for sub in several:
            sub.resume()
        hub.drain(10)
        assert not hub.cancel(ids[3]), "it is done"
        assert not hub.cancel(mphub.EventId.make(5, 5))
        for sub in several:
            found = sub.statistics()
            assert (found.accepted, found.handled, dict(found.dropped)) == (5, 4, {"cancelled": 1})
    assert sorted(lines(tmp_path / "log")) == sorted(["0", "1", "3", "4"] * 2)


def test_a_cancelled_reply_withdraws_its_request(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: n)
    with hub:
        sub.pause()
        replies = [sub.request(n) for n in range(3)]
        assert replies[1].cancel()
        assert eventually(lambda: sub.statistics().dropped.get("cancelled") == 1)
        sub.resume()
        assert (replies[0].result(10), replies[2].result(10)) == (0, 2)
        with pytest.raises(CancelledError):
            replies[1].result(10)


def test_who_waits_for_another_ones_cancelled_request_is_told(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: n)
    with hub:
        sub.pause()
        reply = sub.request(1)
        assert hub.cancel(reply.id)
        if engine == "inline":
            hub.drain(10)
        with pytest.raises(Dropped, match="cancelled"):
            reply.result(10)
        sub.resume()


def test_gathered_answers_are_cancelled_together(engine: str) -> None:
    hub = EventHub(engine=engine)
    several = [hub.subscribe("k", lambda n: n, name=name) for name in ("a", "b")]
    with hub:
        for sub in several:
            sub.pause()
        assert hub.gather("k", 1).cancel()
        for sub in several:
            assert eventually(partial(was_cancelled, sub))
            sub.resume()


def test_a_typo_is_refused(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", print)
    with hub:
        for wrong in ("x", None, 1.5):
            with pytest.raises(InvalidOption, match="expected EventIds"):
                hub.cancel(wrong)  # type: ignore[arg-type]
    with pytest.raises(mphub.HubClosed):
        hub.cancel(mphub.EventId.make(1, 1))
