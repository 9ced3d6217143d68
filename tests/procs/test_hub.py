"""A running hub: publishing, handling, asking, failing."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.queues
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import EventHub, Inbox, Limits, Notice, Restart, Retry, Snapshot, Stop, Subscriber, Subscription, current_event
from tests import notes
from tests.helpers import eventually

pytestmark = pytest.mark.procs
lines, note = notes.lines, notes.note


def test_every_matching_subscriber_handles_each_event_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("orders.*", lambda n: note(log, f"one {n}"), name="one")
    hub.subscribe("orders.>", lambda n: note(log, f"rest {n}"), name="rest")
    with hub:
        for n in range(500):
            hub.publish("orders.new", n)
    for name in ("one", "rest"):
        assert [row for row in lines(log) if row.startswith(name)] == [f"{name} {n}" for n in range(500)]


def test_books_add_up() -> None:
    hub = EventHub(check=False)

    def odd_fails(n: int) -> None:
        if n % 2:
            raise ValueError(n)

    hub.subscribe("k", odd_fails)
    with hub:
        hub.publish_batch("k", range(100))
    found = hub.statistics().subscribers["odd_fails"]
    assert (found.accepted, found.handled, found.dead, found.failed) == (100, 50, 50, 50)
    assert found.accepted == found.handled + found.dead + sum(found.dropped.values()) + found.waiting + found.running


def test_leaving_the_block_raises_what_died_with_the_first_cause() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: 1 // n, name="divide")
    with pytest.raises(mphub.DeadLettersLeft) as caught, hub:
        hub.publish("k", 0)
    assert caught.value.counts == {"divide": {"exception": 1}}
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    (letter,) = hub.dead_letters()
    assert (letter.key, letter.payload, letter.attempts, letter.reason) == ("k", 0, 1, "exception")


def test_redriven_letters_are_handled_and_purged_ones_counted(tmp_path: Path) -> None:
    switch = tmp_path / "works"

    def picky(n: int) -> None:
        if not switch.exists():
            raise OSError(n)

    hub = EventHub()
    subscription = hub.subscribe("k", picky)
    with hub:
        hub.publish_batch("k", range(10))
        hub.drain()
        letters = hub.dead_letters()
        assert len(letters) == 10
        switch.touch()
        assert subscription.redrive([letters[0].id, letters[1].id]) == 2
        hub.drain()
        assert subscription.purge() == 8
        found = subscription.statistics()
        assert (found.handled, found.dead, dict(found.dropped)) == (2, 0, {"purged": 8})


def test_requests_end_with_the_result_or_the_handlers_own_exception() -> None:
    hub = EventHub()
    square: Subscription[int, int] = hub.subscribe("square", lambda n: n * n, name="square")
    hub.subscribe("fail", lambda n: {}[n], name="fail")
    hub.subscribe("die", lambda n: os._exit(3), name="die", retry=Retry(max_attempts=2), restart=Restart(delay=0))
    with hub:
        assert hub.request("square", 7).result(5) == 49
        assert list(square.map(range(200))) == [n * n for n in range(200)]
        assert list(hub.map("square", [1, 2])) == [1, 4]
        with pytest.raises(KeyError):
            hub.request("fail", 1).result(5)
        with pytest.raises(mphub.HandlerCrashed) as caught:
            hub.request("die", 1).result(5)
        assert caught.value.exit == 3
        with pytest.raises(mphub.NoSubscriber):
            hub.request("squar", 7)
    assert not hub.dead_letters()


def test_replies_can_be_awaited() -> None:
    hub = EventHub()

    @hub.subscriber("double")
    async def double(n: int) -> int:
        await asyncio.sleep(0)
        return 2 * n

    async def main() -> list[int]:
        async with hub:
            await hub.publish_async("double", 1)
            return [await hub.request("double", n) for n in range(3)]

    assert asyncio.run(main()) == [0, 2, 4]


def test_two_that_answer_are_ambiguous_unless_one_is_named() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: "a", name="a")
    hub.subscribe("*", lambda n: "b", name="b")
    with hub:
        with pytest.raises(mphub.AmbiguousKey, match="a, b"):
            hub.request("k", 1)
        assert hub.request("k", 1, to="b").result(5) == "b"


def test_outputs_and_to_follow_the_ack(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def split(text: str) -> None:
        for word in text.split():
            mphub.publish("word", word)
            hub.publish("letters", len(word))

    hub.subscribe("text", split)
    hub.subscribe("word", str.upper, name="upper", to="upper")
    hub.subscribe("upper", lambda word: note(log, word), name="log")
    hub.subscribe("letters", lambda n: note(log, n), name="count")
    with hub:
        hub.publish("text", "one three")
    assert sorted(lines(log)) == ["3", "5", "ONE", "THREE"]


def test_now_goes_out_before_the_handler_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def slow(n: int) -> None:
        for step in range(10):
            mphub.publish("step", step, now=True)
        assert eventually(lambda: len(lines(log)) == 10, 5)

    hub.subscribe("k", slow)
    hub.subscribe("step", lambda n: note(log, n), name="steps")
    with hub:
        hub.publish("k", 1)
    assert lines(log) == [str(n) for n in range(10)]


def test_subscriber_classes_are_set_up_and_torn_down(tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Greeter(Subscriber[str, None]):
        def __init__(self, greeting: str) -> None:
            self.greeting = greeting

        def setup(self) -> None:
            note(log, f"setup {self.name}")

        def handle(self, payload: str) -> None:
            note(log, f"{self.greeting} {payload} {mphub.current_event().key}")

        def teardown(self) -> None:
            note(log, "teardown")

    hub = EventHub()
    hub.subscribe("k", Greeter("hello"), name="greeter")
    with hub:
        hub.publish("k", "you")
    assert lines(log) == ["setup greeter", "hello you k", "teardown"]


def test_a_setup_that_raises_fails_the_start_with_its_traceback() -> None:
    class Broken(Subscriber[int, None]):
        def setup(self) -> None:
            raise LookupError("no model here")

        def handle(self, payload: int) -> None: ...

    hub = EventHub()
    hub.subscribe("k", Broken, restart=Restart(max_restarts=1, delay=0))
    with pytest.raises(mphub.StartFailed) as caught:
        hub.start()
    assert isinstance(caught.value.__cause__, LookupError)


def test_payloads_of_every_size_arrive_whole(tmp_path: Path) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda data: (len(data), hash(bytes(data))), name="measure")
    with hub:
        for size in (0, 1, 65_000, 65_536, 70_000, 1 << 20, 5_000_000):
            data = os.urandom(size)
            assert hub.request("k", data).result(10)[0] == size
        assert len(hub.request("k", b"x" * 10).result(5)) == 2


def test_large_results_outputs_and_transactions_travel_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("big", lambda n: b"r" * n, name="big", to="copy")
    hub.subscribe("copy", lambda data: note(log, len(data)), name="copy")
    hub.subscribe("row", lambda row: note(log, f"row {row}"), name="rows")
    with hub:
        assert len(hub.request("big", 3_000_000, to="big").result(10)) == 3_000_000
        with hub.transaction() as tx:
            for n in range(20_000):
                tx.publish("row", n)
        with pytest.raises(RuntimeError), hub.transaction() as tx:
            tx.publish("row", -1)
            raise RuntimeError
    rows = lines(log)
    assert "3000000" in rows
    assert [row for row in rows if row.startswith("row")] == [f"row {n}" for n in range(20_000)]


def put_some(queue: Any, key: str) -> None:
    for n in range(50):
        queue.put((key, n))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_publish_through_the_queue(method: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, n), name="log")
    with hub:
        assert isinstance(hub.queue, multiprocessing.queues.Queue)
        hub.publish("k", -1, confirm=True)
        child = multiprocessing.get_context(method).Process(target=put_some, args=(hub.queue, "k"))  # type: ignore[attr-defined]
        child.start()
        child.join(20)
        assert child.exitcode == 0
        child.close()
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # multiprocessing's own, which would live on
    assert lines(log) == [str(n) for n in range(-1, 50)]


def test_a_stock_queue_can_be_attached(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, n), name="log")
    stock: Any = multiprocessing.Queue()
    with hub:
        hub.attach(stock)
        put_some(stock, "k")
        assert eventually(lambda: len(lines(log)) == 50, 5)
        stock.put(None)
    stock.close()
    stock.join_thread()


def test_a_script_without_a_guard_and_a_notebook_like_session_work(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import mphub
        hub = mphub.EventHub()
        class Order:
            def __init__(self, n): self.n = n
        @hub.subscriber("order", to="total")
        def price(order):
            hub.publish("seen", order.n)
            return order.n * 2
        hub.subscribe("total", lambda n: print("total", n), name="total")
        hub.subscribe("seen", lambda n: print("seen", n), name="seen")
        with hub:
            hub.publish("order", Order(4))
        """
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for command, feed in ([sys.executable, str(path)], None), ([sys.executable, "-"], script):
        done = subprocess.run(command, input=feed, capture_output=True, text=True, timeout=30, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()) == ["seen 4", "total 8"], done.stderr


def test_misuse_says_what_to_do() -> None:
    hub = EventHub()
    with pytest.raises(mphub.HubClosed, match="start"):
        hub.publish("k", 1)
    with pytest.raises(mphub.InvalidKey, match="wildcards"):
        hub.publish("k.*", 1)
    with pytest.raises(mphub.InvalidOption, match="one argument"):
        hub.subscribe("k", lambda: None)  # type: ignore[arg-type, misc]
    with pytest.raises(mphub.PayloadError, match="handler"):
        lock = multiprocessing.get_context("fork").Lock()
        hub.subscribe("k", lambda n: lock.acquire())
    hub.subscribe("k", print, name="a")
    with pytest.raises(mphub.NameTaken):
        hub.subscribe("k", print, name="a")
    with pytest.raises(LookupError, match="did you mean"):
        hub.subscription("aa")
    with hub, pytest.raises(mphub.PayloadError):
        hub.publish("k", (n for n in range(3)))


def test_handlers_cannot_run_the_hub() -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: hub.drain(), name="k")
    with hub, pytest.raises(mphub.HubError, match=r"this process|subscriber 'k'"):
        hub.request("k", 1).result(5)


def test_an_overrunning_handler_is_killed_and_only_its_event_dies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)

    def maybe_hang(n: int) -> None:
        while n == 3:
            pass
        note(log, n)

    hub.subscribe("k", maybe_hang, limits=Limits(timeout=0.3), retry=Retry(max_attempts=1))
    with hub:
        hub.publish_batch("k", range(6))
    assert lines(log) == ["0", "1", "2", "4", "5"]
    (letter,) = hub.dead_letters()
    assert (letter.payload, letter.reason) == (3, "timeout")
    assert "maybe_hang" in letter.traceback


def test_an_exception_is_retried_only_if_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def flaky(n: int) -> None:
        note(log, f"{n} {mphub.current_event().attempt}")
        if n == 2 and mphub.current_event().attempt < 3:
            raise ConnectionError

    hub.subscribe("k", flaky, retry=Retry(max_attempts=3, on=ConnectionError, delay=0))
    with hub:
        hub.publish_batch("k", range(5))
        assert hub.drain().subscribers["flaky"].retried == 2
    assert lines(log) == ["0 1", "1 1", "2 1", "2 2", "2 3", "3 1", "4 1"]


def test_a_delayed_retry_lets_the_others_pass(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def later(n: int) -> None:
        if n == 0 and mphub.current_event().attempt == 1:
            raise mphub.RetryLater(0.2)
        note(log, n)

    hub.subscribe("k", later)
    with hub:
        hub.publish_batch("k", range(4))
    assert lines(log) == ["1", "2", "3", "0"]


def test_a_full_inbox_holds_the_publisher_and_loses_nothing(tmp_path: Path) -> None:
    hub = EventHub(stop=Stop(ask=1))
    hub.subscribe("k", lambda n: n, name="k", inbox=Inbox(maxsize=200))
    with hub:
        hub.publish_batch("k", range(20_000))
        found = hub.drain().subscribers["k"]
    assert found.handled == 20_000


def test_overflow_can_make_dead_letters(tmp_path: Path) -> None:
    gate = tmp_path / "open"
    hub = EventHub(check=False)

    def wait(n: int) -> None:
        assert eventually(gate.exists, 20)

    hub.subscribe("k", wait, inbox=Inbox(maxsize=10, overflow="dead_letter"))
    with hub:
        hub.publish_batch("k", range(50))
        hub.flush()
        found = hub.statistics().subscribers["wait"]
        assert (found.accepted, found.dead) == (50, 40)
        gate.touch()
    assert {letter.reason for letter in hub.dead_letters()} == {"overflow"}


def test_dead_letters_of_one_frame_are_purged_and_redriven_one_by_one(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "open"
    hub = EventHub(check=False)
    notices: list[Notice] = []
    hub.on_notice(notices.append)

    def write(event: tuple[int, str]) -> None:
        assert eventually(gate.exists, 20)
        note(log, " ".join(map(str, (*event, current_event().key, current_event().headers.get("n")))))

    hub.subscribe("k.*", write, name="w", inbox=Inbox(maxsize=1, overflow="dead_letter"))
    with hub:
        hub.publish("k.first", (0, "x"))
        with hub.transaction() as together:
            for n in range(1, 13):
                together.publish(f"k.{n // 4}", (n, "x" * n), headers={"n": str(n)})
        letters = hub.dead_letters("w")
        ids = [letter.id for letter in letters]
        assert ids == [ids[0] + n for n in range(12)]
        assert [(letter.key, letter.payload) for letter in letters] == [(f"k.{n // 4}", (n, "x" * n)) for n in range(1, 13)]
        assert hub.purge(ids=[ids[2], ids[5]]) == 2
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        assert [letter.id for letter in hub.dead_letters()] == [each for n, each in enumerate(ids) if n not in (2, 5)]
        assert hub.purge(ids=[ids[2]]) == 0
        gate.touch()
        assert hub.redrive(ids=[ids[7], ids[0], ids[11]]) == 3
        found = hub.drain(20).subscribers["w"]
        assert (found.accepted, found.handled, found.dead, found.dropped) == (13, 4, 7, {"purged": 2})
        assert hub.redrive("w") == 7
        found = hub.drain(20).subscribers["w"]
        assert (found.handled, found.dead) == (11, 0)
    order = [0, 1, 8, 12, 2, 4, 5, 7, 9, 10, 11]
    assert lines(log) == [f"{n} {'x' * n if n else 'x'} k.{n // 4 if n else 'first'} {n or None}" for n in order]
    (told,) = [notice for notice in notices if notice.kind == "dead_letter"]
    assert (told.details["id"], told.details["more"]) == (f"{ids[0]:026x}", 11)


def test_an_unsubscribed_one_finishes_what_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(unmatched="ignore")
    subscription: Subscription[int, None] = hub.subscribe("k", lambda n: note(log, n), name="k")
    with hub:
        hub.publish_batch("k", range(100))
        subscription.unsubscribe()
        hub.publish("k", 100)
        late: Subscription[int, None] = hub.subscribe("k", lambda n: note(log, f"late {n}"), name="late")
        late.wait_ready(5)
        hub.publish("k", 101)
    assert lines(log) == [*(str(n) for n in range(100)), "late 101"]


def test_restart_charges_nobody(tmp_path: Path) -> None:
    hub = EventHub()
    subscription: Subscription[int, int] = hub.subscribe("k", lambda n: os.getpid(), name="k")
    with hub:
        first = hub.request("k", 1).result(5)
        subscription.restart()
        assert eventually(lambda: hub.request("k", 1).result(5) != first, 5)
        assert subscription.statistics().restarts == 1


@pytest.mark.parametrize("snapshot", [None, Snapshot(every=10_000)])
def test_what_has_not_started_is_recalled_when_its_process_is_to_stop(snapshot: Snapshot | None, tmp_path: Path) -> None:
    log, slow = tmp_path / "log", tmp_path / "slow"

    class Noting(Subscriber[int, None]):
        def handle(self, number: int) -> None:
            if slow.exists():
                time.sleep(0.3)
            note(log, number)

        def snapshot(self) -> int:
            return 1

        def restore(self, state: object) -> None:
            assert state == 1

    hub = EventHub()
    subscription = hub.subscribe("k", Noting, name="k", snapshot=snapshot)
    with hub:
        hub.publish_batch("k", range(5000))
        hub.drain(timeout=20)
        slow.touch()
        hub.publish_batch("k", range(5000, 7000))
        assert eventually(lambda: len(lines(log)) > 5001, 10)
        first, began = subscription.statistics().pids, time.monotonic()
        subscription.restart()
        assert eventually(lambda: subscription.state == "RUNNING" and subscription.statistics().pids != first, 10)
        assert time.monotonic() - began < 2.0  # not the 5 s after which it is told more firmly
        slow.unlink()
    assert [int(line) for line in lines(log)] == list(range(7000))


def test_a_hub_can_start_again() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: n + 1, name="k")
    for _ in range(2):
        with hub:
            assert hub.request("k", 1).result(5) == 2
    assert hub.statistics().subscribers["k"].handled == 1


def test_failures_are_seen_without_any_logging_set_up(tmp_path: Path) -> None:
    script = "import mphub\nhub = mphub.EventHub(check=False)\nhub.subscribe('k', lambda n: 1 / n, name='div')\n"
    script += "with hub:\n    hub.publish('k', 0)\n    hub.publish('kay', 0)\n"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=30, env=environment, check=True)
    for words in ("ZeroDivisionError", "'k'", "attempt 1", "no subscriber for 'kay'", "0 handled, 1 dead, 1 unmatched"):
        assert words in done.stderr


def test_whoever_holds_publishers_for_long_is_named(tmp_path: Path) -> None:
    heard: list[mphub.Notice] = []
    hub = EventHub()
    hub.on_notice(heard.append)
    hub.subscribe("k", time.sleep, name="slow", inbox=Inbox(maxsize=1))
    with hub:
        hub.publish("k", 5.5)
        hub.publish("k", 0, confirm=True)
        hub.publish("k", 0)
        hub.drain(20)
    held = [notice for notice in heard if notice.kind == "held"]
    assert [(notice.subscriber, "waited 5 s" in notice.message) for notice in held] == [("slow", True)]


class Unready(Subscriber[int, None]):
    """Cannot start."""

    def setup(self) -> None:
        raise RuntimeError("no such model")

    def handle(self, payload: int) -> None:
        raise AssertionError("never ready")


def test_a_start_that_fails_again_and_again_is_explained_once(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub()
    hub.subscribe("k", Unready, restart=Restart(delay=0, max_restarts=3))
    with pytest.raises(mphub.StartFailed) as caught:
        hub.start()
    assert isinstance(caught.value.__cause__, RuntimeError)
    told = [record.getMessage() for record in caplog.records if record.name == "mphub.subscriber.Unready"]
    assert len(told) == 5, "four deaths and FATAL"
    assert ["no such model" in text for text in told] == [True, False, False, False, False]
    assert "mphub/procs" not in told[0], "the traceback is the user's"


def test_what_a_handler_prints_is_seen_when_drain_returns_and_outlives_a_kill(capfd: pytest.CaptureFixture[str]) -> None:
    hub = EventHub(check=False)

    def talk(n: int) -> None:
        print("said", n)
        if n == 2:
            os.kill(os.getpid(), 9)

    hub.subscribe("k", talk, retry=Retry(max_attempts=1))
    with hub:
        hub.publish("k", 1)
        hub.drain()
        assert capfd.readouterr().out == "said 1\n"
        hub.publish("k", 2)
        hub.drain()
        assert capfd.readouterr().out == "said 2\n"


def test_a_dead_letter_has_the_last_lines_of_stderr_and_the_stack() -> None:
    hub = EventHub(check=False)

    def fall(n: int) -> None:
        for line in range(60):
            print("line", line, file=sys.stderr)
        os.abort()

    hub.subscribe("k", fall, retry=Retry(max_attempts=1), restart=Restart(delay=0))
    with hub:
        hub.publish("k", 1)
    (letter,) = hub.dead_letters()
    assert letter.stderr.splitlines() == [f"line {n}" for n in range(10, 60)]
    assert (letter.exit, letter.reason, letter.attempts) == ("SIGABRT", "crash", 1)
    assert "in fall" in letter.traceback
    assert letter.rss is not None
    assert letter.rss > 1 << 20


@pytest.mark.parametrize(("overflow", "kept"), [("drop_newest", range(1, 11)), ("drop_oldest", range(90, 100))])
def test_overflow_can_drop_and_counts_it(overflow: str, kept: range, tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    hub = EventHub()

    def slow(n: int) -> None:
        while n == 0 and not gate.exists():
            time.sleep(0.01)
        note(log, n)

    subscription = hub.subscribe("k", slow, inbox=Inbox(maxsize=11, overflow=overflow))
    with hub:
        hub.publish("k", 0, confirm=True)
        assert eventually(lambda: subscription.statistics().running == 1)
        for n in range(1, 100):
            hub.publish("k", n, confirm=True)
        found = subscription.statistics()
        assert (found.waiting, found.dropped, found.dead) == (10, {"overflow": 89}, 0)
        gate.touch()
    assert lines(log) == ["0", *map(str, kept)]
    found = subscription.statistics()
    assert found.accepted == found.handled + found.dropped["overflow"] == 100
