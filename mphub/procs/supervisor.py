"""The supervisor's process: owns the folder, serves the hub, keeps router and subscribers. One thread, no user code."""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import shutil
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
from mphub.procs.guardian import Guardian
from mphub.procs.link import Link
from mphub.procs.mailbox import ABSENT, LASTING
from mphub.procs.wards import Group, Ward
from mphub.store.board import READY
from mphub.wire.frames import Answer, Call, Push, decoder, encode
from mphub.wire.specs import Spec

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
        fork.enter(self.folder / "children" / boot.SUPERVISOR)
        fork.become_subreaper()
        self.selector = selectors.DefaultSelector()
        self.data = listen(self.address.data)
        self.desk = Desk(listen(self.address.control), self.address.token, self.selector, self._serve)
        self.guardian = Guardian(self)
        self.groups = self.guardian.groups
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
        for child in self.guardian.unsettled.values():
            self.guardian.tell_output(child, last=True)
            self.guardian.settle(child, "none", {"reason": "crash"})

        def adopt(found: list[tuple[bytes, str]]) -> None:
            failpoints.hit("supervisor.adopting")
            early, self.early = self.early or [], None
            for encoded, status in found:
                spec = _spec.decode(encoded)
                group = self.groups[spec.name] = Group(spec, paused=status == "PAUSED")
                for ward in group.wards:
                    if status in LASTING and status != "PAUSED":
                        group.stopped = status == "STOPPED"
                        group.note_state(ward, status)
                    else:
                        self.guardian.start(ward)
                self.guardian.announce(group)
            for call, reply in early:
                self._serve(call, reply)

        self.link.ask("begin", adopt, run=self.charter.run)

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
        waits += [ward.start_at - now for ward in self.guardian.wards if ward.start_at is not None]
        waits += [child.kill_at[0][0] - now for child in self.guardian.children if child.kill_at]
        return max(0.0, min(waits))

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self.awake > ASLEEP:
            for child in self.guardian.children:
                child.forgive(now - self.awake)
        self.awake = now
        self.link.tick(now)
        for ward in self.guardian.wards:
            if ward.start_at is not None and ward.start_at <= now:
                self.guardian.start(ward)
        for child in self.guardian.children:
            self.guardian.strike(child, now)
        if now >= self.next_tick:
            limited = any(group.spec.limits.timeout is not None for group in self.groups.values())
            self.next_tick = now + (LIMIT_TICK if limited else TICK)
            for ward in self.guardian.wards:
                self.guardian.look_at(ward, now)
            self._name_holders(now)
            self.link.end_frozen(now)
            self.desk.close_silent()
            self._reap_strangers()
            if self.charter.keep and not (self.folder / "journal").is_dir():  # a removed journal can be written, for nobody
                self.fail(f"the folder of its journal, {os.path.realpath(self.folder / 'journal')}, has been removed")

    # -- the router

    def tell_of_the_dead(self, link: Link) -> None:
        """Tell a new router of those whose events are not settled."""
        for child in self.guardian.unsettled.values():
            self.guardian.tell_started(link, child, live=True)

    def tell_of_the_living(self, link: Link) -> None:
        """Tell a new router who lives, and who does not."""
        for group in self.groups.values():
            self.guardian.tell_status(group, link)
        for child in self.guardian.children:
            child.unmet = child.board.flag(READY)  # else it has never been given anything
            self.guardian.tell_started(link, child, live=child.unmet)
            if child.ending in ("stop", "restart", "recycle"):
                link.tell("stop_worker", incarnation=child.incarnation)
        link.tell("known", incarnations=[*self.guardian.unsettled, *(child.incarnation for child in self.guardian.children)])

    def heard(self, what: str, args: dict[str, Any]) -> None:
        """Take what the router pushes."""
        if what == "news":
            self.desk.push("notice", **args)
        elif what == "log":
            self.desk.push("log", **args)
        elif what == "held":
            self._hold(**args)
        elif what == "member":
            self._note_member(**args)
        else:
            getattr(self.guardian, f"heard_{what}")(**args)

    def _note_member(self, name: str, state: str, error: bytes, traceback: str) -> None:
        """Tell that one of those who share a process is not as that is, or is again."""
        self.desk.push("state", name=name, state=state, error=error, traceback=traceback)
        if state == "FATAL":
            message = "could not be set up in the process that it shares: not tried again until restart()"
            self.notice("FATAL", name, message, traceback=traceback)

    def _hold(self, patterns: list[str], names: list[str]) -> None:
        """Publishers of these patterns wait: for these subscribers, for the disk, or for a full journal."""
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

    def _reap_strangers(self) -> None:
        """Reap orphans that came to us: what a handler's own children had started."""
        known = {self.link.pid, *(child.pid for child in self.guardian.children)}
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
                    self.guardian.start(ward)

        self.link.ask("subscribe", committed, spec=spec)

    def do_unsubscribe(self, answer: Reply, name: str, keep: bool) -> None:
        """End a subscriber's processes and drop what still waits for it, or keep that for the next one of its name."""
        group = self.groups.get(name)
        if group is None:  # repeated
            answer()
            return
        group.leaving = True

        def when_dead() -> None:
            failpoints.hit("supervisor.unsubscribing")
            del self.groups[name]
            if keep:
                self.link.ask("status", answer, name=name, status=ABSENT)
            else:
                self.link.ask("forget", answer, name=name, reason="unsubscribed")

        self._once_dead(group.wards, when_dead)

    def do_restart(self, answer: Reply, name: str) -> None:
        """Start a subscriber's processes anew; charged to nobody."""
        if (group := self._changeable(name)) is not None:
            group.stopped = False
            for ward in group.wards:
                self.guardian.renew(ward)
        answer()

    def do_stop(self, answer: Reply, name: str) -> None:
        """End a subscriber's processes; what comes for it waits."""
        group = self._changeable(name)
        if group is None:
            answer()
            return
        group.stopped = True
        for ward in group.wards:
            self.guardian.halt(ward)
        self.link.ask("status", answer, name=name, status=group.status)

    def do_start(self, answer: Reply, name: str) -> None:
        """Start what was stopped or is FATAL; what runs goes on."""
        group = self._changeable(name)
        if group is not None and (group.stopped or group.state == "FATAL"):
            self.do_restart(answer, name)
        else:
            answer()

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
        self.guardian.announce(group)
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
            if group.stopped:
                self.guardian.halt(ward)
            else:
                self.guardian.start(ward)
        for ward in going:
            self.guardian.let_go(group, ward)

    def do_replace(self, answer: Reply, spec: bytes) -> None:
        """Follow another subscription of the same name: its code has what waits."""
        found = _spec.decode(spec)
        group = self._changeable(found.name)
        if group is None:
            self.do_subscribe(answer, spec)
            return

        def committed(_: object) -> None:
            if self._changeable(found.name) is not group:
                answer()
                return
            group.adopt(found)
            group.stopped = False
            self._rescale(group, found)
            for ward in group.wards:
                self.guardian.renew(ward)
            # behind what the router was told of them: once this is answered, the old code starts nothing more
            self.link.ask("status", answer, name=found.name, status=group.status)

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

    def do_drain(self, answer: Reply) -> None:
        """Let the router say when all is done; what handlers printed until then comes first."""

        def drained(result: object) -> None:
            for child in self.guardian.children:
                self.guardian.tell_output(child)
            answer(result)

        self.link.ask("drain", drained)

    def do_states(self, answer: Reply) -> None:
        """Tell the states of all subscribers."""

        def merge(odd: dict[str, Any]) -> None:
            # as they are by now: who asks believes this more than what was pushed meanwhile
            answer({name: {"state": g.state, "error": g.error[0], "traceback": g.error[1]} for name, g in self.groups.items()} | odd)

        self.link.ask("odd", merge)

    def do_statistics(self, answer: Reply) -> None:
        """Merge the router's counters with states, pids, cpu and rss."""

        def merge(result: dict[str, Any]) -> None:
            figures = {name: group.public() for name, group in self.groups.items()}
            for name, counters in result["subscribers"].items():
                host, own = counters.pop("host", name), counters.pop("own", "")
                counters.update(figures.get(host, {"state": "STOPPED", "pids": [], "restarts": 0, "cpu": 0.0, "rss": 0}))
                counters["state"] = own or counters["state"]
                counters |= {"process": None if host == name else host, "own": own}
            result["pids"] = {"supervisor": os.getpid(), "router": self.link.pid}
            answer(result)

        self.link.ask("statistics", merge)

    def do_stop_subscribers(self, answer: Reply) -> None:
        """End all subscribers by the ladder, and when they are settled drop what waits; answer how much that was."""
        for group in self.groups.values():
            group.leaving = True
        self._once_dead(self.guardian.wards, lambda: self.link.ask("give_up", answer, reason="stopped"))

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
            self.guardian.set_state(ward, "STOPPED" if ward.child is None else "STOPPING", lasting=ward.child is not None)
            for child in ward.children:
                self.guardian.ask_to_stop(child, "stop")
        self.farewells.append((wards, then))
        self.say_farewells()

    def say_farewells(self) -> None:
        for wards, then in list(self.farewells):
            names = {ward.name for ward in wards}
            if not any(ward.children for ward in wards) and not any(c.name in names for c in self.guardian.unsettled.values()):
                self.farewells.remove((wards, then))
                then()

    # -- the end

    def _end_all(self) -> None:
        """Kill what lives, reap it, remove the folder."""
        if not fork.is_gone(self.charter.hub_pid, self.charter.hub_ticks):
            self.link.let_close(time.monotonic() + 1.0)
        for pid in filter(None, [*(child.pid for child in self.guardian.children), self.link.pid]):
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
