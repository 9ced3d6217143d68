"""Payloads, handlers and modules that do their worst: only who asked for them is hurt."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mphub import EventHub, Restart, Retry, StartFailed, Subscriber
from tests.faults.test_deaths import AT_ONCE, WITH_PACKAGE
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.faults


class Bomb:
    """Something whose unpickling calls a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.what = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.what


def goes_off(path: Path) -> str:
    note(path, os.getpid())
    return "boom"


def test_a_payload_is_unpickled_by_who_asked_for_it_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(unmatched="ignore", check=False)
    k = hub.subscribe("k", lambda n: None, name="k")
    failing = hub.subscribe("k", lambda n: 1 / 0, name="failing")
    hub.subscribe("other", lambda n: None, name="other")
    with hub:
        for size in (0, 200_000):
            for key in ("k", "nobody"):
                hub.publish(key, [Bomb(goes_off, log), bytes(size)])
        hub.drain(20)
        asked = {str(k.statistics().pids[0]), str(failing.statistics().pids[0])}
        assert len(hub.dead_letters()) == 2
        assert set(lines(log)) == asked
        assert len(lines(log)) == 4


def test_a_payload_that_kills_its_reader_is_a_dead_letter_and_the_rest_is_handled(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: note(log, n), name="k", retry=Retry(max_attempts=2), restart=AT_ONCE)
    with hub:
        before = hub.statistics().pids
        hub.publish("k", 1)
        hub.publish("k", Bomb(os._exit, 3))
        hub.publish("k", Bomb(os.kill, 0, signal.SIGKILL))
        hub.publish("k", 2)
        hub.drain(20)
        assert hub.statistics().pids == before
    assert lines(log) == ["1", "2"]
    assert [(letter.reason, letter.exit, letter.attempts) for letter in hub.dead_letters()] == [
        ("crash", 3, 2),
        ("crash", "SIGKILL", 2),
    ]


def test_a_payload_of_a_class_that_the_subscriber_cannot_import_is_a_dead_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: note(log, n), name="k")
    (tmp_path / "only_here_of_all.py").write_text("class Thing:\n    pass\n")
    with hub:
        monkeypatch.syspath_prepend(tmp_path)  # after the subscription, which took the path as it was
        import only_here_of_all  # type: ignore[import-not-found]

        hub.publish("k", only_here_of_all.Thing())
        hub.publish("k", 1)
        hub.drain(20)
        (letter,) = hub.dead_letters()
        assert (letter.reason, type(letter.error)) == ("exception", ModuleNotFoundError)
        assert isinstance(letter.payload, only_here_of_all.Thing), "where it can be loaded it is"
    assert lines(log) == ["1"]


def test_what_is_changed_after_publish_is_published_as_it_was(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda event: note(log, len(event[0])), name="k")
    with hub:
        small: list[int] = []
        for _ in range(500):  # most of them wait in a batch for a while
            hub.publish("k", [small])
            small.append(0)
        large = bytearray(300_000)
        hub.publish("k", [large])
        large.clear()
    assert lines(log) == [*map(str, range(500)), "300000"]


class Odd(BaseException):
    """Not an Exception."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MemoryError, Odd])
def test_whatever_a_handler_raises_is_a_failure_of_its_event_alone(error: type[BaseException]) -> None:
    hub = EventHub(check=False)

    def handle(n: int) -> int:
        if n == 1:
            raise error("now")
        return n

    k = hub.subscribe("k", handle, name="k")
    with hub:
        hub.publish_batch("k", range(3))
        with pytest.raises(error):
            hub.request("k", 1).result(10)
        assert hub.request("k", 2).result(10) == 2
        hub.drain(20)
        assert (k.statistics().handled, k.statistics().dead, k.statistics().restarts) == (3, 2, 0)
    (letter,) = hub.dead_letters()
    assert (letter.reason, type(letter.error)) == ("exception", error)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(3)", ""),
        ("import os; os.kill(os.getpid(), 9)", ""),
        ("raise SystemExit(4)", ""),
        ("raise BaseException('at import')", "at import"),
        ("import faulthandler; faulthandler._sigsegv()", "Segmentation fault"),
        ("def handle(n): return n\nraise KeyboardInterrupt", "KeyboardInterrupt"),
        ("1 +", "SyntaxError"),
    ],
)
def test_a_module_that_dies_when_imported_fails_the_start_and_no_other_subscriber(
    code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies_at_import.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    hub = EventHub(check=False)
    healthy = hub.subscribe("k", lambda n: n, name="healthy")
    with hub:
        dying = hub.subscribe("k", "dies_at_import:handle", name="dying", restart=Restart(max_restarts=1, delay=0))
        with pytest.raises(StartFailed) as failed:
            dying.wait_ready(20)
        assert words in f"{failed.value.__cause__!r}{failed.value.__cause__}"
        assert healthy.request(1).result(10) == 1
        assert (dying.state, healthy.statistics().restarts) == ("FATAL", 0)
        hub.stop(drain=False)


def test_a_death_is_noticed_though_a_child_of_the_handler_holds_all_its_descriptors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def handle(n: int) -> int:
        note(log, n)
        if len(lines(log)) == 1:
            if not os.fork():
                os.setsid()
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    k = hub.subscribe("k", handle, name="k", restart=AT_ONCE)
    with hub:
        began = time.monotonic()
        hub.publish_batch("k", range(100))
        hub.drain(20)
        assert time.monotonic() - began < 5
        assert (k.statistics().handled, k.statistics().restarts) == (100, 1)
    assert lines(log) == ["0", *map(str, range(100))]


class Alarm(Exception):
    """What a signal handler of the user's raises, anywhere."""


def ring(*_: object) -> None:
    raise Alarm


class Alarmed(Subscriber[int, None]):
    """Is interrupted all the time."""

    def setup(self) -> None:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.003)

    def handle(self, payload: int) -> None:
        sum(range(5000))


def test_signals_that_raise_in_a_subscriber_cost_it_events_or_its_process_and_nobody_else() -> None:
    hub = EventHub(check=False)
    alarmed = hub.subscribe("k", Alarmed, restart=AT_ONCE)
    calm = hub.subscribe("k", lambda n: None, name="calm")
    with hub:
        hub.publish_batch("k", range(3000))
        hub.drain(50)
        found = alarmed.statistics()
        assert found.handled + found.dead == 3000
        assert found.dead + found.restarts > 0, "it was interrupted"
        assert (calm.statistics().handled, calm.statistics().restarts) == (3000, 0)


INTERRUPTED = """
import os, signal, sys
import mphub

class Alarm(Exception):
    pass

armed, sure, perhaps = False, [], []

def ring(*_):
    global armed
    if armed:
        armed = False
        raise Alarm

def handle(n):
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{n}\\n".encode())
    os.close(file)
    return n

def act(n):
    if n % 50 == 0:
        hub.publish("k", n, confirm=True)
    elif n % 50 == 1:
        hub.publish("k", n)
        hub.flush()
    else:
        hub.publish("k", n)

path = sys.argv[1]
hub = mphub.EventHub()
hub.subscribe("k", handle, name="k")
with hub:
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    for n in range(5000):
        armed = True
        try:
            act(n)
            armed = False
            sure.append(n)
        except (Alarm, RuntimeError):  # the latter of a condition that was left while it let go of its lock
            perhaps.append(n)
    signal.setitimer(signal.ITIMER_REAL, 0)
    hub.drain(20)
rows = [int(row) for row in open(path)]
assert perhaps, "it was interrupted"
assert sorted(set(rows)) == sorted(rows) == rows, "neither doubled nor out of order"
assert not set(sure) - set(rows), ("lost", set(sure) - set(rows))
assert not set(rows) - set(sure) - set(perhaps)
print("as it should be", len(perhaps), "interrupted")
"""


def test_signals_that_raise_while_publishing_lose_and_double_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "log")]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50, env=WITH_PACKAGE)
    print(found.stdout)
    assert found.stdout.startswith("as it should be"), found.stderr
