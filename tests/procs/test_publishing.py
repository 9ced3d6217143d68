"""Threads, interrupts, signal handlers and tracers meet in one process's batch: each event goes out once, under its key, with its id."""

from __future__ import annotations

import contextlib
import gc
import itertools
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from mphub import EventHub, HubError, current_event

pytestmark = pytest.mark.timeout(60)
Row = tuple[int, str, Any]
ROWS: list[Row] = []


@pytest.fixture
def hub() -> Iterator[EventHub]:
    made = EventHub(check=False)
    made.subscribe("k.>", note, name="note")
    with made:
        made.publish("k.first", 0, confirm=True)  # what follows meets a stream and, soon, an open batch
        yield made


def note(payload: Any) -> list[Row]:
    """Keep what came; ``None`` asks for it."""
    event = current_event()
    if payload is None:
        return ROWS
    ROWS.append((event.id, event.key, payload))
    return []


def noted(hub: EventHub) -> list[Row]:
    hub.drain(30)
    rows: list[Row] = hub.request("k.report", None).result(30)
    return rows[1:]


@contextlib.contextmanager
def switching(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def alarms(action: Callable[[], None]) -> Iterator[Callable[[float], None]]:
    """Give what rings once, so many seconds later; pytest-timeout has the timer of the process."""
    due: queue.SimpleQueue[float] = queue.SimpleQueue()
    me = threading.get_ident()

    def ring() -> None:
        while (seconds := due.get()) >= 0:
            time.sleep(seconds)
            signal.pthread_kill(me, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: action())
    gc.disable()  # what the collector calls would swallow what the action raises
    thread = threading.Thread(target=ring)
    thread.start()
    try:
        with switching(1e-4):
            yield due.put
    finally:
        due.put(-1)
        thread.join()
        gc.enable()
        signal.signal(signal.SIGUSR1, before)


def publish_from_threads(hub: EventHub, count: int) -> list[list[Row]]:
    """Return what each thread published, in its order: some keys in turn, some runs, some with headers."""
    told: list[list[Row]] = [[] for _ in range(4)]

    def publish(which: int) -> None:
        for number in range(count):
            key = f"k.{which}" if number % 50 < 40 else f"k.{which}.{number % 3}"
            headers = {"n": "1"} if number % 97 == 0 else None
            told[which].append((hub.publish(key, (which, number), headers=headers), key, (which, number)))

    threads = [threading.Thread(target=publish, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def check_all(rows: list[Row], told: list[list[Row]]) -> None:
    assert sorted(rows) == sorted(row for each in told for row in each)
    for which, each in enumerate(told):
        assert [row for row in rows if row[2][0] == which] == each, "one thread's events are in order"


def test_threads_share_a_batch(hub: EventHub) -> None:
    with switching(1e-6):
        told = publish_from_threads(hub, 15_000)
    check_all(noted(hub), told)


def test_threads_share_a_batch_while_each_line_is_traced(hub: EventHub) -> None:
    def trace(frame: FrameType, what: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith("connection.py"):
            return None
        time.sleep(0)  # lets another thread come between any two lines
        return trace

    threading.settrace(trace)
    try:
        told = publish_from_threads(hub, 150)
    finally:
        threading.settrace(None)
    check_all(noted(hub), told)


class Interrupt(BaseException):
    """Comes at any moment, as Ctrl-C does."""


def interrupt() -> None:
    raise Interrupt


def publish_interrupted(hub: EventHub, times: int) -> tuple[int, list[int]]:
    """Publish numbers from 0 on, interrupted so many times; return how many, and those at which that was, which may be there twice."""
    sent, again = 0, []
    with alarms(interrupt) as ring_in:
        for number in range(times):
            try:
                ring_in(number * 1e-6)
                while True:
                    hub.publish(f"k.{sent % 3}", sent)
                    sent += 1
            except Interrupt:
                again.append(sent)
    return sent, again


def test_an_interrupt_leaves_an_event_in_or_out(hub: EventHub) -> None:
    sent, again = publish_interrupted(hub, 500)
    rows = noted(hub)
    assert len({row[0] for row in rows}) == len(rows), "no id is used twice"
    assert all(row[1] == f"k.{row[2] % 3}" for row in rows)
    payloads = [row[2] for row in rows]
    assert payloads == sorted(payloads)
    assert set(range(sent)) <= set(payloads)
    assert {payload for payload, one in itertools.pairwise(payloads) if one == payload} <= set(again)


def test_a_signal_handler_publishes_between_two_steps_of_a_publish(hub: EventHub) -> None:
    """It does, or is told that it cannot now; nothing is lost, and nothing waits for itself."""
    told: list[Row] = []
    refused, publishing = 0, False

    def publish_too() -> None:
        nonlocal refused, publishing
        if publishing:  # in here: what it waits for takes longer than until the next alarm
            return
        publishing = True
        key, payload = f"k.signal.{len(told) % 5}", ("signal", len(told))
        try:
            told.append((hub.publish(key, payload), key, payload))
        except HubError:
            refused += 1
        finally:
            publishing = False

    plain: list[Row] = []
    with alarms(publish_too) as ring_in:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            key, payload = f"k.{len(plain) % 3}", ("plain", len(plain))
            if len(plain) % 300 == 0:
                ring_in(len(plain) % 7 * 1e-4)
            plain.append((hub.publish(key, payload), key, payload))
    rows = noted(hub)
    assert len(told) > refused
    assert [row for row in rows if row[2][0] == "plain"] == plain
    assert [row for row in rows if row[2][0] == "signal"] == told
