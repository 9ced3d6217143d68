"""The public names on real processes, one after the other: notices, ends of every kind, handles elsewhere, handlers wherever they live."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import mphub
from mphub import EventHub, Inbox, Notice, Restart, Retry, Stop, Subscriber, Subscription
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = [pytest.mark.procs, pytest.mark.timeout(60)]
SOON = Stop(ask=0.2, term=0.2)
"""For handlers that sleep when the hub stops."""


def run_python(arguments: list[str], cwd: Path, feed: str | None = None, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run a program of a user, who has no tests on the path."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, input=feed, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


def refusal_of(call: Callable[[], object]) -> str:
    """Return what a call is refused with."""
    try:
        return f"returned {call()!r}"
    except mphub.MphubError as error:
        return f"{type(error).__name__}: {error}"


def die(n: int) -> None:
    os._exit(n)


def nap(seconds: float) -> int:
    """Take some time; say where."""
    time.sleep(seconds)
    return os.getpid()


# -- notices


def of_kind(heard: list[Notice], kind: str) -> list[Notice]:
    return [notice for notice in heard if notice.kind == kind]


def test_every_notice_has_its_kind_and_details() -> None:
    heard: list[Notice] = []
    hub = EventHub(check=False)
    hub.on_notice(heard.append)

    def act(what: str) -> None:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            sys.exit(5)
        raise KeyError(what)

    act_on = hub.subscribe("k", act, name="act", retry=Retry(1), restart=Restart(max_restarts=1, delay=0))
    with hub:
        pids = act_on.statistics().pids
        failed = hub.publish("k", "raise")
        hub.publish("nobody", 1)
        hub.drain()
        killed = hub.publish("k", "kill")
        exited = hub.publish("k", "exit")
        assert eventually(lambda: act_on.state == "FATAL", 10)
        hub.drain()
        assert eventually(lambda: of_kind(heard, "FATAL"), 5)
    (failure,) = of_kind(heard, "failure")
    assert (failure.severity, failure.subscriber) == ("warning", "act")
    assert (failure.details["key"], failure.details["id"], failure.details["attempt"]) == ("k", str(failed), 1)
    assert "KeyError" in failure.message
    letters = of_kind(heard, "dead_letter")
    assert letters[0].details["id"] == str(failed)
    first, second = of_kind(heard, "death")
    assert (first.severity, first.subscriber, first.details["exit"], second.details["exit"]) == ("error", "act", "SIGKILL", 5)
    assert (first.details["pid"],) == pids
    (fatal,) = of_kind(heard, "FATAL")
    assert (fatal.severity, fatal.subscriber) == ("critical", "act")
    assert "restart()" in fatal.message
    (unmatched,) = of_kind(heard, "unmatched")
    assert (unmatched.severity, unmatched.subscriber, unmatched.details["key"]) == ("warning", None, "nobody")
    assert all(abs(notice.at - time.time()) < 60 for notice in heard)
    found = {letter.id: (letter.reason, letter.exit) for letter in hub.dead_letters()}
    assert found == {failed: ("exception", None), killed: ("crash", "SIGKILL"), exited: ("crash", 5)}


def test_a_routers_death_is_told() -> None:
    heard: list[Notice] = []
    hub = EventHub()
    hub.on_notice(heard.append)
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        os.kill(hub.statistics().pids["router"], signal.SIGKILL)
        assert hub.request("k", 1).result(10) == 1
        assert eventually(lambda: of_kind(heard, "death"), 5)
    (death,) = of_kind(heard, "death")
    assert death.subscriber is None
    assert "SIGKILL" in death.message


def test_a_callback_may_stop_the_hub() -> None:
    hub = EventHub(stop=SOON)
    hub.subscribe("k", time.sleep, name="slow")
    hub.on_notice(lambda notice: hub.stop(drain=False))
    hub.start()
    hub.publish("k", 60)
    hub.publish("nobody", 1)
    assert eventually(lambda: "stopped" in repr(hub), 10)
    assert hub.statistics().unmatched == 1


# -- deaths and what is left


def test_a_crash_leaves_its_traces() -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: os.kill(os.getpid(), n), name="crash", retry=Retry(2), restart=Restart(delay=0))
    with hub:
        hub.publish("k", signal.SIGSEGV)
        hub.drain()
        (letter,) = hub.dead_letters()
        found = hub.statistics().subscribers["crash"]
    assert (letter.reason, letter.exit, letter.attempts, letter.error) == ("crash", "SIGSEGV", 2, None)
    assert letter.pid is not None
    assert not psutil.pid_exists(letter.pid)
    assert letter.rss is not None
    assert letter.rss > 1_000_000
    assert "Segmentation fault" in letter.traceback
    assert (found.restarts, found.dead, found.failed, found.retried) == (2, 1, 0, 1)


@pytest.mark.parametrize(("code", "exit_"), [(0, 0), (3, 3), (None, 0), ("text", 1)])
def test_leaving_by_sys_exit_is_a_death(code: Any, exit_: int) -> None:
    hub = EventHub(check=False)
    leave = hub.subscribe("k", sys.exit, name="leave", retry=Retry(1))
    with hub:
        with pytest.raises(mphub.HandlerCrashed) as crashed:
            leave.request(code).result(10)
        assert crashed.value.exit == exit_


def test_a_fatal_subscriber_ends_a_drain_after_all_else_and_its_events_wait_for_its_restart(tmp_path: Path) -> None:
    log, works = tmp_path / "log", tmp_path / "works"
    hub = EventHub(check=False)

    def broken(n: int) -> None:
        if not works.exists():
            os._exit(1)
        note(log, n)

    fatal = hub.subscribe("k", broken, retry=Retry(1), restart=Restart(max_restarts=0))
    slow = hub.subscribe("k", lambda n: time.sleep(0.1), name="slow")
    with hub:
        hub.publish_batch("k", range(4))
        with pytest.raises(mphub.SubscriberFatal, match="'broken' is FATAL with work left") as left:
            hub.drain(20)
        assert left.value.name == "broken"
        assert slow.statistics().handled == 4, "all else is done"
        with pytest.raises(mphub.SubscriberFatal):
            fatal.request(9).result(10)
        works.touch()
        fatal.restart()
        fatal.wait_ready(10)
        assert hub.drain(20).subscribers["broken"].handled == 3
    assert lines(log) == ["1", "2", "3"]


def test_leaving_the_block_with_a_fatal_subscriber_stops_all_the_same() -> None:
    hub = EventHub()
    hub.subscribe("k", die, retry=Retry(1), restart=Restart(max_restarts=0))
    with pytest.raises(mphub.SubscriberFatal), hub:
        hub.publish_batch("k", [1, 1])
    found = hub.statistics().subscribers["die"]
    assert (found.state, found.accepted, found.dead, dict(found.dropped)) == ("STOPPED", 2, 1, {"stopped": 1})


def test_a_late_subscriber_that_cannot_start_leaves_the_others_alone() -> None:
    class Broken(Subscriber[int, None]):
        def setup(self) -> None:
            raise LookupError("no model")

        def handle(self, payload: int) -> None: ...

    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        broken = hub.subscribe("other", Broken, restart=Restart(max_restarts=0))
        with pytest.raises(mphub.StartFailed, match="'Broken' is FATAL") as failed:
            broken.wait_ready(10)
        assert isinstance(failed.value.__cause__, LookupError)
        assert hub.request("k", 1).result(10) == 1


@pytest.mark.parametrize("path", ["no_such_module:handler", "os:no_such_name"])
def test_a_path_that_leads_nowhere_fails_the_start(path: str) -> None:
    hub = EventHub()
    hub.subscribe("k", path, restart=Restart(max_restarts=0))
    with pytest.raises(mphub.StartFailed) as failed:
        hub.start()
    assert isinstance(failed.value.__cause__, ImportError | AttributeError)
    assert "stopped" in repr(hub)


def yields(n: int) -> Any:
    yield n


def test_a_path_that_leads_to_a_generator_function_fails_the_start() -> None:
    hub = EventHub()
    hub.subscribe("k", "tests.procs.test_section2:yields", restart=Restart(max_restarts=0))
    with pytest.raises(mphub.StartFailed) as caught:
        hub.start()
    assert isinstance(caught.value.__cause__, mphub.InvalidOption)


def test_a_start_in_time_or_not_at_all() -> None:
    class Slow(Subscriber[int, None]):
        def setup(self) -> None:
            time.sleep(60)

        def handle(self, payload: int) -> None: ...

    hub = EventHub(stop=SOON)
    slow = hub.subscribe("k", Slow)
    with pytest.raises(TimeoutError, match="'Slow' is STARTING"):
        hub.start(timeout=0.3)
    assert "stopped" in repr(hub)
    hub.start(wait=False)
    assert slow.state == "STARTING"
    with pytest.raises(TimeoutError, match="'Slow' is STARTING"):
        slow.wait_ready(0.1)
    hub.stop(drain=False)


def test_what_a_handler_raises_but_cannot_be_sent_is_told_by_name() -> None:
    class Odd(Exception):
        """Holds what cannot be pickled."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            super().__init__("very odd")

    def fail(n: int) -> None:
        raise Odd

    hub = EventHub(check=False)
    ask = hub.subscribe("k", fail)
    with hub, pytest.raises(mphub.RemoteError, match="Odd: very odd"):
        ask.request(1).result(10)


# -- stopping


def test_a_stop_that_takes_too_long_stops_nevertheless_and_says_what_was_left() -> None:
    hub = EventHub(stop=SOON)
    hub.subscribe("k", time.sleep, name="slow")
    hub.start()
    hub.publish_batch("k", [60, 0])
    with pytest.raises(mphub.DrainTimeout, match="slow: 2") as late:
        hub.stop(timeout=0.3)
    assert late.value.pending == {"slow": 2}
    found = hub.statistics().subscribers["slow"]
    assert (found.state, found.waiting, found.running, dict(found.dropped)) == ("STOPPED", 0, 0, {"stopped": 2})


def test_a_stop_elsewhere_ends_a_drain_and_requests() -> None:
    hub = EventHub(stop=SOON)
    slow = hub.subscribe("k", time.sleep, name="slow")
    hub.start()
    running, waiting = slow.request(60), slow.request(0)
    threading.Timer(0.3, lambda: hub.stop(drain=False)).start()
    with contextlib.suppress(mphub.HubClosed):
        hub.drain(20)
    for reply in (running, waiting):
        with pytest.raises(mphub.Dropped, match="stopped"):
            reply.result(10)
    assert eventually(lambda: "stopped" in repr(hub), 10)


INTERRUPTED = """
    import sys, time, mphub
    hub = mphub.EventHub(name="interrupted", stop=mphub.Stop(ask=0.2, term=0.2))
    hub.subscribe("k", time.sleep, name="slow")
    try:
        with hub:
            hub.publish_batch("k", [60.0] * 4)
            hub.flush()
            print("up", flush=True)
            if sys.argv[1] == "block":
                time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", dict(hub.statistics().subscribers["slow"].dropped))
"""


@pytest.mark.parametrize("where", ["block", "drain"])
def test_ctrl_c_in_the_block_is_an_ordinary_interrupt(where: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), where]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the whole group
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "interrupted {'stopped': 4}\n"), err
    assert err == "mphub: hub 'interrupted' stopped: 0 handled, 0 dead, 0 unmatched, 4 given up\n", "no traceback of a child"


def test_run_ends_when_the_hub_is_stopped_elsewhere_and_gives_signal_handlers_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")

    def stop() -> None:
        assert eventually(lambda: "running" in repr(hub))
        hub.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    assert hub.run() == 0
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_run_ends_with_one_when_the_drain_takes_too_long() -> None:
    hub = EventHub(stop=SOON)
    hub.subscribe("k", time.sleep, name="slow")
    hub.start()
    hub.publish("k", 60)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert hub.run(drain_timeout=0.2) == 1
    assert hub.statistics().subscribers["slow"].dropped == {"stopped": 1}


def test_the_last_line_goes_to_the_log_if_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub(name="logged", unmatched="ignore")
    with caplog.at_level("INFO", "mphub"), hub:
        hub.publish("k", 1)
    assert caplog.messages == ["mphub: hub 'logged' stopped: 0 handled, 0 dead, 1 unmatched, 0 given up"]


def test_the_figures_of_a_running_subscriber() -> None:
    hub = EventHub()
    work = hub.subscribe("k", nap, name="work")
    with hub:
        pids = set(work.map([0.02] * 10))
        found = work.statistics()
        assert set(found.pids) == pids
        assert (found.state, found.handled, found.waiting, found.running, found.restarts) == ("RUNNING", 10, 0, 0, 0)
        assert 0.02 <= found.p50 <= found.p95 <= found.p99 < 2
        assert 0.02 <= found.mean < 2
        assert found.rss > 1_000_000
        assert found.cpu >= 0
        assert {psutil.Process(pid).ppid() for pid in pids} == {hub.statistics().pids["supervisor"]}
        with pytest.raises(AttributeError):
            found.handled = 0  # type: ignore[misc]
    assert (work.statistics().pids, work.statistics().handled) == ((), 10)


# -- handles


def publish_by(handle: Any, answers: Any) -> None:
    handle.publish("k", 1, confirm=True)
    handle.publish_batch("k", iter([2, 3]))
    asyncio.run(handle.publish_async("k", 4))
    with handle.transaction() as together:
        together.publish("k", 5, headers={"a": "b"})
        together.publish("k", 6, ordering_key="o")
    with contextlib.suppress(KeyError), handle.transaction() as together:
        together.publish("k", 7)
        raise KeyError
    handle.flush(10)
    answers.put(handle.request("ask", 8).result(10))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["hub", "publisher"])
def test_what_was_made_before_the_start_publishes_from_other_processes(method: str, kind: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, n), name="log")
    hub.subscribe("ask", lambda n: -n, name="ask")
    handle = hub if kind == "hub" else hub.publisher()
    if method == "fork":
        handle = pickle.loads(pickle.dumps(handle))
    context: Any = multiprocessing.get_context(method)
    with hub:
        answers = context.Queue()
        child = context.Process(target=publish_by, args=(handle, answers))
        child.start()
        assert answers.get(timeout=30) == -8
        child.join(10)
        answers.close()
    assert lines(log) == ["1", "2", "3", "4", "5", "6"]


def publish_and_end(publisher: Any, how: str) -> None:
    for n in range(1000):
        publisher.publish("k", n)
    if how == "raise":
        raise SystemExit(3)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_process_that_ends_normally_has_published_everything(method: str, how: str) -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: None, name="count")
    context: Any = multiprocessing.get_context(method)
    with hub:
        child = context.Process(target=publish_and_end, args=(hub.publisher(), how))
        child.start()
        child.join(30)
        assert hub.drain(20).subscribers["count"].handled == 1000


def test_a_publisher_outlives_a_restart_of_its_hub() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: -n, name="k")
    publisher, ingress = hub.publisher(), hub.queue
    for _ in range(2):
        with hub:
            publisher.publish("k", 1, confirm=True)
            ingress.put(("k", 2))
            ingress.join_thread()
            assert publisher.request("k", 3).result(10) == -3
            assert hub.drain().subscribers["k"].handled == 3
        with pytest.raises(mphub.HubClosed):
            publisher.publish("k", 1)


def test_closing_a_publisher_flushes_and_harms_no_other() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        with hub.publisher() as publisher:
            publisher.publish("k", 1)
        assert hub.statistics().accepted == 1
        hub.publish("k", 2)
        publisher.publish("k", 3)
        assert hub.drain().accepted == 3


def test_a_handlers_own_children_publish_like_anybody(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def parent(n: int) -> int | None:
        child = multiprocessing.get_context("fork").Process(target=lambda: hub.publish("out", n) and None)
        child.start()
        child.join()
        return child.exitcode

    ask = hub.subscribe("k", parent)
    hub.subscribe("out", lambda n: note(log, n), name="out")
    with hub:
        assert ask.request(7).result(20) == 0
    assert lines(log) == ["7"]


def end_a_child(_: object) -> int | None:
    reader, writer = multiprocessing.Pipe()

    def child() -> None:
        writer.send("up")
        time.sleep(30)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    reader.recv()
    process.terminate()
    process.join(5)
    return process.exitcode


def test_a_handlers_own_children_end_by_sigterm_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    hub = EventHub()
    ask = hub.subscribe("k", end_a_child)
    with hub:
        assert ask.request(0).result(10) == -signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err


def test_threads_of_a_handler_publish_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)

    def handler(n: int) -> None:
        thread = threading.Thread(target=hub.publish, args=("out", "from a thread"))
        thread.start()
        thread.join()
        hub.publish("out", "with the ack")
        raise ValueError(n)

    hub.subscribe("k", handler)
    hub.subscribe("out", lambda text: note(log, text), name="out")
    with hub:
        hub.publish("k", 1)
    assert lines(log) == ["from a thread"]


# -- the ways in


def test_the_queue_keeps_the_interface_of_multiprocessing() -> None:
    hub = EventHub(stop=SOON)
    hub.subscribe("k", time.sleep, name="slow", inbox=Inbox(maxsize=2))
    ingress = hub.queue
    with hub:
        for wrong in (3, "k", ("k",), ("k", 1, 2)):
            with pytest.raises(mphub.PayloadError, match=r"\(key, payload\) pairs"):
                ingress.put(wrong)  # type: ignore[arg-type]
        with pytest.raises(mphub.InvalidKey):
            ingress.put(("a b", 1))
        for read in (ingress.get, ingress.get_nowait):
            with pytest.raises(TypeError, match="subscribe a handler"):
                read()
        for _ in range(3):
            ingress.put(("k", 0.5))
        ingress.join_thread()
        assert (ingress.qsize(), ingress.empty(), ingress.full()) == (0, True, False)
        assert eventually(lambda: is_full(ingress), 5)
        with pytest.raises(queue.Full):
            ingress.put(("k", 0), timeout=0.05)
        ingress.put(("other", 0), block=False)
        ingress.put(("k", 0), timeout=20)
        ingress.close()
        ingress.cancel_join_thread()
    assert hub.statistics().accepted == hub.statistics().subscribers["slow"].handled + 1


def is_full(ingress: Any) -> bool:
    try:
        ingress.put_nowait(("k", 0.5))
    except queue.Full:
        return True
    return False


def test_a_transaction_is_accepted_whole_or_not_at_all() -> None:
    hub = EventHub(unmatched="ignore")
    hub.subscribe("k", lambda n: None, name="k")
    with hub:
        for wrong, error in (("a b", mphub.InvalidKey), ("k", mphub.PayloadError)):
            with pytest.raises(error), hub.transaction() as together:
                together.publish("k", 1)
                together.publish(wrong, (n for n in range(2)))
        with pytest.raises(mphub.InvalidOption, match="headers"), hub.transaction() as together:
            together.publish("k", 1)
            together.publish("k", 1, headers={"a": 1})  # type: ignore[dict-item]
        with hub.transaction():
            pass
        assert hub.drain().accepted == 0
        with hub.transaction() as together:
            together.publish("k", 1)
            together.publish("nobody", 2)
        assert (hub.statistics().accepted, hub.statistics().unmatched) == (2, 1), "accepted when the block is left"


def test_a_batch_whose_iterable_fails_has_published_what_came() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: None, name="k")

    def some() -> Any:
        yield 1
        yield 2
        raise KeyError

    with hub:
        with pytest.raises(KeyError):
            hub.publish_batch("k", some())
        assert hub.drain().accepted == 2


def test_publish_async_does_not_hold_the_loop() -> None:
    hub = EventHub(stop=SOON)
    hub.subscribe("k", time.sleep, name="slow", inbox=Inbox(maxsize=1))

    async def program() -> int:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0.01)

        heart = asyncio.create_task(beat())
        for _ in range(4):
            await hub.publish_async("k", 0.2, confirm=True)
        await hub.publisher().publish_async("k", 0)
        heart.cancel()
        return beats

    with hub:
        assert asyncio.run(program()) > 10
        assert hub.drain().subscribers["slow"].handled == 5


def test_a_reply_is_a_future() -> None:
    hub = EventHub()
    slow = hub.subscribe("k", nap, name="slow")
    with hub:
        first, second = slow.request(0.3), slow.request(0)
        with pytest.raises(TimeoutError):
            first.result(0.05)
        called: list[Any] = []
        second.add_done_callback(called.append)
        assert first.result(10) == second.result(10)
        assert eventually(lambda: called == [second])
        assert first.id != second.id
        given_up = slow.request(0)
        assert given_up.cancel()
        found = hub.drain().subscribers["slow"]
        assert found.handled + found.dropped.get("cancelled", 0) == 3


# -- handlers, wherever they live

PROGRAM = """
    import functools, mphub
    hub = mphub.EventHub(name="program", check=False)

    @hub.subscriber("fail")
    def fail(n):
        hub.publish("out", "never")
        raise ValueError(n)

    @hub.subscriber("function")
    def function(n):
        hub.publish("out", f"function {n}")

    @hub.subscriber("coroutine")
    async def coroutine(n):
        await hub.publish_async("out", f"coroutine {n}")

    @hub.subscriber("class")
    class Class(mphub.Subscriber):
        def setup(self):
            self.hub = hub
        def handle(self, n):
            self.hub.publish("out", f"class {n}")

    def partial(hub, n):
        hub.publish("out", f"partial {n}")

    def closure():
        inner = hub
        return lambda n: inner.publish("out", f"closure {n}") and None

    class Holder(mphub.Subscriber):
        def __init__(self, hub):
            self.hub = hub
        def handle(self, n):
            self.hub.publish("out", f"instance {n}")

    hub.subscribe("partial", functools.partial(partial, hub))
    hub.subscribe("closure", closure(), name="closure")
    hub.subscribe("instance", Holder(hub))
    hub.subscribe("out", lambda text: print(text), name="out")
"""
MAIN = """
    with hub:
        for key in ("function", "coroutine", "class", "partial", "closure", "instance", "fail"):
            hub.publish(key, 1)
"""
PRINTED = [f"{form} 1" for form in ("class", "closure", "coroutine", "function", "instance", "partial")]


@pytest.mark.parametrize("where", ["file", "-c", "-", "-m", "module", "guarded"])
def test_publishing_by_the_hub_in_a_handler_goes_with_the_ack_wherever_it_lives(where: str, tmp_path: Path) -> None:
    program, main = textwrap.dedent(PROGRAM), textwrap.dedent(MAIN)
    feed = None
    if where == "module":
        (tmp_path / "program.py").write_text(program)
        (tmp_path / "script.py").write_text(f"from program import hub\n{main}")
        arguments = ["script.py"]
    elif where == "-m":
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__main__.py").write_text(program + main)
        arguments = ["-m", "package"]
    elif where in ("file", "guarded"):
        guarded = "def main():\n" + textwrap.indent(main, "    ") + "\nif __name__ == '__main__':\n    main()\n"
        (tmp_path / "script.py").write_text(program + (guarded if where == "guarded" else main))
        arguments = ["script.py"]
    else:
        arguments, feed = (["-"], program + main) if where == "-" else (["-c", program + main], None)
    done = run_python(arguments, tmp_path, feed)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, PRINTED), done.stderr
    assert "hub 'program' stopped: 12 handled, 1 dead, 0 unmatched, 0 given up" in done.stderr


def test_a_module_that_starts_its_hub_when_imported_is_told_why_it_cannot_in_a_child(tmp_path: Path) -> None:
    (tmp_path / "eager.py").write_text(
        textwrap.dedent("""
        import mphub
        hub = mphub.EventHub(name="eager")

        def handler(n):
            print(n)

        hub.subscribe("k", handler, restart=mphub.Restart(max_restarts=0))
        hub.start()
        """)
    )
    done = run_python(["-c", "import eager"], tmp_path)
    assert done.returncode == 1
    assert "this is subscriber 'handler': start() does not work in a handler" in done.stderr


def test_a_handler_begins_with_the_surroundings_of_its_subscription(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "then").mkdir()
    monkeypatch.chdir(tmp_path / "then")
    monkeypatch.setenv("MPHUB_TEST_THEN", "then")
    monkeypatch.syspath_prepend(str(tmp_path / "then"))
    hub = EventHub()

    def look(_: object) -> tuple[object, ...]:
        return os.getcwd(), os.environ.get("MPHUB_TEST_THEN"), sys.path[0], sys.stdin.read(), os.getsid(0) == os.getpid()

    ask = hub.subscribe("k", look)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPHUB_TEST_THEN", "now")
    then = str(tmp_path / "then")
    with hub:
        assert ask.request(0).result(10) == (then, "then", then, "", True)


def test_surroundings_need_not_be_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(there)
    monkeypatch.chdir(os.fsdecode(there))
    monkeypatch.setenv("MPHUB_TEST_THEN", os.fsdecode(there))
    monkeypatch.syspath_prepend(os.fsdecode(there))
    hub = EventHub()
    ask = hub.subscribe("k", lambda _: (os.getcwdb(), os.environb[b"MPHUB_TEST_THEN"], os.fsencode(sys.path[0])))
    with hub:
        assert ask.request(0).result(10) == (there, there, there)


def test_handlers_cannot_run_the_hub_they_are_in() -> None:
    hub = EventHub(name="surrounding")

    def try_all(_: object) -> dict[str, str]:
        calls: dict[str, Callable[[], object]] = {
            "start": hub.start, "stop": hub.stop, "drain": hub.drain, "statistics": hub.statistics, "dead_letters": hub.dead_letters,
            "subscribe": lambda: hub.subscribe("x", len), "flush": hub.flush, "confirm": lambda: hub.publish("k", 1, confirm=True),
            "redrive": hub.redrive, "purge": hub.purge, "attach": lambda: hub.attach(None),
        }  # fmt: skip
        return {what: refusal_of(call) for what, call in calls.items()}

    ask = hub.subscribe("k", try_all)
    with hub:
        for what, said in ask.request(0).result(10).items():
            assert said.startswith("HubError: "), what
            assert "handler" in said, what


def test_a_handler_asks_others() -> None:
    hub = EventHub()
    hub.subscribe("inner", lambda n: 10 * n, name="inner")

    def outer(n: int) -> list[int]:
        return [hub.request("inner", n).result(10), *hub.map("inner", [n + 1, n + 2])]

    async def async_outer(n: int) -> object:
        return await hub.request("inner", n, to="inner")

    ask: Subscription[int, list[int]] = hub.subscribe("outer", outer)
    ask_async = hub.subscribe("async", async_outer)
    with hub:
        assert ask.request(1).result(20) == [10, 20, 30]
        assert ask_async.request(4).result(20) == 40


def test_ids_are_stable_and_given_by_the_publisher(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)

    def fail(n: int) -> None:
        note(log, f"{mphub.current_event().id} {mphub.current_event().attempt}")
        if mphub.current_event().attempt == 1:
            os._exit(1)
        raise ValueError(n)

    hub.subscribe("k", fail, retry=Retry(3, on=ValueError, delay=0.05), restart=Restart(delay=0))
    with hub:
        sent = hub.publish("k", 1)
        hub.drain()
        (letter,) = hub.dead_letters()
        assert (letter.id, type(letter.id), str(letter.id)) == (sent, mphub.EventId, f"{int(sent):026x}")
        hub.redrive(ids=[letter.id])
        hub.drain()
        assert [letter.id for letter in hub.dead_letters()] == [sent]
    assert lines(log) == [f"{sent} {attempt}" for attempt in (1, 2, 3, 1, 2, 3)]


def test_a_map_that_is_left_early_asks_no_more() -> None:
    hub = EventHub()
    slow = hub.subscribe("k", lambda n: n, name="k")
    taken: list[int] = []

    def endless() -> Any:
        for n in range(1_000_000):
            taken.append(n)
            yield n

    with hub:
        for result in slow.map(endless()):
            if result == 5:
                break
        assert len(taken) < 200
        hub.drain()
    found = hub.statistics().subscribers["k"]
    assert found.handled + found.dropped.get("cancelled", 0) == len(taken)


def test_hubs_by_thousands_of_events_from_many_threads_and_processes_lose_nothing() -> None:
    hub = EventHub()
    hub.subscribe("k.>", lambda n: None, name="count")
    context: Any = multiprocessing.get_context("fork")
    with hub:
        work = [functools.partial(hub.publisher().publish_batch, f"k.{i}", range(2000)) for i in range(6)]
        workers = [threading.Thread(target=each) for each in work[:3]] + [context.Process(target=each) for each in work[3:]]
        for worker in workers[3:] + workers[:3]:  # forks first
            worker.start()
        for worker in workers:
            worker.join(30)
        assert hub.drain(30).subscribers["count"].handled == 12_000
