"""Pairs of event and member, numbered: whatever is asked of their spans is what is true of each pair; books add up for each member."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mphub.core.aside import Aside, sift
from mphub.core.crowds import Crowd, Pairs, Stretch
from mphub.core.spans import Spans, indexes, spans_of
from mphub.core.window import Piece, Portion, Window


class One:
    """A member, and a crowd of one."""

    def __init__(self, number: int) -> None:
        self.number, self.id, self.max_attempts, self.handled = number, ~number, 1, 0

    @property
    def members(self) -> tuple[One, ...]:
        return (self,)

    @property
    def places(self) -> dict[One, int]:
        return {self: 0}

    def __repr__(self) -> str:
        return f"member {self.number}"

    def take_in(self, events: int) -> None: ...
    def note_handled(self, events: int, first: int, end: int) -> None:
        self.handled += events


MEMBERS = [One(number) for number in range(6)]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Pairs[Any], list[tuple[int, One]]]:
    """Draw the pairs of a row, and what each of them is."""
    stretches: list[Stretch] = []
    truth: list[tuple[int, One]] = []
    event = 0
    for count, members in draw(
        st.lists(st.tuples(st.integers(1, 4), st.sets(st.sampled_from(MEMBERS), min_size=1)), min_size=1, max_size=4)
    ):
        event += draw(st.integers(0, 2))  # those between are for nobody here
        among = tuple(sorted(members, key=lambda member: member.number))
        audience = among[0] if len(among) == 1 else Crowd(len(stretches), among)
        stretches.append(Stretch(event, event + count, audience))
        truth += [(event + i, member) for i in range(count) for member in among]
        event += count
    return Pairs(stretches), truth


def some(truth: list[Any], data: st.DataObject) -> Spans:
    return spans_of(sorted(data.draw(st.sets(st.integers(0, len(truth) - 1)))))


@settings(max_examples=40)
@given(rows(), st.data())
def test_spans_of_pairs_are_what_each_pair_is(row: tuple[Pairs[Any], list[tuple[int, One]]], data: st.DataObject) -> None:
    pairs, truth = row
    spans = some(truth, data)
    asked = set(data.draw(st.sets(st.sampled_from(MEMBERS))))
    assert pairs.count == len(truth)
    assert [pairs.at(index) for index in range(len(truth))] == truth
    assert list(indexes(pairs.events(spans))) == sorted({truth[index][0] for index in indexes(spans)})
    events = sorted({event for event, _ in truth})
    assert pairs.of_events(events[::2]) == [index for index, (event, _) in enumerate(truth) if event in events[::2]]
    found = {member: list(indexes(part)) for member, part in pairs.by_member(asked, spans).items()}
    expected = {member: [index for index in indexes(spans) if truth[index][1] is member] for member in asked}
    assert found == {member: part for member, part in expected.items() if part}


@settings(max_examples=40)
@given(rows(), st.data())
def test_runs_tell_event_by_event_for_whom_it_is(row: tuple[Pairs[Any], list[tuple[int, One]]], data: st.DataObject) -> None:
    pairs, truth = row
    audiences = {stretch.audience.id: stretch.audience for stretch in pairs.stretches}
    told: dict[int, tuple[int, One]] = {}
    for index, event, audience, first, end in pairs.runs(some(truth, data)):
        told |= {index + i: (event, audiences[audience].members[place]) for i, place in enumerate(range(first, end))}
    assert told == {index: truth[index] for index in told}


@settings(max_examples=40)
@given(rows(), st.data())
def test_books_kept_together_are_those_of_each(row: tuple[Pairs[Any], list[tuple[int, One]]], data: st.DataObject) -> None:
    pairs, truth = row
    for member in MEMBERS:
        member.handled = 0
    expected: Counter[One] = Counter()
    left = list(range(len(truth)))
    while left:  # each pair is handled once, in any order
        part = data.draw(st.sets(st.sampled_from(left), min_size=1))
        pairs.note_handled(spans_of(sorted(part)))
        expected.update(truth[index][1] for index in part)
        left = [index for index in left if index not in part]
        handled = Counter({member: member.handled for member in MEMBERS})
        for stretch in pairs.stretches:
            if isinstance(stretch.audience, Crowd):
                handled.update(dict(zip(stretch.audience.members, stretch.audience.handled_each(), strict=True)))
        assert +handled == expected
    assert all(set(s.audience.handled) <= {0} for s in pairs.stretches if isinstance(s.audience, Crowd))  # one number again


@settings(max_examples=40)
@given(rows(), st.data())
def test_what_is_put_aside_comes_back_in_order_and_whole(row: tuple[Pairs[Any], list[tuple[int, One]]], data: st.DataObject) -> None:
    pairs, truth = row
    window, aside = Window(), Aside[One]()
    window.aside = aside
    batch: Any = SimpleNamespace(id=1, batch=SimpleNamespace(extras=None))
    window.add(Portion(batch, [(0, pairs.count)], 1, pairs=pairs))
    slow, resting = (data.draw(st.sampled_from(MEMBERS)) for _ in range(2))
    aside.close(slow, slow=True)
    aside.close(resting)
    sift(window, aside)
    assert {truth[index][1] for piece in window.waiting for index in indexes(piece.spans)}.isdisjoint({slow, resting})
    aside.go_on(slow)
    given_out = [index for piece in aside.next for index in indexes(piece.spans)]
    own = [index for index, (_, member) in enumerate(truth) if member is slow]
    assert given_out == (own[:1] if slow is not resting else [])
    pieces: list[Piece] = window.drop_waiting()
    assert sorted(index for piece in pieces for index in indexes(piece.spans)) == list(range(len(truth)))
    for member in (slow, resting):
        mine = [index for piece in pieces for index in indexes(piece.spans) if truth[index][1] is member]
        assert mine == sorted(mine)


def test_a_slow_one_that_ends_its_event_while_it_rests_is_given_what_waits_once_it_rests_no_more() -> None:
    one, aside = One(1), Aside[One]()
    row: Any = SimpleNamespace(batch=SimpleNamespace(extras=None), id=1)
    piece = Piece(Portion(row, [(0, 3)], 1, pairs=Pairs([Stretch(0, 3, one)])), [(0, 3)])
    aside.close(one, slow=True)
    assert not aside.sift(piece)
    aside.close(one)
    aside.go_on(one)
    assert not aside.next
    assert [list(indexes(piece.spans)) for piece in aside.open(one)] == [[0, 1, 2]]
