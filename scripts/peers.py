"""The work of ``bench.py`` as its users would do it with other packages; one that is not installed is not run.

Those with queues or sockets get a router's process and a worker's, like the baseline; of those with a server it is the router, and lives
in a temporary folder; pools get a function that counts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import queue as queues
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

DISK = os.environ.get("BENCH_DISK", "/var/tmp")
"""Where durable folders are: on a disk, which the folder for temporary files need not be."""
FORK = multiprocessing.get_context("fork")
AHEAD = 1000
"""Tasks that a pool has under way."""
BATCH = 1000
"""Events that are sent to a server, or got from it, at once."""
CLEARED = 1000
"""Events of persist-queue that are removed at once when they are handled: it looks through those that are there."""


@dataclass(frozen=True)
class Peer:
    """Another package on the same work."""

    needs: str
    """What is imported."""
    open: Callable[[str, object], contextlib.AbstractContextManager[tuple[Callable[[int], object], Callable[[], list[int]]]]]
    share: float = 1.0
    """Of the events that the others get: what takes a millisecond each need not take minutes."""
    server: str | None = None
    """Program that is started."""

    @property
    def is_there(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None and (self.server is None or found(self.server) is not None)


def found(server: str) -> str | None:
    return shutil.which(server, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")  # where Debian puts some


def place(prefix: str, *, on_disk: bool) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=prefix, dir=DISK if on_disk else None)


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


# -- a server and a worker


@contextlib.contextmanager
def redis_streams(key: str, payload: object, synced: str | None = None) -> Opened:
    """``synced``: everysec or always, on a disk."""
    redis: Any = importlib.import_module("redis")
    with place("redis-", on_disk=synced is not None) as folder, redis_server(folder, synced) as path, running(redis_worker, path, key):
        client = redis.Redis(unix_socket_path=path, socket_timeout=60)

        def publish(events: int) -> None:
            for first in range(0, events, BATCH):
                pipeline = client.pipeline(transaction=False)
                for _ in range(first, min(first + BATCH, events)):
                    pipeline.xadd(key, {"payload": pickle.dumps(payload, 5)})
                pipeline.execute()

        def ask() -> list[int]:
            pipeline = client.pipeline(transaction=False)
            pipeline.xadd(key, {"payload": pickle.dumps(None, 5)})
            pipeline.blpop("answers")
            _, (_, handled) = pipeline.execute()
            return [int(handled)]

        yield publish, ask


@contextlib.contextmanager
def redis_server(folder: str, synced: str | None) -> Iterator[str]:
    path = f"{folder}/redis"
    options = {"port": "0", "unixsocket": path, "save": "", "appendonly": "no", "loglevel": "warning", "dir": folder}
    if synced is not None:
        options |= {"appendonly": "yes", "appendfsync": synced}
    with serving("redis-server", *(word for name, value in options.items() for word in (f"--{name}", value)), address=path):
        yield path


def redis_worker(path: str, key: str) -> NoReturn:
    redis: Any = importlib.import_module("redis")
    client = redis.Redis(unix_socket_path=path, socket_timeout=None)
    client.xgroup_create(key, "counters", id="0", mkstream=True)
    handled = 0
    while True:
        [(_, entries)] = client.xreadgroup("counters", "counter", {key: ">"}, count=BATCH, block=0)
        for _, fields in entries:
            if pickle.loads(fields[b"payload"]) is None:
                client.rpush("answers", handled)
            else:
                handled += 1
        client.xack(key, "counters", *(number for number, _ in entries))


@contextlib.contextmanager
def nats_jetstream(key: str, payload: object, storage: str = "memory") -> Opened:
    """``storage``: memory, or file: on a disk, synced every two minutes (each time only by servers from 2.10 on)."""
    with (
        place("nats-", on_disk=storage == "file") as folder,
        nats_server(folder) as port,
        running(nats_worker, port, key, storage),
        asyncio.Runner() as runner,
    ):
        client, stream = runner.run(nats_stream(port, key, storage))
        answers = runner.run(client.subscribe("answers"))

        async def publish(events: int) -> None:
            for _ in range(events):
                await stream.publish_async(key, pickle.dumps(payload, 5))
            await stream.publish_async_completed()

        async def ask() -> list[int]:
            await stream.publish_async(key, pickle.dumps(None, 5))
            return [int((await answers.next_msg(timeout=60)).data)]

        yield lambda events: runner.run(publish(events)), lambda: runner.run(ask())
        runner.run(client.close())


@contextlib.contextmanager
def nats_server(folder: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving("nats-server", "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder, address=("127.0.0.1", port)):
        yield port


async def nats_stream(port: int, key: str, storage: str) -> tuple[Any, Any]:
    """Connect, and see to the stream: whoever comes second finds it there."""
    nats: Any = importlib.import_module("nats")
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    stream = client.jetstream(publish_async_max_pending=4 * BATCH, timeout=60)
    await stream.add_stream(name="bench", subjects=[key], storage=storage)
    return client, stream


def nats_worker(port: int, key: str, storage: str) -> NoReturn:
    asyncio.run(nats_count(port, key, storage))


async def nats_count(port: int, key: str, storage: str) -> NoReturn:
    client, stream = await nats_stream(port, key, storage)
    config = importlib.import_module("nats.js.api").ConsumerConfig(ack_policy="all", max_ack_pending=-1)
    inbox = await stream.pull_subscribe(key, durable="counter", config=config)
    handled, wanted = 0, 1
    while True:
        messages = await inbox.fetch(wanted, timeout=3600)
        for message in messages:
            if pickle.loads(message.data) is None:
                await client.publish("answers", str(handled).encode())
            else:
                handled += 1
        await messages[-1].ack()  # and with it all before
        wanted = max(1, min(messages[-1].metadata.num_pending, BATCH))  # a fetch waits until it has all that it wants


@contextlib.contextmanager
def serving(server: str, *arguments: str, address: str | tuple[str, int]) -> Iterator[None]:
    """Have a server while it is needed; what it says is said when the measurement fails."""
    process = subprocess.Popen([found(server) or server, *arguments], stdout=sys.stderr)
    try:
        while not answers_at(address):
            if process.poll() is not None:
                raise SystemExit(f"bench: {server} ended with {process.returncode} before it served")
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def answers_at(address: str | tuple[str, int]) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        return probe.connect_ex(address) == 0


# -- pools


def count(payload: object) -> int:
    """Be the handler: tell what was handled before, and count."""
    count.handled += payload is not None  # type: ignore[attr-defined]
    return count.handled  # type: ignore[attr-defined, no-any-return]


count.handled = 0  # type: ignore[attr-defined]


class Counter:
    """Be the handler as an actor."""

    handled = 0

    def handle(self, payload: object) -> int:
        self.handled += payload is not None
        return self.handled


def by_futures(
    submit: Callable[[object], Any], payload: object, ahead: int = AHEAD
) -> tuple[Callable[[int], object], Callable[[], list[int]]]:
    def publish(events: int) -> None:
        under_way: deque[Any] = deque()
        for _ in range(events):
            if len(under_way) >= ahead:
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


@contextlib.contextmanager
def huey(_: str, payload: object, *, synced: bool = False) -> Opened:
    module: Any = importlib.import_module("huey")
    with place("huey-", on_disk=True) as folder:
        queue = module.SqliteHuey(filename=f"{folder}/queue", fsync=synced, timeout=60)
        task = queue.task()(answer)
        often: dict[str, Any] = {"initial_delay": 0.001, "max_delay": 0.001}  # it polls: by default, every 100 ms and more
        consumer = queue.create_consumer(workers=1, periodic=False, check_worker_health=False, **often)

        def publish(events: int) -> None:
            for _ in range(events):
                task(payload)

        with running(consumer.run):
            yield publish, lambda: [task(None).get(blocking=True, timeout=60, max_delay=0.001)]


def answer(payload: object) -> int | None:
    """Count; only who asks is told, for a result is one more row, and nobody would read the others."""
    handled = count(payload)
    return handled if payload is None else None


@contextlib.contextmanager
def persist_queue(_: str, payload: object) -> Opened:
    """A worker's thread: by its author's word it is for threads, not for processes. It syncs each commit: of a put, a get and an ack."""
    module: Any = importlib.import_module("persistqueue")
    answers: queues.SimpleQueue[int] = queues.SimpleQueue()
    with place("persist-queue-", on_disk=True) as folder:
        queue = module.SQLiteAckQueue(folder, multithreading=True)

        ended = threading.Event()

        def work() -> None:
            handled = 0
            while not ended.is_set():
                with contextlib.suppress(module.Empty):  # it may miss that something was put, and would look again after 10 s
                    item = queue.get(timeout=0.001, raw=True)
                    handled += item["data"] is not None
                    queue.ack(id=item["pqid"])
                    if item["pqid"] % CLEARED == 0:
                        queue.clear_acked_data(max_delete=CLEARED, keep_latest=0)
                    if item["data"] is None:
                        answers.put(handled)

        def publish(events: int) -> None:
            for _ in range(events):
                queue.put(payload)

        def ask() -> list[int]:
            queue.put(None)
            return [answers.get(timeout=60)]

        worker = threading.Thread(target=work)
        worker.start()
        try:
            yield publish, ask
        finally:
            ended.set()
            worker.join()
            queue.close()


@contextlib.contextmanager
def dask(_: str, payload: object) -> Opened:
    module: Any = importlib.import_module("distributed")
    with (
        tempfile.TemporaryDirectory(prefix="dask-") as folder,
        importlib.import_module("dask.config").set({"temporary-directory": folder}),
        module.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        module.Client(cluster, direct_to_workers=True) as client,
    ):
        actor = client.submit(Counter, actor=True).result()
        yield by_futures(actor.handle, payload, ahead=100)  # each has a connection: 1000 are slower


PEERS = {
    "pyzmq": Peer("zmq", pyzmq),
    "faster-fifo": Peer("faster_fifo", faster_fifo),
    "mpire": Peer("mpire", mpire),
    "Redis Streams": Peer("redis", redis_streams, 0.5, server="redis-server"),
    "NATS JetStream": Peer("nats", nats_jetstream, 0.1, server="nats-server"),
    "ProcessPoolExecutor": Peer("concurrent.futures", process_pool_executor, 0.1),
    "pebble": Peer("pebble", pebble, 0.1),
    "loky": Peer("loky", loky, 0.1),
    "Huey": Peer("huey", huey, 0.05),
    "Ray actor": Peer("ray", ray, 0.02),
    "Dask": Peer("distributed", dask, 0.01),
}
DURABLE_PEERS = {
    "Redis everysec": Peer("redis", partial(redis_streams, synced="everysec"), 0.5, server="redis-server"),
    "Redis always": Peer("redis", partial(redis_streams, synced="always"), 0.2, server="redis-server"),
    "JetStream on disk": Peer("nats", partial(nats_jetstream, storage="file"), 0.1, server="nats-server"),
    "persist-queue": Peer("persistqueue", persist_queue, 0.01),
    "Huey synced": Peer("huey", partial(huey, synced=True), 0.01),
}
"""With what they have on a disk."""
