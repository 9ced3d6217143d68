"""The whole hub at once: as init of a container, and killed at any moment of its life."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mphub import EventHub
from tests.faults.test_deaths import WITH_PACKAGE
from tests.helpers import eventually

pytestmark = pytest.mark.faults

AS_INIT = """
import os, signal, subprocess, time
import mphub
from pathlib import Path

def zombies():
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if text.rpartition(")")[2].split()[0] == "Z":
            found.append(text)
    return found

def work(what):
    if what == "die":
        subprocess.Popen(["sh", "-c", "setsid sh -c 'sleep 0.1' & setsid sleep 600 &"])
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return what

def ask():
    assert hub.request("k", "work").result(20) == "work"

assert os.getpid() == 1
hub = mphub.EventHub(check=False)
hub.subscribe("k", work, name="k", retry=mphub.Retry(max_attempts=1))
hub.start()
ask()
for victim in ("router", "supervisor"):
    before = hub.statistics().pids[victim]
    os.kill(before, signal.SIGKILL)
    while hub.statistics().pids[victim] == before:
        time.sleep(0.01)
    ask()
hub.publish("k", "die")
ask()
assert hub.subscription("k").statistics().restarts == 1
deadline = time.monotonic() + 3
while zombies() and time.monotonic() < deadline:
    time.sleep(0.05)
assert not zombies(), zombies()
hub.stop()
left = [p.name for p in Path("/proc").glob("[0-9]*") if p.name != "1"]
assert not left, left
assert not Path(hub._address.folder).exists()
print("as it should be")
"""


def test_a_hub_that_is_init_of_a_container_starts_restarts_reaps_and_stops() -> None:
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run([*apart, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a namespace of processes cannot be made here: {tried.stderr.strip()}")
    found = subprocess.run(
        [*apart, sys.executable, "-c", AS_INIT], capture_output=True, text=True, check=False, env=WITH_PACKAGE, timeout=50
    )
    assert found.stdout == "as it should be\n", found.stderr


HUB = """
import pathlib, subprocess, sys, time
import mphub
from mphub.procs import boot

SESSIONS = [False] if sys.argv[1] == "all" else [False, True]
boot.runtime_parent = lambda: (pathlib.Path(sys.argv[2]), False)

def work(n):
    # leave behind what ignores SIGTERM
    for session in SESSIONS:
        command = ["sh", "-c", "trap '' TERM; echo; exec sleep 600"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=session)
        child.stdout.readline()
    return n

hub = mphub.EventHub(unmatched="ignore")
for name in "abc":
    hub.subscribe(name, work, name=name)
hub.start()
hub.publish("a", 1)
while True:
    hub.publish("nobody", 2)
    time.sleep(0.001)
"""
MARK = "MPHUB_TEST_VICTIM"


class Victim:
    """A program with a hub, and all that came of it."""

    def __init__(self, whom: str, place: Path) -> None:
        self.mark = os.urandom(8).hex()
        environment = {**WITH_PACKAGE, MARK: self.mark}
        command = [sys.executable, "-c", HUB, whom, str(place)]
        self.process = subprocess.Popen(command, env=environment)

    def family(self, *, sleepers: bool = True) -> list[psutil.Process]:
        """Return what lives of it, with or without what its handlers have started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                named = sleepers or process.name() not in ("sh", "sleep")
                if named and process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self, whom: str) -> None:
        """Kill the hub's process, or all of its processes at once."""
        for process in self.family(sleepers=False) if whom == "all" else []:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("whom", ["hub", "all"])
def test_of_a_hub_killed_at_any_moment_nothing_stays(whom: str, place: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    victims: list[Victim] = []
    for _ in range(10):
        victims.append(Victim(whom, place))
        time.sleep(dice.uniform(0.0, 0.6))
        victims[-1].kill(whom)
    sleepers = whom == "hub"  # else nobody is left to end them before the next hub comes
    assert eventually(lambda: not any(victim.family(sleepers=sleepers) for victim in victims), 3.0, interval=0.1)
    for folder in place.iterdir():
        if not (folder / "owner").exists():
            os.utime(folder, (0, 0))  # killed before it had a supervisor; one so young might get it yet
    with EventHub():
        assert len(list(place.iterdir())) == 1, "its own alone"
    assert not [process.cmdline() for victim in victims for process in victim.family()]
