"""The usual way to run: one event after the other, in the main thread, as fast as can be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mphub.core.delivery import DONE, FILTERED, HANDLED, RUNNING
from mphub.events import Event
from mphub.procs.parcels import Parcel
from mphub.procs.ways import Way
from mphub.store.board import RECALLED, SLOTS
from mphub.wire.frames import STOP

if TYPE_CHECKING:
    from mphub.procs.worker import Worker

REPORT_AFTER: Final = 0.001
"""Seconds that outputs and replies wait for company."""
OUTPUT_BYTES: Final = 48 << 10
MANY_FAILURES: Final = 16


class OneByOne(Way):
    """Handles the events of each parcel in their order."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.parcel: Parcel | None = None
        self.plain = worker.work.to is None and worker.spec.snapshot is None and worker.runner.wants is None
        self.last = 0
        """The number of the parcel's last event."""
        self.started = 0.0

    def run(self) -> None:
        """Handle what comes until asked to stop."""
        worker = self.worker
        while (got := worker.receive())[0] != STOP:
            if (parcel := worker.unpack(got)) is not None:
                self._handle(parcel)

    def _handle(self, parcel: Parcel) -> None:
        """Run the handler for the events of one frame, and report."""
        worker, self.parcel = self.worker, parcel
        self.last = parcel.number(-1)
        self.started = time.perf_counter()
        self._run(parcel)
        if parcel.deliver.generation != worker.generation:
            return  # the rest was given back, and that was reported
        worker.upto = parcel.end
        worker.measure(len(parcel.events), self.started)
        if worker.spec.snapshot is None or worker.snapshot_is_due():
            worker.report()

    def _run(self, parcel: Parcel) -> None:
        """Run all events, going on behind each that fails."""
        run = self._run_plain if self.plain and not parcel.deliver.batch.reply else self._run_fully
        slots = parcel.slots()
        at = 0
        while at < len(slots):
            failed = run(parcel, slots, at)
            if failed is None or self.worker.generation != parcel.deliver.generation:
                return
            at = failed + 1

    def _run_plain(self, parcel: Parcel, slots: Sequence[int], at: int) -> int | None:
        """Run events whose results nobody wants; return the place of one that raised.

        No clock, no context variable and no method call per event: this loop is the rate.
        """
        worker = self.worker
        states, call, loads, fresh = worker.board.map, worker.runner.call, parcel.loads, worker.outputs.fresh
        slot = slots[at]
        try:
            for data, slot in zip(parcel.events[at:], slots[at:], strict=True):
                if states[RECALLED]:
                    break
                states[slot] = RUNNING
                call(loads(data))
                if fresh:
                    states[slot] = HANDLED
                    self._after_output(slots.index(slot))
                else:
                    states[slot] = DONE
            else:
                return None
        except BaseException as error:
            return self._raised(slots.index(slot), error)
        return self._give_back(slots.index(slot))

    def _run_fully(self, parcel: Parcel, slots: Sequence[int], at: int) -> int | None:
        """Run events that a filter may not want, whose results go somewhere, or whose state is kept by snapshots."""
        worker = self.worker
        states, call, loads, fresh = worker.board.map, worker.runner.call, parcel.loads, worker.outputs.fresh
        saves, wants = worker.spec.snapshot is not None, worker.runner.wants
        slot = slots[at]
        try:
            for data, slot in zip(parcel.events[at:], slots[at:], strict=True):
                if states[RECALLED]:
                    break
                states[slot] = RUNNING
                place = slots.index(slot)
                payload = loads(data)
                if wants is not None and not wants(payload):
                    states[slot] = FILTERED
                    worker.filter_out(parcel.number(place))
                    continue
                if worker.keep_result(parcel, place, call(payload)) or fresh or saves:
                    states[slot] = HANDLED
                    self._after_output(place)
                else:
                    states[slot] = DONE
            else:
                return None
        except BaseException as error:
            return self._raised(slots.index(slot), error)
        return self._give_back(slots.index(slot))

    def _after_output(self, place: int) -> None:
        """Let outputs go as one report once they are many or a millisecond old; the frame's last go with its end."""
        assert self.parcel is not None
        worker, number = self.worker, self.parcel.number(place)
        worker.upto = number + 1  # SIGTERM may come in between: it has ended once nothing of it is fresh any more
        worker.outputs.keep(self.parcel.deliver.epoch)
        if worker.spec.snapshot is not None:
            worker.unsaved += 1
            if number != self.last and worker.snapshot_is_due():
                worker.report()
        elif number != self.last and (worker.outputs.size > OUTPUT_BYTES or time.monotonic() - worker.last_report > REPORT_AFTER):
            worker.report()

    def _raised(self, place: int, error: BaseException) -> int:
        """Deal with what a handler raised; what ends a process ends this one."""
        assert self.parcel is not None
        worker, number = self.worker, self.parcel.number(place)
        if worker.is_the_end(error):
            self._report_last(self.parcel, place)
            raise error
        worker.outputs.fresh.clear()
        goes_first = worker.fail(number, error, self.parcel.attempt(place))
        worker.upto = number + 1
        if goes_first:
            self._return_rest(place + 1)
        elif len(worker.failures) >= MANY_FAILURES:
            worker.report()
        return place

    def _report_last(self, parcel: Parcel, place: int) -> None:
        """Let be committed what has ended before this process does; half of an event's outputs may be kept, which then runs again."""
        worker, number = self.worker, parcel.number(place)
        has_begun_to_end, fresh = worker.upto > number, worker.outputs.fresh
        if has_begun_to_end and fresh:
            return
        if not has_begun_to_end:
            fresh.clear()
            worker.upto = number
            worker.take_back_answer(parcel, place)
        worker.report_before_the_end()

    def _give_back(self, place: int) -> int:
        """Return what has not started, from one place of the frame on: the router wants it back."""
        assert self.parcel is not None
        self.worker.upto = self.parcel.number(place)
        self._return_rest(place)
        return place

    def _return_rest(self, ran: int) -> None:
        """Report what has run, and that all the rest that this process holds, here and under way, is the router's again."""
        self.worker.measure(ran, self.started)
        self.worker.return_rest()

    # -- what a handler may ask

    @property
    def epoch(self) -> int:
        return self.parcel.deliver.epoch if self.parcel is not None else 0

    def current_events(self) -> list[Event]:
        """Build the event from the delivery and the state bytes."""
        slot = self.worker.board.running_slot()
        if self.parcel is None or slot is None:
            return []
        offset = (slot - self.parcel.deliver.number) % SLOTS
        return [self.worker.event(self.parcel, self.parcel.offsets.index(offset))]
