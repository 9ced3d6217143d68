"""Delivery against a model: whatever happens in whatever order, each event ends once, in order, and nobody else pays."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mphub.core.credit import Credit
from mphub.core.delivery import DONE, FAILED, HANDLED, RUNNING, WAITING, Delivery, Range, Verdict, parts_within
from mphub.core.spans import Spans, contains, first_of, indexes, length, spans_of, subtract
from mphub.core.window import Portion, Window

SETS = st.sets(st.integers(0, 40))
MAX_ATTEMPTS = 3
SLOTS = 32


@given(SETS, SETS)
def test_spans_are_sets(some: set[int], others: set[int]) -> None:
    left = subtract(spans_of(sorted(some)), spans_of(sorted(others)))
    assert list(indexes(left)) == sorted(some - others)
    assert length(left) == len(some - others)
    assert all(contains(left, i) == (i in some - others) for i in range(41))
    assert all(a < b for a, b in left)
    assert all(before < after for (_, before), (after, _) in pairwise(left)), "joined as far as can be"


Name = tuple[int, int]
"""(row, index) of an event."""


@dataclass
class Sent:
    """A frame on its way to the process, or in it."""

    number: int
    count: int
    index: int
    spans: Spans
    portion: Portion
    generation: int
    attempts: dict[int, int]

    def places(self) -> list[tuple[int, int]]:
        """Return (delivery number, index) of its events."""
        return [(self.number + i - self.index, i) for i in indexes(self.spans)]


@dataclass
class Report:
    """A numbered frame from the process."""

    frame: int
    upto: int
    failures: list[int]
    returned: bool
    generation: int


@dataclass
class Process:
    """What a subscriber's process knows, and what is on its board."""

    inbox: list[Sent] = field(default_factory=list)
    outbox: list[Report] = field(default_factory=list)
    unconfirmed: list[Report] = field(default_factory=list)
    claims: list[tuple[int, int]] = field(default_factory=list)
    states: dict[int, int] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)
    generation: int = 0
    frame: int = 0

    def board(self, number: int, count: int) -> bytes:
        return bytes(self.states[number + i] for i in range(count))

    def confirmed(self, frame: int) -> None:
        upto = max([0, *(r.upto for r in self.unconfirmed if r.frame <= frame)])
        self.unconfirmed = [r for r in self.unconfirmed if r.frame > frame]
        self.claims = [claim for claim in self.claims if sum(claim) > upto]


class Subscriber(RuleBasedStateMachine):
    """Router, process and journal as far as one subscriber goes; the rules are what may happen next."""

    @initialize(credit=st.integers(1, 24))
    def begin(self, credit: int) -> None:
        self.credit = credit
        self.delivery = self.new_delivery()
        self.portions: list[Portion] = []
        self.process = Process()
        self.committed = (0, 0)
        self.finished: list[Name] = []
        self.dead: list[Name] = []
        self.started: list[Name] = []

    def new_delivery(self) -> Delivery:
        credit = Credit(self.credit, least=self.credit)
        return Delivery(Window(), MAX_ATTEMPTS, credit, SLOTS)

    # -- the router's side

    @rule(count=st.integers(1, 12), gone=SETS)
    def publish(self, count: int, gone: set[int]) -> None:
        row: Any = SimpleNamespace(id=len(self.portions), batch=SimpleNamespace(extras=None))
        todo = spans_of(i for i in range(count) if i not in gone)
        if todo:
            portion = Portion(row, todo, 10)
            self.portions.append(portion)
            self.delivery.window.add(portion)

    @rule()
    def hand_out(self) -> None:
        before = bool(self.delivery.held)
        held = self.delivery.take()
        if held is None:
            return
        attempts = {i: held.portion.attempts[i] for i in indexes(held.spans) if i in held.portion.attempts}
        assert not attempts or (length(held.spans) == 1 and not before), "what runs again runs alone"
        for number in range(held.number, held.number + held.count):
            self.process.states[number] = WAITING
        self.process.ranges.append((held.number, held.count, held.portion.row.id, held.index))
        self.process.inbox.append(Sent(held.number, held.count, held.index, held.spans, held.portion, self.delivery.generation, attempts))

    @rule(count=st.integers(1, 5))
    def overflow(self, count: int) -> None:
        """Drop what has waited longest."""
        waiting = [(p.portion.row.id, i) for p in self.delivery.window.waiting for i in indexes(p.spans)]
        gone = []
        for portion, spans in self.delivery.window.take_oldest(count):
            for index in indexes(spans):
                gone.append((portion.row.id, index))
                self.bury(portion, index)
        assert gone == waiting[:count]

    def settle(self, portion: Portion, spans: Spans) -> None:
        self.finished += [(portion.row.id, i) for i in indexes(spans)]
        portion.finish(spans)

    def bury(self, portion: Portion, index: int) -> None:
        self.dead.append((portion.row.id, index))
        portion.finish([(index, index + 1)])

    @rule()
    def commit(self) -> None:
        """Read a report that has arrived; one that was committed before is passed over."""
        if not self.process.outbox:
            return
        report, delivery = self.process.outbox.pop(0), self.delivery
        if report.frame <= self.committed[0]:
            return
        self.committed = (report.frame, report.upto)
        failed = {number: found for number in report.failures if (found := delivery.find(number)) is not None}
        assert len(failed) == len(report.failures)
        returned = report.returned and report.generation >= delivery.generation
        for portion, spans in delivery.report(report.upto, failed, returned=returned):
            self.settle(portion, spans)
        for number in reversed(report.failures):
            portion, index = failed[number]
            attempt = portion.attempts.get(index, 1)
            if not report.returned or attempt >= MAX_ATTEMPTS:
                self.bury(portion, index)
            else:
                delivery.window.again(portion, index, attempt + 1)

    @rule()
    def confirm(self) -> None:
        self.process.confirmed(self.committed[0])

    # -- the process's side

    def next_frame(self) -> Sent | None:
        """Receive: a frame that was sent before everything was given back is void."""
        process = self.process
        while process.inbox:
            sent = process.inbox.pop(0)
            if sent.generation >= process.generation:
                process.generation = sent.generation
                process.claims.append((sent.number, sent.count))
                return sent
        return None

    def start(self, sent: Sent, number: int, index: int) -> None:
        assert self.process.states[number] == WAITING, "started twice"
        self.process.states[number] = RUNNING
        name = (sent.portion.row.id, index)
        assert name not in self.finished and name not in self.dead, "it had ended"
        if name not in self.started:
            self.started.append(name)

    @rule(failing=SETS, later=st.booleans())
    def work(self, failing: set[int], later: bool) -> None:
        self.handle(failing, later=later)

    def handle(self, failing: set[int], *, later: bool = False) -> bool:
        """Handle a frame, if there is one; an event that fails is retried at once, or given up (``later``: or a row of its own)."""
        sent = self.next_frame()
        if sent is None:
            return False
        failures: list[int] = []
        for number, index in sent.places():
            self.start(sent, number, index)
            if index not in failing:
                self.process.states[number] = DONE
                continue
            self.process.states[number] = FAILED
            failures.append(number)
            if not later:
                first, _ = self.process.claims.pop()
                self.process.claims.append((first, number + 1 - first))
                self.report(number + 1, failures, returned=True)
                self.process.generation += 1
                return True
        self.report(sent.number + sent.count, failures, returned=False)
        return True

    def report(self, upto: int, failures: list[int], *, returned: bool) -> None:
        process = self.process
        process.frame += 1
        report = Report(process.frame, upto, failures, returned, process.generation)
        process.outbox.append(report)
        process.unconfirmed.append(report)

    # -- deaths

    @rule(runs=st.integers(0, 12), handled=st.booleans(), blamed=st.booleans(), with_router=st.booleans())
    def die(self, runs: int, handled: bool, blamed: bool, with_router: bool) -> None:
        """Die in the middle of a frame: ``runs`` events were through, the next one ran; ``with_router``: so did the router."""
        if not with_router:
            while self.process.outbox:
                self.commit()
        sent = self.next_frame()
        running: Name | None = None
        attempt = 1
        for place, (number, index) in enumerate(sent.places() if sent else []):
            assert sent is not None
            self.start(sent, number, index)
            if place == runs:
                running, attempt = (sent.portion.row.id, index), sent.portion.attempts.get(index, 1)
                break
            self.process.states[number] = HANDLED if handled else DONE
        before = self.attempts()
        verdict = self.verdict_unseen(blamed) if with_router else self.delivery.died(self.process.board, lambda _: blamed)
        for portion, spans in verdict.finished:
            self.settle(portion, spans)
        for portion, index, attempts in verdict.dead:
            assert blamed and attempts == before.get((portion.row.id, index), 1) == MAX_ATTEMPTS
            assert running in ((portion.row.id, index), None)
            self.bury(portion, index)
        after = self.attempts()
        charged = {name for name in after if after[name] != before.get(name)}
        if running:
            assert charged == ({running} if blamed and attempt < MAX_ATTEMPTS else set()), "only what ran is charged"
        else:
            assert len(charged) <= blamed, "or else what was being committed"
            assert all(after[name] == before.get(name, 0) + 1 for name in charged), "which is suspected once before"
        self.process = Process(generation=self.delivery.generation)
        self.committed = (0, 0)

    def attempts(self) -> dict[Name, int]:
        return {(p.row.id, i): n for p in self.portions for i, n in p.attempts.items()}

    def verdict_unseen(self, blamed: bool) -> Verdict:
        self.successor()
        upto = self.committed[1]
        ranges = [part for each in self.process.ranges for part in parts_within(each, [(upto, 1 << 62)])]
        return self.delivery.died_unseen(ranges, self.process.board, lambda _: blamed)

    def successor(self) -> None:
        """Begin as a new router, which knows the journal: everything waits."""
        self.delivery = self.new_delivery()
        for portion in self.portions:
            if portion.todo:
                self.delivery.window.add(portion)
        self.delivery.number = max([0, *(number + count for number, count, _, _ in self.process.ranges)])

    @rule(lost=st.integers(0, 3))
    def router_dies(self, lost: int) -> None:
        """The last frames never arrived; the process handles the others, then meets the successor and sends its reports again."""
        process = self.process
        del process.inbox[max(0, len(process.inbox) - lost) :]
        while self.handle(set()):
            pass
        self.successor()
        self.hello()

    @rule()
    def reconnect(self) -> None:
        """The stream breaks, the router lives: what it had sent is handled, then all is as after its death."""
        while self.handle(set()):
            pass
        self.hello()

    def hello(self) -> None:
        process, delivery = self.process, self.delivery
        delivery.give_back()
        delivery.generation = max(delivery.generation, process.generation)
        upto = self.committed[1]
        spans = [(max(number, upto), number + count) for number, count in process.claims if number + count > upto]
        delivery.claim([part for each in process.ranges for part in parts_within(each, spans)])
        process.confirmed(self.committed[0])
        process.outbox = list(process.unconfirmed)

    # -- what always holds

    @invariant()
    def each_event_is_in_one_place(self) -> None:
        if not hasattr(self, "delivery"):
            return
        waiting = [(p.portion.row.id, i) for p in self.delivery.window.waiting for i in indexes(p.spans)]
        held = [(h.portion.row.id, i) for h in self.delivery.held for i in indexes(h.spans)]
        todo = [(p.row.id, i) for p in self.portions for i in indexes(p.todo)]
        assert sorted(waiting + held) == todo
        assert len(set(self.finished + self.dead)) == len(self.finished + self.dead)
        assert not set(self.finished + self.dead) & set(todo)

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "delivery"):
            return
        waiting = sum(length(piece.spans) for piece in self.delivery.window.waiting)
        assert (self.delivery.window.loaded, self.delivery.window.loaded_bytes) == (waiting, 10 * waiting)
        assert self.delivery.holding == sum(length(held.spans) for held in self.delivery.held)
        if self.delivery.held:
            assert self.delivery.number - self.delivery.held[0].number <= SLOTS

    @invariant()
    def first_starts_are_in_order(self) -> None:
        if hasattr(self, "started"):
            assert self.started == sorted(self.started)

    def teardown(self) -> None:
        """Left alone, everything ends."""
        if not hasattr(self, "delivery"):
            return
        for _ in range(10_000):
            if not any(portion.todo for portion in self.portions):
                break
            self.hand_out()
            self.handle(set())
            self.commit()
        assert not any(portion.todo for portion in self.portions), "stuck"
        assert not self.delivery.held and not self.delivery.window.waiting
        self.each_event_is_in_one_place()
        self.first_starts_are_in_order()


Subscriber.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestDelivery = Subscriber.TestCase


@given(SETS, st.integers(0, 50))
def test_the_first_of_spans(some: set[int], count: int) -> None:
    assert list(indexes(first_of(spans_of(sorted(some)), count))) == sorted(some)[:count]


def test_more_is_handed_out_once_half_of_the_credit_is_free_not_an_event_at_a_time() -> None:
    """Events of two keys in turn: every second one is for this subscriber."""
    delivery = Delivery(Window(), MAX_ATTEMPTS, Credit(10, least=10), 100)
    row = SimpleNamespace(id=1, count=80, batch=SimpleNamespace(extras=None))
    delivery.window.add(Portion(row, [(i, i + 1) for i in range(0, 80, 2)], 100))  # type: ignore[arg-type]
    handed: list[int] = []
    done = 0
    while done < 40:
        while (held := delivery.take()) is not None:
            handed.append(length(held.spans))
            assert delivery.holding <= 10
        first = delivery.held[0]
        delivery.report(first.number + first.spans[0][0] + 1 - first.index, {}, returned=False)
        done += 1
        assert delivery.holding == sum(length(held.spans) for held in delivery.held)
    assert handed == [10, 5, 5, 5, 5, 5, 5]


@given(st.lists(st.tuples(st.sampled_from(["take", "finish", "fail", "die"]), st.integers(0, 2), st.integers(1, 9)), max_size=80))
def test_processes_that_share_a_window_never_hold_the_same_event(steps: list[tuple[str, int, int]]) -> None:
    window = Window()
    hands = [Delivery(window, 5, Credit(4, least=4), SLOTS) for _ in range(3)]
    row = SimpleNamespace(id=1, batch=SimpleNamespace(extras=None))
    portion = Portion(row, [(0, 40)], 1)  # type: ignore[arg-type]
    window.add(portion)
    finished: list[int] = []

    def ended(portion: Portion, spans: Spans) -> None:
        finished.extend(indexes(spans))
        portion.finish(spans)

    for what, which, count in steps:
        hand = hands[which]
        if what == "take":
            hand.take(count)
        elif hand.held and what == "finish":
            for portion, spans in hand.report(min(hand.number, hand.held[0].number + count), {}, returned=False):
                ended(portion, spans)
        elif hand.held and what == "fail":
            number = hand.held[0].number + hand.held[0].spans[0][0] - hand.held[0].index
            found = hand.find(number)
            assert found is not None
            for portion, spans in hand.report(number + 1, {number: found}, returned=False):
                ended(portion, spans)
            window.again(*found, portion.attempts.get(found[1], 1) + 1)
        elif hand.held:
            first = hand.held[0].number
            verdict = hand.died(lambda number, n, first=first: bytes(RUNNING if number + i == first else WAITING for i in range(n)), bool)  # type: ignore[misc]
            for portion, index, _ in verdict.dead:
                ended(portion, [(index, index + 1)])
            assert all(other.holding == sum(length(held.spans) for held in other.held) for other in hands)
        held = [i for other in hands for one in other.held for i in indexes(one.spans)]
        waiting = [i for piece in window.waiting for i in indexes(piece.spans)]
        assert sorted(finished + held + waiting) == list(range(40))


def test_what_is_less_urgent_does_not_start_while_the_journal_has_more() -> None:
    window = Window()
    delivery = Delivery(window, MAX_ATTEMPTS, Credit(10, least=10), 100)
    row = SimpleNamespace(id=1, count=1, batch=SimpleNamespace(extras=None))
    window.add(Portion(row, [(0, 1)], 100, rank=1))  # type: ignore[arg-type]
    window.tail = 2
    assert delivery.take() is None
    window.tail = None
    assert delivery.take() is not None
