"""The pages of an LMDB file, read without LMDB: that ends its process on a damaged one, and does not see that a page is an older one."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

HEAD: Final = struct.Struct("<QHHHH")
"""Number, padding, kind, end of the offsets, begin of the nodes (of a value: its count of pages, in both)."""
META: Final = struct.Struct("<IIQQ")
TREE: Final = struct.Struct("<IHHQQQQQ")
"""Padding, flags, depth, branch pages, leaf pages, pages of large values, entries, root."""
NODE: Final = struct.Struct("<HHHH")
MAGIC: Final = 0xBEEFC0DE
VERSION: Final = 1
BRANCH, LEAF, OVERFLOW = 1, 2, 4
BIG, SUBTREE = 1, 2
NOWHERE: Final = (1 << 64) - 1


class DamagedError(Exception):
    """What is there cannot have been written together."""


class Tree(NamedTuple):
    """What the file says of one of its trees."""

    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int

    @classmethod
    def at(cls, data: bytes | memoryview | mmap.mmap, offset: int) -> Tree:
        _, _, *found = TREE.unpack_from(data, offset)
        return cls(*found)


Meta = tuple[int, int, Tree, Tree]
"""Of one of the first two pages: the turn that it is of, the last page, the tree of free pages and the main one."""


def check(path: Path) -> None:
    """Walk all trees: each page is used once, or free, and there are as many as the file says.

    Raises DamagedError.
    """
    if path.stat().st_size < 2 * mmap.PAGESIZE:
        raise DamagedError("its first pages are not there")
    with open(path, "rb") as file:
        walk = Walk(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    try:
        walk.run()
    except struct.error as error:
        raise DamagedError(f"a page cannot be read: {error}") from error


class Walk:
    """One look at a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.last = 0
        magic, version, _, _ = META.unpack_from(data, HEAD.size)
        (size,) = struct.unpack_from("<I", data, HEAD.size + META.size)  # where the first tree has its padding
        self.page = size if magic == MAGIC and version == VERSION else mmap.PAGESIZE
        """Bytes of a page: those of the machine that made the file."""
        self.used = bytearray()
        """A byte for each page: a file may have millions, and a set of numbers would take more memory than a hub."""

    def run(self) -> None:
        metas = self.metas()
        if not metas:
            raise DamagedError("neither of its first pages is whole")
        _, self.last, free, main = max(metas, key=lambda meta: meta[0])
        there = len(self.data) // self.page
        self.used = bytearray(there)
        freed = [page for _, value in self._entries(free) for page in self._list(value)]
        for _ in self._entries(main):
            pass
        if len(freed) != len(set(freed)) or max(freed, default=0) > self.last or any(self.used[page] for page in freed if page < there):
            raise DamagedError("pages are both used and free")

    def metas(self) -> list[Meta]:
        """Return what its first two pages say, as far as they can be read."""
        return [found for place in (0, 1) if (found := self._meta(place)) is not None]

    def _meta(self, place: int) -> Meta | None:
        at = place * self.page + HEAD.size
        if len(self.data) < (place + 1) * self.page:
            return None
        magic, version, _, _ = META.unpack_from(self.data, at)
        if magic != MAGIC or version != VERSION:
            return None
        at += META.size
        last, turn = struct.unpack_from("<QQ", self.data, at + 2 * TREE.size)
        return turn, last, Tree.at(self.data, at), Tree.at(self.data, at + TREE.size)

    def _list(self, value: bytes) -> tuple[int, ...]:
        (count,) = struct.unpack_from("<Q", value)
        return struct.unpack_from(f"<{count}Q", value, 8) if count < len(value) else ()

    def _entries(self, tree: Tree) -> Iterator[tuple[bytes, bytes]]:
        """Yield the keys and values of a tree, and walk the trees in it; then compare what was found with what it says of itself."""
        if tree.root == NOWHERE:
            return
        counts = {BRANCH: 0, LEAF: 0, OVERFLOW: 0}
        found, before = 0, b""
        for key, value in self._below(tree.root, tree.depth, counts):
            if found and key <= before and len(key) != 8:  # numbers of turns are in the machine's order
                raise DamagedError("keys are out of order")
            found, before = found + 1, key
            yield key, value
        if (counts[BRANCH], counts[LEAF], counts[OVERFLOW], found) != (tree.branches, tree.leaves, tree.overflows, tree.entries):
            raise DamagedError(f"{found} rows on {sum(counts.values())} pages; it says {tree.entries} rows")

    def _below(self, page: int, depth: int, counts: dict[int, int]) -> Iterator[tuple[bytes, bytes]]:
        kind, lower, _ = self._page(page)
        if kind != (LEAF if depth == 1 else BRANCH):
            raise DamagedError(f"page {page} is not what it was")
        counts[kind] += 1
        for at in struct.unpack_from(f"<{(lower - HEAD.size) // 2}H", self.data, page * self.page + HEAD.size):
            start = page * self.page + at
            low, high, flags, size = NODE.unpack_from(self.data, start)
            body = start + NODE.size + size
            if kind == BRANCH:
                yield from self._below(low | high << 16 | flags << 32, depth - 1, counts)
                continue
            length = low | high << 16
            value = self._big(body, length, counts) if flags & BIG else self.data[body : body + length]
            if flags & SUBTREE:
                for _ in self._entries(Tree.at(value, 0)):
                    pass
            yield self.data[start + NODE.size : body], value

    def _big(self, at: int, length: int, counts: dict[int, int]) -> bytes:
        (page,) = struct.unpack_from("<Q", self.data, at)
        kind, lower, upper = self._page(page)
        pages = lower | upper << 16
        if kind != OVERFLOW or pages != (HEAD.size + length + self.page - 1) // self.page:
            raise DamagedError(f"page {page} is not the value that it was")
        self._use(page + 1, pages - 1)
        counts[OVERFLOW] += pages
        start = page * self.page + HEAD.size
        return self.data[start : start + length]

    def _page(self, page: int) -> tuple[int, int, int]:
        self._use(page)
        number, _, kind, lower, upper = HEAD.unpack_from(self.data, page * self.page)
        if number != page:
            raise DamagedError(f"page {page} was not written")
        return kind, lower, upper

    def _use(self, page: int, count: int = 1) -> None:
        end = page + count
        if not 2 <= page <= end <= min(self.last + 1, len(self.used)) or any(self.used[page:end]):
            raise DamagedError(f"page {page} is used twice, or not there")
        self.used[page:end] = b"\1" * count
