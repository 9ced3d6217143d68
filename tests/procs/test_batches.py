"""``batch``: a handler that gets several events with one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mphub
from mphub import Batch, BatchFailed, EventHub, InvalidOption, Limits, PayloadError, RetryLater, Snapshot, Subscriber
from mphub.procs.handlers import call_batch
from tests.helpers import eventually
from tests.notes import lines, note, note_batch, publish_together

pytestmark = pytest.mark.timeout(60)


QUICK = Batch(size=10, wait=0.02)


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


# -- what would wait for a batch to fill that cannot: the wait is endless


def test_a_map_asks_for_as_many_at_a_time_as_a_batch_has() -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda numbers: [len(numbers)] * len(numbers), batch=Batch(size=100, wait=3600))
    with hub:
        assert list(sub.map(range(300))) == [100] * 300
        assert list(hub.map("k", range(300))) == [100] * 300


def test_what_runs_alone_is_not_kept_by_what_waits_for_company(tmp_path: Path) -> None:
    def handle(numbers: list[int]) -> None:
        note_batch(tmp_path / "log")
        if len(numbers) > 1 and 0 in numbers:
            raise BatchFailed({0: RetryLater(0.1)})

    hub = EventHub()
    hub.subscribe("k", handle, batch=Batch(size=2, wait=3600))
    with hub:
        publish_together(hub, [0, 1])
        assert eventually(lambda: lines(tmp_path / "log") == ["0 1"])
        hub.publish("k", 2, confirm=True)
        assert eventually(lambda: lines(tmp_path / "log") == ["0 1", "2", "0(2)"])
        publish_together(hub, [3, 4])
        hub.drain(10)
    assert lines(tmp_path / "log")[-1] == "3 4"


def test_others_that_are_cancelled_put_no_batch_off(tmp_path: Path) -> None:
    """What a process gives back for their sake has begun to wait."""
    hub = EventHub()
    sub = hub.subscribe("k", lambda numbers: note(tmp_path / "log", numbers), batch=Batch(size=1000, wait=0.4))

    def cancel_one() -> bool:
        reply = sub.request(2)
        hub.flush()
        assert not eventually(lambda: bool(lines(tmp_path / "log")), 0.1)
        return reply.cancel()

    with hub:
        hub.publish("k", 1, confirm=True)
        assert all(cancel_one() for _ in range(3))
        assert eventually(lambda: bool(lines(tmp_path / "log")), 0.3)


def test_one_in_very_many_is_wanted(tmp_path: Path) -> None:
    """More lie between two of a batch than a process can hold."""
    hub = EventHub()
    hub.subscribe("k", lambda numbers: note(tmp_path / "log", numbers), batch=Batch(size=2, wait=3600), where=lambda n: n % 20_000 == 0)
    with hub:
        hub.publish_batch("k", range(20_001))
        assert eventually(lambda: lines(tmp_path / "log") == ["[0, 20000]"], 10)


def test_each_of_a_batch_knows_that_it_is_cancelled(tmp_path: Path) -> None:
    def handle(numbers: list[int]) -> list[int]:
        note(tmp_path / "log", "began")
        while sum(event.cancelled for event in mphub.current_events()) < 8:
            time.sleep(0.005)
        note(tmp_path / "log", [event.payload for event in mphub.current_events() if event.cancelled])
        return numbers

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, batch=Batch(size=10, wait=3600), limits=Limits(timeout=10))
    with hub:
        replies = [sub.request(n) for n in range(10)]
        assert eventually(lambda: lines(tmp_path / "log") == ["began"])
        for reply in replies[:8]:
            reply.cancel()
        assert eventually(lambda: lines(tmp_path / "log")[1:] == [str([*range(8)])])
