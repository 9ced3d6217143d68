"""Whoever waits for a reply reads the stream for itself; everyone else still gets what is theirs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from mphub import EventHub, Reply, Stop

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def hub() -> Iterator[EventHub]:
    made = EventHub(check=False, stop=Stop(ask=0.2, term=0.2))
    made.subscribe("echo", lambda value: value, name="echo")
    made.subscribe("slow", slow, name="slow")
    with made:
        for number in range(20):  # from the second on it is this thread that reads
            assert made.request("echo", number).result() == number
        yield made


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_the_thread_that_waits_reads_for_itself(hub: EventHub) -> None:
    readers = []
    for _ in range(20):
        reply = hub.request("slow", 0.001)
        concurrent.futures.Future.add_done_callback(reply, lambda _: readers.append(threading.get_ident()))
        reply.result()
    assert readers.count(threading.get_ident()) >= 15


def test_a_callback_is_called_though_nobody_waits(hub: EventHub) -> None:
    called = threading.Event()
    hub.request("echo", 1).result()
    hub.request("echo", 2).add_done_callback(lambda _: called.set())
    assert called.wait(5)


def test_several_replies_can_be_waited_for_together(hub: EventHub) -> None:
    replies = [hub.request("echo", number) for number in range(200)]
    done, late = concurrent.futures.wait(replies, timeout=5)
    assert not late
    assert {reply.result() for reply in done} == set(range(200))
    assert {reply.result() for reply in concurrent.futures.as_completed(replies, timeout=5)} == set(range(200))


def test_threads_that_wait_at_the_same_time_all_get_their_replies(hub: EventHub) -> None:
    def ask(first: int) -> bool:
        return all(hub.request("echo", number).result(10) == number for number in range(first, first + 200))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(0, 8000, 1000)))


def test_a_quick_reply_does_not_wait_for_a_slow_one_that_another_thread_reads_for(hub: EventHub) -> None:
    waiting: Reply[float] = hub.request("slow", 1.0)
    reader = threading.Thread(target=waiting.result)
    reader.start()
    time.sleep(0.05)
    began = time.monotonic()
    assert [hub.request("echo", number).result(5) for number in range(50)] == list(range(50))
    assert time.monotonic() - began < 0.8
    reader.join()


def test_a_timeout_ends_the_wait_and_the_reply_comes_later(hub: EventHub) -> None:
    reply = hub.request("slow", 0.5)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        reply.result(0.1)
    assert 0.1 <= time.monotonic() - began < 0.4
    assert reply.result(5) == 0.5


def test_what_is_published_between_requests_goes_out(hub: EventHub) -> None:
    for number in range(100):
        for _ in range(5):
            hub.publish("echo", number)
        hub.request("echo", number).result()
    hub.flush(timeout=5)
    hub.drain(timeout=10)
    assert hub.statistics().subscribers["echo"].handled == 20 + 600


def test_coroutines_and_threads_can_wait_side_by_side(hub: EventHub) -> None:
    async def ask() -> list[int]:
        return [await hub.request("echo", number) for number in range(100)]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        threads = pool.submit(lambda: [hub.request("echo", number).result() for number in range(100)])
        assert asyncio.run(ask()) == list(range(100))
        assert threads.result() == list(range(100))


def test_an_interrupt_while_reading_loses_no_reply(hub: EventHub) -> None:
    interrupted = 0
    for number in range(30):
        timer = threading.Timer(0.0005 * (number % 7), os.kill, (os.getpid(), signal.SIGINT))
        replies: list[Reply[int]] = []
        try:
            timer.start()
            while True:
                replies.append(hub.request("echo", len(replies)))
                replies[-1].result(10)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert [reply.result(10) for reply in replies] == list(range(len(replies)))
    assert interrupted == 30


def test_the_death_of_the_router_while_somebody_reads_loses_no_reply(hub: EventHub) -> None:
    for _ in range(3):
        reply = hub.request("slow", 0.3)
        killer = threading.Timer(0.1, lambda: os.kill(hub.statistics().pids["router"], signal.SIGKILL))
        killer.start()
        assert reply.result(10) == 0.3
        killer.join()
        assert [hub.request("echo", number).result(10) for number in range(20)] == list(range(20))


def test_a_callback_may_ask_again(hub: EventHub) -> None:
    answers: list[int] = []
    first = hub.request("slow", 0.1)
    hub.request("echo", 7).add_done_callback(lambda _: None)
    hub.request("echo", 1).add_done_callback(lambda _: hub.request("echo", 2).add_done_callback(lambda got: answers.append(got.result())))
    first.result()
    deadline = time.monotonic() + 5
    while not answers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert answers == [2]


def test_stopping_the_hub_ends_a_wait(hub: EventHub) -> None:
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            hub.request("slow", 30.0).result()
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    hub.request("echo", 1).result()
    thread.start()
    time.sleep(0.2)
    hub.stop(drain=False)
    thread.join(10)
    assert len(ended) == 1
