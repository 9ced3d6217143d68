"""``concurrency``: several events at a time in one process, coroutines on one loop or functions in threads."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import Batch, EventHub, HubError, InvalidOption, PayloadError, Reject, Retry, RetryLater, Snapshot, Subscriber
from mphub.store.board import SLOTS
from mphub.wire.frames import MAX_WHOLE
from tests.helpers import eventually
from tests.notes import lines, note

pytestmark = pytest.mark.timeout(60)


def test_coroutines_run_at_a_time_up_to_the_number() -> None:
    class Counts(Subscriber[int, int]):
        now = most = 0

        async def handle(self, payload: int) -> int:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.05)
            self.now -= 1
            return self.most

    hub = EventHub()
    sub = hub.subscribe("k", Counts, concurrency=100)
    with hub:
        replies = [sub.request(n) for n in range(200)]
        assert max(reply.result(20) for reply in replies) == 100


def test_functions_run_at_a_time_in_threads_of_their_own() -> None:
    """None ends before all of them have begun."""

    class Meet(Subscriber[int, str]):
        def setup(self) -> None:
            self.barrier = threading.Barrier(5)

        def handle(self, payload: int) -> str:
            self.barrier.wait(20)
            return threading.current_thread().name

    hub = EventHub()
    sub = hub.subscribe("k", Meet, concurrency=5)
    with hub:
        replies = [sub.request(n) for n in range(10)]
        assert {reply.result(30) for reply in replies} == {f"Meet-{n}" for n in range(5)}


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "coroutines"])
def test_each_handler_has_its_own_event_and_outputs(is_async: bool, tmp_path: Path) -> None:
    def before(n: int) -> Any:
        return mphub.publish("out", (n, mphub.current_event().headers["n"]), headers={"by": str(n)})

    def after(n: int, identity: Any) -> object:
        event = mphub.current_event()
        mphub.publish("out", (event.payload, str(n)), headers={"by": str(n)})
        if n % 5 == 3:
            raise KeyError(n)
        return identity

    def handle(n: int) -> object:
        identity = before(n)
        time.sleep(0.001 * (7 - n % 7))
        return after(n, identity)

    async def handle_async(n: int) -> object:
        identity = before(n)
        await asyncio.gather(asyncio.sleep(0.001 * (7 - n % 7)), publish_more(n))
        return after(n, identity)

    async def publish_more(n: int) -> None:
        await asyncio.sleep(0)
        assert mphub.current_event().payload == n, "a task of a handler knows its event"

    def gather(out: tuple[int, str]) -> None:
        event = mphub.current_event()
        assert (str(out[0]), event.headers["by"]) == (out[1], out[1])
        note(tmp_path / "out", f"{out[0]} {event.id}")

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle_async if is_async else handle, name="sub", concurrency=8, to="ids")
    hub.subscribe("out", gather, name="out")
    hub.subscribe("ids", lambda identity: note(tmp_path / "ids", identity), name="ids")
    with hub:
        for n in range(50):
            hub.publish("k", n, headers={"n": str(n)})
        statistics = hub.drain(20).subscribers
    assert (statistics["sub"].handled, statistics["sub"].dead, statistics["out"].handled) == (40, 10, 80)
    found = [line.split() for line in lines(tmp_path / "out")]
    assert sorted(int(n) for n, _ in found) == sorted(2 * [n for n in range(50) if n % 5 != 3]), "failed ones take theirs back"
    assert set(lines(tmp_path / "ids")) < {identity for _, identity in found}, "publish returns the id that the event has"
    assert sub.dead_letters()[0].payload % 5 == 3


def test_events_start_in_their_order_and_end_in_any(tmp_path: Path) -> None:
    async def handle(n: int) -> None:
        note(tmp_path / "log", f"+{n}")
        while n == 0 and not (tmp_path / "go").exists():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001 * (n % 3))
        note(tmp_path / "log", f"-{n}")

    hub = EventHub()
    sub = hub.subscribe("k", handle, concurrency=3)
    with hub:
        hub.publish_batch("k", range(100))
        assert eventually(lambda: sub.statistics().handled == 99), "the first one does not keep the acks of the others back"
        assert (sub.statistics().running, sub.statistics().waiting) == (1, 0)
        (tmp_path / "go").touch()
        hub.drain(10)
    found = lines(tmp_path / "log")
    assert [line for line in found if line[0] == "+"] == [f"+{n}" for n in range(100)]
    assert found[-1] == "-0"


def test_a_slow_one_holds_up_no_other_however_many_come(tmp_path: Path) -> None:
    """More than a board has slots."""

    async def handle(n: int) -> None:
        while n == 0 and not (tmp_path / "go").exists():
            await asyncio.sleep(0.01)

    hub = EventHub()
    sub = hub.subscribe("k", handle, concurrency=2)
    with hub:
        hub.publish_batch("k", range(SLOTS + 1000))
        assert eventually(lambda: sub.statistics().handled == SLOTS + 999, 20)
        (tmp_path / "go").touch()


def test_each_failure_is_judged_by_itself(tmp_path: Path) -> None:
    def handle(n: int) -> int:
        event = mphub.current_event()
        note(tmp_path / "log", f"{n} {event.attempt}")
        time.sleep(0.001 * (n % 3))
        if event.attempt == 1 and n < 4:
            raise [KeyError(n), RetryLater(0.01), Reject("no"), ValueError(n)][n]
        return n

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, concurrency=4, retry=Retry(3, on=KeyError, delay=0), where=lambda n: n != 5)
    with hub:
        hub.publish_batch("k", range(10))
        statistics = hub.drain(10).subscribers[sub.name]
        letters = {letter.payload: letter.reason for letter in sub.dead_letters()}
    assert letters == {2: "rejected", 3: "exception"}
    assert (statistics.handled, statistics.failed, dict(statistics.dropped)) == (7, 4, {"filtered": 1})
    assert sorted(lines(tmp_path / "log")) == sorted([*(f"{n} 1" for n in range(10) if n != 5), "0 2", "1 2"])


def test_a_result_that_cannot_be_sent_and_a_cancelled_task_are_failures() -> None:
    async def handle(n: int) -> object:
        if n == 1:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(1)
        return (i for i in (0, n)) if n == 0 else n

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, concurrency=3)
    with hub:
        with pytest.raises(PayloadError):
            sub.request(0).result(10)
        hub.publish_batch("k", range(1, 4))
        assert hub.drain(10).subscribers[sub.name].handled == 2
        assert isinstance(sub.dead_letters()[0].error, asyncio.CancelledError)


def test_what_a_handler_leaves_running_is_no_part_of_it(tmp_path: Path) -> None:
    async def late() -> None:
        await asyncio.sleep(0.02)
        try:
            mphub.publish("out", "lost")
        except HubError as error:
            note(tmp_path / "log", error)

    class Leaves(Subscriber[int, None]):
        async def handle(self, payload: int) -> None:
            self.task = asyncio.get_running_loop().create_task(late())

    hub = EventHub()
    hub.subscribe("k", Leaves, concurrency=2)
    with hub:
        hub.publish("k", 1)
        hub.drain(10)
        assert eventually(lambda: lines(tmp_path / "log"))
    assert "works inside a handler only" in lines(tmp_path / "log")[0]


def test_a_handler_can_ask_others(tmp_path: Path) -> None:
    async def ask(n: int) -> object:
        return await hub.request("double", n)

    hub = EventHub()
    hub.subscribe("double", lambda n: 2 * n, name="double", concurrency=2)
    sub = hub.subscribe("k", ask, concurrency=10)
    with hub:
        assert list(sub.map(range(20))) == [2 * n for n in range(20)]


def test_a_pause_lets_what_runs_end_and_has_the_rest_back(tmp_path: Path) -> None:
    def handle(n: int) -> None:
        note(tmp_path / "log", n)
        while not (tmp_path / "go").exists():
            time.sleep(0.005)

    hub = EventHub()
    sub = hub.subscribe("k", handle, concurrency=3)
    with hub:
        hub.publish_batch("k", range(10))
        assert eventually(lambda: len(lines(tmp_path / "log")) == 3)
        sub.pause()
        hub.publish("k", 10)
        (tmp_path / "go").touch()
        assert eventually(lambda: sub.statistics().running == 0)
        assert sorted(lines(tmp_path / "log")) == ["0", "1", "2"]
        assert (sub.statistics().handled, sub.statistics().waiting) == (3, 8)
        sub.resume()
        hub.drain(10)
        sub.restart()
        assert sub.statistics().handled == 11
    assert sorted(map(int, lines(tmp_path / "log"))) == list(range(11))


def test_ordered_events_run_beside_those_of_other_keys_only(tmp_path: Path) -> None:
    async def handle(n: int) -> None:
        event = mphub.current_event()
        note(tmp_path / f"{event.ordering_key}", f"+{n}")
        await asyncio.sleep(0.001 * (n % 4))
        note(tmp_path / f"{event.ordering_key}", f"-{n}")
        if n == 21 and event.attempt == 1:
            raise RetryLater(0.02)

    hub = EventHub()
    hub.subscribe("k", handle, concurrency=10, ordered=True)
    with hub:
        for n in range(90):
            hub.publish("k", n, ordering_key=str(n % 3))
    for key in range(3):
        numbers = [n for n in range(90) if n % 3 == key]
        again = [21] if key == 0 else []
        assert lines(tmp_path / str(key)) == [f"{sign}{n}" for n in sorted([*numbers, *again]) for sign in "+-"]


def test_concurrency_goes_with_neither_snapshots_nor_batches() -> None:
    class Keeps(Subscriber[int, None]):
        def handle(self, payload: int) -> None: ...

        def snapshot(self) -> int:
            return 0

    hub = EventHub()
    for snapshot in (None, Snapshot()):
        with pytest.raises(InvalidOption, match="concurrency: got 2 with snapshots, which would hold half of the events"):
            hub.subscribe("k", Keeps, concurrency=2, snapshot=snapshot)
    with pytest.raises(InvalidOption, match="concurrency: got 2 with batch="):
        hub.subscribe("k", print, concurrency=2, batch=Batch())


def test_events_that_end_together_are_reported_in_frames_that_can_be_sent() -> None:
    arrived: list[asyncio.Future[None]] = []
    count, size = 4500, 60_000

    async def publish_much(n: int) -> None:
        mphub.publish("out", bytes(size))
        mine = asyncio.get_running_loop().create_future()
        arrived.append(mine)
        if len(arrived) == count:
            for future in arrived:
                future.set_result(None)
        await mine

    assert count * size > MAX_WHOLE
    hub = EventHub(max_bytes="1GB", unmatched="ignore")
    much = hub.subscribe("k", publish_much, concurrency=count)
    with hub:
        hub.publish_batch("k", range(count))
        hub.drain(30)
        assert (much.statistics().handled, much.statistics().restarts, hub.statistics().unmatched) == (count, 0, count)
