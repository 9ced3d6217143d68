"""``batch``: a handler that gets several events with one call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import Batch, BatchFailed, EventHub, HubError, InvalidOption, PayloadError, Reject, Retry, RetryLater, Subscriber
from tests.notes import lines, note, publish_together

pytestmark = pytest.mark.timeout(60)


QUICK = Batch(size=10, wait=0.02)


def quiet_hub(engine: str) -> EventHub:
    return EventHub(engine=engine, check=False, propagate=None if engine == "process" else False)


def test_a_handler_gets_what_waits_up_to_a_size(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda numbers: note(tmp_path / "log", numbers), batch=Batch(size=3, wait=0.02))
    with hub:
        publish_together(hub, range(8))
        assert hub.drain(10).subscribers[sub.name].handled == 8
    assert lines(tmp_path / "log") == ["[0, 1, 2]", "[3, 4, 5]", "[6, 7]"]


def test_each_result_that_is_not_none_is_published(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    hub.subscribe("k", lambda numbers: [n if n % 2 else None for n in numbers], to="odd", batch=QUICK)
    hub.subscribe("odd", lambda n: note(tmp_path / "log", n), name="odd")
    with hub:
        publish_together(hub, range(6))
    assert lines(tmp_path / "log") == ["1", "3", "5"]


def test_a_coroutine_function_and_a_class_can_have_batches(engine: str, tmp_path: Path) -> None:
    async def later(numbers: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [-n for n in numbers]

    class Sums(Subscriber[int, int]):
        def handle_batch(self, payloads: list[int]) -> list[int]:
            return [sum(payloads)] * len(payloads)

    hub = EventHub(engine=engine)
    one, other = hub.subscribe("a", later, batch=QUICK), hub.subscribe("b", Sums, batch=QUICK)
    with hub:
        assert list(one.map(range(30))) == [-n for n in range(30)]
        assert other.request(3).result(10) == 3


def test_only_the_guilty_one_of_a_batch_fails_and_nobody_else_is_charged(engine: str, tmp_path: Path) -> None:
    def handle(numbers: list[int]) -> list[int]:
        note(tmp_path / "log", [(event.payload, event.attempt) for event in mphub.current_events()])
        for n in numbers:
            mphub.publish("out", n)
        return [6 // n for n in numbers]

    hub = quiet_hub(engine)
    sub = hub.subscribe("k", handle, batch=QUICK, to="out", retry=Retry(2, on=ZeroDivisionError, delay=0))
    hub.subscribe("out", lambda n: note(tmp_path / "out", n), name="out")
    with hub:
        publish_together(hub, [1, 2, 0, 3])
        statistics = hub.drain(10).subscribers[sub.name]
        (letter,) = sub.dead_letters()
    assert (letter.payload, letter.attempts, type(letter.error)) == (0, 2, ZeroDivisionError)
    assert (statistics.handled, statistics.failed, statistics.dead) == (3, 2, 1)
    first, *others = lines(tmp_path / "log")
    assert first == "[(1, 1), (2, 1), (0, 1), (3, 1)]"
    assert sorted(others) == ["[(0, 1)]", "[(0, 2)]", "[(1, 1)]", "[(2, 1)]", "[(3, 1)]"]
    assert sorted(lines(tmp_path / "out")) == sorted("162332"), "what was published by what failed is not"


def test_a_handler_can_say_which_ones_failed(engine: str, tmp_path: Path) -> None:
    """Each is judged like one event alone."""

    def handle(numbers: list[int]) -> None:
        attempts = [event.attempt for event in mphub.current_events()]
        note(tmp_path / "log", list(zip(numbers, attempts, strict=True)))
        errors: dict[int, BaseException] = {
            0: Reject("no"),
            1: RetryLater(0.02),
            2: KeyError("on"),
            3: ValueError("not on"),
            4: KeyError("on"),
        }
        if len(numbers) > 1:
            raise BatchFailed(errors, [n * 2 for n in numbers])

    hub = quiet_hub(engine)
    sub = hub.subscribe("k", handle, batch=QUICK, to="out", retry=Retry(3, on=KeyError, delay=0))
    hub.subscribe("out", lambda n: note(tmp_path / "out", n), name="out")
    with hub:
        publish_together(hub, range(7))
        statistics = hub.drain(10).subscribers[sub.name]
        letters = {letter.payload: letter.reason for letter in sub.dead_letters()}
    assert letters == {0: "rejected", 3: "exception"}
    assert (statistics.handled, statistics.failed, statistics.retried) == (5, 5, 3)
    first, *others = lines(tmp_path / "log")
    assert first == str([(n, 1) for n in range(7)])
    assert others == ["[(2, 2)]", "[(4, 2)]", "[(1, 2)]"], "those without delay first, in their order"
    assert lines(tmp_path / "out") == ["10", "12"]


def test_each_requester_is_told_its_own_exception(engine: str) -> None:
    def handle(numbers: list[int]) -> None:
        errors: Any = {i: KeyError(n) for i, n in enumerate(numbers) if n % 3 == 1}
        raise BatchFailed(errors, [(i for i in numbers) if n % 3 == 2 else n for n in numbers])

    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", handle, batch=QUICK)
    with hub:
        found = list(sub.map(range(9), errors="return"))
    assert [type(n) for n in found] == [int, KeyError, PayloadError] * 3, "a generator cannot be sent"
    assert [error.args for error in found[1::3]] == [(1,), (4,), (7,)]


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_only_the_guilty_one_fails_whatever_it_raises(engine: str, error: type[BaseException]) -> None:
    def handle(numbers: list[int]) -> None:
        if 2 in numbers:
            raise error

    hub = quiet_hub(engine)
    sub = hub.subscribe("k", handle, batch=QUICK)
    with hub:
        with contextlib.suppress(error):  # inline it goes through to who publishes
            publish_together(hub, range(4))
        assert hub.drain(10).subscribers[sub.name].handled == 3
        assert [letter.payload for letter in sub.dead_letters()] == [2]


class Odd:
    """Three of them are loaded for the batch that fails, then each by itself."""

    loaded = 0

    def __reduce__(self) -> tuple[Callable[[], Odd], tuple[()]]:
        return load_odd, ()


def load_odd() -> Odd:
    Odd.loaded += 1
    if Odd.loaded == 4:
        raise OSError("it is gone")
    return Odd()


@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_a_payload_that_cannot_be_loaded_again_fails_its_event(engine: str) -> None:
    def handle(payloads: list[object]) -> None:
        if len(payloads) > 1:
            raise KeyError

    Odd.loaded = 0
    hub = quiet_hub(engine)
    sub = hub.subscribe("k", handle, batch=QUICK)
    with hub:
        publish_together(hub, [Odd(), Odd(), Odd(), 1])
        hub.drain(10)
        publish_together(hub, [2])
        statistics = hub.drain(10).subscribers[sub.name]
    assert (statistics.handled, statistics.dead) == (4, 1)


def test_a_handler_knows_the_events_of_its_batch(engine: str, tmp_path: Path) -> None:
    def handle(numbers: list[int]) -> None:
        events = mphub.current_events()
        assert [event.payload for event in events] == numbers
        note(tmp_path / "log", [event.headers["n"] for event in events])
        if len(numbers) == 1:
            assert mphub.current_event() == events[0]
        else:
            with pytest.raises(HubError, match="a batch of 2 events"):
                mphub.current_event()

    hub = EventHub(engine=engine)
    hub.subscribe("k", handle, batch=Batch(size=2, wait=0.02))
    hub.subscribe("alone", lambda _: note(tmp_path / "log", mphub.current_events() == [mphub.current_event()]), name="alone")
    with hub:
        with hub.transaction() as together:
            for n in range(3):
                together.publish("k", n, headers={"n": str(n)})
        hub.drain(10)
        hub.publish("alone", 1)
    assert lines(tmp_path / "log") == ["['0', '1']", "['2']", "True"]
    with pytest.raises(HubError, match="current_events works inside a handler"):
        mphub.current_events()


def test_a_filter_comes_before_the_batch(engine: str, tmp_path: Path) -> None:
    hub = quiet_hub(engine)
    where = lambda n: 1 / (n - 5) and n % 3 == mphub.current_event().payload % 2  # noqa: E731
    sub = hub.subscribe("k", lambda numbers: note(tmp_path / "log", numbers), batch=Batch(size=2, wait=0.02), where=where)
    with hub:
        publish_together(hub, range(14))
        statistics = hub.drain(10).subscribers[sub.name]
    assert lines(tmp_path / "log") == ["[0, 1]", "[6, 7]", "[12, 13]"]
    assert (statistics.handled, statistics.dead, dict(statistics.dropped)) == (6, 1, {"filtered": 7})


def test_a_filter_of_a_batch_may_not_publish(engine: str, tmp_path: Path) -> None:
    """It is asked before it is known with what, and how often, its event runs."""

    def wants(n: int) -> bool:
        if n % 2:
            mphub.publish("out", n)
        return n > 0

    hub = quiet_hub(engine)
    sub = hub.subscribe("k", lambda numbers: note(tmp_path / "log", numbers), batch=QUICK, where=wants)
    hub.subscribe("out", print, name="out")
    with hub:
        publish_together(hub, range(5))
        statistics = hub.drain(10)
        errors = {letter.payload: str(letter.error) for letter in sub.dead_letters()}
    assert statistics.subscribers["out"].accepted == 0
    assert list(errors) == [1, 3]
    assert "publish in the handler" in errors[1]
    assert (lines(tmp_path / "log")[-1], statistics.subscribers[sub.name].handled) == ("[4]" if engine == "process" else "[2, 4]", 2)


@pytest.mark.parametrize("batch", [10, True, Batch, "10", {"size": 3}])
def test_a_batch_is_said_with_its_option(engine: str, batch: Any) -> None:
    with pytest.raises(InvalidOption, match="batch: got"):
        EventHub(engine=engine).subscribe("k", len, batch=batch)
