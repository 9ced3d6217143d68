"""Delivery to a process that runs several events at a time, against a model: each ends once, whatever is in front of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mphub.core.credit import Credit
from mphub.core.delivery import DONE, RUNNING, WAITING, Range, parts_within
from mphub.core.scattered import Scattered
from mphub.core.spans import indexes, length, spans_of
from mphub.core.window import Portion, Window

MAX_ATTEMPTS = 3
SLOTS = 16
Name = tuple[int, int]
"""(row, index) of an event."""


class Subscriber(RuleBasedStateMachine):
    """Router and process as far as one subscriber goes. The board has, of each slot, the last event that was handed out with it."""

    @initialize(count=st.integers(2, 6))
    def begin(self, count: int) -> None:
        self.count = count
        self.portions: list[Portion] = []
        self.finished: list[Name] = []
        self.dead: list[Name] = []
        self.begin_process(self.new_delivery())

    def new_delivery(self) -> Scattered:
        return Scattered(Window(), MAX_ATTEMPTS, Credit(SLOTS // 2, self.count), SLOTS, self.count)

    def begin_process(self, delivery: Scattered) -> None:
        self.delivery = delivery
        self.places: dict[int, tuple[int, Name]] = {}
        self.states = bytearray(SLOTS)
        self.coming: list[int] = []
        self.running: list[int] = []
        self.ended: list[int] = []
        self.end = self.generation = 0

    def board(self, number: int, count: int) -> bytes:
        return bytes(self.states[n % SLOTS] for n in range(number, number + count))

    def ranges(self) -> list[Range]:
        return sorted((number, 1, *name) for number, name in self.places.values())

    # -- the router's side

    @rule(count=st.integers(1, 6), gone=st.sets(st.integers(0, 5)))
    def publish(self, count: int, gone: set[int]) -> None:
        row: Any = SimpleNamespace(id=len(self.portions) + 1, batch=SimpleNamespace(extras=None))
        if todo := spans_of(i for i in range(count) if i not in gone):
            self.portions.append(Portion(row, todo, 10))
            self.delivery.window.add(self.portions[-1])

    @rule()
    def hand_out(self) -> None:
        before = self.delivery.holding
        held = self.delivery.take()
        if held is None:
            return
        alone = any(i in held.portion.attempts for i in indexes(held.spans))
        assert not alone or (length(held.spans) == 1 and not before), "what runs again runs alone"
        for number in range(held.number, held.number + held.count):
            slot, index = number % SLOTS, held.index + number - held.number
            assert self.places.get(slot, (-1,))[0] not in {*self.coming, *self.running, *self.ended}, "its slot is another's"
            self.states[slot] = WAITING
            self.places[slot] = (number, (held.portion.row.id, index))
        self.coming += [held.number + i - held.index for i in indexes(held.spans)]
        self.end = held.number + held.count

    # -- the process's side

    def name(self, number: int) -> Name:
        found, name = self.places[number % SLOTS]
        assert found == number
        return name

    @rule()
    def start(self) -> None:
        if self.coming and len(self.running) < self.count:
            number = self.coming.pop(0)
            self.states[number % SLOTS] = RUNNING
            self.running.append(number)

    @rule(which=st.integers(0, 5))
    def finish(self, which: int) -> None:
        if self.running:
            number = self.running.pop(which % len(self.running))
            self.states[number % SLOTS] = DONE
            self.ended.append(number)

    @precondition(lambda self: self.ended)
    @rule(returned=st.booleans(), failing=st.booleans())
    def report(self, returned: bool, failing: bool) -> None:
        upto = min([*self.coming, *self.running], default=self.end)
        failed = {number: found for number in self.ended[:1] if failing and (found := self.delivery.find(number))}
        ended = spans_of(sorted(number for number in self.ended if number >= upto))
        for portion, spans in self.delivery.report(upto, failed, returned=returned, ended=ended, still=spans_of(sorted(self.running))):
            self.settle(portion, list(indexes(spans)))
        for portion, index in failed.values():
            self.bury(portion, index)
        self.ended = []
        if returned:
            self.coming = []

    def settle(self, portion: Portion, ended: list[int]) -> None:
        self.finished += [(portion.row.id, i) for i in ended]
        portion.finish(spans_of(ended))

    def bury(self, portion: Portion, index: int) -> None:
        self.dead.append((portion.row.id, index))
        portion.finish([(index, index + 1)])

    # -- deaths

    @rule(blamed=st.sampled_from(["all", "one", "none"]), with_router=st.booleans())
    def die(self, blamed: str, with_router: bool) -> None:
        running = {self.name(number) for number in self.running}
        charged = {"all": running, "one": {self.name(n) for n in self.running[:1]}, "none": set()}[blamed]
        numbers = {number for number in self.running if self.name(number) in charged}
        before = {(p.row.id, i): n for p in self.portions for i, n in p.attempts.items()}
        done = {self.name(number) for number in self.ended}
        if with_router:
            self.succeed()
            verdict = self.delivery.died_unseen(self.ranges(), self.board, numbers.__contains__)
        else:
            verdict = self.delivery.died(self.board, numbers.__contains__)
        for portion, spans in verdict.finished:
            done -= {(portion.row.id, i) for i in indexes(spans)}
            self.settle(portion, list(indexes(spans)))
        assert not done, "what had ended is not repeated"
        assert {(again.portion.row.id, again.index) for again in verdict.again if again.ran} <= running - charged
        for portion, index, _ in verdict.dead:
            self.bury(portion, index)
        after = {(p.row.id, i): n for p in self.portions for i, n in p.attempts.items()}
        assert {name for name in charged if name not in self.dead} == {name for name, n in after.items() if n != before.get(name, 1)}
        self.begin_process(self.delivery if not with_router else self.successor())

    def succeed(self) -> None:
        self.delivery = self.successor()

    def successor(self) -> Scattered:
        """Return what a new router knows: the journal, where everything waits."""
        delivery = self.new_delivery()
        for portion in self.portions:
            if portion.todo:
                delivery.window.add(portion)
        delivery.number = max([0, *(number + 1 for number, _ in self.places.values())])
        return delivery

    @rule()
    def router_dies(self) -> None:
        self.succeed()
        claimed = spans_of(sorted([*self.coming, *self.running, *self.ended]))
        self.delivery.claim([part for each in self.ranges() for part in parts_within(each, claimed)])

    # -- what always holds

    @invariant()
    def each_event_is_in_one_place(self) -> None:
        if not hasattr(self, "delivery"):
            return
        waiting = [(p.portion.row.id, i) for p in self.delivery.window.waiting for i in indexes(p.spans)]
        held = [(h.portion.row.id, i) for h in self.delivery.held for i in indexes(h.spans)]
        todo = [(p.row.id, i) for p in self.portions for i in indexes(p.todo)]
        assert sorted(waiting + held) == todo
        assert sorted(held) == sorted(self.name(number) for number in [*self.coming, *self.running, *self.ended])
        assert self.delivery.holding == len(held)
        assert len(set(self.finished + self.dead)) == len(self.finished + self.dead)
        assert not set(self.finished + self.dead) & set(todo)

    def teardown(self) -> None:
        """Left alone, everything ends, though the first event never does until then."""
        if not hasattr(self, "delivery"):
            return
        for _ in range(10_000):
            if not any(portion.todo for portion in self.portions):
                break
            before = self.delivery.number
            self.hand_out()
            self.start()
            if len(self.running) > 1 or self.delivery.number == before:
                self.finish(len(self.running) - 1)
            if self.ended:
                self.report(returned=False, failing=False)
        assert not any(portion.todo for portion in self.portions), "stuck"


Subscriber.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScattered = Subscriber.TestCase
