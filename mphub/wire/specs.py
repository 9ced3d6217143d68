"""What a subscription is, as it travels from the hub to the supervisor, the router's journal and the subscriber's process."""

from __future__ import annotations

import msgspec

from mphub.options import Batch, Inbox, Limits, Rate, Recycle, Restart, Snapshot


class Surroundings(msgspec.Struct, frozen=True):
    """What every incarnation begins with: that of the hub's process at ``subscribe``; as bytes, as it need not be utf-8."""

    cwd: bytes
    path: list[bytes]
    environment: dict[bytes, bytes]


NOWHERE = Surroundings(b"", [], {})
"""Of a subscriber that has no process by itself."""


class Spec(msgspec.Struct, frozen=True):
    """One subscription."""

    name: str
    patterns: list[str]
    handler: bytes
    """Pickled ``Work``; opaque to all but the subscriber's process."""
    surroundings: Surroundings
    inbox: Inbox
    limits: Limits
    restart: Restart
    max_attempts: int
    handler_blob: str | None = None
    snapshot: Snapshot | None = None
    answers: bool = True
    replicas: int = 1
    rate: Rate | None = None
    recycle: Recycle = Recycle()
    ordered: bool = False
    """Events of one ordering key are handled one after the other, by whatever process."""
    batch: Batch | None = None
    concurrency: int = 1
    """Events that one process runs at a time."""
    process: str | None = None
    """The process that it shares with others: the name of its host."""
    hosts: bool = False
    """It is no subscriber, but the process that some share."""
    start: str = "new"
    """Whether it is to have what was published before it, as far as history goes: ``earliest``."""
    initializer: bytes = b""
    """Pickled; called in each process before the handler is loaded."""
