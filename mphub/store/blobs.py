"""Blob files: what reaches 64 KiB is written once and mapped by whoever reads it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

from mphub import failpoints
from mphub.wire.codec import Parts
from mphub.wire.frames import BLOB_MIN

ROOM_EVERY = 0.05
"""Seconds between looks whether there is room on the disk again."""
ROOM_LEFT = 0.5
"""Share of the disk that must be free for files to be mapped."""
FULL = {errno.ENOSPC, errno.EDQUOT}
_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FAILED = ctypes.c_void_p(-1).value


class Blobs:
    """The folder of blob files; a name is ``<writer>-<n>``, so that a dead writer's leftovers can be found."""

    def __init__(self, folder: str | os.PathLike[str], writer: int = 0, *, patient: bool = False) -> None:
        self.folder, self.patient = Path(folder), patient
        self.number, self.writer = writer, f"{writer:016x}"
        self._made = time.time_ns()  # another object of the same writer takes no name twice

    def write(self, data: bytes | Parts) -> str:
        """Write a file whole and return its name; one that is patient waits while the disk is full."""
        name = self._new_name()
        while True:
            try:
                self._write(self.folder / name, data)
                failpoints.hit("blobs.written")
                return name
            except OSError as error:
                if not self.patient or error.errno not in FULL:
                    raise
            time.sleep(ROOM_EVERY)

    def _new_name(self) -> str:
        self._made += 1
        return f"{self.writer}-{self._made}"

    def _write(self, path: Path, data: bytes | Parts) -> None:
        pieces = data.pieces if isinstance(data, Parts) else [data]
        try:
            with open(path, "xb", buffering=0) as file:
                failpoints.hit("blobs.half_written", file.write, pieces[-1])
                for piece in pieces:
                    write_all(file, piece)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def spill(self, data: bytes | Parts) -> tuple[bytes, str | None]:
        """Return (data, None) if it is small, else (b"", name of its file)."""
        if isinstance(data, bytes) and len(data) < BLOB_MIN:
            return data, None
        return b"", self.write(data)

    def read(self, name: str) -> memoryview:
        """Map a file privately: writable, nothing copied that is not written, the file unchanged.

        While room is short it is copied: what is kept of a map keeps the removed file's room.
        """
        with open(self.folder / checked(name), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return memoryview(b"")
            if not self._has_room():
                return self._copy(file, size)
            return private_map(file.fileno(), size)

    def copy(self, name: str) -> memoryview:
        """Return a copy of a file: for who may keep many."""
        with open(self.folder / checked(name), "rb", buffering=0) as file:
            return self._copy(file, os.fstat(file.fileno()).st_size)

    def _copy(self, file: io.FileIO, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        at = 0
        while at < size and (got := file.readinto(data[at:])):
            at += got
        return data

    def _has_room(self) -> bool:
        space = os.statvfs(self.folder)
        return space.f_bavail > space.f_blocks * ROOM_LEFT

    def size(self, name: str) -> int:
        """Return its bytes; FileNotFoundError if a frame names what does not exist."""
        return (self.folder / checked(name)).stat().st_size

    def has(self, name: str) -> bool:
        return (self.folder / checked(name)).exists()

    def link(self, name: str) -> str:
        """Give a file one more name, under which it stays when the other is removed; return that."""
        other = self._new_name()
        os.link(self.folder / checked(name), self.folder / other)
        return other

    def remove(self, name: str) -> None:
        (self.folder / checked(name)).unlink(missing_ok=True)

    def sync(self, names: Iterable[str]) -> None:
        """Put files on the disk, and that they are there."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # of one that was refused for that
                sync_path(self.folder / checked(name))
        sync_path(self.folder)

    def of_writer(self, writer: int) -> list[str]:
        """List what one writer left."""
        prefix = f"{writer:016x}-"
        return [entry.name for entry in os.scandir(self.folder) if entry.name.startswith(prefix)]


def private_map(descriptor: int, size: int) -> memoryview:
    """Map a file copy-on-write. Python's own maps keep a descriptor each, and a handler may keep thousands."""
    address = _mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, 0)
    if address == MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    data = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(data, _munmap, address, size).atexit = False  # while a view is left, so is the map
    return memoryview(data).cast("B")


def sync_path(path: str | os.PathLike[str]) -> None:
    """Put a file on the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: io.FileIO, piece: bytes | memoryview) -> None:
    """Write without a copy; a disk that fills up takes a part, and says so with the next one."""
    left = memoryview(piece).cast("B")
    while left:
        left = left[file.write(left) :]


class References:
    """Who still needs which blob: a file goes after the commit that ends the last reference to it."""

    def __init__(self, blobs: Blobs, *, synced: bool = False, kept: Callable[[str], bool] = lambda _: False) -> None:
        """``synced``: they are on the disk before the commit that names them. ``kept``: which files stay though nobody refers to them."""
        self.blobs, self.synced = blobs, synced
        self.bytes = 0
        self.new: list[str] = []
        """Files that this turn is the first to name, if that matters."""
        self._held: dict[str, tuple[int, int]] = {}
        """name -> (references, bytes)."""
        self._of_row: dict[int, str] = {}
        self._is_kept = kept
        self.ended: list[str] = []
        """Files that go after the commit."""

    def hold(self, name: str | None) -> None:
        """Count one more reference, if there is a blob at all."""
        if name is None:
            return
        count, size = self._held.get(name, (0, 0))
        if not count:
            size = self._size(name)
            self.bytes += size
            if self.synced:
                self.new.append(name)
        self._held[name] = (count + 1, size)

    def hold_for(self, row: int, name: str | None) -> None:
        """Count a reference that ends with ``release(row)``."""
        if name is not None:
            self._of_row[row] = name
            self.hold(name)

    def release(self, row: int) -> None:
        self.drop(self._of_row.pop(row, None))

    def drop(self, name: str | None) -> None:
        """End one reference."""
        if name is None:
            return
        count, size = self._held.pop(name, (1, 0))
        if count > 1:
            self._held[name] = (count - 1, size)
        else:
            self.bytes -= size
            self.let_go(name)

    def let_go(self, name: str) -> None:
        """Let a file go with the next commit, unless it is needed."""
        if name not in self._held and not self._is_kept(name):
            self.ended.append(name)

    def end(self, name: str | None) -> None:
        """Let a file that nothing refers to go with the next commit."""
        if name is not None:
            self.ended.append(name)

    def end_of_writer(self, writer: int) -> None:
        """Let go what a dead writer left and nothing refers to."""
        for name in self.blobs.of_writer(writer):
            self.let_go(name)

    def sync(self) -> None:
        """Put on the disk what is named for the first time; to be called before the commit."""
        if self.new:
            self.blobs.sync(self.new)
            self.new.clear()

    def sweep(self) -> None:
        """Remove the files whose last reference has ended; to be called after the commit."""
        for name in self.ended:
            self.blobs.remove(name)
        self.ended.clear()

    def _size(self, name: str) -> int:
        try:
            return self.blobs.size(name)
        except OSError:
            return 0


def checked(name: str) -> str:
    """Refuse a name that leaves the folder."""
    if "/" in name or name in (".", "..", ""):
        raise ValueError(f"{name!r} is no name of a blob")
    return name
