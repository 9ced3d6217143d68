"""Tests with real processes leave nothing behind: no process, no runtime folder, no open descriptor."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from mphub.testing.traces import described, descriptors
from tests.helpers import eventually
from tests.notes import Record

pytest_plugins = ["pytester"]
GUARDED = {"conformance", "procs", "faults"}
PATIENCE = 2.0
"""Seconds after which the promise says that nothing is left."""

MARK = "MPHUB_TEST_RUN"
RUN = str(os.getpid())
# Every process started from here inherits the mark, so that test runs side by side do not blame each other.
os.environ[MARK] = RUN
# A shell's background job ignores Ctrl-C, and so would the scripts that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Traces:
    """What can be left behind, as it stands at one moment."""

    pids: frozenset[int]
    folders: frozenset[Path]
    descriptors: frozenset[tuple[int, str]]

    @classmethod
    def now(cls) -> Traces:
        """Look at every process of the machine, and at this process's folders and descriptors."""
        return cls(frozenset(psutil.pids()), frozenset(_folders()), frozenset(descriptors(os.getpid())))

    def since(self, before: Traces) -> Traces:
        """Return what was not there before and is this run's."""
        return Traces(
            frozenset(_ours(self.pids - before.pids)),
            self.folders - before.folders,
            self.descriptors - before.descriptors,
        )

    def still(self) -> Traces:
        """Return what of this exists now; what has come since may belong to somebody else."""
        now = Traces.now()
        return Traces(
            frozenset(_ours(self.pids & now.pids)),
            self.folders & now.folders,
            self.descriptors & now.descriptors,
        )

    def __bool__(self) -> bool:
        return bool(self.pids or self.folders or self.descriptors)

    def __str__(self) -> str:
        rows = [f"process {described(pid)}" for pid in sorted(self.pids)]
        rows += [f"folder {folder}: {sorted(os.listdir(folder))}" for folder in sorted(self.folders) if folder.exists()]
        rows += [f"descriptor {number}: {target}" for number, target in sorted(self.descriptors)]
        return "\n".join(f"  {row}" for row in rows)


@pytest.fixture(params=["inline", "thread", pytest.param("process", marks=pytest.mark.procs)])
def engine(request: pytest.FixtureRequest) -> str:
    """All engines, side by side."""
    return str(request.param)


@pytest.fixture
def users(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project of somebody who tests with the plugin."""
    options = "-p mphub.testing -p no:cacheprovider -p no:xdist -p no:hypothesispytest --import-mode=importlib"
    pytester.makeini(f"[pytest]\naddopts = {options}\n")
    return pytester


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test of real processes that leaves a process, a runtime folder or a descriptor 2 s after its end."""
    if not GUARDED & set(request.path.relative_to(request.config.rootpath).parts):
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing's own helper, which lives until the end of the run
    before = Traces.now()
    yield
    left = Traces.now().since(before)
    if left:
        gc.collect()  # a socket in a reference cycle, of a caught exception say, is no leak
        if not eventually(lambda: not left.still(), PATIENCE, interval=0.02):
            pytest.fail(f"left behind {PATIENCE:g} s after the test:\n{left.still()}", pytrace=False)


def _ours(pids: frozenset[int]) -> Iterator[int]:
    """Yield the pids that descend from this process or were started by this run, orphans and grandchildren too."""
    descendants = {child.pid for child in psutil.Process().children(recursive=True)} if pids else set()
    return (pid for pid in pids if pid in descendants or _bears_our_mark(pid))


def _bears_our_mark(pid: int) -> bool:
    try:
        return psutil.Process(pid).environ().get(MARK) == RUN
    except psutil.Error:  # gone meanwhile, or another user's
        return False


def _is_anothers(folder: Path) -> bool:
    """Tell whether a runtime folder belongs to a hub that lives and was not started by this run."""
    try:
        router = int((folder / "children" / "router").read_text().split()[0])
        return psutil.pid_exists(router) and not _bears_our_mark(router)
    except (OSError, ValueError, IndexError):
        return False


def _folders() -> Iterator[Path]:
    for parent in {Path("/dev/shm"), Path(tempfile.gettempdir())}:
        yield from (folder for folder in parent.glob(f"mphub-{os.getuid()}-*") if not _is_anothers(folder))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Return a recorder that handlers can take along."""
    return Record(tmp_path / "record")
