"""One process of a subscriber, as the exchange knows it."""

from __future__ import annotations

from mphub.core.aside import Hosted
from mphub.core.credit import Credit
from mphub.core.delivery import Delivery, Held
from mphub.core.grouped import Grouped
from mphub.core.scattered import Scattered
from mphub.core.spans import length
from mphub.procs.hosts import Member
from mphub.procs.mailbox import Mailbox
from mphub.store.board import SLOTS


class Consumer:
    """An incarnation and what it holds of its subscriber's inbox."""

    def __init__(self, incarnation: int, box: Mailbox, replica: int = 0) -> None:
        self.incarnation, self.box, self.replica = incarnation, box, replica
        self.delivery = delivery_of(box)

    def take(self, most: int, now: float) -> Held | None:
        """Take the next events, at most so many, as far as credit and the subscriber's rate go."""
        quota = self.box.quota
        if quota is None:
            return self.delivery.take(most)
        held = self.delivery.take(min(most, quota.room(now)))
        if held is not None:
            quota.spend(now, length(held.spans))
        return held

    @property
    def snapshot_key(self) -> str:
        """Name its snapshots: each replica has a state of its own (no name has a ``#``)."""
        return f"{self.box.name}#{self.replica}" if self.replica else self.box.name


def delivery_of(box: Mailbox) -> Delivery:
    """Return what hands out the events of an inbox in the way that its subscriber runs them."""
    spec = box.spec
    if spec.hosts:
        most = SLOTS // 2
        return Hosted[Member](box.window, spec.max_attempts, Credit(most, most), SLOTS, most)
    if spec.concurrency > 1:
        count = spec.concurrency
        return Scattered(box.window, spec.max_attempts, Credit(max(SLOTS // 2, count), count, at_a_time=count), SLOTS, count)
    every, size = spec.snapshot.every if spec.snapshot else 1, spec.batch.size if spec.batch else 1
    least = max(every, size)
    cap = min(SLOTS // 2, max(least, spec.recycle.max_events or SLOTS))
    kind = Grouped if spec.batch else Delivery
    return kind(box.window, spec.max_attempts, Credit(cap, least), SLOTS, at_a_time=size)
