"""Delivery to a process that runs events together: whom a death is to be blamed on is known once they have run one by one. Pure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mphub.core.delivery import RUNNING, Range, Verdict, run_alone
from mphub.core.scattered import Scattered
from mphub.core.spans import indexes

States = Callable[[int, int], bytes]
Charged = Callable[[int], bool]


class Grouped(Scattered):
    """What a process holds that runs events in batches: one may wait for company while thousands behind it are not wanted."""

    def _is_free(self) -> bool:
        """It runs what has gathered as soon as such an event comes: that might wait for others which are behind this one."""
        return True

    def died(self, states: States, charged: Charged) -> Verdict:
        numbers = [held.number - held.index + index for held in self.held for index in indexes(held.spans)]
        return settle(numbers, super().died, states, charged)

    def died_unseen(self, ranges: list[Range], states: States, charged: Charged) -> Verdict:
        numbers = [number + i for number, count, _, _ in ranges for i in range(count)]
        return settle(numbers, partial(super().died_unseen, ranges), states, charged)


def settle(numbers: list[int], judge: Callable[[States, Charged], Verdict], states: States, charged: Charged) -> Verdict:
    """Charge nobody for a death of several that ran together, or were being committed together: each of them runs again alone."""
    running = [number for number in numbers if states(number, 1)[0] == RUNNING]
    blamed = any(map(charged, running))
    several = len(running) > 1
    verdict = judge(states, nobody if several else charged)
    for each in verdict.again:
        if (several and blamed and each.ran) or (not running and verdict.last is not None):
            run_alone(verdict, each.portion, each.index)
    return verdict


def nobody(_: int) -> bool:
    return False
