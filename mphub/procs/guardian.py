"""The supervisor's part that keeps the processes of subscribers: starts, watches, ends and buries them, and decides about the next."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mphub import failpoints
from mphub.procs import fork
from mphub.procs.link import Link
from mphub.procs.wards import Child, Group, Ward, make_child, orphans, tails
from mphub.procs.worker import run_worker

if TYPE_CHECKING:
    from mphub.procs.supervisor import Supervisor

OUT_OF_MEMORY = "killed by the kernel's OOM killer, most likely: the machine or its cgroup ran out of memory"
LATER = 1.0
"""Seconds after which is tried again what the machine had no room for, and at the earliest a replacement that failed."""


class Guardian:
    """Keeps the wards of one supervisor."""

    def __init__(self, owner: Supervisor) -> None:
        self.owner = owner
        self.groups: dict[str, Group] = {}
        self.unsettled = {child.incarnation: child for child in orphans(owner.folder)}
        """By incarnation: reaped, but the router has not said yet that its events are settled."""

    @property
    def wards(self) -> list[Ward]:
        return [ward for group in self.groups.values() for ward in group.wards]

    @property
    def children(self) -> list[Child]:
        """Return all processes; an heir behind its predecessor, as a new router is to hear of them."""
        return [child for ward in self.wards for child in ward.children]

    # -- a life

    def start(self, ward: Ward) -> None:
        """Start the next incarnation, or try again later if the machine lacks something."""
        ward.start_at = None
        try:
            ward.child = self._fork(ward)
        except OSError as error:
            self._put_off(ward, str(error.strerror))
            return
        self.set_state(ward, "STARTING")
        failpoints.hit("supervisor.started")

    def _put_off(self, ward: Ward, why: str) -> None:
        ward.start_at = time.monotonic() + LATER
        self.set_state(ward, "BACKOFF")
        if not ward.put_off:
            self.owner.notice("shortage", ward.name, f"its process cannot be started ({why}): tried again every {LATER:.0f} s")
        ward.put_off = True

    def _fork(self, ward: Ward, follows: Child | None = None) -> Child:
        folder = self.owner.folder
        incarnation, board = make_child(ward.spec, folder)
        logs = folder / "logs" / f"{incarnation:x}"
        spec, address = ward.spec, self.owner.address
        child = Child(ward.name, incarnation, 0, -1, board, folder, tails(logs), ward.replica)
        child.predecessor = follows.incarnation if follows is not None else None
        self.tell_started(self.owner.link, child, live=False)  # before the fork: the router must know whom it meets

        def run() -> int:
            fork.take_surroundings(spec.surroundings)
            return run_worker(address, spec, incarnation, child.replica, board.path, child.crash_file)

        failpoints.hit("supervisor.announced")
        try:
            child.pid = fork.fork(run, child.record, out=logs)
            child.pidfd = os.pidfd_open(child.pid)
        except OSError:
            if child.pid:
                fork.end(child.pid)
            self.settle(child, "none", {"reason": "crash"})
            raise
        self.owner.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._reap(ward, child))
        return child

    def tell_started(self, link: Link, child: Child, *, live: bool) -> None:
        link.tell(
            "started", name=child.name, incarnation=child.incarnation, replica=child.replica, board=str(child.board.path), live=live,
            predecessor=child.predecessor,
        )  # fmt: skip

    def _find(self, incarnation: int) -> Iterator[tuple[Ward, Child]]:
        """Yield the process of a number, if it has not been reaped."""
        return ((ward, child) for ward in self.wards for child in ward.children if child.incarnation == incarnation)

    def heard_ready(self, incarnation: int) -> None:
        for ward, child in self._find(incarnation):
            if child.unmet:
                child.unmet = False
                self.tell_status(self.groups[ward.name], self.owner.link)
            if not child.ready:
                child.ready, child.since = True, time.monotonic()
                ward.put_off = False
                if child is ward.child and ward.state == "STARTING":
                    self.set_state(ward, "RUNNING")

    def tell_output(self, child: Child, *, last: bool = False) -> None:
        for name, tail in child.outputs.items():
            lines = tail.lines(last=last)
            if lines:
                self.owner.desk.push("output", subscriber=child.name, stream=name, lines=lines)

    # -- looks at it

    def look_at(self, ward: Ward, now: float) -> None:
        limits = ward.spec.limits
        for each in ward.children:
            self.tell_output(each)
            if each.is_starting and each.ending is None and now - each.started > limits.start_timeout:
                self._end(each, "start_timeout", [(0.0, signal.SIGABRT), (0.5, signal.SIGKILL)])
        child = ward.child
        if child is None:
            return
        if limits.timeout is not None and child.ready and child.goes_on:
            self._check_limit(child, limits.timeout, now)
        if ward.name in self.owner.held or child.frozen:
            self._check_frozen(ward, child, now)
        if child.ending == "recycle":
            self._let_finish(child)
        elif child.ready and child.is_due(ward.spec.recycle, now):
            self._start_heir(ward, now)

    def _check_limit(self, child: Child, timeout: float, now: float) -> None:
        """End a process whose event overran; look again right before, as another may just have started."""
        running = child.sample(now)
        if running is not None and running[1] > timeout and child.board.is_running(running[0]):
            child.overran = running[0]
            # SIGABRT lets faulthandler write the stack, also of a handler that holds the GIL in C
            self._end(child, "limit", [(0.0, signal.SIGABRT), (0.5, signal.SIGKILL)])

    def _check_frozen(self, ward: Ward, child: Child, now: float) -> None:
        """A frozen process holds no publisher."""
        frozen = child.frost.lasts(child.pid, now) and (child.frozen or ward.state == "RUNNING")
        if frozen != child.frozen:
            child.frozen = frozen
            self.tell_status(self.groups[ward.name], self.owner.link)

    # -- its heir: the process that is to replace it, set up before it is asked to stop

    def heard_due(self, incarnation: int) -> None:
        """A process has run as many events as it is to run."""
        for ward, child in self._find(incarnation):
            child.due = True
            self._start_heir(ward, time.monotonic())

    def _start_heir(self, ward: Ward, now: float) -> None:
        """Start the next process beside one that is due; of replicas one after the other, as each takes room and time."""
        is_wanted = ward.child is not None and ward.child.due and ward.child.ending is None and ward.heir is None
        if not is_wanted or now < ward.heir_at or self.groups[ward.name].is_setting_up_an_heir:
            return
        try:
            ward.heir = self._fork(ward, follows=ward.child)
        except OSError as error:
            self._lack_heir(ward, str(error.strerror))
            return
        failpoints.hit("supervisor.heir_started")

    def heard_set_up(self, incarnation: int) -> None:
        """An heir waits: its predecessor is to finish what runs and to give back the rest."""
        for ward, heir in self._find(incarnation):
            if heir is not ward.heir or heir.ending is not None:
                continue
            heir.waits = True
            if ward.child is not None and ward.child.ending is None:
                self.owner.link.tell("stop_worker", incarnation=ward.child.incarnation)
                self._end(ward.child, "recycle", [])
                failpoints.hit("supervisor.heir_waits")
            for other in self.groups[ward.name].wards:
                self._start_heir(other, time.monotonic())

    def _let_finish(self, child: Child) -> None:
        """Begin the stop ladder of one that is replaced once nothing runs there: a routine interrupts no event."""
        if child.board.running_slot() is not None:
            child.kill_at = []
        elif not child.kill_at:
            self._end(child, "recycle", self._ladder)

    def _take_over(self, ward: Ward, heir: Child) -> None:
        """Let an heir be the one that counts; the router gives it events once those of its predecessor are settled."""
        ward.child, ward.heir, ward.failed_heirs = heir, None, 0
        if heir.waits:
            heir.waits, heir.started = False, time.monotonic()
        else:
            self.set_state(ward, "STARTING")
        self.owner.desk.push("log", level="debug", message=f"process {heir.pid} takes over from the last one of {ward.name}")
        failpoints.hit("supervisor.taken_over")

    def _bury_heir(self, ward: Ward, heir: Child, exit_: str | int, text: str) -> None:
        """Try another one later if this one has died unasked; until then the one that is due goes on."""
        if ward.leaving:
            return
        group = self.groups[ward.name]
        if ward.replica >= group.spec.replicas:
            self.let_go(group, ward)
        elif exit_ == fork.SHORT and not fork.has_begun(heir.record):
            self._lack_heir(ward, "no descriptor, memory or room in the hub's folder")
        elif heir.ending != "stop":
            delay = self._put_heir_off(ward)
            old = ward.child
            goes_on = f", which goes on: tried again in {delay:.0f} s" if old is not None and old.ending is None else ""
            if heir.ending != "full":  # of which a notice has told
                self._tell_death(ward, heir, exit_, text, f"; it was to replace process {old and old.pid}{goes_on}")

    def _lack_heir(self, ward: Ward, why: str) -> None:
        if not ward.failed_heirs:
            self.owner.notice("shortage", ward.name, f"a process cannot be replaced ({why}): it goes on, and that is tried again")
        self._put_heir_off(ward)

    def _put_heir_off(self, ward: Ward) -> float:
        ward.failed_heirs += 1
        delay = max(LATER, ward.spec.restart.delay_for(ward.failed_heirs + 1))
        ward.heir_at = time.monotonic() + delay
        return delay

    def end_heir(self, ward: Ward) -> None:
        if ward.heir is not None and ward.heir.ending is None:
            self.ask_to_stop(ward.heir, "stop")

    # -- its end

    def renew(self, ward: Ward) -> None:
        """Let a replica begin anew, whatever it was in."""
        ward.counter.reset()
        ward.failed_heirs, ward.heir_at = 0, 0.0
        self.end_heir(ward)
        if ward.child is None:
            ward.start_at = time.monotonic()
            self.set_state(ward, "BACKOFF")
        elif ward.child.goes_on:
            self.ask_to_stop(ward.child, "restart")

    def halt(self, ward: Ward) -> None:
        """End a replica until its user wants it again."""
        ward.start_at = None
        self.end_heir(ward)
        self.set_state(ward, "STOPPED" if ward.child is None else "STOPPING")
        if ward.child is not None and ward.child.goes_on:
            self.ask_to_stop(ward.child, "stop")

    def let_go(self, group: Group, ward: Ward) -> None:
        """End a replica that is one too many."""
        ward.start_at = None
        if not ward.children:
            group.wards.remove(ward)
            self.announce(group)
        for child in ward.children:
            if child.goes_on:
                self.ask_to_stop(child, "stop")

    def ask_to_stop(self, child: Child, why: str) -> None:
        """The stop ladder: ask, SIGTERM, SIGKILL."""
        self.owner.link.tell("stop_worker", incarnation=child.incarnation)
        self._end(child, why, self._ladder)

    @property
    def _ladder(self) -> list[tuple[float, int]]:
        ask, term = self.owner.charter.ask, self.owner.charter.term
        return [(ask, signal.SIGTERM), (ask + term, signal.SIGKILL)]

    def heard_full(self, incarnation: int, message: str) -> None:
        """A process has done what cannot be kept: end it, uncharged; the next one tries again later."""
        for child in self.children:
            if child.incarnation == incarnation and child.ending != "full":
                self.owner.notice("full", child.name, f"{message}; its process starts anew in {LATER:.0f} s")
                self._end(child, "full", [(0.0, signal.SIGKILL)])

    def heard_kill(self, incarnation: int) -> None:
        """Nobody wants any more what a process does: end it, uncharged; what else it had in hand runs again."""
        for child in self.children:
            if child.incarnation == incarnation and child.goes_on:
                self._end(child, "kill", [(0.0, signal.SIGKILL)])

    def _end(self, child: Child, why: str, ladder: list[tuple[float, int]]) -> None:
        """Begin to end a process: (seconds from now, signal) after another."""
        child.ending = why
        now = time.monotonic()
        child.kill_at = [(now + after, number) for after, number in ladder]

    def strike(self, child: Child, now: float) -> None:
        """Send the signals that are due."""
        while child.kill_at and child.kill_at[0][0] <= now:
            _, number = child.kill_at.pop(0)
            if child.ending == "recycle":
                child.ending = "restart"  # from here on its end is our doing
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, number)

    # -- its death

    def _reap(self, ward: Ward, child: Child) -> None:
        """A child is dead: end what it started, settle its events, decide about the next."""
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        fork.kill_session(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        failpoints.hit("supervisor.reaped")
        self.owner.selector.unregister(child.pidfd)
        os.close(child.pidfd)
        self.tell_output(child, last=True)
        exit_ = fork.exit_word(status)
        if child.ending == "recycle" and (child.board.running_slot() is not None or isinstance(exit_, str)):
            child.ending = None  # it was to finish what it ran, and died of it
        error, text = child.last_words()
        if child.was_out_of_memory(exit_):
            text = OUT_OF_MEMORY
        charge = {None: "running", "limit": "slot"}.get(child.ending, "none")
        cause: dict[str, object] = {
            "reason": "timeout" if child.ending == "limit" else "crash", "exit": exit_, "pid": child.pid,
            "traceback": text if not error else "", "rss": usage.ru_maxrss * 1024, "seconds": ward.spec.limits.timeout or 0.0,
            "stderr": child.outputs["err"].last_words,
        }  # fmt: skip
        finished = child.board.finished_any()
        self.settle(child, charge, cause)
        if child is ward.heir:
            ward.heir = None
            self._bury_heir(ward, child, exit_, text)
            return
        ward.child = None
        if error or not child.ready:
            ward.error = (error, text)
        self._decide(ward, child, exit_, text, finished)

    def settle(self, child: Child, charge: str, cause: dict[str, object]) -> None:
        """Let the router settle what a dead process held, then forget it."""

        def settled(_: object) -> None:
            failpoints.hit("supervisor.settled")
            del self.unsettled[child.incarnation]
            child.remove_files()
            failpoints.hit("supervisor.removed")
            self.owner.link.tell("settled", incarnation=child.incarnation)
            self.owner.say_farewells()

        self.unsettled[child.incarnation] = child
        self.owner.link.ask("died", settled, incarnation=child.incarnation, charge=charge, slot=child.overran, cause=cause)
        failpoints.hit("supervisor.settling")

    def _decide(self, ward: Ward, child: Child, exit_: str | int, text: str, finished: bool) -> None:
        if child.ending in ("stop", "restart", "recycle") and child.ready and text and exit_ == 1:
            self.owner.notice("failure", ward.name, text, key="", id="teardown", attempt=1, first=True)
        if ward.leaving:
            self.set_state(ward, "STOPPED", lasting=False)
            return
        group = self.groups[ward.name]
        if ward.replica >= group.spec.replicas:
            self.let_go(group, ward)
            return
        if group.stopped:
            self.set_state(ward, "STOPPED")
            return
        if child.ending == "stop":  # scaled down, and up again meanwhile
            self.start(ward)
            return
        if exit_ == fork.SHORT and not fork.has_begun(child.record):
            self._put_off(ward, "no descriptor, memory or room in the hub's folder")
            return
        by_itself = child.ending in (None, "limit", "start_timeout")
        decision = ward.counter.died(finished_any=finished, by_itself=by_itself, exit_ok=exit_ == 0)
        if by_itself:
            self._tell_death(ward, child, exit_, text)
        if decision.state != "BACKOFF":
            self.end_heir(ward)
            self.set_state(ward, decision.state)
        elif ward.heir is not None and ward.heir.ending is None:
            ward.restarts += by_itself
            self._take_over(ward, ward.heir)
        elif child.ending == "recycle":  # its heir has died
            self.start(ward)
        else:
            ward.restarts += 1
            ward.start_at = time.monotonic() + (LATER if child.ending == "full" else decision.delay)
            self.set_state(ward, "BACKOFF")

    def _tell_death(self, ward: Ward, child: Child, exit_: str | int, text: str, more: str = "") -> None:
        reason = {"limit": f"overran its limit of {ward.spec.limits.timeout} s", "start_timeout": "was not ready in time"}
        what = reason.get(child.ending or "", f"ended with {exit_}")
        text, ward.told = (text, text) if text != ward.told else ("", text)  # once is enough of one that dies at every start
        self.owner.notice(
            "death", ward.name, f"process {child.pid} {what}{more}", exit=exit_, pid=child.pid, traceback=text, ready=child.ready
        )  # fmt: skip

    # -- what others hear of it

    def set_state(self, ward: Ward, state: str, *, lasting: bool = True) -> None:
        """Tell hub and router; not the router if the hub ends: then what waits is dropped, not left waiting."""
        group, ward.told_router = self.groups[ward.name], lasting
        group.note_state(ward, state)
        self.announce(group)
        if state == "FATAL":
            which = f"replica {ward.replica} " if group.spec.replicas > 1 else ""
            deaths = f"{which}died {ward.counter.in_a_row} times in a row with no event finished"
            self.owner.notice("FATAL", ward.name, f"{deaths}: not started again until restart()")

    def announce(self, group: Group) -> None:
        """Tell router and hub the state of a subscriber."""
        self.tell_status(group, self.owner.link)
        error, text = group.error if group.state == "FATAL" else (b"", "")
        self.owner.desk.push("state", name=group.spec.name, state=group.state, error=error, traceback=text)

    def tell_status(self, group: Group, link: Link) -> None:
        if all(ward.told_router for ward in group.wards):
            link.tell("status", name=group.spec.name, status=group.status)
