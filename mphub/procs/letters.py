"""Dead letters, replies and snapshots: the rows that an exchange keeps beside its events."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from mphub.core.rows import Row, part_of, share
from mphub.core.spans import Spans, indexes, length, spans_of, subtract
from mphub.core.window import Portion
from mphub.procs.mailbox import Mailbox, Named, event_id, hex_id, rank_of
from mphub.store.journal import Dead, on_disk
from mphub.wire.frames import Extra, Reply, ReplyRow, decoder, encode, join, split, views

if TYPE_CHECKING:
    from mphub.procs.exchange import Exchange

DEAD_SHARE = 0.25
"""Of max_bytes: beyond it the oldest dead letters give way."""
GROUP_BYTES = 256 << 10
"""Of dead letters that are kept together."""
PAGE_BYTES = 512 << 10
"""What one answer with dead letters holds, so that it fits a frame."""
_dead = decoder(Dead)
_reply = decoder(ReplyRow)
_snapshot = msgspec.msgpack.Decoder(tuple[bytes, str | None])


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an event failed, or its process died: what a dead letter says of it."""

    reason: str
    exit: str | int | None = None
    pid: int | None = None
    traceback: str = ""
    rss: int | None = None
    seconds: float = 0.0
    stderr: str = ""
    """Its last lines."""


NO_DEATH = Cause("")


class Letters:
    """Keeps and finds them; every call belongs inside a turn of the exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.replies: dict[int, list[Reply]] = {}
        """Replies to be sent after this commit, by requester."""
        self._next = 1
        self._dead_bytes = 0

    def load(self) -> None:
        for key, value in self.exchange.journal.scan("dead"):
            self._next = int.from_bytes(key, "big") + 1
            dead = _dead.decode(value)
            self._dead_bytes += cost(dead, value)
            self.exchange.references.hold(dead.batch.blob)
        for _, value in self.exchange.journal.scan("replies"):
            self.exchange.references.hold(_reply.decode(value).blob)
        for _, value in self.exchange.journal.scan("snapshots"):
            self.exchange.references.hold(_snapshot.decode(value)[1])

    # -- dead letters

    def bury(
        self, box: Mailbox, portion: Portion, index: int, reason: str, attempts: int, *,
        error: bytes = b"", cause: Cause | None = None, told: bool = False,
    ) -> None:  # fmt: skip
        """End one event as a dead letter; a request's failure goes to its requester instead."""
        self._enter(box, portion, index, reason, attempts, error, cause or NO_DEATH, told)
        self.exchange.settle(box, portion, [(index, index + 1)])

    def _enter(
        self, box: Mailbox, portion: Portion, index: int, reason: str, attempts: int,
        error: bytes = b"", cause: Cause = NO_DEATH, told: bool = False,
    ) -> None:  # fmt: skip
        row, who = portion.row, box.who(portion, index)
        if row.batch.reply:
            outcome, body = request_outcome(reason, error, cause)
            self.answer(portion, index, outcome, body)
        else:
            batch, body = self.exchange.cut_out(box, portion, index)
            self._keep(
                Dead(
                    who.name, batch, body, reason, attempts, self.exchange.clock(), error,
                    cause.traceback, cause.exit, cause.pid, cause.rss, cause.stderr, told, None, portion.place_of(index),
                )
            )  # fmt: skip
            event = portion.event(index)
            self.exchange.tell(
                "dead_letter", who.name, reason, key=row.batch.key(event), id=hex_id(row.batch, event), attempts=attempts
            )  # fmt: skip
        who.counters.dead += 1
        self.exchange.history.ended(who, portion, [(index, index + 1)], "dead", reason, attempts=attempts)

    def bury_untried(self, box: Mailbox, portion: Portion, spans: Spans, reason: str) -> None:
        """Enter events that nobody has tried as dead letters, those of one frame as one row: a flood of them must cost little."""
        row = portion.row
        if row.batch.reply or row.is_blob or portion.pairs is not None:
            for index in indexes(spans):
                self._enter(box, portion, index, reason, 0)
            return
        for a, b, body in self._groups(row, spans):
            part = part_of(row.batch, a, b, len(body))
            self._keep(Dead(box.name, part, body, reason, 0, self.exchange.clock(), origin=portion.place_of(a)))
            self.exchange.tell("dead_letter", box.name, reason, b - a, key=row.batch.key(a), id=hex_id(row.batch, a), attempts=0)
        box.counters.dead += length(spans)
        self.exchange.history.ended(box, portion, spans, "dead", reason)

    def _groups(self, row: Row, spans: Spans) -> Iterator[tuple[int, int, bytes]]:
        """Yield events of a row by groups that a row takes: (first, behind the last, an array of their pickles)."""
        if row.batch.blob is None and spans == [(0, row.count)]:
            yield 0, row.count, row.body
            return
        events = views(self.exchange.blobs.read(row.batch.blob)) if row.batch.blob is not None else split(row.body)
        for a, b in spans:
            while a < b:
                end, size = a, 0
                while end < b and (end == a or size + len(events[end]) <= GROUP_BYTES):
                    size += len(events[end])
                    end += 1
                yield a, end, join(events[a:end])
                a = end

    def _keep(self, dead: Dead) -> None:
        self._write(self._next.to_bytes(8, "big"), dead)
        self._next += 1
        self.exchange.references.hold(dead.batch.blob)
        while self._dead_bytes > self.exchange.max_bytes * DEAD_SHARE:
            if not self._give_way():
                break

    def _write(self, key: bytes, dead: Dead) -> None:
        value = encode(dead)
        self.exchange.journal.put("dead", key, value)
        self._dead_bytes += cost(dead, value)

    def _give_way(self) -> bool:
        """Drop the oldest dead letters, counted."""
        for key, dead, spans in self._scan(None, None):
            who = self._drop(key, dead, spans, "dead_letters_full")
            self.exchange.tell(
                "dead_letters_full",
                who.name,
                "the oldest dead letters give way: purge or redrive them, or raise max_bytes",
            )
            return True
        return False

    def _drop(self, key: bytes, dead: Dead, spans: Spans, reason: str) -> Named:
        """Drop dead letters of a row, counted; return whose they were."""
        who = self._remove(key, dead, spans)
        who.counters.drop(reason, length(spans))
        self.exchange.history.ended_letters(who, dead, spans, reason)
        return who

    def _remove(self, key: bytes, dead: Dead, spans: Spans) -> Named:
        """Take dead letters out of a row and off the books; return whose they were."""
        self._dead_bytes -= cost(dead, encode(dead))
        left = subtract(dead.spans, spans)
        if left:
            self._write(key, msgspec.structs.replace(dead, left=left))
        else:
            self.exchange.journal.delete("dead", key)
            self.exchange.references.drop(dead.batch.blob)
        who = self.exchange.find(dead.subscriber)
        assert who is not None
        who.counters.dead -= length(spans)
        self.exchange.touch(who.changed_box())
        return who

    def _scan(self, name: str | None, ids: Collection[int] | None, after: int = 0) -> Iterator[tuple[bytes, Dead, Spans]]:
        """Yield rows, each with which of its events are meant."""
        for key, value in self.exchange.journal.scan("dead", (after + 1).to_bytes(8, "big")):
            dead = _dead.decode(value)
            if name is None or dead.subscriber == name:
                first = event_id(dead.batch)
                spans = dead.spans if ids is None else spans_of(i for i in indexes(dead.spans) if first + i in ids)
                if spans:
                    yield key, dead, spans

    def page(self, name: str | None, after: int, limit: int = PAGE_BYTES) -> tuple[list[bytes], int]:
        """Return encoded dead letters behind number ``after`` and the number to go on from (0: that was all)."""
        found: list[bytes] = []
        size = 0
        for key, dead, spans in self._scan(name, None, after):
            for one in each_of(dead, spans):
                found.append(encode(one))
                size += len(found[-1])
            if size > limit:
                return found, int.from_bytes(key, "big")
        return found, 0

    def redrive(self, name: str | None, ids: Collection[int] | None) -> int:
        """Let dead letters wait again, with their first attempt before them; return how many."""
        moved = 0
        for key, dead, spans in list(self._scan(name, ids)):
            who = self.exchange.find(dead.subscriber)
            if who is None or who.gone:
                continue
            for one in each_of(dead, spans):
                self._let_wait(who.changed_box(), one)
            self._remove(key, dead, spans)
            moved += length(spans)
        return moved

    def _let_wait(self, box: Mailbox, dead: Dead) -> None:
        epoch = self.exchange.epoch
        batch = msgspec.structs.replace(dead.batch, extras=untimed(dead.batch.extras))
        number = self.exchange.make_single(box, batch, dead.body, epoch, 1, 0.0, dead.origin)
        box.counters.pending[epoch] = box.counters.pending.get(epoch, 0) + 1
        box.unfinished += 1
        box.bytes += share(dead.batch)
        if rank_of(batch):
            box.wait_by_rank(batch, number)
        else:
            self.exchange.load_single(box, number, box.window.add)

    def purge(self, name: str | None, ids: Collection[int] | None) -> int:
        """Drop dead letters, counted as ``purged``; return how many."""
        gone = 0
        for key, dead, spans in list(self._scan(name, ids)):
            self._drop(key, dead, spans, "purged")
            gone += length(spans)
        return gone

    # -- replies

    def answer(self, portion: Portion, index: int, outcome: str, body: bytes) -> None:
        """End one request."""
        batch = portion.row.batch
        self.reply(ReplyRow(batch.publisher, batch.number + portion.event(index), outcome, body))

    def reply(self, row: ReplyRow) -> None:
        """Keep a reply until its requester has it; of one that is dead nobody will ever say so."""
        if row.publisher not in self.exchange.sequences:
            self.exchange.references.end(row.blob)
            return
        self.exchange.journal.put("replies", reply_key(row.publisher, row.number), encode(row))
        self.exchange.references.hold(row.blob)
        self.replies.setdefault(row.publisher, []).append(told(row))

    def unanswered(self, publisher: int) -> list[Reply]:
        """Return the replies that a requester has not confirmed: it has come back."""
        prefix, end = publisher.to_bytes(8, "big"), (publisher + 1).to_bytes(9, "big")[-8:]
        rows = [
            _reply.decode(value) for _, value in self.exchange.journal.scan("replies", prefix, end if publisher + 1 < 1 << 64 else None)
        ]
        return [told(row) for row in rows]

    def taken(self, publisher: int, numbers: list[int]) -> None:
        for number in numbers:
            key = reply_key(publisher, number)
            value = self.exchange.journal.get("replies", key)
            if value is None:
                continue
            self.exchange.journal.delete("replies", key)
            self.exchange.references.drop(_reply.decode(value).blob)

    def forget_requester(self, publisher: int) -> None:
        self.taken(publisher, [reply.number for reply in self.unanswered(publisher)])
        self.replies.pop(publisher, None)

    # -- snapshots

    def keep_snapshot(self, name: str, data: bytes, blob: str | None) -> None:
        """Replace a subscriber's snapshot."""
        old = self.exchange.journal.get("snapshots", name.encode())
        self.exchange.journal.put("snapshots", name.encode(), encode((data, blob)))
        self.exchange.references.hold(blob)
        if old is not None:
            self.exchange.references.drop(_snapshot.decode(old)[1])

    def snapshot(self, name: str) -> tuple[bytes, str | None] | None:
        value = self.exchange.journal.get("snapshots", name.encode())
        return None if value is None else _snapshot.decode(value)


def request_outcome(reason: str, error: bytes, cause: Cause) -> tuple[str, bytes]:
    """Say how a request ended: (outcome, its body)."""
    if reason in ("exception", "rejected"):
        return "exception", encode((error, cause.traceback))
    if reason == "crash":
        return "crashed", encode((cause.exit, cause.pid))
    if reason == "timeout":
        return "timeout", encode(cause.seconds)
    return "dropped", encode(reason)


def each_of(dead: Dead, spans: Spans) -> Iterator[Dead]:
    """Yield some of the dead letters of a row alone."""
    if dead.batch.count == 1:
        yield dead
        return
    events, (row, first) = split(dead.body), dead.origin
    for i in indexes(spans):
        batch, body = part_of(dead.batch, i, i + 1, len(events[i])), join([events[i]])
        yield msgspec.structs.replace(dead, batch=batch, body=body, left=None, origin=(row, first + i))


def untimed(extras: dict[int, Extra] | None) -> dict[int, Extra] | None:
    """Forget when events were to start: who redrives them wants them to start now."""
    return extras and {index: msgspec.structs.replace(extra, due=0.0, expires=0.0) for index, extra in extras.items()}


def cost(dead: Dead, value: bytes) -> int:
    """Return the bytes that a row takes, with its file."""
    return on_disk(value) + (dead.batch.size if dead.batch.blob is not None else 0)


def told(row: ReplyRow) -> Reply:
    """Return what its requester gets of it."""
    return Reply(row.number, row.outcome, row.body, row.blob, row.more)


def reply_key(publisher: int, number: int) -> bytes:
    return publisher.to_bytes(8, "big") + number.to_bytes(8, "big")
