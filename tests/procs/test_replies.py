"""Whoever waits for a reply reads the stream for itself; everyone else still gets what is theirs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import psutil
import pytest

import mphub
from mphub import EventHub, Inbox, Reply, Restart, RetryLater, Stop, SubscriberFatal
from tests.helpers import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def hub() -> Iterator[EventHub]:
    made = EventHub(check=False, stop=Stop(ask=0.2, term=0.2))
    made.subscribe("echo", lambda value: value, name="echo")
    made.subscribe("slow", slow, name="slow")
    made.subscribe("other", len, name="other")
    with made:
        for number in range(20):  # from the second on it is this thread that reads
            assert made.request("echo", number).result() == number
        yield made
        made.stop(drain=False)


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


def test_an_interrupt_of_who_reads_loses_nobody_elses_reply(hub: EventHub) -> None:
    answers: list[int] = []

    def ask() -> None:
        answers.extend(hub.request("echo", number).result(20) for number in range(300))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                hub.request("echo", 0).result(20)
        except KeyboardInterrupt:
            timer.join()
    assert sorted(answers) == sorted([*range(300)] * 3)


def test_a_refusal_is_told_to_who_published_though_another_thread_reads(hub: EventHub) -> None:
    raised: list[type[BaseException]] = []

    def publish() -> None:
        time.sleep(0.05)
        try:
            hub.publish("nobody.is.here", 1, confirm=True)
        except mphub.NoSubscriber as error:
            raised.append(type(error))

    thread = threading.Thread(target=publish)
    reply = hub.request("slow", 0.3)
    thread.start()
    assert reply.result(5) == 0.3
    thread.join()
    assert raised == [mphub.NoSubscriber]


def test_cancelling_ends_the_wait_of_who_reads(hub: EventHub) -> None:
    reply = hub.request("slow", 5.0)
    threading.Timer(0.2, reply.cancel).start()
    began = time.monotonic()
    with pytest.raises(concurrent.futures.CancelledError):
        reply.result()
    assert time.monotonic() - began < 2.0


def test_a_timeout_holds_though_a_publisher_waits_for_a_frozen_router(hub: EventHub) -> None:
    router = hub.statistics().pids["router"]
    reply = hub.request("slow", 20.0)
    os.kill(router, signal.SIGSTOP)
    flood = threading.Thread(target=lambda: [hub.publish("other", bytes(60_000)) for _ in range(500)], daemon=True)
    flood.start()
    time.sleep(0.3)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        reply.result(0.2)
    took = time.monotonic() - began
    os.kill(router, signal.SIGCONT)
    flood.join(20)
    assert took < 1.0


@pytest.mark.parametrize("timeout", [1e7, 3600.0, 5])
def test_a_timeout_may_be_as_long_as_one_likes(timeout: float, hub: EventHub) -> None:
    assert [hub.request("echo", number).result(timeout) for number in range(5)] == list(range(5))
    assert hub.request("slow", 0.05).result(timeout) == 0.05


def test_a_forked_child_gets_no_reply_of_its_parents(hub: EventHub) -> None:
    reply = hub.request("slow", 0.2)

    def ask(line: Connection) -> None:
        try:
            reply.result(0.5)
        except BaseException as error:
            line.send(type(error).__name__)
        line.send(hub.request("echo", 1).result(10))

    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=ask, args=(theirs,))
    child.start()
    assert ours.recv() == "TimeoutError"
    assert ours.recv() == 1
    child.join()
    ours.close()
    theirs.close()
    assert reply.result(5) == 0.2


def test_a_router_idles_though_a_requester_has_died_before_its_confirm(hub: EventHub) -> None:
    child = multiprocessing.get_context("fork").Process(target=lambda: (hub.request("slow", 1.0), os._exit(0)))
    child.start()
    child.join()
    router = psutil.Process(hub.statistics().pids["router"])
    before = sum(router.cpu_times()[:2])
    time.sleep(0.8)
    assert sum(router.cpu_times()[:2]) - before < 0.1


def test_a_full_batch_goes_out_though_its_filler_was_interrupted(hub: EventHub) -> None:
    router = hub.statistics().pids["router"]
    os.kill(router, signal.SIGSTOP)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    published = 0
    try:
        timer.start()
        while True:
            hub.publish("other", bytes(1000))
            published += 1
    except KeyboardInterrupt:
        os.kill(router, signal.SIGCONT)
    timer.join()
    assert eventually(lambda: hub.statistics().accepted >= 20 + published, 5)


def test_requests_of_one_that_is_given_up_end_wherever_they_wait() -> None:
    """In memory, in the journal alone, or for the time of a retry; what nobody waits for stays, for ``restart``."""

    def handle(n: int) -> None:
        if n == -1:
            raise RetryLater(60)
        os._exit(3)

    hub = EventHub(check=False)
    sub = hub.subscribe("k", handle, restart=Restart(max_restarts=0), inbox=Inbox(maxsize=100_000))
    with hub:
        retried = sub.request(-1)
        assert eventually(lambda: sub.statistics().failed == 1, 20)
        sub.pause()
        hub.publish("k", 0)
        replies = [sub.request(n) for n in range(11_000)]
        hub.flush()
        sub.resume()
        for reply in (retried, replies[0], replies[-1]):
            with pytest.raises(SubscriberFatal):
                reply.result(20)
        assert all(reply.done() for reply in replies)
        assert sub.statistics().waiting == 1
        hub.stop(drain=False)
