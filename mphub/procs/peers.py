"""Who is at the other end of the router's streams, and what may come from there."""

from __future__ import annotations

from collections import Counter
from math import inf

from mphub.core.delivery import WAITING, Held
from mphub.procs.consumer import Consumer
from mphub.procs.mailbox import Mailbox
from mphub.store.board import Board
from mphub.wire.frames import MAX_TOGETHER, Batch, HelloPublisher, ProtocolError, split
from mphub.wire.stream import Stream

CONFIRM_EVERY = 8
"""Reports after which a subscriber is confirmed without a delivery to ride on."""


class PublisherPeer:
    """A publisher at the other end of a stream."""

    __slots__ = ("behind", "confirm_at", "dismissed", "hello", "refused", "sequence", "stream", "told")

    def __init__(self, stream: Stream, hello: HelloPublisher, sequence: int) -> None:
        self.stream, self.hello, self.sequence = stream, hello, sequence
        self.told = -1
        self.confirm_at = 0.0
        """When at the latest; a request's confirm waits a little for its reply (0: at once)."""
        self.refused: list[tuple[int, str, str]] = []
        self.behind = False
        self.dismissed = False
        """It has been told that the hub stops."""


class Seat(Consumer):
    """A consumer in a process of its own, as the supervisor announced it."""

    __slots__ = (
        "awaited",
        "board",
        "crowds",
        "fenced",
        "inside",
        "met",
        "most",
        "patience",
        "predecessor",
        "ready",
        "slow_at",
        "stopping",
        "stream",
        "told",
        "unconfirmed",
    )

    def __init__(self, incarnation: int, box: Mailbox, replica: int, board: Board, predecessor: int | None = None) -> None:
        super().__init__(incarnation, box, replica)
        self.board = board
        self.predecessor = predecessor
        """The incarnation that it is to follow: while that has a seat, this one is not welcomed."""
        self.most = box.spec.recycle.max_events or 0
        """Events that it has run after which another is to follow it (0: any number)."""
        self.stream: Stream | None = None
        self.met = True
        """It has said to this router what it holds; a new one holds nothing."""
        self.inside = False
        """It has been welcomed on this stream."""
        self.fenced = False
        """Nothing from it counts any more: it is to be ended."""
        self.ready = False
        self.slow_at = inf
        """When it has been silent for too long, by the monotonic clock, if it is one of several and holds more than one event."""
        self.stopping = False
        self.unconfirmed, self.patience = 0, CONFIRM_EVERY
        """Reports that it has not been told of, and how many of them may wait for a delivery to ride on."""
        self.told = 0
        self.crowds: set[int] = set()
        """Those that it has been told of, if several subscribers share it."""
        self.awaited = 0
        """A report before which nothing is handed out: it may put an event before all others."""

    @property
    def holds_more_than_it_runs(self) -> bool:
        return self.delivery.holding > self.delivery.at_a_time

    def may_take(self) -> bool:
        """Say whether more can be handed out to it."""
        return self.ready and not self.stopping and not self.fenced and not self.box.is_at_rest and self.told >= self.awaited


def body_of(held: Held) -> bytes:
    """Return the body of a delivery: the row's own, or the events cut out of it."""
    row, pairs = held.portion.row, held.portion.pairs
    if row.batch.blob is not None:
        return b""
    return row.picked(held.spans if pairs is None else pairs.events(held.spans))


def check_batch(batch: Batch, peer: PublisherPeer, body: bytes) -> None:
    """Refuse what no publisher of ours sends, before it reaches the journal.

    Raises ProtocolError.
    """
    if batch.publisher != peer.hello.publisher or batch.sequence < 1:
        raise ProtocolError("a batch in another publisher's name, or without a number")
    count, starts = batch.count, batch.starts
    if len(starts) != len(batch.keys) or starts[0] != 0 or starts[-1] > count or (len(starts) > 1 and starts != sorted(starts)):
        raise ProtocolError(f"a batch of {count} events whose {len(batch.keys)} keys do not start one after the other")
    if count > MAX_TOGETHER:
        raise ProtocolError(f"a batch of {count} events")
    # 8 us for 300 events: better here than where they are cut out or handled
    if batch.blob is None and (found := len(split(body))) != count:
        raise ProtocolError(f"a batch of {count} events whose body has {found}")


def running_of(seat: Seat) -> Counter[str]:
    """Count what a process has started and not yet had committed, by subscriber."""
    running: Counter[str] = Counter()
    for held in seat.delivery.held:
        for a, b in held.spans:
            states = seat.board.states(held.number - held.index + a, b - a)
            if held.portion.pairs is None:
                running[seat.box.name] += len(states) - states.count(WAITING)
            else:
                started = (a + place for place, state in enumerate(states) if state != WAITING)
                running.update(held.portion.pairs.at(index)[1].name for index in started)
    return running


def unpack_ids(ids: list[bytes] | None) -> set[int] | None:
    return None if ids is None else {int.from_bytes(i, "big") for i in ids}
