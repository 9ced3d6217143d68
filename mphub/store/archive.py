"""Archives: subscribers that write every event to a file, each exactly once, whichever process dies.

    hub.subscribe(">", SqliteArchive("events.db"), name="archive", batch=Batch(1000, 0.2))

An event has its id (26 hex digits), when it was published (seconds since the epoch), its key, its headers if it has any, and its payload as
JSON. A payload that JSON cannot say (bytes, an array, an object) has its ``repr`` there, cut to 1,000 characters, and its pickle beside it
as ``data``. JSON says less than Python: tuples and sets become arrays, dataclasses objects, times ISO 8601, NaN null, and bytes inside of
something base64.

This module stands above the rest of ``store/``: it uses what any user's subscriber does.
"""

from __future__ import annotations

import base64
import fcntl
import gzip as gzips
import mmap
import os
import re
import shutil
import sqlite3
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain
from typing import IO, Any, Final, NamedTuple

import msgspec

from mphub.errors import ArchiveError, InvalidOption
from mphub.options import parse_size
from mphub.subscriber import Subscriber, current_heads
from mphub.wire import codec

MOST_CHARS: Final = 1000
"""Of a ``repr``."""
PATIENCE: Final = 30.0
"""Seconds that a file is waited for that somebody else writes: the process of a hub that was killed may end a little later than that."""
_json: Final = msgspec.json.Encoder().encode


class Entry(NamedTuple):
    """One event as it is kept."""

    id: str
    time: float
    key: str
    headers: str | None
    """JSON, as is the payload."""
    payload: str
    data: bytes | None
    """The payload pickled, if JSON cannot say it."""


def entries_of(payloads: list[Any]) -> list[Entry]:
    """Describe the events that are being handled."""
    return [
        Entry(f"{number:026x}", time, key, _json(headers).decode() if headers else None, *as_json(payload))
        for (number, key, time, headers), payload in zip(current_heads(), payloads, strict=True)
    ]


def as_json(payload: object) -> tuple[str, bytes | None]:
    """Return a payload as JSON; its ``repr`` and its pickle if that cannot be."""
    if isinstance(payload, bytes | bytearray | memoryview):
        return _described(payload)  # JSON would take it for text
    try:
        return _json(payload).decode(), None
    except Exception:  # whatever a class of the user's raises when it is looked at
        return _described(payload)


def _described(payload: object) -> tuple[str, bytes]:
    return _json(codec.shortened(codec.repr_of(payload), MOST_CHARS)).decode(), codec.encode(payload)


class Archive(Subscriber[Any, None]):
    """What archives have in common. They answer no request, but for one ``to=`` them: with None, once it is written."""

    answers = False

    def __init__(self, path: str | os.PathLike[str], *, sync: bool) -> None:
        self.path = _checked_path(type(self).__name__, path)
        self.sync = _checked_bool(type(self).__name__, "sync", sync)

    def setup(self) -> None:
        """Refuse a place where nothing can be written.

        Raises ArchiveError.
        """
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise self.error(f"there is no folder {folder}: make it first")
        if os.path.isdir(self.path):
            raise self.error("it is a folder; expected the name of a file")

    def handle_batch(self, payloads: list[Any]) -> list[None]:
        """Write the events of a batch.

        Raises ArchiveError: none of them is written.
        """
        self.write(entries_of(payloads))
        return [None] * len(payloads)

    @abstractmethod
    def write(self, entries: list[Entry]) -> None:
        """Keep all of them or none, but for those that are kept already."""

    def error(self, reason: object) -> ArchiveError:
        return ArchiveError(f"{type(self).__name__}({self.path}): {reason}")


def _checked_path(owner: str, path: str | os.PathLike[str]) -> str:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path) or "\0" in os.fspath(path):
        raise InvalidOption(f"{owner}(path): got {path!r:.80}; expected the path of a file, as str or Path")
    return os.path.abspath(path)


def _checked_bool(owner: str, field: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise InvalidOption(f"{owner}({field}): got {value!r:.80}; expected True or False")
    return value


# -- SQLite

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS events (
    id TEXT NOT NULL PRIMARY KEY,
    time REAL NOT NULL,
    key TEXT NOT NULL,
    headers TEXT,
    payload TEXT NOT NULL,
    data BLOB
);
CREATE INDEX IF NOT EXISTS events_by_key ON events (key, time);
CREATE INDEX IF NOT EXISTS events_by_time ON events (time);
"""
TOGETHER: Final = 100
"""Rows of one statement, which take three fifths of the time that they take with one each (2.6 us against 4.4)."""


def inserting(rows: int) -> str:
    values = ", ".join(["(?, ?, ?, ?, ?, ?)"] * rows)
    return f"INSERT INTO events (id, time, key, headers, payload, data) VALUES {values} ON CONFLICT (id) DO NOTHING"


INSERT_ONE, INSERT_MANY = inserting(1), inserting(TOGETHER)


class SqliteArchive(Archive):
    """Keeps events in a SQLite database (in WAL mode, so that others read while it writes), a row each in the table ``events``.

    A batch is one transaction, and an id that is there is not written again. What is committed outlives every process; a power failure
    takes the last transactions back, unless with ``sync=True`` each is on the disk before its events count as handled. Replicas and other
    programs may write to the same file; it must not be on a network's file system. Raises InvalidOption.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = False) -> None:
        super().__init__(path, sync=sync)

    def setup(self) -> None:
        super().setup()
        try:
            with closing(self._connect()) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(SCHEMA)
                database.executemany(INSERT_ONE, [])  # refuses a table of somebody else's
            self._database = self._connect()
            self._database.execute(f"PRAGMA synchronous = {'FULL' if self.sync else 'NORMAL'}")
        except sqlite3.Error as error:
            raise self.error(f"{error}; expected a database of events, or a path where one can be made") from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=PATIENCE, check_same_thread=False)  # nor do threads use it at the same time

    def write(self, entries: list[Entry]) -> None:
        whole = len(entries) - len(entries) % TOGETHER
        try:
            with self._database:
                for first in range(0, whole, TOGETHER):
                    self._database.execute(INSERT_MANY, list(chain.from_iterable(entries[first : first + TOGETHER])))
                self._database.executemany(INSERT_ONE, entries[whole:])
        except sqlite3.Error as error:
            raise self.error(f"{error}; nothing of the batch was written") from error

    def teardown(self) -> None:
        self._database.close()


# -- JSON Lines

WINDOW: Final = 16384
"""Events that can come again after a death: those that a process holds at most."""
HEAD: Final = len('{"id":"')
ID: Final = slice(HEAD, HEAD + 26)
"""Where the id is in a line."""
GZIP: Final = b"\x1f\x8b"
"""A compressed file begins like this."""
CHUNK: Final = 1 << 20


class Line(msgspec.Struct, omit_defaults=True):
    """One event as a line of JSON."""

    id: str
    time: float
    key: str
    payload: msgspec.Raw
    headers: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    data: str | msgspec.UnsetType = msgspec.UNSET
    """Base64."""

    @classmethod
    def of(cls, entry: Entry) -> Line:
        line = cls(entry.id, entry.time, entry.key, msgspec.Raw(entry.payload))
        if entry.headers is not None:
            line.headers = msgspec.Raw(entry.headers)
        if entry.data is not None:
            line.data = base64.b64encode(entry.data).decode()
        return line


class JsonLinesArchive(Archive):
    """Keeps events in a file, a line of JSON each.

    Before ``events.jsonl`` grows beyond ``max_bytes`` it becomes ``events.000001.jsonl``, and is then compressed beside the work, to
    ``events.000001.jsonl.gz``. After a death a torn last line is cut off, and what the last 16,384 lines have is not written again. What is
    written outlives every process; a power failure takes the last lines back, unless with ``sync=True`` a batch is on the disk before its
    events count as handled. One process writes a file: no replicas. Raises InvalidOption.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int | str = "100MB", gzip: bool = True, sync: bool = False
    ) -> None:  # fmt: skip
        super().__init__(path, sync=sync)
        self.max_bytes = parse_size(max_bytes, "JsonLinesArchive(max_bytes)")
        self.gzip = _checked_bool("JsonLinesArchive", "gzip", gzip)
        self._file: IO[bytes] | None = None
        self._size = 0
        self._written: frozenset[str] = frozenset()
        """Ids that may come again."""
        self._compressing: threading.Thread | None = None

    def setup(self) -> None:
        """See that the file can be written; the process before this one may still do so."""
        super().setup()
        if self.replica:
            raise self.error(f"replica {self.replica} of {self.name!r} cannot write it too: subscribe it with replicas=1")
        self._open().close()

    def write(self, entries: list[Entry]) -> None:
        if self._file is None:
            self._file = self._take_up()
        data = b"".join(_json(Line.of(entry)) + b"\n" for entry in entries if entry.id not in self._written)
        if self._size and self._size + len(data) > self.max_bytes:
            self._file = self._rotate()
        self._append(self._file, data)

    def teardown(self) -> None:
        self._close()
        if self._compressing is not None:
            self._compressing.join()

    # -- the file that is written

    def _open(self) -> IO[bytes]:
        try:
            return open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise self.error(f"{error.strerror}; expected a path where a file can be made and written") from error

    def _locked(self) -> IO[bytes]:
        """Open the file for this process alone.

        Raises ArchiveError.
        """
        file, deadline = self._open(), time.monotonic() + PATIENCE
        while not has_lock(file):
            if time.monotonic() >= deadline:
                file.close()
                raise self.error("another process writes it: give each archive a file of its own")
            time.sleep(0.02)
        self._size = file.seek(0, os.SEEK_END)
        return file

    def _take_up(self) -> IO[bytes]:
        """Open the file and mend what a death has left."""
        file = self._locked()
        self._size = end_of_lines(file.fileno(), self._size)
        file.truncate(self._size)
        rotated = Rotated(self.path)
        rotated.mend()
        self._written = frozenset(last_ids([self.path, *rotated.newest_first()]))
        self._compress(rotated)
        return file

    def _append(self, file: IO[bytes], data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            if self.sync:
                os.fdatasync(file.fileno())
        except OSError as error:
            self._close()  # the next batch takes it up again, as after a death
            os.truncate(self.path, self._size)
            raise self.error(f"{error.strerror}; nothing of the batch was written") from error
        self._size += len(data)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rotate(self) -> IO[bytes]:
        rotated = Rotated(self.path)
        try:
            os.rename(self.path, rotated.next_name())
        except OSError as error:
            raise self.error(f"cannot be rotated: {error.strerror}; nothing of the batch was written") from error
        self._close()
        self._compress(rotated)
        return self._locked()

    def _compress(self, rotated: Rotated) -> None:
        """Compress what has been rotated, beside the work: it takes a second for 30 MB."""
        if self._compressing is not None:
            self._compressing.join()
        if self.gzip:
            self._compressing = threading.Thread(target=self._compress_all, args=(rotated,), name="mphub-gzip", daemon=True)
            self._compressing.start()

    def _compress_all(self, rotated: Rotated) -> None:
        try:
            rotated.compress()
        except OSError as error:
            self.log.warning("%s; it stays as it is until the next start", self.error(f"cannot be compressed: {error.strerror}"))


class Rotated:
    """The files that stand behind the one that is written: ``events.000001.jsonl`` or ``events.000001.jsonl.gz`` of ``events.jsonl``."""

    def __init__(self, path: str) -> None:
        self._folder, name = os.path.split(path)
        self._root, self._suffix = os.path.splitext(name)
        self._pattern = re.compile(rf"{re.escape(self._root)}\.(\d{{6,}}){re.escape(self._suffix)}(\.gz|\.tmp)?")

    def _found(self, *endings: str | None) -> list[tuple[int, str]]:
        found = map(self._pattern.fullmatch, os.listdir(self._folder))
        return sorted((int(each[1]), os.path.join(self._folder, each[0])) for each in found if each and each[2] in endings)

    def newest_first(self) -> list[str]:
        return [path for _, path in reversed(self._found(None, ".gz"))]

    def next_name(self) -> str:
        last = max((number for number, _ in self._found(None, ".gz")), default=0)
        return os.path.join(self._folder, f"{self._root}.{last + 1:06d}{self._suffix}")

    def mend(self) -> None:
        """Finish or undo what a death has interrupted."""
        for _, path in self._found(".tmp"):
            os.unlink(path)
        for _, path in self._found(None):
            if is_compressed(path):
                os.rename(path, f"{path}.gz")

    def compress(self) -> None:
        """Put compressed files in place of plain ones; at every moment there is one of both."""
        for _, path in self._found(None):
            temporary = f"{path}.tmp"
            try:
                with open(path, "rb") as plain, open(temporary, "wb") as file:
                    with gzips.GzipFile(os.path.basename(path), "wb", fileobj=file, compresslevel=6) as packed:
                        shutil.copyfileobj(plain, packed, CHUNK)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise
            os.replace(temporary, path)
            os.rename(path, f"{path}.gz")


def has_lock(file: IO[bytes]) -> bool:
    """Take the lock of a file that ends with its process, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(GZIP)) == GZIP


def last_ids(newest_first: list[str], most: int = WINDOW) -> Iterator[str]:
    """Yield the ids of the last lines of several files."""
    for path in newest_first:
        ids = _ids_of_compressed(path, most) if is_compressed(path) else _ids_of_plain(path, most)
        yield from (each.decode(errors="replace") for each in ids)
        most -= len(ids)
        if most <= 0:
            return


def _ids_of_compressed(path: str, most: int) -> deque[bytes]:
    with gzips.open(path) as file:
        return deque((line[ID] for line in file), most)


def _ids_of_plain(path: str, most: int) -> list[bytes]:
    ids: list[bytes] = []
    with open(path, "rb") as file, mapped(file.fileno()) as data:
        end = len(data) - 1  # of the last line, without its newline
        while end > 0 and len(ids) < most:
            start = data.rfind(b"\n", 0, end) + 1
            ids.append(data[start:end][ID])
            end = start - 1
    return ids


def end_of_lines(file: int, size: int) -> int:
    """Return where the last whole line of a file ends."""
    with mapped(file) as data:
        return data.rfind(b"\n", 0, size) + 1


@contextmanager
def mapped(file: int) -> Iterator[mmap.mmap | bytes]:
    """Map a file to look at it from its end."""
    if not os.fstat(file).st_size:
        yield b""
        return
    with mmap.mmap(file, 0, prot=mmap.PROT_READ) as data:
        yield data
