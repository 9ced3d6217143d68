"""A new folder of what can be read of a damaged one. No damaged file is opened with LMDB, which ends its process on one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count as numbers_from
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from mphub.core.spans import Spans, length
from mphub.errors import InvalidOption, JournalError
from mphub.options import Inbox, Limits, Restart
from mphub.store.blobs import sync_path
from mphub.store.folder import DurableFolder, kept_out, make, read, saying
from mphub.store.journal import (
    BOOKS,
    FORMAT,
    TABLES,
    Counters,
    Dead,
    Journal,
    Past,
    Progress,
    Single,
    Stored,
    SubscriberState,
    cost_of_past,
    digest_of,
    on_disk,
)
from mphub.store.pages import DamagedError
from mphub.store.remains import CHUNK, Remains, Value, remains_of
from mphub.wire.frames import Batch, End, decoder, encode, views
from mphub.wire.specs import NOWHERE, Spec

Number = int
DAMAGED: Final = "damaged"
"""The reason for which events count as dropped that could not be read."""
TOGETHER: Final = 1000
"""Rows that are written in one turn."""
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, ValueError, OSError)
SALVAGED: Final = frozenset({"rows", "singles", "dead", "history", "snapshots"})
"""Tables whose losses are told by themselves: others are derived from these, or end with a run."""
_spec, _state = decoder(Spec), decoder(SubscriberState)
_snapshot = decoder(tuple[bytes, str | None])
_counters = decoder(tuple[int, int, int, dict[str, int]])
DECODERS: Final[dict[str, tuple[int, msgspec.msgpack.Decoder[Any]]]] = {
    "rows": (8, decoder(Stored)), "dead": (8, decoder(Dead)), "history": (8, decoder(Past)), "singles": (12, decoder(Single)),
    "progress": (12, decoder(Progress)), "history_ends": (16, decoder(End)), "snapshots": (0, _snapshot),
}  # fmt: skip
"""table -> (bytes of a key, what a row is); no row of one can be read as another's."""


class Salvaged(msgspec.Struct, frozen=True):
    """What was written to the new folder, and what is lost."""

    rows: dict[str, int]
    """table -> rows."""
    lost: dict[str, int]
    """table -> rows that could not be read; ``books`` are those of subscribers. As far as the file still tells."""
    waiting: dict[str, int]
    """subscriber -> its events that are to be handled."""
    lost_events: dict[str, int]
    """subscriber -> its events of which it is unknown how they ended: in its statistics they are dropped, as ``damaged``."""
    problems: list[str]


def salvage(damaged: str | os.PathLike[str], into: str | os.PathLike[str]) -> Salvaged:
    """Read what can be read of a damaged hub's folder, and make a new one of it, with which a hub goes on; the damaged one stays as it is.

    Raises InvalidOption: ``into`` is there and not empty; HubExists: a hub has the folder; JournalError: there is no journal, it is of
    another version, or nothing of it can be read.
    """
    source, target = Path(damaged).resolve(), Path(into).resolve()
    check_target(target, source)
    if not (source / "journal" / "data.mdb").is_file():
        raise JournalError(f"there is no journal in {damaged}: expected the folder of a durable hub")
    with kept_out(source), saying(target):
        check_format(read(source / "format"), source)
        try:
            make(target.parent)
            remains = remains_of(source / "journal" / "data.mdb", target.parent)
        except DamagedError as error:
            raise JournalError(f"nothing of the journal in {damaged} can be read: {error}: restore it from a copy") from None
        return Salvage(remains, source).write(target)


def check_target(target: Path, source: Path) -> None:
    if target.is_relative_to(source):
        raise InvalidOption(f"into: got {str(target)!r}, which is in the damaged folder; expected another one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidOption(f"into: got {str(target)!r}, which is there and not empty; expected a folder that is new")


def check_format(found: bytes | None, source: Path) -> None:
    """Refuse what another version has written; what is no number at all is damage."""
    if found is not None and found != FORMAT and found.strip().isdigit():
        raise JournalError(
            f"{source} has format {found.decode()!r}; this mphub reads {FORMAT.decode()!r}: salvage it with the version that wrote it"
        )


class Box:
    """One subscriber, as it will be in the new folder."""

    def __init__(self, name: str, state: SubscriberState, spec: Spec | None) -> None:
        self.name, self.state = name, state
        self.spec = spec or Spec(name, [">"], b"", NOWHERE, Inbox(), Limits(), Restart(), 1)
        self.is_made_up = spec is None
        self.pending: Counter[int] = Counter()
        """epoch -> its events that are to be handled."""
        self.dead = 0

    def count(self, epoch: int, events: int) -> None:
        if events:
            self.pending[epoch] += events

    def has_to_do(self, row: Number) -> bool:
        return row >= self.state.cursor and not 0 < self.state.behind <= row < self.state.joined


class Salvage:
    """One look at what is left, and what is made of it."""

    def __init__(self, remains: Remains, source: Path) -> None:
        self.remains, self.blobs = remains, source / "blobs"
        self.problems: list[str] = []
        self._sizes: dict[str, int | None] = {}
        """file -> its bytes, if it can be read."""
        self.unread: Counter[str] = Counter()
        self.new: dict[str, list[tuple[bytes, Value]]] = {name: [] for name in TABLES}
        """table -> its rows in the new folder."""
        self.files: set[str] = set()
        self.old: dict[str, dict[bytes, Value]] = {name: dict(rows) for name, rows in remains.tables.items()}
        self._sort_strays()
        self.books: dict[str, dict[bytes, Value]] = {name: {} for name in BOOKS}
        for key, value in remains.books:
            name = next(name for name, prefix in BOOKS.items() if key.startswith(prefix))
            self.books[name][key[2:]] = value
        check_format(bytes(self.books["meta"].get(b"format", FORMAT)), source)
        self._read()

    def _sort_strays(self) -> None:
        """Give rows that nothing leads to any more to the tables whose rows they can be."""
        for key, value in self.remains.strays:
            for name, (size, kind) in DECODERS.items():
                if (not size or len(key) == size) and readable(kind.decode, value) is not None:
                    self.old[name].setdefault(key, value)
                    break

    def _rows(self, table: str) -> Iterator[tuple[bytes, Any, Value]]:
        """Yield the rows of a table that can be read, in order, whose files are there."""
        size, kind = DECODERS[table]
        without_file: list[str] = []
        for key, value in sorted(self.old[table].items()):
            row = readable(kind.decode, value) if not size or len(key) == size else None
            batch = getattr(row, "batch", None)
            if row is None or (batch is not None and not is_whole(batch, row.body)):
                self.unread[table] += 1
            elif batch is not None and batch.blob is not None and not self.has_file(batch.blob, batch.size):
                without_file.append(batch.blob)
            else:
                yield key, row, value
        if without_file:
            self.unread[table] += len(without_file)
            self.problems.append(f"table {table}: the files of {len(without_file)} rows are missing or cut off ({without_file[0]}, ...)")

    def has_file(self, name: str, size: int | None = None) -> bool:
        """Say whether a file of the old folder is there and can be read, whole."""
        if name not in self._sizes:
            self._sizes[name] = readable_size(self.blobs / name) if "/" not in name else None
        found = self._sizes[name]
        return found is not None and size in (None, found)

    # -- what is made of it

    def _read(self) -> None:
        rows, singles = list(self._rows("rows")), list(self._rows("singles"))
        dead = list(self._rows("dead"))
        self.last = max([0, *(number_of(key) for key, _, _ in rows), *(number_of(key[4:]) for key, _, _ in singles)])
        self.epoch = max([0, *(row.epoch for _, row, _ in (*rows, *singles))])
        self._find_boxes(self._numbers_in(rows, singles), {row.subscriber for _, row, _ in dead})
        self.progress: dict[bytes, Progress] = {key: row for key, row, _ in self._rows("progress")}
        for key, stored, value in rows:
            self._take_row(key, stored, value)
        for key, single, value in singles:
            self._take_single(key, single, value)
        for key, letter, value in dead:
            self.named[letter.subscriber].dead += length(letter.spans)
            self._keep("dead", key, value, letter.batch.blob)
        for key, (_, blob), value in self._rows("snapshots"):
            if blob is None or self.has_file(blob):
                self._keep("snapshots", key, value, blob)
            else:
                self.problems.append(f"the snapshot of {key.decode(errors='replace')!r} is lost: its file {blob} is missing")
        self._read_history()
        self._write_books()

    def _keep(self, table: str, key: bytes, value: Value, blob: str | None = None) -> None:
        self.new[table].append((key, value))
        if blob is not None:
            self.files.add(blob)

    def _numbers_in(self, rows: Iterable[Any], singles: Iterable[Any]) -> set[Number]:
        return {number for _, row, _ in rows for number in row.matched} | {number_of(key[:4]) for key, _, _ in singles}

    def _find_boxes(self, seen: set[Number], with_letters: set[str]) -> None:
        """Tell who is who; whoever is only known by number, or by name, is made up."""
        specs, states = self._decoded(b"d", _spec), self._decoded(b"s", _state)
        used = seen | {state.number for state in states.values()}
        fresh = numbers_from(1 + max(used, default=0))
        self.named: dict[str, Box] = {}
        lacking = sorted(set(specs) - set(states))
        unknown = seen - {number for state in states.values() for number in (state.number, *state.former)}
        for name in lacking:
            number = unknown.pop() if len(lacking) == len(unknown) == 1 else next(fresh)
            states[name] = SubscriberState(number, 0, Counters())
            self.problems.append(f"the books of {name!r} are lost: what it had finished may be handled again")
        if not self.remains.holes:
            unknown = set()  # nobody's, whoever that was
        for number in sorted(unknown):
            states[name := f"salvaged-{number}"] = SubscriberState(number, 0, Counters())
            self.problems.append(f"whose events those of subscriber {number} are is lost: subscribe {name!r} to handle them")
        for name in sorted(with_letters - set(states)):
            states[name] = SubscriberState(next(fresh), 0, Counters())
        for name, state in states.items():
            if name in specs or state.number in seen or name in with_letters:
                self.named[name] = Box(name, state, specs.get(name))
                if name not in specs:
                    self.problems.append(f"the subscription of {name!r} is lost: its events wait until it is subscribed again")
        self.boxes = {box.state.number: box for box in self.named.values()}

    def _decoded(self, prefix: bytes, kind: msgspec.msgpack.Decoder[Any]) -> dict[str, Any]:
        found = {}
        for key, value in self.books["subscribers"].items():
            if key.startswith(prefix):
                name, row = readable(bytes.decode, key[1:]), readable(kind.decode, value)
                if name is None or row is None:
                    self.unread["books"] += 1
                else:
                    found[name] = row
        return found

    def _take_row(self, key: bytes, stored: Stored, value: Value) -> None:
        """Keep a row for those who have not finished it."""
        unfinished = False
        for number, spans in stored.matched.items():
            box = self.boxes.get(number)
            if box is not None and box.has_to_do(number_of(key)):
                todo = self._todo(number, key, stored.batch.count, spans)
                box.count(stored.epoch, length(todo))
                unfinished = unfinished or bool(todo)
        if not unfinished:
            return
        self._keep("rows", key, value, stored.batch.blob)
        for number in stored.matched:
            box, at = self.boxes.get(number), number.to_bytes(4, "big") + key
            if box is not None and box.has_to_do(number_of(key)) and at in self.progress:
                self.new["progress"].append((at, encode(self.progress[at])))

    def _todo(self, number: Number, key: bytes, count: int, spans: Spans | None) -> Spans:
        """Return what is unfinished of a row."""
        at = number.to_bytes(4, "big") + key
        known: Progress | None = self.progress.get(at)
        if known is not None and fits(known.todo, count):
            return known.todo
        self.progress.pop(at, None)
        return [(0, count)] if spans is None else spans

    def _take_single(self, key: bytes, single: Single, value: Value) -> None:
        box = self.boxes.get(number_of(key[:4]))
        if box is None or single.batch.count != 1:
            self.unread["singles"] += 1
            return
        box.count(single.epoch, 1)
        self._keep("singles", key, value, single.batch.blob)

    def _read_history(self) -> None:
        """Keep history, and make anew what it is looked up by."""
        size, at, names = 0, 0.0, set()
        for key, past, value in self._rows("history"):
            self._keep("history", key, value, past.batch.blob)
            self.last = max(self.last, number_of(key))
            size, at = size + cost_of_past(bytes(value), past.batch), max(at, past.at)
            for name in set(past.batch.keys):
                self.new["history_keys"].append((digest_of(name) + key, b""))
                names.add(name)
            if past.batch.blob is not None:
                self.new["history_blobs"].append((past.batch.blob.encode(), b""))
        self.new["history_names"] = [(digest_of(name), name.encode()) for name in names]
        there = {key for key, _ in self.new["history"]}
        for key, end, value in self._rows("history_ends"):
            if key[:8] in there:
                self._keep("history_ends", key, value)
                size, at = size + on_disk(bytes(value)), max(at, end.at)
        if there:
            self.new["meta"].append((b"history", encode((size, at, len(names)))))

    def _write_books(self) -> None:
        self.lost_events: dict[str, int] = {}
        found = readable(_counters.decode, self.books["meta"].get(b"counters", b""))
        if found is None:
            self.problems.append("the hub's own counters are lost: they begin anew")
        next_row, epoch, accepted, unmatched = found or (1, 1, 0, {})
        cursors = [max(box.state.cursor, box.state.joined) for box in self.named.values()]
        books: tuple[int, int, int, dict[str, int]] = max([next_row, self.last + 1, *cursors]), max(epoch, self.epoch), accepted, unmatched
        self.new["meta"].append((b"counters", encode(books)))
        for box in self.named.values():
            self._write_box(box)

    def _write_box(self, box: Box) -> None:
        counters, spec, name = box.state.counters, box.spec, box.name.encode()
        counters.dead, counters.pending = box.dead, dict(box.pending)
        self._balance(box)
        if spec.handler_blob is not None:
            if self.has_file(spec.handler_blob):
                self.files.add(spec.handler_blob)
            else:
                spec = msgspec.structs.replace(spec, handler_blob=None)
        old = self.books["subscribers"]
        rows = [(b"d", encode(spec)), (b"s", encode(box.state))]
        rows += [(b"t", bytes(old[b"t" + name]))] if readable(bytes.decode, bytes(old.get(b"t" + name, b""))) else []
        rows += [(b"u", b"1")] if box.is_made_up or b"u" + name in old else []
        self.new["subscribers"] += [(kind + name, value) for kind, value in rows]

    def _balance(self, box: Box) -> None:
        """See to it that a subscriber's books add up: what is not there any more is dropped."""
        counters = box.state.counters
        ended = counters.handled + counters.dead + sum(counters.dropped.values())
        lost = counters.accepted - ended - box.pending.total()
        if lost > 0:
            counters.drop(DAMAGED, lost)
            self.lost_events[box.name] = lost
        else:
            counters.accepted -= lost

    # -- the new folder

    def write(self, target: Path) -> Salvaged:
        """Make the new folder beside its place and put it there whole."""
        draft = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            self._fill(draft)
            draft.rename(target)
            sync_path(target.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return self._told()

    def _fill(self, draft: Path) -> None:
        folder = DurableFolder(draft, synced=True)
        try:
            for name in sorted(self.files):
                shutil.copyfile(self.blobs / name, draft / "blobs" / name)
                sync_path(draft / "blobs" / name)
            sync_path(draft / "blobs")
            room = 2 * sum(len(value) + 4096 for rows in self.new.values() for _, value in rows)
            journal = Journal(draft / "journal", room, synced=True)
            try:
                for name, rows in self.new.items():
                    put_all(journal, name, rows)
            finally:
                journal.close()
        finally:
            folder.close()

    def _told(self) -> Salvaged:
        lost = Counter({name: claimed - len(self.old[name]) for name, claimed in self.remains.claimed.items() if name in SALVAGED})
        lost += self.unread
        lost["books"] += self.remains.lost_books
        return Salvaged(
            {name: len(rows) for name, rows in self.new.items()},
            {name: rows for name, rows in lost.items() if rows > 0},
            {box.name: box.pending.total() for box in self.named.values() if box.pending},
            self.lost_events,
            [*self._of_file(), *self.problems],
        )

    def _of_file(self) -> Iterator[str]:
        if self.remains.holes:
            yield f"the file: {self.remains.holes} pages or rows on them cannot be read"
        if not self.remains.is_newest:
            yield "it may be as it was before the last turn, of which more can be read: what was accepted last may be missing"
        if self.remains.holes and not self.remains.found_free:
            yield "which pages are free cannot be read: what only damaged pages lead to is left out, as it may have been handled"
        for name in sorted(SALVAGED - set(self.remains.claimed)) if self.remains.holes else ():
            yield f"table {name}: how many rows it had cannot be read"


def put_all(journal: Journal, table: str, rows: list[tuple[bytes, Value]]) -> None:
    rows.sort()
    for first in range(0, len(rows), TOGETHER):
        with journal.turn():
            for key, value in rows[first : first + TOGETHER]:
                journal.put(table, key, bytes(value))


def readable(decode: Callable[[Any], Any], value: Value) -> Any:
    """Return what a row says; None if it cannot be read."""
    try:
        return decode(value)
    except UNREADABLE:
        return None


def readable_size(path: Path) -> int | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return sum(len(piece) for piece in iter(lambda: file.read(CHUNK), b""))
    except (OSError, ValueError):  # ValueError: no path at all
        return None


def is_whole(batch: Batch, body: bytes) -> bool:
    """Say whether the events of a row are all there, and have keys."""
    starts = batch.starts
    if len(starts) != len(batch.keys) or starts[0] or starts[-1] >= batch.count or any(a >= b for a, b in pairwise(starts)):
        return False
    events = readable(views, body) if batch.blob is None else None
    return batch.blob is not None or (events is not None and len(events) == batch.count)


def fits(spans: Spans, count: int) -> bool:
    ends = [0, *(end for span in spans for end in span), count]
    return all(a <= b for a, b in pairwise(ends)) and all(a < b for a, b in spans)


def number_of(key: bytes) -> Number:
    return int.from_bytes(key, "big")
