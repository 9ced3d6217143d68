"""What users see of events: keys with a type, events, dead letters, notices."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mphub.errors import load_error

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Topic(Generic[T]):
    """A key or pattern tied to the type of its payloads: ``Topic("orders.created", Order)``."""

    key: str
    payload_type: type[T] | None = None

    def __str__(self) -> str:
        return self.key

    def __repr__(self) -> str:
        kind = getattr(self.payload_type, "__name__", self.payload_type)
        return f"Topic({self.key!r}{f', {kind}' if kind else ''})"

    def _in(self, payload: T) -> T:  # uses T both ways, which makes it invariant
        return payload


def str_of(key: object) -> str:
    """Return the key of a Topic and the text of any kind of str; anything else as it is, to be checked."""
    if isinstance(key, Topic):
        return key.key
    return str.__str__(key) if isinstance(key, str) else key  # type: ignore[return-value]


class EventId(int):
    """64 random bits of the publisher << 40 | its running number; shown as hex, stable over retry, redelivery and redrive."""

    __slots__ = ()

    @classmethod
    def make(cls, publisher: int, number: int) -> EventId:
        return cls(publisher << 40 | number)

    @property
    def publisher(self) -> int:
        return int(self) >> 40

    @property
    def number(self) -> int:
        return int(self) & ((1 << 40) - 1)

    def __str__(self) -> str:
        return f"{int(self):026x}"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class Event:
    """The event that a handler is handling."""

    id: EventId
    key: str
    payload: Any
    ordering_key: str | None
    priority: int
    headers: dict[str, str]
    published_at: float
    """Seconds since the epoch, by the publisher's clock."""
    attempt: int
    """1 for the first run."""
    replica: int
    cancelled: bool


@dataclass(frozen=True)
class DeadLetter:
    """An event that was given up, with why. Its payload and error are decoded when looked at."""

    id: EventId
    key: str
    subscriber: str
    reason: str
    """exception, rejected, crash, timeout, overflow."""
    attempts: int
    traceback: str
    exit: str | int | None
    """Signal by name or exit code of the process that died."""
    pid: int | None
    at: float
    rss: int | None
    """Bytes, at the death."""
    stderr: str
    told: bool
    """Its failure was raised to the caller (inline engine)."""
    _payload: bytes = field(repr=False)
    _error: bytes = field(repr=False)
    _loads: Callable[[bytes], Any] = field(default=pickle.loads, repr=False, compare=False)

    @property
    def payload(self) -> Any:
        return self._loads(self._payload)

    @property
    def error(self) -> BaseException | None:
        """The exception, or RemoteError with its text if it cannot be loaded here."""
        if not self._error:
            return None
        return load_error(self._error, self.traceback)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an event for one subscriber; of one that had it several times (redriven, replayed) the last time counts."""

    state: str
    """waiting (or running), handled, dead, dropped."""
    reason: str = ""
    """Why it is dead or dropped: exception, crash, overflow, expired, ..."""
    attempts: int = 0
    duration: float = 0.0
    """Seconds that handling it took, on average of those that were reported together; 0 if that is not known."""
    at: float | None = None
    """When it ended: seconds since the epoch."""


@dataclass(frozen=True)
class HistoryRow:
    """An event of the past, and what became of it. Its payload is decoded when looked at."""

    id: EventId
    key: str
    ordering_key: str | None
    priority: int
    headers: dict[str, str]
    published_at: float
    """Seconds since the epoch, by the publisher's clock."""
    accepted_at: float
    """Seconds since the epoch, by the router's; ``since`` and ``until`` mean this."""
    outcomes: dict[str, Outcome]
    """By the names of the subscribers that it was for."""
    _read: Callable[[], Any] = field(repr=False, compare=False)

    @property
    def payload(self) -> Any:
        """The payload.

        Raises PayloadError: it was large, and has been let go since.
        """
        return self._read()


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that whoever operates a hub wants to know."""

    kind: str
    """death, FATAL, held, unmatched, ..."""
    severity: str
    """info, warning, error, critical."""
    subscriber: str | None
    message: str
    at: float
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a drain is: events done of total, dead ones, events a second."""

    done: int
    total: int
    dead: int
    rate: float
