"""``mphub.testing`` with processes: a recorder that is killed, deaths by name and by event, and what fails a user's test."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest

import mphub
from mphub import DeadLettersLeft, EventHub, HubError, Subscriber
from mphub.testing import Recorder, kill, kill_on, running
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = [pytest.mark.procs, pytest.mark.faults, pytest.mark.timeout(60)]


def test_a_recorder_that_is_killed_has_every_event_once_and_in_order() -> None:
    with running(EventHub(), "process") as hub:
        seen = Recorder(hub, "k")
        for begin, when in enumerate(("running", "returned", "running")):
            with kill_on(hub, seen.name, position=200, when=when):
                hub.publish_batch("k", range(begin * 500, begin * 500 + 500))
            kill(hub, seen.name)
        hub.drain()
        assert seen.payloads == list(range(1500))
        assert hub.statistics().subscribers[seen.name].restarts == 6


def test_a_torn_end_of_a_recording_is_passed_over() -> None:
    with running(EventHub()) as hub:
        seen = Recorder(hub, "k")
        hub.publish("k", 1)
        (file,) = seen._folder.iterdir()
        with open(file, "ab") as torn:
            torn.write(file.read_bytes()[:-1])
        assert seen.payloads == [1]


class Work(Subscriber[int, int | None]):
    """Notes what it does as it does it; what it returns of numbers from 8 on is committed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def handle(self, payload: int) -> int | None:
        note(self.file, f"{payload}.{mphub.current_event().attempt}")
        return payload if payload >= 8 else None


def test_a_process_dies_as_it_handles_an_event_before_or_after_its_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(initializer=partial(note, tmp_path / "begun", ""))
    hub.subscribe("k.*", Work(log), name="work", to="done")
    with running(hub, "process"):
        seen, everything = Recorder(hub, "done"), Recorder(hub, ">")
        with kill_on(hub, key="k.x", position=2) as kills:
            hub.publish_batch("k.y", [5, 6])
            hub.publish_batch("k.x", [1, 2, 3])
        assert kills.count == 1
        hub.drain()
        assert lines(log) == ["5.1", "6.1", "1.1", "2.2", "3.1"]
        with kill_on(hub, "work", times=2, when="returned"):
            hub.publish_batch("k.x", [8, 9])
        hub.drain()
        assert lines(log)[5:] == ["8.1", "8.2", "8.3", "9.1"]
        assert seen.payloads == [8, 9]
        assert len(everything.events) == 9
        assert hub.statistics().subscribers[everything.name].restarts == 0
        with kill_on(hub, everything.name):
            hub.publish("k.x", 10)
    assert len(lines(tmp_path / "begun")) == 3 + 4  # subscribers and restarts


def test_deaths_that_do_not_come_and_deaths_that_are_too_many_fail_the_test(tmp_path: Path) -> None:
    with pytest.raises(DeadLettersLeft, match="work: 1 crash"), running(EventHub(), "process") as hub:
        hub.subscribe("k", Work(tmp_path / "log"), name="work")
        with pytest.raises(AssertionError, match=r"kill_on\(work, key='k', .*: 0 of 1 deaths within 0.1 s; 1 matching"):
            with kill_on(hub, "work", key="k", position=2, timeout=0.1):
                hub.publish("k", 1)
                hub.drain()
        with pytest.raises(ZeroDivisionError), kill_on(hub):
            _ = 1 / 0
        hub.publish("k", 2)
        with kill_on(hub, where=lambda n: n == 3, times=3):
            hub.publish("k", 3)
    assert lines(tmp_path / "log") == ["1.1", "2.1"]


def are_gone(pids: list[int]) -> bool:
    return not any(map(psutil.pid_exists, pids))


def test_any_process_can_be_killed_by_name() -> None:
    hub = EventHub()
    squares = hub.subscribe("k", lambda n: n * n, name="squares", replicas=2)
    with running(hub, "process"):
        for who in ("squares", "router", "supervisor"):
            pids = kill(hub, who)
            assert len(pids) == (2 if who == "squares" else 1)
            assert eventually(partial(are_gone, pids))
            assert hub.request("k", 3).result(30) == 9
        squares.unsubscribe()
        with pytest.raises(mphub.NoSubscriber):
            kill(hub, "squares")


def test_what_does_not_run_under_the_kit_cannot_be_told_to_die() -> None:
    with pytest.raises(HubError, match=r"use the fixture process_hub, or running\("), kill_on(EventHub()):
        pass


def test_what_a_user_s_test_leaves_of_a_hub_fails_it(users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mphub.testing.traces.WITHIN", 0.3)
    users.makepyfile(
        """
        import subprocess, socket
        from mphub.testing import Recorder, kill

        kept = []

        def fail(payload):
            raise ValueError("of the handler")

        def start(path):
            with open(path, "w") as file:
                print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, file=file)

        def test_good(process_hub):
            process_hub.subscribe("k", len, to="length")
            seen = Recorder(process_hub, "length")
            process_hub.publish("k", "abc")
            assert [event.payload for event in seen.wait()] == [3]

        def test_dead_letter(process_hub):
            process_hub.subscribe("k", fail)
            process_hub.publish("k", 1)

        def test_leak(process_hub, tmp_path):
            kept.append(socket.socket(socket.AF_UNIX))
            kept[0].connect(process_hub._address.data)
            process_hub.subscribe("k", start)
            process_hub.publish("k", "pid")
            process_hub.drain()
            kill(process_hub, "supervisor")

        def test_end():
            kept[0].close()
        """
    )
    result = users.runpytest_inprocess()
    os.kill(int((users.path / "pid").read_text()), signal.SIGKILL)
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_dead_letter*", "*ValueError: of the handler", "*DeadLettersLeft*fail: 1 exception*",
            "*ERROR at teardown of test_leak*", "*left behind 0.3 s after the hub's end:", "*process *sleep 60", "*descriptor *: socket:*",
        ]
    )  # fmt: skip
