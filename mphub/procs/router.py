"""The router's process: reads every stream, one journal transaction a turn, then deliveries, replies, confirms. Runs no user code."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from mphub import failpoints
from mphub.core.crowds import Run
from mphub.core.delivery import RUNNING, Held
from mphub.core.spans import length
from mphub.errors import JournalError
from mphub.observe.limiter import Limiter
from mphub.observe.statistics import percentiles
from mphub.procs import fork
from mphub.procs.boot import Charter
from mphub.procs.door import Door
from mphub.procs.exchange import SETTLED, Exchange, News
from mphub.procs.hosts import Host, Member, joined
from mphub.procs.letters import Cause
from mphub.procs.mailbox import LASTING, Mailbox
from mphub.procs.peers import PublisherPeer, Seat, body_of, check_batch, running_of, unpack_ids
from mphub.procs.taps import TapPeer
from mphub.reader import is_alive
from mphub.store.blobs import ROOM_EVERY, Blobs
from mphub.store.board import COMMITTED, RECALLED, SLOTS, Board
from mphub.store.journal import Journal
from mphub.wire import frames
from mphub.wire.frames import (
    UNREADABLE,
    Answer,
    Batch,
    Call,
    Confirm,
    Crowded,
    DeliverRaw,
    HelloPublisher,
    HelloSubscriber,
    HelloTap,
    Hold,
    Members,
    ProtocolError,
    Push,
    RepliesTaken,
    Report,
    Tapped,
    Unable,
    Welcome,
    Withdraw,
    decoder,
    encode,
)
from mphub.wire.specs import Spec
from mphub.wire.stream import Frame, Stream, shut

MAX_UNREAD = 1 << 20
"""Bytes of replies under way to one requester."""
MAX_AHEAD = 512 << 10
"""Bytes of deliveries that wait for a subscriber's socket."""
ENOUGH_FRAMES = 256
WITH_REPLY = 0.005
"""Seconds that the confirm of a request waits for the reply."""
ORPHANED = 1.0
"""Seconds that a supervisor has to end everything when the hub's process is dead."""
LONGEST_WAIT = 3600.0
"""Seconds; a selector refuses to wait for more than some weeks."""
CENSUS = 1.0
"""Seconds between two looks whether publishers that are not connected live."""
SLOW_AFTER = 0.03
"""Seconds without a word from a replica that holds several events, from which it is slower than it seemed."""
HALF = frames.HEAD.pack(0, frames.DELIVER, 0)
"""The begin of a frame that its sender does not live to write."""
_batch, _report, _call = decoder(Batch), decoder(Report), decoder(Call)
_hello_publisher, _hello_subscriber = decoder(HelloPublisher), decoder(HelloSubscriber)
_taken, _withdraw, _hello_tap, _spec = decoder(RepliesTaken), decoder(Withdraw), decoder(HelloTap), decoder(Spec)
_unable = decoder(Unable)


class Router:
    """One turn after the other."""

    def __init__(self, folder: Path, charter: Charter, listener: socket.socket, link: socket.socket) -> None:
        self.folder, self.token, self.keeps = folder, charter.address.token, charter.keep
        self.blobs = Blobs(folder / "blobs")
        self.selector = selectors.DefaultSelector()
        self.door = Door(listener, self.selector, None, lambda message: self._push("log", level="error", message=message))
        self.link = Stream(link, self.door.unsent)
        self.held: list[str] = []
        kept = charter.retention
        journal = Journal(
            folder / "journal", charter.max_bytes, self._wait_for_room, synced=charter.power, history=int(kept.max_bytes) if kept else 0
        )
        self.exchange = Exchange(journal, self.blobs, charter.max_bytes, time.time, kept)
        self.selector.register(link, selectors.EVENT_READ, self.link)
        failpoints.hit("router.recovered")
        self.publishers: dict[int, PublisherPeer] = {}
        self.seats: dict[int, Seat] = {}
        self.entering: set[Seat] = set()
        """Processes that have said hello: they are welcomed after the commit, as what they begin with must be in the journal."""
        self.taps: set[TapPeer] = set()
        self.shared: set[Mailbox] = set()
        """Inboxes that several of them are given events of."""
        self.exchange.informed = False
        self.arrived: dict[Stream, list[Frame]] = {}
        """What this turn has read and not handled yet."""
        self.to_confirm: set[PublisherPeer] = set()
        self.look_at = 0.0
        """When to look around next, by the monotonic clock."""
        self.census_at = 0.0
        self.drains: list[tuple[int, int]] = []
        self.answers: list[Answer] = []
        self.limiter = Limiter()
        self.stopping = False
        self.confirm_at = math.inf
        """When the first confirm is due that waits for a reply."""
        self.hub = -1
        self.end_at = math.inf
        """When to end a supervisor that has not seen that the hub is dead."""

    def run(self) -> None:
        """Turn until told to stop or the supervisor is gone."""
        while not self.stopping:
            self.turn([key.data for key, _ in self.selector.select(self._timeout())])
        self.exchange.journal.close()

    def watch_hub(self, pid: int) -> None:
        """Watch the hub's process too: a supervisor that is frozen does not see it die."""
        try:
            self.hub = os.pidfd_open(pid)
            self.selector.register(self.hub, selectors.EVENT_READ, self.hub)
        except OSError:  # it is dead, or there is no descriptor
            return

    def turn(self, ready: list[Any]) -> None:
        """Read, commit, then send what the commit allows: deliveries first, as others wait for them."""
        self._read_all(ready)
        failpoints.hit("router.read")
        if time.monotonic() >= self.look_at:
            self._look_around(time.monotonic())
        now = time.time()
        if self.arrived or self.exchange.is_due(now):
            with self.exchange.turn():
                for stream in list(self.arrived):
                    self._handle_arrived(stream)
                self.exchange.wake(now)
                failpoints.hit("router.committing")
            failpoints.hit("router.committed")
            if self.entering:
                self._let_in()
        for seat in self._seats_in_turn():
            if seat.box.window.loaded or seat.unconfirmed > seat.patience:
                self._pump(seat)
        failpoints.hit("router.delivered")
        if self.exchange.letters.replies:
            self._send_replies()
        failpoints.hit("router.replied")
        if self.to_confirm or self.confirm_at != math.inf:
            self._confirm()
        self._update_holds()
        failpoints.hit("router.confirmed")
        self._answer()
        failpoints.hit("router.answered")
        if self.door.unsent:
            self.door.flush()
        if self.taps:
            self._catch_up()

    def _look_around(self, now: float) -> None:
        """Do what the clock asks for, and note when to look again."""
        for stream in self.door.overdue():
            self._drop(stream)
        for seat in self.seats.values():
            if seat.slow_at <= now:
                self._take_from_slow(seat, now)
        if self._someone_is_absent() and now >= self.census_at:
            self._forget_the_dead()
        if now >= self.end_at:
            fork.kill(os.getppid())  # and so this process and all others
        census = [self.census_at] if self._someone_is_absent() else []
        self.look_at = min([self.end_at, *self.door.due(), *census, *(seat.slow_at for seat in self.seats.values())])

    def _timeout(self) -> float | None:
        due = self.exchange.next_due()
        at = min(self.look_at, self.confirm_at)
        if due is None and at == math.inf:
            return None
        until = max(0.0, at - time.monotonic())
        return min(until, LONGEST_WAIT) if due is None else min(until, max(0.0, due - time.time()), LONGEST_WAIT)

    # -- reading

    def _read_all(self, ready: list[Any]) -> None:
        """Read every stream that has something; of who lives and who died first."""
        if len(ready) > 1:
            ready.sort(key=lambda stream: stream is not self.link)
        self.arrived = {}
        for stream in ready:
            if stream is None:
                self._accept()
            elif stream is self.hub:
                self.selector.unregister(self.hub)
                self.end_at = self.look_at = time.monotonic() + ORPHANED
            elif found := self._read(stream):
                self.arrived[stream] = found

    def _accept(self) -> None:
        for stream in self.door.accept():
            self.selector.register(stream.sock, selectors.EVENT_READ, stream)
        self.look_at = 0.0

    def _read(self, stream: Stream) -> list[Frame]:
        try:
            found = stream.read() if stream.peer is not None else self.door.read(stream)
        except ProtocolError as error:
            self._push("log", level="warning", message=f"a connection sent {error}: closed")
            found = None
        if found is None:
            self._drop(stream)
            return []
        return found

    def _drop(self, stream: Stream) -> None:
        """Forget a stream; what its process is or was is another question."""
        if stream is self.link:
            self.stopping = True  # the supervisor is dead, and so is the hub's service
            return
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(stream.sock)
        self.door.welcome(stream)
        self.look_at = 0.0
        peer = stream.peer
        if isinstance(peer, Seat) and peer.stream is stream:
            peer.stream = None
        if isinstance(peer, PublisherPeer) and self.publishers.get(peer.hello.publisher) is peer:
            del self.publishers[peer.hello.publisher]
        if isinstance(peer, PublisherPeer):
            self.to_confirm.discard(peer)
        if isinstance(peer, TapPeer) and peer in self.taps:
            self.taps.remove(peer)
            self.exchange.taps.remove(peer)
            peer.close()
        stream.close()

    def _handle_arrived(self, stream: Stream) -> None:
        """Handle what a stream brought; a malformed frame ends its own connection only."""
        for kind, header, body in self.arrived.pop(stream, ()):
            try:
                self._handle(stream, kind, header, body)
            except (*UNREADABLE, OSError) as error:
                self._push("log", level="warning", message=f"a frame of kind {kind} cannot be read ({error}): connection closed")
                stream.out.clear()
                shut(stream.sock)

    def _handle(self, stream: Stream, kind: int, header: bytes, body: bytes) -> None:
        peer = stream.peer
        if isinstance(peer, Seat):
            self._from_subscriber(peer, kind, header)
        elif isinstance(peer, PublisherPeer):
            self._from_publisher(peer, kind, header, body)
        elif isinstance(peer, TapPeer):
            raise ProtocolError(f"kind {kind} from a tap")
        elif stream is self.link:
            self._from_supervisor(kind, header, body)
        elif kind == frames.HELLO_PUBLISHER:
            self._meet_publisher(stream, _hello_publisher.decode(header))
        elif kind == frames.HELLO_SUBSCRIBER:
            self._meet_subscriber(stream, _hello_subscriber.decode(header))
        elif kind == frames.HELLO_TAP:
            self._meet_tap(stream, _hello_tap.decode(header))
        else:
            raise ProtocolError(f"kind {kind} before a hello")

    # -- publishers

    def _meet_publisher(self, stream: Stream, hello: HelloPublisher) -> None:
        if hello.token != self.token:
            raise ProtocolError("a hello with a wrong token")
        self.door.welcome(stream)
        last = self.exchange.meet(hello.publisher, hello.pid, hello.started)
        peer = stream.peer = PublisherPeer(stream, hello, last)
        self.publishers[hello.publisher] = peer
        self.to_confirm.add(peer)
        stream.send(frames.HOLD, encode(Hold(self.held)))  # also if nothing is held: its last router may have said otherwise
        for reply in self.exchange.letters.unanswered(hello.publisher):
            self.exchange.letters.replies.setdefault(hello.publisher, []).append(reply)

    def _from_publisher(self, peer: PublisherPeer, kind: int, header: bytes, body: bytes) -> None:
        if kind == frames.BATCH and not self.exchange.closed:
            batch = _batch.decode(header)
            check_batch(batch, peer, body)
            refused = self.exchange.accept(batch, header, body)
            if refused is not None:
                peer.refused.append((batch.sequence, *refused))
            if not batch.reply:
                peer.confirm_at = 0.0
            elif peer.sequence == peer.told:
                peer.confirm_at = time.monotonic() + WITH_REPLY
            peer.sequence = max(peer.sequence, batch.sequence)
            self.to_confirm.add(peer)
        elif kind == frames.BATCH:
            return  # it is told that the hub stops, not that this was accepted
        elif kind == frames.WITHDRAW:
            withdraw = _withdraw.decode(header)
            self._withdraw([peer.hello.publisher << 40 | number for number in withdraw.numbers], kill=withdraw.kill)
        elif kind == frames.REPLIES_TAKEN:
            self.exchange.letters.taken(peer.hello.publisher, _taken.decode(header).numbers)
            if peer.behind and len(peer.stream.out) < MAX_UNREAD // 2:
                peer.behind = False
                self.exchange.letters.replies[peer.hello.publisher] = self.exchange.letters.unanswered(peer.hello.publisher)
        else:
            raise ProtocolError(f"kind {kind} from a publisher")

    def _withdraw(self, ids: list[int], *, kill: bool = False) -> int:
        """Drop events that have not started; return how many.

        What processes have in hand is taken back, marked for handlers that ask, or ended with its process.
        """
        withdrawn = self.exchange.withdrawals.withdraw(ids)
        unstarted: set[Seat] = set()
        for seat, number in self.exchange.withdrawals.held_by(self.seats.values(), ids):
            assert isinstance(seat, Seat)
            running = seat.board.state(number) == RUNNING
            if running and kill:
                self._push("kill", incarnation=seat.incarnation)
            elif running:
                seat.board.cancel(number)
            else:
                unstarted.add(seat)
        for seat in unstarted:
            self._want_back(seat)
        return withdrawn

    def _someone_is_absent(self) -> bool:
        return len(self.exchange.homes) > len(self.publishers)

    def _forget_the_dead(self) -> None:
        """Forget publishers whose process is dead: it may have died between two routers, and its stream ends before it does."""
        self.census_at = time.monotonic() + CENSUS
        absent = {publisher: home for publisher, home in self.exchange.homes.items() if publisher not in self.publishers}
        alive = {home for home in set(absent.values()) if is_alive(*home)}
        with self.exchange.turn():
            for publisher, home in absent.items():
                if home not in alive:
                    self.exchange.forget_publisher(publisher)

    def _confirm(self) -> None:
        """Confirm after the deliveries: a confirm can wait, a round trip cannot."""
        now, self.confirm_at = time.monotonic(), math.inf
        for peer in list(self.to_confirm):
            if peer.confirm_at > now and not peer.refused:
                self.confirm_at = min(self.confirm_at, peer.confirm_at)
                continue
            self.to_confirm.discard(peer)
            if peer.refused or peer.sequence != peer.told:
                peer.told = peer.sequence
                peer.stream.put(frames.CONFIRM, encode(Confirm(peer.sequence, peer.refused)))
                peer.refused = []
            if self.exchange.closed and not peer.dismissed:
                peer.dismissed = True
                peer.stream.send(frames.CLOSED)

    def _send_replies(self) -> None:
        replies = self.exchange.letters.replies
        for publisher in list(replies):
            peer = self.publishers.get(publisher)
            for reply in replies.pop(publisher):
                if peer is None or peer.behind:
                    continue
                if len(peer.stream.out) > MAX_UNREAD:
                    peer.behind = True
                else:
                    peer.stream.put(frames.REPLY, encode(reply))
                    peer.confirm_at = 0.0  # one wake-up less at the other end than if it came by itself

    def _update_holds(self) -> None:
        held = self.exchange.held_patterns()
        if held != self.held:
            self.held = held
            self._push("held", patterns=held, names=[b.name for b in self.exchange.full])
            for peer in self.publishers.values():
                peer.stream.send(frames.HOLD, encode(Hold(held)))

    # -- taps

    def _meet_tap(self, stream: Stream, hello: HelloTap) -> None:
        if hello.token != self.token:
            raise ProtocolError("a hello with a wrong token")
        self.door.welcome(stream)
        peer = stream.peer = TapPeer(stream, self.blobs)
        self.taps.add(peer)
        self.exchange.taps.add(hello.patterns, peer)
        stream.send(frames.TAPPED, encode(Tapped(0)))

    def _catch_up(self) -> None:
        for tap in self.taps:
            if tap.catch_up():
                tap.stream.flush_or_watch(self.selector)

    # -- subscribers

    def _meet_subscriber(self, stream: Stream, hello: HelloSubscriber) -> None:
        if hello.token != self.token:
            raise ProtocolError("a hello with a wrong token")
        if (seat := self.seats.get(hello.incarnation)) is None:
            shut(stream.sock)  # its end was told before this was read
            return
        self.door.welcome(stream)
        if seat.stream is not None:
            self._drop(seat.stream)
        stream.peer, seat.stream, seat.inside = seat, stream, False
        seat.met = True
        seat.box.unmet.discard(seat.incarnation)
        delivery = seat.delivery
        delivery.give_back()  # on a reconnect; a successor holds nothing yet
        delivery.generation = max(delivery.generation, hello.generation)
        seat.awaited = hello.frame
        self.exchange.claim(seat, hello.claims, list(seat.board.ranges()))
        if hello.ready:
            self._is_ready(seat)
        self.entering.add(seat)

    def _let_in(self) -> None:
        """Welcome processes, those that begin with the last snapshot; an heir only once its predecessor's events are settled."""
        entering, self.entering = self.entering, set()
        for seat in entering:
            if seat.stream is None:
                continue  # it is gone again
            if seat.predecessor in self.seats and not seat.stopping:
                self._push("set_up", incarnation=seat.incarnation)
                failpoints.hit("router.heir_waits")
                continue
            seat.inside = True
            seat.stream.send(frames.WELCOME, encode(Welcome(seat.told, *self._beginning(seat))))
            if isinstance(seat.box, Host):
                seat.crowds.clear()
                able = [joined(member) for member in seat.box.present if member.status != "FATAL"]
                seat.stream.send(frames.MEMBERS, encode(Members(able, all=True)))
            if seat.stopping:
                seat.stream.send(frames.STOP)

    def _beginning(self, seat: Seat) -> tuple[bytes, str | None] | tuple[()]:
        """Return the snapshot to begin with: none for one that has begun, or that is to end before its predecessor."""
        if seat.ready or seat.predecessor in self.seats:
            return ()
        with self.exchange.turn():
            return self.exchange.letters.snapshot(seat.snapshot_key) or ()

    def _from_subscriber(self, seat: Seat, kind: int, header: bytes) -> None:
        if seat.fenced:
            return
        if kind == frames.REPORT:
            report = _report.decode(header)
            try:
                if self.exchange.report(seat, report, time.time()):
                    seat.board.set_flag(COMMITTED)
                    if seat.most:
                        self._count(seat, report.ran)
            except JournalError as error:  # its state is ahead of what is kept: another incarnation does that again
                seat.fenced = True
                self._push("full", incarnation=seat.incarnation, message=str(error))
                return
            seat.told, seat.unconfirmed = report.frame, seat.unconfirmed + 1
            if report.returned:
                self._recall(seat)
        elif kind == frames.READY:
            self._is_ready(seat)
        elif kind == frames.UNABLE and isinstance(seat.box, Host):
            unable = _unable.decode(header)
            if (member := seat.box.members.get(unable.number)) is not None:
                self._set_member(member.name, "FATAL", unable.error, unable.traceback)
        else:
            raise ProtocolError(f"kind {kind} from a subscriber")

    def _count(self, seat: Seat, ran: int) -> None:
        """Tell once when a process has run as many events as it is to run; the next router knows the count from its board."""
        if seat.board.add_ran(ran) >= seat.most:
            seat.most = 0
            self._push("due", incarnation=seat.incarnation)

    def _is_ready(self, seat: Seat) -> None:
        seat.ready = True
        self._push("ready", incarnation=seat.incarnation)

    def _pump(self, seat: Seat) -> None:
        """Hand out what credit and socket allow."""
        stream = seat.stream
        if stream is None:
            return
        if seat.may_take() and self.exchange.informed:
            self._deal(seat, stream)
            order = seat.box.window.order
            if order is not None and order.lanes and not seat.delivery.holding:
                self.exchange.even_out(seat, partial(self._deal, seat, stream))
        if seat.unconfirmed > seat.patience:
            seat.unconfirmed = 0
            stream.send(frames.REPORT_CONFIRM, encode(seat.told))

    def _deal(self, seat: Seat, stream: Stream) -> None:
        delivery, has_rate = seat.delivery, seat.box.quota is not None
        shares = seat.box in self.shared
        share = self._share(seat) if shares else SLOTS
        while share > 0 and len(stream.out) < MAX_AHEAD:
            held = seat.take(share, time.time()) if has_rate else delivery.take(share)
            if held is None:
                break
            share -= length(held.spans)
            self._hand_out(seat, stream, held)
        if shares:
            seat.slow_at = time.monotonic() + SLOW_AFTER if seat.holds_more_than_it_runs else math.inf
            self.look_at = min(self.look_at, seat.slow_at)

    def _take_from_slow(self, seat: Seat, now: float) -> None:
        """Want back what a replica has not started that is slower than it seemed, if another has nothing to do."""
        seat.slow_at = now + SLOW_AFTER if seat.holds_more_than_it_runs else math.inf
        someone_is_idle = any(
            other.box is seat.box and other.may_take() and not other.delivery.holding for other in self.seats.values()
        )  # fmt: skip
        if seat.holds_more_than_it_runs and someone_is_idle and not seat.box.window.loaded:
            self._want_back(seat)

    def _seats_in_turn(self) -> Iterable[Seat]:
        """Return all seats; of replicas the least busy first."""
        return sorted(self.seats.values(), key=lambda seat: seat.delivery.holding) if self.shared else self.seats.values()

    def _note_shared(self) -> None:
        seated = Counter(seat.box for seat in self.seats.values() if seat.predecessor not in self.seats)
        self.shared = {box for box, count in seated.items() if count > 1}

    def _share(self, seat: Seat) -> int:
        """Return how many events a replica may be given, so that all have the same to do.

        None while another has not said what it holds: to this router that waits.
        """
        siblings = [other for other in self.seats.values() if other.box is seat.box]
        if seat.box.unmet:
            return 0
        takers = [other.delivery.holding for other in siblings if other.may_take()]
        level = -(-(seat.box.window.loaded + sum(takers)) // len(takers))
        return level - seat.delivery.holding

    def _hand_out(self, seat: Seat, stream: Stream, held: Held) -> None:
        row, portion = held.portion.row, held.portion
        whole = len(held.spans) == 1 or portion.pairs is not None
        runs = self._runs(seat, stream, held) if portion.pairs is not None else []
        seat.board.hand_out(held.number, held.count, row.id, held.index, held.spans)
        attempts = {i: n for i, n in portion.attempts.items() if held.index <= i < held.index + held.count} if portion.attempts else None
        header = encode(DeliverRaw(
            held.number, seat.delivery.generation, seat.told, row.id, row.epoch, held.index, held.count, msgspec.Raw(row.header),
            None if whole else [i - held.index for a, b in held.spans for i in range(a, b)], attempts, runs,
        ))  # fmt: skip
        seat.unconfirmed = 0
        failpoints.hit("router.handed_out")
        failpoints.hit("router.half_delivered", stream.sock.send, HALF)
        stream.send(frames.DELIVER, header, body_of(held))

    def _runs(self, seat: Seat, stream: Stream, held: Held) -> list[Run]:
        """Say for whom of a process what it is given is, and who they are if it does not know yet."""
        assert held.portion.pairs is not None
        runs = [(index - held.index, event, crowd, a, b) for index, event, crowd, a, b in held.portion.pairs.runs(held.spans)]
        assert isinstance(seat.box, Host)
        if len(seat.crowds) > len(seat.box.crowds):
            for crowd in seat.crowds - seat.box.crowds.keys():
                seat.crowds.discard(crowd)
                stream.send(frames.CROWD, encode(Crowded(crowd, [])))
        for crowd in {run[2] for run in runs if run[2] >= 0} - seat.crowds:
            seat.crowds.add(crowd)
            stream.send(frames.CROWD, encode(Crowded(crowd, [member.number for member in seat.box.crowds[crowd].members])))
        return runs

    # -- the supervisor

    def _from_supervisor(self, kind: int, header: bytes, body: bytes) -> None:
        call = _call.decode(header)
        op: Callable[..., Any] | None = getattr(self, f"do_{call.op}", None)
        if kind != frames.CALL or op is None:
            raise ProtocolError(f"call {call.op}")
        if call.op == "drain":
            self.drains.append((call.id, self.exchange.advance_epoch()))
            return
        result = op(**call.args) if not body else op(body, **call.args)
        if call.id:
            self.answers.append(Answer(call.id, result))

    def do_drain(self) -> None:
        """Answered by ``_answer`` once nothing of its epoch is left that can still move."""

    def do_subscribe(self, spec: bytes) -> None:
        self.exchange.subscribe(_spec.decode(spec))

    def do_host(self, spec: bytes) -> None:
        """Let members come before their process starts: that is set up when all of them are."""
        self.exchange.subscribe(_spec.decode(spec))

    def do_join(self, spec: bytes) -> None:
        self._tell_member(self.exchange.sharing.join(_spec.decode(spec)))

    def do_leave(self, name: str) -> None:
        self._tell_member(self.exchange.sharing.leave(name))

    def do_set_member(self, name: str, status: str) -> None:
        """Let a member be paused, or go on."""
        self._set_member(name, status)

    def do_rekey(self, name: str, patterns: list[str]) -> None:
        self.exchange.sharing.set_keys(name, patterns)

    def do_odd(self) -> dict[str, dict[str, Any]]:
        """Tell which members are not as their process is."""
        odd = {name: member.status for name, member in self.exchange.members.items() if member.status and not member.gone}
        return {name: {"state": status, "error": b"", "traceback": ""} for name, status in odd.items()}

    def _set_member(self, name: str, status: str, error: bytes = b"", traceback: str = "") -> None:
        member = self.exchange.sharing.set_status(name, status)
        self._tell_member(member)
        if member is not None:
            self._push("member", name=name, state=status, error=error, traceback=traceback)

    def _tell_member(self, member: Member | None) -> None:
        """Tell a process who has come, is to be set up anew, or is gone; what it has for one that is to get nothing comes back."""
        for seat in self.seats.values():
            if member is None or seat.box is not member.host or seat.stream is None or not seat.inside:
                continue
            if member.gone or not member.status:
                seat.stream.send(frames.MEMBERS, encode(Members([joined(member)])))
            if member.gone or member.status:
                self._want_back(seat)

    def do_begin(self, run: bytes) -> list[tuple[bytes, str]]:
        """Tell a new supervisor what is subscribed, and its lasting state; nobody is at the begin of a run."""
        self.exchange.begin_run(run)
        return [(encode(box.spec), box.status) for box in self.exchange.boxes.values() if not box.gone and not box.is_absent]

    def do_stop_routing(self, name: str) -> None:
        self.exchange.unsubscribe(name)

    def do_forget(self, name: str, reason: str) -> None:
        self.exchange.forget(name, reason)

    def do_give_up(self, reason: str) -> int:
        """Take nothing more in and drop all that waits, or keep it: the hub stops. Return how much that is."""
        self.exchange.close()
        self.to_confirm.update(self.publishers.values())
        if self.keeps:
            return sum(box.unfinished for box in self.exchange.boxes.values())
        return sum(self.exchange.drop_pending(box, reason) for box in self.exchange.boxes.values())

    def do_status(self, name: str, status: str) -> None:
        self.exchange.set_status(name, status)
        for seat in self.seats.values():
            if seat.box.name == name:
                self._recall(seat)

    def _recall(self, seat: Seat) -> None:
        """Want back what has not started from one that is to stop or paused: a handler that has become slow may hold hours of work."""
        if seat.stopping or seat.box.is_at_rest:
            self._want_back(seat)
        else:
            seat.board.set_flag(RECALLED, False)

    def _want_back(self, seat: Seat) -> None:
        """Let a process return what it has not started; one that waits for a batch to fill looks when a frame comes."""
        seat.board.set_flag(RECALLED)
        if seat.stream is not None and seat.inside:
            seat.stream.send(frames.REPORT_CONFIRM, encode(seat.told))

    def do_started(self, name: str, incarnation: int, replica: int, board: str, live: bool, predecessor: int | None = None) -> None:
        """Seat an incarnation; a live one (this router is a successor) has yet to say what it holds."""
        box = self.exchange.boxes.get(name)
        if box is None or self.exchange.frames.get(incarnation, (0, 0))[0] == SETTLED:
            return
        seat = Seat(incarnation, box, replica, Board(board), predecessor)
        seat.told, _ = self.exchange.frames.get(incarnation, (0, 0))
        self.seats[incarnation] = seat
        self._note_shared()
        self._recall(seat)
        if live:
            seat.met = False
            box.unmet.add(incarnation)
            seat.delivery.number = max((number + count for number, count, _, _ in seat.board.ranges()), default=0)

    def do_stop_worker(self, incarnation: int) -> None:
        seat = self.seats.get(incarnation)
        if seat is not None and not seat.stopping:
            seat.stopping, seat.patience = True, 0
            self._recall(seat)
            seat.box.window.gather()  # what waits for it alone is for others
            if seat.stream is not None and seat.inside:
                seat.stream.send(frames.STOP)
            elif seat.stream is not None:
                self.entering.add(seat)

    def do_died(self, incarnation: int, charge: str, slot: int | None, cause: dict[str, Any]) -> None:
        """Settle what a reaped process held: its last frames first, then its board.

        ``charge``: ``running`` blames what ran, ``slot`` what ran there, ``none`` nobody.
        """
        seat = self.seats.pop(incarnation, None)
        if seat is None:
            return
        seat.box.unmet.discard(incarnation)
        self._note_shared()
        self._read_last(seat)
        failpoints.hit("router.settling")
        board = seat.board
        blamed = board.number_at(slot) if charge == "slot" and slot is not None else None

        def charged(number: int) -> bool:
            return charge == "running" or number == blamed

        if seat.met:
            self.exchange.died(seat, board.states, charged, Cause(**cause))
        else:
            self.exchange.died_unseen(seat, board, charged, Cause(**cause))
        board.close()
        self.entering.update(heir for heir in self.seats.values() if heir.predecessor == incarnation and not heir.inside)

    def do_settled(self, incarnation: int) -> None:
        """Forget a death: nobody will ask about it again."""
        self.exchange.forget_incarnation(incarnation)

    def do_known(self, incarnations: list[int]) -> None:
        """Forget all other incarnations: whoever should have said that they are settled has died, or this router's predecessor has."""
        self.exchange.informed = True
        for incarnation in set(self.exchange.frames) - set(incarnations):
            self.exchange.forget_incarnation(incarnation)

    def _read_last(self, seat: Seat) -> None:
        stream = seat.stream
        if stream is None:
            return
        self._handle_arrived(stream)  # in their order: a later report acks what an earlier one brings
        while found := self._read(stream):
            self.arrived[stream] = found
            self._handle_arrived(stream)
        if seat.stream is stream:  # a grandchild keeps it open
            stream.peer = None
            self._drop(stream)

    def do_statistics(self) -> dict[str, Any]:
        running: Counter[str] = Counter()
        for seat in self.seats.values():
            running.update(running_of(seat))
        boxes: dict[str, dict[str, Any]] = {}
        for box in self.exchange.boxes.values():
            times = percentiles(list(box.samples))
            for name, figures in box.public().items():
                boxes[name] = {**figures, "running": running[name], "percentiles": times}
        return {"accepted": self.exchange.accepted, "unmatched": self.exchange.unmatched, "subscribers": boxes}

    def do_dead_letters(self, name: str | None, after: int) -> dict[str, Any]:
        letters, following = self.exchange.letters.page(name, after)
        return {"letters": letters, "next": following}

    def do_history(self, patterns: list[str], since: float, until: float, after: int) -> dict[str, Any]:
        rows, following = self.exchange.history.page(patterns, since, until, after)
        return {"rows": rows, "next": following}

    def do_replay(self, name: str, **range_: Any) -> dict[str, Any]:
        """Let a subscriber have past events again; one that is gone meanwhile gets none."""
        box = self.exchange.boxes.get(name)
        if box is None or box.gone:
            return {"count": 0, "next": 0, "full": False, "before": 0}
        return self.exchange.replays.replay(box, **range_)

    def do_redrive(self, name: str | None, ids: list[bytes] | None) -> int:
        return self.exchange.letters.redrive(name, unpack_ids(ids))

    def do_purge(self, name: str | None, ids: list[bytes] | None) -> int:
        return self.exchange.letters.purge(name, unpack_ids(ids))

    def do_cancel(self, ids: list[bytes]) -> int:
        return self._withdraw(sorted(unpack_ids(ids) or ()))

    def do_close(self) -> None:
        """Tell every publisher that the hub stops, and end."""
        self.stopping = True
        for peer in self.publishers.values():
            peer.stream.send(frames.CLOSED)
        for tap in self.taps:
            tap.end()

    def _wait_for_room(self) -> None:
        """Wait a moment, as the disk is full: publishers wait for their confirms, subscribers for deliveries."""
        if self.held != [">"]:
            self.held = [">"]
            self._push("held", patterns=[">"], names=["the disk of the hub's folder, which is full"])
            news = News("shortage", None, "the disk of the hub's folder is full: publishers wait until there is room", {})
            if (notice := news.notice(self.limiter, time.monotonic())) is not None:
                self._push("news", **notice)
        self.link.flush()
        time.sleep(ROOM_EVERY)

    def _answer(self) -> None:
        """Send answers of this turn, the news, and to drains that are through."""
        for number, epoch in list(self.drains):
            left = self.exchange.left_until(epoch)
            statuses = {name: who.condition for name in left if (who := self.exchange.find(name)) is not None and who.condition in LASTING}
            if len(statuses) == len(left):
                self.drains.remove((number, epoch))
                self.answers.append(Answer(number, {"statuses": statuses}))
        for answer in self.answers:
            self.link.send(frames.ANSWER, encode(answer))
        self.answers.clear()
        if self.exchange.news:
            self._tell_news()

    def _tell_news(self) -> None:
        now = time.monotonic()
        for news in self.exchange.news:
            if (notice := news.notice(self.limiter, now)) is not None:
                self._push("news", **notice)
        self.exchange.news.clear()

    def _push(self, what: str, **args: object) -> None:
        self.link.send(frames.PUSH, encode(Push(what, dict(args))))
