"""History of a durable hub: what was accepted and what became of it, replays, and subscribers that begin with the earliest event."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from mphub import (
    EventHub,
    HubError,
    Inbox,
    InvalidKey,
    InvalidOption,
    Reject,
    Retention,
    RetryLater,
    SubscriberPaused,
    Subscription,
    current_event,
)
from mphub.engine import ProcessEngine
from mphub.store.verify import verify
from tests.helpers import eventually
from tests.notes import Record, lines
from tests.procs.test_durable import hub_on as durable_hub_on

pytestmark = pytest.mark.timeout(60)


hub_on = partial(durable_hub_on, retention=Retention(max_bytes="64MB"))


def judge(payload: str) -> None:
    if payload == "reject":
        raise Reject("no")
    if payload == "again" and current_event().attempt < 2:
        raise RetryLater(0.01)


def test_history_tells_what_became_of_each_event(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.subscribe("a.*", judge, name="judge")
        hub.subscribe("a.x", print, name="other", where=lambda payload: False)
        hub.start()
        for payload in ("fine", "reject", "again"):
            hub.publish("a.x", payload, headers={"n": payload}, ordering_key="o")
        hub.publish("a.y", "fine", delay=0.01)
        hub.publish("nobody", 0)
        hub.drain(20)
        rows = list(hub.history())
        assert [(row.key, row.payload) for row in rows] == [
            ("a.x", "fine"),
            ("a.x", "reject"),
            ("a.x", "again"),
            ("a.y", "fine"),
            ("nobody", 0),
        ]
        assert rows[0].headers == {"n": "fine"} and rows[0].ordering_key == "o"
        told = [{name: (o.state, o.reason, o.attempts) for name, o in row.outcomes.items()} for row in rows]
        filtered = ("dropped", "filtered", 1)
        assert told == [
            {"judge": ("handled", "", 1), "other": filtered},
            {"judge": ("dead", "rejected", 1), "other": filtered},
            {"judge": ("handled", "", 2), "other": filtered},
            {"judge": ("handled", "", 1)},
            {},
        ]
        assert hub.redrive("judge") == 1
        hub.drain(20)
        hub.purge("judge")
        outcome = list(hub.history("a.x"))[1].outcomes["judge"]
        assert (outcome.state, outcome.reason) == ("dropped", "purged")


def test_history_is_found_by_key_and_time(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.start()
        for n in range(3000):
            hub.publish(f"k{n % 3}.{n % 7}", n)
        hub.flush()
        middle = time.time()
        for n in range(3000, 6000):
            hub.publish(f"k{n % 3}.{n % 7}", n)
        rows = list(hub.history())
        assert [row.payload for row in rows] == list(range(6000))
        assert [row.payload for row in hub.history("k1.4")] == [n for n in range(6000) if n % 21 == 4]
        assert [row.payload for row in hub.history("k1.*", since=middle)] == [n for n in range(3000, 6000) if n % 3 == 1]
        assert [row.payload for row in hub.history(["k1.4", "k2.>"], until=middle)] == [n for n in range(3000) if n % 21 == 4 or n % 3 == 2]
        assert [row.payload for row in hub.history(since=middle, limit=3)] == [3000, 3001, 3002]
        assert list(hub.history("k9.>")) == list(hub.history(since=time.time() + 60)) == []
    with hub_on(tmp_path) as hub:
        hub.start()
        assert sum(1 for _ in hub.history()) == 6000


def test_large_payloads_are_in_history_too(tmp_path: Path) -> None:
    large = os.urandom(200_000)
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", len, name="len")
        hub.start()
        hub.publish("k", large)
        hub.publish("k", large)
        hub.drain(20)
        assert hub.subscription("len").replay() == 2
        hub.drain(20)
        assert hub.statistics().subscribers["len"].handled == 4
        assert [row.payload for row in hub.history()] == [large, large]
    with hub_on(tmp_path, retention=Retention(max_bytes=1)) as hub:
        hub.start()
        hub.publish("k", 1)
        hub.flush()
        assert not list(hub.history())
        eventually(lambda: not os.listdir(tmp_path / "hub" / "blobs"))


def test_old_rows_go_by_bytes_and_by_age(tmp_path: Path) -> None:
    with hub_on(tmp_path, retention=Retention(max_bytes="1MB")) as hub:
        hub.start()
        for n in range(5000):
            hub.publish("k", (n, b"x" * 1000))
        hub.flush()
        left = [row.payload[0] for row in hub.history()]
        assert 500 < len(left) < 1100 and left == list(range(5000 - len(left), 5000))
    with hub_on(tmp_path, retention=Retention(max_age=0.3)) as hub:
        hub.start()
        eventually(lambda: not list(hub.history()))
        hub.publish("k", 1)
        assert [row.payload for row in hub.history()] == [1]
        eventually(lambda: not list(hub.history("k")))


def test_a_replay_is_for_one_subscriber_alone(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        mine = hub.subscribe("k.*", Record(tmp_path / "mine"), name="mine", inbox=Inbox(maxsize=100))
        hub.subscribe(">", Record(tmp_path / "other"), name="other")
        hub.start()
        for n in range(1000):
            hub.publish(f"k.{n % 2}", n, confirm=n % 50 == 0)  # what is confirmed ends a frame, and so a row
        hub.publish("elsewhere", "x")
        hub.drain(20)
        assert mine.replay() == 1000
        assert mine.replay("k.1") == 500
        assert mine.replay(since=time.time()) == 0
        hub.drain(20)
        counts = hub.statistics().subscribers["mine"]
        assert (counts.accepted, counts.handled) == (2500, 2500)
        assert lines(tmp_path / "mine") == [str(n) for n in [*range(1000), *range(1000), *range(1, 1000, 2)]]
        assert len(lines(tmp_path / "other")) == 1001
        mine.pause()
        with pytest.raises(SubscriberPaused):
            mine.replay()


def test_one_that_begins_with_the_earliest_misses_nothing_whatever_is_killed(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.subscribe("k.*", Record(tmp_path / "first"), name="first")
        hub.start()
        for n in range(20_000):
            hub.publish(f"k.{n % 3}", n)
        late = hub.subscribe(["k.1", "k.2"], Record(tmp_path / "late"), name="late", start="earliest", inbox=Inbox(maxsize=2000))
        for n in range(20_000, 30_000):
            hub.publish(f"k.{n % 3}", n)
            if n in (22_000, 26_000):
                os.kill(hub.statistics().pids["router"], signal.SIGKILL)
            if n == 24_000:
                os.kill(late.statistics().pids[0], signal.SIGKILL)
        hub.drain(40)
        counts = late.statistics()
        assert counts.accepted == counts.handled + counts.dead == 20_000
        got = list(dict.fromkeys(lines(tmp_path / "late")))  # what ran at the kill may have run twice
        assert got == [str(n) for n in range(30_000) if n % 3]
        assert len(lines(tmp_path / "late")) <= 20_001


def test_earliest_goes_on_in_the_next_run(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.start()
        for n in range(12_000):
            hub.publish("k", n)
        hub.subscribe("k", Record(tmp_path / "late"), name="late", start="earliest").pause()
        hub.publish("k", 12_000)
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", Record(tmp_path / "late"), name="late", start="earliest")
        hub.start()
        hub.publish("k", 12_001)
        hub.drain(30)
        assert lines(tmp_path / "late") == [str(n) for n in range(12_002)]


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"EventHub\(retention\): got .* without a path"):
        EventHub(retention=Retention())
    with hub_on(tmp_path, retention=None) as hub:
        hub.subscribe("k", print, name="p")
        hub.start()
        for asks in (hub.history, hub.subscription("p").replay, lambda: hub.subscribe("k", print, name="q", start="earliest")):
            with pytest.raises(InvalidOption, match="keeps no history"):
                asks()
    with hub_on(tmp_path) as hub:
        hub.start()
        for moment in ("yesterday", 10**400, datetime.min, nan):
            with pytest.raises(InvalidOption, match="since"):
                hub.history(since=moment)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption, match="name"):
            hub.forget(None)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption, match="limit"):
            hub.history(limit=-1)
        with pytest.raises(InvalidKey):
            hub.history("a..b")


def test_history_has_each_event_once_and_how_it_ended_whatever_is_killed(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        sub = hub.subscribe("k", Record(tmp_path / "notes"), name="notes")
        hub.start()
        for n in range(6000):
            hub.publish("k", n)
            if n % 2000 == 1000:
                os.kill(hub.statistics().pids["router"], signal.SIGKILL)
            if n == 2500:
                os.kill(sub.statistics().pids[0], signal.SIGKILL)
            if n == 4500:
                os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
        hub.drain(30)
        rows = list(hub.history())
        assert [row.payload for row in rows] == list(range(6000))
        assert {row.outcomes["notes"].state for row in rows} == {"handled"}


def test_a_name_that_is_forgotten_may_begin_again_with_the_earliest(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        slow = hub.subscribe("k", Record(tmp_path / "slow"), name="slow")
        late = hub.subscribe("k", Record(tmp_path / "early"), name="late")
        hub.start()
        slow.pause()  # so that the rows stay
        for n in range(20_000):
            hub.publish("k", str(n))
        hub.flush()
        late.unsubscribe(drain=True, forget=True)
        late = hub.subscribe("k", Record(tmp_path / "late"), name="late", start="earliest")
        late.pause()
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        slow.resume()
        late.resume()
        hub.drain(40)
        assert lines(tmp_path / "late") == lines(tmp_path / "slow") == [str(n) for n in range(20_000)]
    assert verify(tmp_path / "hub").rows["rows"] == 0


def test_a_name_that_begins_again_has_nothing_of_its_earlier_life(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        slow = hub.subscribe(["j", "k"], Record(tmp_path / "slow"), name="slow")
        late: Subscription[Any, Any] = hub.subscribe("k", len, name="late")
        hub.start()
        slow.pause()  # so that the rows stay, which say that they were for an earlier one of this name
        hub.publish("j", "j", confirm=True)
        ids = [hub.publish("k", "x" * 20_000) for _ in range(500)]
        hub.flush()
        for keys in ("k", "j"):
            late.unsubscribe(drain=keys == "k", forget=True)
            late = hub.subscribe(keys, Record(tmp_path / "late"), name="late", start="earliest")
            late.pause()
            assert hub.cancel(ids.pop())  # the last one, which it has yet to get
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        slow.resume()
        late.resume()
        hub.drain(20)
        assert lines(tmp_path / "late") == ["j"]
        assert len(lines(tmp_path / "slow")) == 499
        counts = hub.statistics().subscribers["late"]
        assert counts.accepted == counts.handled + counts.dropped["unsubscribed"] and counts.handled == 501
        assert next(hub.history("k")).outcomes["late"].state == "dropped"


def test_what_becomes_of_some_events_of_a_frame_changes_nothing_about_the_others(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        sub = hub.subscribe("k.*", len, name="len")
        full = hub.subscribe("k.*", len, name="full", inbox=Inbox(maxsize=1, overflow="dead_letter"))
        hub.start()
        sub.pause()
        full.pause()
        with hub.transaction() as together:
            for n in range(1000):
                together.publish(f"k.{n % 2}", str(n))
        hub.flush()
        sub.resume()
        full.resume()
        hub.drain(20)
        assert sub.replay("k.0") == 500
        ids = [letter.id for letter in hub.dead_letters("full")]
        assert hub.purge("full", ids[:2]) == 2 and hub.redrive("full", ids[2:4]) == 2
        hub.drain(20)
        rows = list(hub.history())
        assert {row.outcomes["len"].state for row in rows} == {"handled"}
        states = [row.outcomes["full"].state for row in rows]
        assert states == ["handled", "dropped", "dropped", "handled", "handled", *["dead"] * 995]


def test_a_forked_process_cannot_go_on_with_a_history_that_its_parent_reads(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.start()
        for n in range(30):
            hub.publish("k", (n, b"x" * 60_000))
            hub.flush()
        rows = hub.history()
        next(rows)
        if not (child := os.fork()):
            try:
                list(rows)
            except HubError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert [row.payload[0] for row in rows] == list(range(1, 30))


def test_a_replay_whose_answer_was_lost_means_the_same_past(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", Record(tmp_path / "notes"), name="notes")
        hub.start()
        hub.publish("k", 1, confirm=True)
        assert isinstance(hub._engine, ProcessEngine)
        arguments: dict[str, Any] = {"run": b"12345678", "patterns": ["k"], "since": 0.0, "until": inf, "after": 0, "before": 0}
        call = partial(hub._engine.client.call, "replay", name="notes", **arguments)
        first = call()
        hub.publish("k", 2, confirm=True)
        assert call() == first
        assert hub.drain(20).subscribers["notes"].handled == 3


def test_what_keeps_the_newest_of_each_key_gets_nothing_of_the_past(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        newest: Subscription[Any, Any] = hub.subscribe("k", abs, name="newest", inbox=Inbox(overflow="latest"))
        with pytest.raises(InvalidOption, match=r"start='earliest': .* an old event would replace a newer one"):
            hub.subscribe("k", abs, name="other", inbox=Inbox(overflow="latest"), start="earliest")
        hub.start()
        with pytest.raises(InvalidOption, match=r"replay\(\): .* an old event would replace a newer one"):
            newest.replay()
