"""From the hub's process to a supervisor: a fresh interpreter that never sees the user's script, and the runtime folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import psutil

from mphub.connection import Address
from mphub.errors import HubExists, StartFailed
from mphub.options import Retention
from mphub.procs import fork
from mphub.store.folder import PARTS, DurableFolder
from mphub.store.journal import lock_file
from mphub.store.verify import check_journal
from mphub.wire.frames import decoder

log = logging.getLogger("mphub")
SHM = Path("/dev/shm")
SMALL = 256 << 20
"""Bytes that /dev/shm must have free to hold a hub's folder."""
FRESH = 10.0
"""Seconds for which a folder may still be getting what it needs, or be that of a hub which ends."""
ADDRESS = "address"
"""The file in a runtime folder that says whose it is, and what its peers know: for this user alone."""
OPEN = "open"
"""The one that is there once its hub has subscribed all that it had: what came before that would be for nobody."""
STARTED = b"started"
SUPERVISOR = "supervisor"
"""The name of its record."""
_address = decoder(Address)
_ours: set[Path] = set()
"""Folders of this process's hubs: opening their locks here would drop them."""
os.register_at_fork(after_in_child=_ours.clear)


class Charter(msgspec.Struct, frozen=True):
    """What a supervisor is told, through a pipe: the token must not be seen in a process list."""

    address: Address
    hub_pid: int
    hub_ticks: int
    max_bytes: int
    ask: float
    term: float
    run: bytes = b""
    """Names a run of the hub: its supervisors follow one another in it."""
    keep: bool = False
    """What waits outlives the run."""
    power: bool = False
    """Each commit is on the disk before it counts."""
    retention: Retention | None = None
    """How much history it keeps."""


def charter(
    address: Address, max_bytes: int, ask: float, term: float, *, run: bytes, keep: bool, power: bool, retention: Retention | None = None
) -> Charter:
    """Make a charter in which this process is the hub's."""
    pid = os.getpid()
    return Charter(address, pid, fork.start_ticks(pid), max_bytes, ask, term, run, keep, power, retention)


def runtime_parent() -> tuple[Path, bool]:
    """Return where runtime folders go, and whether that is not shared memory because it is small."""
    if SHM.is_dir() and os.access(SHM, os.W_OK):
        space = os.statvfs(SHM)
        if space.f_bavail * space.f_frsize >= SMALL:
            return SHM, False
    return Path(tempfile.gettempdir()), True


def folder_of(name: str | None, parent: Path) -> Path:
    """Return where the runtime folder of a hub goes: one place for a name, as one hub of a user has it; a place of its own without."""
    mark = os.urandom(4).hex() if name is None else hashlib.sha256(name.encode()).hexdigest()[:16]
    return parent / f"mphub-{os.getuid()}-{mark}"


def make_folder(address: Address, durable: Path | None = None) -> IO[bytes]:
    """Make a runtime folder that only this user can enter; return its ``hub`` file, locked for as long as this process is its hub's.

    What a durable hub keeps is in a folder of its own, to which there are links here. Raises HubExists.
    """
    folder = Path(address.folder)
    made = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}")
    made.mkdir(mode=0o700)
    lock = lock_file(made / "hub")
    try:
        (made / "logs").mkdir(mode=0o700)
        for name in PARTS:
            if durable is None:
                (made / name).mkdir(mode=0o700)
            else:
                (made / name).symlink_to(durable / name)
        (made / ADDRESS).touch(0o600)
        (made / ADDRESS).write_bytes(msgspec.msgpack.encode(address))
        _put_in_place(made, folder, address.name)
    except BaseException:
        lock.close()
        shutil.rmtree(made, ignore_errors=True)
        raise
    _ours.add(folder)
    return lock


def _put_in_place(made: Path, folder: Path, name: str) -> None:
    """Let a folder appear whole and locked; wait until the supervisor of a dead hub of that name has ended.

    Raises HubExists.
    """
    deadline = time.monotonic() + FRESH
    while True:
        try:
            made.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise StartFailed(f"{folder} cannot be made ({error.strerror}): choose another name, if it is another user's") from error
        if folder in _ours or _is_led(folder) or time.monotonic() > deadline:
            found = address_in(folder)
            pid = found.pid if found is not None else "unknown"
            raise HubExists(f"name: a hub of this user is called {name!r}, that of process {pid}: stop that first, or choose another name")
        _sweep_one(folder)
        time.sleep(0.02)


def remove_folder(folder: Path, lock: IO[bytes], within: float = 1.0) -> None:
    """Remove what is left of a runtime folder, once its supervisor is gone, and let others have its name."""
    deadline = time.monotonic() + within
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
    _ours.discard(folder)
    lock.close()


def _is_led(folder: Path) -> bool:
    """Say whether the process of a folder's hub lives."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder / "hub")
            lock_file(folder / "hub").close()
    except BlockingIOError:
        return True
    return False


def address_in(folder: Path) -> Address | None:
    """Return whose a runtime folder is, if it is one."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return _address.decode((folder / ADDRESS).read_bytes())
    return None


def let_find(address: Address) -> None:
    """Let other programs find a hub: all that it has to begin with is subscribed."""
    Path(address.folder, OPEN).touch()


def own_folders(parent: Path, hidden: str = "") -> Iterator[Path]:
    """Yield runtime folders of this user; a link of another user's leads anywhere."""
    for folder in parent.glob(f"{hidden}mphub-{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                yield folder


def own(folder: Path) -> IO[bytes]:
    """Lock a folder as its owner, or as the heir of its dead owner.

    The file appears locked, so that an unlocked one always means a dead owner. Raises BlockingIOError: the owner lives.
    """
    heir = (folder / "owner").exists()
    lock = lock_file(folder / ("owner" if heir else "owner.new"))
    os.set_inheritable(lock.fileno(), False)
    if not heir:
        (folder / "owner.new").rename(folder / "owner")
    return lock


def sweep(parent: Path) -> None:
    """Remove the folders of this user's dead hubs, and what their subscribers had started."""
    for folder in own_folders(parent):
        if folder not in _ours:
            _sweep_one(folder)
    for folder in own_folders(parent, hidden="."):  # half made
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > FRESH:
                shutil.rmtree(folder, ignore_errors=True)


def _sweep_one(folder: Path) -> None:
    """Remove a folder if both its hub's process and its supervisor are dead; between two supervisors only one is."""
    with contextlib.suppress(OSError), lock_file(folder / "hub"), lock_file(folder / "owner"):  # or another one sweeps it
        kill_recorded(folder)
        shutil.rmtree(folder, ignore_errors=True)


def take_over(path: Path, *, synced: bool = False) -> DurableFolder:
    """Take a durable hub's folder from its last owner, and end what that has left; ``synced``: this run syncs each commit.

    Raises HubExists, InvalidOption, JournalError.
    """
    folder = DurableFolder(path, synced=synced)
    try:
        if folder.was_cut_off:
            folder.forget_processes()
            check_journal(path)
            if not folder.was_synced:
                log.warning(
                    "%s: the machine was started anew since this hub's last run, without durability='power': "
                    "its journal can be read, but what was accepted last may be missing",
                    path,
                )
            folder.note_whole()
        kill_recorded(path)
    except BaseException:
        folder.close()
        raise
    return folder


def kill_recorded(folder: Path, within: float = 2.0) -> None:
    """Kill the sessions of all children that a dead supervisor has recorded, and wait until they are gone, at most some seconds."""
    deadline = time.monotonic() + within
    ended: set[int] = set()
    for pid, ticks in recorded(folder):
        while fork.start_ticks(pid) in (0, ticks):  # not a number that was given out anew
            ended |= {pid, *fork.kill_session(pid)}
            if fork.is_gone(pid, ticks) or time.monotonic() > deadline:
                break
            time.sleep(0.001)
    for pid in ended:
        with contextlib.suppress(ChildProcessError):  # mostly; but a hub that is init has its supervisor's orphans
            os.waitpid(pid, 0)


def recorded(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield (pid, start time) of the processes that are on record: the supervisor first, which would start others anew."""
    for record in sorted((folder / "children").glob("*"), key=lambda record: record.name != SUPERVISOR):
        with contextlib.suppress(OSError, ValueError):
            pid, ticks = map(int, record.read_text().split())
            yield pid, ticks


def launch(charter: Charter) -> subprocess.Popen[bytes]:
    """Start a supervisor and wait until it listens.

    Raises StartFailed with its last words.
    """
    with contextlib.ExitStack() as ends:
        (reader, writer), (answer, told) = _pipe(ends), _pipe(ends)
        process = _run_supervisor(reader, told)
        with contextlib.suppress(BrokenPipeError), writer:  # it has died already, and said why
            writer.write(msgspec.msgpack.encode((charter, [os.fsencode(entry) for entry in sys.path])))
        said = answer.read(len(STARTED))
        if said != STARTED:
            _explain(process, (said + answer.read()).decode(errors="replace"))
    return process


def _pipe(ends: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = map(above_standard, os.pipe())
    return ends.enter_context(open(reader, "rb")), ends.enter_context(open(writer, "wb"))


def above_standard(number: int) -> int:
    """Move a descriptor that has got the number of a closed standard stream."""
    if number > 2:
        return number
    moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(number)
    return moved


def _run_supervisor(reader: IO[bytes], told: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the interpreter; its ends of the pipes are closed here."""
    with reader, told:
        ends = (reader.fileno(), told.fileno())
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path[:0] = [{root!r}]; from mphub.procs import boot; boot.main{ends}"
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        # not -m: that would run a selectors.py of the user's; not multiprocessing: that would run the user's script
        command = [sys.executable, *flags, "-P", "-c", code, "mphub.procs.boot"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=ends, start_new_session=True)


def _explain(process: subprocess.Popen[bytes], said: str) -> None:
    process.kill()
    process.wait()
    if said.startswith("exists"):
        raise HubExists(said)
    raise StartFailed(f"the hub's supervisor did not start (exit {process.returncode}): {said or 'it said nothing'}")


def main(reader: int, told: int) -> None:
    """Be the supervisor, in the fresh interpreter."""
    fork.begin_afresh()
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    try:
        charter, path = msgspec.msgpack.decode(said, type=tuple[Charter, list[bytes]])
    except msgspec.DecodeError:
        os._exit(1)  # the hub has died while it spoke
    sys.path[:] = [os.fsdecode(entry) for entry in path if entry] + sys.path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the hub's business
    from mphub.procs.supervisor import Supervisor  # the template: what it imports, no child imports again

    with os.fdopen(told, "wb", buffering=0) as pipe:
        try:
            supervisor = Supervisor(charter)
        except BaseException as error:
            pipe.write(f"{type(error).__name__}: {error}".encode(errors="backslashreplace"))
            raise SystemExit(1) from None
        with contextlib.suppress(BrokenPipeError):  # the hub has died meanwhile: the supervisor sees that itself
            pipe.write(STARTED)
    supervisor.run()
    os._exit(0)


def memory_limit() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its cgroup's if less."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total


def cpu_limit() -> int:
    """Return how many cores this process may use: its affinity, or its cgroup's quota if less."""
    cores = len(os.sched_getaffinity(0))
    root = Path("/sys/fs/cgroup")
    for files in ([root / "cpu.max"], [root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # none, or no limit: "max"
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
            if quota > 0:
                cores = min(cores, max(1, quota // period))
    return cores


def capacity(folder: Path, *, durable: bool = False) -> int:
    """Return what a percentage of ``max_bytes`` is of: the disk or memory that holds the folder (or will)."""
    space = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    size = space.f_blocks * space.f_frsize
    return size if durable else min(size, memory_limit())
