"""What a client may ask of a supervisor, and with which arguments."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from mphub.wire.frames import Call, Key, ProtocolError, decoder
from mphub.wire.specs import Spec


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments."""


class Named(Asked, frozen=True):
    name: str


class Leaving(Named, frozen=True):
    keep: bool


class Scaling(Named, frozen=True):
    replicas: Annotated[int, msgspec.Meta(ge=1)]


class Keying(Named, frozen=True):
    patterns: Annotated[list[Key], msgspec.Meta(min_length=1)]


class Forgetting(Named, frozen=True):
    reason: str


class Chosen(Asked, frozen=True):
    name: str | None
    ids: list[bytes] | None


class Cancelling(Asked, frozen=True):
    ids: list[bytes]


class Page(Asked, frozen=True):
    name: str | None
    after: int


class Looking(Asked, frozen=True):
    patterns: Annotated[list[Key], msgspec.Meta(min_length=1)]
    since: float
    until: float
    after: int


class Replaying(Looking, frozen=True):
    name: str
    run: bytes
    before: int


class Subscribing(Asked, frozen=True):
    spec: bytes

    def __post_init__(self) -> None:
        _spec.decode(self.spec)


class Setting(Named, frozen=True):
    status: Literal["", "PAUSED"]


CALLS: Final[dict[str, type[Asked]]] = {
    "subscribe": Subscribing, "replace": Subscribing, "unsubscribe": Leaving, "forget": Forgetting, "stop_routing": Named, "restart": Named,
    "start": Named, "stop": Named, "pause": Named, "resume": Named, "scale": Scaling, "set_keys": Keying, "cancel": Cancelling,
    "host": Subscribing, "join": Subscribing, "leave": Named, "set_member": Setting, "rekey": Keying,
    "states": Asked, "statistics": Asked, "drain": Asked, "dead_letters": Page, "redrive": Chosen, "purge": Chosen,
    "history": Looking, "replay": Replaying,
    "stop_subscribers": Asked, "close": Asked,
}  # fmt: skip
_spec = decoder(Spec)


def check(call: Call) -> None:
    """Refuse what no client of ours asks.

    Raises ProtocolError, MsgspecError.
    """
    kind = CALLS.get(call.op)
    if kind is None:
        raise ProtocolError(f"call {call.op}")
    msgspec.convert(call.args, kind)
