"""What an exchange does for subscribers that share a process: they come and go, and are given nothing for a while, each by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mphub.core.aside import sift
from mphub.core.spans import Spans, first_of, length, subtract
from mphub.core.window import Piece
from mphub.procs.hosts import MANY, Assembly, Host, Member, Target
from mphub.procs.mailbox import LASTING, Mailbox
from mphub.procs.withdrawals import OVERFLOW
from mphub.store.journal import Counters, Stored, SubscriberState
from mphub.wire.frames import Report, decoder, encode
from mphub.wire.specs import Spec

if TYPE_CHECKING:
    from mphub.procs.exchange import Exchange

MOST_ASIDE = 10_000
"""Events that wait for members of one process that do not run; what exceeds them becomes dead letters."""
_spec, _state, _stored = decoder(Spec), decoder(SubscriberState), decoder(Stored)
_crowd = msgspec.msgpack.Decoder(tuple[int, list[int]])
_books = msgspec.msgpack.Decoder(tuple[int, dict[int, int]])


class Sharing:
    """Every call belongs inside a turn of the exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._last_crowd = 0

    # -- who shares

    def join(self, spec: Spec) -> Member | None:
        """Take in a member of a process that is known; the same name again replaces its options and keeps its events."""
        host = self.exchange.boxes.get(spec.process or "")
        if not isinstance(host, Host):
            return None
        member = self.exchange.members.get(spec.name)
        if member is None:
            state = SubscriberState(1 + max(host.members, default=0), 0, Counters())
            member = self._enter(host, spec, state)
        else:
            self.exchange.table.remove(member)
            self.exchange.references.end(member.spec.handler_blob if member.spec.handler_blob != spec.handler_blob else None)
            member.spec, member.status = spec, ""
            member.state.cursor += 1
            self._open(member)
        for pattern in spec.patterns:
            self.exchange.table.add(pattern, member)
        self._retire(host)
        self.exchange.journal.put("subscribers", b"d" + spec.name.encode(), encode(spec))
        for kind in (b"u", b"t"):
            self.exchange.journal.delete("subscribers", kind + spec.name.encode())
        self.exchange.touch(member.changed_box())
        return member

    def _enter(self, host: Host, spec: Spec, state: SubscriberState) -> Member:
        member = Member(host, spec, state)
        host.members[member.number] = host.named[spec.name] = self.exchange.members[spec.name] = member
        return member

    def leave(self, name: str) -> Member | None:
        """Drop what waits for a member, and route nothing to it any more; its books and dead letters stay."""
        member = self.exchange.members.get(name)
        if member is None or member.gone:
            return None
        self.exchange.table.remove(member)
        self.exchange.references.end(member.spec.handler_blob)
        member.forget_code()
        self.exchange.journal.put("subscribers", b"d" + name.encode(), encode(member.spec))
        self._close(member)
        return member

    def set_status(self, name: str, status: str) -> Member | None:
        """Let a member be FATAL or PAUSED by itself, or go on."""
        member = self.exchange.members.get(name)
        if member is None or member.gone:
            return None
        member.status = status
        if status in LASTING:
            self.exchange.journal.put("subscribers", b"t" + name.encode(), status.encode())
            self._close(member)
        else:
            self.exchange.journal.delete("subscribers", b"t" + name.encode())
            self._open(member)
        self.exchange.touch(member.changed_box())
        return member

    def set_keys(self, name: str, patterns: list[str]) -> None:
        member = self.exchange.members.get(name)
        if member is None or member.gone:
            return
        self.exchange.table.remove(member)
        member.spec = msgspec.structs.replace(member.spec, patterns=patterns)
        for pattern in patterns:
            self.exchange.table.add(pattern, member)
        self.exchange.journal.put("subscribers", b"d" + name.encode(), encode(member.spec))

    def load(self) -> None:
        """Take in members and crowds as the journal has them."""
        exchange, journal = self.exchange, self.exchange.journal
        hosts = {box.number: box for box in exchange.boxes.values() if isinstance(box, Host)}
        for key, value in journal.scan("subscribers", b"d", b"e") if hosts else ():
            spec = _spec.decode(value)
            host = exchange.boxes.get(spec.process or "")
            if isinstance(host, Host):
                self._load_member(host, spec, key[1:])
        for key, value in journal.scan("subscribers", b"c", b"d") if hosts else ():
            number, members = _crowd.decode(value)
            id = int.from_bytes(key[1:], "big")
            books = journal.get("subscribers", b"k" + key[1:])
            accepted, handled = _books.decode(books) if books is not None else (0, {})
            crowd = Assembly(id, tuple(hosts[number].members[each] for each in members), accepted, handled)
            hosts[number].crowds[id] = hosts[number].assemblies[crowd.members] = crowd
            self._last_crowd = max(self._last_crowd, id)

    def _load_member(self, host: Host, spec: Spec, name: bytes) -> None:
        journal = self.exchange.journal
        state = _state.decode(journal.get("subscribers", b"s" + name) or b"")
        member = self._enter(host, spec, state)
        member.status = (journal.get("subscribers", b"t" + name) or b"").decode()
        if member.gone or member.status:
            host.aside.close(member)
        if journal.get("subscribers", b"u" + name) is None:
            for pattern in spec.patterns:
                self.exchange.table.add(pattern, member)

    def together(self, found: tuple[Target, ...]) -> tuple[Target, ...]:
        """Return what a key has, those that share a process as one."""
        shared: dict[Host, list[Member]] = {}
        for target in found:
            if isinstance(target, Member):
                shared.setdefault(target.host, []).append(target)
        apart = (target for target in found if isinstance(target, Mailbox))
        return (*apart, *(self._assembly(host, tuple(members)) for host, members in shared.items())) if shared else found

    def _assembly(self, host: Host, members: tuple[Member, ...]) -> Member | Assembly:
        if len(members) == 1:
            return members[0]
        crowd = host.assemblies.get(members)
        if crowd is None:
            self._last_crowd += 1
            crowd = host.assemblies[members] = host.crowds[self._last_crowd] = Assembly(self._last_crowd, members)
            definition = encode((host.number, [member.number for member in members]))
            self.exchange.journal.put("subscribers", b"c" + crowd.id.to_bytes(8, "big"), definition)
        return crowd

    def _retire(self, host: Host) -> None:
        """Enter the books of crowds that no event is for any more in their members' own: each change of who is there makes new ones.

        To be called when the table has forgotten them.
        """
        if len(host.crowds) < host.many:
            return
        rows = self.exchange.journal.scan("rows", host.state.cursor.to_bytes(8, "big"))
        needed = {id for _, value in rows for _, _, id in _stored.decode(value).crowds.get(host.number, ())}
        for crowd in [crowd for id, crowd in host.crowds.items() if id not in needed]:
            for member, handled in zip(crowd.members, crowd.handled_each(), strict=True):
                member.counters.accepted += crowd.accepted
                member.counters.handled += handled
            host.changed.update(crowd.members)
            host.changed.discard(crowd)
            del host.crowds[crowd.id], host.assemblies[crowd.members]
            for kind in (b"c", b"k"):
                self.exchange.journal.delete("subscribers", kind + crowd.id.to_bytes(8, "big"))
        host.many = max(MANY, 2 * len(host.crowds))

    # -- who is given nothing

    def _close(self, member: Member) -> None:
        host = member.host
        host.aside.close(member)
        host.window.gather()
        for piece in list(host.window.waiting):
            host.aside.sift(piece)
        sift(host.window, host.aside)
        self.exchange.touch(member.changed_box())

    def _open(self, member: Member) -> None:
        member.host.window.extend_left(member.host.aside.open(member))

    def note_slow(self, host: Host, report: Report) -> None:
        """Put members aside that have been at one event for long, let those go on that are through, and take back those that were quick."""
        for member in host.those(report.slow):
            host.aside.close(member, slow=True)
        for member in host.those(report.next):
            host.aside.go_on(member)
        for member in host.those(report.free):
            host.window.extend_left(host.aside.open(member, slow=True))

    def tidy(self, host: Host) -> None:
        """End what comes for members that do not run: of one that is gone all, of one that is FATAL its requests, and what is too much."""
        window, aside = host.window, host.aside
        room = MOST_ASIDE - aside.kept if aside.fresh else 0
        fresh, aside.fresh = aside.fresh, []
        for member, piece in fresh:
            ended = self._end(host, member, piece, max(0, room))
            window.loaded -= length(ended)
            window.loaded_bytes -= length(ended) * piece.portion.size
            piece.spans = subtract(piece.spans, ended)
            if piece.spans:
                aside.lanes[member].put(piece)
                room -= length(piece.spans)

    def _end(self, host: Host, member: Member, piece: Piece, room: int) -> Spans:
        """End what may not be kept; return that."""
        portion, ended = piece.portion, piece.spans
        if member.gone:
            self.exchange.drop(host, portion, ended, "unsubscribed")
        elif portion.row.batch.reply and member.given_up:
            self.exchange.fail_request(host, portion, ended)
        elif ended := subtract(ended, first_of(ended, room)):
            self.exchange.letters.bury_untried(host, portion, ended, OVERFLOW)
            self.exchange.settle(host, portion, ended)
        return ended
