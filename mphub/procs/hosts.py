"""The inbox of a process that several subscribers share, and what is each one's own of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any, ClassVar

import msgspec

from mphub.core.aside import Aside
from mphub.core.crowds import Crowd, Pairs, Stretch
from mphub.core.rows import ROW, Row
from mphub.core.spans import Spans, indexes, length
from mphub.core.window import Portion
from mphub.procs.mailbox import Entry, Mailbox, Named
from mphub.store.journal import Single, Stored, SubscriberState
from mphub.wire.frames import Batch, Joined, encode
from mphub.wire.specs import Spec

PAIRS = 100_000
"""Of one process in memory, those that wait for a slow subscriber of it among them."""


MANY = 100
"""Crowds of a process that are kept in any case."""


@dataclass(eq=False)
class Member(Named):
    """One of several subscribers that share a process; a crowd of one, too."""

    host: Host
    spec: Spec
    state: SubscriberState
    status: str = ""
    """Its own, if that is another than its process's."""

    @property
    def is_absent(self) -> bool:
        return self.host.is_absent

    @property
    def condition(self) -> str:
        return "STOPPED" if self.gone else self.status or self.host.status

    @property
    def id(self) -> int:
        """Tell it from a crowd of several."""
        return ~self.state.number

    @property
    def max_attempts(self) -> int:
        return self.spec.max_attempts

    @property
    def members(self) -> tuple[Member, ...]:
        return (self,)

    @property
    def places(self) -> Mapping[Member, int]:
        return {self: 0}

    def take_in(self, events: int) -> None:
        self.counters.accepted += events

    def note_handled(self, events: int, first: int, end: int) -> None:
        self.counters.handled += events

    def changed_box(self) -> Host:
        self.host.changed.add(self)
        return self.host

    def key(self) -> bytes:
        return b"s" + self.name.encode()

    def row(self) -> bytes:
        return encode(self.state)


class Assembly(Crowd[Member]):
    """A crowd as it is kept."""

    @property
    def host(self) -> Host:
        return self.members[0].host

    def key(self) -> bytes:
        return b"k" + self.id.to_bytes(8, "big")

    def row(self) -> bytes:
        return encode((self.accepted, self.handled))


Target = Mailbox | Member | Assembly
"""What the routing table finds: those that share a process together."""


@dataclass(eq=False)
class Host(Mailbox):
    """What waits for a process is in one window, by pairs of event and member; the books of a member are its own and its crowds'."""

    window_events: ClassVar[int] = PAIRS
    members: dict[int, Member] = field(default_factory=dict)
    named: dict[str, Member] = field(default_factory=dict)
    crowds: dict[int, Assembly] = field(default_factory=dict)
    assemblies: dict[tuple[Member, ...], Assembly] = field(default_factory=dict)
    changed: set[Member | Assembly] = field(default_factory=set)
    """Whose books are to be written."""
    many: int = MANY
    """Crowds from which those are looked for that are no more."""

    def adopt(self, spec: Spec, admitted: int) -> None:
        super().adopt(spec, admitted)
        if self.window.aside is None:
            self.window.aside = Aside[Member]()

    @property
    def aside(self) -> Aside[Member]:
        assert self.window.aside is not None
        return self.window.aside

    @property
    def present(self) -> Iterator[Member]:
        return (member for member in self.members.values() if not member.gone)

    @property
    def gone(self) -> bool:
        return not self.spec.surroundings.cwd

    @property
    def patterns(self) -> list[str]:
        return list(chain.from_iterable(member.spec.patterns for member in self.present))

    @property
    def due(self) -> float:
        """At once, if something has been found for members that are given nothing: it may not be kept."""
        return 0.0 if self.aside.fresh else super().due

    @property
    def maxsize(self) -> int:
        return self.spec.inbox.maxsize * max(1, len(self.members))

    def those(self, numbers: list[int]) -> Iterator[Member]:
        return (self.members[number] for number in numbers if number in self.members)

    def audience(self, id: int) -> Assembly | Member:
        return self.members[~id] if id < 0 else self.crowds[id]

    # -- books

    def who(self, portion: Portion, index: int) -> Member:
        """Return whose an event is; what is entered in its books is written."""
        assert portion.pairs is not None
        member: Member = portion.pairs.at(index)[1]
        self.changed.add(member)
        return member

    def single(self, number: int, single: Single) -> Portion:
        portion = super().single(number, single)
        assert single.batch.target is not None
        portion.pairs = Pairs([Stretch(0, 1, self.named[single.batch.target])])
        return portion

    def portion(self, row: Row, stored: Stored) -> Portion:
        spans, pairs = stored.matched[self.number], self.pairs(stored)
        return Portion(row, [(0, pairs.count)] if spans is None else list(spans), share_of(row.batch, pairs), pairs=pairs)

    def account(self, portion: Portion) -> None:
        super().account(portion)
        assert portion.pairs is not None
        if not portion.is_whole:
            self.note_refused(portion, portion.todo)
            return
        for first, end, audience in portion.pairs.stretches:
            audience.take_in(end - first)
            self.changed.add(audience)

    def account_apart(self, portion: Portion, index: int, size: int) -> None:
        super().account_apart(portion, index, size)
        self.who(portion, index).counters.accepted += 1

    def note_refused(self, portion: Portion, spans: Spans) -> None:
        for index in indexes(spans):
            self.who(portion, index).counters.accepted += 1

    def note_handled(self, portion: Portion, spans: Spans) -> None:
        assert portion.pairs is not None
        self.changed.update(portion.pairs.note_handled(spans))

    def note_dropped(self, portion: Portion, spans: Spans, reason: str) -> None:
        for index in indexes(spans):
            self.who(portion, index).counters.drop(reason, 1)

    def pairs(self, stored: Stored) -> Pairs[Member]:
        return Pairs([Stretch(a, b, self.audience(id)) for a, b, id in stored.crowds[self.number]])

    def events(self, stored: Stored, spans: Spans | None) -> Spans:
        pairs = self.pairs(stored)
        return pairs.events([(0, pairs.count)] if spans is None else spans)

    def weight(self, stored: Stored, spans: Spans | None) -> int:
        pairs = self.pairs(stored)
        return (pairs.count if spans is None else length(spans)) * share_of(stored.batch, pairs)

    def left_until(self, epoch: int) -> dict[str, int]:
        left = super().left_until(epoch)
        for member in self.aside.resting:
            pieces = self.aside.lanes[member].pieces
            waiting = sum(length(piece.spans) for piece in pieces if piece.portion.row.epoch <= epoch)
            left[self.name], left[member.name] = left[self.name] - waiting, waiting
        return left

    def changed_books(self) -> Iterator[Entry]:
        yield from super().changed_books()
        yield from ((each.key(), each.row()) for each in self.changed)
        self.changed.clear()

    def public(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each member, with what is in the books of its crowds; how long handlers take is known of all together."""
        books = {member: msgspec.structs.replace(member.counters) for member in self.members.values()}
        for crowd in self.crowds.values():
            for member, handled in zip(crowd.members, crowd.handled_each(), strict=True):
                books[member].accepted += crowd.accepted
                books[member].handled += handled
        each = self.counters.seconds / max(1, sum(found.handled + found.failed for found in books.values()))
        return {
            member.name: {
                **found.public(),
                "unfinished": found.accepted - found.handled - found.dead - sum(found.dropped.values()),
                "seconds": each * (found.handled + found.failed),
                "host": self.name,
                "own": "STOPPED" if member.gone else member.status,
            }
            for member, found in books.items()
        }


def joined(member: Member) -> Joined:
    """Return what its process is told of a member."""
    spec = member.spec
    return Joined(
        member.number, member.state.cursor, spec.name, spec.handler, spec.handler_blob, spec.concurrency, spec.answers, spec.patterns
    )  # fmt: skip


def share_of(batch: Batch, pairs: Pairs[Member]) -> int:
    """Return the bytes that a pair takes, about."""
    return -(-(batch.size + ROW) // pairs.count)


def portions_of(row: Row, matched: dict[Target, Spans]) -> Iterator[tuple[Mailbox, Portion]]:
    """Yield what of a new row is for which inbox."""
    size = row.share
    shared: dict[Host, list[Stretch]] = {}
    for target, spans in matched.items():
        if isinstance(target, Mailbox):
            yield target, Portion(row, spans, size)
        else:
            shared.setdefault(target.host, []).extend(Stretch(a, b, target) for a, b in spans)
    for host, stretches in shared.items():
        pairs = Pairs[Member](sorted(stretches, key=itemgetter(0)))
        yield host, Portion(row, [(0, pairs.count)], share_of(row.batch, pairs), pairs=pairs)


def crowds_of(taken: dict[Mailbox, Portion]) -> Iterator[dict[int, list[tuple[int, int, int]]]]:
    """Yield what a stored row is to say of crowds, if there are any."""
    found = {
        box.number: [(stretch.first, stretch.end, stretch.audience.id) for stretch in portion.pairs.stretches]
        for box, portion in taken.items()
        if portion.pairs is not None
    }
    if found:
        yield found


def each_of(found: Iterable[Target]) -> Iterator[Mailbox | Member]:
    """Yield subscribers one by one."""
    for target in found:
        yield from target.members if isinstance(target, Assembly) else (target,)
