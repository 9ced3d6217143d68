"""``batch``: a handler that gets several events with one call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mphub
from mphub import Batch, BatchFailed, EventHub, HubError, InvalidOption, PayloadError, Reject, Retry, RetryLater, Snapshot, Subscriber
from mphub.procs.handlers import call_batch
from tests.helpers import eventually
from tests.notes import lines, note

pytestmark = pytest.mark.timeout(60)
QUICK = Batch(size=10, wait=0.02)


def publish_together(hub: EventHub, payloads: Any, key: str = "k") -> None:
    """Let events come in one frame, so that they are in a batch as far as they fit."""
    with hub.transaction() as together:
        for payload in payloads:
            together.publish(key, payload)


def quiet_hub(engine: str) -> EventHub:
    return EventHub(engine=engine, check=False, propagate=None if engine == "process" else False)


def test_a_handler_gets_what_waits_up_to_a_size(engine: str, tmp_path: Path) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda numbers: note(tmp_path / "log", numbers), batch=Batch(size=3, wait=0.02))
    with hub:
        publish_together(hub, range(8))
        assert hub.drain(10).subscribers[sub.name].handled == 8
    assert lines(tmp_path / "log") == ["[0, 1, 2]", "[3, 4, 5]", "[6, 7]"]


def test_events_gather_over_frames_until_they_are_many_enough() -> None:
    """The wait is endless: only its size lets a batch run."""
    hub = EventHub()
    sub = hub.subscribe("k", lambda numbers: [(n, len(numbers)) for n in numbers], batch=Batch(size=4, wait=3600))
    with hub:
        replies = []
        for n in range(8):
            replies.append(sub.request(n))
            hub.flush()  # a frame each
        assert [reply.result(10) for reply in replies] == [(n, 4) for n in range(8)]


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


def test_inline_a_batch_is_what_waits_when_its_turn_comes(tmp_path: Path) -> None:
    hub = EventHub(engine="inline")
    hub.subscribe("k", lambda numbers: note(tmp_path / "log", numbers), batch=Batch(size=3))
    hub.subscribe("many", lambda count: hub.publish_batch("k", range(count)), name="many")
    with hub:
        hub.publish("k", 1)
        assert hub.publish_batch("k", range(4)) == 4
        hub.publish("many", 4)
    assert lines(tmp_path / "log") == ["[1]", "[0, 1, 2]", "[3]", "[0, 1, 2]", "[3]"]


def test_inline_each_failure_is_told_or_kept() -> None:
    def handle(numbers: list[int]) -> None:
        raise BatchFailed({i: KeyError(n) for i, n in enumerate(numbers) if n})

    hub = EventHub(engine="inline")
    hub.subscribe("k", handle, batch=QUICK)
    with pytest.raises(mphub.DeadLettersLeft, match="handle: 1 exception"), hub:
        with pytest.raises(KeyError, match="1"):
            hub.publish_batch("k", [0, 1, 2])


# -- what fails


@pytest.mark.parametrize("results", [[1], [1, 2, 3], "ab", {0: 1, 1: 2}, {1, 2}, 3, iter([1, 2]), None])
def test_results_that_do_not_fit_are_a_failure_that_says_so(results: object) -> None:
    with pytest.raises(PayloadError, match=r"results of a batch: got .*; expected a list with one for each of 2 payloads"):
        call_batch(lambda _: results, ["a", "b"], [False, True])


def test_an_array_will_do_and_nothing_if_nobody_has_asked() -> None:
    assert call_batch(lambda numbers: np.array(numbers) * 2, [1, 2], [True, True]) == ([2, 4], {})
    assert call_batch(lambda _: None, [1, 2], [False, False]) == ([None, None], {})


def raising(error: BaseException) -> Callable[[object], None]:
    def handle(_: object) -> None:
        raise error

    return handle


def test_nobody_who_succeeded_may_wait_in_vain() -> None:
    error = KeyError()
    by_array: Any = {np.int64(1): error}
    assert call_batch(raising(BatchFailed(by_array)), [1, 2], [False, True]) == ([None, None], {1: error})
    assert call_batch(raising(BatchFailed({1: error}, [3, 4])), [1, 2], [True, True]) == ([3, 4], {1: error})
    with pytest.raises(PayloadError, match="got None, though somebody waits for an answer"):
        call_batch(raising(BatchFailed({1: error})), [1, 2], [True, True])


@pytest.mark.parametrize("errors", [{-1: KeyError()}, {0: "text"}, {0: KeyError}, {"a": KeyError()}, {True: KeyError()}, "text", [0]])
def test_what_cannot_be_said_of_a_batch_is_refused(errors: Any) -> None:
    with pytest.raises(InvalidOption, match=r"BatchFailed\(errors\): got .*; expected a dict"):
        BatchFailed(errors)
    with pytest.raises(InvalidOption, match=r"BatchFailed\(errors\): got the place 2; expected places of a batch of 2"):
        call_batch(raising(BatchFailed({2: KeyError()})), [1, 2], [False, False])


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


# -- what surrounds a batch


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


def test_what_is_not_wanted_keeps_no_batch_from_filling(tmp_path: Path) -> None:
    """The process is given no more than a batch at first, and only one of a hundred is wanted."""
    hub = EventHub()
    hub.subscribe("k", lambda numbers: note(tmp_path / "log", len(numbers)), batch=Batch(size=20, wait=3600), where=lambda n: n % 100 == 0)
    with hub:
        hub.publish_batch("k", range(2000))
        assert eventually(lambda: lines(tmp_path / "log") == ["20"], 10)


def test_snapshots_contain_whole_batches(tmp_path: Path) -> None:
    class Total(Subscriber[int, int]):
        total = 0

        def handle_batch(self, payloads: list[int]) -> list[int]:
            self.total += sum(payloads)
            return [self.total] * len(payloads)

        def snapshot(self) -> int:
            return self.total

        def restore(self, state: Any) -> None:
            self.total = state

    hub = EventHub()
    sub = hub.subscribe("k", Total, batch=Batch(size=7, wait=0.01), snapshot=Snapshot(every=20))
    with hub:
        hub.publish_batch("k", range(100))
        hub.drain(10)
        sub.restart()
        assert eventually(lambda: sub.statistics().restarts == 1)
        assert sub.request(0).result(10) == sum(range(100))


def test_a_pause_wants_back_what_waits_in_a_batch() -> None:
    """What has been handed out does not expire; what waits does."""
    hub = EventHub()
    sub = hub.subscribe("k", print, batch=Batch(size=2, wait=3600))
    with hub:
        hub.publish("k", 1, expires=0.3, confirm=True)
        sub.pause()
        assert eventually(lambda: sub.statistics().dropped == {"expired": 1})
        sub.resume()


def test_who_cancels_or_stops_does_not_wait_for_a_batch_to_fill() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", print, batch=Batch(size=3, wait=3600))
    with hub:
        reply = sub.request(1)
        hub.publish("k", 2, confirm=True)
        assert reply.cancel()
        assert eventually(lambda: sub.statistics().dropped == {"cancelled": 1})
        hub.stop(drain=False)
        assert sub.statistics().dropped == {"cancelled": 1, "stopped": 1}


# -- what is refused


@pytest.mark.parametrize("batch", [10, True, Batch, "10", {"size": 3}])
def test_a_batch_is_said_with_its_option(engine: str, batch: Any) -> None:
    with pytest.raises(InvalidOption, match="batch: got"):
        EventHub(engine=engine).subscribe("k", len, batch=batch)


def test_a_class_needs_the_method_that_is_called() -> None:
    class Single(Subscriber[int, int]):
        def handle(self, payload: int) -> int:
            return payload

    class Several(Subscriber[int, int]):
        def handle_batch(self, payloads: list[int]) -> list[int]:
            return payloads

    class Wrong(Subscriber[int, int]):
        def handle_batch(self) -> list[int]:  # type: ignore[override]
            return []

    hub = EventHub()
    for handler in (Single, Single()):
        with pytest.raises(InvalidOption, match="class Single has no handle_batch"):
            hub.subscribe("k", handler, batch=Batch())
    for other in (Several, Several()):
        with pytest.raises(InvalidOption, match=r"class Several has no handle\(self, payload\)"):
            hub.subscribe("k", other)
    with pytest.raises(InvalidOption, match=r"Wrong.handle_batch takes .*; expected a callable with self and a list of payloads"):
        hub.subscribe("k", Wrong, batch=Batch())
    with pytest.raises(InvalidOption, match=r"takes .*; expected a callable with one argument, the list of payloads"):
        hub.subscribe("k", lambda: None, batch=Batch())  # type: ignore[arg-type, misc]
