"""Descriptors, processes and disks that run out: it is told, nothing accepted is lost, and work goes on when there is room again."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import mphub
from mphub import EventHub, Notice, Restart, StartFailed, Stop
from mphub.procs import boot
from tests.faults.beats import KEY, beating
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.faults
FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def no_descriptors(pid: int) -> Iterator[None]:
    """Let a process have the descriptors that it has, and no other."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def busy(pid: int, seconds: float) -> float:
    """Return the share of a core that a process takes."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return (sum(process.cpu_times()[:2]) - before) / seconds


def heard(hub: EventHub) -> Callable[[str], list[Notice]]:
    """Return what finds the notices of a kind."""
    found: list[Notice] = []
    hub.on_notice(found.append)
    return lambda kind: [notice for notice in found if notice.kind == kind]


def publish_some(hub: EventHub, count: int) -> None:
    hub.publish_batch("k", range(count))
    hub.flush()


def test_a_router_without_descriptors_serves_who_is_in_and_lets_in_the_others_later(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub()
    hub.subscribe(KEY, lambda _: None, name="beats")
    late = hub.subscribe("k", lambda n: None, name="late")
    with hub:
        router = hub.statistics().pids["router"]
        with beating(hub) as longest:
            with no_descriptors(router):
                publisher = FORK.Process(target=publish_some, args=(hub, 1000))
                publisher.start()
                assert busy(router, 0.5) < 0.5
                assert publisher.is_alive()
                assert late.statistics().accepted == 0
            publisher.join(20)
            assert publisher.exitcode == 0
            publisher.close()
            print(f"longest gap {longest():.3f} s")
            assert longest() < 1.0
        hub.drain(20)
        assert (late.statistics().handled, hub.statistics().pids["router"]) == (1000, router)
    assert "nobody can connect (Too many open files)" in caplog.text


@pytest.mark.parametrize("victim", ["subscriber", "router"])
def test_a_supervisor_without_descriptors_says_so_and_starts_the_next_one_later(victim: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    notices = heard(hub)
    k = hub.subscribe("k", lambda n: note(log, n), name="k")
    with hub:
        pids = hub.statistics().pids
        with no_descriptors(pids["supervisor"]):
            os.kill(k.statistics().pids[0] if victim == "subscriber" else pids["router"], signal.SIGKILL)
            hub.publish_batch("k", range(100))
            assert eventually(lambda: notices("shortage"), 10)
            assert busy(pids["supervisor"], 0.5) < 0.5
            assert len(notices("shortage")) == 1, "once is enough"
        hub.drain(20)
        assert hub.statistics().pids["supervisor"] == pids["supervisor"]
        assert k.statistics().handled == 100
    assert lines(log) == [str(n) for n in range(100)]


FAILING = """
import errno, os
real = os.{name}
def {name}(*args):
    if os.path.exists({flag!r}):
        {act}
    return real(*args)
os.{name} = {name}
"""


def let_fail(name: str, act: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a function of ``os`` fail in supervisors while a file is there; return the file."""
    flag = folder / "flag"
    (folder / "sitecustomize.py").write_text(FAILING.format(name=name, flag=str(flag), act=act))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    return flag


@pytest.fixture
def no_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return let_fail("fork", "raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))", tmp_path, monkeypatch)


def test_a_supervisor_that_fails_itself_leaves_everything_to_its_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    flag = let_fail("wait4", f"os.unlink({str(tmp_path / 'flag')!r}); raise RuntimeError('a bug')", tmp_path, monkeypatch)
    hub = EventHub()
    k = hub.subscribe("k", lambda n: note(log, n), name="k")
    with hub:
        before = hub.statistics().pids["supervisor"]
        flag.touch()
        hub.publish_batch("k", range(1000))
        os.kill(k.statistics().pids[0], signal.SIGKILL)
        assert eventually(lambda: not flag.exists(), 10)
        hub.drain(20)
        assert hub.statistics().pids["supervisor"] != before
    assert list(dict.fromkeys(lines(log))) == [str(n) for n in range(1000)]


@pytest.mark.parametrize("victim", ["subscriber", "router"])
def test_a_fork_that_fails_is_told_and_tried_again(victim: str, no_forks: Path) -> None:
    hub = EventHub()
    notices = heard(hub)
    k = hub.subscribe("k", lambda n: n, name="k")
    with hub:
        pids = hub.statistics().pids
        no_forks.touch()
        os.kill(k.statistics().pids[0] if victim == "subscriber" else pids["router"], signal.SIGKILL)
        reply = hub.request("k", 1)
        assert eventually(lambda: notices("shortage"), 10)
        assert "Resource temporarily unavailable" in notices("shortage")[0].message
        no_forks.unlink()
        assert reply.result(10) == 1
        assert hub.statistics().pids["supervisor"] == pids["supervisor"]


def test_a_router_hears_what_became_of_subscribers_while_there_was_none(no_forks: Path) -> None:
    hub = EventHub(check=False)
    notices = heard(hub)
    k = hub.subscribe("k", lambda n: n, name="k", restart=Restart(max_restarts=0))
    with hub:
        victim = k.statistics().pids[0]
        no_forks.touch()
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        assert eventually(lambda: notices("shortage"), 10)
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: k.state == "FATAL", 10)
        no_forks.unlink()
        with pytest.raises(mphub.SubscriberFatal):
            hub.request("k", 1).result(10)
        hub.drain(10)


def test_a_hub_that_cannot_fork_does_not_start_and_can_start_later(no_forks: Path) -> None:
    hub = EventHub()
    no_forks.touch()
    with pytest.raises(StartFailed, match="temporarily unavailable"):
        hub.start()
    no_forks.unlink()
    with hub:
        pass


def test_a_successor_that_cannot_be_started_at_once_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    real, failures = boot.launch, [OSError(errno.EAGAIN, "no process"), StartFailed("no router"), OSError(errno.EMFILE, "no descriptor")]

    def launch(charter: boot.Charter) -> subprocess.Popen[bytes]:
        if failures:
            raise failures.pop()
        return real(charter)

    with hub:
        monkeypatch.setattr(boot, "launch", launch)
        before = hub.statistics().pids["supervisor"]
        os.kill(before, signal.SIGKILL)
        assert hub.statistics().pids["supervisor"] != before
        assert hub.request("k", 1).result(20) == 1
        assert not failures


def take_all_descriptors() -> list[int]:
    """Open this process's descriptors until none is left."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken: list[int] = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    return taken


def publish_without_descriptors(hub: EventHub, pipe: Any) -> None:
    """Be a publisher that has no descriptors: first not at all, then in, then one that has to connect anew."""
    limit, taken = resource.getrlimit(resource.RLIMIT_NOFILE), take_all_descriptors()
    with pytest.raises(mphub.HubClosed) as closed:
        hub.publish("k", 0)
    pipe.send(str(closed.value))
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    hub.publish("k", 1, confirm=True)
    taken += take_all_descriptors()
    with pytest.raises(mphub.PayloadError) as large:
        hub.publish("k", bytes(100_000))
    pipe.send(str(large.value))
    pipe.recv()
    hub.publish("k", 2, confirm=True)


def test_a_publisher_without_descriptors_is_told_and_keeps_the_one_it_has() -> None:
    hub = EventHub()
    k = hub.subscribe("k", lambda n: n, name="k")
    ours, theirs = FORK.Pipe()
    with hub, ours, theirs:
        publisher = FORK.Process(target=publish_without_descriptors, args=(hub, theirs))
        publisher.start()
        theirs.close()
        assert "cannot be reached (Too many open files)" in ours.recv()
        assert "Too many open files" in ours.recv()
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        ours.send(None)
        publisher.join(20)
        assert publisher.exitcode == 0
        publisher.close()
        hub.drain(20)
        assert k.statistics().handled == 2


class Disk:
    """A small disk for runtime folders, and something else on it that takes all the room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        with contextlib.suppress(OSError), open(self.folder / "ballast", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        (self.folder / "ballast").unlink()


@pytest.fixture
def disk(place: Path) -> Iterator[Disk]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(place)
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("killed", ["nobody", "supervisor"])
def test_a_full_disk_holds_publishers_and_loses_nothing(killed: str, disk: Disk, tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    hub = EventHub(max_bytes="12MB")

    def handle(event: tuple[int, bytes]) -> int:
        while not gate.exists():
            time.sleep(0.01)
        print(event[0])  # to a file on that disk
        return event[0]

    hub.subscribe("k", handle, name="pass", to="next")
    hub.subscribe("next", lambda n: note(log, n), name="log")
    published: list[int] = []
    full = threading.Event()

    def publish() -> None:
        for n in range(5000):
            hub.publish("k", (n, bytes(1000)))
            published.append(n)
            if n == 500:
                full.wait()

    with hub:
        pids = hub.statistics().pids
        publisher = threading.Thread(target=publish)
        publisher.start()
        assert eventually(lambda: len(published) > 500, 10)
        disk.fill()
        full.set()
        assert eventually(lambda: is_still(published), 10), "publishers wait"
        assert len(published) < 5000
        if killed in pids:
            os.kill(pids[killed], signal.SIGKILL)
        gate.touch()
        time.sleep(0.3)
        disk.make_room()
        publisher.join(30)
        assert not publisher.is_alive()
        hub.drain(30)
        assert killed != "nobody" or hub.statistics().pids == pids
    assert list(dict.fromkeys(lines(log))) == [str(n) for n in range(5000)]


def is_still(published: list[int]) -> bool:
    before = len(published)
    time.sleep(0.3)
    return len(published) == before


def test_on_a_full_disk_large_payloads_are_refused_and_large_outputs_and_new_processes_wait(disk: Disk, tmp_path: Path) -> None:
    hub = EventHub(max_bytes="12MB")
    notices = heard(hub)
    large = hub.subscribe("large", lambda n: b"x" * n, name="large", to="next")
    done = hub.subscribe("next", len, name="done")
    with hub:
        victim = done.statistics().pids[0]
        disk.fill()
        with pytest.raises(mphub.PayloadError, match="No space left on device"):
            hub.publish("k", bytes(200_000))
        hub.publish("large", 200_000)
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: notices("shortage"), 10)
        assert done.state == "BACKOFF"
        disk.make_room()
        hub.drain(20)
        assert (large.statistics().handled, done.statistics().handled, done.statistics().restarts) == (1, 1, 1)
        assert large.statistics().failed == done.statistics().failed == 0


@pytest.mark.parametrize("cause", ["disk", "router", "supervisor"])
def test_a_stop_ends_though_nobody_answers(cause: str, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mphub.engine.SETTLED_WITHIN", 0.2)
    monkeypatch.setattr("mphub.procs.client.CLOSED_WITHIN", 0.3)
    hub = EventHub(max_bytes="12MB", stop=Stop(ask=0.2, term=0.2))
    hub.subscribe("k", time.sleep, name="k")
    hub.start()
    hub.publish_batch("k", [3600] * 100)
    hub.flush()
    pids = hub.statistics().pids
    if cause == "disk":
        disk.fill()
    else:
        os.kill(pids[cause], signal.SIGSTOP)
    began = time.monotonic()
    hub.stop(drain=False)
    assert time.monotonic() - began < 8
