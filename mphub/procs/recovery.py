"""What a router begins with: the exchange as the journal has it."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import msgspec

from mphub.core.order import ordering_key
from mphub.core.rows import share
from mphub.procs.hosts import Host
from mphub.procs.mailbox import Mailbox, event_id, rank_of
from mphub.store.journal import Counters, Progress, Single, Stored, SubscriberState
from mphub.wire.frames import decoder, encode
from mphub.wire.specs import Spec

if TYPE_CHECKING:
    from mphub.procs.exchange import Exchange

_stored, _single, _progress = decoder(Stored), decoder(Single), decoder(Progress)
_state, _spec = decoder(SubscriberState), decoder(Spec)


def recover(exchange: Exchange) -> None:
    """Load the books, and as much of each inbox as its window takes."""
    found = exchange.journal.get("meta", b"counters")
    if found is not None:
        exchange.next_row, exchange.epoch, exchange.accepted, exchange.unmatched = msgspec.msgpack.decode(found)
    exchange.closed = exchange.journal.get("meta", b"closed") is not None
    for name in msgspec.msgpack.decode(exchange.journal.get("meta", b"ended") or encode([])):
        exchange.references.end(name)
    for key, value in exchange.journal.scan("publishers"):
        publisher = int.from_bytes(key, "big")
        exchange.sequences[publisher], *home = msgspec.msgpack.decode(value)
        exchange.homes[publisher] = (home[0], home[1])
    for key, value in exchange.journal.scan("frames"):
        exchange.frames[int.from_bytes(key, "big")] = msgspec.msgpack.decode(value)
    for key, value in exchange.journal.scan("subscribers", b"d", b"e"):
        if (spec := _spec.decode(value)).process is None:
            load_box(exchange, spec, key[1:])
    exchange.sharing.load()
    exchange.letters.load()
    exchange.history.load()
    progress = {box.number: load_progress(exchange, box) for box in exchange.boxes.values()}
    for key, value in exchange.journal.scan("rows"):
        load_everywhere(exchange, int.from_bytes(key, "big"), _stored.decode(value), progress)
    for box in exchange.boxes.values():
        load_singles(exchange, box)
        exchange.load_ranked(box)
    exchange.replays.load()
    exchange.references.end_of_writer(exchange.blobs.number)  # the last router's, of what it did not commit


def load_box(exchange: Exchange, spec: Spec, name: bytes) -> None:
    value = exchange.journal.get("subscribers", b"s" + name)
    state = _state.decode(value) if value is not None else SubscriberState(len(exchange.boxes) + 1, exchange.next_row, Counters())
    box = (Host if spec.hosts else Mailbox).make(spec, state, exchange.admitted)
    exchange.boxes[spec.name] = box
    status = exchange.journal.get("subscribers", b"t" + name)
    if status is not None:
        box.status = status.decode()
    if exchange.journal.get("subscribers", b"u" + name) is None:
        for pattern in spec.patterns:
            exchange.table.add(pattern, box)


def load_progress(exchange: Exchange, box: Mailbox) -> dict[int, Progress]:
    prefix, end = box.number.to_bytes(4, "big"), (box.number + 1).to_bytes(4, "big")
    rows = {int.from_bytes(key[4:], "big"): _progress.decode(v) for key, v in exchange.journal.scan("progress", prefix, end)}
    box.noted = set(rows)
    return rows


def load_everywhere(exchange: Exchange, number: int, stored: Stored, progress: dict[int, dict[int, Progress]]) -> None:
    """Count a row's unfinished subscribers, and load it into the windows that have room."""
    left = 0
    exchange.references.hold_for(number, stored.batch.blob)
    for box in exchange.boxes.values():
        if box.number not in stored.matched or number < box.state.cursor:
            continue
        known = progress[box.number].get(number)
        if known is not None and not known.todo:
            heapq.heappush(box.open, number)
            box.closed.add(number)
            continue
        left += 1
        load_into(exchange, box, number, stored, progress[box.number])
    if left:
        exchange.left[number] = left
    else:
        exchange.journal.delete("rows", number.to_bytes(8, "big"))
        exchange.references.release(number)


def load_into(exchange: Exchange, box: Mailbox, number: int, stored: Stored, progress: dict[int, Progress]) -> None:
    spans = progress[number].todo if number in progress else stored.matched[box.number]
    box.bytes += box.weight(stored, spans)
    if box.overflow == "latest":
        portion = exchange.portion_of(box, number)
        if portion is not None:
            box.note_newest(portion)
    if box.tail is None and box.state.behind and number >= box.state.behind:
        box.tail = box.state.behind  # what is before this comes first
    elif box.tail is None and box.wants_more():
        exchange.load_row(box, number, stored)
    elif box.tail is None:
        box.tail = number


def load_singles(exchange: Exchange, box: Mailbox) -> None:
    prefix, end = box.number.to_bytes(4, "big"), (box.number + 1).to_bytes(4, "big")
    for key, value in exchange.journal.scan("singles", prefix, end):
        number, single = int.from_bytes(key[4:], "big"), _single.decode(value)
        box.bytes += share(single.batch)
        exchange.references.hold_for(number, single.batch.blob)
        if single.due:
            heapq.heappush(box.delayed, (single.due, number, event_id(single.batch)))
            if single.attempt > 1 and box.window.order is not None:
                box.window.order.retry(ordering_key(single.batch, 0))
        elif single.attempt > 1 and box.spec.ordered:
            box.window.add_early([box.single(number, single)])  # its time had come: before those that waited behind it
        elif rank_of(single.batch):
            box.wait_by_rank(single.batch, number)
        else:
            box.load(box.single(number, single))
