"""The supervisor's process: forks router and subscribers, reaps them, restarts them, ends them. One thread, no user code."""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mphub import failpoints
from mphub.procs import boot, fork
from mphub.procs.boot import Charter
from mphub.procs.desk import Desk, Reply
from mphub.procs.link import Link
from mphub.procs.mailbox import LASTING
from mphub.procs.wards import Child, Group, Ward, make_child, orphans, tails
from mphub.procs.worker import run_worker
from mphub.store.board import READY
from mphub.wire.frames import Answer, Call, Push, decoder, encode
from mphub.wire.specs import Spec

OUT_OF_MEMORY = "killed by the kernel's OOM killer, most likely: the machine or its cgroup ran out of memory"
LATER = 1.0
"""Seconds after which is tried again what the machine had no room for."""
TICK = 0.1
"""Seconds between looks at limits, outputs and frozen processes."""
LIMIT_TICK = 0.02
ASLEEP = 1.0
"""Seconds without a look from which this process, and then most likely the whole hub, was stopped or had no core."""
HELD_AFTER = 5.0
"""Seconds that publishers wait before a notice names whom they wait for."""
_call, _answer, _push, _spec = decoder(Call), decoder(Answer), decoder(Push), decoder(Spec)


class Supervisor:
    """Owns the folder, the listening sockets and every other process of the hub."""

    def __init__(self, charter: Charter) -> None:
        self.charter, self.address = charter, charter.address
        self.folder = Path(charter.address.folder)
        self.lock = boot.own(self.folder)
        fork.become_subreaper()
        self.selector = selectors.DefaultSelector()
        self.data = listen(self.address.data)
        self.desk = Desk(listen(self.address.control), self.address.token, self.selector, self._serve)
        self.groups: dict[str, Group] = {}
        self.unsettled = {child.incarnation: child for child in orphans(self.folder)}
        """By incarnation: reaped, but the router has not said yet that its events are settled."""
        self.farewells: list[tuple[list[Ward], Reply]] = []
        self.held: dict[str, float] = {}
        """Since when publishers wait for whom."""
        self.named: set[str] = set()
        """Those of them that a notice has named."""
        self.early: list[tuple[Call, Reply]] | None = []
        """Calls that came before the journal had said who is subscribed."""
        self.stopping = False
        self.next_tick = 0.0
        self.awake = time.monotonic()
        self._watch_hub()
        gc.freeze()  # the template's objects are shared with every child
        self.link = Link(self)
        self._take_over()

    def _take_over(self) -> None:
        """Settle what a dead supervisor's children held, charged to nobody, and start what the journal says is subscribed."""
        for child in self.unsettled.values():
            self._tell_output(child, last=True)
            self._settle(child, "none", {"reason": "crash"})

        def adopt(found: list[tuple[bytes, str]]) -> None:
            failpoints.hit("supervisor.adopting")
            early, self.early = self.early or [], None
            for encoded, status in found:
                spec = _spec.decode(encoded)
                group = self.groups[spec.name] = Group(spec, paused=status == "PAUSED")
                for ward in group.wards:
                    if status in LASTING and status != "PAUSED":
                        group.note_state(ward, status)
                    else:
                        self._start(ward)
                self._announce(group)
            for call, reply in early:
                self._serve(call, reply)

        self.link.ask("specs", adopt)

    def run(self) -> None:
        """Supervise until the hub says close or is dead; then leave nothing behind."""
        while not self.stopping:
            for key, _ in self.selector.select(self._timeout()):
                key.data()
            self._tick()
            self.link.flush()
            self.desk.flush()
        self._end_all()  # not when this fails: then a successor needs the folder

    # -- time

    def _timeout(self) -> float:
        now = time.monotonic()
        waits = [self.next_tick - now, *self.link.waits(now)]
        waits += [ward.start_at - now for ward in self._wards() if ward.start_at is not None]
        waits += [child.kill_at[0][0] - now for child in self._children() if child.kill_at]
        return max(0.0, min(waits))

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self.awake > ASLEEP:
            for child in self._children():
                child.forgive(now - self.awake)
        self.awake = now
        self.link.tick(now)
        for ward in self._wards():
            if ward.start_at is not None and ward.start_at <= now:
                self._start(ward)
        for child in self._children():
            while child.kill_at and child.kill_at[0][0] <= now:
                self._signal(child, child.kill_at.pop(0)[1])
        if now >= self.next_tick:
            limited = any(group.spec.limits.timeout is not None for group in self.groups.values())
            self.next_tick = now + (LIMIT_TICK if limited else TICK)
            for ward in self._wards():
                self._look_at(ward, now)
            self._name_holders(now)
            self.link.end_frozen(now)
            self.desk.close_silent()
            self._reap_strangers()

    def _look_at(self, ward: Ward, now: float) -> None:
        child = ward.child
        if child is None:
            return
        self._tell_output(child)
        limits = ward.spec.limits
        if not child.ready and child.ending is None and now - child.started > limits.start_timeout:
            self._end(child, "start_timeout", [(0.0, signal.SIGABRT), (0.5, signal.SIGKILL)])
        if limits.timeout is not None and child.ready and child.ending is None:
            self._check_limit(child, limits.timeout, now)
        if ward.name in self.held or child.frozen:
            self._check_frozen(ward, child, now)

    def _check_limit(self, child: Child, timeout: float, now: float) -> None:
        """End a process whose event overran; look again right before, as another may just have started."""
        running = child.sample(now)
        if running is not None and running[1] > timeout and child.board.running_slot() == running[0]:
            child.overran = running[0]
            # SIGABRT lets faulthandler write the stack, also of a handler that holds the GIL in C
            self._end(child, "limit", [(0.0, signal.SIGABRT), (0.5, signal.SIGKILL)])

    def _check_frozen(self, ward: Ward, child: Child, now: float) -> None:
        """A frozen process holds no publisher."""
        frozen = child.frost.lasts(child.pid, now) and (child.frozen or ward.state == "RUNNING")
        if frozen != child.frozen:
            child.frozen = frozen
            self._tell_status(self.groups[ward.name], self.link)

    # -- the router

    def tell_of_the_dead(self, link: Link) -> None:
        """Tell a new router of those whose events are not settled."""
        for child in self.unsettled.values():
            self._tell_started(link, child, live=True)

    def tell_of_the_living(self, link: Link) -> None:
        """Tell a new router who lives, and who does not."""
        for group in self.groups.values():
            self._tell_status(group, link)
        for child in self._children():
            child.unmet = child.board.flag(READY)  # else it has never been given anything
            self._tell_started(link, child, live=child.unmet)
            if child.ending in ("stop", "restart"):
                link.tell("stop_worker", incarnation=child.incarnation)
        link.tell("known", incarnations=[*self.unsettled, *(child.incarnation for child in self._children())])

    def _tell_started(self, link: Link, child: Child, *, live: bool) -> None:
        link.tell("started", name=child.name, incarnation=child.incarnation, replica=child.replica, board=str(child.board.path), live=live)

    def heard(self, what: str, args: dict[str, Any]) -> None:
        """Take what the router pushes."""
        if what == "news":
            self.desk.push("notice", **args)
        elif what == "log":
            self.desk.push("log", **args)
        else:
            getattr(self, f"heard_{what}")(**args)

    def heard_ready(self, incarnation: int) -> None:
        for ward in self._wards():
            if ward.child is not None and ward.child.incarnation == incarnation and ward.child.unmet:
                ward.child.unmet = False
                self._tell_status(self.groups[ward.name], self.link)
            if ward.child is not None and ward.child.incarnation == incarnation and not ward.child.ready:
                ward.child.ready = True
                ward.put_off = False
                if ward.state == "STARTING":
                    self._set_state(ward, "RUNNING")

    def heard_full(self, incarnation: int, message: str) -> None:
        """A process has done what cannot be kept: end it, uncharged; the next one tries again later."""
        for child in self._children():
            if child.incarnation == incarnation and child.ending != "full":
                self.notice("full", child.name, f"{message}; its process starts anew in {LATER:.0f} s")
                self._end(child, "full", [(0.0, signal.SIGKILL)])

    def heard_kill(self, incarnation: int) -> None:
        """Nobody wants any more what a process does: end it, uncharged; what else it had in hand runs again."""
        for child in self._children():
            if child.incarnation == incarnation and child.ending is None:
                self._end(child, "kill", [(0.0, signal.SIGKILL)])

    def heard_held(self, patterns: list[str], names: list[str]) -> None:
        """Publishers of these patterns wait: for these subscribers, or for a full journal."""
        who = names or (["the journal, which is full"] if patterns else [])
        now = time.monotonic()
        self.held = {name: self.held.get(name, now) for name in who}
        self.named &= set(who)

    def _name_holders(self, now: float) -> None:
        for name, since in self.held.items():
            if now - since >= HELD_AFTER and name not in self.named:
                self.named.add(name)
                group = self.groups.get(name)
                keys = ", ".join(group.spec.patterns) if group else "all keys"
                message = f"publishers of {keys} have waited {HELD_AFTER:.0f} s for {name}" + (": its inbox is full" if group else "")
                self.notice("held", name if group else None, message)

    def fail(self, message: str) -> None:
        """End the hub: it cannot go on."""
        self.desk.push("failed", message=message)
        self.desk.flush()
        self.stopping = True

    def notice(self, kind: str, subscriber: str | None, message: str, **details: object) -> None:
        """Tell the hub something that its user should know."""
        self.desk.push("notice", kind=kind, subscriber=subscriber, message=message, details=details)

    # -- subscribers

    def _children(self) -> list[Child]:
        return [ward.child for ward in self._wards() if ward.child is not None]

    def _wards(self) -> list[Ward]:
        return [ward for group in self.groups.values() for ward in group.wards]

    def _start(self, ward: Ward) -> None:
        """Start the next incarnation, or try again later if the machine lacks something."""
        ward.start_at = None
        try:
            child = self._fork(ward)
        except OSError as error:
            self._put_off(ward, str(error.strerror))
            return
        self.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._reap(ward, child))
        ward.child = child
        self._set_state(ward, "STARTING")
        failpoints.hit("supervisor.started")

    def _put_off(self, ward: Ward, why: str) -> None:
        ward.start_at = time.monotonic() + LATER
        self._set_state(ward, "BACKOFF")
        if not ward.put_off:
            self.notice("shortage", ward.name, f"its process cannot be started ({why}): tried again every {LATER:.0f} s")
        ward.put_off = True

    def _fork(self, ward: Ward) -> Child:
        incarnation, board = make_child(ward.name, self.folder)
        logs = self.folder / "logs" / f"{incarnation:x}"
        spec, address = ward.spec, self.address
        child = Child(ward.name, incarnation, 0, -1, board, self.folder, tails(logs), ward.replica)
        self._tell_started(self.link, child, live=False)  # before the fork: the router must know whom it meets

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
            self._settle(child, "none", {"reason": "crash"})
            raise
        return child

    def _reap(self, ward: Ward, child: Child) -> None:
        """A child is dead: end what it started, settle its events, decide about the next."""
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        fork.kill_session(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        failpoints.hit("supervisor.reaped")
        self.selector.unregister(child.pidfd)
        os.close(child.pidfd)
        self._tell_output(child, last=True)
        ward.child = None
        finished = child.board.finished_any()
        by_itself = child.ending in (None, "limit", "start_timeout")
        exit_ = fork.exit_word(status)
        error, text = child.last_words()
        if child.was_out_of_memory(exit_):
            text = OUT_OF_MEMORY
        charge = {None: "running", "limit": "slot"}.get(child.ending, "none")
        cause: dict[str, object] = {
            "reason": "timeout" if child.ending == "limit" else "crash", "exit": exit_, "pid": child.pid,
            "traceback": text if not error else "", "rss": usage.ru_maxrss * 1024, "seconds": ward.spec.limits.timeout or 0.0,
            "stderr": child.outputs["err"].last_words,
        }  # fmt: skip
        self._settle(child, charge, cause)
        if error or not child.ready:
            ward.error = (error, text)
        self._decide(ward, child, exit_, text, finished=finished, by_itself=by_itself)

    def _settle(self, child: Child, charge: str, cause: dict[str, object]) -> None:
        """Let the router settle what a dead process held, then forget it."""

        def settled(_: object) -> None:
            failpoints.hit("supervisor.settled")
            del self.unsettled[child.incarnation]
            child.remove_files()
            failpoints.hit("supervisor.removed")
            self.link.tell("settled", incarnation=child.incarnation)
            self._say_farewells()

        self.unsettled[child.incarnation] = child
        self.link.ask("died", settled, incarnation=child.incarnation, charge=charge, slot=child.overran, cause=cause)
        failpoints.hit("supervisor.settling")

    def _decide(self, ward: Ward, child: Child, exit_: str | int, text: str, *, finished: bool, by_itself: bool) -> None:
        if child.ending in ("stop", "restart") and child.ready and text and exit_ == 1:
            self.notice("failure", ward.name, text, key="", id="teardown", attempt=1, first=True)
        if ward.leaving:
            self._set_state(ward, "STOPPED", lasting=False)
            return
        group = self.groups[ward.name]
        if ward.replica >= group.spec.replicas:
            self._let_go(group, ward)
            return
        if child.ending == "stop":  # scaled down, and up again meanwhile
            self._start(ward)
            return
        if exit_ == fork.SHORT and not fork.has_begun(child.record):
            self._put_off(ward, "no descriptor, memory or room in the hub's folder")
            return
        decision = ward.counter.died(finished_any=finished, by_itself=by_itself, exit_ok=exit_ == 0)
        if by_itself:
            reason = {
                "limit": f"overran its limit of {ward.spec.limits.timeout} s",
                "start_timeout": "was not ready in time",
            }
            what = reason.get(child.ending or "", f"ended with {exit_}")
            text, ward.told = (text, text) if text != ward.told else ("", text)  # once is enough of one that dies at every start
            self.notice(
                "death", ward.name, f"process {child.pid} {what}", exit=exit_, pid=child.pid, traceback=text, ready=child.ready
            )  # fmt: skip
        if decision.state == "BACKOFF":
            ward.restarts += 1
            ward.start_at = time.monotonic() + (LATER if child.ending == "full" else decision.delay)
            self._set_state(ward, "BACKOFF")
        else:
            self._set_state(ward, decision.state)

    def _set_state(self, ward: Ward, state: str, *, lasting: bool = True) -> None:
        """Tell hub and router; not the router if the hub ends: then what waits is dropped, not left waiting."""
        group, ward.told_router = self.groups[ward.name], lasting
        group.note_state(ward, state)
        self._announce(group)
        if state == "FATAL":
            which = f"replica {ward.replica} " if group.spec.replicas > 1 else ""
            deaths = f"{which}died {ward.counter.in_a_row} times in a row with no event finished"
            self.notice("FATAL", ward.name, f"{deaths}: not started again until restart()")

    def _announce(self, group: Group) -> None:
        """Tell router and hub the state of a subscriber."""
        self._tell_status(group, self.link)
        error, text = group.error if group.state == "FATAL" else (b"", "")
        self.desk.push("state", name=group.spec.name, state=group.state, error=error, traceback=text)

    def _tell_status(self, group: Group, link: Link) -> None:
        if all(ward.told_router for ward in group.wards):
            link.tell("status", name=group.spec.name, status=group.status)

    def _end(self, child: Child, why: str, ladder: list[tuple[float, int]]) -> None:
        """Begin to end a process: (seconds from now, signal) after another."""
        child.ending = why
        now = time.monotonic()
        child.kill_at = [(now + after, number) for after, number in ladder]

    def _ask_to_stop(self, child: Child, why: str) -> None:
        """The stop ladder: ask, SIGTERM, SIGKILL."""
        ask, term = self.charter.ask, self.charter.term
        self.link.tell("stop_worker", incarnation=child.incarnation)
        self._end(child, why, [(ask, signal.SIGTERM), (ask + term, signal.SIGKILL)])

    def _signal(self, child: Child, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, number)

    def _tell_output(self, child: Child, *, last: bool = False) -> None:
        for name, tail in child.outputs.items():
            lines = tail.lines(last=last)
            if lines:
                self.desk.push("output", subscriber=child.name, stream=name, lines=lines)

    def _reap_strangers(self) -> None:
        """Reap orphans that came to us: what a handler's own children had started."""
        known = {self.link.pid, *(child.pid for child in self._children())}
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in known:
                return
            os.waitpid(found.si_pid, 0)

    # -- the hub and other clients

    def _watch_hub(self) -> None:
        try:
            self.hub_pidfd = os.pidfd_open(self.charter.hub_pid)
        except ProcessLookupError:
            self.stopping = True
            return
        if not fork.is_same(self.charter.hub_pid, self.charter.hub_ticks):
            self.stopping = True
        self.selector.register(self.hub_pidfd, selectors.EVENT_READ, self._hub_died)

    def _hub_died(self) -> None:
        self.stopping = True

    def _serve(self, call: Call, reply: Reply) -> None:
        """Do what a client asks, or let the router do it."""
        op: Callable[..., None] | None = getattr(self, f"do_{call.op}", None)
        if self.early is not None:
            self.early.append((call, reply))
        elif op is not None:
            op(reply, **call.args)
        else:
            self.link.ask(call.op, reply, **call.args)

    def do_subscribe(self, answer: Reply, spec: bytes) -> None:
        """Commit a subscription, answer, then fork its process."""
        found = _spec.decode(spec)
        failpoints.hit("supervisor.subscribing")

        def committed(_: object) -> None:
            failpoints.hit("supervisor.subscribed")
            answer()
            if found.name not in self.groups:  # else the call is repeated: its answer was lost with a supervisor
                group = self.groups[found.name] = Group(found)
                for ward in group.wards:
                    self._start(ward)

        self.link.ask("subscribe", committed, spec=spec)

    def do_unsubscribe(self, answer: Reply, name: str) -> None:
        """End a subscriber's processes and drop what still waits for it."""
        group = self.groups.get(name)
        if group is None:  # repeated
            answer()
            return
        group.leaving = True

        def when_dead() -> None:
            failpoints.hit("supervisor.unsubscribing")
            del self.groups[name]
            self.link.ask("forget", answer, name=name, reason="unsubscribed")

        self._once_dead(group.wards, when_dead)

    def do_restart(self, answer: Reply, name: str) -> None:
        """Start a subscriber's processes anew; charged to nobody."""
        group = self._changeable(name)
        for ward in group.wards if group is not None else []:
            self._renew(ward)
        answer()

    def _renew(self, ward: Ward) -> None:
        """Let a replica begin anew, whatever it was in."""
        ward.counter.reset()
        if ward.child is None:
            ward.start_at = time.monotonic()
            self._set_state(ward, "BACKOFF")
        elif ward.child.ending is None:
            self._ask_to_stop(ward.child, "restart")

    def do_pause(self, answer: Reply, name: str) -> None:
        """Let a subscriber's processes finish what runs, and give them no more; answered when that is in the journal."""
        self._set_paused(answer, name, paused=True)

    def do_resume(self, answer: Reply, name: str) -> None:
        self._set_paused(answer, name, paused=False)

    def _set_paused(self, answer: Reply, name: str, *, paused: bool) -> None:
        group = self._changeable(name)
        if group is None:
            answer()
            return
        group.paused = paused
        self._announce(group)
        self.link.ask("status", answer, name=name, status=group.status)

    def _changeable(self, name: str) -> Group | None:
        """Return a subscriber, unless it is about to go."""
        group = self.groups.get(name)
        return None if group is None or group.leaving else group

    def do_scale(self, answer: Reply, name: str, replicas: int) -> None:
        """Give a subscriber more processes or fewer; those that go finish what runs."""

        self._change(answer, name, self._rescale, replicas=replicas)

    def _rescale(self, group: Group, spec: Spec) -> None:
        new, going = group.scale(spec)
        for ward in new:
            self._start(ward)
        for ward in going:
            self._let_go(group, ward)

    def do_replace(self, answer: Reply, spec: bytes) -> None:
        """Follow another subscription of the same name: its code has what waits."""
        found = _spec.decode(spec)
        group = self._changeable(found.name)
        if group is None:
            self.do_subscribe(answer, spec)
            return

        def committed(_: object) -> None:
            if self._changeable(found.name) is group:
                group.adopt(found)
                self._rescale(group, found)
                for ward in group.wards:
                    self._renew(ward)
            answer()

        self.link.ask("subscribe", committed, spec=spec)

    def do_set_keys(self, answer: Reply, name: str, patterns: list[str]) -> None:
        self._change(answer, name, lambda group, spec: setattr(group, "spec", spec), patterns=patterns)

    def _change(self, answer: Reply, name: str, then: Callable[[Group, Spec], None], **fields: object) -> None:
        """Commit another spec, then follow it."""
        group = self._changeable(name)
        if group is None:
            answer()
            return
        spec = msgspec.structs.replace(group.spec, **fields)

        def committed(_: object) -> None:
            if self._changeable(name) is group:
                then(group, spec)
            answer()

        self.link.ask("subscribe", committed, spec=encode(spec))

    def _let_go(self, group: Group, ward: Ward) -> None:
        """End a replica that is one too many."""
        ward.start_at = None
        if ward.child is None:
            group.wards.remove(ward)
            self._announce(group)
        elif ward.child.ending is None:
            self._ask_to_stop(ward.child, "stop")

    def do_drain(self, answer: Reply) -> None:
        """Let the router say when all is done; what handlers printed until then comes first."""

        def drained(result: object) -> None:
            for child in self._children():
                self._tell_output(child)
            answer(result)

        self.link.ask("drain", drained)

    def do_states(self, answer: Reply) -> None:
        answer({name: {"state": g.state, "error": g.error[0], "traceback": g.error[1]} for name, g in self.groups.items()})

    def do_statistics(self, answer: Reply) -> None:
        """Merge the router's counters with states, pids, cpu and rss."""

        def merge(result: dict[str, Any]) -> None:
            for name, counters in result["subscribers"].items():
                group = self.groups.get(name)
                counters.update(group.public() if group else {"state": "STOPPED", "pids": [], "restarts": 0, "cpu": 0.0, "rss": 0})
            result["pids"] = {"supervisor": os.getpid(), "router": self.link.pid}
            answer(result)

        self.link.ask("statistics", merge)

    def do_stop_subscribers(self, answer: Reply) -> None:
        """End all subscribers by the ladder, and when they are settled drop what waits; answer how much that was."""
        for group in self.groups.values():
            group.leaving = True
        self._once_dead(self._wards(), lambda: self.link.ask("give_up", answer, reason="stopped"))

    def do_close(self, answer: Reply) -> None:
        """End the hub."""
        self.link.tell("close")
        failpoints.hit("supervisor.closing")
        answer()
        self.desk.flush()
        self.stopping = True

    def _once_dead(self, wards: list[Ward], then: Reply) -> None:
        """Stop processes; call ``then`` when each is reaped and its events are settled."""
        for ward in wards:
            ward.leaving, ward.start_at = True, None
            if ward.child is None:
                self._set_state(ward, "STOPPED", lasting=False)
            else:
                self._set_state(ward, "STOPPING")
                self._ask_to_stop(ward.child, "stop")
        self.farewells.append((wards, then))
        self._say_farewells()

    def _say_farewells(self) -> None:
        for wards, then in list(self.farewells):
            names = {ward.name for ward in wards}
            if all(ward.child is None for ward in wards) and not any(c.name in names for c in self.unsettled.values()):
                self.farewells.remove((wards, then))
                then()

    # -- the end

    def _end_all(self) -> None:
        """Kill what lives, reap it, remove the folder."""
        if not fork.is_gone(self.charter.hub_pid, self.charter.hub_ticks):
            self.link.let_close(time.monotonic() + 1.0)
        for pid in filter(None, [*(child.pid for child in self._children()), self.link.pid]):
            fork.kill_session(pid)
        fork.kill_children()  # what handlers started comes to us as its subreaper
        shutil.rmtree(self.folder, ignore_errors=True)


def listen(address: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):  # that of a dead supervisor
        os.unlink(address)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(address)
    os.chmod(address, 0o600)
    sock.listen(1024)
    sock.setblocking(False)
    return sock
