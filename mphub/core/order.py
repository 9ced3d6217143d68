"""Ordering keys: events of one are with one process at a time, and behind one of them that is to be retried. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mphub.core.spans import Spans, indexes, spans_of, subtract
from mphub.core.window import Piece, Portion, insert
from mphub.wire.frames import Batch


class Bond:
    """A key is with one process as long as that has events of it."""

    __slots__ = ("held", "laned", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.held = self.laned = 0
        """Events that the process has been given, and that wait for it alone."""


class Order:
    """Sorts what waits for one subscriber by the processes that its ordering keys are with.

    A process takes what comes first of its own keys and of those that are with nobody, and so those are its own. What it meets of others'
    keys goes to their lanes, and of keys that wait for a retry to a place apart: so each event is looked at once or twice.
    """

    def __init__(self) -> None:
        self.bonds: dict[str, Bond] = {}
        self.lanes: dict[object, deque[Piece]] = {}
        self.retried: dict[str, deque[Piece]] = {}
        """Keys of events that are to be retried later -> what waits behind those."""

    def choose(self, owner: object, piece: Piece, room: int, *, is_free: bool) -> Spans:
        """Return which of the first ``room`` events of a piece a process may have, and let it keep only them and what is behind.

        One that runs alone is chosen by itself, and only for a process that holds nothing (``is_free``).
        """
        mine: list[int] = []
        others: dict[int, tuple[deque[Piece], list[int]]] = {}
        for index, key in keys_of(piece.portion.row.batch, piece.spans):
            if len(mine) == room:
                break
            place = self._place(owner, key)
            if place is not None:
                others.setdefault(id(place), (place, []))[1].append(index)
                continue
            alone = index in piece.portion.attempts
            if alone and (mine or not is_free):
                break
            mine.append(index)
            if alone:
                break
        for place, found in others.values():
            spans = spans_of(found)
            insert(place, Piece(piece.portion, spans))
            piece.spans = subtract(piece.spans, spans)
        return spans_of(mine)

    def _place(self, owner: object, key: str) -> deque[Piece] | None:
        """Return where an event waits that is not for this process, which is to be put there."""
        if key in self.retried:
            return self.retried[key]
        bond = self.bonds.get(key)
        if bond is None or bond.owner is owner:
            return None
        bond.laned += 1
        return self.lanes.setdefault(bond.owner, deque())

    def hold(self, owner: object, portion: Portion, spans: Spans, *, laned: bool = False) -> None:
        """Note what a process has been given, from its lane or from what waits for all."""
        for _, key in keys_of(portion.row.batch, spans):
            bond = self.bonds.get(key)
            if bond is None:
                bond = self.bonds[key] = Bond(owner)
            bond.held += 1
            bond.laned -= laned

    def release(self, portion: Portion, spans: Spans) -> None:
        """Note what a process has finished."""
        for _, key in keys_of(portion.row.batch, spans):
            bond = self.bonds.get(key)
            if bond is None:  # it was given to the process before the subscriber was ordered
                continue
            bond.held -= 1
            if not bond.held and not bond.laned:
                del self.bonds[key]

    def give_back(self, owner: object) -> list[Piece]:
        """Let all keys of a process go, which gives back what it held; return what waited for it alone."""
        self.bonds = {key: bond for key, bond in self.bonds.items() if bond.owner is not owner}
        return list(self.lanes.pop(owner, ()))

    def empty(self) -> list[Piece]:
        """Return all that waits for one process or behind a retry; only keys of which a process holds events stay with it."""
        pieces = [piece for queue in (*self.lanes.values(), *self.retried.values()) for piece in queue]
        self.lanes.clear()
        for queue in self.retried.values():
            queue.clear()
        self.bonds = {key: bond for key, bond in self.bonds.items() if bond.held}
        for bond in self.bonds.values():
            bond.laned = 0
        return pieces

    def retry(self, key: str) -> None:
        """Let nothing of a key start before what is to be retried."""
        behind = self.retried.setdefault(key, deque())
        bond = self.bonds.get(key)
        if bond is None or not bond.laned:
            return
        lane = self.lanes[bond.owner]
        for piece in lane:
            spans = spans_of(index for index, found in keys_of(piece.portion.row.batch, piece.spans) if found == key)
            if spans:
                behind.append(Piece(piece.portion, spans))
                piece.spans = subtract(piece.spans, spans)
        self.lanes[bond.owner] = deque(piece for piece in lane if piece.spans)
        bond.laned = 0
        if not bond.held:
            del self.bonds[key]

    def resume(self, key: str) -> list[Piece]:
        """Return what waited behind an event that is now due."""
        return list(self.retried.pop(key, ()))

    def hottest(self) -> tuple[str, int]:
        """Return the key of which most waits for the process that it is with, and how much."""
        return max(((key, bond.laned) for key, bond in self.bonds.items()), key=lambda each: each[1], default=("", 0))


def ordering_key(batch: Batch, index: int) -> str:
    extra = batch.extras.get(index) if batch.extras else None
    return batch.key(index) if extra is None or extra.ordering_key is None else extra.ordering_key


def keys_of(batch: Batch, spans: Spans) -> Iterator[tuple[int, str]]:
    """Yield (index, ordering key)."""
    if len(batch.keys) == 1 and not batch.extras:
        key = batch.keys[0]
        for index in indexes(spans):
            yield index, key
    else:
        for index in indexes(spans):
            yield index, ordering_key(batch, index)
