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

from mphub.core.restarts import RestartCounter
from mphub.procs import boot, fork
from mphub.procs.boot import Charter
from mphub.procs.router import Router
from mphub.procs.wards import LOG_BYTES, Child, Tail, Ward, make_child
from mphub.procs.worker import run_worker
from mphub.wire import frames
from mphub.wire.frames import Answer, Call, ProtocolError, Push, decoder, encode
from mphub.wire.specs import Spec
from mphub.wire.stream import Frame, Stream, peer_uid

TICK = 0.1
"""Seconds between looks at limits, outputs and frozen processes."""
LIMIT_TICK = 0.02
FROZEN_AFTER = 5.0
ROUTER_DEATHS, ROUTER_PERIOD = 10, 10.0
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
        self.control = listen(self.address.control)
        self.selector.register(self.control, selectors.EVENT_READ, self._accept)
        self.wards: dict[str, Ward] = {}
        self.unsettled: dict[int, tuple[Child, Call]] = {}
        self.clients: set[Stream] = set()
        self.calls: dict[int, tuple[Call, Callable[[Any], None]]] = {}
        self.settlements: dict[int, Callable[[], None]] = {}
        self.farewells: list[tuple[list[Ward], Callable[..., None]]] = []
        self.numbers = 0
        self.router_pid = 0
        self.router_deaths: list[float] = []
        self.link: Stream | None = None
        self.held_names: list[str] = []
        self.stopping = False
        self.next_tick = 0.0
        self._watch_hub()
        gc.freeze()  # the template's objects are shared with every child
        self._start_router()

    def run(self) -> None:
        """Supervise until the hub says close or is dead; then leave nothing behind."""
        try:
            while not self.stopping:
                for key, _ in self.selector.select(self._timeout()):
                    key.data()
                self._tick()
        finally:
            self._end_all()

    # -- time

    def _timeout(self) -> float:
        now = time.monotonic()
        waits = [self.next_tick - now]
        waits += [ward.start_at - now for ward in self.wards.values() if ward.start_at is not None]
        waits += [child.kill_at[0][0] - now for child in self._children() if child.kill_at]
        return max(0.0, min(waits))

    def _tick(self) -> None:
        now = time.monotonic()
        for ward in list(self.wards.values()):
            if ward.start_at is not None and ward.start_at <= now:
                self._start(ward)
        for child in self._children():
            while child.kill_at and child.kill_at[0][0] <= now:
                self._signal(child, child.kill_at.pop(0)[1])
        if now >= self.next_tick:
            limited = any(ward.spec.limits.timeout is not None for ward in self.wards.values())
            self.next_tick = now + (LIMIT_TICK if limited else TICK)
            for ward in list(self.wards.values()):
                self._look_at(ward, now)
            self._flush_clients()
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
        if ward.name in self.held_names or ward.state == "FROZEN":
            self._check_frozen(ward, child, now)

    def _check_limit(self, child: Child, timeout: float, now: float) -> None:
        """End a process whose event overran; look again right before, as another may just have started."""
        running = child.sample(now)
        if running is not None and running[1] > timeout and child.board.running_slot() == running[0]:
            child.overran = running[0]
            # SIGABRT lets faulthandler write the stack, also of a handler that holds the GIL in C
            self._end(child, "limit", [(0.0, signal.SIGABRT), (0.5, signal.SIGKILL)])

    def _check_frozen(self, ward: Ward, child: Child, now: float) -> None:
        """A stopped process (state T) holds no publisher after 5 s."""
        if not child.is_frozen():
            child.frozen_since = None
            if ward.state == "FROZEN":
                ward.state = "RUNNING"
                self._tell_router("status", name=ward.name, status="RUNNING")
            return
        child.frozen_since = child.frozen_since or now
        if now - child.frozen_since >= FROZEN_AFTER and ward.state == "RUNNING":
            ward.state = "FROZEN"
            self._tell_router("status", name=ward.name, status="FROZEN")

    # -- the router

    def _start_router(self) -> None:
        ours, theirs = socket.socketpair()
        record = self.folder / "children" / "router"
        data = self.data
        # the router is forked with the control side closed; it begins with what the journal and the boards say
        self.router_pid = fork.fork(
            lambda: run_router(self.folder, self.address.token, data, theirs, self.charter.max_bytes),
            record,
            keep=(data.fileno(), theirs.fileno()),
        )
        theirs.close()
        self.link = Stream(ours)
        self.selector.register(ours, selectors.EVENT_READ, self._read_router)
        self.router_pidfd = os.pidfd_open(self.router_pid)
        self.selector.register(self.router_pidfd, selectors.EVENT_READ, self._reap_router)
        self._brief_router()

    def _brief_router(self) -> None:
        """Tell a new router who lives, who died unsettled, and what is still asked."""
        assert self.link is not None
        for child, call in self.unsettled.values():
            self._tell_started(child, live=True)
            self.link.send(frames.CALL, encode(call))
        for ward in self.wards.values():
            if ward.child is not None:
                self._tell_started(ward.child, live=True)
            if ward.state in ("FATAL", "PAUSED", "STOPPED"):
                self._tell_router("status", name=ward.name, status=ward.state)
        for call, _ in self.calls.values():
            self.link.send(frames.CALL, encode(call))

    def _reap_router(self) -> None:
        self.selector.unregister(self.router_pidfd)
        os.close(self.router_pidfd)
        _, status = os.waitpid(self.router_pid, 0)
        self._read_router()
        assert self.link is not None
        self._unregister(self.link)
        if self.stopping:
            return
        now = time.monotonic()
        self.router_deaths = [t for t in self.router_deaths if now - t < ROUTER_PERIOD] + [now]
        self._tell_hub(
            "notice",
            kind="death",
            subscriber=None,
            message=f"the router (pid {self.router_pid}) ended with {fork.exit_word(status)}; its successor takes over",
            details={},
        )
        if len(self.router_deaths) >= ROUTER_DEATHS:
            self._tell_hub(
                "failed",
                message=f"the router died {ROUTER_DEATHS} times in {ROUTER_PERIOD:.0f} s, last with {fork.exit_word(status)}",
            )
            self._flush_clients()
            self.stopping = True
            return
        self._start_router()

    def _read_router(self) -> None:
        assert self.link is not None
        for kind, header, _ in self.link.read() or ():
            if kind == frames.ANSWER:
                self._heard_answer(_answer.decode(header))
            elif kind == frames.PUSH:
                push = _push.decode(header)
                getattr(self, f"heard_{push.what}")(**push.args)

    def _heard_answer(self, answer: Answer) -> None:
        waiting = self.calls.pop(answer.id, None)
        if waiting is not None:
            waiting[1](answer.result)
        settled = self.settlements.pop(answer.id, None)
        if settled is not None:
            settled()

    def heard_ready(self, incarnation: int) -> None:
        for ward in self.wards.values():
            if ward.child is not None and ward.child.incarnation == incarnation and not ward.child.ready:
                ward.child.ready = True
                if ward.state == "STARTING":
                    self._set_state(ward, "RUNNING")

    def heard_news(self, kind: str, subscriber: str | None, message: str, details: dict[str, Any]) -> None:
        self._tell_hub("notice", kind=kind, subscriber=subscriber, message=message, details=details)

    def heard_held(self, patterns: list[str], names: list[str]) -> None:
        self.held_names = names
        if patterns:
            who = ", ".join(names) or "the journal, which is full"
            self._tell_hub(
                "notice",
                kind="held",
                subscriber=names[0] if names else None,
                message=f"publishers of {', '.join(patterns)} wait for {who}",
                details={"patterns": patterns, "names": names},
            )

    def heard_log(self, level: str, message: str) -> None:
        self._tell_hub("log", level=level, message=message)

    def _ask_router(self, op: str, then: Callable[[Any], None], **args: object) -> Call:
        """Call the router; the call is repeated to its successor if it dies before it has answered."""
        self.numbers += 1
        call = Call(self.numbers, op, args)
        self.calls[call.id] = (call, then)
        assert self.link is not None
        self.link.send(frames.CALL, encode(call))
        return call

    def _tell_router(self, op: str, **args: object) -> None:
        assert self.link is not None
        self.link.send(frames.CALL, encode(Call(0, op, args)))

    def _tell_started(self, child: Child, *, live: bool) -> None:
        self._tell_router("started", name=child.name, incarnation=child.incarnation, board=str(child.board.path), live=live)

    # -- subscribers

    def _children(self) -> list[Child]:
        return [ward.child for ward in self.wards.values() if ward.child is not None]

    def _start(self, ward: Ward) -> None:
        """Fork the next incarnation."""
        ward.start_at = None
        incarnation, board = make_child(ward.name, self.folder)
        logs = self.folder / "logs" / f"{incarnation:x}"
        spec, address = ward.spec, self.address
        child = Child(ward.name, incarnation, 0, -1, board, self.folder, {s: Tail(Path(f"{logs}.{s}")) for s in ("out", "err")})
        self._tell_started(child, live=False)  # before the fork: the router must know whom it meets

        def run() -> int:
            fork.take_surroundings(spec.surroundings)
            return run_worker(address, spec, incarnation, board.path, child.crash_file)

        child.pid = fork.fork(run, child.record, out=logs)
        child.pidfd = os.pidfd_open(child.pid)
        self.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._reap(ward, child))
        ward.child = child
        self._set_state(ward, "STARTING")

    def _reap(self, ward: Ward, child: Child) -> None:
        """A child is dead: end what it started, settle its events, decide about the next."""
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        fork.kill_session(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        self.selector.unregister(child.pidfd)
        os.close(child.pidfd)
        self._tell_output(child, last=True)
        ward.child = None
        finished = child.board.finished_any()
        by_itself = child.ending in (None, "limit", "start_timeout")
        exit_ = fork.exit_word(status)
        error, text = child.last_words()
        self._settle(ward, child, exit_, text if not error else "", usage.ru_maxrss * 1024)
        if error or not child.ready:
            ward.error = (error, text)
        self._decide(ward, child, exit_, finished=finished, by_itself=by_itself)

    def _settle(self, ward: Ward, child: Child, exit_: str | int, text: str, rss: int) -> None:
        charge = {None: "running", "limit": "slot"}.get(child.ending, "none")
        cause = {
            "reason": "timeout" if child.ending == "limit" else "crash", "exit": exit_, "pid": child.pid,
            "traceback": text, "rss": rss, "seconds": ward.spec.limits.timeout or 0.0,
        }  # fmt: skip

        def settled() -> None:
            del self.unsettled[child.incarnation]
            child.remove_files()
            self._tell_router("settled", incarnation=child.incarnation)
            self._say_farewells()

        self.numbers += 1
        call = Call(
            self.numbers,
            "died",
            {"incarnation": child.incarnation, "charge": charge, "slot": child.overran, "cause": cause},
        )
        self.unsettled[child.incarnation] = (child, call)
        self.settlements[call.id] = settled
        assert self.link is not None
        self.link.send(frames.CALL, encode(call))

    def _decide(self, ward: Ward, child: Child, exit_: str | int, *, finished: bool, by_itself: bool) -> None:
        if child.ending == "stop" or ward.leaving:
            self._set_state(ward, "STOPPED")
            return
        decision = ward.counter.died(finished_any=finished, by_itself=by_itself, exit_ok=exit_ == 0)
        if by_itself:
            reason = {
                "limit": f"overran its limit of {ward.spec.limits.timeout} s",
                "start_timeout": "was not ready in time",
            }
            what = reason.get(child.ending or "", f"ended with {exit_}")
            text = ward.error[1] if not child.ready else child.last_words()[1]
            self._tell_hub(
                "notice", kind="death", subscriber=ward.name, message=f"process {child.pid} {what}",
                details={"exit": exit_, "pid": child.pid, "traceback": text, "ready": child.ready},
            )  # fmt: skip
        if decision.state == "BACKOFF":
            ward.restarts += 1
            ward.start_at = time.monotonic() + decision.delay
            self._set_state(ward, "BACKOFF")
        else:
            self._set_state(ward, decision.state)

    def _set_state(self, ward: Ward, state: str) -> None:
        ward.state = state
        self._tell_router("status", name=ward.name, status=state)
        error, text = ward.error
        self._tell_hub(
            "state",
            name=ward.name,
            state=state,
            error=error if state == "FATAL" else b"",
            traceback=text if state == "FATAL" else "",
        )
        if state == "FATAL":
            self._tell_hub(
                "notice", kind="FATAL", subscriber=ward.name, details={"traceback": text},
                message=f"died {ward.counter.in_a_row} times in a row with no event finished: not started again until restart()",
            )  # fmt: skip

    def _end(self, child: Child, why: str, ladder: list[tuple[float, int]]) -> None:
        """Begin to end a process: (seconds from now, signal) after another."""
        child.ending = why
        now = time.monotonic()
        child.kill_at = [(now + after, number) for after, number in ladder]

    def _ask_to_stop(self, child: Child, why: str) -> None:
        """The stop ladder: ask, SIGTERM, SIGKILL."""
        ask, term = self.charter.ask, self.charter.term
        self._tell_router("stop_worker", incarnation=child.incarnation)
        self._end(child, why, [(ask, signal.SIGTERM), (ask + term, signal.SIGKILL)])

    def _signal(self, child: Child, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, number)

    def _tell_output(self, child: Child, *, last: bool = False) -> None:
        for name, tail in child.outputs.items():
            lines = tail.lines(last=last)
            if lines:
                self._tell_hub("output", subscriber=child.name, stream=name, lines=lines)

    def _reap_strangers(self) -> None:
        """Reap orphans that came to us; kill those that no living subscriber can own."""
        known = {self.router_pid, *(child.pid for child in self._children())}
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

    def _accept(self) -> None:
        sock, _ = self.control.accept()
        if peer_uid(sock) != os.getuid():
            sock.close()
            return
        stream = Stream(sock)
        self.selector.register(sock, selectors.EVENT_READ, lambda: self._read_client(stream))

    def _read_client(self, stream: Stream) -> None:
        try:
            found = stream.read()
            for frame in found or ():
                self._handle(stream, frame)
        except (ProtocolError, msgspec.MsgspecError):
            found = None
        if found is None:
            self.clients.discard(stream)
            self._unregister(stream)

    def _unregister(self, stream: Stream) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(stream.sock)
        stream.close()

    def _handle(self, stream: Stream, frame: Frame) -> None:
        kind, header, _ = frame
        if kind == frames.HELLO_CONTROL and header == self.address.token:
            self.clients.add(stream)
            return
        if stream not in self.clients or kind != frames.CALL:
            raise ProtocolError(f"kind {kind} from a stranger")
        call = _call.decode(header)

        def answer(result: object = None) -> None:
            self._send(stream, frames.ANSWER, encode(Answer(call.id, result)))

        op: Callable[..., None] | None = getattr(self, f"do_{call.op}", None)
        if op is not None:
            op(answer, **call.args)
        else:
            self._ask_router(call.op, answer, **call.args)

    def do_subscribe(self, answer: Callable[..., None], spec: bytes) -> None:
        """Commit a subscription, answer, then fork its process."""
        found = _spec.decode(spec)

        def committed(_: object) -> None:
            ward = self.wards[found.name] = Ward(found, RestartCounter(found.restart))
            answer()
            self._start(ward)

        self._ask_router("subscribe", committed, spec=spec)

    def do_unsubscribe(self, answer: Callable[..., None], name: str) -> None:
        """End a subscriber's process and drop what still waits for it."""
        ward = self.wards[name]
        ward.leaving = True
        ward.start_at = None

        def when_dead() -> None:
            del self.wards[name]
            self._ask_router("forget", answer, name=name, reason="unsubscribed")

        self._once_dead([ward], when_dead)

    def do_restart(self, answer: Callable[..., None], name: str) -> None:
        """Start a subscriber's process anew; charged to nobody."""
        ward = self.wards[name]
        ward.counter.reset()
        if ward.child is not None:
            if ward.child.ending is None:
                self._ask_to_stop(ward.child, "restart")
        else:
            ward.start_at = time.monotonic()
            self._set_state(ward, "BACKOFF")
        answer()

    def do_states(self, answer: Callable[..., None]) -> None:
        answer({name: {"state": w.state, "error": w.error[0], "traceback": w.error[1]} for name, w in self.wards.items()})

    def do_statistics(self, answer: Callable[..., None]) -> None:
        """Merge the router's counters with states, pids, cpu and rss."""

        def merge(result: dict[str, Any]) -> None:
            for name, counters in result["subscribers"].items():
                ward = self.wards.get(name)
                counters.update(ward.public() if ward else {"state": "STOPPED", "pids": [], "restarts": 0, "cpu": 0.0, "rss": 0})
            result["pids"] = {"supervisor": os.getpid(), "router": self.router_pid}
            answer(result)

        self._ask_router("statistics", merge)

    def do_stop_subscribers(self, answer: Callable[..., None]) -> None:
        """End all subscribers by the ladder; answer when they are settled."""
        self._once_dead(list(self.wards.values()), answer)

    def do_close(self, answer: Callable[..., None]) -> None:
        """End the hub."""
        self._tell_router("close")
        answer()
        self._flush_clients()
        self.stopping = True

    def _once_dead(self, wards: list[Ward], then: Callable[..., None]) -> None:
        """Stop processes; call ``then`` when each is reaped and its events are settled."""
        for ward in wards:
            ward.start_at = None
            if ward.child is None:
                self._set_state(ward, "STOPPED")
            else:
                self._set_state(ward, "STOPPING")
                self._ask_to_stop(ward.child, "stop")
        self.farewells.append((wards, then))
        self._say_farewells()

    def _say_farewells(self) -> None:
        for wards, then in list(self.farewells):
            names = {ward.name for ward in wards}
            if all(ward.child is None for ward in wards) and not any(c.name in names for c, _ in self.unsettled.values()):
                self.farewells.remove((wards, then))
                then()

    def _tell_hub(self, what: str, **args: object) -> None:
        for stream in self.clients:
            if what != "output" or len(stream.out) < LOG_BYTES:
                self._send(stream, frames.PUSH, encode(Push(what, args)))

    def _send(self, stream: Stream, kind: int, header: bytes) -> None:
        stream.send(kind, header)

    def _flush_clients(self) -> None:
        for stream in self.clients:
            stream.flush()

    # -- the end

    def _end_all(self) -> None:
        """Kill what lives, reap it, remove the folder."""
        deadline = time.monotonic() + 1.0
        while self.link is not None and self.link.out and time.monotonic() < deadline:
            self.link.flush()
        if fork.is_same(self.charter.hub_pid, self.charter.hub_ticks):
            self._let_router_close(deadline)
        for pid in [*(child.pid for child in self._children()), self.router_pid]:
            fork.kill_session(pid)
        self._kill_orphans()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _let_router_close(self, deadline: float) -> None:
        """Give the router a moment to say goodbye to publishers."""
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, self.router_pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.002)

    def _kill_orphans(self) -> None:
        """Kill and reap until no child is left: what handlers started comes to us as its subreaper."""
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            if not children:
                return
            for pid in map(int, children):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def listen(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(address)
    os.chmod(address, 0o600)
    sock.listen(1024)
    sock.setblocking(False)
    return sock


def run_router(folder: Path, token: bytes, listener: socket.socket, link: socket.socket, max_bytes: int) -> int:
    """Be the router's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Router(folder, token, listener, link, max_bytes).run()
    return 0
