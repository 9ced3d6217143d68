"""The public names, one after the other, on real processes."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import mphub
from mphub import EventHub, Inbox, Limits, Reject, Restart, Retry, Stop, Subscriber, Subscription
from mphub.procs import boot
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.procs


def run_script(source: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(source), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


# -- handlers


class Adder(Subscriber[int, int]):
    """Adds what it was made with."""

    def __init__(self, amount: int = 1) -> None:
        self.amount = amount

    def handle(self, payload: int) -> int:
        return payload + self.amount


async def add_one(n: int) -> int:
    await asyncio.sleep(0)
    return n + 1


def plus(n: int, amount: int) -> int:
    return n + amount


@pytest.mark.parametrize(
    "handler",
    [
        Adder,
        Adder(1),
        functools.partial(Adder, 1),
        functools.partial(plus, amount=1),
        add_one,
        lambda n: n + 1,
        f"{__name__}:add_one",
        "tests.procs.test_api:Adder",
    ],
    ids=["class", "instance", "partial class", "partial", "coroutine", "lambda", "path", "path to class"],
)
def test_handlers_of_every_form(handler: Any) -> None:
    hub = EventHub()
    subscription: Subscription[int, int] = hub.subscribe("k", handler, name="add")
    with hub:
        assert subscription.request(1).result(10) == 2


def test_an_event_is_what_its_publisher_said() -> None:
    hub = EventHub()
    told: Subscription[int, mphub.Event] = hub.subscribe("k.*", lambda payload: mphub.current_event(), name="told")
    before = time.time()
    with hub:
        found = told.request(5).result(10)
    assert (found.payload, found.attempt, found.replica, found.cancelled, found.priority) == (5, 1, 0, False, 0)
    assert before <= found.published_at <= time.time()


def test_headers_and_ordering_key_arrive(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def tell(payload: object) -> None:
        event = mphub.current_event()
        note(log, f"{event.id} {event.key} {event.headers} {event.ordering_key}")

    hub.subscribe("k.>", tell)
    with hub:
        one = hub.publish("k.a", 1, headers={"trace": "7"}, ordering_key="o")
        two = hub.publish("k.b", 2)
    assert lines(log) == [f"{one} k.a {{'trace': '7'}} o", f"{two} k.b {{}} None"]


# -- answers


def test_requests_end_however_the_handler_does() -> None:
    hub = EventHub(check=False)

    def act(what: str) -> str:
        if what == "crash":
            os._exit(3)
        if what == "sleep":
            time.sleep(60)
        if what == "reject":
            raise Reject("not today")
        if what == "stop":
            raise StopIteration(5)
        if what == "interrupt":
            raise KeyboardInterrupt
        return what

    ask = hub.subscribe("k", act, retry=Retry(1), limits=Limits(timeout=0.3), restart=Restart(delay=0))
    with hub:
        with pytest.raises(mphub.HandlerCrashed) as crashed:
            ask.request("crash").result(10)
        assert crashed.value.exit == 3
        with pytest.raises(mphub.HandlerTimeout):
            ask.request("sleep").result(10)
        with pytest.raises(Reject, match="not today"):
            ask.request("reject").result(10)
        with pytest.raises(RuntimeError, match="StopIteration"):
            ask.request("stop").result(10)
        with pytest.raises(KeyboardInterrupt):
            ask.request("interrupt").result(10)
        assert ask.request("fine").result(10) == "fine"
        assert hub.dead_letters() == [], "whoever asked knows"
        assert ask.statistics().dead == 5


def test_a_request_that_is_dropped_says_why() -> None:
    hub = EventHub()
    slow = hub.subscribe("k", time.sleep, name="slow")
    with hub:
        first, second = slow.request(0.3), slow.request(0)
        slow.unsubscribe(drain=False)
        with pytest.raises(mphub.Dropped) as dropped:
            second.result(10)
        assert dropped.value.reason == "unsubscribed"
        assert first.done()


def test_map_keeps_the_order_and_leaves_nothing_behind() -> None:
    hub = EventHub()
    double: Subscription[int, int] = hub.subscribe("k", lambda n: 2 * n, name="double")
    with hub:
        assert list(double.map(range(500))) == list(range(0, 1000, 2))
        with double.map(range(10_000)) as results:
            assert next(iter(results)) == 0
        assert list(hub.map("k", [])) == []


def test_everything_that_blocks_has_an_async_way() -> None:
    async def program() -> None:
        hub = EventHub()
        hub.subscribe("k", lambda n: n + 1, name="next")
        async with hub:
            assert await hub.request("k", 1) == 2
            assert isinstance(await hub.publish_async("k", 1), mphub.EventId)
            found = await asyncio.gather(*(hub.request("k", n) for n in range(20)))
            assert found == list(range(1, 21))

    asyncio.run(program())


# -- life


def test_draining_tells_its_progress_and_its_timeout_what_is_left() -> None:
    hub = EventHub()
    hub.subscribe("k", time.sleep, name="slow")
    seen: list[mphub.Progress] = []
    with hub:
        hub.publish_batch("k", [0.02] * 30)
        with pytest.raises(mphub.DrainTimeout) as late:
            hub.drain(0.1)
        assert isinstance(late.value, TimeoutError)
        assert 0 < late.value.pending["slow"] <= 30
        hub.drain(progress=seen.append)
    assert seen[-1].done == seen[-1].total == 30
    assert [p.done for p in seen] == sorted(p.done for p in seen)


def test_draining_does_not_wait_for_what_is_published_later() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: time.sleep(0.001), name="k")
    over = threading.Event()

    def publish() -> None:
        while not over.wait(0.0005):
            hub.publish("k", 0)

    with hub:
        thread = threading.Thread(target=publish)
        thread.start()
        for _ in range(3):
            hub.drain(20)
        over.set()
        thread.join()


def test_starting_and_stopping_twice_is_explained() -> None:
    hub = EventHub()
    hub.subscribe("k", print, name="k")
    with pytest.raises(mphub.HubClosed, match="start"):
        hub.publish("k", 1)
    hub.start()
    with pytest.raises(mphub.HubError, match="running already"):
        hub.start()
    hub.stop()
    hub.stop()
    for call in (lambda: hub.publish("k", 1), lambda: hub.request("k", 1), hub.drain, hub.redrive):
        with pytest.raises(mphub.HubClosed, match="stopped"):
            call()
    assert hub.statistics().subscribers["k"].state == "STOPPED"
    assert hub.dead_letters() == []


def test_an_exception_in_the_block_gives_up_what_waits(capfd: pytest.CaptureFixture[str]) -> None:
    hub = EventHub()
    hub.subscribe("k", time.sleep, name="slow")
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), hub:
        hub.publish_batch("k", [0.5] * 100)
        raise ZeroDivisionError
    assert time.monotonic() - began < 10
    found = hub.statistics().subscribers["slow"]
    assert found.accepted == found.handled + found.dropped["stopped"] == 100


def test_the_stop_ladder_ends_who_does_not_listen() -> None:
    hub = EventHub(stop=Stop(ask=0.2, term=0.2), check=False)

    def deaf(n: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    hub.subscribe("k", deaf)
    hub.start()
    hub.publish("k", 1, confirm=True)
    assert eventually(lambda: hub.statistics().subscribers["deaf"].running)
    began = time.monotonic()
    hub.stop(drain=False)
    assert 0.3 < time.monotonic() - began < 5


def test_a_start_that_takes_too_long_is_a_death() -> None:
    class Late(Subscriber[int, None]):
        def setup(self) -> None:
            time.sleep(60)

        def handle(self, payload: int) -> None:
            raise AssertionError

    hub = EventHub()
    hub.subscribe("k", Late, limits=Limits(start_timeout=0.2), restart=Restart(max_restarts=1, delay=0))
    with pytest.raises(mphub.StartFailed):
        hub.start()


def test_starting_without_waiting_is_waited_for_by_name() -> None:
    hub = EventHub()
    subscription = hub.subscribe("k", Adder)
    hub.start(wait=False)
    subscription.wait_ready(10)
    assert subscription.state == "RUNNING"
    hub.stop()


RUN = """
    import signal, sys, threading, time, mphub
    def tell():
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            time.sleep(0.01)
        print("up", flush=True)  # run() listens
    hub = mphub.EventHub(name="served", stop=mphub.Stop(ask=0.5, term=0.5))
    hub.subscribe("k", time.sleep, name="slow", restart=mphub.Restart(max_restarts=1))
    hub.start()
    hub.publish_batch("k", [float(sys.argv[1])] * 3)
    hub.flush()
    threading.Thread(target=tell).start()
    code = hub.run()
    print("code", code, flush=True)
    sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_drains_at_the_first_signal(number: int) -> None:
    process = run_script(RUN, "0.2")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "code 0\n"), err
    assert "3 handled, 0 dead, 0 unmatched, 0 given up" in err


def test_run_stops_at_once_at_the_second_signal() -> None:
    process = run_script(RUN, "30")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "code 130\n"), err
    assert "3 given up" in err


def test_a_hub_that_nobody_stopped_ends_with_its_process_and_says_so() -> None:
    process = run_script("""
        import time, mphub
        hub = mphub.EventHub(name="left", stop=mphub.Stop(ask=0.5, term=0.5))
        hub.subscribe("k", time.sleep, name="slow")
        hub.start()
        hub.publish_batch("k", [30.0] * 5)
        hub.flush()
    """)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "hub 'left' stopped: 0 handled, 0 dead, 0 unmatched, 5 given up" in err


def test_two_hubs_at_once_know_nothing_of_each_other() -> None:
    one, other = EventHub(name="one"), EventHub(name="other")
    for hub in (one, other):
        hub.subscribe("k", lambda n: n, name="k")
    with one, other:
        assert one.request("k", 1).result(10) == 1
        os.kill(one.statistics().pids["router"], signal.SIGKILL)
        assert other.request("k", 2).result(10) == 2
        assert one.request("k", 3).result(10) == 3
        assert (one.statistics().accepted, other.statistics().accepted) == (2, 1)


def is_replaced(hub: EventHub, router: int) -> bool:
    return hub.statistics().pids["router"] != router


def test_a_hub_whose_router_dies_again_and_again_is_failed() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    with pytest.raises(mphub.HubFailed, match="10 times in 10 s"), hub:
        for _ in range(10):
            before = hub.statistics().pids["router"]
            os.kill(before, signal.SIGKILL)
            assert eventually(functools.partial(is_replaced, hub, before), 10)


# -- in other processes


def use_handle(hub: EventHub, answers: Any) -> None:
    """What a hub object can do in another process, and what it says to the rest."""
    hub.publish("k", 1, confirm=True)
    hub.publish_batch("k", [2, 3])
    hub.queue.put(("k", 4))
    with hub.transaction() as together:
        together.publish("k", 5)
    hub.flush(10)
    refused = []
    for call in (hub.statistics, hub.drain, hub.stop, hub.start, lambda: hub.subscribe("k", print)):
        try:
            call()
        except mphub.HubError as error:
            refused.append("process that made the hub" in str(error))
    answers.put((hub.request("k", 6).result(10), list(hub.map("k", [7])), refused))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_hub_in_another_process_publishes_and_asks(method: str) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: -n, name="k")
    context: Any = multiprocessing.get_context(method)
    with hub:
        hub.publish("k", 0, confirm=True)
        answers = context.Queue()
        child = context.Process(target=use_handle, args=(hub, answers))
        child.start()
        assert answers.get(timeout=30) == (-6, [-7], [True] * 5)
        child.join(10)
        answers.close()
        hub.drain(10)
        assert hub.statistics().subscribers["k"].handled == 8


PIPELINE = """
    import mphub
    hub = mphub.EventHub(name="module")

    @hub.subscriber("numbers")
    def square(n):
        hub.publish("squares", n * n)  # the child imports this module anew: this is another hub object, which knows where it is

    @hub.subscriber("squares")
    def show(n):
        print("square", n)
"""


def test_a_hub_of_a_module_publishes_in_its_handlers(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text(textwrap.dedent(PIPELINE))
    script = tmp_path / "main.py"
    script.write_text("import pipeline\nwith pipeline.hub as hub:\n    hub.publish('numbers', 7)\n")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=30, check=False)
    assert (found.returncode, found.stdout) == (0, "square 49\n"), found.stderr


def test_a_handle_of_a_hub_that_stopped_says_so() -> None:
    hub = EventHub()
    hub.subscribe("k", print, name="k")
    with hub:
        handle = pickle.loads(pickle.dumps(hub))
    with pytest.raises(mphub.HubClosed):
        handle.publish("k", 1)


# -- what is seen


def test_a_callback_may_call_the_hub() -> None:
    hub = EventHub(unmatched="ignore", check=False)
    seen: list[tuple[str, str | None, int]] = []
    hub.on_notice(lambda notice: seen.append((notice.kind, notice.subscriber, hub.statistics().accepted)))
    hub.subscribe("k", lambda n: os._exit(1), name="k", retry=Retry(1), restart=Restart(delay=0, max_restarts=0))
    with hub:
        hub.publish("k", 1)
        assert eventually(lambda: {kind for kind, _, _ in seen} >= {"death", "FATAL"}, 10)
        assert {name for _, name, _ in seen} == {"k"}
        hub.stop(drain=False)


def test_what_matches_nobody_is_counted_and_told_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub()
    hub.subscribe("orders.created", print, name="orders")
    with hub:
        hub.publish("order.created", 1)
        hub.publish("order.created", 2)
        with pytest.raises(mphub.NoSubscriber, match=r"nearest pattern: 'orders\.created' of 'orders'"):
            hub.publish("order.created", 3, confirm=True)
        hub.drain()
        assert hub.statistics().unmatched == 2
    told = [record.getMessage() for record in caplog.records if "no subscriber for" in record.getMessage()]
    assert len(told) == 1
    assert "nearest pattern: 'orders.created'" in told[0]


def test_a_confirmed_event_is_refused_alone(tmp_path: Path) -> None:
    hub = EventHub(unmatched="ignore")
    hub.subscribe("known", lambda n: note(tmp_path / "log", n), name="known")
    with hub:
        for n in range(50):
            with pytest.raises(mphub.NoSubscriber):
                hub.publish("unknown", n, confirm=True)
            hub.publish_batch("known", range(n * 20, n * 20 + 20))
            hub.publish("other", n)
        hub.drain()
        assert hub.statistics().unmatched == 50
    assert lines(tmp_path / "log") == [str(n) for n in range(1000)]


def test_who_is_subscribed_can_be_asked() -> None:
    hub = EventHub()
    hub.subscribe(["a.*", "b"], print, name="one")
    two = hub.subscribe("a.>", print, name="two")
    assert hub.subscribers("a.x") == ["one", "two"]
    assert hub.subscribers("a.x.y") == ["two"]
    assert hub.subscribers("c") == []
    assert list(hub.subscriptions) == ["one", "two"]
    assert hub.subscription("two") is two
    with pytest.raises(mphub.NoSubscriber, match="did you mean 'two'"):
        hub.subscription("twoo")


def test_a_stopped_subscribers_events_are_dropped_and_counted() -> None:
    hub = EventHub()
    slow = hub.subscribe("k", time.sleep, name="slow")
    hub.subscribe("k", lambda n: None, name="fast")
    with hub:
        hub.publish("k", 0.3)
        hub.publish_batch("k", [0] * 9)
        slow.unsubscribe(drain=False)
        assert list(hub.subscriptions) == ["fast"]
        found = hub.statistics().subscribers["slow"]
        assert found.dropped["unsubscribed"] + found.handled == found.accepted == 10


def test_a_small_shared_memory_is_fallen_back_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(boot, "SMALL", 1 << 60)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    heard: list[mphub.Notice] = []
    hub = EventHub()
    hub.on_notice(heard.append)
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        assert hub.request("k", bytes(100_000)).result(10) == bytes(100_000)
        assert len(list(tmp_path.glob("mphub-*"))) == 1
    assert list(tmp_path.iterdir()) == []
    assert [notice.kind for notice in heard] == ["fallback"]


def test_a_full_journal_holds_publishers_and_loses_nothing() -> None:
    hub = EventHub(max_bytes="2MB")
    hub.subscribe("k", lambda data: time.sleep(0.001), name="slow")
    with hub:
        for _ in range(60):
            hub.publish("k", bytes(50_000) + os.urandom(10_000))
            hub.publish("k", os.urandom(70_000))
        hub.drain(60)
        assert hub.statistics().subscribers["slow"].handled == 120


def test_what_a_handler_started_ends_with_its_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)

    def parent(die: bool) -> None:
        note(log, subprocess.Popen(["sleep", "600"]).pid)
        if die:
            os._exit(1)

    hub.subscribe("k", parent, retry=Retry(1), restart=Restart(delay=0))
    with hub:
        hub.publish("k", True)
        hub.drain()
        (pid,) = map(int, lines(log))
        assert eventually(lambda: not psutil.pid_exists(pid), 2)
        hub.publish("k", False)
        hub.drain()
        pid = int(lines(log)[1])
        assert psutil.pid_exists(pid)
    assert eventually(lambda: not psutil.pid_exists(pid), 2)


def test_an_inbox_of_a_stopped_process_never_holds_its_publisher() -> None:
    hub = EventHub(check=False)
    broken = hub.subscribe("k", lambda n: os._exit(1), name="k", inbox=Inbox(maxsize=5), restart=Restart(max_restarts=0))
    with hub:
        hub.publish("k", 0)
        assert eventually(lambda: broken.state == "FATAL", 10)
        hub.publish_batch("k", range(50))
        hub.flush(10)
        found = broken.statistics()
        assert (found.waiting, found.dead) == (5, 46)
        assert {letter.reason for letter in broken.dead_letters()} == {"overflow"}
        hub.stop(drain=False)


def test_unsubscribing_twice_and_restarting_what_is_gone_harms_nobody() -> None:
    hub = EventHub()
    gone = hub.subscribe("k", Adder, name="gone")
    hub.subscribe("k", Adder, name="stays")
    with hub:
        gone.unsubscribe()
        gone.unsubscribe()
        gone.restart()
        assert hub.request("k", 1).result(10) == 2
        with pytest.raises(mphub.NoSubscriber, match="did you mean 'stays'"):
            hub.redrive("stay")


@pytest.mark.parametrize(("mode", "code"), [("never", 1), ("on-failure", 0)])
def test_one_that_is_not_to_be_restarted_ends_drains_and_requests(mode: str, code: int) -> None:
    hub = EventHub(check=False)
    once = hub.subscribe("k", lambda n: os._exit(code), name="once", restart=Restart(mode), retry=Retry(5))
    with hub:
        hub.publish("k", 1)
        with pytest.raises(mphub.SubscriberFatal, match="is STOPPED with work left"):
            hub.drain(20)
        with pytest.raises(mphub.SubscriberFatal):
            once.request(2).result(10)
        assert once.statistics().waiting == 1
        hub.stop(drain=False)


def test_run_ends_with_one_when_work_is_left_or_the_hub_has_failed() -> None:
    process = run_script(RUN.replace("time.sleep", "lambda n: __import__('os')._exit(1)").replace("* 3", "* 30"), "1")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=40)
    assert (process.returncode, out) == (1, "code 1\n"), err


def test_a_subscribers_own_log_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    class Talker(Subscriber[str, None]):
        def handle(self, payload: str) -> None:
            self.log.info("got %s", payload)

    hub = EventHub()
    hub.subscribe("k", Talker)
    with hub:
        hub.publish("k", "it")
        hub.drain()
    assert "INFO mphub.subscriber.Talker: got it" in capfd.readouterr().err


def test_the_inline_engine_refuses_what_it_cannot_do() -> None:
    with pytest.raises(mphub.InvalidOption, match="inline engine"):
        EventHub(engine="inline").subscribe("k", print, limits=Limits(timeout=1.0))
