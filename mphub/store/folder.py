"""A durable hub's folder: what is in it, whose it is, and whether this version may use it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec
import psutil

from mphub.errors import HubExists, InvalidOption, JournalError
from mphub.store.blobs import sync_path
from mphub.store.journal import FORMAT, lock_file

PARTS: Final = ("journal", "blobs", "boards", "children")
"""Its folders; what else a hub has on disk lives no longer than its processes."""
OUR_FILES: Final = {"format", "format.new", "lock", "owner", "owner.new", *PARTS}
NETWORKED: Final = {
    "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs3", "nfs4",
    "smb2", "smb3", "smbfs",
}  # fmt: skip
"""File systems whose locks and maps other machines do not see in time: two hubs would write one journal."""
_open_here: set[Path] = set()
"""Folders of this process's hubs: a lock does not keep its own process out."""
os.register_at_fork(after_in_child=_open_here.clear)


class Owner(msgspec.Struct, frozen=True):
    """Who has a folder, or had it last."""

    pid: int
    boot: str
    """Names the time since the machine was started: what was only in memory then is gone."""
    synced: bool = False
    """It put each commit on the disk."""


class DurableFolder:
    """A folder that is this process's for as long as it is open."""

    def __init__(self, path: Path, *, synced: bool = False) -> None:
        """Take a folder, making it if there is none; ``synced``: this owner puts each commit on the disk.

        Raises HubExists: another hub has it; JournalError: it is no hub's, a newer version's, not on a local disk, or cannot be written.
        """
        self.path, self.synced = path, synced
        self.was_synced = True
        """All that was in its journal before is on the disk."""
        check_kind(path)
        with saying(path):
            make(path)
            self._check_format()
            refuse_network(path)
            self._lock = self._take()
        try:
            with saying(path):
                self.was_cut_off = self._enter()
        except BaseException:
            self.close()
            raise

    def _check_format(self) -> None:
        """Refuse what this version must not touch."""
        found = read(self.path / "format")
        if found is None and (others := set(os.listdir(self.path)) - OUR_FILES):
            raise JournalError(
                f"path: {self.path} has files that are no hub's ({', '.join(sorted(others)[:3])}): choose a folder of its own"
            )
        if found is not None and found != FORMAT:
            raise JournalError(
                f"path: {self.path} has format {found.decode(errors='replace')!r}; this mphub reads {FORMAT.decode()!r}: "
                f"use the version that wrote it (nothing was changed)"
            )

    def _take(self) -> IO[bytes]:
        try:
            if self.path in _open_here:
                raise BlockingIOError
            lock = lock_file(self.path / "lock")
        except BlockingIOError:
            pid = owner.pid if (owner := self._owner()) is not None else "unknown"
            raise HubExists(f"path: the hub of process {pid} has {self.path}: stop that first, or choose another folder") from None
        _open_here.add(self.path)
        return lock

    def _enter(self) -> bool:
        """Make what is missing, and note whose it is; say whether its last owner may have ended with the whole machine."""
        is_new = not (self.path / "journal").exists()
        before = Owner(0, boot_id()) if is_new else self._owner() or Owner(0, "unknown")
        for name in PARTS:
            make(self.path / name)
        if read(self.path / "format") != FORMAT:
            write(self.path / "format", FORMAT)
        self.was_synced = is_new or before.synced
        self._note_owner(before.boot, self.synced and self.was_synced)
        return before.boot != boot_id()

    def note_whole(self) -> None:
        """Note that what the end of the machine may have damaged has been read; until then each start does that."""
        with saying(self.path):
            self._note_owner(boot_id(), self.synced)

    def _note_owner(self, boot: str, synced: bool) -> None:
        write(self.path / "owner", msgspec.json.encode(Owner(os.getpid(), boot, synced)))

    def _owner(self) -> Owner | None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((self.path / "owner").read_bytes(), type=Owner)
        return None

    def forget_processes(self) -> None:
        """Remove what tells of processes that ended with the machine: what they noted last may never have reached the disk."""
        for part in ("boards", "children"):
            for file in (self.path / part).iterdir():
                file.unlink()

    def close(self) -> None:
        """Let others have it."""
        _open_here.discard(self.path)
        self._lock.close()


@contextlib.contextmanager
def kept_out(path: Path) -> Iterator[None]:
    """Keep hubs out of a folder that is read, without a change to it.

    Raises HubExists: one has it.
    """
    busy = HubExists(f"{path}: a hub runs on that folder: stop it first")
    if path in _open_here:  # to open its lock here would end it
        raise busy
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            lock = stack.enter_context(open(path / "lock", "rb"))
            try:
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
        yield


def check_kind(path: Path) -> None:
    """Refuse what cannot be a folder.

    Raises InvalidOption.
    """
    if path.exists() and not path.is_dir():
        raise InvalidOption(f"path: got {str(path)!r}, which is a file; expected a folder for the hub's journal")


def refuse_network(path: Path) -> None:
    """Raise JournalError if a folder is on a file system of another machine."""
    kind = kind_of(path, [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)])
    if kind in NETWORKED:
        raise JournalError(
            f"path: {path} is on a network file system ({kind}), whose locks and maps do not hold across machines: choose a local disk"
        )


def kind_of(path: Path, mounts: list[tuple[str, str]]) -> str:
    """Return the file system of a path, from (mount point, kind)."""
    around = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(around, default=(0, ""))[1]


@contextlib.contextmanager
def saying(path: Path) -> Iterator[None]:
    """Say what about a folder the machine refuses."""
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"path: {path} cannot be used: {error.strerror or error}; expected a folder that this user can write to"
        ) from error


def boot_id() -> str:
    """Return what names the time since the machine was started."""
    found = read(Path("/proc/sys/kernel/random/boot_id"))
    return found.decode().strip() if found is not None else f"{psutil.boot_time():.0f}"


def read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def write(path: Path, data: bytes) -> None:
    """Put a file in place whole, and on the disk: a power loss leaves the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    sync_path(new)
    new.rename(path)
    sync_path(path.parent)


def make(path: Path) -> None:
    """Make a folder and those above it that are missing, and put on the disk that they are there."""
    if not path.is_dir():
        make(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync_path(path.parent)
