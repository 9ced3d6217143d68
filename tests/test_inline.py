"""What only the inline engine does: handlers run in the caller's thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from typing import Any

import psutil
import pytest

import mphub
from mphub import EventHub, Restart, Retry, Subscriber
from tests.notes import Record, burst


def run_inline(**options: Any) -> EventHub:
    return EventHub(engine="inline", **options)


SEEN: list[Any] = []
"""What a handler of this module leaves here is seen only if it ran in this process."""


def look(n: int) -> None:
    SEEN.append((n, os.getpid(), threading.get_ident()))


def test_handlers_run_in_the_callers_thread_and_are_done_when_publish_returns() -> None:
    hub = run_inline()
    hub.subscribe("k", look)
    with hub:
        hub.publish("k", 1)
        assert SEEN.pop() == (1, os.getpid(), threading.get_ident())
        thread = threading.Thread(target=hub.publish, args=("k", 2))
        thread.start()
        thread.join()
    assert SEEN.pop() == (2, os.getpid(), thread.ident)


def test_no_process_is_started_and_no_folder_made() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    hub = run_inline()
    hub.subscribe("k", lambda n: b"x" * n, name="k", to="out")
    hub.subscribe("out", len, name="out")
    with hub:
        hub.publish("k", 500_000)
        assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
        assert not os.path.exists(hub._address.folder)
        assert hub.statistics().pids == {}
        assert hub.statistics().subscribers["k"].pids == ()


def test_events_run_one_after_the_other_in_the_order_published(record: Record) -> None:
    hub = run_inline()

    def first(n: int) -> None:
        record(f"first {n}")
        if n < 10:
            mphub.publish("k", n + 10)

    hub.subscribe("k", first)
    hub.subscribe("k", lambda n: record(f"second {n}"), name="second")
    with hub:
        hub.publish_batch("k", [0, 1])
    assert record.lines == [f"{name} {n}" for n in (0, 10, 1, 11) for name in ("first", "second")]


def test_now_waits_its_turn_too(record: Record) -> None:
    hub = run_inline()

    def outer(n: int) -> None:
        mphub.publish("inner", "with the ack")
        mphub.publish("inner", "now", now=True)
        record("outer ends")

    hub.subscribe("outer", outer)
    hub.subscribe("inner", record, name="inner")
    with hub:
        hub.publish("outer", 1)
    assert record.lines == ["outer ends", "now", "with the ack"]


def test_the_handlers_exception_is_raised_after_all_else_is_done(record: Record) -> None:
    hub = run_inline()

    def fail(n: int) -> None:
        raise ValueError(f"no {n}")

    hub.subscribe("k", fail)
    hub.subscribe("k", lambda n: record(f"other {n}"), name="other")
    with hub:
        with pytest.raises(ValueError, match="no 1") as raised:
            hub.publish("k", 1)
        assert raised.traceback[-1].name == "fail", "a debugger finds the handler's frame"
        with pytest.raises(ValueError, match="no 2"):
            hub.publish_batch("k", [2, 3])
        assert [letter.told for letter in hub.dead_letters()] == [True, True]
        assert hub.statistics().subscribers["fail"].dead == 2
    assert record.lines == ["other 1", "other 2"]


def test_the_first_exception_of_those_that_follow_is_raised_by_the_outermost_publish(record: Record) -> None:
    hub = run_inline()

    def fail(n: int) -> None:
        record(f"fail {n}")
        raise ValueError(n)

    hub.subscribe("start", burst)
    hub.subscribe("k", fail)
    with pytest.raises(mphub.DeadLettersLeft) as left, hub:
        with pytest.raises(ValueError, match="0"):
            hub.publish("start", 3)
        assert record.lines == ["fail 0", "fail 1", "fail 2"]
        assert len(hub.dead_letters()) == 3
    assert left.value.counts == {"fail": {"exception": 2}}, "one was raised to the caller"


def test_an_exception_is_raised_only_when_no_attempt_is_left(record: Record) -> None:
    hub = run_inline()

    def flaky(n: int) -> None:
        record(f"{n} {mphub.current_event().attempt}")
        if mphub.current_event().attempt <= n:
            raise ConnectionError(n)

    hub.subscribe("k", flaky, retry=Retry(max_attempts=2, on=ConnectionError, delay=0.1))
    with hub:
        began = time.monotonic()
        hub.publish("k", 1)
        assert time.monotonic() - began >= 0.1, "the delay is slept"
        with pytest.raises(ConnectionError):
            hub.publish("k", 2)
    assert record.lines == ["1 1", "1 2", "2 1", "2 2"]


def test_a_request_raises_by_its_reply_alone() -> None:
    hub = run_inline()
    divide = hub.subscribe("k", lambda n: 1 // n, name="divide")
    with hub:
        reply = divide.request(0)
        assert reply.done()
        assert isinstance(reply.exception(), ZeroDivisionError)


def test_without_propagate_failures_are_told_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    hub = run_inline(propagate=False, check=False)
    hub.on_notice(lambda notice: heard.append(notice.kind))
    hub.subscribe("k", lambda n: 1 // n, name="divide")
    with hub:
        hub.publish("k", 0)
    assert heard == ["failure", "dead_letter"]
    first, second = (record.getMessage() for record in caplog.records if record.name == "mphub.subscriber.divide")
    assert "ZeroDivisionError" in first
    assert "attempt 1" in first
    assert "is a dead letter: exception after 1 attempts" in second


def test_only_the_inline_engine_propagates() -> None:
    with pytest.raises(mphub.InvalidOption, match="propagate"):
        EventHub(propagate=True)
    EventHub(propagate=False)


def test_what_needs_other_processes_is_refused_with_a_sentence() -> None:
    hub = run_inline()
    with hub:
        for call in (hub.publisher, lambda: hub.queue):
            with pytest.raises(mphub.HubError, match="engine='process'"):
                call()
        hub.flush()


def test_a_transaction_is_taken_in_before_any_of_it_is_handled(record: Record) -> None:
    def negate(n: int) -> int:
        record(n)
        return -n

    hub = run_inline(max_bytes="1MB")
    hub.subscribe("k", negate, to="out")
    hub.subscribe("out", record)
    with hub:
        with pytest.raises(mphub.PayloadError), hub.transaction() as together:
            together.publish("k", 1)
            together.publish("k", bytes(2 << 20))
        with hub.transaction() as together:
            together.publish("k", 2, headers={"a": "b"})
            together.publish("k", 3)
            assert record.lines == []
        assert record.lines == ["2", "3", "-2", "-3"]


def test_a_setup_may_publish(record: Record) -> None:
    class Early(Subscriber[int, None]):
        def setup(self) -> None:
            mphub.publish("out", "setup")

        def handle(self, payload: int) -> None: ...

    hub = run_inline()
    hub.subscribe("out", record, name="out")
    hub.subscribe("k", Early)
    with hub:
        assert record.lines == ["setup"]


BOTH = threading.Barrier(2)


def meet(name: str) -> None:
    BOTH.wait(10)
    mphub.publish("out", name)


def test_hubs_in_several_threads_know_their_own_handlers(record: Record) -> None:
    def run(name: str) -> None:
        hub = run_inline()
        hub.subscribe("k", meet)
        hub.subscribe("out", lambda text: record(f"{name} {text}"))
        with hub:
            hub.publish("k", name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.lines) == ["a a", "b b"]


HUB: EventHub | None = None


def test_a_start_that_raises_what_a_handler_raised_stops_the_hub() -> None:
    class Early(Subscriber[int, None]):
        def setup(self) -> None:
            mphub.publish("out", 0)

        def handle(self, payload: int) -> None: ...

    hub = run_inline()
    hub.subscribe("k", Early)
    hub.subscribe("out", lambda n: 1 // n)
    with pytest.raises(ZeroDivisionError):
        hub.start()
    assert "stopped" in repr(hub)


def misuse(what: str) -> str:
    """Call what no handler may."""
    assert HUB is not None
    calls: dict[str, Any] = {
        "start": HUB.start, "stop": HUB.stop, "drain": HUB.drain, "flush": HUB.flush, "subscribe": lambda: HUB and HUB.subscribe("x", len),
        "confirm": lambda: HUB and HUB.publish("k", 1, confirm=True),
    }  # fmt: skip
    try:
        calls[what]()
    except mphub.HubError as error:
        return str(error)
    return "allowed"


@pytest.mark.parametrize("what", ["start", "stop", "drain", "flush", "subscribe", "confirm"])
def test_handlers_cannot_run_the_hub(what: str) -> None:
    global HUB
    HUB = run_inline()
    ask = HUB.subscribe("k", misuse)
    with HUB:
        assert "handler" in ask.request(what).result()
    HUB = None


def publish_by_the_hub(n: int) -> None:
    assert HUB is not None
    HUB.publish("out", n)
    if n == 0:
        raise ValueError(n)


def test_the_hubs_own_publish_in_a_handler_goes_with_the_ack(record: Record) -> None:
    global HUB
    HUB = run_inline(propagate=False, check=False)
    HUB.subscribe("k", publish_by_the_hub)
    HUB.subscribe("out", record, name="out")
    with HUB:
        HUB.publish_batch("k", [0, 1])
    assert record.lines == ["1"]
    HUB = None


def test_an_attached_queue_is_read_by_a_thread(record: Record) -> None:
    stock: Any = multiprocessing.SimpleQueue()
    hub = run_inline()
    hub.subscribe("k", record, name="k")
    with hub:
        hub.attach(stock)
        for item in (("k", 1), "no pair", ("k", 2), None):
            stock.put(item)
        reader = next(thread for thread in threading.enumerate() if thread.name == "mphub-attached")
        reader.join(10)
        assert record.lines == ["1", "2"]
    stock.close()


def test_restart_and_wait_ready_have_nothing_to_do() -> None:
    hub = run_inline()
    subscription = hub.subscribe("k", lambda n: n, name="k", restart=Restart(mode="never"))
    with hub:
        subscription.restart()
        subscription.wait_ready(1)
        assert (subscription.state, subscription.request(1).result()) == ("RUNNING", 1)
