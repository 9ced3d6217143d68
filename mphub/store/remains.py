"""What can be read of a damaged LMDB file: the tables, page by page, around what cannot."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from mphub.store.journal import BOOKS, TABLES
from mphub.store.pages import BIG, BRANCH, HEAD, LEAF, NODE, NOWHERE, OVERFLOW, SUBTREE, TREE, DamagedError, Meta, Tree, Walk

OWN: Final = {name.encode(): name for name in TABLES if name not in BOOKS}
"""Tables that are trees of their own."""
CHUNK: Final = 1 << 20
"""Bytes that are copied at once."""
PREFIXES: Final = tuple(BOOKS.values())
Value = bytes | memoryview


class Node(NamedTuple):
    key: bytes
    flags: int
    length: int
    body: int
    """Where its value begins in the file, or the number of the page where that is."""
    child: int


class Remains(Walk):
    """One of the two states that a file has, as far as it can be read."""

    def __init__(self, data: mmap.mmap, meta: Meta) -> None:
        super().__init__(data)
        self._view = memoryview(data)
        self.turn, self.last, free, main = meta
        self.used = bytearray(len(data) // self.page)
        self.holes = 0
        """Pages and places of rows that cannot be read."""
        self.books: list[tuple[bytes, Value]] = []
        self.tables: dict[str, list[tuple[bytes, Value]]] = {name: [] for name in OWN.values()}
        self.claimed: dict[str, int] = {}
        """table -> rows that it has, as far as the file tells."""
        self.strays: list[tuple[bytes, Value]] = []
        """Rows of pages that are in use, but that nothing readable leads to: their tables are told by what they look like."""
        free_pages = self._free(free)
        self._read_main(main)
        self.found_free = free_pages is not None and not any(self.used[page] for page in free_pages if page < len(self.used))
        """It is known which pages are free: those hold rows that have been deleted."""
        if self.holes and free_pages is not None and self.found_free:
            self._read_strays(free_pages)
        self.lost_books = max(0, main.entries - len(self.claimed) - len(self.books))
        found = sum(len(rows) for rows in self.tables.values()) + len(self.strays)
        self.lost = (len(OWN) - len(self.claimed)), sum(self.claimed.values()) - found + self.lost_books
        """Tables and rows that cannot be read, about."""
        self.is_newest = True
        """It is known to be the newer one."""

    def _free(self, tree: Tree) -> set[int] | None:
        """Return the pages that are free; None if that cannot be read whole."""
        try:
            found = [page for _, value in self._entries(tree) for page in self._list(value)]
        except (DamagedError, struct.error):
            self.holes += 1
            return None
        return set(found) if len(found) == len(set(found)) and all(2 <= page <= self.last for page in found) else None

    def _read_main(self, main: Tree) -> None:
        for node in self._rows(main.root, main.depth, b"", None):
            self._take_main(node)

    def _take_main(self, node: Node) -> None:
        if node.flags & SUBTREE:
            self._take_table(node)
        elif node.key.startswith(PREFIXES) and (value := self._value(node)) is not None:
            self.books.append((node.key, value))

    def _take_table(self, node: Node) -> None:
        name = OWN.get(node.key)
        if name is None or name in self.claimed or (value := self._value(node)) is None:
            return
        if len(value) != TREE.size:
            self.holes += 1
            return
        tree = Tree.at(value, 0)
        self.claimed[name] = tree.entries
        for row in self._rows(tree.root, tree.depth, b"", None):
            if (value := self._value(row)) is not None:
                self.tables[name].append((row.key, value))

    def _rows(self, page: int, depth: int, low: bytes, high: bytes | None) -> Iterator[Node]:
        """Yield what the leaves below a page have between two keys: a page of another time hardly ever has that alone."""
        if page == NOWHERE:
            return
        try:
            nodes = self._nodes(page, LEAF if depth <= 1 else BRANCH, low, high)
        except (DamagedError, struct.error):
            self.holes += 1
            return
        if depth <= 1:
            yield from nodes
            return
        ends = [*(node.key for node in nodes[1:]), high]
        for node, end in zip(nodes, ends, strict=False):
            yield from self._rows(node.child, depth - 1, max(low, node.key), end)

    def _nodes(self, page: int, kind: int, low: bytes = b"", high: bytes | None = None) -> list[Node]:
        found, end, _ = self._page(page)
        if found != kind or not HEAD.size <= end <= self.page:
            raise DamagedError(f"page {page} is not what it was")
        nodes: list[Node] = []
        for at in struct.unpack_from(f"<{(end - HEAD.size) // 2}H", self.data, page * self.page + HEAD.size):
            node = self._node(page, at, kind) if end <= at <= self.page - NODE.size else None
            if node is not None and self._is_in_place(node, nodes, kind, low, high):
                nodes.append(node)
            else:
                self.holes += 1
        return nodes

    def _is_in_place(self, node: Node, before: list[Node], kind: int, low: bytes, high: bytes | None) -> bool:
        if kind == BRANCH and not before:  # has no key
            return True
        return low <= node.key and (high is None or node.key < high) and (not before or before[-1].key < node.key)

    def _node(self, page: int, at: int, kind: int) -> Node | None:
        start, end = page * self.page + at, (page + 1) * self.page
        low, high, flags, size = NODE.unpack_from(self.data, start)
        body, length = start + NODE.size + size, low | high << 16
        if body + (0 if kind == BRANCH else 8 if flags & BIG else length) > end:
            return None
        return Node(self.data[start + NODE.size : body], flags, length, body, length | flags << 32)

    def _value(self, node: Node) -> Value | None:
        if not node.flags & BIG:
            return self._view[node.body : node.body + node.length]
        try:
            (page,) = struct.unpack_from("<Q", self.data, node.body)
            kind, lower, upper = self._page(page)
            pages = lower | upper << 16
            if kind != OVERFLOW or pages != (HEAD.size + node.length + self.page - 1) // self.page:
                raise DamagedError(f"page {page} is not the value that it was")
            self._use(page + 1, pages - 1)
        except (DamagedError, struct.error):
            self.holes += 1
            return None
        start = page * self.page + HEAD.size
        return self._view[start : start + node.length]

    def _read_strays(self, free: set[int]) -> None:
        """Read the leaves that nothing leads to any more: of pages that are neither free nor found, which are those below a hole."""
        for page in list(self._unfound(free)):
            nodes = self._stray(page)
            if any(is_of_main(node) for node in nodes):
                for node in nodes:
                    self._take_main(node)
            elif nodes:
                self.used[page] = 0  # a table may lead to it that is found meanwhile
        for node in (node for page in list(self._unfound(free)) for node in self._stray(page)):
            if (value := self._value(node)) is not None:
                self.strays.append((node.key, value))

    def _unfound(self, free: set[int]) -> Iterator[int]:
        """Yield the leaves among them; a large value is passed whole: what is in it may look like anything."""
        page = 2
        while page < min(self.last + 1, len(self.used)):
            number, _, kind, lower, upper = HEAD.unpack_from(self.data, page * self.page)
            is_open = not self.used[page] and page not in free and number == page
            if is_open and kind == LEAF:
                yield page
            page += max(1, lower | upper << 16) if is_open and kind == OVERFLOW else 1

    def _stray(self, page: int) -> list[Node]:
        try:
            return self._nodes(page, LEAF)
        except (DamagedError, struct.error):  # a table that was read meanwhile has it
            return []


def is_of_main(node: Node) -> bool:
    return bool(node.flags & SUBTREE) or node.key.startswith(PREFIXES)


def remains_of(path: Path, scratch: Path) -> Remains:
    """Read a file: of its two states the one of which more can be read, the newer one if that is the same.

    It is copied to another folder first: to look at what a disk cannot read, in a map, ends the process.
    Raises DamagedError: it has neither.
    """
    with tempfile.TemporaryFile(dir=scratch) as copy, open(path, "rb", buffering=0) as file:
        size = copy_readable(file.fileno(), copy.fileno())
        if size < 2 * mmap.PAGESIZE:
            raise DamagedError("its first pages are not there")
        data = mmap.mmap(copy.fileno(), 0, prot=mmap.PROT_READ)
    metas = Walk(data).metas()
    if not metas:
        raise DamagedError("neither of its first pages is whole")
    newest, *older = sorted(metas, key=lambda meta: -meta[0])
    found = Remains(data, newest)
    if found.lost != (0, 0):
        found = min([found, *(Remains(data, meta) for meta in older)], key=lambda each: each.lost)
    found.is_newest = found.turn == newest[0] and bool(older)
    return found


def copy_readable(source: int, target: int) -> int:
    """Copy a file without what the disk cannot read, which is zeros then; return its bytes."""
    size = os.fstat(source).st_size
    os.truncate(target, size)
    for start in range(0, size, CHUNK):
        try:
            write_at(target, os.pread(source, CHUNK, start), start)
        except OSError:
            for page in range(start, min(start + CHUNK, size), mmap.PAGESIZE):
                copy_page(source, target, page)
    return size


def copy_page(source: int, target: int, at: int) -> None:
    try:
        data = os.pread(source, mmap.PAGESIZE, at)
    except OSError:
        return
    write_at(target, data, at)


def write_at(target: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(target, data, at)
        data, at = data[written:], at + written
