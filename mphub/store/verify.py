"""Whether a journal can be read: asked in a process of its own, as LMDB ends the one that opens a damaged file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lmdb
import msgspec

from mphub.errors import JournalError
from mphub.store.journal import BOOKS, TABLES


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
            f"read: restore the folder from a copy, or choose another one (nothing was changed)"
        )


def main(path: str) -> None:
    """Read it all, and print what was found."""
    env = lmdb.open(path, readonly=True, lock=False, max_dbs=len(TABLES))
    found = Findings()
    for name in TABLES:
        try:
            found.rows[name] = count(env, name)
        except (lmdb.Error, msgspec.MsgspecError) as error:
            found.problems.append(f"table {name}: {error}")
    sys.stdout.buffer.write(msgspec.json.encode(found))


def count(env: lmdb.Environment, name: str) -> int:
    """Count the rows of a table, reading each."""
    prefix = BOOKS.get(name, b"")
    with env.begin() as txn:
        db = None if name in BOOKS else env.open_db(name.encode(), txn, create=False)
        with txn.cursor(db) as cursor:
            cursor.set_range(prefix) if prefix else cursor.first()
            return sum(1 for key, value in cursor.iternext() if bytes(key).startswith(prefix) and bytes(value) is not None)
