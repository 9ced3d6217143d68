"""What ``bench.py`` opens to measure on it: each a way to subscribers that count.

"two-hop" is what people wire by hand: the producer puts (key, payload) into one multiprocessing.Queue, a router process gets each and puts
the payload into each subscriber's own multiprocessing.Queue. Its answers come straight back in one hop, by a third queue; those of mphub
come through the router. mphub's journal is on.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sqlite3
import tempfile
import time
import timeit
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any, NoReturn

from peers import DISK, Peer

from mphub import Batch, EventHub, Inbox, Restart, Stop, Subscriber
from mphub.store.archive import JsonLinesArchive, SqliteArchive

KEY, PAYLOAD = "orders.created", b"x" * 100
FORK = multiprocessing.get_context("fork")
ORDER = {"order": 17, "customer": "someone", "total": 12.5, "lines": [1, 2, 3]}
TOGETHER = Batch(1000, 0.02)
CALLERS = 2
"""Processes of a pool."""
KEYS = 100_000
PATTERNS = 1000
LARGE = 10_000
"""Elements of a payload that is looked at."""
STUCK = 1000
"""Events that a stuck subscriber's inbox takes."""
BLOCK = b"x" * 4096
"""Stays in the nearest cache, and is too short for crc32 to let go of the interpreter lock."""
LOOPS = "BENCH_LOOPS"
"""The environment variable that hands on how much work a millisecond is."""


@dataclass(frozen=True)
class Side:
    """A way to subscribers that count, each in a process of its own."""

    publish: Callable[[int], object]  # so many events
    ask: Callable[[], list[int]]  # what each subscriber has counted of all that was published before


Opened = AbstractContextManager[Side]


# -- wired by hand, and other packages


@contextlib.contextmanager
def two_hop(subscribers: int, payload: object = PAYLOAD) -> Iterator[Side]:
    """Open the baseline: plain queues, processes by fork, nothing else."""
    ingress, answers = FORK.Queue(), FORK.Queue()
    inboxes = [FORK.Queue() for _ in range(subscribers)]
    processes = [FORK.Process(target=count, args=(inbox, answers), daemon=True) for inbox in inboxes]
    processes.append(FORK.Process(target=route, args=(ingress, {KEY: inboxes}), daemon=True))

    def publish(events: int) -> None:
        for _ in range(events):
            ingress.put((KEY, payload))

    def ask() -> list[int]:
        ingress.put((KEY, None))  # what was put before is got before
        return [answers.get() for _ in inboxes]

    for process in processes:
        process.start()
    try:
        yield Side(publish, ask)
    finally:
        ingress.cancel_join_thread()  # nobody reads it any more
        for process in processes:
            process.kill()
            process.join()


def route(ingress: Queue[Any], table: dict[str, list[Queue[Any]]]) -> NoReturn:
    while True:
        key, payload = ingress.get()
        for inbox in table[key]:
            inbox.put(payload)


def count(inbox: Queue[Any], answers: Queue[int]) -> NoReturn:
    handled = 0
    while True:
        payload = inbox.get()
        if payload is None:
            answers.put(handled)
        else:
            handled += 1
            if len(payload) > LARGE:
                look_at(payload)


@contextlib.contextmanager
def with_peer(peer: Peer) -> Iterator[Side]:
    with peer.open(KEY, PAYLOAD) as (publish, ask):
        yield Side(publish, ask)


@contextlib.contextmanager
def process_pool() -> Iterator[Side]:
    with ProcessPoolExecutor(CALLERS, mp_context=FORK) as pool:
        yield calling(pool, next_of)


def next_of(n: int) -> int:
    return n + 1


def calling(pool: Executor, function: Callable[[int], int]) -> Side:
    """Let a pool make calls, all asked for before the first result is looked at."""
    made = [0]

    def call(times: int) -> None:
        replies = [pool.submit(function, n) for n in range(times)]
        made[0] += sum(reply.result() == n + 1 for n, reply in enumerate(replies))

    return Side(call, lambda: list(made))


# -- mphub


class Counter(Subscriber[Any, int]):
    """Does next to nothing, so that the way there is what is measured."""

    handled = 0

    def handle(self, payload: Any) -> int:
        if payload is not None:
            self.handled += 1
            if len(payload) > LARGE:
                look_at(payload)
        return self.handled


def look_at(payload: Any) -> object:
    """Touch a large one here and there."""
    return payload[:: LARGE // 8].sum()


@contextlib.contextmanager
def mphub(subscribers: int, patterns: str | list[str] = KEY, keys: Sequence[str] = (KEY,), payload: object = PAYLOAD) -> Iterator[Side]:
    """Open a hub with its defaults."""
    hub = EventHub()
    names = [hub.subscribe(patterns, Counter, name=f"counter-{number}").name for number in range(subscribers)]
    with hub:
        yield side_of(hub, names, keys, payload)


def side_of(hub: EventHub, names: list[str], keys: Sequence[str] = (KEY,), payload: object = PAYLOAD) -> Side:
    def publish(events: int) -> None:
        if len(keys) == 1:
            for _ in range(events):
                hub.publish(KEY, payload)
        else:
            for key in itertools.islice(itertools.cycle(keys), events):
                hub.publish(key, payload)

    def ask() -> list[int]:
        return [hub.request(KEY, None, to=name).result() for name in names]

    return Side(publish, ask)


@contextlib.contextmanager
def durable(durability: str | None, confirmed: int | None = None) -> Iterator[Side]:
    """Open a hub on a folder on the disk (None: one in memory); with ``confirmed`` it waits for confirms after each so many events."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=DISK) as folder:
        options: dict[str, Any] = {} if durability is None else {"path": f"{folder}/hub", "durability": durability}
        hub = EventHub(**options)
        hub.subscribe(KEY, Counter, name="counter")
        with hub:
            side = side_of(hub, ["counter"])

            def publish(events: int) -> None:
                for first in range(0, events, confirmed or events):
                    side.publish(min(confirmed or events, events - first))
                    if confirmed:
                        hub.flush()

            yield Side(publish, side.ask)


class Batched(Counter):
    """Counts what it gets in batches."""

    def handle_batch(self, payloads: list[Any]) -> list[int]:
        return [self.handle(payload) for payload in payloads]


@contextlib.contextmanager
def batches() -> Iterator[Side]:
    hub = EventHub()
    hub.subscribe(KEY, Batched, name="counter", batch=TOGETHER)
    with hub:
        yield side_of(hub, ["counter"], payload=ORDER)


@contextlib.contextmanager
def archived(kind: type[SqliteArchive] | type[JsonLinesArchive], kept: Callable[[str], int]) -> Iterator[Side]:
    """Open a hub whose one subscriber writes to a file; what is counted is read from there."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = f"{folder}/events"
        hub = EventHub()
        hub.subscribe([KEY, "ask"], kind(path), name="archive", batch=TOGETHER)

        def ask() -> list[int]:
            hub.request("ask", None, to="archive").result()
            return [kept(path)]

        with hub:
            yield Side(side_of(hub, [], payload=ORDER).publish, ask)


def rows(path: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM events WHERE key = ?", (KEY,)).fetchone()[0])


def lines(path: str) -> int:
    """Count without decoding anything, as that would take longer than to write it; of a file that has not been rotated."""
    with open(path, "rb") as file:
        return file.read().count(f'"key":"{KEY}"'.encode())


def array() -> object:
    import numpy

    return numpy.random.default_rng(1).random(1 << 20)


def many_keys() -> Opened:
    return mphub(1, [KEY, "many.>"], [f"many.{number}" for number in range(KEYS)])


def many_patterns() -> Opened:
    return mphub(1, [KEY, *(f"many.{number}.>" for number in range(PATTERNS - 1))])


@contextlib.contextmanager
def beside_a_stuck_one(how: str) -> Iterator[Side]:
    """Open a hub with a healthy subscriber and one of the same key that does not get on."""
    hub = EventHub(check=False, stop=Stop(ask=0.1, term=0.1))
    hub.subscribe(KEY, Counter, name="counter")
    rule = how if how in ("drop_oldest", "drop_newest", "dead_letter") else "block"
    work = {"FATAL": die, "frozen": len}.get(how, sleep_for_ever)
    inbox, once = Inbox(maxsize=STUCK, overflow=rule), Restart(max_restarts=0)
    patterns = ["stuck"] if how == "own key" else [KEY, "stuck"]
    stuck = hub.subscribe(patterns, work, name="stuck", inbox=inbox, restart=once)
    with hub:
        if how == "frozen":
            os.kill(stuck.statistics().pids[0], signal.SIGSTOP)
        hub.publish("stuck", PAYLOAD)
        while how == "FATAL" and stuck.state != "FATAL":
            time.sleep(0.01)
        if how != "own key":
            for _ in range(2 * STUCK):
                hub.publish("stuck", PAYLOAD, confirm=True)  # a frozen one holds its publishers for five seconds
        yield side_of(hub, ["counter"])
        hub.stop(drain=False)


def die(_: object) -> None:
    os._exit(1)


def sleep_for_ever(_: object) -> None:
    time.sleep(3600)


# -- published by others


@contextlib.contextmanager
def published_by(processes: int, opened: Opened) -> Iterator[Side]:
    """Let other processes publish, all at once."""
    with opened as side, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(forked(obey, side)) for _ in range(processes)]

        def all_do(what: str, events: int) -> list[Any]:
            for line in lines:
                line.send((what, events))
            return [line.recv() for line in lines]

        yield Side(lambda events: all_do("publish", events // processes), lambda: max(all_do("ask", 0)))


@contextlib.contextmanager
def forked(target: Callable[..., NoReturn], *arguments: object) -> Iterator[Any]:
    """Start a process with a pipe as its last argument, and yield the other end."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def obey(side: Side, line: Any) -> NoReturn:
    while True:
        what, events = line.recv()
        line.send(side.publish(events) if what == "publish" else side.ask())


def crowded(publishers: int, opened: Callable[[], Opened]) -> Opened:
    return published_by(publishers, opened())


# -- handlers that work


def work(loops: int) -> None:
    """Compute so much: in C, as a Python loop is a tenth faster in one process than in the next."""
    for _ in range(loops):
        zlib.crc32(BLOCK)


def loops_of_a_millisecond() -> int:
    """Return how many loops of ``work`` take that long, found by the first who asks, for itself and all that it starts."""
    if LOOPS not in os.environ:
        os.environ[LOOPS] = str(round(1000 * 0.001 / min(timeit.repeat(lambda: work(1000), number=1, repeat=50))))
    return int(os.environ[LOOPS])


class Worker(Subscriber[int | None, int]):
    """Works for as many loops as an event says."""

    handled = 0

    def handle(self, loops: int | None) -> int:
        if loops is not None:
            work(loops)
            self.handled += 1
        return self.handled


@contextlib.contextmanager
def workers(subscribers: int) -> Iterator[Side]:
    """Open a hub whose subscribers each have a key of their own, and a millisecond of work for each event."""
    hub, loops = EventHub(), loops_of_a_millisecond()
    keys = [hub.subscribe(f"work.{number}", Worker, name=f"worker-{number}").keys[0] for number in range(subscribers)]

    def publish(events: int) -> None:
        for _ in range(events):
            for key in keys:
                hub.publish(key, loops)

    with hub:
        yield Side(publish, lambda: [reply.result() for reply in [hub.request(key, None) for key in keys]])


@contextlib.contextmanager
def crew(replicas: int) -> Iterator[Side]:
    """Open a hub whose one subscriber has as many replicas as an event of ``workers`` has subscribers."""
    hub, loops = EventHub(), loops_of_a_millisecond()
    several = hub.subscribe("work", work, replicas=replicas)

    def publish(events: int) -> None:
        hub.publish_batch("work", [loops] * events * replicas)

    def ask() -> list[int]:
        hub.drain()
        return [several.statistics().handled // replicas] * replicas

    with hub:
        yield Side(publish, ask)


@contextlib.contextmanager
def executor(*, by_value: bool) -> Iterator[Side]:
    """Open a pool that calls what it finds by its name, or what no process can import, as if the script at hand had defined it."""
    with EventHub() as hub, hub.executor(replicas=CALLERS) as pool:
        yield calling(pool, (lambda n: n + 1) if by_value else next_of)


@contextlib.contextmanager
def bare(processes: int) -> Iterator[Side]:
    """Open processes that do the work of ``workers`` with no queue: they are told how often, and that is all."""
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(forked(toil, loops_of_a_millisecond())) for _ in range(processes)]

        def tell_all(events: int) -> None:
            for line in lines:
                line.send(events)

        def ask() -> list[int]:
            tell_all(0)
            return [line.recv() for line in lines]

        yield Side(tell_all, ask)


def toil(loops: int, line: Any) -> NoReturn:
    handled = 0
    while True:
        events = line.recv()
        for _ in range(events):
            work(loops)
            handled += 1
        if not events:
            line.send(handled)
