"""Whichever process dies: nothing accepted is lost, nothing finished is repeated, order stays."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import mphub
from mphub import EventHub, Inbox, Restart, Retry, Snapshot, Subscriber, Subscription
from mphub.connection import connection_to
from mphub.procs import boot
from mphub.wire.stream import shut
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.faults
WITH_PACKAGE = {**os.environ, "PYTHONPATH": os.getcwd()}
PATIENT, AT_ONCE = Retry(max_attempts=1000), Restart(max_restarts=1000, delay=0)


def test_only_the_event_that_was_running_is_delivered_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def handle(n: int) -> None:
        attempt = mphub.current_event().attempt
        note(log, f"{n} {attempt}")
        if n == 1000 and attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    hub.subscribe("k", handle)
    with hub:
        hub.publish_batch("k", range(3000))
    rows = lines(log)
    assert rows == [*(f"{n} 1" for n in range(1001)), "1000 2", *(f"{n} 1" for n in range(1001, 3000))]


@pytest.mark.parametrize("how", ["kill", "exit", "sys.exit", "segfault", "raise"])
def test_one_that_dies_disturbs_no_other(how: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)

    def fall(n: int) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "exit":
            os._exit(7)
        elif how == "sys.exit":
            sys.exit(7)
        elif how == "segfault":
            getattr(faulthandler, "_sigsegv")()  # noqa: B009 (no stub knows it)
        raise RuntimeError(how)

    hub.subscribe("k", fall, retry=Retry(max_attempts=1), restart=Restart(delay=0))
    hub.subscribe("k", lambda n: note(log, n), name="healthy")
    with hub:
        hub.publish("k", 1)
    assert lines(log) == ["1"]
    (letter,) = hub.dead_letters()
    assert letter.exit == {"kill": "SIGKILL", "exit": 7, "sys.exit": 7, "segfault": "SIGSEGV", "raise": None}[how]
    assert letter.reason == ("exception" if how == "raise" else "crash")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_poison_among_good_events_stops_nobody() -> None:
    hub = EventHub(check=False)

    def picky(n: int) -> None:
        if n % 200 == 100:
            os._exit(1)

    subscription = hub.subscribe("k", picky, restart=Restart(delay=0))
    with hub:
        hub.publish_batch("k", range(20_000))
        hub.drain(150)
        found = subscription.statistics()
        assert (found.state, found.dead, found.handled, found.restarts) == ("RUNNING", 100, 19_900, 300)
    assert [(letter.payload, letter.attempts) for letter in hub.dead_letters()] == [(n, 3) for n in range(100, 20_000, 200)]


def test_a_stream_that_ends_is_no_death(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def careless(n: int) -> None:
        note(log, f"{n} {mphub.current_event().attempt}")
        if n % 500 == 250:
            os.closerange(3, 256)  # as some ways to become a daemon do
        time.sleep(0.02 if n % 500 == 250 else 0)

    k = hub.subscribe("k", careless, name="k")
    with hub:
        pids = k.statistics().pids
        hub.publish_batch("k", range(2000))
        hub.drain(20)
        assert (k.statistics().pids, k.statistics().handled) == (pids, 2000)
    assert lines(log) == [f"{n} 1" for n in range(2000)]


def test_an_event_that_kills_while_it_is_committed_is_found() -> None:
    class Total(Subscriber[int, int]):
        def setup(self) -> None:
            self.seen: list[int] = []

        def handle(self, n: int) -> int:
            self.seen.append(n)
            return n

        def snapshot(self) -> list[int]:
            if 13 in self.seen:
                os._exit(3)
            return self.seen

        def restore(self, state: Any) -> None:
            self.seen = state

    hub = EventHub(check=False)
    hub.subscribe("k", Total, name="s", snapshot=Snapshot(), retry=Retry(max_attempts=2), restart=AT_ONCE)
    with hub:
        hub.publish_batch("k", range(20))
        hub.drain(30)
        statistics = hub.statistics().subscribers["s"]
        (letter,) = hub.dead_letters()
    assert (letter.payload, letter.reason, letter.exit, letter.attempts) == (13, "crash", 3, 2)
    assert (statistics.handled, statistics.state) == (19, "RUNNING")


def test_one_that_dies_on_everything_is_fatal_after_nine_deaths() -> None:
    hub = EventHub(check=False)
    subscription: Subscription[int, None] = hub.subscribe("k", lambda n: os._exit(1), name="k", restart=Restart(delay=0))
    with hub:
        hub.publish_batch("k", range(100))
        with pytest.raises(mphub.SubscriberFatal):
            hub.drain(20)
        assert subscription.state == "FATAL"
        found = subscription.statistics()
        assert (found.dead, found.waiting) == (3, 97)
        with pytest.raises(mphub.SubscriberFatal):
            subscription.request(1).result(5)
        assert subscription.statistics().restarts == 8
        hub.stop(drain=False)


def test_nothing_is_lost_or_repeated_when_the_router_dies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="pass", to="next")
    hub.subscribe("next", lambda n: note(log, n), name="log")
    with hub:
        for part in range(8):
            hub.publish_batch("k", range(part * 1000, part * 1000 + 1000))
            os.kill(hub.statistics().pids["router"], signal.SIGKILL)
            time.sleep(0.05)
        hub.drain(30)
        found = hub.statistics().subscribers
    assert lines(log) == [str(n) for n in range(8000)]
    assert found["pass"].handled == found["log"].handled == 8000


class Counter(Subscriber[int, int]):
    """Counts, and tells the total at the end."""

    def __init__(self) -> None:
        self.total = 0

    def handle(self, payload: int) -> int:
        self.total += payload
        return self.total

    def snapshot(self) -> object:
        return self.total

    def restore(self, state: object) -> None:
        assert isinstance(state, int)
        self.total = state


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_snapshotting_counter_is_exact_under_kills() -> None:
    hub = EventHub()
    counter = hub.subscribe("k", Counter, snapshot=Snapshot(every=1000, period=0.05), retry=PATIENT, restart=AT_ONCE)

    def next_pid(before: int) -> int:
        assert eventually(lambda: counter.statistics().pids not in ((), (before,)), 10)
        return counter.statistics().pids[0]

    pid = 0
    with hub:
        for _ in range(100):
            hub.publish_batch("k", [1] * 10_000)
            pid = next_pid(pid)
            os.kill(pid, signal.SIGKILL)
        hub.drain(120)
        assert hub.request("k", 0).result(10) == 1_000_000
        assert counter.statistics().restarts == 100


@pytest.mark.timeout(120)
def test_held_publishers_go_on_when_the_router_dies(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    hub = EventHub()

    def handle(n: int) -> None:
        while not gate.exists():
            time.sleep(0.01)
        note(log, n)

    hub.subscribe("k", handle, name="s", inbox=Inbox(maxsize=200))
    with hub:
        publisher = threading.Thread(target=lambda: hub.publish_batch("k", range(50_000)))
        publisher.start()
        connection = hub.publisher()._connection
        for _ in range(2):
            assert eventually(lambda: connection._held, 10)
            os.kill(hub.statistics().pids["router"], signal.SIGKILL)
            time.sleep(0.2)
        gate.touch()
        publisher.join(20)
        assert not publisher.is_alive()
        hub.drain(20)
    assert lines(log) == [str(n) for n in range(50_000)]


def test_retries_at_once_are_neither_lost_nor_repeated_when_the_router_dies(tmp_path: Path) -> None:
    log, count = tmp_path / "log", 3000
    hub = EventHub()

    def handle(n: int) -> None:
        attempt = mphub.current_event().attempt
        note(log, f"{n} {attempt}")
        if n % 7 == 3 and attempt == 1:
            raise KeyError(n)

    hub.subscribe("k", handle, retry=Retry(on=KeyError, delay=0))
    with hub:
        for n in range(count):
            hub.publish("k", n)
            if n % 400 == 399:
                os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        hub.drain(60)
    rows = [tuple(map(int, row.split())) for row in lines(log)]
    assert sorted(rows) == sorted([(n, 1) for n in range(count)] + [(n, 2) for n in range(3, count, 7)])
    firsts = [n for n, attempt in rows if attempt == 1]
    assert firsts == sorted(firsts)


def test_a_retry_at_once_keeps_its_place_when_the_router_dies_over_its_failure(tmp_path: Path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    hub = EventHub()

    def handle(n: int) -> bytes:
        attempt = mphub.current_event().attempt
        note(log, f"{n} {attempt}")
        if n == 100:
            assert eventually(go.exists)
        if n == 115 and attempt == 1:
            raise KeyError(n)
        return bytes(40_000)  # so that the new router does not read all reports at once

    hub.subscribe("k", handle, name="k", to="made", retry=Retry(on=KeyError, delay=0))
    hub.subscribe("made", len)
    with hub:
        hub.publish_batch("k", range(100))
        hub.drain(20)
        for n in range(100, 140):
            hub.publish("k", n, confirm=True)
        assert eventually(lambda: "100 1" in lines(log))
        router = hub.statistics().pids["router"]
        os.kill(router, signal.SIGSTOP)
        go.touch()
        time.sleep(0.2)
        os.kill(router, signal.SIGKILL)
        hub.drain(20)
    assert lines(log) == [*(f"{n} 1" for n in range(116)), "115 2", *(f"{n} 1" for n in range(116, 140))]


@pytest.mark.timeout(120)
def test_outputs_too_large_for_a_frame_are_neither_lost_nor_doubled_when_the_router_dies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def burst(n: int) -> None:
        for i in range(40):
            hub.publish("part", (n, i, b"x" * 40_000))

    hub.subscribe("burst", burst)
    hub.subscribe("part", lambda part: note(log, f"{part[0]} {part[1]}"), name="log")
    with hub:
        for n in range(20):
            hub.publish("burst", n)
            if n % 4 == 3:
                time.sleep(0.05)
                os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        hub.drain(60)
    assert lines(log) == [f"{n} {i}" for n in range(20) for i in range(40)]


def test_reports_of_a_dead_process_are_taken_in_their_order(tmp_path: Path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    hub = EventHub()

    def make(n: int) -> tuple[int, bytes]:
        if n == 1000:
            hub.publish("begun", n, now=True)
            while not go.exists():
                time.sleep(0.001)
        return n, bytes(30_000)

    begun = tmp_path / "begun"
    hub.subscribe("k", make, name="make", to="made")
    hub.subscribe("made", lambda made: note(log, made[0]), name="log")
    hub.subscribe("begun", lambda n: begun.touch(), name="begun")
    with hub:
        hub.publish_batch("k", range(200))
        hub.drain(20)
        hub.publish_batch("k", range(1000, 1060))
        assert eventually(begun.exists, 5)
        hub.flush()
        time.sleep(0.1)
        router = hub.statistics().pids["router"]
        worker = hub.statistics().subscribers["make"].pids[0]
        os.kill(router, signal.SIGSTOP)
        go.touch()
        time.sleep(0.5)
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.3)
        os.kill(router, signal.SIGCONT)
        hub.drain(20)
    assert [int(row) for row in lines(log)] == [*range(200), *range(1000, 1060)]


def test_files_of_a_dead_process_go_though_its_supervisor_dies_before_it_has_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPHUB_FAILPOINTS", str(tmp_path))
    (tmp_path / "supervisor.removed:1").touch()
    hub = EventHub(check=False)

    def leave_a_file(_: object) -> int:
        from mphub.subscriber import holder

        holder.context.blobs.write(bytes(100_000))  # type: ignore[union-attr]
        return os.getpid()

    hub.subscribe("k", leave_a_file, name="k")
    with hub:
        blobs = Path(hub._address.folder) / "blobs"
        os.kill(hub.request("k", 1).result(10), signal.SIGKILL)
        assert eventually(lambda: not (tmp_path / "supervisor.removed:1").exists(), 10)
        assert hub.request("k", 2).result(10)
        assert eventually(lambda: len(os.listdir(blobs)) == 1, 5)  # that of the second


def test_files_of_publishers_that_died_between_two_routers_go() -> None:
    hub = EventHub()
    hub.subscribe("k", len, name="k")

    def leave_a_file() -> None:
        hub.publish("k", b"", confirm=True)
        connection_to(hub._address)._blobs.write(bytes(100_000))
        time.sleep(600)

    with hub:
        blobs = Path(hub._address.folder) / "blobs"
        publishers = [multiprocessing.get_context("fork").Process(target=leave_a_file) for _ in range(3)]
        for publisher in publishers:
            publisher.start()
        assert eventually(lambda: len(os.listdir(blobs)) == 3)
        router = hub.statistics().pids["router"]
        os.kill(router, signal.SIGSTOP)
        for publisher in publishers:
            publisher.kill()
            publisher.join()
        os.kill(router, signal.SIGKILL)
        assert eventually(lambda: not os.listdir(blobs))


def test_random_kills_of_subscribers_and_router_lose_nothing(tmp_path: Path) -> None:
    log, count = tmp_path / "log", 6000
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="pass", to="next", retry=PATIENT, restart=AT_ONCE)
    hub.subscribe("next", lambda n: note(log, n), name="log", retry=PATIENT, restart=AT_ONCE)
    routers: set[int] = set()
    with hub:
        for n in range(count):
            hub.publish("k", n)
            if n % 400 == 0:
                found = hub.statistics()
                victims = [pid for s in found.subscribers.values() for pid in s.pids]
                victims += [found.pids["router"]] if len(routers) < 8 else []  # ten deaths in ten seconds end a hub
                routers.add(found.pids["router"])
                with contextlib.suppress(ProcessLookupError):  # it is dead from the last time
                    os.kill(dice.choice(victims), signal.SIGKILL)
        hub.drain(40)
        found = hub.statistics()
    rows = [int(row) for row in lines(log)]
    assert sorted(set(rows)) == list(range(count))
    firsts = list(dict.fromkeys(rows))
    assert firsts == sorted(firsts), "out of order"
    for each in found.subscribers.values():
        assert each.accepted == each.handled == count


@pytest.mark.timeout(120)
def test_nothing_is_lost_repeated_or_charged_when_the_supervisor_dies(tmp_path: Path) -> None:
    log, count = tmp_path / "log", 2000
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="pass", to="next")
    hub.subscribe("next", lambda n: note(log, f"{n} {mphub.current_event().attempt}"), name="log")
    counter = hub.subscribe("next", Counter, snapshot=Snapshot(every=100, period=0.05))
    with hub:
        for part in range(5):
            hub.publish_batch("k", range(part * count, (part + 1) * count))
            before = hub.statistics().pids["supervisor"]
            os.kill(before, signal.SIGKILL)
            assert hub.statistics().pids["supervisor"] != before
        hub.drain(60)
        total = counter.request(0).result(10)
        found = hub.statistics().subscribers
    rows = [tuple(map(int, row.split())) for row in lines(log)]
    assert {attempt for _, attempt in rows} == {1}
    firsts = list(dict.fromkeys(n for n, _ in rows))
    assert firsts == list(range(5 * count))
    assert len(rows) - len(firsts) <= 5, "only what ran at a death runs again"
    assert total == sum(range(5 * count))
    assert found["pass"].handled == found["log"].handled == 5 * count


def test_calls_that_wait_are_answered_by_the_next_supervisor() -> None:
    hub = EventHub()
    hub.subscribe("k", time.sleep, name="slow")
    with hub:
        reply = hub.request("k", 0.5)
        os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
        late = hub.subscribe("late", lambda n: n + 1, name="late")
        assert late.request(1).result(10) == 2
        assert reply.result(10) is None
        os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
        hub.drain(20)
        late.unsubscribe()
        os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
        found = hub.statistics().subscribers
        assert (found["late"].state, found["late"].handled) == ("STOPPED", 1), "its books stay"


def test_the_first_publish_of_a_process_waits_for_the_next_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, n), name="log")
    launch = boot.launch

    def launch_late(charter: boot.Charter) -> subprocess.Popen[bytes]:
        time.sleep(0.3)
        return launch(charter)

    with hub:
        monkeypatch.setattr(boot, "launch", launch_late)
        os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
        time.sleep(0.1)
        publisher = multiprocessing.get_context("fork").Process(target=hub.publish, args=("k", 1))
        publisher.start()
        publisher.join()
        assert publisher.exitcode == 0
        hub.drain(20)
    assert lines(log) == ["1"]


def test_a_torn_call_reaches_the_same_supervisor_over_another_stream() -> None:
    hub = EventHub()
    hub.subscribe("k", time.sleep, name="slow")
    with hub:
        before = hub.statistics().pids
        hub.publish("k", 0.3)
        drain = threading.Thread(target=hub.drain)
        drain.start()
        for _ in range(5):
            shut(hub._engine.client._line.sock)  # type: ignore[union-attr]
            assert hub.statistics().pids == before
        drain.join()
        assert hub.statistics().subscribers["slow"].handled == 1


def test_a_hub_between_two_supervisors_is_not_swept_by_another() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        for _ in range(5):
            os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
            subprocess.run([sys.executable, "-c", "import mphub\nwith mphub.EventHub(): pass"], env=WITH_PACKAGE, check=True)
            assert hub.request("k", 1).result(10) == 1


def test_a_fatal_one_stays_fatal_under_the_next_supervisor() -> None:
    hub = EventHub(check=False)
    broken = hub.subscribe("k", lambda n: os._exit(1), name="k", restart=Restart(max_restarts=0))
    with hub:
        hub.publish("k", 1)
        assert eventually(lambda: broken.state == "FATAL", 10)
        os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
        with pytest.raises(mphub.SubscriberFatal):
            hub.drain(20)
        assert broken.statistics().pids == ()
        hub.stop(drain=False)


def test_a_start_ends_though_the_next_supervisor_was_ready_before_anybody_listened(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = boot.launch

    def launch_late(charter: boot.Charter) -> subprocess.Popen[bytes]:
        process = launch(charter)
        time.sleep(0.5)
        return process

    class Slow(Subscriber[int, None]):
        def setup(self) -> None:
            time.sleep(0.2)

        def handle(self, payload: int) -> None: ...

    hub = EventHub()
    slow = hub.subscribe("k", Slow)
    hub.start(wait=False)
    monkeypatch.setattr(boot, "launch", launch_late)
    os.kill(hub.statistics().pids["supervisor"], signal.SIGKILL)
    slow.wait_ready(10)
    hub.stop()


@pytest.mark.parametrize("victim", ["hub", "supervisor"])
def test_nothing_lives_on_when_hub_or_supervisor_is_killed(victim: str, tmp_path: Path) -> None:
    script = (
        "import mphub, subprocess, time\n"
        "hub = mphub.EventHub()\n"
        "hub.subscribe('k', lambda n: subprocess.Popen(['sleep', '600']).pid, name='k')\n"
        "hub.start()\n"
        "pid = hub.request('k', 1).result()\n"
        "s = hub.statistics()\n"
        "print(*s.pids.values(), s.subscribers['k'].pids[0], pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    hub = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=WITH_PACKAGE)
    assert hub.stdout is not None
    pids = [int(pid) for pid in hub.stdout.readline().split()]
    assert len(pids) >= 3
    os.kill(hub.pid if victim == "hub" else pids[0], signal.SIGKILL)
    assert eventually(lambda: not any(alive(pid) for pid in pids), 2.0), [pid for pid in pids if alive(pid)]
    hub.kill()
    hub.wait()
    hub.stdout.close()
    with EventHub():  # the next hub sweeps the folder
        pass


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_garbage_closes_its_own_connection_only(tmp_path: Path) -> None:
    import socket

    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        folder = next(path for path in Path("/dev/shm").glob(f"mphub-{os.getuid()}-*") if str(path) == hub._address.folder)
        for name in ("data", "control"):
            for garbage in (b"\xff" * 100, b"\x00" * 9, os.urandom(4096)):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(folder / name))
                    sock.sendall(garbage)
                    sock.settimeout(5)
                    assert sock.recv(100) in (b"",), "the connection must be closed"
        assert hub.request("k", 1).result(5) == 1
        assert stat_mode(folder) == 0o700
        assert hub.statistics().subscribers["k"].restarts == 0


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_letters_of_an_unsubscribed_one_outlive_the_router() -> None:
    hub = EventHub(check=False)
    subscription = hub.subscribe("k", lambda n: 1 / n, name="s")
    with hub:
        hub.publish_batch("k", [0] * 3)
        hub.drain(20)
        subscription.unsubscribe()
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        assert hub.redrive("s") == 0, "nobody would handle them"
        assert hub.statistics().subscribers["s"].dead == len(hub.dead_letters()) == 3
        assert hub.purge("s", ids=[hub.dead_letters()[0].id]) == 1
        hub.subscribe("k", lambda n: None, name="s", retry=Retry(max_attempts=1))
        assert hub.redrive("s") == 2
        hub.drain(20)
        assert hub.statistics().subscribers["s"].handled == 2


def test_the_same_name_again_has_its_new_options(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)

    def die(n: int) -> None:
        note(log, n)
        os.kill(os.getpid(), signal.SIGKILL)

    with hub:
        hub.subscribe("k", die, name="s", retry=Retry(max_attempts=1)).unsubscribe()
        hub.subscribe("k", die, name="s", retry=Retry(max_attempts=3), restart=AT_ONCE)
        hub.publish("k", 1)
        hub.drain(20)
    assert lines(log) == ["1"] * 3
