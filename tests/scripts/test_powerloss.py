"""What a power loss may leave of a durable hub, from a recording: a few images of each durability, and the model of the disk."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import powerloss
import pytest
from powerloss import Disk, Record

from tests.scripts.test_soak import environment


def disk_after(*records: tuple[str, str, bytes]) -> Disk:
    disk = Disk()
    for kind, path, data in records:
        disk.do(Record(kind, False, path, data, 0))
    return disk


def images(disk: Disk, folder: Path, name: str) -> set[bytes | None]:
    """Return what a file may be after a power loss."""
    found: set[bytes | None] = set()
    for number in range(60):
        root = folder / str(number)
        root.mkdir()
        disk.put(root, random.Random(number))
        found.add((root / name).read_bytes() if (root / name).exists() else None)
    return found


def test_what_is_synced_is_there_and_the_rest_may_be(tmp_path: Path) -> None:
    new = [("c", "home/a", b""), ("w", "home/a", b"old"), ("s", "home/a", b""), ("s", "home", b"")]
    for name, records, expected in (
        ("sure", new, {b"old"}),
        ("name", new[:3], {b"old", None}),
        ("contents", [new[0], new[1], new[3]], {b"old", b"\0\0\0", b""}),
        ("written", [*new, ("w", "home/a", b"new")], {b"old", b"new"}),
        ("renamed", [*new, ("r", "home/a", b"/x/home/b")], {b"old", None}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        assert images(disk_after(*records), folder, "home/a") == expected, name


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.skipif(powerloss.compiler() is None, reason="the recorder needs a C compiler")
def test_a_few_images_are_as_promised() -> None:
    command = [sys.executable, str(Path(powerloss.__file__)), "--images", "2", "--seconds", "0.3"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=55, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
