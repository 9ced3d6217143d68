"""What the router decides and keeps, without its sockets: rows in, deliveries out, everything in one journal transaction a turn.

The router drives it with streams, the engines without processes with plain calls.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from mphub import failpoints
from mphub.core.delivery import Range, Verdict, parts_within
from mphub.core.keys import nearest
from mphub.core.order import ordering_key
from mphub.core.rate import Quota
from mphub.core.rows import Place, Row, part_of, share
from mphub.core.spans import Spans, contains, first_of, indexes, length, spans_of, subtract
from mphub.core.table import RoutingTable
from mphub.core.window import Portion
from mphub.errors import JournalError
from mphub.observe.limiter import Limiter
from mphub.options import Retention
from mphub.procs.consumer import Consumer
from mphub.procs.history import History
from mphub.procs.hosts import Host, Member, Target, crowds_of, each_of, portions_of
from mphub.procs.letters import Cause, Letters
from mphub.procs.mailbox import ABSENT, LASTING, Mailbox, event_id, hex_id
from mphub.procs.recovery import recover
from mphub.procs.replays import Replays
from mphub.procs.room import Room
from mphub.procs.sharing import Sharing
from mphub.procs.taps import Taps
from mphub.procs.withdrawals import CANCELLED, OVERFLOW, Withdrawals
from mphub.store.blobs import Blobs, References
from mphub.store.board import Board
from mphub.store.journal import Counters, Keeper, Progress, Single, Stored, SubscriberState, Turn
from mphub.wire.frames import Batch, Extra, Failure, ReplyRow, Report, decoder, encode, join, views
from mphub.wire.specs import Spec

ADMIT = 0.75
"""Share of max_bytes for events; the rest is for outputs, acks and dead letters."""
MAX_UNMATCHED_KEYS = 100
AT_HAND = 100
"""Events with a priority that are in the window; the others wait in the journal."""
GRAIN, REST = 0.01, 50
"""Seconds between two looks at what is too late to start: each goes through a whole window; and how often the time that one took."""
HOT = 1000
"""Events of one ordering key that wait while a replica is idle, from which a notice names the key."""
EVEN_REST = 20
"""Times as long as a look at all that waits took until the next one: a twentieth of the time at most."""
SETTLED = 1 << 62
"""In place of a frame number: the death of that incarnation is settled."""
T = TypeVar("T")
_stored, _single, _progress = decoder(Stored), decoder(Single), decoder(Progress)
_state, _spec = decoder(SubscriberState), decoder(Spec)


@dataclass(frozen=True, slots=True)
class News:
    """Something that the hub's process should hear of."""

    kind: str
    subscriber: str | None
    message: str
    details: dict[str, object]
    count: int = 1
    """How many times it happened; the details are the first's."""

    def notice(self, limiter: Limiter, now: float) -> dict[str, Any] | None:
        """Return the notice of it, if it may be told: of a kind the first of each subscriber (of each key, if it matched nobody), then one
        a second.
        """
        apart = self.details.get("key") if self.kind == "unmatched" else self.details.get("id") == "teardown"
        passes, first, more = limiter.allows((self.kind, self.subscriber, apart), now, self.count)
        details = {**self.details, "first": first, "more": more}
        return {"kind": self.kind, "subscriber": self.subscriber, "message": self.message, "details": details} if passes else None


class Exchange:
    """All subscribers' mailboxes over one journal. Every call but the queries belongs inside ``turn``."""

    def __init__(
        self, journal: Keeper, blobs: Blobs, max_bytes: int, clock: Callable[[], float], retention: Retention | None = None
    ) -> None:
        self.clock = clock
        self.journal, self.blobs, self.max_bytes = journal, blobs, max_bytes
        self.history = History(self, retention)
        self.references = References(blobs, synced=journal.synced, kept=self.history.has_file)
        self.admitted = int(max_bytes * ADMIT)
        self.boxes: dict[str, Mailbox] = {}
        self.full: set[Mailbox] = set()
        """Those whose publishers wait."""
        self.members: dict[str, Member] = {}
        """Subscribers that share a process with others: those have a box together."""
        self.sharing = Sharing(self)
        self.table: RoutingTable[Target] = RoutingTable(self.sharing.together)
        self.accepted = 0
        self.closed = False
        """Nothing is taken in any more."""
        self.unmatched: dict[str, int] = {}
        self.epoch = 1
        self.sequences: dict[int, int] = {}
        self.homes: dict[int, tuple[int, float]] = {}
        """publisher -> (pid, start time) of its process."""
        self.frames: dict[int, tuple[int, int]] = {}
        """incarnation -> (last frame committed, delivery number up to which it goes)."""
        self.news: list[News] = []
        self.informed = True
        """It is known which processes live and may hold what looks as if it waited."""
        self.told: int | None = None
        """The delivery number of the failure in the report at hand that is raised to its caller (inline)."""
        self.letters, self.room, self.withdrawals, self.taps = Letters(self), Room(self), Withdrawals(self), Taps()
        self.replays = Replays(self)
        self.next_row = 1
        self.left: dict[int, int] = {}
        self._rows: WeakValueDictionary[int, Row] = WeakValueDictionary()
        self._dirty: dict[Mailbox, dict[int, Portion]] = {}
        self._dirty_publishers: set[int] = set()
        self._dirty_frames: set[int] = set()
        self._meta: tuple[int, int, int] = (0, 0, 0)
        self._turn = Turn(self)
        with journal.turn():
            recover(self)
        for box in self.boxes.values():
            self._note_full(box)

    # -- a turn

    def turn(self) -> Turn:
        """Commit all that happens inside in one transaction; remove ended blobs afterwards."""
        return self._turn

    def begin(self) -> None:
        self.journal.begin()

    def abort(self) -> None:
        self.taps.noted.clear()
        self.journal.abort()

    def commit(self) -> None:
        lacks_room = self.room.is_needed()
        if lacks_room:
            self.room.relieve()
        self._write_dirty()
        self.history.write()
        if lacks_room:
            self.room.compact()
        if self.references.ended:  # for a router that dies before it has removed them
            self.journal.put("meta", b"ended", encode(self.references.ended))
        self.references.sync()
        self.journal.commit()
        if self.taps.noted:
            self.taps.offer()
        failpoints.hit("router.sweeping")
        if self.references.ended:
            self.references.sweep()

    def _write_dirty(self) -> None:
        for box, portions in self._dirty.items():
            if isinstance(box, Host):
                self.sharing.tidy(box)
            if box.runs_low():
                self.refill(box)
            if box.ranked:
                self.load_ranked(box)
            for row in box.advance(self.next_row):
                self.journal.delete("progress", progress_key(box, row))
            self._write_progress(box, portions)
            for key, value in box.changed_books():
                self.journal.put("subscribers", key, value)
            self._note_full(box)
        self._dirty.clear()
        for publisher in self._dirty_publishers:
            value = encode((self.sequences[publisher], *self.homes.get(publisher, (0, 0.0))))
            self.journal.put("publishers", publisher.to_bytes(8, "big"), value)
        self._dirty_publishers.clear()
        for incarnation in self._dirty_frames:
            self.journal.put("frames", incarnation.to_bytes(8, "big"), encode(self.frames[incarnation]))
        self._dirty_frames.clear()
        meta = (self.next_row, self.epoch, self.accepted)
        if meta != self._meta:
            self.journal.put("meta", b"counters", encode((*meta, self.unmatched)))
            self._meta = meta

    def _write_progress(self, box: Mailbox, portions: dict[int, Portion]) -> None:
        for number, portion in portions.items():
            if portion.row.single:
                self._write_attempts(box, portion)
            elif portion.todo or number in box.closed:  # else the cursor has passed it
                box.noted.add(number)
                self.journal.put("progress", progress_key(box, number), encode(Progress(portion.todo, portion.attempts)))

    def _write_attempts(self, box: Mailbox, portion: Portion) -> None:
        """Keep how often an event in a row of its own has been tried."""
        row = portion.row
        if portion.todo:
            single = Single(row.epoch, row.batch, row.body, portion.attempts.get(0, 1), 0.0, row.origin)
            self.journal.put("singles", single_key(box, row.id), encode(single))

    def touch(self, box: Mailbox) -> dict[int, Portion]:
        touched = self._dirty.get(box)
        if touched is None:
            touched = self._dirty[box] = {}
        return touched

    # -- subscriptions

    def subscribe(self, spec: Spec) -> None:
        """Take in a subscription; the same name again replaces its options and keeps its events."""
        old = self.boxes.get(spec.name)
        is_new = old is None or old.gone
        if old is not None:
            self.table.remove(old)
            if old.spec.handler_blob != spec.handler_blob:  # else the call is repeated
                self.references.end(old.spec.handler_blob)
            old.adopt(spec, self.admitted)
            box = old
            if box.is_absent:
                self.set_status(spec.name, "STARTING")
        else:
            kind = Host if spec.hosts else Mailbox
            box = kind.make(spec, SubscriberState(self.next_number, self.next_row, Counters()), self.admitted)
            self.boxes[spec.name] = box
        for pattern in spec.patterns:
            self.table.add(pattern, box)
        self.journal.put("subscribers", b"d" + spec.name.encode(), encode(spec))
        self.journal.delete("subscribers", b"u" + spec.name.encode())
        if is_new and spec.start == "earliest":
            self.replays.begin(box, forgotten=old is not None)
        self.touch(box)

    @property
    def next_number(self) -> int:
        """Return a number that no subscriber has had."""
        return 1 + max((box.number for box in self.boxes.values()), default=0)

    def begin_run(self, run: bytes) -> None:
        """Begin with what an earlier run of the hub has left, unless this one has begun already: its publishers are dead, and nobody is
        subscribed yet.
        """
        if self.journal.get("meta", b"run") == run:
            return
        self.journal.put("meta", b"run", run)
        self.closed = False
        self.journal.delete("meta", b"closed")
        for publisher in list(self.homes):
            self.forget_publisher(publisher)
        for box in self.boxes.values():
            if not box.gone and not box.is_absent:
                self.set_status(box.name, ABSENT)

    def unsubscribe(self, name: str) -> None:
        """Route nothing more to a subscriber, also under the next router."""
        if (who := self.find(name)) is not None:
            self.table.remove(who)
            self.journal.put("subscribers", b"u" + name.encode(), b"1")

    def forget(self, name: str, reason: str) -> None:
        """Drop what waits for a subscriber whose process is gone, and the subscriber; its books and dead letters stay."""
        box = self.boxes.get(name)
        if box is None or box.gone:  # the call is repeated
            return
        self.drop_pending(box, reason)
        self.references.end(box.spec.handler_blob)
        box.bury()
        self.journal.put("subscribers", b"d" + name.encode(), encode(box.spec))
        self.journal.put("subscribers", b"t" + name.encode(), box.status.encode())

    def drop_pending(self, box: Mailbox, reason: str) -> int:
        """Drop everything that waits, counted; requests end with Dropped."""
        self.replays.end(box)
        dropped = 0
        while box.has_waiting or box.delayed:
            self._load_delayed(box, inf)
            for piece in box.window.drop_waiting():
                dropped += self.drop(box, piece.portion, piece.spans, reason)
            self.refill(box)
        return dropped

    def drop(self, box: Mailbox, portion: Portion, spans: Spans, reason: str) -> int:
        count = length(spans)
        if portion.row.batch.reply:
            self._answer_all(portion, spans, "dropped", encode(reason))
        box.note_dropped(portion, spans, reason)
        self.history.ended(box, portion, spans, "dropped", reason)
        self.settle(box, portion, spans)
        return count

    def set_status(self, name: str, status: str) -> None:
        box = self.boxes.get(name)
        if box is None:
            return
        if status in LASTING:
            self.journal.put("subscribers", b"t" + name.encode(), status.encode())
        elif box.status in LASTING:
            self.journal.delete("subscribers", b"t" + name.encode())
        if status == ABSENT:
            box.state.absent_since = self.clock()
            self.touch(box)
        box.status = status
        self._note_full(box)
        if box.given_up:
            self._fail_requests(box)

    def _fail_requests(self, box: Mailbox) -> None:
        """End all requests: who asks does not wait for what nobody will start."""
        for portion, spans in self.withdrawals.requests_of(box):
            self.fail_request(box, portion, spans)

    def fail_request(self, box: Mailbox, portion: Portion, spans: Spans) -> None:
        self._refuse_request(box, portion, spans)
        self.settle(box, portion, list(spans))

    def _refuse_request(self, box: Mailbox, portion: Portion, spans: Spans) -> None:
        who = box.who(portion, spans[0][0])
        self.history.ended(who, portion, spans, "dead", "fatal")
        self._answer_all(portion, spans, "fatal", encode((who.name, who.condition)))
        who.counters.dead += length(spans)

    # -- events in

    def close(self) -> None:
        """Take nothing more in, also under the next router."""
        self.closed = True
        self.journal.put("meta", b"closed", b"1")

    def meet(self, publisher: int, pid: int, started: float) -> int:
        """Remember whose publisher this is; return the last sequence that is kept of it."""
        self.homes[publisher] = pid, started
        self._dirty_publishers.add(publisher)
        return self.sequences.setdefault(publisher, 0)

    def accept(self, batch: Batch, header: bytes, body: bytes) -> tuple[str, str] | None:
        """Journal a publisher's frame; a repeat is passed over. Return (error, message) if it is refused."""
        if batch.sequence <= self.sequences.get(batch.publisher, 0):
            return None
        self.sequences[batch.publisher] = batch.sequence
        self._dirty_publishers.add(batch.publisher)
        refused = self._refusal(batch) if batch.strict or batch.blob is not None else None
        if refused is None:
            self.take_in(batch, header, body, batch.epoch or self.epoch)
        else:
            self.references.end(batch.blob)
        return refused

    def _refusal(self, batch: Batch) -> tuple[str, str] | None:
        if batch.blob is not None:
            try:
                size = self.blobs.size(batch.blob)
            except (OSError, ValueError) as error:
                return "PayloadError", f"the file of the payload cannot be read: {error}"
            if size > self.admitted:
                return (
                    "PayloadError",
                    f"a payload of {size} bytes exceeds what this hub admits ({self.admitted} bytes): raise max_bytes",
                )
        if batch.strict and not any(map(self.table.match, batch.keys)):
            return "NoSubscriber", self._nobody(batch.key(0))
        return None

    def take_in(self, batch: Batch, header: bytes, body: bytes, epoch: int) -> None:
        """Decide whom each event is for, and store that with the row."""
        matched = self._match_request(batch) if batch.reply else self._match(batch)
        row = Row(self.next_row, epoch, batch, header, body)
        self.next_row += 1  # at once: what is cut out of it has a number of its own
        self.accepted += row.count
        if self.taps.listeners:
            self.taps.note(batch, header, body)
        self.references.hold(batch.blob)
        self.history.keep(row, matched)
        taken = {box: portion for box, portion in portions_of(row, matched) if self._admit(box, portion)}
        if batch.extras is not None and (apart := set_apart(batch.extras, self.clock())):
            taken = {box: portion for box, portion in taken.items() if self._set_apart(box, portion, apart)}
        if taken:
            self.store(row, taken)
        self.references.drop(batch.blob)

    def wait_apart(self, box: Mailbox, portion: Portion) -> bool:
        """Let those events of a portion wait in rows of their own that are to; say whether there are others."""
        extras = portion.row.batch.extras
        apart = set_apart(extras, self.clock()) if extras is not None else None
        return not apart or self._set_apart(box, portion, apart)

    def _set_apart(self, box: Mailbox, portion: Portion, apart: dict[int, float]) -> bool:
        """Let events wait in rows of their own for their time, or by their priority; say whether there are others."""
        due = {index: at for event, at in apart.items() for index in portion.of_events([event]) if contains(portion.todo, index)}
        self._put_off(box, portion, [index for index in sorted(due) if due[index]], due)
        for index in sorted(due):
            if not due[index]:
                batch, body = self.cut_out(box, portion, index)
                box.account_apart(portion, index, share(batch))
                single = self.make_single(box, batch, body, portion.row.epoch, 1, 0.0, portion.place_of(index))
                box.wait_by_rank(batch, single)
        self._drop_excess(box)
        self.touch(box)
        portion.todo = subtract(portion.todo, spans_of(sorted(due)))
        return bool(portion.todo)

    def _put_off(self, box: Mailbox, portion: Portion, late: list[int], due: dict[int, float]) -> None:
        """Let events wait for their time."""
        if box.overflow != "block" and (excess := late[max(0, box.maxsize - len(box.delayed)) :]):
            self._overflow(box, portion, spans_of(excess))
            late = late[: -len(excess)]
        for index in late:
            batch, body = self.cut_out(box, portion, index)
            box.account_apart(portion, index, share(batch))
            self._wait_until(box, batch, body, portion.row.epoch, 1, due[index], portion.place_of(index))

    def store(self, row: Row, taken: dict[Mailbox, Portion], origin: int = 0) -> None:
        """Keep a row for those that it is for; ``origin``: the row of history that it repeats."""
        matched = {box.number: None if portion.is_whole else portion.todo for box, portion in taken.items()}
        rest = ({}, origin) if origin else crowds_of(taken)
        stored = encode((row.epoch, msgspec.Raw(row.header), matched, row.body, *rest))
        self.journal.append("rows", row.id.to_bytes(8, "big"), stored)
        self._rows[row.id] = row
        self.left[row.id] = len(taken)
        self.references.hold_for(row.id, row.batch.blob)
        for box, portion in taken.items():
            self._deliver_to(box, portion)

    def _match(self, batch: Batch) -> dict[Target, Spans]:
        matched: dict[Target, Spans] = {}
        for boxes, first, end in self._stretches(batch):
            for box in boxes:
                spans = matched.setdefault(box, [])
                if spans and spans[-1][1] == first:
                    spans[-1] = (spans[-1][0], end)
                else:
                    spans.append((first, end))
        return matched

    def _stretches(self, batch: Batch) -> Iterator[tuple[tuple[Target, ...], int, int]]:
        """Yield (subscribers, first event, end) of events that are for the same ones: a batch may have a thousand keys."""
        named = self._named(batch.target) if batch.target is not None else None
        found = self.table.match_all(batch.keys) if named is None else [named] * len(batch.keys)
        last, first = found[0], 0
        if not last or found.count(last) < len(found):
            for boxes, (key, start, end) in zip(found, batch.runs(), strict=True):
                if boxes is not last:
                    yield last, first, start
                    last, first = boxes, start
                if not boxes:
                    self._count_unmatched(key, end - start)
        yield last, first, batch.count

    def _named(self, target: str) -> tuple[Target, ...]:
        found = self.find(target)
        return (found,) if found is not None else ()

    def find(self, name: str) -> Mailbox | Member | None:
        """Return a subscriber by its name."""
        return self.members.get(name) or self.boxes.get(name)

    def _match_request(self, batch: Batch) -> dict[Target, Spans]:
        """Find the one subscriber that answers, or end the requests."""
        key = batch.key(0)
        if batch.target is not None:
            found = each_of(self._named(batch.target))
        else:
            found = (who for who in each_of(self.table.match(key)) if who.spec.answers)
        boxes = tuple(who for who in found if not who.is_absent)
        outcome, message = "", ""
        if not boxes:
            outcome, message = "nobody", self._nobody(batch.target or key)
        elif len(boxes) > 1:
            outcome, message = (
                "ambiguous",
                f"{key!r} has several subscribers that answer: {', '.join(b.name for b in boxes)}; choose one with to=",
            )
        if outcome:
            for index in range(batch.count):
                self.letters.reply(ReplyRow(batch.publisher, batch.number + index, outcome, encode(message)))
            return {}
        return {boxes[0]: [(0, batch.count)]}

    def _nobody(self, key: str) -> str:
        owner = {pattern: who.name for pattern, target in self.table.patterns() for who in each_of([target])}
        near = nearest(key, owner)
        return f"no subscriber for {key!r}" + (f" (nearest pattern: {near!r} of {owner[near]!r})" if near else "")

    def _count_unmatched(self, key: str, count: int) -> None:
        if key not in self.unmatched:
            if len(self.unmatched) >= MAX_UNMATCHED_KEYS:
                key = ">"
            else:
                self.tell("unmatched", None, f"{self._nobody(key)}; {count} event{'s' if count > 1 else ''} so far", key=key)
        self.unmatched[key] = self.unmatched.get(key, 0) + count
        self._meta = (0, 0, 0)

    def _admit(self, box: Mailbox, portion: Portion) -> bool:
        """Leave of some new events those that an inbox takes, and say whether there are any; the rest ends here, and leaves nothing behind
        but its count.
        """
        if portion.row.batch.reply and box.who(portion, 0).given_up:
            box.note_refused(portion, portion.todo)
            self._refuse_request(box, portion, portion.todo)
            self.touch(box)
            return False
        if box.sieve is not None:
            self._sift(box, box.sieve, portion)
        if box.overflow not in ("block", "drop_oldest", "latest"):
            taken = first_of(portion.todo, box.room())
            if excess := subtract(portion.todo, taken):
                self._overflow(box, portion, excess)
            portion.todo = taken
        return bool(portion.todo)

    def _sift(self, box: Mailbox, quota: Quota, portion: Portion) -> None:
        """Drop new events that exceed the subscriber's rate."""
        now = self.clock()
        taken = first_of(portion.todo, quota.room(now))
        if taken:
            quota.spend(now, length(taken))
        if excess := subtract(portion.todo, taken):
            self._refuse(box, portion, excess, "rate")
        portion.todo = taken

    def _overflow(self, box: Mailbox, portion: Portion, spans: Spans) -> None:
        """Drop new events that the inbox has no room for, or make dead letters of them."""
        if box.overflow == "dead_letter":
            box.note_refused(portion, spans)
            self.touch(box)
            self.letters.bury_untried(box, portion, spans, OVERFLOW)
        else:
            self._refuse(box, portion, spans, OVERFLOW)

    def _refuse(self, box: Mailbox, portion: Portion, spans: Spans, reason: str) -> None:
        """Drop new events."""
        self.touch(box)
        box.note_refused(portion, spans)
        self.history.ended(box, portion, spans, "dropped", reason)
        if portion.row.batch.reply:
            self._answer_all(portion, spans, "dropped", encode(reason))
        box.note_dropped(portion, spans, reason)

    def _answer_all(self, portion: Portion, spans: Spans, outcome: str, body: bytes) -> None:
        for index in indexes(spans):
            self.letters.answer(portion, index, outcome, body)

    def enter(self, box: Mailbox, portion: Portion) -> None:
        """Enter new events in a subscriber's books."""
        box.account(portion)
        self.touch(box)
        if box.overflow == "latest":
            self.withdrawals.replace(box, portion)

    def _deliver_to(self, box: Mailbox, portion: Portion) -> None:
        self.enter(box, portion)
        box.enqueue(portion)
        self._drop_excess(box)

    def _drop_excess(self, box: Mailbox) -> None:
        """Drop what has waited longest, if that is the rule; what the process has been given stays."""
        if box.overflow not in ("drop_oldest", "latest") or box.unmet:
            return
        while (excess := box.excess) and box.has_waiting:
            for portion, spans in list(box.window.take_oldest(excess)):
                self.drop(box, portion, spans, OVERFLOW)
            self.refill(box)

    # -- what became of them

    def report(self, consumer: Consumer, report: Report, now: float) -> bool:
        """Commit acks, failures, outputs, replies and snapshot of one frame together; a repeat is dropped whole.

        Return whether events have ended by it. Raises JournalError: it cannot keep the outputs; nothing of the frame is committed.
        """
        box, incarnation, delivery = consumer.box, consumer.incarnation, consumer.delivery
        if report.frame <= self.frames.get(incarnation, (0, 0))[0]:
            return False
        if report.outputs and self.used + sum(output.batch.size for output in report.outputs) > self.max_bytes:
            raise JournalError(f"{box.name} publishes more than the hub can keep ({self.max_bytes} bytes): raise max_bytes")
        self.frames[incarnation] = (report.frame, report.upto)
        self._dirty_frames.add(incarnation)
        failed = {f.number: found for f in report.failures if (found := delivery.find(f.number))}
        filtered = {number: found for number in report.filtered if (found := delivery.find(number))}
        if isinstance(box, Host) and (report.slow or report.next or report.free):
            self.sharing.note_slow(box, report)
        # sent again to a new router it is of a generation before its hello, which has given all back already
        before = box.window.loaded
        returned = report.returned and report.generation >= delivery.generation
        finished = delivery.report(report.upto, failed | filtered, returned=returned, ended=report.ended, still=report.still)
        if box.quota is not None:
            box.quota.give_back(box.window.loaded - before)
        for output in report.outputs:
            self.take_in(output.batch, encode(output.batch), output.body, output.batch.epoch or self.epoch)
        for reply in report.replies:
            self.letters.reply(reply)
        if report.snapshot is not None or report.snapshot_blob is not None:
            self.letters.keep_snapshot(consumer.snapshot_key, report.snapshot or b"", report.snapshot_blob)
        seconds = report.seconds / report.ran if report.ran else 0.0
        for portion, spans in finished:
            box.note_handled(portion, spans)
            self.history.ended(box, portion, spans, "handled", seconds=seconds)
            self.settle(box, portion, spans)
        for portion, index in filtered.values():
            self.drop(box, portion, [(index, index + 1)], "filtered")
        for failure in report.failures:
            if failure.number in failed:
                self._fail(box, *failed[failure.number], failure, now)
        box.counters.seconds += report.seconds
        if box.withdrawn:
            self.withdrawals.came_back(box)
        if report.ran:
            delivery.credit.measured(report.ran, report.seconds)
            box.samples.append(seconds)
        return bool(finished or failed or filtered)

    def _fail(self, box: Mailbox, portion: Portion, index: int, failure: Failure, now: float) -> None:
        attempt = portion.attempts.get(index, 1)
        row, who, event = portion.row, box.who(portion, index), portion.event(index)
        who.counters.failed += 1
        self.tell(
            "failure", who.name, failure.traceback, key=row.batch.key(event), id=hex_id(row.batch, event), attempt=attempt,
            reason=failure.reason,
        )  # fmt: skip
        if (row.id, index) in box.withdrawn:
            self.drop(box, portion, [(index, index + 1)], CANCELLED)
        elif failure.retry and box.has_newer(portion, index):
            self.drop(box, portion, [(index, index + 1)], OVERFLOW)
        elif failure.retry and attempt < who.spec.max_attempts:
            who.counters.retried += 1
            if failure.delay > 0:
                self._postpone(box, portion, index, attempt + 1, now + failure.delay)
            else:
                box.window.again(portion, index, attempt + 1)
                self.touch(box)[row.id] = portion
        else:
            reason = "rejected" if failure.reason == "rejected" else "exception"
            cause = Cause(reason, pid=failure.pid, traceback=failure.traceback, rss=failure.rss)
            self.letters.bury(box, portion, index, reason, attempt, error=failure.error, cause=cause, told=failure.number == self.told)

    def _postpone(self, box: Mailbox, portion: Portion, index: int, attempt: int, due: float) -> None:
        """Cut one event out into a row of its own that waits for its time."""
        batch, body = self.cut_out(box, portion, index)
        self._wait_until(box, batch, body, portion.row.epoch, attempt, due, portion.place_of(index))
        if box.window.order is not None:
            box.window.order.retry(ordering_key(batch, 0))
        box.bytes += share(batch) - portion.size
        portion.finish([(index, index + 1)])
        self._close_if_done(box, portion)

    def _wait_until(self, box: Mailbox, batch: Batch, body: bytes, epoch: int, attempt: int, due: float, place: Place) -> None:
        heapq.heappush(box.delayed, (due, self.make_single(box, batch, body, epoch, attempt, due, place), event_id(batch)))

    def cut_out(self, box: Mailbox, portion: Portion, index: int) -> tuple[Batch, bytes]:
        """Return one event alone: (header, an array of its pickle, empty if that is a blob)."""
        row, event = portion.row, portion.event(index)
        if portion.pairs is None:
            return self._cut_out(row, event)
        batch, body = self._cut_out(row, event)
        return msgspec.structs.replace(batch, target=box.who(portion, index).name), body

    def _cut_out(self, row: Row, index: int) -> tuple[Batch, bytes]:
        if row.is_blob:
            return row.batch, b""
        events = views(self.blobs.read(row.batch.blob)) if row.batch.blob is not None else row.events()
        data, blob = self.blobs.spill(bytes(events[index]))
        return part_of(row.batch, index, index + 1, len(events[index]), blob), join([data]) if blob is None else b""

    def make_single(self, box: Mailbox, batch: Batch, body: bytes, epoch: int, attempt: int, due: float, place: Place) -> int:
        number = self.next_row
        self.next_row += 1
        self.journal.put("singles", single_key(box, number), encode(Single(epoch, batch, body, attempt, due, place)))
        self.references.hold_for(number, batch.blob)
        return number

    def died(
        self, consumer: Consumer, states: Callable[[int, int], bytes], charged: Callable[[int], bool], cause: Cause
    ) -> None:  # fmt: skip
        """Settle what a reaped process held."""
        self._died(consumer, consumer.delivery.died(states, charged), cause)

    def _died(self, consumer: Consumer, verdict: Verdict, cause: Cause) -> None:
        box = consumer.box
        for portion, spans in verdict.finished:
            box.note_handled(portion, spans)
            self.history.ended(box, portion, spans, "handled")
            self.settle(box, portion, spans)
        for portion, spans in verdict.filtered:
            self.drop(box, portion, spans, "filtered")
        for portion, index, attempts in verdict.dead:
            self.letters.bury(box, portion, index, cause.reason, attempts, cause=cause)
        for portion in verdict.changed:
            self.touch(box)[portion.row.id] = portion
        for again in verdict.again:
            box.who(again.portion, again.index).counters.retried += 1
        if box.withdrawn:
            self.withdrawals.came_back(box)
        self.touch(box)
        self.frames[consumer.incarnation] = (SETTLED, 0)  # should this be asked again, after a router's death
        self._dirty_frames.add(consumer.incarnation)

    def forget_incarnation(self, incarnation: int) -> None:
        """Forget a death that is settled, and remove the files that this process made for what was never committed."""
        self.frames.pop(incarnation, None)
        self._dirty_frames.discard(incarnation)
        self.journal.delete("frames", incarnation.to_bytes(8, "big"))
        self.references.end_of_writer(incarnation)

    def settle(self, box: Mailbox, portion: Portion, spans: Spans) -> None:
        """Take events that ended, however, off the books' pending side."""
        count = length(spans)
        portion.finish(spans)
        if box.withdrawn:
            box.withdrawn.difference_update((portion.row.id, index) for index in indexes(spans))
        box.settle(portion, count)
        self._close_if_done(box, portion)

    def _close_if_done(self, box: Mailbox, portion: Portion) -> None:
        row = portion.row
        touched = self.touch(box)
        if row.single:
            if not portion.todo:
                self.journal.delete("singles", single_key(box, row.id))
                self.references.release(row.id)
            return
        touched[row.id] = portion
        if portion.todo:
            return
        box.closed.add(row.id)
        left = self.left[row.id] - 1
        if left:
            self.left[row.id] = left
        else:
            del self.left[row.id]
            self.journal.delete("rows", row.id.to_bytes(8, "big"))
            self.references.release(row.id)

    # -- time and windows

    def next_due(self) -> float | None:
        """Return when there is something to do though nothing arrives: seconds since the epoch."""
        if self.room.is_busy or self.replays.is_busy:
            return 0.0
        first = min((box.due for box in self.boxes.values()), default=inf)
        first = min(first, self.history.due)
        return first if first != inf else None

    def is_due(self, now: float) -> bool:
        due = self.next_due()
        return due is not None and due <= now

    def wake(self, now: float) -> None:
        """Put delayed events whose time has come to the front of their inboxes, and drop what is too late to start."""
        self.replays.go_on()
        for box in self.boxes.values():
            if box.is_absent and box.ends_at <= now:
                self._give_up(box)
            elif box.due <= now:
                self._load_delayed(box, now)
                self._expire(box, now)
                if isinstance(box, Host) and box.aside.fresh:
                    self.touch(box)
                if box.quota is not None:
                    box.quota.room(now)

    def _give_up(self, box: Mailbox) -> None:
        """Drop what waits for one that nobody has subscribed in time."""
        count = box.unfinished
        self.table.remove(box)
        self.forget(box.name, "expired")
        message = f"nobody has subscribed {box.name} for {box.spec.inbox.expires:g} s: {count} events are dropped"
        self.tell("expired", box.name, message, waiting=count)

    def _expire(self, box: Mailbox, now: float) -> bool:
        """Drop what should have started before now; say whether there was something."""
        if box.window.expires > now or box.unmet or not self.informed:
            return False  # what a live process has started in time looks as if it waited until that has met this router
        began = self.clock()
        late = box.window.expire(now)
        box.window.expires = max(box.window.expires, now + max(GRAIN, REST * (self.clock() - began)))
        for portion, spans in late:
            self.drop(box, portion, spans, "expired")
        return bool(late)

    def _load_delayed(self, box: Mailbox, now: float) -> None:
        """Put what is due before all that waits, in the order of its time, as far as the window takes it."""
        due: list[Portion] = []
        room = box.window_room()
        while box.delayed and box.delayed[0][0] <= now and len(due) < room:
            _, number, _ = heapq.heappop(box.delayed)
            self.load_single(box, number, due.append)
        for portion in [portion for portion in due if portion.attempts and box.has_newer(portion, 0)]:
            due.remove(portion)
            self.drop(box, portion, [(0, 1)], OVERFLOW)
        for portion in [portion for portion in due if portion.rank and not portion.attempts]:
            due.remove(portion)
            box.wait_by_rank(portion.row.batch, portion.row.id, portion.due)
        for portion in due if box.spec.ordered else ():
            if portion.attempts:
                box.window.resume(ordering_key(portion.row.batch, 0))
        box.window.add_early(due)
        self.load_ranked(box)

    def load_ranked(self, box: Mailbox) -> None:
        """Have the most urgent events in the window, before all others, and the less urgent ones once there are no others."""
        count, worst = box.window.worst_urgent()
        urgent: list[Portion] = []
        while box.ranked and box.ranked[0][0] < 0 and (count < AT_HAND or box.ranked[0][0] < worst):
            rank, _, number, _ = heapq.heappop(box.ranked)
            self.load_single(box, number, urgent.append)
            count, worst = count + 1, max(worst, rank)
        if urgent:
            box.window.add_early(urgent)
        room = AT_HAND if not box.window.waiting and box.tail is None else 0
        while box.ranked and box.ranked[0][0] > 0 and box.tail is None and (room > 0 or box.window.ends_behind(box.ranked[0][0])):
            self.load_single(box, heapq.heappop(box.ranked)[2], box.window.add)
            room -= 1

    def load_single(self, box: Mailbox, number: int, put: Callable[[Portion], None]) -> None:
        value = self.journal.get("singles", single_key(box, number))
        if value is not None:
            put(box.single(number, _single.decode(value)))

    def refill(self, box: Mailbox, least: int = 0) -> None:
        """Read on where the window ends, at any rate to row ``least``; what has become too late meanwhile makes room for more."""
        while box.tail is not None:
            self._load_more(box, box.tail, least)
            if box.tail is not None and box.tail == box.state.behind and self.replays.bring(box):
                continue  # with what came since it began
            if not self._expire(box, self.clock()):
                break
        self.load_ranked(box)

    def _load_more(self, box: Mailbox, tail: int, least: int) -> None:
        for key, value in self.journal.scan("rows", tail.to_bytes(8, "big")):
            number = int.from_bytes(key, "big")
            if box.state.behind and number >= box.state.behind:
                break
            if number > least and not box.wants_more():
                box.tail = number
                return
            self.load_row(box, number, _stored.decode(value))
        box.tail = box.state.behind or None

    def portion_of(self, box: Mailbox, number: int) -> Portion | None:
        """Return what is unfinished of a row that is not in the window, if it is for that subscriber."""
        value = self.journal.get("rows", number.to_bytes(8, "big"))
        return None if value is None else self._portion(box, number, _stored.decode(value))

    def load_row(self, box: Mailbox, number: int, stored: Stored) -> None:
        portion = self._portion(box, number, stored)
        if portion is not None:
            box.load(portion)

    def _portion(self, box: Mailbox, number: int, stored: Stored) -> Portion | None:
        if box.number not in stored.matched or number in box.closed:
            return None
        touched = self._dirty.get(box, {}).get(number)
        if touched is not None:  # of this turn, and not in the journal yet
            return touched
        portion = box.portion(self.row_of(number, stored), stored)
        if number in box.noted and (value := self.journal.get("progress", progress_key(box, number))) is not None:
            known = _progress.decode(value)
            portion.todo, portion.attempts = list(known.todo), dict(known.attempts)
        return portion

    def row_of(self, number: int, stored: Stored) -> Row:
        """Return a row as it is in memory."""
        row = self._rows.get(number)
        if row is None:
            origin = (stored.origin or number, 0)
            row = self._rows[number] = Row(number, stored.epoch, stored.batch, encode(stored.batch), stored.body, origin=origin)
        return row

    def replace_body(self, number: int, body: bytes) -> None:
        """Follow a row whose finished events have been blanked."""
        row = self._rows.get(number)
        if row is not None:
            row.replace(body)

    # -- after a restart

    def claim(self, consumer: Consumer, claims: list[tuple[int, int]], ranges: list[Range]) -> None:
        """Take as held what a process says it has run and this router has not committed."""
        _, upto = self.frames.get(consumer.incarnation, (0, 0))
        spans = [(max(number, upto), number + count) for number, count in claims if number + count > upto]
        held = [part for each in ranges for part in parts_within(each, spans)]
        self._cover(consumer.box, held)
        consumer.delivery.claim(held)

    def died_unseen(self, consumer: Consumer, board: Board, charged: Callable[[int], bool], cause: Cause) -> None:
        """Settle what a process held that died before it had met this router."""
        _, upto = self.frames.get(consumer.incarnation, (0, 0))
        ranges = [part for each in board.ranges() for part in parts_within(each, [(upto, SETTLED)])]
        self._cover(consumer.box, ranges)
        self._died(consumer, consumer.delivery.died_unseen(ranges, board.states, charged), cause)

    def _cover(self, box: Mailbox, ranges: list[Range]) -> None:
        """Widen the window until it has all rows of some ranges, and what was due."""
        self._load_delayed(box, self.clock())
        last = max((row for _, _, row, _ in ranges), default=0)
        if box.tail is not None and box.tail <= last:
            self.refill(box, last)
        rows = {row for _, _, row, _ in ranges} if box.ranked or box.delayed else ()
        for ranked in [entry for entry in box.ranked if entry[2] in rows]:
            box.ranked.remove(ranked)
            self.load_single(box, ranked[2], box.window.add)
        for delayed in [entry for entry in box.delayed if entry[1] in rows]:
            box.delayed.remove(delayed)
            self.load_single(box, delayed[1], box.window.add)
        heapq.heapify(box.ranked)
        heapq.heapify(box.delayed)

    def forget_publisher(self, publisher: int) -> None:
        """Remove what a dead publisher leaves: its sequence, replies nobody reads, files nobody names."""
        self.homes.pop(publisher, None)
        self.sequences.pop(publisher, None)
        self._dirty_publishers.discard(publisher)
        self.journal.delete("publishers", publisher.to_bytes(8, "big"))
        self.letters.forget_requester(publisher)
        self.references.end_of_writer(publisher)

    # -- questions

    @property
    def used(self) -> int:
        """Bytes of journal and blobs."""
        return self.journal.used + self.references.bytes

    def advance_epoch(self) -> int:
        """Begin a new epoch; return the one that ends: drain waits for it and older ones."""
        self.epoch += 1
        return self.epoch - 1

    def left_until(self, epoch: int) -> dict[str, int]:
        """Return, by subscriber, the unfinished events of an epoch and older ones; who is not there has all the time."""
        counts = [box.left_until(epoch) for box in self.boxes.values() if not box.is_absent]
        counts += [{box.name: box.unfinished + 1} for box in self.replays.behind if not box.is_absent]
        return {name: count for each in counts for name, count in each.items() if count}

    def held_patterns(self) -> list[str]:
        """Return the patterns whose publishers wait; ``>`` when the journal is as full as admission allows."""
        if self.used >= self.admitted:
            return [">"]
        return sorted({pattern for box in self.full for pattern in box.patterns}) if self.full else []

    def _note_full(self, box: Mailbox) -> None:
        box.update_full()
        (self.full.add if box.full else self.full.discard)(box)

    def even_out(self, consumer: Consumer, take: Callable[[], T]) -> T | None:
        """Let a replica without work take what waits for others alone, but for the keys that they hold events of."""
        box, now = consumer.box, time.monotonic()
        if now < box.even_at:
            return None
        box.window.gather()
        found = take()
        box.even_at = now + EVEN_REST * (time.monotonic() - now)
        if not consumer.delivery.holding:
            self._note_hot_key(box)
        return found

    def _note_hot_key(self, box: Mailbox) -> None:
        """Tell if nearly all that waits is of one ordering key, so that one replica works and others idle."""
        assert box.window.order is not None
        key, count = box.window.order.hottest()
        if count >= HOT and key != box.hot_key:
            box.hot_key = key
            message = (
                f"a replica is idle while {count} events of ordering key {key!r} wait for the one that has that: finer keys would share it"
            )
            self.tell("hot_key", box.name, message, key=key)

    def tell(self, kind: str, subscriber: str | None, message: str, count: int = 1, **details: object) -> None:
        self.news.append(News(kind, subscriber, message, details, count))


def set_apart(extras: dict[int, Extra], now: float) -> dict[int, float]:
    """Return which events wait by themselves, and until when (0: by their priority)."""
    late = {i: extra.due for i, extra in extras.items() if extra.due > now}
    return {i: 0.0 for i, extra in extras.items() if extra.priority} | late


def single_key(box: Mailbox, number: int) -> bytes:
    return box.number.to_bytes(4, "big") + number.to_bytes(8, "big")


def progress_key(box: Mailbox, row: int) -> bytes:
    return box.number.to_bytes(4, "big") + row.to_bytes(8, "big")
