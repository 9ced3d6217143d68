"""What becomes of subscribers in the thread engine: their threads are started, asked to end, given up; and what each of them does.

A thread takes its events and commits what came of them by itself: one that works through a backlog must not need another thread's turn, of
up to some milliseconds, for each of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from mphub.core.delivery import DONE, FILTERED, HANDLED, RUNNING, Held
from mphub.core.rate import Quota
from mphub.errors import JournalError
from mphub.procs.letters import NO_DEATH, Cause
from mphub.procs.local import Post
from mphub.procs.mailbox import Mailbox
from mphub.procs.wards import Group, Ward
from mphub.wire import codec
from mphub.wire.frames import Report
from mphub.wire.specs import Spec

if TYPE_CHECKING:
    from mphub.procs.threads import Threads

P = ParamSpec("P")
T = TypeVar("T")
LATER = 1.0
"""Seconds after which is tried again what there was no room for."""
REPORT_AFTER = 0.005
"""Seconds that the end of an event of which nothing is left waits for company: committing one by one would halve the rate."""


class Abandoned(BaseException):
    """This thread did not end in time: nothing that it does counts any more."""


class Place(Post):
    """A post with a thread of its own."""

    def __init__(self, home: Threads, box: Mailbox, replica: int, wake: threading.Condition) -> None:
        super().__init__(home, box, replica)
        self.thread: threading.Thread
        self.wake = wake
        self.ready = self.has_finished = self.is_abandoned = False
        self.ending = ""
        """Why it is to end: stop, restart."""
        self.deadline = time.monotonic() + box.spec.limits.start_timeout
        """When it is given up, by the monotonic clock."""
        self.reported_at = time.monotonic()
        self.done = 0
        """The delivery number up to which all is finished, though it may not be committed: nothing came of it but that."""

    @property
    def may_take(self) -> bool:
        return not self.ending and not self.box.is_at_rest

    def run(self, events: list[Held]) -> None:
        super().run(events)
        if self.box.spec.snapshot is None and not (self.failures or self.replies or self.outputs.size):
            self.done = self.upto

    @property
    def is_due(self) -> bool:
        """Say whether what came of its events is to be committed, though more waits."""
        rule, waited = self.box.spec.snapshot, time.monotonic() - self.reported_at
        if rule is None:
            return self.done != self.upto or waited >= REPORT_AFTER
        return bool(self.failures) or self.ran >= rule.every or waited >= rule.period

    def report_all(self) -> Report:
        """Return what came of the events since the last report, with the state that contains them."""
        self.reported_at = time.monotonic()
        return self.report(self.snapshot() or None)

    def states(self, number: int, count: int) -> bytes:
        """Return how far it is with some events, by their delivery numbers."""
        numbers = range(number, number + count)
        return bytes(
            FILTERED if n in self.filtered and n < self.done else DONE if n < self.done else HANDLED if n < self.upto else RUNNING
            for n in numbers
        )


class Lives:
    """Keeps the subscribers of one hub; all of it but what a thread does is done under the hub's lock."""

    def __init__(self, home: Threads) -> None:
        self.home = home
        self.groups: dict[str, Group] = {}
        self.places: dict[Ward, Place] = {}
        self.threads: set[threading.Thread] = set()
        """Those that are not given up."""
        self._idle: dict[Place, None] = {}
        """Those that wait for an event, longest first."""

    @property
    def wards(self) -> list[Ward]:
        return [ward for group in self.groups.values() for ward in group.wards]

    def due(self) -> float:
        """Return when there is something to do, by the monotonic clock."""
        times = [place.deadline for place in self.places.values()]
        return min([*times, *(ward.start_at for ward in self.wards if ward.start_at is not None)], default=inf)

    def tend(self, now: float) -> None:
        """Start whose time has come, give up who does not end."""
        for ward in self.wards:
            if ward.start_at is not None and ward.start_at <= now:
                self.start(ward)
        for ward, place in list(self.places.items()):
            if place.deadline <= now:
                self._give_up(ward, place)

    def wake_idle(self) -> None:
        """Wake as many as there are events that may start, those that have waited longest first."""
        left: dict[Mailbox, int] = {}
        for place in list(self._idle):
            box = place.box
            waiting = left.setdefault(box, box.window.loaded if box.quota is None else min(box.window.loaded, self._room(box.quota)))
            if waiting > 0 and place.may_take:
                left[box] = waiting - 1
                self._rouse(place)

    def _room(self, quota: Quota) -> int:
        return quota.room(self.home.exchange.clock())

    def _rouse(self, place: Place) -> None:
        self._idle.pop(place, None)
        place.wake.notify()

    # -- as the clerk keeps them

    def begin(self, spec: Spec) -> None:
        """Start a subscriber's threads."""
        group = self.groups[spec.name] = Group(spec)
        for ward in group.wards:
            self.start(ward)

    def restart(self, group: Group) -> None:
        """Let all replicas begin anew."""
        for ward in group.wards:
            self._renew(ward)

    def let_go(self) -> None:
        """Let all threads end: the hub is over."""
        for place in self.places.values():
            place.is_abandoned, place.ending = True, "stop"
            self._rouse(place)

    def start(self, ward: Ward) -> None:
        """Begin the next life of a replica, or try again later if the machine has no thread for it."""
        ward.start_at = None
        group = self.groups[ward.name]
        place = Place(self.home, self.home.exchange.boxes[ward.name], ward.replica, threading.Condition(self.home.lock))
        which = f"-{ward.replica}" if group.spec.replicas > 1 else ""
        place.thread = threading.Thread(target=self._live, args=(ward, place), name=f"mphub-{ward.name}{which}", daemon=True)
        try:
            place.thread.start()
        except RuntimeError as error:
            self._put_off(ward, str(error))
            return
        self.threads = {thread for thread in self.threads if thread.is_alive()} | {place.thread}
        self.places[ward] = place
        self._set_state(ward, "STARTING")

    def _put_off(self, ward: Ward, why: str) -> None:
        ward.start_at = time.monotonic() + LATER
        self._set_state(ward, "BACKOFF")
        if not ward.put_off:
            message = f"its thread cannot be started ({why}): tried again every {LATER:.0f} s"
            self.home.tell(kind="shortage", subscriber=ward.name, message=message, details={})
        ward.put_off = True

    def _set_state(self, ward: Ward, state: str, why: str = "") -> None:
        group = self.groups[ward.name]
        group.note_state(ward, state)
        if not ward.leaving or state != "STOPPED":  # else what waits is dropped, not left waiting
            self.announce(group)
        if state == "FATAL":
            which = f"replica {ward.replica} " if group.spec.replicas > 1 else ""
            self.home.tell(kind="FATAL", subscriber=ward.name, message=f"{which}{why}: not started again until restart()", details={})

    def announce(self, group: Group) -> None:
        self.home.exchange.set_status(group.spec.name, group.status)

    def _renew(self, ward: Ward) -> None:
        """Let a replica begin anew, whatever it was in."""
        ward.counter.reset()
        if ward not in self.places:
            ward.start_at = time.monotonic()
            self._set_state(ward, "BACKOFF")
        else:
            self._ask_to_end(ward, "restart")

    def rescale(self, group: Group, spec: Spec) -> None:
        """Follow a spec with another number of replicas; those that go finish what they run."""
        new, going = group.scale(spec)
        for ward in new:
            self.start(ward)
        for ward in going:
            ward.start_at = None
            if ward in self.places:
                self._ask_to_end(ward, "stop")
            else:
                self._after(ward, "stop")

    def end_all(self, wards: list[Ward]) -> set[Place]:
        """End subscribers for good; return the places that are to go."""
        for ward in wards:
            ward.leaving, ward.start_at = True, None
            if ward in self.places:
                self._set_state(ward, "STOPPING")
                self._ask_to_end(ward, "stop")
            else:
                self._set_state(ward, "STOPPED")
        return {self.places[ward] for ward in wards if ward in self.places}

    def _ask_to_end(self, ward: Ward, why: str) -> None:
        place = self.places[ward]
        if not place.ending:
            place.ending, place.deadline = why, time.monotonic() + self.home.ask
        self._rouse(place)

    def _after(self, ward: Ward, ending: str) -> None:
        """Decide what comes after a life that ended as it was to."""
        group = self.groups[ward.name]
        if ward.leaving:
            self._set_state(ward, "STOPPED")
        elif ward.replica >= group.spec.replicas:
            group.wards.remove(ward)
            self.announce(group)
        else:  # or scaled down, and up again meanwhile
            ward.restarts += ending == "restart"
            self.start(ward)

    def _give_up(self, ward: Ward, place: Place) -> None:
        """Go on without a thread whose time is over."""
        ending = place.ending
        if ending:
            self._abandon(ward, place, f"still does what it did when it was asked to end {self.home.ask:g} s ago")
            self._after(ward, ending)
        else:
            message = self._abandon(ward, place, f"was not set up within {place.box.spec.limits.start_timeout:g} s")
            ward.error = codec.encode_error(TimeoutError(message)), message
            self._set_state(ward, "FATAL", "was not set up in time")

    def kill(self, place: Place) -> None:
        """Go on without a thread at once."""
        ward = next(ward for ward, each in self.places.items() if each is place)
        ending = place.ending or "restart"
        self._abandon(ward, place, "works for a reply that was killed")
        self._after(ward, ending)

    def _abandon(self, ward: Ward, place: Place, why: str) -> str:
        """Let nothing count that a thread does from now on, as no thread can be ended; its event waits again. Return what is told."""
        place.is_abandoned, place.ending = True, place.ending or "stop"
        self.threads.discard(place.thread)
        self._bury(ward, place, None)
        message = f"thread {place.thread.name} {why}: it is abandoned, and goes on in the background, as no thread can be ended"
        self.home.tell(kind="abandoned", subscriber=ward.name, message=message, details={"thread": place.thread.name})
        return message

    def _bury(self, ward: Ward, place: Place, cause: Cause | None) -> None:
        """Let what a place had not finished wait again; what is to blame for its death is charged to it."""
        del self.places[ward]
        self._idle.pop(place, None)
        self.home.exchange.died(place, place.states, lambda number: cause is not None, cause or NO_DEATH)
        self.home.exchange.forget_incarnation(place.incarnation)

    # -- as their own threads live them

    def _live(self, ward: Ward, place: Place) -> None:
        """Be a replica of a subscriber: set up, handle events until asked to end, tear down."""
        self.home.claim_thread()
        try:
            place.set_up(self._turn(place, self._last_state, place))
            self._turn(place, self._is_ready, ward, place)
            while self._goes_on(place):
                pass
            trace = place.tear_down()
            self._turn(place, self._has_ended, ward, place, trace)
        except Abandoned:
            return
        except BaseException as error:  # of the set-up or a snapshot, or what cannot be kept
            full, told = str(error) if isinstance(error, JournalError) else "", (codec.encode_error(error), codec.traceback_text(error))
            with contextlib.suppress(Abandoned):
                self._turn(place, self._has_died, ward, place, told, full)
        finally:
            place.runner.close()

    def _goes_on(self, place: Place) -> bool:
        """Handle the next event, or commit what came of some, or wait; say whether there is more to do."""
        events = self._next(place)
        if events:
            place.run(events)
        if place.ran and (not events or place.is_due):
            self._turn(place, self._commit, place, place.report_all())
            return True
        return bool(events) or self._rest(place)

    def _turn(self, place: Place, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Change the books in a place's own thread, unless that has been given up."""

        def counted() -> T:
            if place.is_abandoned:
                raise Abandoned
            return act(*args, **kwargs)

        return self.home.turn(counted)

    def _last_state(self, place: Place) -> bytes:
        found = self.home.exchange.letters.snapshot(place.snapshot_key)
        return found[0] if found else b""

    def _is_ready(self, ward: Ward, place: Place) -> None:
        self.home.take_in(place.outputs)
        place.ready, ward.put_off = True, False
        if not place.ending:
            place.deadline = inf
            self._set_state(ward, "RUNNING")

    def _next(self, place: Place) -> list[Held]:
        """Take the next event, or batch, if it may; what is due comes first, and what is too late is gone."""
        with self.home.lock:
            now = self.home.exchange.clock()
            if place.box.due > now:
                return self._take(place, now)
        self._turn(place, self.home.exchange.wake, now)
        with self.home.lock:
            return self._take(place, now)

    def _take(self, place: Place, now: float) -> list[Held]:
        """Take what is next, or note that there is nothing."""
        events = place.take_next(now) if place.may_take else []
        order = place.box.window.order
        if not events and place.may_take and order is not None and order.lanes and not place.delivery.holding:
            events = self.home.exchange.even_out(place, lambda: place.take_next(now)) or []
        if events:
            self._idle.pop(place, None)
            return events
        self._idle[place] = None
        if place.box.quota is not None:
            self.home.clerk.ring()  # which waits until more may start
        return []

    def _commit(self, place: Place, report: Report) -> None:
        place.has_finished |= self.home.exchange.report(place, report, self.home.exchange.clock())
        if any(failure.delay for failure in report.failures) or any(output.batch.extras for output in report.outputs):
            self.home.clerk.ring()  # there may be something to do earlier

    def _rest(self, place: Place) -> bool:
        """Wait until there may be something to take that was not there; say whether it goes on."""
        with self.home.lock:
            while place in self._idle and not place.ending:
                place.wake.wait()
            self._idle.pop(place, None)
            return not place.ending

    def _has_ended(self, ward: Ward, place: Place, trace: str) -> None:
        del self.places[ward]
        self.home.leave(place, trace)
        self._after(ward, place.ending)

    def _has_died(self, ward: Ward, place: Place, error: tuple[bytes, str], full: str) -> None:
        """End a life that ended by itself: it could not be set up, or not go on; or, uncharged, it did what cannot be kept."""
        self._bury(ward, place, None if full else Cause("crash", pid=os.getpid(), traceback=error[1]))
        if ward.leaving or ward.replica >= self.groups[ward.name].spec.replicas:
            self._after(ward, place.ending)
            return
        ward.error = error
        decision = ward.counter.died(finished_any=place.has_finished, by_itself=not full, exit_ok=False)
        if full:
            self.home.tell(kind="full", subscriber=ward.name, message=f"{full}; its thread starts anew in {LATER:g} s", details={})
        else:
            message = f"thread {place.thread.name} {'failed' if place.ready else 'could not be set up'}"
            details = {"exit": None, "pid": None, "traceback": error[1], "ready": place.ready}
            self.home.tell(kind="death", subscriber=ward.name, message=message, details=details)
        if decision.state == "BACKOFF":
            ward.restarts += 1
            ward.start_at = time.monotonic() + (LATER if full else decision.delay)
            self.home.clerk.ring()
        self._set_state(ward, decision.state, f"failed {ward.counter.in_a_row} times in a row with no event finished")
