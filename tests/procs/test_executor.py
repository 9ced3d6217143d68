"""The executor: what CPython's tests ask of one, and what theirs does not do: it outlives its processes."""

from __future__ import annotations

import concurrent.futures as futures
import ctypes
import functools
import operator
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mphub import EventHub, HandlerCrashed, HubExecutor, NameTaken, PayloadError, Retry
from tests.helpers import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def pool() -> Iterator[HubExecutor]:
    hub = EventHub(check=False)
    with hub:
        with hub.executor(replicas=2) as made:
            yield made
        assert hub.subscriptions == {}


# -- as CPython's test_concurrent_futures has it


def test_submit(pool: HubExecutor) -> None:
    assert pool.submit(pow, 2, 8).result() == 256
    assert pool.submit(functools.partial(int, base=2), "101").result() == 5


def test_submit_keyword(pool: HubExecutor) -> None:
    assert pool.submit(sum, [1], start=2).result() == 3
    assert pool.submit(lambda *args, **kwargs: (args, kwargs), 1, self=2, fn=3).result() == ((1,), {"self": 2, "fn": 3})


def test_map(pool: HubExecutor) -> None:
    assert list(pool.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
    assert list(pool.map(pow, range(10), range(10), chunksize=3)) == list(map(pow, range(10), range(10)))


def test_map_exception(pool: HubExecutor) -> None:
    found = pool.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert next(found) == (0, 1)
    assert next(found) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_map_timeout(pool: HubExecutor) -> None:
    found = pool.map(time.sleep, [0, 0, 3], timeout=0.5)
    assert [next(found), next(found)] == [None, None]
    with pytest.raises(futures.TimeoutError):
        next(found)


def test_exceptions_come_with_the_traceback_of_the_process(pool: HubExecutor) -> None:
    error = pool.submit(operator.truediv, 1, 0).exception()
    assert isinstance(error, ZeroDivisionError)
    assert "mphub" not in str(error)


def test_wait_and_as_completed(pool: HubExecutor) -> None:
    calls = [pool.submit(time.sleep, seconds) for seconds in (0.3, 0.0)]
    done, waiting = futures.wait(calls, return_when=futures.FIRST_COMPLETED, timeout=10)
    assert (done, waiting) == ({calls[1]}, {calls[0]})
    assert set(futures.as_completed(calls, timeout=10)) == set(calls)


def test_submit_after_shutdown_raises(pool: HubExecutor) -> None:
    pool.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(pow, 2, 5)
    pool.shutdown()  # once more is nothing


def test_shutdown_waits_for_what_is_pending() -> None:
    hub = EventHub()
    with hub:
        pool = hub.executor(replicas=1)
        calls = [pool.submit(after, 0.05, n) for n in range(6)]
        pool.shutdown()
        assert [call.result(0) for call in calls] == list(range(6))


def test_shutdown_without_waiting_lets_all_end() -> None:
    hub = EventHub()
    with hub:
        pool = hub.executor(replicas=1)
        calls = [pool.submit(after, 0.1, n) for n in range(4)]
        pool.shutdown(wait=False)
        assert not calls[-1].done()
        assert [call.result(10) for call in calls] == list(range(4))
        assert eventually(lambda: hub.subscriptions == {})


def test_cancel_futures_lets_what_runs_end_and_cancels_the_rest(tmp_path: Path) -> None:
    hub = EventHub()
    with hub:
        pool = hub.executor(replicas=2)
        calls = [pool.submit(mark, tmp_path / str(n)) for n in range(10)]
        assert eventually(lambda: len(list(tmp_path.iterdir())) == 2)
        pool.shutdown(cancel_futures=True)
        assert [call.cancelled() for call in calls] == [False] * 2 + [True] * 8
        assert [call.result(0) for call in calls[:2]] == ["0", "1"]
    assert len(list(tmp_path.iterdir())) == 2


def test_many_threads_submit(pool: HubExecutor) -> None:
    found: list[int] = []

    def submit(first: int) -> None:
        found.extend(call.result(20) for call in [pool.submit(abs, -n) for n in range(first, first + 300)])

    threads = [threading.Thread(target=submit, args=(first,)) for first in range(0, 1200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1200))


def after(seconds: float, n: int) -> int:
    time.sleep(seconds)
    return n


def mark(path: Path) -> str:
    path.touch()
    time.sleep(0.4)
    return path.name


# -- as theirs does not


def test_lambdas_and_closures_are_sent(pool: HubExecutor) -> None:
    factor = 3
    assert list(pool.map(lambda n: n * factor, range(5))) == [0, 3, 6, 9, 12]


def test_what_cannot_be_sent_raises_at_once(pool: HubExecutor) -> None:
    with pytest.raises(PayloadError):
        pool.submit(len, threading.Lock())  # type: ignore[arg-type]


@pytest.mark.faults
def test_calls_that_kill_their_process_end_alone(pool: HubExecutor) -> None:
    def call(n: int) -> int:
        if n % 10 == 9:
            ctypes.string_at(0)
        return n * 2

    calls = [pool.submit(call, n) for n in range(100)]
    for n, reply in enumerate(calls):
        if n % 10 == 9:
            with pytest.raises(HandlerCrashed, match="SIGSEGV"):
                reply.result(30)
        else:
            assert reply.result(30) == n * 2


@pytest.mark.faults
def test_a_call_can_be_tried_again_after_a_death(tmp_path: Path) -> None:
    def once(path: Path) -> str:
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    hub = EventHub()
    with hub, hub.executor(replicas=1, retry=Retry(max_attempts=2)) as pool:
        assert pool.submit(once, tmp_path / "tried").result(20) == "done"


def test_two_pools_need_two_names() -> None:
    hub = EventHub()
    with hub, hub.executor("one", replicas=1) as one, hub.executor("two", replicas=1) as two:
        assert one.submit(os.getpid).result(10) != two.submit(os.getpid).result(10)
        with pytest.raises(NameTaken):
            hub.executor("one")
        one.subscription.scale(2)
        assert eventually(lambda: len(one.subscription.statistics().pids) == 2)
