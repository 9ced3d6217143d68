"""What users do that nobody thinks of: queues attached early, publishers inside handlers, signals ignored, streams closed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mphub import DeadLettersLeft, EventHub, HubClosed, HubError, Inbox, InvalidOption, Stop, Subscriber, Subscription
from mphub.connection import connection_to
from mphub.procs import fork
from tests.faults.test_deaths import WITH_PACKAGE
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.procs


FORK = multiprocessing.get_context("fork")


class Unloadable:
    """Pickles, and cannot be loaded again."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("x",)


def test_an_attached_queue_is_read_as_soon_as_the_hub_runs_and_again_after_a_restart(tmp_path: Path) -> None:
    log = tmp_path / "log"
    queue: Any = FORK.Queue()
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, n), name="k")
    hub.attach(queue)
    queue.put(("k", 1))
    with hub:
        queue.put(("k", 2))
        assert eventually(lambda: lines(log) == ["1", "2"], 10)
    queue.put(("k", 3))
    time.sleep(0.2)
    with hub:
        assert eventually(lambda: lines(log) == ["1", "2", "3"], 10)
        queue.put(None)
    queue.close()
    queue.join_thread()
    assert eventually(lambda: not any(thread.name == "mphub-attached" for thread in threading.enumerate()), 5)


def test_what_cannot_be_loaded_ends_no_attached_queue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "log"
    queue: Any = FORK.Queue()
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, n), name="k")
    with hub:
        hub.attach(queue)
        for item in (("k", 1), ("k", Unloadable()), "no pair", ("k", 3)):
            queue.put(item)
        assert eventually(lambda: lines(log) == ["1", "3"], 10)
        queue.put(None)
    queue.close()
    queue.join_thread()
    assert caplog.text.count("an attached queue") == 2
    with pytest.raises(InvalidOption, match="queue: got None"):
        hub.attach(None)


def test_publishers_in_a_handler_cannot_wait_for_themselves() -> None:
    hub = EventHub(check=False)
    hub.subscribe("confirm", lambda n: hub.publisher().publish("out", n, confirm=True), name="confirm")
    hub.subscribe("flush", lambda n: hub.publisher().flush(), name="flush")
    with hub:
        for key in ("confirm", "flush"):
            with pytest.raises(HubError, match="would wait for itself"):
                hub.request(key, 1).result(10)


ODD_PROGRAM = """
import os, signal, sys
{before}
import mphub

def fall(n):
    if n == 5 and mphub.current_event().attempt == 1:
        os._exit(3)
    return n

hub = mphub.EventHub()
k = hub.subscribe("k", fall, name="k")
with hub:
    hub.publish_batch("k", range(10))
    hub.drain(20)
    for victim in ("router", "supervisor"):
        os.kill(hub.statistics().pids[victim], signal.SIGKILL)
        assert hub.request("k", 7).result(20) == 7
    assert k.statistics().handled == 12, k.statistics()
os.write(int(sys.argv[1]), b"fine")
"""


REAPS_ALL = """
import threading, time
def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)
threading.Thread(target=reap, daemon=True).start()
"""


ODDITIES = {
    "SIGCHLD ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "reaps all children": REAPS_ALL,
    "signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, signal.SIGABRT})",
    "no stdout": "os.close(1); sys.stdout = None",
    "no standard streams": "os.closerange(0, 3); sys.stdin = sys.stdout = sys.stderr = None",
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_a_hub_works_in_a_process_with_oddities(oddity: str) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as told:
        try:
            command = [sys.executable, "-c", ODD_PROGRAM.format(before=ODDITIES[oddity]), str(writer)]
            done = subprocess.run(command, env=WITH_PACKAGE, pass_fds=[writer], capture_output=True, text=True, timeout=50, check=False)
        finally:
            os.close(writer)
        assert (told.read(), done.returncode) == (b"fine", 0), done.stderr


def test_streams_closed_before_the_interpreter_starts_harm_nothing() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as told:
        try:
            script = ODD_PROGRAM.format(before="")
            command = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", sys.executable, "-c", script, str(writer)]
            subprocess.run(command, env=WITH_PACKAGE, pass_fds=[writer], timeout=50, check=True)
        finally:
            os.close(writer)
        assert told.read() == b"fine"


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "dead_letter"])
def test_books_add_up_at_every_look(overflow: str) -> None:
    hub = EventHub(check=False, stop=Stop(ask=0.2, term=0.2))
    k: Subscription[int, None] = hub.subscribe("k", lambda n: time.sleep(0.0005), name="k", inbox=Inbox(maxsize=500, overflow=overflow))
    with hub:
        publisher = threading.Thread(target=lambda: [hub.publish("k", n) for n in range(30_000)])
        publisher.start()
        while publisher.is_alive():
            s = k.statistics()
            assert s.accepted == s.handled + s.dead + s.waiting + s.running + sum(s.dropped.values()), s
        publisher.join()
        hub.stop(drain=False)


class TwoPayloads(Subscriber[Any, None]):
    def handle(self, payload: Any, other: Any) -> None:  # type: ignore[override]
        return None


class AsyncSetup(Subscriber[Any, None]):
    async def setup(self) -> None:  # type: ignore[override]
        return None

    def handle(self, payload: Any) -> None:
        return None


class AsyncSnapshot(Subscriber[Any, None]):
    def handle(self, payload: Any) -> None:
        return None

    async def snapshot(self) -> object:
        return None


@pytest.mark.parametrize(
    ("handler", "words"), [(TwoPayloads, "handle"), (TwoPayloads(), "handle"), (AsyncSetup, "setup"), (AsyncSnapshot(), "snapshot")]
)
def test_classes_that_cannot_work_are_refused_at_the_call(handler: Any, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        EventHub().subscribe("k", handler)


def test_letters_that_gave_way_are_left_too() -> None:
    hub = EventHub(max_bytes="40MB")
    hub.subscribe("k", lambda data: 1 / 0, name="k")
    with pytest.raises(DeadLettersLeft) as left, hub:
        hub.publish("k", bytes(14_000_000))
    assert left.value.counts == {"k": {"dead_letters_full": 1}}


def ask_what_only_the_hub_knows(hub: EventHub, k: Subscription[int, None], line: Any) -> None:
    line.send([raised(call) for call in only_the_hub(hub, k)])


def only_the_hub(hub: EventHub, k: Subscription[int, None]) -> list[Any]:
    return [
        lambda: hub.subscriptions, lambda: hub.subscription("k"), lambda: hub.subscribers("k"), lambda: hub.on_notice(print),
        lambda: k.state, k.statistics, hub.drain, lambda: hub.attach(FORK.Queue()),
    ]  # fmt: skip


def raised(call: Any) -> str:
    try:
        call()
    except HubError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_handles_elsewhere_publish_and_refuse_the_rest(method: str) -> None:
    hub = EventHub()
    k: Subscription[int, None] = hub.subscribe("k", print_nothing, name="k")
    context: Any = multiprocessing.get_context(method)
    with hub:
        ours, theirs = context.Pipe()
        child = context.Process(target=ask_what_only_the_hub_knows, args=(hub, k, theirs))
        child.start()
        found = ours.recv()
        child.join(10)
        assert all("works in the process that made the hub" in text for text in found), found
        ours.close()
        theirs.close()
    assert repr(k)


def print_nothing(_: int) -> None:
    return None


@pytest.mark.parametrize("victim", ["supervisor", "router"])
def test_one_of_ours_that_is_frozen_is_replaced(victim: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, n), name="k")
    with hub:
        pid = hub.statistics().pids[victim]
        hub.publish_batch("k", range(100))
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        hub.publish_batch("k", range(100, 200))
        hub.drain(40)
        assert time.monotonic() - began < 20
        assert hub.statistics().pids[victim] != pid
    assert lines(log) == [str(n) for n in range(200)]


def test_nothing_lives_on_when_the_hub_dies_while_its_supervisor_is_frozen() -> None:
    script = (
        "import mphub, os, signal, time\n"
        "hub = mphub.EventHub()\nk = hub.subscribe('k', len, name='k')\nhub.start()\n"
        "pids = hub.statistics().pids\nos.kill(pids['supervisor'], signal.SIGSTOP)\n"
        "print(*pids.values(), *k.statistics().pids if False else '', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=WITH_PACKAGE, capture_output=True, text=True, timeout=30, check=False)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert eventually(lambda: not any(alive(pid) for pid in pids), 3)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_failures_letter_has_pid_and_memory() -> None:
    hub = EventHub(check=False)
    k = hub.subscribe("k", lambda n: 1 / n, name="k")
    with hub:
        hub.publish("k", 0)
        hub.drain(10)
        (pid,) = k.statistics().pids
    (letter,) = hub.dead_letters()
    assert letter.pid == pid
    assert 1 << 20 < (letter.rss or 0) < 1 << 32


def test_short_stops_are_not_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    frost, state = fork.Frost(), ["S"]
    monkeypatch.setattr(fork, "stat_fields", lambda pid: state)
    looks = [(0, "T"), (1, "T"), (8, "T"), (9, "T"), (10, "S"), (11, "T"), (12, "T"), (14, "T"), (16, "T"), (17, "T")]
    found = []
    for now, letter in looks:
        state[0] = letter
        found.append(frost.lasts(1, now))
    assert found == [False] * 8 + [True, True]


def test_what_is_unconfirmed_when_the_hub_ends_was_not_accepted(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub()
    hub.subscribe("k", len, name="k")
    with hub:
        hub.publish("k", b"", confirm=True)
        router = hub.statistics().pids["router"]
        os.kill(router, signal.SIGSTOP)
        hub.publish("k", b"")
        connection = connection_to(hub._address)
        connection.end(HubClosed("it stops"))
        with pytest.raises(HubClosed, match="it stops"):
            connection.flush(5)
        os.kill(router, signal.SIGCONT)
        hub.stop(drain=False)
    assert "1 frames that this process published were not accepted (it stops)" in caplog.text


def test_a_flush_does_not_wait_for_the_answer_to_a_request() -> None:
    hub = EventHub()
    k: Subscription[float, float] = hub.subscribe("k", slowly, name="k")
    with hub:
        reply = k.request(2.0)
        began = time.monotonic()
        hub.flush()
        assert time.monotonic() - began < 1.0, "a request's confirm waits for its reply a few milliseconds, no longer"
        assert not reply.done()
        assert reply.result(10) == 2.0


def slowly(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def zeros(size: int) -> bytes:
    return bytes(size)


def test_answers_of_many_kilobytes_keep_coming_though_they_are_acknowledged_together() -> None:
    hub = EventHub()
    k: Subscription[int, bytes] = hub.subscribe("k", zeros, name="k")
    with hub:
        sizes = [size for _ in range(20) for size in (0, 10, 50_000, 63_000, 70_000, 200_000)]
        assert [len(answer) for answer in k.map(sizes)] == sizes
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        assert [len(answer) for answer in k.map(sizes)] == sizes
        assert eventually(lambda: not list(Path(hub._address.folder, "blobs").iterdir()), 5)
