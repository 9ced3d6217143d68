"""Recycling: a subscriber's process is replaced by one that is ready before the old one drains, and nobody notices."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from pathlib import Path

import pytest

import mphub
from mphub import EventHub, Limits, Notice, Recycle, Restart, Snapshot, Stop, Subscriber, Subscription
from mphub.store.board import RECALLED
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = [pytest.mark.procs, pytest.mark.timeout(60)]
SOON = Stop(ask=0.2, term=0.2)


def is_asked_to_stop(hub: EventHub) -> bool:
    """Say whether a process of a hub is to give back what it has not started."""
    return any(board.read_bytes()[RECALLED] for board in (Path(hub._address.folder) / "boards").iterdir())


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


class Total(Subscriber[int, int]):
    """Sums up what it is given."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def setup(self) -> None:
        self.total = 0
        note(self.notes, f"setup {os.getpid()}")

    def restore(self, state: object) -> None:
        assert isinstance(state, int)
        self.total += state
        note(self.notes, f"restore {os.getpid()}")

    def snapshot(self) -> int:
        return self.total

    def handle(self, payload: int) -> int:
        self.total += payload
        return self.total


def test_after_so_many_events_another_process_goes_on_in_order_with_the_last_snapshot(tmp_path: Path) -> None:
    log, notes = tmp_path / "log", tmp_path / "notes"
    told: list[Notice] = []
    looks: list[tuple[str, int, int]] = []

    def look() -> bool:
        found = sub.statistics()
        looks.append((found.state, len(found.pids), found.restarts))
        return len({line.split()[1] for line in lines(log)}) >= 4 and "".join(lines(notes)).count("restore") >= 3

    hub = EventHub()
    hub.on_notice(told.append)
    sub = hub.subscribe("k", lambda n: note(log, f"{n} {os.getpid()}"), recycle=Recycle(max_events=200))
    total = hub.subscribe("k", Total(notes), snapshot=Snapshot(every=50), recycle=Recycle(max_events=200))
    count = 0
    with hub:
        while not look():
            hub.publish_batch("k", range(count, count + 50))
            hub.flush()
            count += 50
        assert total.request(0).result(30) == sum(range(count))
        found = hub.drain().subscribers[sub.name]
    rows = [line.split() for line in lines(log)]
    assert [int(n) for n, _ in rows] == list(range(count))
    assert min([*Counter(pid for _, pid in rows).values()][:-1]) >= 200
    assert set(looks) == {("RUNNING", 1, 0)}
    assert (found.retried, found.dead, told) == (0, 0, [])
    events = [line.split() for line in lines(notes)]
    setups, restored = ([pid for what, pid in events if what == hook] for hook in ("setup", "restore"))
    assert restored == setups[1 : len(restored) + 1], "each first one, then the other, but for one that waited at the end"


def test_age_and_size_are_limits_too(tmp_path: Path) -> None:
    kept: list[bytes] = []

    def grow(megabytes: int) -> int:
        kept.append(b"x" * (megabytes << 20))
        return os.getpid()

    hub = EventHub()
    pool = hub.executor("old", replicas=1, recycle=Recycle(max_age=0.1))
    old = pool.subscription
    large = hub.subscribe("large", grow, name="large", recycle=Recycle(max_rss="150MB"))
    born_large = hub.subscribe("born", grow, name="born-large", recycle=Recycle(max_rss="1MB"))
    with hub:
        before = {sub: sub.statistics().pids[0] for sub in (old, large, born_large)}
        assert large.request(1).result(10) == before[large]
        assert eventually(lambda: pool.submit(os.getpid).result(10) != before[old])
        assert large.request(160).result(10) == before[large]
        assert eventually(lambda: large.request(0).result(10) != before[large])
        assert large.statistics().rss < 150e6
        assert born_large.statistics().pids == (before[born_large],), "its next one would be no smaller"
        assert [sub.statistics().restarts for sub in before] == [0, 0, 0]


def test_replicas_are_replaced_one_after_the_other(tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Slow(Subscriber[int, int]):
        def setup(self) -> None:
            again = (tmp_path / f"was-{self.replica}").exists()
            (tmp_path / f"was-{self.replica}").touch()
            if again:
                note(log, f"begins {self.replica}")
                time.sleep(0.1)
                note(log, f"ends {self.replica}")

        def handle(self, payload: int) -> int:
            return os.getpid()

    hub = EventHub()
    pair = hub.subscribe("k", Slow, replicas=2, recycle=Recycle(max_age=0.2))
    with hub:
        before = set(pair.statistics().pids)
        assert eventually(lambda: not before & set(pair.statistics().pids))
        assert len(set(pair.statistics().pids)) == 2
        assert set(pair.map(range(20))) <= set(pair.statistics().pids)
    rows = [line.split() for line in lines(log)]
    assert {replica for _, replica in rows} == {"0", "1"}
    pairs = list(zip(rows[::2], rows[1::2], strict=False))
    assert all(first == ["begins", which] and second == ["ends", which] for first, second in pairs for which in first[1:])


def test_a_long_setup_leaves_no_gap_and_a_long_event_is_not_interrupted(tmp_path: Path) -> None:
    starts, log = tmp_path / "starts", tmp_path / "log"

    class Model(Subscriber[int, int]):
        def setup(self) -> None:
            if (tmp_path / "there").exists():
                time.sleep(1.0)
            (tmp_path / "there").touch()

        def handle(self, payload: int) -> int:
            note(starts, time.monotonic())
            return os.getpid()

    def take_time(n: int) -> None:
        note(log, f"begins {n}")
        time.sleep(0.8 if n == 1 else 0)
        note(log, f"ends {n}")

    hub = EventHub(stop=SOON)
    model = hub.subscribe("model", Model, recycle=Recycle(max_events=1))
    slow = hub.subscribe("slow", take_time, recycle=Recycle(max_events=1))
    with hub:
        hub.publish_batch("slow", range(3))
        first, began = model.request(0).result(10), time.monotonic()
        while model.request(0).result(10) == first:
            time.sleep(0.005)
        assert time.monotonic() - began > 0.9
        hub.drain()
        assert slow.statistics().retried == 0
    times = [float(line) for line in lines(starts)]
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.6
    assert lines(log) == [f"{what} {n}" for n in range(3) for what in ("begins", "ends")]


def test_one_that_cannot_be_replaced_goes_on_and_that_is_told_and_tried_again(tmp_path: Path) -> None:
    told: dict[str | None, list[Notice]] = {"raises": [], "hangs": []}

    class Ill(Subscriber[int, int]):
        def setup(self) -> None:
            if not (tmp_path / "ill").exists():
                return
            if self.name == "raises":
                raise RuntimeError("no model today")
            time.sleep(60)

        def handle(self, payload: int) -> int:
            return os.getpid()

    hub = EventHub()
    hub.on_notice(lambda notice: told[notice.subscriber].append(notice))
    rules = {"recycle": Recycle(max_events=1), "limits": Limits(start_timeout=0.3), "restart": Restart("never")}
    subs = [hub.subscribe(name, Ill, name=str(name), **rules) for name in ("raises", "hangs")]  # type: ignore[call-overload]
    with hub:
        (tmp_path / "ill").touch()
        before = [sub.request(0).result(10) for sub in subs]
        assert eventually(lambda: all(told.values()))
        assert [sub.request(0).result(10) for sub in subs] == before
        (tmp_path / "ill").unlink()
        for sub, first in zip(subs, before, strict=True):
            (notice,) = told[sub.name]
            assert (notice.kind, notice.details["ready"]) == ("death", False)
            assert f"was to replace process {first}, which goes on" in notice.message
            assert eventually(lambda: sub.request(0).result(10) != first)  # noqa: B023
            assert (sub.state, sub.statistics().restarts, len(told[sub.name])) == ("RUNNING", 0, 1)
    assert "no model today" in told["raises"][0].details["traceback"]
    assert "was not ready in time" in told["hangs"][0].message


def test_the_next_one_is_ended_with_the_rest(tmp_path: Path) -> None:
    """Be it that it is being set up, or that it waits for the other to finish what it runs."""

    class Stuck(Subscriber[str, int]):
        def setup(self) -> None:
            note(tmp_path / self.name, os.getpid())
            while self.name.startswith("setup") and (tmp_path / f"{self.name} {self.replica}").exists():
                time.sleep(0.01)
            (tmp_path / f"{self.name} {self.replica}").touch()

        def handle(self, payload: str) -> int:
            while self.name.startswith("waits") and payload == "hang":
                time.sleep(0.01)
            return os.getpid()

    def pids_of(name: str) -> set[int]:
        return set(map(int, lines(tmp_path / name)))

    def subscribe(name: str) -> Subscription[str, int]:
        two = name.endswith("scale")
        return hub.subscribe(name, Stuck, name=name, replicas=1 + two, recycle=Recycle(max_events=1, max_age=0.1 if two else None))

    hub = EventHub(stop=SOON, check=False)
    whats = ("restart", "unsubscribe", "replace", "scale", "stop")
    subs = {name: subscribe(name) for name in (f"{moment}-{what}" for moment in ("setup", "waits") for what in whats)}
    with hub:
        for sub in subs.values():
            sub.request("go").result(10)
            sub.request("hang")
        assert eventually(lambda: all(len(pids_of(name)) > sub._spec.replicas for name, sub in subs.items()))
        before = {name: pids_of(name) for name in subs}
        for moment in ("setup", "waits"):
            subs[f"{moment}-restart"].restart()
            subs[f"{moment}-scale"].scale(1)
            hub.subscribe("k", len, name=f"{moment}-replace", replace=True)
        for moment in ("setup", "waits"):
            subs[f"{moment}-unsubscribe"].unsubscribe(drain=False)
        for name, pids in before.items():
            left = 2 if name.endswith(("stop", "scale")) else 0  # of the replicas the one that stays may be the one with the next
            assert eventually(lambda: sum(map(is_alive, pids)) <= left), name  # noqa: B023
        began = time.monotonic()
        hub.stop(drain=False)
        assert time.monotonic() - began < 3
    assert not any(is_alive(pid) for name in subs for pid in pids_of(name))


def test_what_the_old_one_still_runs_can_be_killed(tmp_path: Path) -> None:
    hub = EventHub(check=False)

    class Slow(Subscriber[int, int]):
        def setup(self) -> None:
            note(tmp_path / "setups", os.getpid())

        def handle(self, payload: int) -> int:
            time.sleep(payload)
            return os.getpid()

    sub = hub.subscribe("k", Slow, recycle=Recycle(max_events=1))
    with hub:
        sub.request(0).result(10)
        endless = sub.request(60)
        assert eventually(lambda: is_asked_to_stop(hub))
        endless.kill()
        assert sub.request(0).result(10) == int(lines(tmp_path / "setups")[1])
        assert sub.statistics().restarts == 0


def test_the_inline_engine_has_no_process_to_replace() -> None:
    hub = EventHub(engine="inline")
    with pytest.raises(mphub.InvalidOption, match=r"recycle: the inline engine .* engine='process'"):
        hub.subscribe("k", len, recycle=Recycle(max_events=5))
    hub.subscribe("k", len, recycle=Recycle())
