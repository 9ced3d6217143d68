"""Blob files: what reaches 64 KiB is written once and mapped by whoever reads it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from mphub.wire.frames import BLOB_MIN


class Blobs:
    """The folder of blob files; a name is ``<writer>-<n>``, so that a dead writer's leftovers can be found."""

    def __init__(self, folder: str | os.PathLike[str], writer: int = 0) -> None:
        self.folder = Path(folder)
        self.writer = f"{writer:016x}"
        self._made = 0

    def write(self, data: bytes) -> str:
        """Write a file whole and return its name."""
        self._made += 1
        name = f"{self.writer}-{self._made}"
        path = self.folder / name
        try:
            with open(path, "xb") as file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return name

    def spill(self, data: bytes) -> tuple[bytes, str | None]:
        """Return (data, None) if it is small, else (b"", name of its file)."""
        return (data, None) if len(data) < BLOB_MIN else (b"", self.write(data))

    def read(self, name: str) -> memoryview:
        """Map a file privately: writable, nothing copied that is not written, the file unchanged."""
        with open(self.folder / checked(name), "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))

    def size(self, name: str) -> int:
        """Return its bytes; FileNotFoundError if a frame names what does not exist."""
        return (self.folder / checked(name)).stat().st_size

    def remove(self, name: str) -> None:
        (self.folder / checked(name)).unlink(missing_ok=True)

    def of_writer(self, writer: int) -> list[str]:
        """List what one writer left."""
        prefix = f"{writer:016x}-"
        return [entry.name for entry in os.scandir(self.folder) if entry.name.startswith(prefix)]


def checked(name: str) -> str:
    """Refuse a name that leaves the folder."""
    if "/" in name or name in (".", "..", ""):
        raise ValueError(f"{name!r} is no name of a blob")
    return name
