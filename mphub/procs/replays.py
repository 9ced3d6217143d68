"""Past events once more: for a subscriber that asks for them, and for one that begins with the earliest."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec

from mphub.core.rows import Row
from mphub.core.spans import Spans, length
from mphub.core.window import Portion
from mphub.procs.history import STEP, Wanted, blanked
from mphub.procs.letters import untimed
from mphub.procs.mailbox import Mailbox
from mphub.store.journal import Past, Stored
from mphub.wire.frames import decoder, encode

if TYPE_CHECKING:
    from mphub.procs.exchange import Exchange

_stored = decoder(Stored)
_step = msgspec.msgpack.Decoder(tuple[bytes, int, int, int, bool, int])
FOREVER = (0.0, inf)


class Replays:
    """Takes rows from history into inboxes; every call belongs inside a turn of the exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.behind: set[Mailbox] = set()
        """Those that began with the earliest event and have not caught up yet."""

    # -- for one that asks

    def replay(self, box: Mailbox, run: bytes, patterns: list[str], since: float, until: float, after: int, before: int) -> dict[str, Any]:
        """Let a subscriber have past events again that are for it, as far as its inbox takes them; return how many, and where to go on.

        ``run`` and ``after`` tell a call that is repeated, its answer being lost. ``before``: the first row that is not meant any more
        (0: the next that comes).
        """
        journal, key = self.exchange.journal, b"r" + box.name.encode()
        last = journal.get("subscribers", key)
        if last is not None and (done := _step.decode(last))[:2] == (run, after):
            return {"count": done[2], "next": done[3], "full": done[4], "before": done[5]}
        before = before or self.exchange.next_row
        count, following, full = self._repeat(box, Wanted(patterns, box.spec.patterns), (since, until), after, before)
        journal.put("subscribers", key, encode((run, after, count, following, full, before)))
        return {"count": count, "next": following, "full": full, "before": before}

    def _repeat(self, box: Mailbox, wanted: Wanted, times: tuple[float, float], after: int, before: int) -> tuple[int, int, bool]:
        count, ends = 0, time.monotonic() + STEP
        for number, past, spans in self.exchange.history.find(wanted, *times, after):
            if number >= before:
                break
            if (full := not box.room()) or (time.monotonic() > ends and number > after):
                return count, number, full
            if spans and not past.batch.reply:
                self._repeat_row(box, number, past, spans)
                count += length(spans)
        return count, 0, False

    def _repeat_row(self, box: Mailbox, number: int, past: Past, spans: Spans) -> None:
        """Enter events of a row as a new one that is for that subscriber alone, and starts as soon as it can."""
        exchange = self.exchange
        batch = msgspec.structs.replace(past.batch, extras=untimed(past.batch.extras))
        body = past.body if spans == [(0, batch.count)] or batch.blob is not None else blanked(past.body, spans)
        row = Row(exchange.next_row, exchange.epoch, batch, encode(batch), body, origin=(number, 0))
        exchange.next_row += 1
        exchange.store(row, {box: Portion(row, spans, row.share)}, number)

    # -- for one that begins with the earliest

    def load(self) -> None:
        self.behind = {box for box in self.exchange.boxes.values() if box.state.behind}
        for box in self.behind:
            box.tail = box.tail or box.state.behind

    def begin(self, box: Mailbox, *, forgotten: bool) -> None:
        """Let a new subscriber begin with the earliest event; one of its name may have been forgotten."""
        if first := self.exchange.history.first:
            if forgotten:  # rows that others are at say that they were for it
                box.state.former.append(box.number)
                box.state.number = self.exchange.next_number
            box.state.behind, box.state.joined, box.tail = first, self.exchange.next_row, first
            self.behind.add(box)

    def end(self, box: Mailbox) -> None:
        """Let a subscriber have no more of what was before it."""
        box.state.behind = 0
        self.behind.discard(box)

    @property
    def is_busy(self) -> bool:
        """Say whether there is more for somebody who has room for it."""
        return any(has_room(box) for box in self.behind)

    def go_on(self) -> None:
        """See to it that this turn brings more to those who have room for it."""
        for box in self.behind:
            if has_room(box):
                self.exchange.touch(box)

    def bring(self, box: Mailbox) -> bool:
        """Let a subscriber have what its window takes of what was before it; say whether that was the last of it.

        What it has from its publishers meanwhile waits behind that, in the journal.
        """
        state, ends = box.state, time.monotonic() + STEP
        for number, past, spans in self.exchange.history.find(Wanted(box.spec.patterns), *FOREVER, state.behind):
            if number >= state.joined:
                break
            if not has_room(box) or (time.monotonic() > ends and number > state.behind):
                state.behind = box.tail = number
                return False
            if spans and not past.batch.reply:
                self._bring_row(box, number, past, spans)
        box.tail = state.joined
        self.end(box)
        return True

    def _bring_row(self, box: Mailbox, number: int, past: Past, spans: Spans) -> None:
        """Enter a subscriber among those that a row is for, which may be at work for others; its number keeps its place."""
        exchange, key = self.exchange, number.to_bytes(8, "big")
        value = exchange.journal.get("rows", key)
        stored = Stored(past.epoch, past.batch, {}, past.body) if value is None else _stored.decode(value)
        row = exchange.row_of(number, stored)
        row.replace(past.body)  # which others may have let go
        portion = Portion(row, spans, row.share)
        if not exchange.wait_apart(box, portion):
            return
        stored = msgspec.structs.replace(stored, matched=stored.matched | {box.number: portion.todo}, body=past.body)
        exchange.journal.put("rows", key, encode(stored))
        exchange.left[number] = exchange.left.get(number, 0) + 1
        if value is None:
            exchange.references.hold_for(number, past.batch.blob)
        exchange.enter(box, portion)
        box.load(portion)


def has_room(box: Mailbox) -> bool:
    """Say whether a window is to be filled: whatever waits behind it, as that comes later."""
    return box.runs_low() and box.window.loaded < box.maxsize
