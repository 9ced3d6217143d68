"""What only the thread engine does: handlers in threads of this process, side by side, interrupted and abandoned but never ended."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mphub
from mphub import EventHub, Inbox, Limits, Restart, Retry, Snapshot, Stop, Subscriber
from mphub.procs import lives, threads
from tests.helpers import eventually
from tests.procs.test_publishing import Interrupt, alarms, interrupt, publish_interrupted

seen: list[Any] = []
"""What handlers of this module leave here is seen, as they run in this process."""
GATE = threading.Event()
BOTH = threading.Barrier(2)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Let every test begin with a closed gate, and leave no thread behind."""
    seen.clear()
    GATE.clear()
    BOTH.reset()
    yield
    GATE.set()
    assert eventually(lambda: not ours()), ours()


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mphub-")]


def run_threads(**options: Any) -> EventHub:
    return EventHub(engine="thread", **options)


def look(payload: object) -> None:
    seen.append((payload, os.getpid(), threading.current_thread().name))


def keep(payload: object) -> None:
    seen.append(payload)


def wait(payload: object) -> object:
    seen.append(payload)
    GATE.wait(20)
    return payload


def meet(payload: object) -> int:
    """Return only if another handler is here at the same time."""
    BOTH.wait(10)
    return mphub.current_event().replica


# -- side by side


def test_handlers_run_in_threads_of_this_process() -> None:
    hub = run_threads()
    hub.subscribe("k", look, name="look")
    with hub:
        hub.publish("k", [1])
        assert hub.statistics().pids == {}
        assert sorted(ours()) == ["mphub-clerk", "mphub-look"]
    assert seen == [([1], os.getpid(), "mphub-look")]
    assert ours() == [], "not a moment later"


def test_two_subscribers_run_at_the_same_time() -> None:
    hub = run_threads()
    hub.subscribe("k", meet, name="one")
    hub.subscribe("k", meet, name="two")
    with hub:
        assert hub.gather("k", 1).result(10) == {"one": 0, "two": 0}


def test_replicas_run_at_the_same_time() -> None:
    hub = run_threads()
    hub.subscribe("k", meet, replicas=2)
    with hub:
        assert sorted(reply.result(10) for reply in [hub.request("k", n) for n in range(2)]) == [0, 1]


def test_one_that_blocks_does_not_keep_the_others() -> None:
    hub = run_threads()
    blocked = hub.subscribe("k", wait, name="blocked")
    hub.subscribe("*", lambda n: n, name="other")
    with hub:
        hub.publish("k", 1)
        assert [hub.request("other", n).result(10) for n in range(20)] == list(range(20))
        assert blocked.statistics().running == 1
        GATE.set()


def test_events_of_one_publisher_start_in_order() -> None:
    hub = run_threads()
    hub.subscribe("k.>", keep)
    hub.subscribe("k.>", lambda n: time.sleep(0), name="other")
    with hub:
        for n in range(2000):
            hub.publish(f"k.{n % 7}", n)
    assert seen == list(range(2000))


def test_scaled_up_and_down() -> None:
    hub = run_threads()
    sub = hub.subscribe("k", meet, name="k")
    with hub:
        sub.scale(2)
        sub.wait_ready(10)
        assert sorted(hub.map("k", range(2))) == [0, 1]
        sub.scale(1)
        assert eventually(lambda: ours().count("mphub-k-1") == 0)
        sub.scale(2)
        assert sorted(hub.map("k", range(2))) == [0, 1]
    assert sub.statistics().restarts == 0


def jot(n: int) -> None:
    seen.append((mphub.current_event().key, n, mphub.current_event().replica))
    time.sleep(0.0005)


def test_replicas_keep_the_order_of_each_key() -> None:
    hub = run_threads()
    hub.subscribe("k.*", jot, replicas=3, ordered=True)
    with hub:
        for n in range(300):
            hub.publish(f"k.{n % 10}", n)
    for key in range(10):
        assert [n for found, n, _ in seen if found == f"k.{key}"] == list(range(key, 300, 10))
    assert {replica for _, _, replica in seen} == {0, 1, 2}


# -- full inboxes


def test_a_publisher_is_held_as_soon_as_an_inbox_is_full_and_released_in_time() -> None:
    hub = run_threads()
    hub.subscribe("k", wait, inbox=Inbox(maxsize=3))
    hub.subscribe("other", keep)
    published: list[int] = []

    def publish() -> None:
        for n in range(10):
            hub.publish("k", n)
            published.append(n)

    publisher = threading.Thread(target=publish)
    with hub:
        publisher.start()
        assert eventually(lambda: len(published) == 3)
        hub.publish("other", "goes on")
        hub.request("other", "meanwhile").result(10)
        assert published == [0, 1, 2]
        GATE.set()
        publisher.join(10)
    assert [n for n in seen if isinstance(n, int)] == published == list(range(10))


def test_who_holds_publishers_for_long_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "HELD_AFTER", 0.02)
    told: list[mphub.Notice] = []
    hub = run_threads()
    hub.on_notice(told.append)
    hub.subscribe("k", wait, inbox=Inbox(maxsize=1))
    publisher = threading.Thread(target=lambda: hub.publish_batch("k", range(3)))
    with hub:
        publisher.start()
        assert eventually(lambda: told)
        time.sleep(0.1)  # as long as five more looks
        GATE.set()
        publisher.join(10)
    assert [(notice.kind, notice.subscriber) for notice in told] == [("held", "wait")]
    assert "publishers of k have waited" in told[0].message


def flood(n: int) -> None:
    """Publish more than any inbox takes, in every way."""
    for i in range(n):
        mphub.publish("k", i)
        mphub.publish("k", i, now=True)


def test_a_handler_is_never_held() -> None:
    hub = run_threads()
    hub.subscribe("flood", flood)
    hub.subscribe("k", lambda n: None, name="small", inbox=Inbox(maxsize=2))
    with hub:
        hub.publish("flood", 50)
        assert hub.drain(10).subscribers["small"].handled == 100


def test_a_held_publisher_learns_that_the_hub_stops() -> None:
    hub = run_threads(stop=Stop(ask=0.1))
    hub.subscribe("k", wait, inbox=Inbox(maxsize=1))
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            hub.publish_batch("k", range(9))
        except mphub.HubClosed as error:
            errors.append(error)

    publisher = threading.Thread(target=publish)
    hub.start()
    publisher.start()
    assert eventually(lambda: seen)
    hub.stop(drain=False)
    publisher.join(10)
    assert "was stopped" in str(errors[0])


# -- asking from a handler


def test_a_handler_that_asks_waits_in_its_own_thread() -> None:
    hub = run_threads()
    hub.subscribe("ask", lambda key: hub.request(key, "k").result(10), name="ask")
    hub.subscribe("slow", wait, name="slow")
    hub.subscribe("fast", lambda n: f"fast {n}", name="fast")
    with hub:
        asked = hub.request("ask", "slow")
        assert eventually(lambda: seen == ["k"])
        assert hub.request("fast", 1).result(10) == "fast 1"
        GATE.set()
        assert asked.result(10) == "k"
        with pytest.raises(mphub.HubError, match="would wait for itself: call the function"):
            hub.request("ask", "ask").result(10)


def test_a_stop_lets_a_handler_go_that_waits_for_an_answer() -> None:
    hub = run_threads(check=False)
    hub.subscribe("ask", lambda key: hub.request(key, "k").result(10), name="ask")
    hub.subscribe("slow", wait, name="slow")
    hub.start()
    hub.publish("slow", "blocks")
    hub.publish("ask", "slow")
    assert eventually(lambda: hub.statistics().accepted == 3)
    GATE.set()
    hub.stop(drain=False)
    assert hub.statistics().subscribers["ask"].waiting == hub.statistics().subscribers["slow"].waiting == 0


def test_what_a_reply_calls_may_call_the_hub() -> None:
    """Also in the clerk's own thread, which tells of what is dropped; and it never waits for room that it would have to make."""
    hub = run_threads(check=False)
    hub.subscribe("k", wait, name="full", inbox=Inbox(maxsize=1))
    paused = hub.subscribe("paused", keep)
    figures: list[int] = []

    def ended(reply: Any) -> None:
        hub.publish("k", "more")
        figures.append(hub.statistics().subscribers["full"].accepted)

    with hub:
        hub.request("k", 1).add_done_callback(ended)
        paused.pause()
        hub.request("paused", 2, expires=0.01).add_done_callback(ended)
        assert eventually(lambda: figures == [2])
        GATE.set()
        assert eventually(lambda: figures == [2, 3])


# -- failing and ending


def leave(code: int) -> None:
    sys.exit(code)


def test_leaving_is_a_failure_like_any_other() -> None:
    hub = run_threads(check=False)
    sub = hub.subscribe("k", leave, retry=Retry(2, on=SystemExit, delay=0))
    with hub:
        hub.publish("k", 3)
        found = hub.drain().subscribers[sub.name]
        assert (found.failed, found.dead, found.restarts, sub.state) == (2, 1, 0, "RUNNING")
        assert repr(sub.dead_letters()[0].error) == "SystemExit(3)"


def test_a_stuck_handler_is_abandoned_by_a_stop_and_named(caplog: pytest.LogCaptureFixture) -> None:
    hub = run_threads(stop=Stop(ask=0.1), check=False)
    sub = hub.subscribe("k", wait, name="stuck")
    hub.start()
    asked = [hub.request("k", n) for n in range(2)]
    assert eventually(lambda: seen == [0])
    began = time.monotonic()
    hub.stop(drain=False)
    assert time.monotonic() - began < 3
    assert ours() == ["mphub-stuck"], "a thread cannot be ended"
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "stuck: thread mphub-stuck still does what it did" in line.getMessage()
    assert (sub.statistics().accepted, dict(sub.statistics().dropped)) == (2, {"stopped": 2})
    assert {type(reply.exception(1)) for reply in asked} == {mphub.Dropped}
    GATE.set()
    assert eventually(lambda: not ours())
    assert seen == [0], "it takes nothing more"


def test_the_event_of_a_stuck_handler_goes_to_the_next_life() -> None:
    hub = run_threads(stop=Stop(ask=0.05))
    sub = hub.subscribe("k", wait)
    with hub:
        hub.publish_batch("k", range(3))
        assert eventually(lambda: seen == [0])
        sub.restart()
        assert eventually(lambda: seen == [0, 0])
        GATE.set()
        found = hub.drain().subscribers[sub.name]
    assert (found.handled, found.retried, found.restarts) == (3, 1, 1)
    assert seen == [0, 0, 1, 2]


def give_in(_: object) -> str:
    while not mphub.current_event().cancelled:
        time.sleep(0.001)
    seen.append("saw it")
    return "too late"


def test_a_handler_that_runs_can_see_that_nobody_wants_it_any_more() -> None:
    hub = run_threads()
    sub = hub.subscribe("k", give_in)
    with hub:
        reply = hub.request("k", 1)
        assert eventually(lambda: sub.statistics().running)
        assert reply.cancel()
        found = hub.drain(10).subscribers[sub.name]
    assert (seen, found.handled, dict(found.dropped)) == (["saw it"], 1, {})


def test_the_thread_of_a_killed_reply_is_abandoned_at_once() -> None:
    hub = run_threads()
    sub = hub.subscribe("k", wait, name="k")
    with hub:
        stuck, behind = hub.request("k", 1), hub.request("k", 2)
        assert eventually(lambda: seen == [1])
        assert stuck.kill()
        assert eventually(lambda: seen == [1, 2])
        GATE.set()
        assert behind.result(10) == 2
        found = hub.drain(10).subscribers[sub.name]
    assert (found.handled, dict(found.dropped), found.restarts) == (1, {"cancelled": 1}, 1)


class Setup(Subscriber[str, str]):
    """Has trouble at the beginning."""

    def setup(self) -> None:
        seen.append("setup")
        if len(seen) < 3:
            raise ConnectionError(len(seen))

    def handle(self, payload: str) -> str:
        return payload


class Hang(Subscriber[object, None]):
    """Does not get through its beginning."""

    def setup(self) -> None:
        GATE.wait(20)

    def handle(self, payload: object) -> None: ...


def test_a_set_up_that_fails_is_tried_again() -> None:
    hub = run_threads()
    sub = hub.subscribe("k", Setup, restart=Restart(delay=0))
    with hub:
        assert hub.request("k", "works").result(10) == "works"
    assert (seen, sub.statistics().restarts) == (["setup"] * 3, 2)


def test_what_cannot_be_set_up_is_fatal_until_its_restart() -> None:
    told: list[str] = []
    hub = run_threads()
    hub.on_notice(lambda notice: told.append(notice.kind))
    sub = hub.subscribe("k", Setup, restart=Restart(max_restarts=1, delay=0))
    hub.start(wait=False)
    with pytest.raises(mphub.StartFailed) as failed:
        sub.wait_ready(10)
    assert repr(failed.value.__cause__) == "ConnectionError(2)"
    reply = hub.request("k", "meanwhile")
    assert isinstance(reply.exception(10), mphub.SubscriberFatal)
    sub.restart()
    assert hub.request("k", "works").result(10) == "works"
    hub.stop()
    assert told == ["death", "death", "FATAL"]


def test_a_set_up_that_hangs_fails_the_start() -> None:
    hub = run_threads(stop=Stop(ask=0.1))
    hub.subscribe("k", Hang, limits=Limits(start_timeout=0.1))
    with pytest.raises(mphub.StartFailed) as failed:
        hub.start()
    assert "was not set up within 0.1 s" in str(failed.value.__cause__)


class Total(Subscriber[int, tuple[int, int]]):
    """Has a state of its own for each replica."""

    total = 0

    def handle(self, payload: int) -> tuple[int, int]:
        self.total += payload
        if payload == 13:
            GATE.wait(20)
        return self.replica, self.total

    def snapshot(self) -> int:
        if self.total == 99:
            raise ValueError("no state")
        return self.total

    def restore(self, state: object) -> None:
        assert isinstance(state, int)
        self.total = state


def test_a_state_outlives_restart_and_replace_and_is_that_of_the_last_commit() -> None:
    hub = run_threads(stop=Stop(ask=0.05))
    sub = hub.subscribe("k", Total, snapshot=Snapshot(every=1000, period=100))
    with hub:
        assert [hub.request("k", n).result(10) for n in (1, 2)] == [(0, 1), (0, 3)]
        sub.restart()
        assert hub.request("k", 3).result(10) == (0, 6)
        hub.subscribe("k", Total, name="Total", replace=True)
        assert hub.request("k", 4).result(10) == (0, 10)
        hub.publish("k", 13)
        assert eventually(lambda: sub.statistics().running == 1)
        sub.restart()  # the thread is abandoned, and what it did not commit is as if it had not been
        GATE.set()
        assert hub.request("k", 0).result(10) == (0, 23)


def test_a_state_that_cannot_be_had_is_a_death() -> None:
    hub = run_threads(check=False)
    sub = hub.subscribe("k", Total, restart=Restart(max_restarts=1, delay=0))
    with hub:
        hub.publish("k", 99)
        with pytest.raises(mphub.SubscriberFatal):
            hub.drain(10)
        assert (sub.state, sub.statistics().waiting, sub.statistics().handled) == ("FATAL", 1, 0)
        sub.unsubscribe()


def pour(n: int) -> None:
    """Publish more than the hub keeps, at first."""
    seen.append(n)
    for _ in range(20 if len(seen) == 1 else 1):
        mphub.publish("out", bytes(100_000))


def test_what_cannot_be_kept_is_done_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lives, "LATER", 0.05)
    told: list[str] = []
    hub = run_threads(max_bytes="1MB")
    hub.on_notice(lambda notice: told.append(notice.kind))
    hub.subscribe("k", pour)
    hub.subscribe("out", lambda data: None, name="out")
    with hub:
        hub.publish("k", 1)
        found = hub.drain(10).subscribers
    assert (seen, told, found["out"].handled, found["pour"].dead) == ([1, 1], ["full"], 1, 0)


def test_nobody_waits_for_a_hub_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: float) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    hub = run_threads()
    hub.subscribe("k", keep)
    hub.start()
    monkeypatch.setattr(threads.Books, "wake", lambda _, now: fail(now))
    for call in (lambda: hub.publish("k", 1, confirm=True), lambda: hub.publish("k", 1), hub.drain, hub.statistics, hub.stop):
        with pytest.raises(mphub.HubFailed, match="a mistake of ours"):
            call()


# -- interrupts


def test_a_drain_can_be_interrupted() -> None:
    hub = run_threads()
    hub.subscribe("k", wait)
    with hub:
        hub.publish("k", 1)
        began = time.monotonic()
        with pytest.raises(Interrupt), alarms(interrupt) as ring_in:
            ring_in(0.05)
            hub.drain()
        assert time.monotonic() - began < 3
        with pytest.raises(mphub.DrainTimeout, match="wait: 1"):
            hub.drain(0.05)
        GATE.set()
        assert hub.drain(10).subscribers["wait"].handled == 1


def test_an_interrupt_leaves_an_event_in_or_out() -> None:
    hub = run_threads()
    sub = hub.subscribe("k.*", keep, inbox=Inbox(maxsize=5000))
    with hub:
        sent, again = publish_interrupted(hub, 150)
        found = hub.drain(20).subscribers[sub.name]
    assert found.accepted == found.handled == len(seen)
    assert sorted(seen) == seen, "in order"
    assert set(range(sent)) <= set(seen) <= {*range(sent), *again}
    assert len(seen) <= sent + len(again)


class Last:
    """Publishes when nobody has it any more, wherever that happens to be."""

    def __del__(self) -> None:
        if HUB is not None:
            HUB.publish("last", 1)


HUB: EventHub | None = None


def test_a_finalizer_may_publish_in_the_midst_of_anything() -> None:
    global HUB
    HUB = hub = run_threads()
    last = hub.subscribe("last", lambda n: None, name="last")
    hub.subscribe("k", lambda found: None, name="k")
    with hub:
        for _ in range(50):
            hub.publish("k", Last())
        assert eventually(lambda: last.statistics().handled == 100), "one here, one there"
    HUB = None


# -- what it has not


def test_what_needs_processes_is_refused_by_name() -> None:
    hub = run_threads()
    with pytest.raises(mphub.InvalidOption, match=r"limits\(timeout\): the thread engine .*; use engine='process'"):
        hub.subscribe("k", keep, limits=Limits(timeout=1))
    with pytest.raises(mphub.InvalidOption, match=r"recycle: the thread engine .* use engine='process'"):
        hub.subscribe("k", keep, recycle=mphub.Recycle(max_events=1))
    with pytest.raises(mphub.InvalidOption, match=r"env: the thread engine .* use engine='process'"):
        hub.subscribe("k", keep, env={"A": "b"})
    with pytest.raises(mphub.InvalidOption, match=r"propagate.*engine='thread'"):
        run_threads(propagate=True)
    with hub:
        for call in (hub.publisher, lambda: hub.queue):
            with pytest.raises(mphub.HubError, match="engine='process'"):
                call()
        hub.flush()


def test_a_hub_that_nobody_stops_does_not_hold_the_end_of_the_program_and_stays_in_it() -> None:
    script = """
        import os, threading, mphub
        hub = mphub.EventHub(engine="thread", stop=mphub.Stop(ask=0.1))
        hub.subscribe("k", lambda n: threading.Event().wait(), name="k")
        hub.start()
        hub.publish("k", 1)
        if not os.fork():
            try:
                hub.publish("k", 2)
            except mphub.HubError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=15, check=False)
    assert "lives in one process" in done.stdout
    assert done.returncode == 0
    assert "1 given up" in done.stderr
