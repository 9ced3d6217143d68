"""The routing table: which subscribers a key is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from mphub.core.keys import MAX_CACHED

S = TypeVar("S")


class _Node(Generic[S]):
    __slots__ = ("here", "next")

    def __init__(self) -> None:
        self.next: dict[str, _Node[S]] = {}
        self.here: list[tuple[int, S]] = []


class _Cache(dict[str, tuple[S, ...]]):
    """What was found, by key."""

    def __init__(self, find: Callable[[str], tuple[S, ...]]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: str) -> tuple[S, ...]:
        found = self[key] = self._find(key)
        return found


class RoutingTable(Generic[S]):
    """A trie over tokens behind a bounded cache: a known key costs one dictionary lookup, however many patterns there are."""

    def __init__(self, group: Callable[[tuple[S, ...]], tuple[S, ...]] = tuple) -> None:
        """``group`` makes of those that a key has, once for all keys that have the same ones, what is to be found."""
        self._group = group
        self._root: _Node[S] = _Node()
        self._entries: list[tuple[str, S]] = []
        self._order = 0
        self._cache = _Cache(self._find)
        self._sets: dict[tuple[S, ...], tuple[S, ...]] = {}

    def add(self, pattern: str, subscriber: S) -> None:
        self._entries.append((pattern, subscriber))
        self._insert(pattern, subscriber)
        self._forget()

    def remove(self, subscriber: S) -> None:
        """Take out all patterns of a subscriber."""
        entries = [entry for entry in self._entries if entry[1] is not subscriber]
        self._entries, self._root, self._order = entries, _Node(), 0
        for pattern, other in entries:
            self._insert(pattern, other)
        self._forget()

    def match(self, key: str) -> tuple[S, ...]:
        """Return the subscribers of a key, each once, in the order of addition: the same object for all keys that have the same ones."""
        return self._cache[key]

    def match_all(self, keys: list[str]) -> list[tuple[S, ...]]:
        """Do what ``match`` does for each key, with no call in Python for those that are known."""
        return list(map(self._cache.__getitem__, keys))

    def _find(self, key: str) -> tuple[S, ...]:
        """Find the subscribers of a key that is not known."""
        if len(self._cache) >= MAX_CACHED:
            self._forget()
        found = self._search(key.split("."))
        grouped = self._sets.get(found)
        if grouped is None:
            grouped = self._sets[found] = self._group(found)
        return grouped

    def _forget(self) -> None:
        self._cache.clear()
        self._sets.clear()

    def patterns(self) -> list[tuple[str, S]]:
        return list(self._entries)

    def _insert(self, pattern: str, subscriber: S) -> None:
        node = self._root
        for token in pattern.split("."):
            node = node.next.setdefault(token, _Node())
        node.here.append((self._order, subscriber))
        self._order += 1

    def _search(self, tokens: list[str]) -> tuple[S, ...]:
        found: list[tuple[int, S]] = []
        level = [self._root]
        for token in tokens:
            following = []
            for node in level:
                if ">" in node.next:
                    found += node.next[">"].here
                following += [child for name in (token, "*") if (child := node.next.get(name)) is not None]
            level = following
        for node in level:
            found += node.here
        if len(found) == 1:  # nearly always
            return (found[0][1],)
        unique = {id(subscriber): subscriber for _, subscriber in sorted(found, key=lambda entry: entry[0])}
        return tuple(unique.values())
