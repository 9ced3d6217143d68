"""``process=``: subscribers that share a process have everything of their own but that."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import Batch, EventHub, Inbox, InvalidOption, Limits, Rate, Recycle, Restart, Snapshot, Subscriber
from mphub.procs.exchange import Exchange
from mphub.procs.hosting import SLOW
from mphub.procs.hosts import MANY, Host
from mphub.procs.one_by_one import MANY_FAILURES
from mphub.procs.sharing import MOST_ASIDE
from mphub.store.blobs import Blobs
from mphub.store.journal import Journal
from mphub.wire.frames import Batch as Frame
from mphub.wire.frames import encode, join
from tests.helpers import eventually
from tests.notes import lines, note

pytestmark = pytest.mark.timeout(60)


seen: contextvars.ContextVar[str] = contextvars.ContextVar("seen", default="nothing")


def test_they_run_side_by_side_in_one_process() -> None:
    hub = EventHub()

    async def ask(n: int) -> int:
        await asyncio.sleep(0.2)
        return os.getpid()

    def block(n: int) -> int:
        time.sleep(0.2)
        return os.getpid()

    asked = [hub.subscribe("k", ask, name=f"ask{i}", process="one") for i in range(20)]
    blocked = [hub.subscribe("k", block, name=f"block{i}", process="one", concurrency=4) for i in range(4)]
    with hub:
        began = time.monotonic()
        replies = [subscription.request(1) for subscription in asked + blocked]
        pids = {reply.result(10) for reply in replies}
        assert time.monotonic() - began < 1.5  # not 24 times 0.2 s
        assert len(pids) == 1
        assert {subscription.statistics().pids for subscription in asked} == {tuple(pids)}


def test_coroutines_have_a_task_and_a_context_of_their_own(tmp_path: Path) -> None:
    hub = EventHub()

    def handler(waits: bool) -> Any:
        async def handle(n: int) -> None:
            from tests.procs.test_sharing import seen  # a context variable cannot be pickled

            note(tmp_path / "log", seen.get())
            seen.set("something")
            async with asyncio.timeout(5), asyncio.TaskGroup() as group:
                if waits:
                    await group.create_task(asyncio.sleep(0.001))
            assert asyncio.current_task() is not None
            assert seen.get() == "something"
            mphub.publish("out", mphub.current_event().payload)

        return handle

    for i in range(10):
        hub.subscribe("k", handler(i % 2 == 0), name=f"s{i}", process="one")
    out = hub.subscribe("out", lambda n: None, name="out", process="one")
    with hub:
        hub.publish_batch("k", range(5))
        hub.drain(20)
        assert out.statistics().handled == 50
    assert Counter(lines(tmp_path / "log")) == {"nothing": 50}


def test_an_event_is_cancelled_for_all_of_them() -> None:
    hub = EventHub()
    for name in ("first", "second"):
        hub.subscribe("k", lambda n: None, name=name, process="one")
    with hub:
        assert hub.cancel(hub.publish("k", 3, delay=60))
        found = hub.drain(20).subscribers
    assert {(s.accepted, dict(s.dropped)["cancelled"]) for s in found.values()} == {(1, 1)}


def test_one_that_cannot_be_set_up_is_fatal_alone(tmp_path: Path) -> None:
    class Model(Subscriber[int, int]):
        def setup(self) -> None:
            note(tmp_path / "log", "setup")
            (tmp_path / "model").read_text()

        def handle(self, payload: int) -> int:
            return payload

        def teardown(self) -> None:
            note(tmp_path / "log", "teardown")

    hub = EventHub()
    other = hub.subscribe("k", lambda n: -n, name="other", process="one")
    model = hub.subscribe("k", Model, name="model", process="one")
    with pytest.raises(mphub.StartFailed) as failed:
        hub.start()
    assert isinstance(failed.value.__cause__, FileNotFoundError)
    hub.start(wait=False)
    with hub._or_stop():
        assert eventually(lambda: (model.state, other.state) == ("FATAL", "RUNNING"))
        hub.publish("k", 1)
        assert eventually(lambda: other.statistics().handled == 1)
        with pytest.raises(mphub.SubscriberFatal):
            model.request(1).result(5)
        with pytest.raises(mphub.SubscriberFatal):
            hub.drain(20)
        (tmp_path / "model").touch()
        model.restart()
        assert hub.drain(20).subscribers["model"].handled == 1
        assert model.request(2).result(5) == 2
    hub.stop()
    assert lines(tmp_path / "log") == ["setup"] * 3 + ["teardown"]


def test_one_that_takes_long_does_not_hold_the_others(tmp_path: Path) -> None:
    hub = EventHub()

    async def wait(n: int) -> None:
        while not (tmp_path / "go").exists():
            await asyncio.sleep(0.01)
        note(tmp_path / "log", n)

    slow, quick = hub.subscribe("k", wait, process="one"), hub.subscribe("k", lambda n: None, name="quick", process="one")
    with hub:
        hub.publish_batch("k", range(3000))
        assert eventually(lambda: quick.statistics().handled == 3000, 20)
        assert (slow.statistics().handled, slow.statistics().running) == (0, 1)
        (tmp_path / "go").touch()
        hub.drain(20)
    assert lines(tmp_path / "log") == [str(n) for n in range(3000)]


@pytest.mark.parametrize(
    "option",
    [
        {"replicas": 2}, {"ordered": True}, {"batch": Batch(2)}, {"snapshot": Snapshot()}, {"recycle": Recycle(max_events=1)},
        {"rate": Rate(1, 1)}, {"env": {"A": "b"}}, {"limits": Limits(timeout=1)}, {"inbox": Inbox(overflow="latest")}, {"process": "a b"},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_what_only_a_process_of_its_own_can_have_is_refused(option: dict[str, Any]) -> None:
    class Model(Subscriber[Any, Any]):
        def handle(self, payload: Any) -> Any: ...
        def handle_batch(self, payloads: list[Any]) -> Any: ...
        def snapshot(self) -> None: ...
        def restore(self, state: object) -> None: ...

    handler = Model if "snapshot" in option else (lambda payload: payload)
    with pytest.raises(InvalidOption, match=f"^{next(iter(option))}"):
        EventHub().subscribe("k", handler, **{"process": "one", **option})


def test_what_is_the_process_s_is_what_its_first_subscriber_says() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="first", process="one", restart=Restart(max_restarts=1))
    with pytest.raises(InvalidOption, match=r"restart: got .*expected .*max_restarts=1"):
        hub.subscribe("k", lambda n: n, name="second", process="one")
    with pytest.raises(InvalidOption, match="process: got 'two' for 'first'"):
        hub.subscribe("k", lambda n: n, name="first", process="two", replace=True)
    with pytest.raises(InvalidOption, match="replicas"), hub:
        hub.subscription("first").scale(2)


def test_the_end_of_one_that_shares_a_process_tears_down_it_alone(tmp_path: Path) -> None:
    class Model(Subscriber[int, None]):
        def setup(self) -> None:
            mphub.publish("out", f"{self.name} begins")

        def handle(self, payload: int) -> None: ...
        def teardown(self) -> None:
            note(tmp_path / "log", f"{self.name} {threading.current_thread() is threading.main_thread()}")

    hub = EventHub()
    first, _ = (hub.subscribe("k", Model, name=name, process="one") for name in ("first", "second"))
    hub.subscribe("out", lambda text: note(tmp_path / "out", text), name="out", process="one")
    with hub:
        hub.publish("k", 1)
        first.unsubscribe()
        assert eventually(lambda: lines(tmp_path / "log") == ["first True"])
    assert lines(tmp_path / "log") == ["first True", "second True"]
    assert sorted(lines(tmp_path / "out")) == ["first begins", "second begins"]


def test_those_who_come_and_go_leave_no_more_than_their_books(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    exchange = Exchange(Journal(tmp_path, 64 << 20), Blobs(tmp_path / "blobs"), 64 << 20, time.time)
    hub, count = EventHub(), 300
    specs = [hub.subscribe("k", len, name=f"s{n}", process="one")._spec for n in range(count)]
    with exchange.turn():
        exchange.subscribe(*hub._hosts.values())
    host = exchange.boxes["process:one"]
    assert isinstance(host, Host)
    for n, spec in enumerate(specs):
        with exchange.turn():
            exchange.sharing.join(spec)
            batch = Frame(1, n + 1, n + 1, 1, ["k"], [0], 0.0, size=1)
            exchange.take_in(batch, encode(batch), join([b"1"]), 1)
        with exchange.turn():
            exchange.drop_pending(host, "purged")
    assert len(host.crowds) <= MANY
    assert {name: (one["accepted"], one["unfinished"]) for name, one in host.public().items()} == {
        f"s{n}": (count - n, 0) for n in range(count)
    }


def wait_for(path: Path) -> None:
    assert eventually(path.exists)


def test_one_that_leaves_and_comes_again_gets_what_comes_for_all() -> None:
    hub = EventHub()
    hub.subscribe("k", abs, name="first", process="one")
    again: mphub.Subscription[Any, Any] = hub.subscribe("k", abs, name="again", process="one")
    with hub:
        hub.publish("k", 1)
        again.unsubscribe()
        again = hub.subscribe("k", abs, name="again", process="one")
        hub.publish("k", 2)
        assert [one.handled for one in hub.drain(10).subscribers.values()] == [2, 2]


def test_what_waits_for_a_thread_is_handled_by_who_replaces_its_handler(tmp_path: Path) -> None:
    class Model(Subscriber[int, None]):
        def setup(self) -> None:
            if (tmp_path / "busy").exists():  # it replaces the other
                (tmp_path / "go").touch()
                wait_for(tmp_path / "idle")

        def handle(self, n: int) -> None:
            note(tmp_path / "log", n)

    def occupy(n: int) -> None:
        (tmp_path / "busy").touch()
        wait_for(tmp_path / "go")

    async def look(n: int) -> None: ...

    hub = EventHub()
    hub.subscribe("busy", occupy, name="occupy", process="one")
    hub.subscribe("after", lambda n: (tmp_path / "idle").touch(), name="after", process="one")
    look_at = hub.subscribe("look", look, name="look", process="one")
    hub.subscribe("k", Model, name="model", process="one")
    with hub:
        hub.publish("busy", 1)
        wait_for(tmp_path / "busy")
        hub.publish("k", 2)
        hub.publish("after", 3)
        hub.publish("look", 4)
        assert eventually(lambda: look_at.statistics().handled == 1)  # so the others wait for the one thread
        hub.subscribe("k", Model, name="model", process="one", replace=True)
        assert hub.drain(10).subscribers["model"].handled == 1
    assert lines(tmp_path / "log") == ["2"]


def test_a_handler_publishes_with_its_event_while_another_one_sets_up(tmp_path: Path) -> None:
    class Model(Subscriber[int, None]):
        def setup(self) -> None:
            (tmp_path / "go").touch()
            wait_for(tmp_path / "published")
            mphub.publish("out", "setup")

        def handle(self, n: int) -> None: ...

    def fail(n: int) -> None:
        (tmp_path / "running").touch()
        wait_for(tmp_path / "go")
        mphub.publish("out", mphub.current_event().payload)
        (tmp_path / "published").touch()
        raise ValueError

    hub = EventHub(check=False)
    hub.subscribe("k", fail, process="one", retry=mphub.Retry(1))
    hub.subscribe("out", lambda text: note(tmp_path / "out", text), name="out")
    with hub:
        hub.publish("k", 1)
        wait_for(tmp_path / "running")
        hub.subscribe("other", Model, process="one")
        assert hub.drain(10).subscribers["fail"].dead == 1
        assert eventually(lambda: lines(tmp_path / "out") == ["setup"])
        assert [repr(letter.error) for letter in hub.dead_letters()] == ["ValueError()"]
    assert lines(tmp_path / "out") == ["setup"]


def test_a_teardown_that_raises_concerns_no_other(tmp_path: Path) -> None:
    class Model(Subscriber[int, None]):
        def handle(self, n: int) -> None: ...

        def teardown(self) -> None:
            mphub.publish("out", f"{self.name} ends")
            if self.name in ("first", "third"):
                raise ValueError(self.name)

    hub = EventHub()
    first, second, _, fourth = (hub.subscribe("k", Model, name=name, process="one") for name in ("first", "second", "third", "fourth"))
    hub.subscribe("out", lambda text: note(tmp_path / "out", text), name="out", process="two")
    with hub:
        pids = fourth.statistics().pids
        first.unsubscribe()
        second.unsubscribe()
        assert eventually(lambda: lines(tmp_path / "out") == ["second ends"])  # what the other one published does not count
        assert fourth.request(1).result(5) is None
        assert (fourth.statistics().pids, fourth.statistics().restarts) == (pids, 0)


def test_pause_and_resume_leave_it_as_it_was() -> None:
    class Counting(Subscriber[int, int]):
        def setup(self) -> None:
            self.count = 0

        def handle(self, n: int) -> int:
            self.count += n
            return self.count

    hub = EventHub()
    counting = hub.subscribe("k", Counting, process="one")
    with hub:
        assert counting.request(1).result(5) == 1
        counting.pause()
        counting.resume()
        assert counting.request(1).result(5) == 2


def test_a_coroutine_that_cancels_its_task_without_waiting_concerns_no_other() -> None:
    async def cancel(n: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def wait(n: int) -> None:
        await asyncio.sleep(0)

    hub = EventHub()
    for handler in (cancel, wait):
        hub.subscribe("k", handler, process="one", retry=mphub.Retry(1))
    with hub:
        hub.publish_batch("k", range(20))
        assert {name: one.handled for name, one in hub.drain(10).subscribers.items()} == {"cancel": 20, "wait": 20}


def test_a_slow_one_goes_on_though_many_fail_in_the_turn_in_which_it_does(tmp_path: Path) -> None:
    def member(i: int) -> Any:
        async def handle(n: int) -> None:
            if n == 0:
                note(tmp_path / "log", i)
                while not (tmp_path / "go").exists():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1 + 0.001 * i)
                raise ValueError(i)

        return handle

    async def block(n: int) -> None:
        while not (tmp_path / "go").exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        time.sleep(0.2)  # all the others are due when this has ended

    hub = EventHub(check=False)
    hub.subscribe("block", block, process="one")
    for i in range(MANY_FAILURES):
        hub.subscribe(f"k.{i}", member(i), name=f"s{i}", process="one", retry=mphub.Retry(1))
    with hub:
        hub.publish("block", 0)
        for i in range(MANY_FAILURES):
            hub.publish(f"k.{i}", 0)
        last = f"s{MANY_FAILURES - 1}"
        assert eventually(lambda: len(lines(tmp_path / "log")) == MANY_FAILURES)
        hub.publish_batch(f"k.{MANY_FAILURES - 1}", range(1, 4))
        assert eventually(lambda: hub.subscription(last).statistics().running == 1)
        time.sleep(2 * SLOW)  # it is slow when it has been at its event for so long, which nothing tells
        (tmp_path / "go").touch()
        assert hub.drain(10).subscribers[last].handled == 3


def test_its_mean_is_what_an_event_of_its_process_takes() -> None:
    async def wait(n: int) -> None:
        await asyncio.sleep(0.01)

    hub = EventHub()
    for name in "ab":
        hub.subscribe("k", wait, name=name, process="one")
    with hub:
        hub.publish_batch("k", range(20))
        assert all(0.01 <= one.mean < 0.1 for one in hub.drain(10).subscribers.values())


def test_what_a_busy_process_gives_back_for_one_that_is_paused_ends_with_the_hub(tmp_path: Path) -> None:
    async def block(n: int) -> None:
        (tmp_path / "running").touch()
        wait_for(tmp_path / "go")

    async def pass_by(n: int) -> None: ...

    hub, deaths = EventHub(), []
    hub.on_notice(lambda notice: deaths.append(notice.message))
    hub.subscribe("k", block, process="one")
    paused = hub.subscribe("k", pass_by, name="paused", process="one")
    hub.start()
    hub.publish("k", 1)
    wait_for(tmp_path / "running")
    paused.pause()
    threading.Timer(0.2, (tmp_path / "go").touch).start()
    hub.stop(drain=False)
    assert (deaths, paused.statistics().dropped) == ([], {"stopped": 1})


def test_what_comes_for_one_that_is_paused_alone_is_seen_at_once() -> None:
    hub = EventHub(check=False)
    paused: mphub.Subscription[Any, Any] = hub.subscribe("k", abs, name="paused", process="one", concurrency=2)
    hub.subscribe("other", abs, name="other", process="one")
    with hub:
        paused.pause()
        hub.publish_batch("k", range(MOST_ASIDE + 5000))
        with pytest.raises(mphub.SubscriberPaused, match="'paused' is PAUSED with work left"):
            hub.drain(10)
        assert (paused.statistics().waiting, paused.statistics().dead) == (MOST_ASIDE, 5000)
        hub.purge()
        paused.resume()


def test_functions_of_one_process_may_ask_each_other() -> None:
    def ask(n: int) -> int:
        return int(hub.request(f"count.{n - 1}", n - 1).result(5)) + 1 if n else threading.active_count()

    hub = EventHub(check=False)
    for n in range(4):
        hub.subscribe(f"count.{n}", ask, name=f"s{n}", process="one")
    with hub:
        before = hub.request("count.0", 0).result(5)
        assert hub.request("count.3", 3).result(10) - 3 == before + 3 + 1  # for each that asks, and for what reads the answers
        assert eventually(lambda: hub.request("count.0", 0).result(5) == before + 1)
