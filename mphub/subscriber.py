"""The subscribing end: the ``Subscriber`` class, and what is to be had inside a handler."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

from mphub.core.keys import check_key
from mphub.core.rows import Head
from mphub.errors import HubError
from mphub.events import Event, EventId, Topic, str_of
from mphub.wire.frames import Extra, extra_of

if TYPE_CHECKING:
    from mphub.reply import Reply
    from mphub.wire.payloads import Codec

T = TypeVar("T")
R = TypeVar("R")


class Subscriber(Generic[T, R]):
    """A handler with a life: everything of it runs in the subscriber's process.

    ``setup`` runs first, then ``restore`` with the last snapshot if there is one, then ``handle`` for each payload, or with ``batch=``
    ``handle_batch`` for several at once; ``teardown`` runs at a stop, never after a death. ``setup`` and ``teardown`` may publish. A class
    that defines ``snapshot`` has its state committed in the transaction that acks the events it contains.
    """

    answers: bool = True
    """Whether requests to its keys are for it."""
    name: str
    """The subscription's name, set before ``setup``."""
    replica: int = 0
    """Which of the subscriber's processes this is, from 0 on; a restarted one keeps its number."""
    log: logging.Logger
    """The logger ``mphub.subscriber.<name>``."""

    def setup(self) -> None:
        """Prepare: load models, open files."""

    def handle(self, payload: T) -> R | Coroutine[Any, Any, R]:
        """Handle one payload; the result answers a request and is published under ``to``."""
        raise NotImplementedError(f"{type(self).__name__} must define handle(self, payload)")

    def handle_batch(self, payloads: list[T]) -> Collection[R] | Coroutine[Any, Any, Collection[R] | None] | None:
        """Handle the payloads of a batch; return one result for each, or None if nobody has asked."""
        raise NotImplementedError(f"{type(self).__name__} must define handle_batch(self, payloads)")

    def teardown(self) -> None:
        """Clean up at a stop; it has ``Stop.ask`` seconds."""

    def snapshot(self) -> object:
        """Return the state that ``restore`` takes in a new process."""
        return None

    def restore(self, state: object) -> None:
        """Take up the state of the last snapshot."""


class Context(Protocol):
    """What surrounds a running handler."""

    name: str
    folder: str
    """Of the hub whose handler it is."""
    codec: Codec

    @property
    def clock(self) -> Callable[[], float]: ...

    def publish(self, key: str, payload: object, extra: Extra | None, *, now: bool) -> EventId: ...
    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None: ...
    def request(self, key: str, payload: object, target: str | None, extra: Extra | None = None) -> Reply[object]: ...
    def current_events(self) -> list[Event]: ...
    def current_heads(self) -> list[Head]: ...


class Resident(Context, Protocol):
    """The context of a process that runs the handlers of one subscriber alone."""

    @property
    def thread(self) -> int:
        """That of the handler that this is called in, if any."""


class _Holder:
    """The context of this process: a plain attribute, as a contextvar per event nearly halved the rate at fan-out."""

    __slots__ = ("context",)
    context: Resident | None

    def __init__(self) -> None:
        self.context = None


class _Own(threading.local):
    """The context of this thread, in a process that runs handlers of several subscribers (engines inline and thread)."""

    context: Context | None = None


holder, own = _Holder(), _Own()


def _forget_context() -> None:
    holder.context = own.context = None  # a process that a handler forks is none of ours: publishing there is ordinary publishing


os.register_at_fork(after_in_child=_forget_context)


def inside() -> Context | None:
    """Return the context if this thread runs a handler of this process."""
    context = holder.context
    return context if context is not None and context.thread == threading.get_ident() else own.context


def inside_of(folder: str) -> Context | None:
    """Return the context if this thread runs a handler of the hub at a folder."""
    context = inside()
    return context if context is not None and context.folder == folder else None


def publish_inside(context: Context, key: str, payload: object, extra: Extra | None, *, now: bool, confirm: bool) -> EventId:
    """Publish from a handler, by whatever object: it is committed with the ack.

    Raises HubError: it is to wait for that.
    """
    if confirm:
        raise HubError("publish(confirm=True) in a handler would wait for itself: what a handler publishes is committed with its ack")
    return context.publish(key, payload, extra, now=now)


def is_importing() -> bool:
    """Say whether a module is being imported further up this thread's stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@overload
def publish(
    key: Topic[T],
    payload: T,
    *,
    ordering_key: str | None = None,
    headers: dict[str, str] | None = None,
    now: bool = False,
    priority: int = 0,
    delay: float = 0.0,
    expires: float | None = None,
) -> EventId: ...
@overload
def publish(
    key: str,
    payload: object,
    *,
    ordering_key: str | None = None,
    headers: dict[str, str] | None = None,
    now: bool = False,
    priority: int = 0,
    delay: float = 0.0,
    expires: float | None = None,
) -> EventId: ...
def publish(
    key: str | Topic[T],
    payload: object,
    *,
    ordering_key: str | None = None,
    headers: dict[str, str] | None = None,
    now: bool = False,
    priority: int = 0,
    delay: float = 0.0,
    expires: float | None = None,
) -> EventId:
    """Publish from inside a handler: committed with the ack of the event that is being handled.

    With ``now=True`` it goes out at once, at least once, also when this attempt fails later. ``delay``, ``expires``: seconds from now.
    Raises HubError outside a handler, InvalidKey, InvalidOption, PayloadError.
    """
    context = _context("publish")
    extra = extra_of(ordering_key, headers, priority, delay, expires, context.clock)
    return context.publish(check_key(str_of(key)), payload, extra, now=now)


def current_event() -> Event:
    """Return the event that is being handled.

    Raises HubError outside a handler, and in one that handles a batch of several.
    """
    found = _current("current_event")
    if len(found) > 1:
        raise HubError(f"mphub.current_event: a batch of {len(found)} events is being handled; mphub.current_events() returns all of them")
    return found[0]


def current_events() -> list[Event]:
    """Return the events of the batch that is being handled, in the order of its payloads; without batches it is one.

    Raises HubError outside a handler.
    """
    return _current("current_events")


def current_heads() -> list[Head]:
    """Return what is known of the events that are being handled beside their payloads: a quarter of the time of ``current_events``.

    Raises HubError outside a handler.
    """
    return _context("current_heads").current_heads()


def _current(what: str) -> list[Event]:
    found = _context(what).current_events()
    if not found:
        raise HubError(f"mphub.{what}: no event is being handled; it works in handle(payload), not in setup or teardown")
    return found


def _context(what: str) -> Context:
    context = inside()
    if context is None:
        raise HubError(f"mphub.{what} works inside a handler only, in the thread that runs it; elsewhere use hub.publish")
    return context
