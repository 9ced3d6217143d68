"""The way to run several events with one call: gathered over frames, until they are many enough or the first has waited long enough."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final, NoReturn

from mphub.core.delivery import DONE, FILTERED, HANDLED, RUNNING, WAITING
from mphub.core.rows import Head
from mphub.core.spans import spans_of
from mphub.events import Event
from mphub.options import Batch
from mphub.procs.handlers import call_batch, check_asked_only
from mphub.procs.parcels import Parcel
from mphub.procs.ways import Way
from mphub.store.board import RECALLED, SLOTS, Board
from mphub.wire.frames import STOP
from mphub.wire.stream import Frame

if TYPE_CHECKING:
    from mphub.procs.worker import Worker

MISSING: Final = object()


@dataclass(slots=True, eq=False)
class Item:
    """An event that was read and has not ended."""

    parcel: Parcel
    place: int
    number: int
    due: float
    """When it has waited long enough, on the monotonic clock."""
    payload: Any = MISSING
    error: BaseException | None = None
    """Why there is no payload: it cannot be loaded, or the filter raised."""

    @property
    def slot(self) -> int:
        return Board.base + self.number % SLOTS

    @property
    def attempt(self) -> int:
        return self.parcel.attempt(self.place)

    @property
    def is_asked(self) -> bool:
        """Say whether somebody waits for its result."""
        return self.parcel.deliver.batch.reply

    @property
    def is_alone(self) -> bool:
        """Say whether nothing else will come until it has ended."""
        return bool(self.parcel.deliver.attempts)

    def load(self) -> Any:
        return self.parcel.loads(self.parcel.events[self.place])

    def take_payload(self) -> Any:
        """Return the payload, another one each time: a handler may have changed what it got.

        Raises what it cannot be had for.
        """
        if self.error is not None:
            raise self.error
        payload, self.payload = self.payload, MISSING
        return self.load() if payload is MISSING else payload


class Batches(Way):
    """Handles events together; what fails as a whole runs again one by one, so that only the guilty one fails."""

    def __init__(self, worker: Worker, rule: Batch) -> None:
        super().__init__(worker)
        self.rule = rule
        self.states = worker.board.map
        self.running: list[Item] = []
        self.singly: deque[Item] = deque()
        """What failed together, to be run one by one."""
        self.batch: list[Item] = []
        """The next one, as far as it has come."""
        self.coming: deque[Item] = deque()
        """What has been read and not been looked at."""
        self.end = 0
        """The delivery number behind all that has been read."""
        self.owed = inf
        """When what was given back would have waited long enough."""
        self._epoch = 0

    def run(self) -> None:
        """Handle what comes until asked to stop."""
        while True:
            before = len(self.batch)
            while items := self._next_batch():
                self._run(items)
            if self.states[RECALLED]:
                self._give_back()
            if before and len(self.batch) == before and self._is_late():
                got = None  # what came is not wanted: what waits has waited long enough
            else:
                got = self._receive()
            if got is None and not self.states[RECALLED]:
                self._run(self._take())
            elif got is None:
                continue
            elif got[0] == STOP:
                return
            elif (parcel := self.worker.unpack(got)) is not None:
                due = min(time.monotonic() + self.rule.wait, self.owed)
                self.coming.extend(Item(parcel, place, parcel.number(place), due) for place in range(len(parcel.events)))
                self.end = parcel.end

    def _receive(self) -> Frame | None:
        """Return the next frame; None if the batch has waited long enough."""
        self.worker.upto = self._first_open()
        try:
            return self.worker.receive(self.batch[0].due if self.batch else None)
        except TimeoutError:
            return None

    def _is_late(self) -> bool:
        return bool(self.batch) and time.monotonic() >= self.batch[0].due

    def _first_open(self) -> int:
        """Return the delivery number up to which everything has ended."""
        firsts = [items[0].number for items in (self.running, self.singly, self.batch, self.coming) if items]
        return min(firsts, default=self.end)

    def claims(self) -> Iterator[tuple[int, int]]:
        """Yield what is open or not known to be committed, not all that it came with: of a million one may be wanted."""
        ended = [self.worker.ended, *(numbers for _, _, _, numbers in self.worker.unconfirmed)]
        numbers = [item.number for item in (*self.running, *self.singly, *self.batch, *self.coming)]
        yield from ((first, end - first) for first, end in spans_of(sorted(itertools.chain(numbers, *ended))))

    # -- what to run next

    def _next_batch(self) -> list[Item]:
        """Return what is to be run now, if anything is."""
        if self.states[RECALLED]:
            return []
        if self.singly:
            return [self.singly.popleft()]
        self._fill()
        return self._take() if self._is_whole() else []

    def _take(self) -> list[Item]:
        items, self.batch = self.batch or [self.coming.popleft()], []
        return items

    def _is_whole(self) -> bool:
        """Say whether nothing more may come to it: what has failed already, or is to run alone, has its turn behind it."""
        if self.coming and (self.coming[0].error is not None or (self.batch and self.coming[0].is_alone)):
            return True
        return len(self.batch) >= self.rule.size or bool(self.batch and self.batch[0].is_alone)

    def _fill(self) -> None:
        """Move what is wanted into the next batch."""
        while self.coming and not self._is_whole() and not self.states[RECALLED]:
            item = self.coming.popleft()
            self.running = [item]
            try:
                if self._is_wanted(item):
                    self.batch.append(item)
            except BaseException as error:
                self.worker.outputs.fresh.clear()
                if self.worker.is_the_end(error):
                    self._die(error)
                self.states[item.slot], item.error = WAITING, error
                self.coming.appendleft(item)
            finally:
                self.running = []

    def _is_wanted(self, item: Item) -> bool:
        """Load an event, and ask the filter; whatever that leads to is the event's own."""
        worker = self.worker
        self.states[item.slot] = RUNNING
        item.payload = item.load()
        if worker.runner.wants is not None:
            wanted = worker.runner.wants(item.payload)
            check_asked_only(worker.outputs.fresh)
            if not wanted:
                self.states[item.slot] = FILTERED
                worker.filter_out(item.number)
                return False
        self.states[item.slot] = WAITING
        return True

    # -- running

    def _run(self, items: list[Item]) -> None:
        """Handle some events with one call, and report; if that fails, let them run one by one."""
        worker, began = self.worker, time.perf_counter()
        replies = len(worker.replies)
        if items[0].is_alone and worker.unsaved:
            worker.upto = items[0].number
            worker.report()  # a death is charged to it alone
        self._start(items)
        try:
            results, errors = call_batch(worker.runner.call, [item.take_payload() for item in items], [item.is_asked for item in items])
            self._keep(items, results, errors)
        except BaseException as error:
            worker.outputs.fresh.clear()
            del worker.replies[replies:]
            if worker.is_the_end(error):
                worker.outputs.take()  # what is kept is of these alone, which run again
                self._die(error)
            if len(items) > 1:
                self._run_singly(items)
                return
            errors = {0: error}
        worker.measure(len(items), began)
        self.running = []
        self._end(items, errors)

    def _start(self, items: list[Item]) -> None:
        self.running, self.owed = items, inf
        self._epoch = min(item.parcel.deliver.epoch for item in items)
        for item in items:
            self.states[item.slot] = RUNNING

    def _run_singly(self, items: list[Item]) -> None:
        for item in items:
            self.states[item.slot] = WAITING
        self.running = []
        self.singly.extend(items)

    def _keep(self, items: list[Item], results: Sequence[object], errors: dict[int, BaseException]) -> None:
        """Keep outputs and results for one report; a result that cannot be sent fails its event alone."""
        worker, fresh = self.worker, self.worker.outputs.fresh
        for place, (item, result) in enumerate(zip(items, results, strict=True)):
            if place in errors or not (item.is_asked or worker.work.to is not None):
                continue
            before = len(fresh)
            try:
                worker.keep_result(item.parcel, item.place, result)
            except Exception as error:
                del fresh[before:]
                errors[place] = error
        if len(errors) == len(items):
            fresh.clear()
        state = HANDLED if fresh or worker.spec.snapshot is not None or any(item.is_asked for item in items) else DONE
        for place, item in enumerate(items):
            if place not in errors:
                self.states[item.slot] = state
        worker.outputs.keep(self._epoch)

    def _end(self, items: list[Item], errors: dict[int, BaseException]) -> None:
        """Report a batch, its outputs and its failures."""
        worker = self.worker
        worker.unsaved += (len(items) - len(errors)) if worker.spec.snapshot is not None else 0
        worker.ended += [item.number for place, item in enumerate(items) if place not in errors]
        goes_first = self._failed(items, errors)
        worker.upto = self._first_open()
        if goes_first:
            self._give_back(with_what_comes=True)
        elif worker.spec.snapshot is None or worker.failures or worker.snapshot_is_due():
            worker.report()

    def _die(self, error: BaseException) -> NoReturn:
        self.worker.upto = self._first_open()
        self.worker.report_before_the_end()
        raise error

    def _failed(self, items: list[Item], errors: dict[int, BaseException]) -> bool:
        """Note failures; say whether something is to start before everything that this process holds."""
        worker = self.worker
        goes_first = [worker.fail(items[place].number, errors[place], items[place].attempt) for place in sorted(errors)]
        now = [failure for failure in worker.failures if failure.is_for_now]
        # each goes before all that waits, and so before the one that is named before it
        worker.failures = [failure for failure in worker.failures if not failure.is_for_now] + now[::-1]
        return any(goes_first)

    def _give_back(self, *, with_what_comes: bool = False) -> None:
        """Return what has not started, if there is any (or what is under way may be)."""
        if not (self.singly or self.batch or self.coming or with_what_comes):
            return
        self.worker.upto = self.end = self._first_open()
        self.owed = min([self.owed, *(items[0].due for items in (self.batch, self.coming) if items)])
        self.singly.clear()
        self.batch.clear()
        self.coming.clear()
        self.worker.return_rest()

    # -- what a handler may ask

    @property
    def epoch(self) -> int:
        return self._epoch

    def current_events(self) -> list[Event]:
        return [self.worker.event(item.parcel, item.place) for item in self.running]

    def current_heads(self) -> list[Head]:  # payloads would be loaded once more, which takes longer than all the rest
        return [item.parcel.head(item.place) for item in self.running]
