"""Whether a journal can be read: asked in a process of its own, as LMDB ends the one that opens a damaged file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec

from mphub.errors import JournalError
from mphub.store import pages
from mphub.store.journal import BOOKS, TABLES, Dead, Past, Single, Stored
from mphub.wire.frames import decoder

KINDS: Final[dict[str, msgspec.msgpack.Decoder[Any]]] = {
    "rows": decoder(Stored),
    "singles": decoder(Single),
    "dead": decoder(Dead),
    "history": decoder(Past),
}


class Findings(msgspec.Struct):
    """What is in a journal."""

    rows: dict[str, int] = {}
    """table -> rows that can be read."""
    problems: list[str] = []


def verify(folder: str | os.PathLike[str]) -> Findings:
    """Read every row of a hub's folder (its hub must not run), and tell what cannot be read.

    Raises JournalError: there is no journal.
    """
    path = Path(folder) / "journal"
    if not (path / "data.mdb").exists():
        raise JournalError(f"there is no journal in {folder}")
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path[:0] = [{root!r}]; from mphub.store import verify; verify.main(sys.argv[1])"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(path)], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    try:
        return msgspec.json.decode(done.stdout, type=Findings)
    except msgspec.MsgspecError:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Findings({}, [f"it cannot be opened: reading it ended with {done.returncode}" + "".join(f" ({line})" for line in said)])


def check_journal(folder: str | os.PathLike[str]) -> None:
    """Raise JournalError if a journal is damaged; one that is not there is not."""
    if not (Path(folder) / "journal" / "data.mdb").exists():
        return
    found = verify(folder)
    if found.problems:
        raise JournalError(
            f"path: the journal in {folder} is damaged ({'; '.join(found.problems[:3])}); {sum(found.rows.values())} of its rows can be "
            f"read: restore the folder from a copy, or make a new one of what can be read: "
            f"mphub.store.salvage.salvage({str(folder)!r}, into=...) (nothing was changed)"
        )


def main(path: str) -> None:
    """Read it all, and print what was found."""
    found = Findings()
    try:
        pages.check(Path(path) / "data.mdb")
    except pages.DamagedError as error:
        found.problems.append(f"the file: {error}")
    else:
        read_tables(Path(path), found)
    sys.stdout.buffer.write(msgspec.json.encode(found))


def read_tables(path: Path, found: Findings) -> None:
    env = lmdb.open(str(path), readonly=True, lock=False, max_dbs=len(TABLES))
    for name in TABLES:
        try:
            found.rows[name] = count(env, name, path.parent / "blobs")
        except lmdb.NotFoundError:
            found.rows[name] = 0  # it ended before it had made them all
        except (lmdb.Error, msgspec.MsgspecError, OSError) as error:
            found.problems.append(f"table {name}: {error}")


def count(env: lmdb.Environment, name: str, blobs: Path) -> int:
    """Count the rows of a table, reading each, and looking for the file of each that has one."""
    prefix, kind = BOOKS.get(name, b""), KINDS.get(name)
    rows = 0
    with env.begin() as txn:
        db = None if name in BOOKS else env.open_db(name.encode(), txn, create=False)
        with txn.cursor(db) as cursor:
            cursor.set_range(prefix) if prefix else cursor.first()
            for key, value in cursor.iternext():
                if not bytes(key).startswith(prefix):
                    continue
                rows += 1
                if kind is not None:
                    look_for_file(kind.decode(value), blobs)
    return rows


def look_for_file(row: Stored | Single | Dead | Past, blobs: Path) -> None:
    """Raise OSError unless the file that is a row's body is there, whole."""
    batch = row.batch
    if batch.blob is not None and (size := (blobs / batch.blob).stat().st_size) != batch.size:
        raise OSError(f"the file {batch.blob} has {size} bytes, not {batch.size}")
