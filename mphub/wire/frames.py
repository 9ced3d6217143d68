"""Everything that crosses a process boundary, as small frozen structs.

A frame is ``HEAD`` (bytes that follow, kind, bytes of header), the header (msgpack of one struct below) and a body. The body of events is
a msgpack array of opaque byte strings, so that the router cuts one event out without unpickling.
"""

from __future__ import annotations

import os
import resource
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, TypeVar

import msgspec

from mphub.errors import InvalidOption
from mphub.options import check_number

T = TypeVar("T")
# checked when a header is decoded: what cannot be ends the connection that it came on
Id = Annotated[int, msgspec.Meta(ge=0)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
Key = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]

HEAD: Final = struct.Struct("<IBI")
MAX_FRAME: Final = 1 << 20
"""Bytes after the head; what is larger goes in parts."""
MAX_WHOLE: Final = 256 << 20
"""Bytes of a frame that goes in parts."""
BLOB_MIN: Final = 64 << 10
"""Bytes from which one pickle, handler, snapshot or set of outputs is a file of its own."""
MAX_EXTRA: Final = 32 << 10
"""Bytes of the headers and the ordering key of one event."""
MOST_URGENT: Final = 10
MAX_TOGETHER: Final = 1_000_000
"""Events of one transaction."""
MAX_KEYS_TOGETHER: Final = 32 << 20
"""Bytes of their keys and headers."""
MAX_EVENTS: Final = 8192
"""Events in one frame: half a board, so that a whole frame always fits one subscriber's credit."""

# publisher -> router
HELLO_PUBLISHER, BATCH, REPLIES_TAKEN, WITHDRAW = 1, 2, 3, 4
# router -> publisher
CONFIRM, HOLD, REPLY, CLOSED = 10, 11, 12, 13
# subscriber -> router
HELLO_SUBSCRIBER, READY, REPORT, UNABLE = 20, 21, 22, 23
# router -> subscriber
DELIVER, REPORT_CONFIRM, STOP, WELCOME, MEMBERS, CROWD = 30, 31, 32, 33, 34, 35
# hub <-> supervisor <-> router
HELLO_CONTROL, CALL, ANSWER, PUSH = 40, 41, 42, 43
# tap -> router, router -> tap
HELLO_TAP, TAPPED = 60, 61
PART = 50
"""A piece of a larger frame (header: MORE or LAST)."""
MORE, LAST = b"+", b"."

WIRE_KINDS: Final = frozenset(
    {HELLO_PUBLISHER, BATCH, REPLIES_TAKEN, WITHDRAW, CONFIRM, HOLD, REPLY, CLOSED, HELLO_SUBSCRIBER, READY, REPORT}
    | {DELIVER, REPORT_CONFIRM, STOP, WELCOME, HELLO_CONTROL, CALL, ANSWER, PUSH, PART, HELLO_TAP, TAPPED, UNABLE, MEMBERS, CROWD}
)


class ProtocolError(Exception):
    """Bytes on a stream that no process of ours sends: that connection is closed, no other."""


UNREADABLE: Final = (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError)
"""What reading such bytes raises."""


class Wire(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A header: travels as a msgpack array of its fields."""


class HelloPublisher(Wire, frozen=True):
    token: bytes
    publisher: Id
    pid: int
    started: float


class Extra(Wire, frozen=True):
    """What only few events have."""

    ordering_key: str | None = None
    headers: dict[str, str] | None = None
    due: float = 0.0
    """When it may start, in seconds since the epoch; 0: at once."""
    expires: float = 0.0
    """When it is too late to start; 0: never."""
    priority: int = 0

    @property
    def size(self) -> int:
        """Bytes that it takes in a header, about."""
        texts = [self.ordering_key or "", *(text for pair in (self.headers or {}).items() for text in pair)]
        return sum(len(text.encode()) + 5 for text in texts) + 18


def extra_of(
    ordering_key: str | None = None, headers: dict[str, str] | None = None, priority: int = 0, delay: float = 0.0,
    expires: float | None = None, clock: Callable[[], float] = time.time,
) -> Extra | None:  # fmt: skip
    """Return what goes with an event, checked here: a peer that cannot read it closes the connection.

    Raises InvalidOption.
    """
    if ordering_key is not None and not is_text(ordering_key):
        raise InvalidOption(f"ordering_key: got {ordering_key!r:.80}; expected a str that utf-8 can encode")
    if headers is not None and not (isinstance(headers, dict) and all(is_text(x) for pair in headers.items() for x in pair)):
        raise InvalidOption(f"headers: got {headers!r:.80}; expected a dict of str to str, of what utf-8 can encode")
    if priority and (isinstance(priority, bool) or not isinstance(priority, int) or not -MOST_URGENT <= priority <= MOST_URGENT):
        raise InvalidOption(
            f"priority: got {priority!r:.80}; expected an int from -{MOST_URGENT} to {MOST_URGENT}: higher ones start first"
        )
    check_number("publish", "delay", delay, 0)
    if expires is not None:
        check_number("publish", "expires", expires, delay, above=True)
    if ordering_key is None and not headers and not delay and not priority and expires is None:
        return None
    now = clock()
    extra = Extra(ordering_key, headers, now + delay if delay else 0.0, now + expires if expires is not None else 0.0, priority)
    if extra.size > MAX_EXTRA:
        raise InvalidOption(f"headers and ordering_key: got {extra.size} bytes; expected at most {MAX_EXTRA}: put it into the payload")
    return extra


def is_text(value: object) -> bool:
    """Say whether it is a str that utf-8 can encode: one with a lone surrogate, of a file's name say, cannot be sent."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


class Batch(Wire, frozen=True):
    """Events of one publisher: event i has the id (publisher, number + i), and the last of the keys that start at or before i."""

    publisher: Id
    sequence: Number
    number: Number
    count: Count
    keys: Annotated[list[Key], msgspec.Meta(min_length=1)]
    starts: Annotated[list[Number], msgspec.Meta(min_length=1)]
    """Two lists, as pairs would cost the router and each subscriber an object more for each of a thousand keys."""
    published_at: float
    epoch: int = 0
    """The drain epoch of the cause; 0: that of the arrival."""
    target: str | None = None
    """The one subscriber that a request is for."""
    reply: bool = False
    strict: bool = False
    """Refuse the batch when nobody subscribes to its key."""
    blob: str | None = None
    """The file that is the body."""
    size: Number = 0
    """Bytes of the body, wherever it is."""
    extras: dict[int, Extra] | None = None

    def key(self, index: int) -> str:
        """Return the key of one event."""
        return self.keys[bisect_right(self.starts, index) - 1]

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """Yield (key, first event, end)."""
        return zip(self.keys, self.starts, [*self.starts[1:], self.count], strict=True)


class Unread(Batch, frozen=True):
    """A batch as subscribers get it: its keys, of which there may be a thousand, are read once a handler asks for one."""

    keys: msgspec.Raw  # type: ignore[assignment]
    starts: msgspec.Raw  # type: ignore[assignment]

    def read(self) -> Batch:
        return _batch.decode(encode(self))


class Confirm(Wire, frozen=True):
    """Everything up to ``sequence`` is in the journal, but for what was refused."""

    sequence: int
    refused: list[tuple[int, str, str]] = []
    """(sequence, kind of error, message)."""


class Hold(Wire, frozen=True):
    """Full patterns, all of them: keys that match one wait in the publisher."""

    patterns: list[str]


class Reply(Wire, frozen=True):
    number: int
    outcome: str
    """``ok`` or the name of what ended it: exception, crashed, timeout, fatal, dropped, closed, nobody, ambiguous."""
    body: bytes
    blob: str | None = None
    more: list[Number] = []
    """Other requests that it answers; then the body is that of as many events, their results."""


class RepliesTaken(Wire, frozen=True):
    numbers: list[Number]
    """Of each frame the first."""


class Withdraw(Wire, frozen=True):
    """Events of this publisher that are not wanted any more."""

    numbers: list[Number]
    kill: bool = False
    """End the processes that run them."""


class HelloSubscriber(Wire, frozen=True):
    token: bytes
    incarnation: Id
    ready: bool
    claims: list[tuple[Number, Count]] = []
    """(first delivery number, count) of what it has run and does not know to be committed."""
    generation: int = 0
    frame: int = 0
    """Of its last report: what is not confirmed follows at once, and may give events back."""


class Welcome(Wire, frozen=True):
    """The router's answer to a subscriber's hello: the last frame that it has, and the snapshot to begin with."""

    confirmed: int
    snapshot: bytes = b""
    blob: str | None = None


class Joined(Wire, frozen=True):
    """A subscriber that shares a process, as that is told of it; ``handler`` is empty once it is gone."""

    number: int
    version: int
    """Grows when it is to be set up anew."""
    name: str
    handler: bytes
    blob: str | None = None
    concurrency: int = 1
    answers: bool = True
    patterns: list[str] = []


class Members(Wire, frozen=True):
    members: list[Joined]
    all: bool = False
    """These are all that there are."""


class Crowded(Wire, frozen=True):
    """Which members events may be for together; told before the first of those, and without members once there will be none any more."""

    id: int
    members: list[int]


class Unable(Wire, frozen=True):
    """A member that could not be set up."""

    number: int
    error: bytes
    traceback: str


class Deliver(Wire, frozen=True):
    """Events ``index`` to ``index + count - 1`` of a batch, numbered from ``number`` on in this incarnation."""

    number: int
    generation: int
    confirmed: int
    row: int
    epoch: int
    index: int
    count: int
    batch: Unread
    chosen: list[int] | None = None
    """Offsets of the events that are for this subscriber (None: all); the body holds just these, a blob holds all."""
    attempts: dict[int, int] | None = None
    runs: list[tuple[int, int, int, int, int]] = []
    """For subscribers that share a process: (offset of the first one's number, event, for which of them, first place in there, end)."""


class DeliverRaw(Wire, frozen=True):
    """``Deliver`` as the router writes it: the publisher's header passes through as bytes."""

    number: int
    generation: int
    confirmed: int
    row: int
    epoch: int
    index: int
    count: int
    batch: msgspec.Raw
    chosen: list[int] | None = None
    attempts: dict[int, int] | None = None
    runs: list[tuple[int, int, int, int, int]] = []


class HelloTap(Wire, frozen=True):
    token: bytes
    patterns: Annotated[list[Key], msgspec.Meta(min_length=1)]


class Tapped(Wire, frozen=True):
    """Events of a batch for a tap, and how many have been dropped since the last frame; the first one says that it is heard."""

    dropped: int
    batch: Batch | None = None
    spans: list[tuple[int, int]] = []
    """Which of the batch's events; the body holds just these, a file holds all."""
    blob: str | None = None
    """The tap's own name of the batch's file, which it removes."""


class TappedRaw(Wire, frozen=True):
    """``Tapped`` as the router writes it: the publisher's header passes through as bytes."""

    dropped: int
    batch: msgspec.Raw | None = None
    spans: list[tuple[int, int]] = []
    blob: str | None = None


class End(Wire, frozen=True):
    """How some events of a row ended for a subscriber; the first of them is told beside it."""

    behind: int
    """The index behind the last of them."""
    state: str
    reason: str
    attempts: int
    seconds: float
    at: float


class PastRow(Wire, frozen=True):
    """Events of one frame as history has them."""

    at: float
    batch: Batch
    spans: list[tuple[int, int]]
    """Which of its events are meant; in the body the others are empty, a file holds all."""
    body: bytes
    matched: dict[str, list[tuple[int, int]] | None]
    """subscriber -> spans of the events that were for it (None: all)."""
    ends: list[tuple[str, int, End]]
    """(subscriber, first event, how it ended), as it happened: the last one that names an event counts."""


class Failure(Wire, frozen=True):
    """One event whose handler raised."""

    number: int
    reason: str
    """``exception``, ``rejected`` or ``later``."""
    error: bytes
    traceback: str
    retry: bool = False
    delay: float = 0.0
    pid: int = 0
    rss: int = 0
    """Of the process, its most so far; bytes."""

    @property
    def is_for_now(self) -> bool:
        """Say whether it is to be tried again before all that waits."""
        return self.retry and self.delay <= 0

    @classmethod
    def here(cls, number: int, reason: str, error: bytes, traceback: str, retry: bool, delay: float) -> Failure:
        """Describe a failure in this process."""
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return cls(number, reason, error, traceback, retry, delay, os.getpid(), rss)


class ReplyRow(Wire, frozen=True):
    """A ``Reply`` and whom it is for."""

    publisher: Id
    number: Number
    outcome: str
    body: bytes
    blob: str | None = None
    more: list[Number] = []


def in_rows(replies: list[ReplyRow]) -> list[ReplyRow]:
    """Put results for the same requester together: one row of the journal, and one frame, for all of them."""
    if len(replies) < 2:
        return replies
    rows: list[ReplyRow] = []
    some: dict[int, list[ReplyRow]] = {}
    sizes: dict[int, int] = {}
    for reply in replies:
        if reply.blob is not None:
            rows.append(reply)
            continue
        who, size = reply.publisher, len(reply.body)
        if who in some and sizes[who] + size < BLOB_MIN:
            some[who].append(reply)
            sizes[who] += size
            continue
        if who in some:
            rows.append(_together(some[who]))
        some[who], sizes[who] = [reply], size
    return rows + [_together(each) for each in some.values()]


def _together(replies: list[ReplyRow]) -> ReplyRow:
    first, *others = replies
    if not others:
        return first
    body = join([reply.body for reply in replies])
    return ReplyRow(first.publisher, first.number, first.outcome, body, None, [reply.number for reply in others])


class Output(Wire, frozen=True):
    """What handlers published: a batch of the incarnation, committed with the ack of its cause."""

    batch: Batch
    body: bytes


class Report(Wire, frozen=True):
    """Everything up to delivery number ``upto`` (exclusive) has run; ``failures`` say which did not succeed."""

    frame: Number
    upto: Number
    ran: Number
    seconds: float
    failures: list[Failure] = []
    outputs: list[Output] = []
    replies: list[ReplyRow] = []
    snapshot: bytes | None = None
    snapshot_blob: str | None = None
    returned: bool = False
    """What it held from ``upto`` on was given back unstarted: a retry without delay goes first."""
    generation: int = 0
    filtered: list[int] = []
    """Delivery numbers of events that ``where`` does not want."""
    ended: list[tuple[Number, Number]] = []
    """Delivery numbers from ``upto`` on that have run nevertheless, [first, last), ascending."""
    still: list[tuple[Number, Number]] = []
    """Those that run on though the rest was given back."""
    slow: list[int] = []
    """Of subscribers that share the process: who has been at one event for long and is to be given one after the other from now on."""
    next: list[int] = []
    """Those of them that are to be given the next one."""
    free: list[int] = []
    """Those of them that have been quick, and are to be given events as they come."""


class Call(Wire, frozen=True):
    id: int
    op: str
    args: dict[str, Any] = {}


class Answer(Wire, frozen=True):
    id: int
    result: Any = None


class Push(Wire, frozen=True):
    """News for the hub object: a line of a child or a notice."""

    what: str
    args: dict[str, Any] = {}


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
split = msgspec.msgpack.Decoder(list[bytes]).decode
"""The events of a body."""
views = msgspec.msgpack.Decoder(list[memoryview]).decode
"""The same without copying them."""
join = _encoder.encode
"""A body from a list of events."""


def decoder(kind: type[T]) -> msgspec.msgpack.Decoder[T]:
    """Make the strict decoder of one header struct."""
    return msgspec.msgpack.Decoder(kind)


_batch = decoder(Batch)


def frame(kind: int, header: bytes = b"", body: bytes | memoryview = b"") -> bytes:
    """Put a frame together.

    Raises ProtocolError: it is larger than MAX_WHOLE.
    """
    size = len(header) + len(body)
    data = b"".join((HEAD.pack(size, kind, len(header)), header, body))
    return data if size <= MAX_FRAME else in_parts(data)


def in_parts(data: bytes) -> bytes:
    """Cut a large frame into PART frames that follow one another."""
    if len(data) > MAX_WHOLE:
        raise ProtocolError(f"a frame of {len(data)} bytes; at most {MAX_WHOLE} can be sent")
    step = MAX_FRAME - len(LAST)
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    heads = [HEAD.pack(len(piece) + 1, PART, 1) + (LAST if piece is pieces[-1] else MORE) for piece in pieces]
    return b"".join(part for pair in zip(heads, pieces, strict=True) for part in pair)
