"""Other programs of the same user find a hub that runs, by its name or folder; one hub has a name at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from mphub import EventHub, HubClosed, HubError, HubExists, InvalidOption, connect
from mphub.procs import boot
from mphub.running import hubs
from tests.helpers import eventually
from tests.notes import Record, lines

pytestmark = pytest.mark.timeout(60)
PROGRAM = """
import pathlib, sys, time
import mphub
from mphub.procs import boot
boot.SHM = pathlib.Path(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let no hub of another test be found."""
    with tempfile.TemporaryDirectory(prefix="shm-") as name:
        monkeypatch.setattr(boot, "SHM", Path(name))
        yield Path(name)


@contextmanager
def program(text: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Run another program on the same machine."""
    command = [sys.executable, "-c", PROGRAM + text, str(boot.SHM), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.kill()


SERVES = """
hub = mphub.EventHub(name="orders", check=False)
hub.subscribe("k", lambda n: n + 1)
hub.start()
print("runs", flush=True)
hub.run()
"""


def test_a_hub_is_found_by_its_name_or_as_the_only_one() -> None:
    with program(SERVES) as (_, said):
        said.readline()
        assert connect("orders").request("k", 1).result(5) == 2
        assert connect().request("k", 2).result(5) == 3


def test_a_durable_hub_is_found_by_its_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub: EventHub = EventHub(tmp_path / "hub")
    hub.subscribe("k", abs)
    with hub:
        monkeypatch.chdir(tmp_path)
        for name in (tmp_path / "hub", "hub", "./hub", hub._address.folder):
            assert connect(name).request("k", -1).result(5) == 1


def test_one_that_starts_later_is_waited_for() -> None:
    hub: EventHub = EventHub(name="late")
    hub.subscribe("k", abs)
    starting = threading.Timer(0.3, hub.start)
    starting.start()
    try:
        assert connect("late").request("k", -1).result(5) == 1
    finally:
        starting.join()
        hub.stop()


def test_what_is_not_there_is_said_and_what_is() -> None:
    with pytest.raises(HubClosed, match="no hub of this user runs"):
        connect(timeout=0)
    with EventHub(name="orders"):
        with pytest.raises(HubClosed, match=r"got 'order', .* did you mean 'orders'"):
            connect("order", timeout=0)
        with pytest.raises(HubClosed, match=f"these do: orders of process {os.getpid()}"):
            connect("/nowhere", timeout=0)
        with EventHub(name="bills"), pytest.raises(HubError, match=r"2 hubs of this user run .*: name one"):
            connect()
    for wrong in ("", 7, b"orders"):
        with pytest.raises(InvalidOption, match="hub: got"):
            connect(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="timeout"):
        connect(timeout="soon")  # type: ignore[arg-type]


def test_a_name_is_one_hubs_at_a_time() -> None:
    again = EventHub(name="orders")
    with EventHub(name="orders"), pytest.raises(HubExists, match=f"called 'orders', that of process {os.getpid()}: stop that first"):
        again.start()
    with program(SERVES) as (process, said):
        said.readline()
        with pytest.raises(HubExists, match=f"process {process.pid}"):
            again.start()
    with again:
        assert [address.pid for address in hubs()] == [os.getpid()]
    assert not list(boot.SHM.iterdir())


@pytest.mark.parametrize("moment", ["at work", "half made"])
def test_the_name_of_one_that_was_killed_is_free_at_once(moment: str) -> None:
    text = SERVES if moment == "at work" else "boot.launch = lambda charter: print('made', flush=True) or time.sleep(60)" + SERVES
    with program(text) as (process, said):
        said.readline()
        process.kill()
        process.wait()
        began = time.monotonic()
        with EventHub(name="orders"):
            assert time.monotonic() - began < 5
    assert eventually(lambda: not list(boot.SHM.iterdir()))


def test_what_another_program_was_told_is_accepted_survives_restarts_of_the_hub(tmp_path: Path) -> None:
    """Each time the hub is ended by another signal, and its program is started again."""
    publisher = """
for n in range(10**9):
    while True:
        try:
            mphub.connect("orders", timeout=20).publish("k", n, confirm=True)
            break
        except (mphub.HubClosed, mphub.HubExists):
            continue
    print(n, flush=True)
"""
    told: list[int] = []
    with program(publisher) as (process, said):
        listening = threading.Thread(target=lambda: told.extend(map(int, said)))
        listening.start()
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
            with serving(tmp_path) as hub:
                before = len(told)
                assert eventually(lambda: len(told) > before + 20)  # noqa: B023
                hub.send_signal(number)
                hub.wait()
        process.kill()
        listening.join()
    hub_again: EventHub = EventHub(tmp_path / "hub", name="orders", check=False)
    hub_again.subscribe("k", Record(tmp_path / "notes"), name="notes")
    with hub_again:
        hub_again.drain(20)
    assert set(told) <= set(map(int, lines(tmp_path / "notes")))
    assert len(told) > 80


@contextmanager
def serving(folder: Path) -> Iterator[subprocess.Popen[Any]]:
    text = """
from tests.notes import Record
hub = mphub.EventHub(sys.argv[2] + "/hub", name="orders", check=False)
hub.subscribe("k", Record(pathlib.Path(sys.argv[2] + "/notes")), name="notes")
sys.exit(hub.run())
"""
    with program(text, folder) as (process, _):
        yield process
