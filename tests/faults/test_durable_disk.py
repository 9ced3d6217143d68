"""The disk of a durable hub: full, gone, read-only; nothing accepted is lost, and nothing waits without a word."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mphub import EventHub, HubFailed, JournalError, Notice
from mphub.procs import fork
from mphub.procs.boot import recorded
from tests.faults.test_shortage import Disk, is_still
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(60)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Yield a small disk that holds nothing but durable folders."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(place)
    subprocess.run(["umount", "--lazy", place], check=True)


def make_hub(disk: Disk, folder: Path, **options: Any) -> EventHub:
    """Return a hub that notes what it handles; large payloads are in files."""
    hub = EventHub(disk.folder / "hub", check=False, max_bytes="12MB", **options)

    def handle(event: tuple[int, bytes]) -> None:
        while not (folder / "gate").exists():
            time.sleep(0.01)
        note(folder / "log", event[0])

    hub.subscribe("k", handle, name="k")
    return hub


def size(n: int) -> int:
    return 100_000 if n % 100 == 50 else 1000


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_full_disk_holds_publishers_is_told_and_loses_nothing(durability: str, disk: Disk, tmp_path: Path) -> None:
    hub = make_hub(disk, tmp_path, durability=durability)
    notices: list[Notice] = []
    hub.on_notice(notices.append)
    published: list[int] = []

    def publish() -> None:
        for n in range(3000):
            if n == 500:
                disk.fill()
            hub.publish("k", (n, bytes(size(n) if n < 500 else 1000)))
            published.append(n)

    with hub:
        pids = hub.statistics().pids
        publisher = threading.Thread(target=publish)
        publisher.start()
        assert eventually(lambda: len(published) > 500 and is_still(published), 10), "publishers wait"
        assert len(published) < 3000
        assert eventually(lambda: any("disk of the hub's folder is full" in notice.message for notice in notices), 10)
        (tmp_path / "gate").touch()
        disk.make_room()
        publisher.join(30)
        assert not publisher.is_alive()
        hub.drain(30)
        assert hub.statistics().pids == pids
    assert lines(tmp_path / "log") == [str(n) for n in range(3000)]


PROGRAM = """
import sys
from pathlib import Path
from tests.faults.test_durable_disk import Disk, make_hub, size
disk, folder, durability = Disk(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
hub = make_hub(disk, folder, durability=durability)
hub.start()
for n in range(3000):
    if n == 500:
        disk.fill()
    hub.publish("k", (n, bytes(size(n) if n < 500 else 1000)))
    if n % 50 == 49:
        hub.flush()
        print(n + 1, flush=True)
"""


@pytest.mark.parametrize("durability", ["process", "power"])
def test_kill_9_of_everything_on_a_full_disk_loses_nothing_that_was_accepted(durability: str, disk: Disk, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(disk.folder), str(tmp_path), durability]
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(command, stdout=said, start_new_session=True)
    assert eventually(lambda: len(lines(tmp_path / "said")) >= 10, 20)
    time.sleep(0.3)  # until it is in the middle of a commit that has no room
    own = list(recorded(disk.folder / "hub"))
    for pid in (process.pid, *(pid for pid, _ in own)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert eventually(lambda: all(fork.is_gone(*each) for each in own), 5)
    confirmed = int(lines(tmp_path / "said")[-1])
    assert 500 <= confirmed < 3000
    (tmp_path / "gate").touch()
    disk.make_room()
    with make_hub(disk, tmp_path, durability=durability) as hub:
        hub.drain(30)
        accepted = hub.statistics().subscribers["k"].accepted
    handled = list(dict.fromkeys(lines(tmp_path / "log")))
    assert handled == [str(n) for n in range(accepted)] and accepted >= confirmed
    assert len(lines(tmp_path / "log")) - accepted <= 1


def test_a_start_on_a_full_disk_ends_with_an_error_or_goes_on(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    with make_hub(disk, tmp_path) as hub:
        hub.publish("k", (0, b""))
    disk.fill()
    began = time.monotonic()
    with contextlib.suppress(JournalError):
        hub = make_hub(disk, tmp_path)
        hub.start()
        hub.stop(drain=False)
    assert time.monotonic() - began < 15
    disk.make_room()
    with make_hub(disk, tmp_path) as hub:
        hub.publish("k", (1, b""))
    assert lines(tmp_path / "log") == ["0", "1"]


@pytest.mark.parametrize("killed", ["nobody", "router"])
def test_a_folder_that_is_removed_under_a_hub_ends_it_with_a_word(killed: str, disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    with pytest.raises(HubFailed, match="has been removed"), make_hub(disk, tmp_path) as hub:
        hub.publish("k", (0, b""), confirm=True)
        pids = hub.statistics().pids
        shutil.rmtree(disk.folder / "hub")
        if killed in pids:
            os.kill(pids[killed], signal.SIGKILL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            hub.publish("k", (1, bytes(1000)), confirm=True)


CLOCK = """
import time
real = time.time
def shifted():
    try:
        with open({file!r}) as file:
            return real() + float(file.read() or 0)
    except OSError:
        return real()
time.time = shifted
"""


def test_a_clock_that_is_set_back_and_forth_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, shift = Disk(tmp_path), tmp_path / "shift"
    (tmp_path / "sitecustomize.py").write_text(CLOCK.format(file=str(shift)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "gate").touch()
    expected, delayed = [], []
    for hours in (0, -48, 48, -1):
        shift.write_text(str(hours * 3600))
        hub = make_hub(disk, tmp_path)
        hub.subscribe("other", print, name="other")
        with hub:
            for n in range(hours, hours + 20):
                hub.publish("k", (n, b""))
                expected.append(str(n))
                if n == hours + 10:
                    hub.flush(10)
                    shift.write_text(str(-2 * hours * 3600))
            hub.publish("k", (1000 + hours, b""), delay=0.01)
            hub.flush(10)
            shift.write_text(str(100 * 3600))
            hub.publish("other", (0, b""), confirm=True)  # that it looks at the clock
            hub.drain(20)
            delayed.append(str(1000 + hours))
    found = lines(tmp_path / "log")
    assert [line for line in found if line not in delayed] == expected
    assert [line for line in found if line in delayed] == delayed


def test_a_folder_that_becomes_read_only_is_told(disk: Disk, tmp_path: Path) -> None:
    with make_hub(disk, tmp_path) as hub:
        (tmp_path / "gate").touch()
        hub.publish("k", (0, b""))
    subprocess.run(["mount", "-o", "remount,ro", disk.folder], check=True)
    with pytest.raises(JournalError, match="cannot be used: Read-only file system"):
        make_hub(disk, tmp_path).start()
