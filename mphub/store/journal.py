"""The journal: every accepted event, its progress per subscriber, outputs, replies, snapshots and counters.

``Journal`` is LMDB and is opened by the router alone: a frozen or dead reader of an LMDB file wedges or fills it. ``MemoryJournal`` keeps
the same tables in dictionaries, for the inline engine.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol

import lmdb
import msgspec

from mphub.core.rows import Place
from mphub.errors import JournalError
from mphub.store.blobs import sync_path
from mphub.wire.frames import Batch

TABLES: Final = (
    "meta",
    "rows",
    "singles",
    "progress",
    "subscribers",
    "dead",
    "replies",
    "publishers",
    "frames",
    "snapshots",
    "history",
    "history_keys",
    "history_names",
    "history_ends",
    "history_blobs",
)
BOOKS: Final = {"meta": b"\0m", "subscribers": b"\0s", "publishers": b"\0p", "frames": b"\0f"}
"""Tables with a row for each process or subscriber, written in every turn: small and few, they do not count as used.

Their rows stand in LMDB's main database, under these prefixes: a page of that is written in every commit anyway.
"""
HISTORY: Final = {"history", "history_keys", "history_names", "history_ends", "history_blobs"}
"""Tables that have a bound of their own."""
UNCOUNTED: Final = {*BOOKS, *HISTORY}
"""Tables whose room is no part of what is used."""
FORMAT: Final = b"1"
SHORTAGES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN}


KEY_ROW: Final = 64
"""Bytes of an entry that says which row of history has a key."""
NO_PLACE: Final[Place] = (0, 0)
"""The place of what history has not."""


class Stored(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A row: the events of one frame as they came, and whom each is for, decided once, at acceptance."""

    epoch: int
    batch: Batch
    matched: dict[int, list[tuple[int, int]] | None]
    """subscriber number -> spans of its events (None: all)."""
    body: bytes
    crowds: dict[int, list[tuple[int, int, int]]] = {}
    """number of a process that several share -> (first event, end, for which of them): there the spans above are of pairs."""
    origin: int = 0
    """The row of history that this repeats."""


class Single(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One event cut out for one subscriber: it outlives its batch, as it is delayed or came back from the dead."""

    epoch: int
    batch: Batch
    body: bytes
    attempt: int
    due: float
    origin: Place = NO_PLACE


class Progress(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What is unfinished of a row that is not as it was accepted."""

    todo: list[tuple[int, int]]
    attempts: dict[int, int]


class Counters(msgspec.Struct, array_like=True, gc=False):
    """One subscriber's books; they add up: accepted = handled + dead + dropped + what is pending."""

    accepted: int = 0
    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    seconds: float = 0.0
    dropped: dict[str, int] = {}
    pending: dict[int, int] = {}
    """epoch -> events neither handled, dead nor dropped."""

    @property
    def unfinished(self) -> int:
        return sum(self.pending.values())

    def take_in(self, epoch: int, count: int) -> None:
        self.accepted += count
        self.pending[epoch] = self.pending.get(epoch, 0) + count

    def settle(self, epoch: int, count: int) -> None:
        """Take events off what is pending."""
        left = self.pending[epoch] - count
        if left:
            self.pending[epoch] = left
        else:
            del self.pending[epoch]

    def public(self) -> dict[str, Any]:
        """Return a copy of what statistics tell."""
        fields = msgspec.structs.asdict(self)
        del fields["pending"]
        return {**fields, "dropped": dict(self.dropped)}

    def drop(self, reason: str, count: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + count


class SubscriberState(msgspec.Struct, array_like=True, gc=False):
    """The row of a subscriber that is written in each turn that touches it."""

    number: int
    cursor: int
    """Everything in rows before this one is finished for it."""
    counters: Counters
    grants: list[tuple[float, int]] = []
    """Of a subscriber with a rate: when it was given how many events."""
    absent_since: float = 0.0
    """Seconds since the epoch; of one that nobody has subscribed in this run."""
    behind: int = 0
    """Of one that begins with the earliest event: the row of history that is next for it; 0 once it has all of them."""
    joined: int = 0
    """The first row that it has from its publishers, not from history."""
    former: list[int] = []
    """Numbers that it had before it was forgotten, under which history has it."""


class Dead(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A dead letter as it is kept; events of one frame that were never tried are kept together."""

    subscriber: str
    batch: Batch
    """Of these events alone."""
    body: bytes
    """An array of their pickles; empty if the one is a blob."""
    reason: str
    attempts: int
    at: float
    error: bytes = b""
    traceback: str = ""
    exit: str | int | None = None
    pid: int | None = None
    rss: int | None = None
    stderr: str = ""
    told: bool = False
    """Its failure was raised to the caller (inline), who knows."""
    left: list[tuple[int, int]] | None = None
    """Which of several are still dead letters (None: all)."""
    origin: Place = NO_PLACE
    """Of the first of them."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        return self.left or [(0, self.batch.count)]


class Past(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The events of one frame as history keeps them, whatever becomes of its row."""

    at: float
    """When they were accepted: seconds since the epoch, never less than that of the row before."""
    epoch: int
    batch: Batch
    matched: dict[int, list[tuple[int, int]] | None]
    """subscriber number -> spans of its events (None: all)."""
    body: bytes


class Lasting(Protocol):
    """What can be changed in turns."""

    def begin(self) -> None: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...


class Turn:
    """Commit all that happens inside, or nothing. A class: a generator costs three times as much, twice a round trip."""

    __slots__ = ("_of",)

    def __init__(self, of: Lasting) -> None:
        self._of = of

    def __enter__(self) -> None:
        self._of.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._of.abort()
            return
        try:
            self._of.commit()
        except BaseException:
            self._of.abort()
            raise


class Keeper(Lasting, Protocol):
    """What the exchange asks of a journal; all calls but ``turn`` belong inside a turn."""

    used: int
    synced: bool
    """A commit is on the disk when it returns."""

    def turn(self) -> Turn: ...
    def get(self, table: str, key: bytes) -> bytes | None: ...
    def put(self, table: str, key: bytes, value: bytes) -> None: ...
    def append(self, table: str, key: bytes, value: bytes) -> None: ...
    def delete(self, table: str, key: bytes) -> None: ...
    def scan(self, table: str, start: bytes = b"", end: bytes | None = None) -> Iterator[tuple[bytes, bytes]]: ...
    def close(self) -> None: ...


class Journal:
    """LMDB, one database per kind of row and one for all books, one transaction per turn."""

    def __init__(
        self, folder: str | os.PathLike[str], max_bytes: int, wait: Callable[[], None] | None = None, *, synced: bool = False,
        history: int = 0,
    ) -> None:  # fmt: skip
        """Open a journal, or make one; ``synced``: a commit is on the disk when it returns; ``history``: bytes of that beside the rest."""
        self.folder, self.synced = Path(folder), synced
        self._wait = wait
        """What to do before a commit that the disk has no room for is tried again (None: raise)."""
        self._changes: list[tuple[Any, bytes, bytes | None]] = []
        """Of this turn: (database, key, value or None)."""
        self._lock = lock_file(self.folder / "journal.lock")
        # no writemap: a full tmpfs would be a SIGBUS; no lock file: nobody else may open it
        self._env = lmdb.open(
            str(self.folder),
            map_size=2 * (max_bytes + history) + size_of(self.folder / "data.mdb") + (64 << 20),
            max_dbs=len(TABLES),
            sync=synced,
            metasync=synced,
            lock=False,
        )
        sync_path(self.folder)  # that the file is there
        main = self._env.open_db(None)
        self._tables = {name: (main, BOOKS[name]) if name in BOOKS else (self._env.open_db(name.encode()), b"") for name in TABLES}
        """table -> (database, what its keys begin with there)."""
        self._txn: lmdb.Transaction | None = None
        self.used = self._before = 0
        self._check_format()

    def _check_format(self) -> None:
        with self.turn():
            found = self.get("meta", b"format")
            if found not in (None, FORMAT):
                raise JournalError(
                    f"the journal in {self.folder} has format {found!r}; this mphub reads {FORMAT!r}: use the version that wrote it"
                )
            if found is None:
                self.put("meta", b"format", FORMAT)
            self.used = sum(on_disk(value) for name in TABLES if name not in UNCOUNTED for _, value in self.scan(name))

    def turn(self) -> Turn:
        return Turn(self)

    def begin(self) -> None:
        self._before = self.used
        self._changes.clear()
        self._txn = self._env.begin(write=True, buffers=False)

    def abort(self) -> None:
        """Take back what has not been committed."""
        txn, self._txn = self._txn, None
        if txn is not None:
            txn.abort()
            self.used = self._before

    def commit(self) -> None:
        """Commit; a full disk is waited for, not an error."""
        while True:
            try:
                self._in_turn().commit()
                break
            except lmdb.Error as error:
                if self._wait is None or not is_full(error):
                    raise
            self._wait()
            self._change_again()
        self._txn = None

    def _change_again(self) -> None:
        """Make the changes of this turn in a new transaction: a commit that fails has thrown them away."""
        self._txn = self._env.begin(write=True, buffers=False)
        for db, key, value in self._changes:
            if value is None:
                self._txn.delete(key, db=db)
            else:
                self._txn.put(key, value, db=db)

    def get(self, table: str, key: bytes) -> bytes | None:
        db, prefix = self._tables[table]
        value = self._in_turn().get(prefix + key, db=db)
        return None if value is None else bytes(value)

    def put(self, table: str, key: bytes, value: bytes) -> None:
        db, prefix = self._tables[table]
        if prefix:
            key = prefix + key
            if not self._in_turn().put(key, value, db=db):
                raise JournalError(f"{table} row {key!r} was not written")
        else:
            old = self._in_turn().replace(key, value, db=db)
            if table not in HISTORY:
                self.used += on_disk(value) - (on_disk(bytes(old)) if old is not None else 0)
        self._changes.append((db, key, value))

    def append(self, table: str, key: bytes, value: bytes) -> None:
        """Put a row behind all others (its own result is the only sign that it was not)."""
        db, _ = self._tables[table]
        if not self._in_turn().put(key, value, append=True, db=db):
            raise JournalError(f"{table} row {key!r} is not behind the last one")
        self._changes.append((db, key, value))
        if table not in HISTORY:
            self.used += on_disk(value)

    def delete(self, table: str, key: bytes) -> None:
        db, prefix = self._tables[table]
        old = self._in_turn().pop(prefix + key, db=db)
        if old is not None:
            self._changes.append((db, prefix + key, None))
            self.used -= on_disk(bytes(old)) if table not in UNCOUNTED else 0

    def scan(self, table: str, start: bytes = b"", end: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield rows from ``start`` on, in order, before ``end``."""
        db, prefix = self._tables[table]
        with self._in_turn().cursor(db=db) as cursor:
            if not cursor.set_range(prefix + start):
                return
            for found, value in cursor.iternext():
                key = bytes(found)[len(prefix) :]
                if bytes(found[: len(prefix)]) != prefix or (end is not None and key >= end):
                    return
                yield key, bytes(value)

    def close(self) -> None:
        self._env.close()
        self._lock.close()

    def _in_turn(self) -> lmdb.Transaction:
        if self._txn is None:
            raise JournalError("the journal was used outside a turn")
        return self._txn


class MemoryJournal:
    """The same tables in dictionaries: for the inline engine, whose events do not outlive their process anyway."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[bytes, bytes]] = {name: {} for name in TABLES}
        self.used, self.synced = 0, False

    def turn(self) -> Turn:
        return Turn(self)

    def begin(self) -> None:
        """Nothing to do: this journal ends with its process anyway."""

    def commit(self) -> None:
        """Nothing to do either."""

    def abort(self) -> None:
        """Leave what was changed: what interrupts a turn here is an interrupt of the caller's."""

    def get(self, table: str, key: bytes) -> bytes | None:
        return self._tables[table].get(key)

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self.delete(table, key)
        self._tables[table][key] = value
        self.used += on_disk(value) if table not in UNCOUNTED else 0

    append = put

    def delete(self, table: str, key: bytes) -> None:
        old = self._tables[table].pop(key, None)
        if old is not None and table not in UNCOUNTED:
            self.used -= on_disk(old)

    def scan(self, table: str, start: bytes = b"", end: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        for key in sorted(k for k in self._tables[table] if k >= start and (end is None or k < end)):
            yield key, self._tables[table][key]

    def close(self) -> None:
        self._tables.clear()


def is_full(error: lmdb.Error) -> bool:
    """Say whether it is for want of room: half a page written is an input/output error to LMDB."""
    return isinstance(error, lmdb.DiskError) or os.strerror(errno.EIO) in str(error)


def is_shortage(error: OSError | lmdb.Error) -> bool:
    """Say whether the machine lacks something that it may have again later."""
    if isinstance(error, OSError):
        return error.errno in SHORTAGES
    return is_full(error) or isinstance(error, lmdb.MemoryError) or any(os.strerror(number) in str(error) for number in SHORTAGES)


def on_disk(value: bytes) -> int:
    """Estimate what a row takes: LMDB puts what exceeds half a page on pages of its own."""
    size = len(value)
    return size + 64 if size < 2000 else (size + 4111) // 4096 * 4096


def cost_of_past(value: bytes, batch: Batch) -> int:
    """Estimate what a row of history takes, with the entries that say which keys it has, and its file."""
    return on_disk(value) + KEY_ROW * len(set(batch.keys)) + (batch.size if batch.blob is not None else 0)


def digest_of(key: str) -> bytes:
    """Return what stands for a key: keys may be longer than the keys of a table."""
    return blake2b(key.encode(), digest_size=12).digest()


def size_of(path: Path) -> int:
    """Return the bytes of a file that may not be there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def lock_file(path: Path) -> IO[bytes]:
    """Open and lock a file; the kernel lets go of it when this process ends, however.

    Never open it a second time in one process: closing that one would drop the lock (POSIX).
    Raises BlockingIOError: another process holds it.
    """
    file = open(path, "a+b")  # noqa: SIM115 (it stays open as long as the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
