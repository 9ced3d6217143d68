"""Ordering keys: whatever is taken, finished, failed, given back or killed, events of one key end in their order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mphub.core.credit import Credit
from mphub.core.delivery import RUNNING, WAITING, Delivery
from mphub.core.order import Order
from mphub.core.spans import Spans, indexes, length
from mphub.core.window import Portion, Window
from mphub.wire.frames import Batch, Extra

KEYS = ("a", "b", "c", "d", "e")


def batch_of(keys: list[str]) -> Batch:
    return Batch(1, 1, 1, len(keys), ["k"], [0], 0.0, extras={i: Extra(ordering_key=key) for i, key in enumerate(keys)})


def window_of(*rows: list[str]) -> tuple[Window, list[Portion]]:
    window = Window()
    window.order = Order()
    portions = []
    for number, keys in enumerate(rows):
        row: Any = SimpleNamespace(id=number, batch=batch_of(keys), count=len(keys))
        portions.append(Portion(row, [(0, len(keys))], 1))
        window.add(portions[-1])
    return window, portions


def hand_of(window: Window, credit: int = 4) -> Delivery:
    return Delivery(window, 5, Credit(credit, least=credit), 1000)


def key_of(portion: Portion, index: int) -> str:
    extras = portion.row.batch.extras
    assert extras is not None
    return str(extras[index].ordering_key)


STEPS = st.tuples(
    st.sampled_from(["take", "finish", "fail", "later", "due", "die", "return", "gather"]), st.integers(0, 2), st.integers(1, 9)
)
ROWS = st.lists(st.lists(st.sampled_from(KEYS), min_size=1, max_size=12), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.lists(STEPS, max_size=60))
def test_events_of_one_key_end_in_order_whatever_happens(rows: list[list[str]], steps: list[tuple[str, int, int]]) -> None:
    window, portions = window_of(*rows)
    order = window.order
    assert order is not None
    hands = [hand_of(window) for _ in range(3)]
    ended: list[tuple[int, int]] = []
    later: list[tuple[Portion, int]] = []

    def end(portion: Portion, spans: Spans) -> None:
        ended.extend((portion.row.id, index) for index in indexes(spans))
        portion.finish(spans)

    def first(hand: Delivery) -> tuple[int, Portion, int]:
        held = hand.held[0]
        index = held.spans[0][0]
        return held.number + index - held.index, held.portion, index

    def step(what: str, which: int, count: int) -> None:
        hand = hands[which]
        if what == "take":
            hand.take(count)
        elif what == "gather":
            window.gather()
        elif what == "due" and later:
            portion, index = later.pop(0)
            window.resume(key_of(portion, index))
            window.again(portion, index, portion.attempts.get(index, 1) + 1)
        elif hand.held and what == "finish":
            for portion, spans in hand.report(min(hand.number, hand.held[0].number + count), {}, returned=False):
                end(portion, spans)
        elif hand.held and what == "return":
            hand.give_back()
        elif hand.held and what in ("fail", "later"):
            number, portion, index = first(hand)
            # a report that is sent again to a new router gives nothing back, which its hello has done
            behind = [key_of(one.portion, i) for one in hand.held for i in indexes(one.spans)][1:]
            returned = what == "fail" or key_of(portion, index) in behind or count % 2 == 0
            for other, spans in hand.report(number + 1, {number: (portion, index)}, returned=returned):
                end(other, spans)
            if what == "fail":
                window.again(portion, index, portion.attempts.get(index, 1) + 1)
            else:
                order.retry(key_of(portion, index))
                later.append((portion, index))
        elif hand.held and what == "die":
            running, _, _ = first(hand)
            verdict = hand.died(lambda number, n: bytes(RUNNING if number + i == running else WAITING for i in range(n)), bool)
            for portion, index, _ in verdict.dead:
                end(portion, [(index, index + 1)])

    def check() -> None:
        held = [(one.portion.row.id, i, which) for which, hand in enumerate(hands) for one in hand.held for i in indexes(one.spans)]
        queues = [window.waiting, *order.lanes.values(), *order.retried.values()]
        waiting = [(piece.portion.row.id, i) for queue in queues for piece in queue for i in indexes(piece.spans)]
        away = [(portion.row.id, index) for portion, index in later]
        everything = [(p.row.id, i) for p, keys in zip(portions, rows, strict=True) for i in range(len(keys))]
        assert sorted([*ended, *waiting, *away, *((row, i) for row, i, _ in held)]) == everything
        assert window.loaded == len(waiting)
        owners: dict[str, set[int]] = {}
        for row, index, which in held:
            owners.setdefault(rows[row][index], set()).add(which)
        assert all(len(who) == 1 for who in owners.values()), "a key is with one process"
        for key in KEYS:
            of_key = [place for place in ended if rows[place[0]][place[1]] == key]
            assert of_key == sorted(of_key)

    for each in steps:
        step(*each)
        check()
    for _ in range(1000):  # left alone, everything ends
        if len(ended) == sum(map(len, rows)):
            break
        step("due", 0, 1)
        for which in range(3):
            step("take", which, 9)
            step("finish", which, 1000)
        check()
    assert len(ended) == sum(map(len, rows))
    assert not order.bonds and not any(order.lanes.values()) and not order.retried


def test_a_key_stays_with_its_process_while_that_holds_events_of_it() -> None:
    window, _ = window_of(["a", "b", "a", "b", "c"])
    one, two = hand_of(window, 1), hand_of(window, 9)
    first = one.take()
    assert first is not None and first.spans == [(0, 1)]
    other = two.take()
    assert other is not None and other.spans == [(1, 2), (3, 5)], "all but the key that the first has"
    one.report(1, {}, returned=False)
    again = one.take()
    assert again is not None and again.spans == [(2, 3)]


def test_a_key_without_events_in_hand_goes_to_who_is_free() -> None:
    window, _ = window_of(["a"], ["a"])
    one, two = hand_of(window, 1), hand_of(window, 1)
    assert one.take() is not None and two.take() is None
    one.report(1, {}, returned=False)
    assert two.take() is None, "it waits for the first"
    window.gather()
    held = two.take()
    assert held is not None and length(held.spans) == 1


def test_what_waits_for_a_process_waits_behind_a_retry_too() -> None:
    window, _ = window_of(["a"], ["a", "b"])
    assert window.order is not None
    one, two = hand_of(window), hand_of(window)
    first = one.take(1)
    assert first is not None and two.take() is not None, "which leaves the second of the key to the first process"
    one.report(1, {0: (first.portion, 0)}, returned=False)
    window.order.retry("a")
    assert one.take() is None
    window.resume("a")
    held = two.take()
    assert held is not None and key_of(held.portion, held.index) == "a"
