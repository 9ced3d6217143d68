"""The publishing end: ``Publisher`` for any process, transactions, and the queue with the ``multiprocessing.Queue`` interface."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing.queues
import queue as stdlib_queue
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mphub.connection import Address, Connection, connection_to
from mphub.core.keys import check_key, check_target
from mphub.errors import HubError, PayloadError
from mphub.events import EventId, Topic, str_of
from mphub.options import check_timeout
from mphub.reply import Reply
from mphub.subscriber import Context, holder, inside_of, publish_inside
from mphub.wire.frames import Extra, extra_of
from mphub.wire.payloads import CODECS, Codec

T = TypeVar("T")


class Publisher:
    """Publishes to a hub from any process; thread-safe, picklable. All publishers of one process share one connection and its order."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def __reduce__(self) -> tuple[type[Publisher], tuple[Address]]:
        return type(self), (self._address,)

    @property
    def _connection(self) -> Connection:
        return connection_to(self._address)

    @property
    def _context(self) -> Context | None:
        return inside_of(self._address.folder)

    def publish(
        self, key: str | Topic[T], payload: T, *, ordering_key: str | None = None, headers: dict[str, str] | None = None, now: bool = False,
        confirm: bool = False, priority: int = 0, delay: float = 0.0, expires: float | None = None,
    ) -> EventId:  # fmt: skip
        """Send one event; pipelined unless ``confirm``. Inside a handler it is committed with the ack (``now=True``: at once).

        Raises InvalidKey, PayloadError, HubClosed; with ``confirm`` NoSubscriber.
        """
        special = headers or now or confirm or priority or delay or ordering_key or expires is not None
        if holder.context is None and not special:
            return connection_to(self._address).publish_plain(key, payload)
        extra = extra_of(ordering_key, headers, priority, delay, expires)
        name, context = check_key(str_of(key)), self._context
        if context is not None:
            return publish_inside(context, name, payload, extra, now=now, confirm=confirm)
        return self._connection.publish(name, payload, extra, confirm=confirm)

    def publish_batch(self, key: str | Topic[T], payloads: Iterable[T]) -> int:
        """Send the payloads of an iterable one after the other, with bounded memory; return how many."""
        count, name = 0, check_key(str_of(key))
        publish: Callable[[str, object], object] = self.publish if self._context is not None else self._connection.publish_plain
        for payload in payloads:
            publish(name, payload)
            count += 1
        return count

    async def publish_async(
        self, key: str | Topic[T], payload: T, *, ordering_key: str | None = None, headers: dict[str, str] | None = None, now: bool = False,
        confirm: bool = False, priority: int = 0, delay: float = 0.0, expires: float | None = None,
    ) -> EventId:  # fmt: skip
        """Send one event without blocking the running loop."""
        publish = functools.partial(
            self.publish, str_of(key), payload, ordering_key=ordering_key, headers=headers, now=now, confirm=confirm, priority=priority,
            delay=delay, expires=expires,
        )  # fmt: skip
        return publish() if self._context is not None else await asyncio.to_thread(publish)

    def transaction(self) -> Transaction:
        """Collect events that are journaled together on leaving the ``with`` block, or not at all."""
        return Transaction(self._publish_together, CODECS[self._address.codec])

    def _publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        context = self._context
        if context is not None:
            context.publish_together(events)
        else:
            self._connection.publish_together(events)

    def request(self, key: str | Topic[T], payload: T, *, to: str | None = None, expires: float | None = None) -> Reply[Any]:
        """Ask the one subscriber of a key that answers (or the one named by ``to``), which must start within ``expires`` seconds."""
        return (self._context or self._connection).request(check_key(str_of(key)), payload, check_target(to), extra_of(expires=expires))

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything that this process published is accepted; seconds.

        Raises DrainTimeout, HubClosed, or what an event was refused for.
        """
        if self._context is not None:
            raise HubError("flush() inside a handler would wait for itself: what a handler publishes is committed with its ack")
        self._connection.flush(check_timeout(timeout))

    def close(self) -> None:
        """Flush; the process's connection stays, as others share it."""
        self._connection.flush(5.0)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Transaction:
    """Events that are accepted together: committed and confirmed on leaving, discarded on an exception."""

    def __init__(self, commit: Callable[[list[tuple[str, bytes, Extra | None]]], object], codec: Codec) -> None:
        self._commit, self._codec = commit, codec
        self._events: list[tuple[str, bytes, Extra | None]] = []

    def publish(
        self,
        key: str | Topic[T],
        payload: T,
        *,
        ordering_key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Add one event."""
        self._events.append((check_key(str_of(key)), self._codec.encode(payload), extra_of(ordering_key, headers)))

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._events:
            self._commit(self._events)
        self._events = []


if TYPE_CHECKING:
    _Queue = multiprocessing.queues.Queue[tuple[str, object]]
else:  # not subscriptable at run time
    _Queue = multiprocessing.queues.Queue


class HubQueue(_Queue):
    """The hub's ingress with the interface of ``multiprocessing.Queue``: ``put((key, payload))`` from any process."""

    def __init__(self, address: Address) -> None:  # not the base's: this queue has no pipe, lock or feeder thread
        self._publisher = Publisher(address)

    def __getstate__(self) -> Address:  # type: ignore[override]
        return self._publisher._address

    def __setstate__(self, address: Address) -> None:  # type: ignore[override]
        self._publisher = Publisher(address)

    def put(self, obj: tuple[str, object], block: bool = True, timeout: float | None = None) -> None:
        """Publish a (key, payload) pair.

        Raises PayloadError for anything else, queue.Full if it may not wait and the key is held.
        """
        if not (isinstance(obj, tuple | list) and len(obj) == 2):
            raise PayloadError(f"hub.queue takes (key, payload) pairs; got {type(obj).__name__} {obj!r:.60}")
        key = check_key(str_of(obj[0]))
        impatient = (not block or timeout is not None) and self._publisher._context is None
        if impatient and not self._publisher._connection.wait_room(key, timeout if block and timeout is not None else 0.0):
            raise stdlib_queue.Full
        self._publisher.publish(key, obj[1])

    def put_nowait(self, obj: tuple[str, object]) -> None:
        self.put(obj, block=False)

    def get(self, block: bool = True, timeout: float | None = None) -> NoReturn:
        raise TypeError("hub.queue is the hub's ingress and is read by its router: subscribe a handler instead of get()")

    def get_nowait(self) -> NoReturn:
        self.get()

    def qsize(self) -> int:
        """Return the frames of this process that are not confirmed yet."""
        return self._publisher._connection.unconfirmed

    def empty(self) -> bool:
        return self.qsize() == 0

    def full(self) -> bool:
        return False

    def close(self) -> None:
        self._publisher.close()

    def join_thread(self) -> None:
        """Wait until everything put is accepted."""
        self._publisher.flush()

    def cancel_join_thread(self) -> None:
        """Nothing to cancel: a process that ends flushes for at most 5 s anyway."""
