"""The work of ``bench.py`` as its users would do it with other packages; one that is not installed is not run.

Those with queues or sockets get a router's process and a worker's, like the baseline; pools get a function that counts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import importlib.util
import itertools
import multiprocessing
import pickle
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

FORK = multiprocessing.get_context("fork")
AHEAD = 1000
"""Tasks that a pool has under way."""


@dataclass(frozen=True)
class Peer:
    """Another package on the same work."""

    needs: str
    """What is imported."""
    open: Callable[[str, object], contextlib.AbstractContextManager[tuple[Callable[[int], object], Callable[[], list[int]]]]]
    share: float = 1.0
    """Of the events that the others get: what takes a millisecond each need not take minutes."""

    @property
    def is_there(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


Opened = Iterator[tuple[Callable[[int], object], Callable[[], list[int]]]]


# -- a router and a worker


@contextlib.contextmanager
def pyzmq(key: str, payload: object) -> Opened:
    zmq: Any = importlib.import_module("zmq")
    with tempfile.TemporaryDirectory(prefix="zmq-") as folder, running(zmq_router, folder), running(zmq_worker, folder):
        context = zmq.Context()
        ingress, answers = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        for sock, name in ((ingress, "in"), (answers, "answers")):
            sock.set_hwm(0)
            sock.bind(f"ipc://{folder}/{name}")

        def publish(events: int) -> None:
            for _ in range(events):
                ingress.send_multipart([key.encode(), pickle.dumps(payload, 5)])

        def ask() -> list[int]:
            ingress.send_multipart([key.encode(), pickle.dumps(None, 5)])
            return [int(answers.recv())]

        yield publish, ask
        context.destroy(linger=0)


def zmq_router(folder: str) -> NoReturn:
    zmq: Any = importlib.import_module("zmq")
    context = zmq.Context()
    ingress, inbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    ingress.set_hwm(0)
    inbox.set_hwm(0)
    ingress.connect(f"ipc://{folder}/in")
    inbox.bind(f"ipc://{folder}/inbox")
    while True:
        inbox.send(ingress.recv_multipart()[1])


def zmq_worker(folder: str) -> NoReturn:
    zmq: Any = importlib.import_module("zmq")
    context = zmq.Context()
    inbox, answers = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.set_hwm(0)
    inbox.connect(f"ipc://{folder}/inbox")
    answers.connect(f"ipc://{folder}/answers")
    handled = 0
    while True:
        if pickle.loads(inbox.recv()) is None:
            answers.send(str(handled).encode())
        else:
            handled += 1


@contextlib.contextmanager
def faster_fifo(key: str, payload: object) -> Opened:
    fifo: Any = importlib.import_module("faster_fifo")
    ingress, inbox, answers = (fifo.Queue(max_size_bytes=20_000_000) for _ in range(3))

    def publish(events: int) -> None:
        for _ in range(events):
            ingress.put((key, payload), timeout=60)

    def ask() -> list[int]:
        ingress.put((key, None), timeout=60)
        return [answers.get(timeout=60)]

    with running(fifo_router, ingress, inbox), running(fifo_worker, inbox, answers):
        yield publish, ask


def fifo_router(ingress: Any, inbox: Any) -> NoReturn:
    while True:
        for _, payload in ingress.get_many(timeout=3600):
            inbox.put(payload, timeout=60)


def fifo_worker(inbox: Any, answers: Any) -> NoReturn:
    handled = 0
    while True:
        for payload in inbox.get_many(timeout=3600):
            if payload is None:
                answers.put(handled)
            else:
                handled += 1


@contextlib.contextmanager
def running(target: Callable[..., object], *arguments: object) -> Iterator[None]:
    process = FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


# -- pools


def count(payload: object) -> int:
    """Be the handler: tell what was handled before, and count."""
    count.handled += payload is not None  # type: ignore[attr-defined]
    return count.handled  # type: ignore[attr-defined, no-any-return]


count.handled = 0  # type: ignore[attr-defined]


def by_futures(submit: Callable[[object], Any], payload: object) -> tuple[Callable[[int], object], Callable[[], list[int]]]:
    def publish(events: int) -> None:
        under_way: deque[Any] = deque()
        for _ in range(events):
            if len(under_way) >= AHEAD:
                under_way.popleft().result()
            under_way.append(submit(payload))
        while under_way:
            under_way.popleft().result()

    return publish, lambda: [submit(None).result()]


@contextlib.contextmanager
def process_pool_executor(_: str, payload: object) -> Opened:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK) as pool:
        yield by_futures(lambda given: pool.submit(count, given), payload)


@contextlib.contextmanager
def loky(_: str, payload: object) -> Opened:
    module: Any = importlib.import_module("loky")
    pool = module.get_reusable_executor(max_workers=1)
    yield by_futures(lambda given: pool.submit(count, given), payload)
    pool.shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def pebble(_: str, payload: object) -> Opened:
    module: Any = importlib.import_module("pebble")
    with module.ProcessPool(max_workers=1, context=FORK) as pool:
        yield by_futures(lambda given: pool.schedule(count, args=[given]), payload)
        pool.stop()


@contextlib.contextmanager
def mpire(_: str, payload: object) -> Opened:
    module: Any = importlib.import_module("mpire")
    with module.WorkerPool(n_jobs=1, start_method="fork", keep_alive=True) as pool:

        def publish(events: int) -> None:
            for _ in pool.imap_unordered(count, itertools.repeat(payload, events), iterable_len=events):
                pass

        yield publish, lambda: [pool.apply(count, args=(None,))]


@contextlib.contextmanager
def ray(_: str, payload: object) -> Opened:
    module: Any = importlib.import_module("ray")
    module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")

    class Counter:
        handled = 0

        def handle(self, given: object) -> int:
            self.handled += given is not None
            return self.handled

    actor = module.remote(Counter).remote()

    def publish(events: int) -> None:
        under_way: deque[Any] = deque()
        for _ in range(events):
            if len(under_way) >= AHEAD:
                module.get(under_way.popleft())
            under_way.append(actor.handle.remote(payload))
        module.get(list(under_way))

    yield publish, lambda: [module.get(actor.handle.remote(None))]
    module.shutdown()


PEERS = {
    "pyzmq": Peer("zmq", pyzmq),
    "faster-fifo": Peer("faster_fifo", faster_fifo),
    "mpire": Peer("mpire", mpire),
    "ProcessPoolExecutor": Peer("concurrent.futures", process_pool_executor, 0.1),
    "pebble": Peer("pebble", pebble, 0.1),
    "loky": Peer("loky", loky, 0.1),
    "Ray actor": Peer("ray", ray, 0.02),
}
