"""What a user sees of any hub: delivery, failures, retries, dead letters, order, refusals."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import EventHub, Inbox, Reject, Retry, RetryLater, Subscriber, Topic
from tests.notes import Record, burst


def quiet(engine: str, *, check: bool = False) -> EventHub:
    """Return a hub that raises nothing for what its handlers raise, in any engine."""
    return EventHub(engine=engine, check=check, propagate=False)


def test_each_subscriber_of_a_key_has_all_its_events_in_order(engine: str, record: Record) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("orders.*", lambda n: record(f"one {n}"), name="one")
    hub.subscribe("orders.>", lambda n: record(f"rest {n}"), name="rest")
    hub.subscribe(["other", Topic("orders.new", int)], lambda n: record(f"list {n}"), name="list")
    with hub:
        for n in range(50):
            hub.publish("orders.new", n)
        assert hub.publish_batch("orders.new", range(50, 100)) == 50
    for name in ("one", "rest", "list"):
        assert [row for row in record.lines if row.startswith(name)] == [f"{name} {n}" for n in range(100)]


def test_a_handler_has_a_copy_made_when_it_was_published(engine: str) -> None:
    hub = EventHub(engine=engine)

    def grow(items: list[int]) -> list[int]:
        items.append(3)
        return items

    grown = hub.subscribe("k", grow)
    with hub:
        payload = [1]
        reply = grown.request(payload)
        payload.append(2)
        assert (reply.result(10), payload) == ([1, 3], [1, 2])


def test_any_payload_is_one(engine: str) -> None:
    hub = EventHub(engine=engine)
    echo = hub.subscribe("k", lambda found: (found, type(found).__name__), name="echo")
    payloads: list[object] = [None, 0, "", [], {}, False, b"", b"x" * 200_000, {"a": (1, {2.5})}]
    with hub:
        for payload in payloads:
            assert echo.request(payload).result(10) == (payload, type(payload).__name__)


def test_an_event_is_what_its_publisher_said(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k.*", lambda payload: mphub.current_event(), name="told")
    before = time.time()
    with hub:
        event = hub.request("k.a", [1]).result(10)
        assert (event.key, event.payload, event.attempt, event.headers, event.ordering_key) == ("k.a", [1], 1, {}, None)
        assert (event.priority, event.replica, event.cancelled) == (0, 0, False)
        assert before - 1 <= event.published_at <= time.time() + 1
        assert isinstance(event.id, mphub.EventId)


def test_headers_and_ordering_key_arrive(engine: str, record: Record) -> None:
    hub = EventHub(engine=engine)

    def tell(payload: object) -> None:
        event = mphub.current_event()
        record(f"{event.id} {event.headers} {event.ordering_key}")
        if event.key == "first":
            mphub.publish("second", payload, headers={"from": "first"}, ordering_key="inner")

    hub.subscribe(["first", "second"], tell)
    with hub:
        one = hub.publish("first", 1, headers={"trace": "7"}, ordering_key="outer")
        hub.drain()
        two = hub.publish("second", 1)
    first, inner, second = record.lines
    assert first == f"{one} {{'trace': '7'}} outer"
    assert inner.endswith(" {'from': 'first'} inner")
    assert second == f"{two} {{}} None"


def test_results_but_none_are_published_under_to(engine: str, record: Record) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda found: found, name="pass", to="out")
    hub.subscribe("out", lambda found: record(repr(found)), name="out")
    with hub:
        for payload in (0, None, "", False, [1]):
            hub.publish("k", payload)
    assert record.lines == ["0", "''", "False", "[1]"]


def test_outputs_appear_only_if_the_handler_returns(engine: str, record: Record) -> None:
    hub = quiet(engine)

    def fail_first(n: int) -> str:
        attempt = mphub.current_event().attempt
        mphub.publish("out", f"published {n}, attempt {attempt}")
        if n == 0 or attempt == 1:
            raise ValueError(n)
        return f"returned {n}"

    hub.subscribe("k", fail_first, to="out", retry=Retry(max_attempts=2, on=ValueError, delay=0))
    hub.subscribe("out", record, name="out")
    with hub:
        hub.publish_batch("k", [0, 1])
    assert record.lines == ["published 1, attempt 2", "returned 1"]


def test_now_goes_out_also_if_the_handler_fails(engine: str, record: Record) -> None:
    hub = quiet(engine)

    def fail(n: int) -> None:
        mphub.publish("out", "now", now=True)
        mphub.publish("out", "with the ack")
        raise ValueError(n)

    hub.subscribe("k", fail)
    hub.subscribe("out", record, name="out")
    with hub:
        hub.publish("k", 1)
    assert record.lines == ["now"]


def test_a_long_cycle_ends_and_needs_no_stack(engine: str) -> None:
    hub = EventHub(engine=engine)

    def count_down(n: int) -> None:
        if n:
            mphub.publish("k", n - 1)

    hub.subscribe("k", count_down)
    with hub:
        hub.publish("k", 3000)
        assert hub.drain().subscribers["count_down"].handled == 3001


def test_a_retry_without_delay_goes_first(engine: str, record: Record) -> None:
    hub = quiet(engine)

    def fail_twice(n: int) -> None:
        attempt = mphub.current_event().attempt
        record(f"{n} {attempt}")
        if n == 1 and attempt < 3:
            raise ValueError(n)

    hub.subscribe("start", burst)
    hub.subscribe("k", fail_twice, retry=Retry(on=ValueError, delay=0))
    with hub:
        hub.publish("start", 4)
    assert record.lines == ["0 1", "1 1", "1 2", "1 3", "2 1", "3 1"]


def test_a_delayed_retry_lets_the_others_pass(engine: str, record: Record) -> None:
    hub = quiet(engine)

    def fail_once(n: int) -> None:
        attempt = mphub.current_event().attempt
        record(f"{n} {attempt}")
        if attempt == 1:
            if n == 1:
                raise RetryLater(0.4)
            if n == 2:
                raise FileNotFoundError(n)

    hub.subscribe("start", burst)
    hub.subscribe("k", fail_once, retry=Retry(on=(OSError, KeyError), delay=0.1))
    with hub:
        hub.publish("start", 4)
    assert record.lines == ["0 1", "1 1", "2 1", "3 1", "2 2", "1 2"]
    found = hub.statistics().subscribers["fail_once"]
    assert (found.handled, found.failed, found.retried, found.dead) == (4, 2, 2, 0)


def test_what_is_given_up_is_a_dead_letter_that_says_why(engine: str) -> None:
    hub = quiet(engine)

    def give_up(what: str) -> None:
        if what == "reject":
            raise Reject("not today")
        if what == "later":
            raise RetryLater(0)
        raise {"retried": ConnectionResetError, "other": KeyError}[what](what)

    hub.subscribe("k", give_up, retry=Retry(max_attempts=2, on=ConnectionError, delay=0))
    with hub:
        ids = {what: hub.publish("k", what) for what in ("reject", "later", "retried", "other")}
        hub.drain()
        letters = {letter.payload: letter for letter in hub.dead_letters()}
        assert {what: letter.id for what, letter in letters.items()} == ids
        rows = {what: (letter.reason, letter.attempts, type(letter.error)) for what, letter in letters.items()}
    assert rows == {
        "reject": ("rejected", 1, Reject),
        "later": ("exception", 2, RetryLater),
        "retried": ("exception", 2, ConnectionResetError),
        "other": ("exception", 1, KeyError),
    }
    other = letters["other"]
    assert (other.key, other.subscriber, other.exit) == ("k", "give_up", None)
    assert other.pid is not None and (other.pid == os.getpid()) == (engine != "process")
    assert other.rss is not None and other.rss > 1 << 20
    assert "in give_up" in other.traceback
    assert other.error is not None
    assert "in give_up" in str(other.error.__cause__)
    assert abs(other.at - time.time()) < 60


def test_redriven_letters_start_anew_and_purged_ones_are_counted(engine: str, record: Record, tmp_path: Path) -> None:
    hub = quiet(engine)
    works = tmp_path / "works"

    def picky(n: int) -> None:
        event = mphub.current_event()
        record(f"{event.id} {event.attempt}")
        if not works.exists():
            raise OSError(n)

    subscription = hub.subscribe("k", picky)
    with hub:
        ids = [hub.publish("k", n) for n in range(4)]
        hub.drain()
        assert {letter.id for letter in subscription.dead_letters()} == set(ids)
        works.touch()
        assert subscription.redrive(ids[:1]) == 1
        assert hub.redrive("picky", ids[1:2]) == 1
        hub.drain()
        assert record.lines[4:] == [f"{ids[0]} 1", f"{ids[1]} 1"]
        assert (hub.purge("picky", []), subscription.purge(ids[:3]), hub.purge()) == (0, 1, 1)
        found = subscription.statistics()
        assert (found.accepted, found.handled, found.dead, dict(found.dropped)) == (4, 2, 0, {"purged": 2})
        assert hub.dead_letters() == []


def test_books_add_up(engine: str) -> None:
    hub = quiet(engine)

    def odd_fails(n: int) -> None:
        if n % 2:
            raise ValueError(n)

    hub.subscribe("k", odd_fails)
    with hub:
        hub.publish_batch("k", range(20))
    found = hub.statistics().subscribers["odd_fails"]
    assert (found.accepted, found.handled, found.dead, found.failed, found.retried) == (20, 10, 10, 10, 0)
    assert found.accepted == found.handled + found.dead + sum(found.dropped.values()) + found.waiting + found.running
    assert hub.statistics().accepted == 20


def test_what_exceeds_an_inbox_can_become_dead_letters(engine: str) -> None:
    hub = quiet(engine)
    hub.subscribe("start", burst)
    hub.subscribe("k", lambda n: None, name="small", inbox=Inbox(maxsize=5, overflow="dead_letter"))
    with hub:
        hub.publish("start", 20)
        hub.drain()
        found = hub.statistics().subscribers["small"]
        assert (found.accepted, found.handled, found.dead) == (20, 5, 15)
        assert [letter.payload for letter in hub.dead_letters()] == list(range(5, 20))
        assert {(letter.reason, letter.attempts, letter.error) for letter in hub.dead_letters()} == {("overflow", 0, None)}


def test_a_payload_that_cannot_be_loaded_fails_like_its_handler(engine: str) -> None:
    class Trap:
        """Can be pickled only."""

        def __reduce__(self) -> tuple[type[int], tuple[str]]:
            return int, ("no number",)

    hub = quiet(engine)
    hub.subscribe("k", lambda payload: payload, name="k")
    with hub:
        hub.publish("k", Trap())
        hub.publish("k", 1)
    found = hub.statistics().subscribers["k"]
    assert (found.handled, found.dead) == (1, 1)
    assert isinstance(hub.dead_letters()[0].error, ValueError)


def test_leaving_the_block_tells_what_died(engine: str) -> None:
    hub = quiet(engine, check=True)

    def fail(n: int) -> None:
        raise Reject("no") if n else ZeroDivisionError(n)

    hub.subscribe("k", fail)
    with pytest.raises(mphub.DeadLettersLeft) as left, hub:
        hub.publish_batch("k", [0, 1, 1])
    assert left.value.counts == {"fail": {"exception": 1, "rejected": 2}}
    assert isinstance(left.value.__cause__, ZeroDivisionError)
    with hub:
        hub.publish("k", 1)
        hub.drain()
        hub.purge()


def test_requests_end_with_the_result_or_the_handlers_own_exception(engine: str) -> None:
    hub = quiet(engine)

    def act(what: Any) -> object:
        if what == "reject":
            raise Reject("not today")
        if what == "stop":
            raise StopIteration(5)
        if what == "pickle":
            return (n for n in range(3))
        return 10 // what

    ask = hub.subscribe("act", act)
    with hub:
        reply = ask.request(5)
        assert (reply.result(10), reply.done()) == (2, True)
        assert isinstance(reply.id, mphub.EventId)
        with pytest.raises(ZeroDivisionError) as failed:
            ask.request(0).result(10)
        assert "in act" in str(failed.value.__cause__)
        for what, error, text in (
            ("reject", Reject, "not today"),
            ("stop", RuntimeError, "StopIteration"),
            ("pickle", mphub.PayloadError, "result"),
        ):
            with pytest.raises(error, match=text):
                ask.request(what).result(10)
        assert hub.dead_letters() == [], "whoever asked knows"
        assert (ask.statistics().handled, ask.statistics().dead) == (1, 4)
        hub.publish("act", "pickle")
        assert hub.drain().subscribers["act"].handled == 2, "nobody asked for that result"


def test_a_request_needs_the_one_who_answers(engine: str) -> None:
    class Deaf(Subscriber[int, str]):
        answers = False

        def handle(self, payload: int) -> str:
            return "deaf"

    hub = EventHub(engine=engine)
    hub.subscribe("k.a", lambda n: "a", name="a")
    hub.subscribe(["k.*", "b"], lambda n: "b", name="b")
    hub.subscribe(">", Deaf)
    with hub:
        assert hub.request("b", 1).result(10) == "b"
        with pytest.raises(mphub.AmbiguousKey, match="a, b"):
            hub.request("k.a", 1)
        assert hub.request("k.a", 1, to="b").result(10) == "b"
        assert hub.request("k.a", 1, to="Deaf").result(10) == "deaf"
        with pytest.raises(mphub.NoSubscriber, match=r"'k\.x\.y'"):
            hub.request("k.x.y", 1)
        with pytest.raises(mphub.NoSubscriber, match="did you mean 'Deaf'"):
            hub.request("k.a", 1, to="Daef")
        found = hub.statistics().subscribers
        assert {name: found[name].accepted for name in found} == {"a": 0, "b": 2, "Deaf": 1}, "a request is for one alone"


def test_map_keeps_the_order_and_ends_with_the_first_failure(engine: str) -> None:
    hub = quiet(engine)
    divide = hub.subscribe("k", lambda n: 10 // n, name="divide")
    with hub:
        assert list(divide.map(range(1, 101))) == [10 // n for n in range(1, 101)]
        assert list(hub.map("k", [1, 2], to="divide")) == [10, 5]
        got: list[int] = []
        with pytest.raises(ZeroDivisionError):
            got.extend(divide.map([1, 2, 0, 5]))
        with divide.map(iter(range(1, 100_000))) as results:
            assert next(iter(results)) == 10
        assert divide.statistics().accepted < 500, "the rest was not asked"


async def increase(n: int) -> int:
    await asyncio.sleep(0)
    mphub.publish("seen", mphub.current_event().payload)
    await asyncio.sleep(0)
    return n + 1


class Adder(Subscriber[int, int]):
    """Adds what it was made with."""

    def __init__(self, amount: int = 1) -> None:
        self.amount = amount

    def handle(self, payload: int) -> int:
        return payload + self.amount


FORMS = {"class": Adder, "instance": Adder(1), "coroutine": increase, "path to class": f"{__name__}:Adder", "path": f"{__name__}:increase"}


@pytest.mark.parametrize("handler", FORMS.values(), ids=FORMS)
def test_handlers_of_several_forms(engine: str, handler: Any) -> None:
    hub = EventHub(engine=engine)
    add = hub.subscribe("k", handler, name="add")
    hub.subscribe("seen", lambda n: None, name="seen")
    with hub:
        assert [add.request(n).result(10) for n in range(3)] == [1, 2, 3]


def test_a_subscribers_life(engine: str, record: Record) -> None:
    class Living(Subscriber[int, None]):
        def setup(self) -> None:
            record(f"setup {self.name} {self.replica} {self.log.name}")

        def handle(self, payload: int) -> None:
            record(f"handle {payload}")

        def teardown(self) -> None:
            record("teardown")

    hub = EventHub(engine=engine)
    hub.subscribe("k", Living, name="alive")
    with hub:
        hub.publish("k", 1)
        hub.publish("k", 2)
    assert record.lines == ["setup alive 0 mphub.subscriber.alive", "handle 1", "handle 2", "teardown"]


class Total(Subscriber[int, int]):
    """Has a state that outlives its process."""

    def setup(self) -> None:
        self.total = 0

    def handle(self, payload: int) -> int:
        self.total += payload
        return self.total

    def snapshot(self) -> int:
        return self.total

    def restore(self, state: object) -> None:
        assert isinstance(state, int)
        self.total = state


def test_a_state_with_snapshots_survives_a_restart(engine: str) -> None:
    hub = EventHub(engine=engine)
    total = hub.subscribe("k", Total)
    with hub:
        assert [total.request(n).result(10) for n in (1, 2)] == [1, 3]
        total.restart()
        total.wait_ready(10)
        assert total.request(3).result(10) == 6
        assert total.statistics().state == "RUNNING"
    with hub:
        assert total.request(1).result(10) == 1, "a hub in memory begins anew"


def test_a_state_has_all_of_what_was_published_together(engine: str, record: Record) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("start", burst)
    hub.subscribe("k", Total, to="total")
    hub.subscribe("total", record, name="total")
    with hub:
        hub.publish("start", 5)
    assert record.lines == ["0", "1", "3", "6", "10"]


def test_handlers_publish_in_their_own_thread_only(engine: str, record: Record) -> None:
    hub = EventHub(engine=engine)

    def elsewhere(n: int) -> str:
        found: list[str] = []

        def publish() -> None:
            try:
                mphub.publish("k", n)
            except mphub.HubError as error:
                found.append(str(error))

        thread = threading.Thread(target=publish)
        thread.start()
        thread.join()
        return found[0]

    ask = hub.subscribe("k", elsewhere)
    with hub:
        assert "inside a handler only" in ask.request(1).result(10)
    for call in (mphub.current_event, lambda: mphub.publish("k", 1)):
        with pytest.raises(mphub.HubError, match="inside a handler only"):
            call()


def test_a_hub_that_does_not_run_says_what_to_do(engine: str) -> None:
    hub = EventHub(engine=engine, name="idle")
    idle = hub.subscribe("k", lambda n: n, name="k")
    calls = (lambda: hub.publish("k", 1), lambda: hub.request("k", 1), lambda: hub.publish_batch("k", [1]), hub.drain, idle.restart)
    for call in calls:
        with pytest.raises(mphub.HubClosed, match=r"'idle' is not running: call start\(\) or .* before \w+\(\)$"):
            call()
    assert idle.state == "STOPPED"
    hub.stop()
    hub.start()
    with pytest.raises(mphub.HubError, match="running already"):
        hub.start()
    assert idle.state == "RUNNING"
    hub.publish("k", 1)
    hub.stop()
    hub.stop()
    for call in calls:
        with pytest.raises(mphub.HubClosed, match="was stopped"):
            call()


def test_a_stopped_hub_tells_its_last_figures_and_starts_anew(engine: str) -> None:
    hub = quiet(engine)
    divide = hub.subscribe("k", lambda n: 1 // n, name="divide")
    for _ in range(2):
        with hub:
            hub.publish_batch("k", [0, 1])
            hub.publish("nobody", 1)
        assert (hub.statistics().accepted, hub.statistics().unmatched) == (3, 1)
        assert (divide.statistics().handled, divide.statistics().dead) == (1, 1)
        assert [letter.payload for letter in hub.dead_letters()] == [0]
        assert len(hub.dead_letters("divide")) == 1
        assert [type(letter.error) for letter in divide.dead_letters()] == [ZeroDivisionError]


def test_an_exception_in_the_block_goes_on_and_stops_the_hub(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda n: n, name="k")
    with pytest.raises(KeyError, match="mine"), hub:
        hub.publish("k", 1)
        raise KeyError("mine")
    with pytest.raises(mphub.HubClosed):
        hub.publish("k", 1)


def test_subscriptions_come_and_go_while_it_runs(engine: str, record: Record) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    with hub:
        hub.publish("k", 0)
        hub.flush()
        first = hub.subscribe("k", lambda n: record(f"first {n}"), name="first")
        hub.publish("k", 1, confirm=True)
        second = hub.subscribe("*", lambda n: record(f"second {n}"), name="second")
        first.unsubscribe()
        hub.publish("k", 2)
        hub.drain()
        assert (list(hub.subscriptions), hub.subscribers("k")) == (["second"], ["second"])
        assert first.statistics().handled == 1, "its figures stay"
        with pytest.raises(mphub.NoSubscriber):
            first.request(1)
        second.unsubscribe(drain=False, forget=True)
        hub.publish("k", 3)
        hub.drain()
        assert hub.statistics().unmatched == 2
    assert record.lines == ["first 1", "second 2"]


def test_what_matches_nobody_is_counted_and_told_once_for_a_key(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[mphub.Notice] = []
    hub = EventHub(engine=engine)
    hub.on_notice(heard.append)
    hub.subscribe("orders.created", lambda n: n, name="orders")
    with hub:
        for _ in range(3):
            hub.publish("orders.craeted", 1)
        hub.publish("x", 1)
        hub.drain()
        assert hub.statistics().unmatched == 4
    told = [record.getMessage() for record in caplog.records if "no subscriber for" in record.getMessage()]
    assert len(told) == 2
    assert "'orders.craeted' (nearest pattern: 'orders.created' of 'orders')" in told[0]
    assert [(notice.kind, notice.severity, notice.subscriber, notice.details["key"]) for notice in heard] == [
        ("unmatched", "warning", None, "orders.craeted"),
        ("unmatched", "warning", None, "x"),
    ]


def test_unmatched_events_can_be_only_counted(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub(engine=engine, unmatched="ignore")
    with hub, caplog.at_level(logging.DEBUG):
        hub.publish("k", 1)
        hub.drain()
        assert (hub.statistics().accepted, hub.statistics().unmatched) == (1, 1)
    assert not [record for record in caplog.records if "no subscriber" in record.getMessage()]


def test_what_a_callback_raises_disturbs_nobody(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def fail(notice: mphub.Notice) -> None:
        raise KeyError(notice.kind)

    hub = EventHub(engine=engine)
    hub.on_notice(fail)
    hub.on_notice(lambda notice: heard.append(notice.kind))
    with hub:
        hub.publish("k", 1)
        hub.drain()
    assert heard == ["unmatched"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == ["a callback of on_notice failed"]


def test_what_is_not_there_yet_is_refused_with_a_sentence(engine: str) -> None:
    making: list[dict[str, Any]] = [{"notify": ["mailto:a"]}, {"dashboard": 80}]
    for options in making:
        with pytest.raises(mphub.InvalidOption, match=f"{next(iter(options))}: got .* this version has only"):
            EventHub(engine=engine, **options)


def test_only_a_durable_hub_has_a_history(engine: str) -> None:
    with pytest.raises(mphub.InvalidOption, match=r"retention: got 1; expected .*Retention"):
        EventHub(engine=engine, retention=1)  # type: ignore[arg-type]
    with pytest.raises(mphub.InvalidOption, match="without a path"):
        EventHub(engine=engine, retention=mphub.Retention())
    hub = EventHub(engine=engine)
    with pytest.raises(mphub.InvalidOption, match=r"start.*expected one of 'new', 'earliest'"):
        hub.subscribe("k", len, start="all")
    for asks in (hub.history, lambda: hub.subscribe("k", len, start="earliest")):
        with pytest.raises(mphub.InvalidOption, match="keeps no history"):
            asks()


def test_wrong_uses_are_refused_at_once(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", len)
    with hub:
        for key in ("", "a..b", "a b", "k.*", ">", "x" * 256):
            with pytest.raises(mphub.InvalidKey):
                hub.publish(key, 1)
            with pytest.raises(mphub.InvalidKey):
                hub.request(key, 1)
        with pytest.raises(mphub.InvalidKey, match="int 5"):
            hub.publish(5, 1)  # type: ignore[arg-type]
        with pytest.raises(mphub.PayloadError, match="generator"):
            hub.publish("k", (n for n in range(3)))
        for headers in ({"a": 1}, {1: "a"}, "a", [("a", "b")]):
            with pytest.raises(mphub.InvalidOption, match="headers"):
                hub.publish("k", 1, headers=headers)  # type: ignore[arg-type]
        assert hub.drain().accepted == 0


def test_programs_with_a_loop_can_use_it(engine: str) -> None:
    async def program() -> tuple[list[int], int]:
        hub = EventHub(engine=engine)
        hub.subscribe("k", lambda n: n + 1, name="k")
        async with hub as running:
            assert running is hub
            await hub.publish_async("k", 1, headers={"a": "b"}, ordering_key="o", confirm=True)
            found = [await hub.request("k", n) for n in range(3)]
        return found, hub.statistics().subscribers["k"].handled

    assert asyncio.run(program()) == ([1, 2, 3], 4)


@pytest.mark.timeout(20)
def test_coroutine_handlers_publish_at_once_and_ask_beside_a_loop(engine: str) -> None:
    hub = EventHub(engine=engine)

    async def outer(n: int) -> Any:
        hub.publish("side", n, now=True)
        return 10 * await hub.request("inner", n)

    hub.subscribe("outer", outer)
    hub.subscribe("inner", increase)
    side = hub.subscribe("side", lambda n: None, name="side")

    async def program() -> Any:
        async with hub:
            return await hub.request("outer", 1)

    assert asyncio.run(program()) == 20
    assert side.statistics().handled == 1


def test_threads_publish_side_by_side(engine: str) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        threads = [threading.Thread(target=hub.publish_batch, args=("k", range(200))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert hub.drain().subscribers["k"].handled == 800
