"""Who is blamed when a process dies that runs events together."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mphub.core.credit import Credit
from mphub.core.delivery import DONE, HANDLED, RUNNING, WAITING, Verdict
from mphub.core.grouped import Grouped
from mphub.core.spans import indexes
from mphub.core.window import Portion, Window

Settle = Callable[[Grouped, bytes, Callable[[int], bool]], Verdict]


def blamed(_: int) -> bool:
    """Blame whoever ran."""
    return True


def seen(delivery: Grouped, states: bytes, charged: Callable[[int], bool]) -> Verdict:
    """Settle what the router knows that the process held."""
    while delivery.take() is not None:
        pass
    return delivery.died(lambda number, count: states[number : number + count], charged)


def unseen(delivery: Grouped, states: bytes, charged: Callable[[int], bool]) -> Verdict:
    """Settle what waits, as far as this router knows."""
    return delivery.died_unseen([(0, len(states), 1, 0)], lambda number, count: states[number : number + count], charged)


@pytest.fixture(params=[seen, unseen])
def settle(request: pytest.FixtureRequest) -> Settle:
    found: Settle = request.param
    return found


def die(settle: Settle, states: list[int], charged: Callable[[int], bool] = blamed, attempts: dict[int, int] | None = None) -> Any:
    """Return (attempts from now on, what waits, what is finished, what is dead) after a death of a process that held one row."""
    window = Window()
    row: Any = SimpleNamespace(id=1, batch=SimpleNamespace(extras=None))
    portion = Portion(row, [(0, len(states))], 10, dict(attempts or {}))
    window.add(portion)
    verdict = settle(Grouped(window, 3, Credit(8, least=8), 32, 8), bytes(states), charged)
    waiting = [index for piece in window.waiting for index in indexes(piece.spans)]
    finished = [index for _, spans in verdict.finished for index in indexes(spans)]
    return portion.attempts, waiting, finished, [index for _, index, _ in verdict.dead]


def test_several_that_ran_together_run_alone_and_are_not_charged(settle: Settle) -> None:
    assert die(settle, [DONE, RUNNING, RUNNING, WAITING]) == ({1: 1, 2: 1}, [1, 2, 3], [0], [])


def test_one_that_ran_alone_is_charged(settle: Settle) -> None:
    assert die(settle, [RUNNING]) == ({0: 2}, [0], [], [])
    assert die(settle, [RUNNING], attempts={0: 2}) == ({0: 3}, [0], [], [])
    assert die(settle, [RUNNING], attempts={0: 3}) == ({0: 3}, [], [], [0])


def test_an_overrun_is_that_of_all_that_ran(settle: Settle) -> None:
    """The limit names the first of them."""
    assert die(settle, [RUNNING, RUNNING, WAITING], charged=lambda number: number == 0) == ({0: 1, 1: 1}, [0, 1, 2], [], [])


def test_an_end_that_is_nobodys_fault_changes_nothing(settle: Settle) -> None:
    assert die(settle, [RUNNING, RUNNING, WAITING], charged=lambda _: False) == ({}, [0, 1, 2], [], [])
    assert die(settle, [HANDLED, HANDLED], charged=lambda _: False) == ({}, [0, 1], [], [])


def test_what_was_being_committed_runs_alone_unless_something_ran(settle: Settle) -> None:
    assert die(settle, [HANDLED, HANDLED, WAITING]) == ({0: 1, 1: 1}, [0, 1, 2], [], [])
    assert die(settle, [HANDLED, RUNNING, RUNNING]) == ({1: 1, 2: 1}, [0, 1, 2], [], [])
