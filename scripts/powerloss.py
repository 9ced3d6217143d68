"""Record what a durable hub writes and syncs, make of it what a power loss may leave on the disk, and start a hub on each of these images.

    python scripts/powerloss.py                                     two hundred images of each durability
    python scripts/powerloss.py --images 20 --seed 7 --durability power

A hub runs for some seconds under load: events in batches, some in files; ``fast`` handles its own, so that pages of the journal
become free and are used again, ``kept`` is paused. recorder.c, which is compiled and preloaded for that, notes every write, sync,
rename, unlink and new name below the hub's folder, in all its processes, and the publisher's notes of what was confirmed. An image
is the folder as it may be after the power went at a random record: of each file what was synced, and of what was written later
each page of 4 KiB as it was after any number of its writes; of each folder the names that were there when it was last synced, and
any of its later changes.

Each image is opened as after a restart of the machine. With "power" everything confirmed must be there, in its order; with "process" a
damaged journal must be refused with JournalError, and an older one opened with a warning. A crash or a hang is wrong with both.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak import END, note, notes, number

from mphub import EventHub, JournalError
from mphub.store import folder as store_folder

PAGE = 4096
HEAD = struct.Struct("<BBHIQ")
BATCH = 25
NOTES = ("confirmed", "fast", "kept")
"""Files that are no part of the hub: they are known, whatever becomes of the disk."""
LARGE = 100_000
"""Bytes of a payload in a file."""
OPENED_WITHIN = 60.0
COMPILERS = ("cc", "gcc", "clang")


# -- the load


def run(root: Path, durability: str, seconds: float) -> None:
    """Be the hub that is recorded: publish for some seconds, noting what is confirmed."""
    hub = make_hub(root, durability)
    hub.start()
    hub.subscription("kept").pause()
    dice, first, until = random.Random(1), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        for n in range(first, first + BATCH):
            hub.publish("both" if n % 5 == 0 else "fast", (n, bytes(LARGE if n % 100 == 50 else dice.randrange(2000))))
        hub.flush()
        first += BATCH
        note(root / "home" / "confirmed", first)
    os._exit(0)  # its processes end with it


def make_hub(root: Path, durability: str) -> EventHub:
    hub = EventHub(root / "home" / "hub", durability=durability, check=False, max_bytes="200MB")
    hub.subscribe(["both", "fast"], lambda event: note(root / "home" / "fast", event[0]), name="fast")
    hub.subscribe("both", lambda event: note(root / "home" / "kept", event[0]), name="kept")
    return hub


def open_image(root: Path, durability: str) -> None:
    """Be the next run, after the machine was started anew; print how that went."""
    store_folder.boot_id = lambda: "another"
    hub = make_hub(root, durability)
    try:
        with hub:
            hub.drain(OPENED_WITHIN / 2)
            told = "opened" + "".join(f" dead {letter.reason}" for letter in hub.dead_letters()[:1])
    except JournalError as error:
        told = f"refused: {error}"
    print(told, flush=True)


def call(code: str, root: Path, durability: str, **more: Any) -> subprocess.Popen[str]:
    """Run a function of this file in an interpreter of its own."""
    here = Path(__file__).resolve().parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; from pathlib import Path; import powerloss; powerloss.{code}"
    code = code.replace("ROOT", f"Path({str(root)!r}), {durability!r}")
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True, **more)


# -- the records


@dataclass(frozen=True)
class Record:
    kind: str
    """w(rite), s(ync), c(reate), r(ename), u(nlink), m(kdir), t(runcate)."""
    synced: bool
    path: str
    data: bytes
    offset: int


def compiler() -> str | None:
    """Return a C compiler, if one is there."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def record(root: Path, durability: str, seconds: float) -> list[Record]:
    """Run a hub, and return what it did to the disk."""
    library, to = root / "recorder.so", root / "records"
    (root / "home").mkdir()
    source = Path(__file__).with_name("recorder.c")
    subprocess.run([str(compiler()), "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    where = {"LD_PRELOAD": str(library), "RECORD_ROOT": str(root.resolve() / "home"), "RECORD_TO": str(to)}
    with call(f"run(ROOT, {seconds})", root, durability, env={**os.environ, **where}) as process:
        said, _ = process.communicate(timeout=seconds + 60)
    if process.returncode:
        raise SystemExit(f"powerloss: the hub to be recorded ended with {process.returncode}\n{said}")
    time.sleep(1.0)  # its processes end; what they write after it belongs to no image
    return list(read(to.read_bytes(), str(root.resolve()) + "/"))


def read(data: bytes, root: str) -> Iterator[Record]:
    at = 0
    while at + HEAD.size <= len(data):
        kind, synced, path, size, offset = HEAD.unpack_from(data, at)
        at += HEAD.size
        name = data[at : at + path].decode().removeprefix(root)
        yield Record(chr(kind), bool(synced), name, data[at + path : at + path + size], offset)
        at += path + size


# -- the disk


@dataclass
class File:
    """What is on the disk for sure, and each page's contents since."""

    pages: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    now: dict[int, bytes] = field(default_factory=dict)
    later: dict[int, list[bytes]] = field(default_factory=lambda: collections.defaultdict(list))
    sizes: list[int] = field(default_factory=list)
    """Sizes since, in order."""

    def write(self, offset: int, data: bytes, synced: bool) -> None:
        end = offset + len(data)
        while offset < end:
            place, at = divmod(offset, PAGE)
            part = data[len(data) - (end - offset) :][: PAGE - at]
            page = self.now.get(place, bytes(PAGE))
            self.now[place] = page[:at] + part + page[at + len(part) :]
            self.later[place].append(self.now[place])
            if synced:
                self.pages[place] = self.later.pop(place)[-1]
            offset += len(part)
        self.resize(max(end, self.last_size))
        if synced:
            self.size = max(self.size, end)

    @property
    def last_size(self) -> int:
        return self.sizes[-1] if self.sizes else self.size

    def resize(self, size: int) -> None:
        if size != self.last_size:
            self.sizes.append(size)

    def sync(self) -> None:
        for place in self.later:
            self.pages[place] = self.now[place]
        self.size = self.last_size
        self.later.clear()
        self.sizes.clear()

    def put(self, path: Path, dice: random.Random) -> None:
        """Write what may be left of it."""
        size = dice.choice([self.size, *self.sizes[-3:]])
        with open(path, "wb") as file:
            for place, page in self.pages.items():
                file.seek(place * PAGE)
                file.write(page)
            for place, versions in self.later.items():
                if kept := dice.randrange(len(versions) + 1):
                    file.seek(place * PAGE)
                    file.write(versions[kept - 1])
                    size = max(size, min((place + 1) * PAGE, self.last_size))
            file.truncate(size)


@dataclass
class Disk:
    """Names and files, as they are and as they may be after a power loss."""

    names: dict[str, File | None] = field(default_factory=lambda: {"home": None})
    """path -> its file (None: a folder)."""
    sure: dict[str, File | None] = field(default_factory=lambda: {"home": None})
    changes: list[tuple[str, File | None, bool]] = field(default_factory=list)
    """Since the folders that they are in were synced: (path, what it is, whether it goes)."""

    def do(self, record: Record) -> None:
        path, found = record.path, self.names.get(record.path)
        match record.kind:
            case "c" if path not in self.names:
                self._change(path, File())
            case "c" if record.offset and found is not None:
                found.resize(0)
            case "m":
                self._change(path, None)
            case "w" if found is not None:
                found.write(record.offset, record.data, record.synced)
            case "t" if found is not None:
                found.resize(record.offset)
            case "s" if found is not None:
                found.sync()
            case "s":
                self._sync_folder(path)
            case "u" if path in self.names:
                self.changes.append((path, self.names.pop(path), True))
            case "r" if path in self.names:
                to = f"{path.rpartition('/')[0]}/{os.path.basename(record.data.decode())}"  # none goes to another folder
                self.changes.append((path, found, True))
                self._change(to, self.names.pop(path))

    def _change(self, path: str, what: File | None) -> None:
        self.names[path] = what
        self.changes.append((path, what, False))

    def _sync_folder(self, folder: str) -> None:
        left = []
        for path, what, goes in self.changes:
            if path.rpartition("/")[0] != folder:
                left.append((path, what, goes))
            elif goes:
                self.sure.pop(path, None)
            else:
                self.sure[path] = what
        self.changes = left

    def put(self, root: Path, dice: random.Random) -> None:
        """Write an image: any of the changes that were not synced, in their order."""
        names = dict(self.sure)
        for path, what, goes in self.changes:
            if dice.random() < 0.5:
                if goes:
                    names.pop(path, None)
                else:
                    names[path] = what
        for path, what in sorted(names.items(), key=lambda item: item[0]):
            if not (root / path).parent.is_dir():
                continue  # its folder is not there
            if what is None:
                (root / path).mkdir()
            else:
                what.put(root / path, dice)


# -- the judgement


@dataclass
class Findings:
    images: int = 0
    opened: int = 0
    refused: int = 0
    lost: int = 0
    """Images that were opened without something confirmed."""
    wrong: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        opened = f"opened {self.opened} ({self.lost} without all that was confirmed)"
        return f"images {self.images}, {opened}, refused {self.refused}, wrong {len(self.wrong)}"


def whole(records: list[Record], path: str) -> list[int]:
    """Return the numbers that were noted in a file so far."""
    text = b"".join(record.data for record in records if record.path == path and record.kind == "w").decode()
    return [int(line.removesuffix(END)) for line in text.splitlines() if line.endswith(END)]


def lose_power(durability: str, images: int, seconds: float, seed: int, where: Path) -> Findings:
    """Record, make images and open each."""
    records = record(where, durability, seconds)
    dice, disk, done, found = random.Random(seed), Disk(), 0, Findings()
    seen: dict[str, list[int]] = {"home/confirmed": [], "home/fast": []}
    for cut in sorted(dice.randrange(1, len(records)) for _ in range(images)):
        for each in records[done:cut]:
            disk.do(each)
        for name, numbers in seen.items():
            numbers += whole(records[done:cut], name)
        done = cut
        root = where / f"image-{found.images}"
        root.mkdir()
        disk.put(root, dice)
        for name in NOTES:
            (root / "home" / name).unlink(missing_ok=True)
        found.images += 1
        before = len(found.wrong)
        judge(root, durability, max(seen["home/confirmed"], default=0), set(seen["home/fast"]), found)
        if len(found.wrong) == before:
            shutil.rmtree(root)
    return found


def judge(root: Path, durability: str, confirmed: int, handled: set[int], found: Findings) -> None:
    """Open an image, and compare."""
    with call("open_image(ROOT)", root, durability) as process:
        try:
            said, _ = process.communicate(timeout=OPENED_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            found.wrong.append(f"{root}: it hangs")
            return
    told = [line for line in said.splitlines() if line.startswith(("opened", "refused"))]
    got = {name: [n for (n,) in notes(root / "home" / name)] for name in ("fast", "kept")}
    expected = {"fast": set(range(confirmed)) - handled, "kept": set(range(0, confirmed, 5))}
    missing = sorted(n for name, numbers in expected.items() for n in numbers - set(got[name]))
    if process.returncode or not told:
        found.wrong.append(f"{root}: it ends with {process.returncode}: {said[-1500:]}")
    elif told[0].startswith("refused"):
        found.refused += 1
        if durability == "power":
            found.wrong.append(f"{root}: {told[0]}")
    elif got["kept"] != sorted(set(got["kept"])):
        found.wrong.append(f"{root}: out of order, or twice: {got['kept'][:20]}")
    else:
        found.opened += 1
        found.lost += bool(missing)
        if missing and durability == "power":
            found.wrong.append(f"{root}: {len(missing)} confirmed events of {confirmed} are lost: {missing[:5]}; {told[0]}")
        elif missing and "may be missing" not in said:
            found.wrong.append(f"{root}: {len(missing)} confirmed events of {confirmed} are lost, and nothing says so: {missing[:5]}")
        if told[0] != "opened":
            found.wrong.append(f"{root}: {told[0]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--images", type=number(1, int), default=200, help="of each durability; default: 200")
    parser.add_argument("--durability", choices=("process", "power"), help="default: both")
    parser.add_argument("--seconds", type=number(0.1, float), default=2.0, help="of load; default: 2")
    parser.add_argument("--seed", type=number(0, int), default=random.randrange(1 << 32), help="default: another one each time")
    options = parser.parse_args()
    if compiler() is None:
        print(f"powerloss: not run: needs a C compiler ({', '.join(COMPILERS)}) for its recorder", file=sys.stderr)
        return 2
    wrong: list[str] = []
    for durability in [options.durability] if options.durability else ["power", "process"]:
        where = Path(tempfile.mkdtemp(prefix="powerloss-"))
        began = time.monotonic()
        found = lose_power(durability, options.images, options.seconds, options.seed, where)
        print(f"{durability}: seed {options.seed}, {found.summary}; {time.monotonic() - began:.0f} s", flush=True)
        wrong += found.wrong
        if not found.wrong:
            shutil.rmtree(where)
    for each in wrong:
        print(f"wrong: {each}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
