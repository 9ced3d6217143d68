"""The hub: what a program makes, subscribes to, publishes to, drains and stops."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import getpid
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack, overload

import msgspec
import psutil

from mphub.clock import Clock, SystemClock
from mphub.connection import Address, connection_to
from mphub.core.keys import check_key, check_target, nearest
from mphub.engine import Engine, InlineEngine, ProcessEngine, ThreadEngine
from mphub.errors import (
    DeadLettersLeft,
    HubClosed,
    HubError,
    HubFailed,
    InvalidOption,
    MphubError,
    NoSubscriber,
    StartFailed,
)
from mphub.events import DeadLetter, EventId, HistoryRow, Notice, Topic, str_of
from mphub.executor import HubExecutor
from mphub.executor import run as run_call
from mphub.observe import html
from mphub.observe.console import Console, farewell, log
from mphub.observe.progress import Watcher, check_progress
from mphub.observe.statistics import HubStatistics, SubscriberStatistics
from mphub.options import (
    Batch,
    Inbox,
    Limits,
    Rate,
    Recycle,
    Restart,
    Retention,
    Retry,
    Snapshot,
    Stop,
    check_choice,
    check_number,
    check_timeout,
    parse_share,
    refuse_unavailable,
)
from mphub.past import Moment, span_of
from mphub.procs import boot
from mphub.procs.exchange import ADMIT
from mphub.publisher import HubQueue, Publisher, Transaction
from mphub.registry import Registry
from mphub.reply import Reply
from mphub.results import AHEAD, Results, together
from mphub.subscriber import Context, Subscriber, holder, inside, is_importing, publish_inside
from mphub.subscribing import (
    CommonOptions,
    PlainOptions,
    SubscribeOptions,
    Where,
    check_same,
    check_types,
    host_of,
    make_spec,
    patterns_of,
    refuse_process_options,
)
from mphub.subscription import Subscription
from mphub.tap import Tap, tap_on
from mphub.wire.codec import encode, shortened
from mphub.wire.frames import extra_of, is_text
from mphub.wire.payloads import CODECS
from mphub.wire.specs import Spec

if TYPE_CHECKING:  # a lambda says nothing of its payload: then it is Any, also to what checks its body (bound)
    from typing_extensions import TypeVar as DefaultTypeVar

    T = DefaultTypeVar("T", bound=Any, default=Any)
    R = DefaultTypeVar("R", default=Any)
else:
    T, R = TypeVar("T"), TypeVar("R")
C_co = TypeVar("C_co", covariant=True)
F = TypeVar("F", bound=Callable[..., object] | type[Subscriber[Any, Any]])
RUN_AGAIN = 0.05
"""Seconds between looks whether a hub that was stopped runs again."""
MAX_PATTERNS = 32 << 10
"""Bytes of what a tap listens to."""
LIVES_HERE = "a hub with engine 'inline' or 'thread' lives in one process: it cannot be sent to another; use engine='process'"
Answers = Collection[R] | None
"""What a function returns for a batch: one result for each payload, in an array if it likes."""
Names = str | Sequence[str | Topic[Any]]
"""Keys that say nothing of their payloads' type together."""


class Partial(Protocol[C_co]):
    """What ``functools.partial(Class, ...)`` is to a type checker: its own type parameter is invariant."""

    @property
    def func(self) -> Callable[..., C_co]: ...


SubscriberLike = Subscriber[T, R] | type[Subscriber[T, R]] | Partial[Subscriber[T, R]]


class EventHub:
    """Routes events from publishers to subscribers, each a process of its own.

    No side effect before ``start()`` or ``with``; thread-safe; pickles as a handle to itself that can publish.

    path: a folder for a journal that outlives the hub: the same program on the same folder goes on where it stopped, however it ended.
    durability: what a durable hub survives: the end of any ``process``, or also loss of ``power`` (slower). name: shown in messages, and
    how other programs find it (``connect``): one hub of a user has it at a time.
    engine: ``process``, ``thread`` or ``inline``.
    max_bytes: bound of journal and blobs together, a size or a percentage of the memory that holds them. unmatched: ``warn`` or
    ``ignore`` for events that nobody subscribes to. check: leaving ``with`` raises DeadLettersLeft. propagate: inline publishes raise the
    handler's exception (default there). initializer: called without arguments in each subscriber's process before its handler is loaded;
    with the other engines at each start. codec: how payloads and results travel: ``pickle`` (any Python object), ``msgpack``, ``json``
    or ``raw`` (bytes). retention: how much history a durable hub keeps, for ``history``, ``replay`` and ``start="earliest"``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        engine: str = "process",
        max_bytes: int | str = "25%",
        unmatched: str = "warn",
        check: bool = True,
        propagate: bool | None = None,
        stop: Stop = Stop(ask=5.0, term=2.0),  # noqa: B008 (frozen)
        codec: str = "pickle",
        initializer: Callable[[], object] | None = None,
        durability: str = "process",
        retention: Retention | None = None,
        notify: Sequence[str] = (),
        dashboard: None = None,
    ) -> None:
        refuse_unavailable(notify=(notify or (), ()), dashboard=(dashboard, None))
        check_types(
            stop=(stop, Stop), check=(check, bool), propagate=(propagate, bool | None), retention=(retention, Retention | None)
        )  # fmt: skip
        check_choice("EventHub", "engine", engine, ("process", "thread", "inline"))
        check_choice("EventHub", "codec", codec, tuple(CODECS))
        check_choice("EventHub", "durability", durability, ("process", "power"))
        self._durable = durable_path(path, engine, durability, retention)
        if initializer is not None and not callable(initializer):
            raise InvalidOption(f"EventHub(initializer): got {initializer!r:.60}; expected a function without arguments")
        check_choice("EventHub", "unmatched", unmatched, ("warn", "ignore"))
        if propagate and engine != "inline":
            raise InvalidOption(
                f"EventHub(propagate): got True with engine={engine!r}; only the inline engine can raise a handler's exception from publish"
            )
        if name is not None and not is_text(name):
            raise InvalidOption(f"EventHub(name): got {name!r:.80}; expected a str that utf-8 can encode")
        parent, self._is_small = boot.runtime_parent()
        self.name = name if name is not None else default_name()
        self._initializer = initializer
        self._packed_initializer = encode(initializer, "initializer") if initializer is not None and engine == "process" else b""
        self._kind, self._check, self._stop, self._unmatched = engine, check, stop, unmatched
        self._power = durability == "power"
        self._capacity = boot.capacity(parent) if self._durable is None else boot.capacity(self._durable, durable=True)
        self._max_bytes = parse_share(max_bytes, self._capacity)
        self._retention = retention and msgspec.structs.replace(
            retention, max_bytes=parse_share(retention.max_bytes, self._capacity, "Retention(max_bytes)")
        )
        self._propagate = engine == "inline" if propagate is None else propagate
        folder = boot.folder_of(name, parent)
        born, largest = psutil.Process().create_time(), int(self._max_bytes * ADMIT)
        self._address = Address(str(folder), os.urandom(16), self.name, getpid(), born, largest, codec)
        self._console = Console(unmatched)
        self._clock: Clock = SystemClock()
        self._stands_in = False
        """It is inline in place of processes, for a test: what only these can do is passed over."""
        self._subscriptions = Registry()
        self._hosts: dict[str, Spec] = {}
        """Processes that several subscribers share."""
        self._leaving: set[str] = set()
        """Those that are being unsubscribed."""
        self._engine: Engine | None = None
        self._final: tuple[HubStatistics, list[DeadLetter]] | None = None
        self._given_up = 0
        self._began = 0.0
        """When this run of a durable hub began: what died before has been told."""
        self._lock = threading.RLock()
        self._is_ours = True
        """This is the process that made it, not one that was forked or sent it; asking for the pid takes a microsecond."""
        self._up = threading.Event()
        """Set while it runs."""
        self._here: Callable[[str | Topic[Any], object], EventId] | None = None
        """The short way to publish: of the running hub in its own process, of a handle in any other."""
        _hubs.add(self)

    @classmethod
    def from_config(cls, path: str | os.PathLike[str] = "hub.toml", **overrides: Any) -> EventHub:
        """Make the hub that a file describes, with its subscribers; ``overrides`` are options of ``EventHub`` that win.

        Raises InvalidOption, which says where in the file.
        """
        from mphub.config import Config  # few have a file

        config = Config(path)
        with config.saying("hub"):
            hub = cls(**config.hub_options() | overrides)
        for name, options in config.subscriptions():
            with config.saying(f"subscribers.{name}"):
                hub.subscribe(**options)
        return hub

    def __repr__(self) -> str:
        state = "running" if self._engine else "stopped" if self._final else "not started"
        return f"<EventHub {self.name!r} ({self._kind}, {state}, {len(self._subscriptions)} subscribers)>"

    def _repr_html_(self) -> str:
        keys = {subscription.name: subscription.keys for subscription in list(self._subscriptions.values())}
        return html.subscribers(repr(self), keys, self._figures)

    def _figures(self) -> Mapping[str, SubscriberStatistics]:
        """Return the subscribers' figures; none before the first start.

        Raises HubError: this is not the process that has them.
        """
        is_new = self._engine is None and self._final is None and self._is_ours
        return {} if is_new else self.statistics().subscribers

    def __reduce__(self) -> tuple[Callable[..., EventHub], tuple[str | Address]]:
        if self._kind != "process":
            return _here, (self._address.folder,)
        return _handle, (self._address,)

    # -- life

    def start(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Start the hub's processes; with ``wait`` return when every subscriber is RUNNING. Seconds.

        Raises StartFailed (its cause has the child's traceback) when one is FATAL first, TimeoutError.
        """
        self._must_own("start")
        with self._lock:
            if self._engine is not None:
                raise HubError(f"hub {self.name!r} is running already: call start() once, or stop() first")
            self._final, self._given_up = None, 0
            self._began = time.time() if self._durable is not None else 0.0
            if self._is_small and self._kind == "process":
                self._console.notice(
                    "fallback",
                    None,
                    f"/dev/shm has less than {boot.SMALL >> 20} MB free: the hub's files go to {self._address.folder}",
                    {},
                )
            self._engine = self._make_engine()
            self._here = self._engine.publish_plain
            atexit.register(self._stop_at_exit)
            with self._or_stop():
                if self._initializer is not None and self._kind != "process":
                    self._initializer()
                specs = [subscription._spec for subscription in self._subscriptions.values()]
                self._engine.subscribe([*self._hosts.values(), *specs])
                if self._durable is not None:
                    self._name_absent(self._engine)
                if self._kind == "process":
                    boot.let_find(self._address)
            self._up.set()
        if wait:
            with self._or_stop():
                self._wait_all(timeout)

    @contextlib.contextmanager
    def _or_stop(self) -> Iterator[None]:
        """Stop what has been started if the rest of the start fails."""
        try:
            yield
        except BaseException:
            self.stop(drain=False)
            raise

    def _make_engine(self) -> Engine:
        if self._kind == "inline":
            return InlineEngine(self._address, self._max_bytes, self._console, self._clock, propagate=self._propagate)
        if self._kind == "thread":
            return ThreadEngine(self._address, self._max_bytes, self._stop, self._console)
        ask, term, run, keep = self._stop.ask, self._stop.term, os.urandom(16), self._durable is not None
        charter = boot.charter(self._address, self._max_bytes, ask, term, run=run, keep=keep, power=self._power, retention=self._retention)
        return ProcessEngine(charter, self._durable, self._stop, self._console)

    def _wait_all(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        for name in list(self._subscriptions):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._wait_ready(name, left)

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Drain (unless told not to, at most ``timeout`` seconds), end all processes, keep the final figures.

        Raises what ``drain`` raises, after everything has been stopped.
        """
        self._must_own("stop")
        engine = self._engine
        if engine is None:
            return
        try:
            if drain:
                self.drain(timeout)
        except HubClosed:
            if self._engine is engine:  # else it was stopped elsewhere meanwhile
                raise
        finally:
            with self._lock:
                if self._engine is engine:
                    atexit.unregister(self._stop_at_exit)
                    self._end(engine)

    def _end(self, engine: Engine) -> None:
        """Stop the subscribers, take the final figures, end the rest."""
        try:
            with contextlib.suppress(HubClosed):
                self._given_up = engine.stop_subscribers()
                self._final = (engine.statistics(), engine.dead_letters(None))
        except TimeoutError:
            log.error("hub %r: its processes do not answer: they are killed, and there are no final figures", self.name)
        finally:
            self._engine = self._here = None
            self._up.clear()
            engine.close()
        if self._final is not None:
            farewell(self.name, self._final[0], self._given_up, "kept" if self._durable is not None else "given up")

    def _stop_at_exit(self) -> None:
        """An unstopped hub is stopped without drain at interpreter exit."""
        if self._is_ours and self._engine is not None:
            self.stop(drain=False)

    def __enter__(self) -> EventHub:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.stop(drain=False)
            return
        self.stop()
        if self._check:
            self._raise_dead_letters()

    async def __aenter__(self) -> EventHub:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def _raise_dead_letters(self) -> None:
        if self._final is None:
            raise HubFailed(f"hub {self.name!r}: its processes did not answer at the stop: whether something died is not known")
        counts: dict[str, dict[str, int]] = {}
        first: DeadLetter | None = None
        for letter in self._final[1]:
            if letter.told or letter.at < self._began:
                continue
            first = first or letter
            reasons = counts.setdefault(letter.subscriber, {})
            reasons[letter.reason] = reasons.get(letter.reason, 0) + 1
        for name, subscriber in self._final[0].subscribers.items():
            if gone := subscriber.dropped.get("dead_letters_full"):
                counts.setdefault(name, {})["dead_letters_full"] = gone
        if counts:
            raise DeadLettersLeft(counts, {}) from (first.error if first else None)

    def run(self, *, drain_timeout: float = 30.0) -> int:
        """Start, then serve until SIGINT or SIGTERM: the first drains, the second stops now. Return the exit code.

        For supervisor scripts: ``sys.exit(hub.run())``, in the main thread. Signal handlers are given back.
        """
        self._must_own("run")
        asked: list[int] = []

        def ask(number: int, _: FrameType | None) -> None:
            asked.append(number)
            if len(asked) > 1:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self._engine is None:
                self.start(wait=False)
            while not asked and self._engine is not None:
                self._engine.check()
                signal.sigtimedwait((), 0.2)
            self.stop(timeout=drain_timeout)
        except (KeyboardInterrupt, MphubError) as error:
            if not isinstance(error, KeyboardInterrupt):
                log.error("%s", error)
            self.stop(drain=False)
            return 130 if isinstance(error, KeyboardInterrupt) else 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0

    def drain(self, timeout: float | None = None, *, progress: Watcher = False) -> HubStatistics:
        """Wait until what was accepted before, and all that follows from it, is handled, dead or dropped. Seconds.

        ``progress``: True for a bar (rich) or lines, or a callable taking ``Progress``, ten times a second at most.
        Raises SubscriberFatal or SubscriberPaused if such a one has work left, after all else is done; DrainTimeout.
        """
        self._must_own("drain")
        check_progress(progress)
        check_timeout(timeout)
        engine = self._running("drain")
        engine.drain(timeout, progress)
        return engine.statistics()

    # -- subscribing

    @overload
    def subscribe(self, keys: Topic[T], handler: SubscriberLike[T, R], **options: Unpack[SubscribeOptions]) -> Subscription[T, R]: ...
    @overload
    def subscribe(
        self, keys: Topic[T], handler: Callable[[list[T]], Coroutine[Any, Any, Answers[R]]], *, batch: Batch,
        **options: Unpack[CommonOptions],
    ) -> Subscription[T, R]: ...  # fmt: skip
    @overload
    def subscribe(
        self, keys: Topic[T], handler: Callable[[list[T]], Answers[R]], *, batch: Batch, **options: Unpack[CommonOptions]
    ) -> Subscription[T, R]: ...
    @overload
    def subscribe(
        self, keys: Topic[T], handler: Callable[[T], Coroutine[Any, Any, R]], **options: Unpack[PlainOptions]
    ) -> Subscription[T, R]: ...
    @overload
    def subscribe(self, keys: Topic[T], handler: Callable[[T], R], **options: Unpack[PlainOptions]) -> Subscription[T, R]: ...
    @overload
    def subscribe(self, keys: Names, handler: SubscriberLike[T, R], **options: Unpack[SubscribeOptions]) -> Subscription[T, R]: ...
    @overload
    def subscribe(
        self, keys: Names, handler: Callable[[list[T]], Coroutine[Any, Any, Answers[R]]], *, batch: Batch,
        **options: Unpack[CommonOptions],
    ) -> Subscription[T, R]: ...  # fmt: skip
    @overload
    def subscribe(
        self, keys: Names, handler: Callable[[list[T]], Answers[R]], *, batch: Batch, **options: Unpack[CommonOptions]
    ) -> Subscription[T, R]: ...
    @overload
    def subscribe(
        self, keys: Names, handler: Callable[[T], Coroutine[Any, Any, R]], **options: Unpack[PlainOptions]
    ) -> Subscription[T, R]: ...
    @overload
    def subscribe(self, keys: Names, handler: Callable[[T], R], **options: Unpack[PlainOptions]) -> Subscription[T, R]: ...
    @overload
    def subscribe(self, keys: Names | Topic[Any], handler: str, **options: Unpack[SubscribeOptions]) -> Subscription[Any, Any]: ...
    @overload  # for mypy alone, which makes list[Never] of a lambda's list of its payload otherwise
    def subscribe(  # type: ignore[overload-cannot-match]
        self, keys: Names, handler: Callable[[Any], R], **options: Unpack[PlainOptions]
    ) -> Subscription[Any, R]: ...
    def subscribe(
        self,
        keys: Any,
        handler: Any,
        *,
        name: str | None = None,
        to: str | Topic[Any] | None = None,
        retry: Retry = Retry(),  # noqa: B008 (frozen)
        restart: Restart = Restart(),  # noqa: B008
        inbox: Inbox = Inbox(),  # noqa: B008
        limits: Limits = Limits(),  # noqa: B008
        snapshot: Snapshot | None = None,
        replicas: int | str = 1,
        ordered: bool = False,
        concurrency: int = 1,
        process: str | None = None,
        batch: Batch | None = None,
        where: Where = None,
        rate: Rate | None = None,
        recycle: Recycle = Recycle(),  # noqa: B008
        env: Mapping[str, str] | None = None,
        replace: bool = False,
        start: str = "new",
    ) -> Subscription[Any, Any]:
        """Let a handler have the events of some keys or patterns; on a running hub return when the router has it.

        ``replace``: take the place of the subscriber of the same name, whose waiting events stay; the default in an interactive session.
        ``start``: a new name of a durable hub begins with ``new`` events, or with the ``earliest`` that its history has.
        Raises InvalidKey, InvalidOption, PayloadError (the handler cannot be pickled), NameTaken.
        """
        check_choice("subscribe", "start", start, ("new", "earliest"))
        if start == "earliest":
            self._must_keep_history("start='earliest'")
            refuse_latest("start='earliest'", inbox)
        check_types(
            rate=(rate, Rate | None), recycle=(recycle, Recycle), inbox=(inbox, Inbox), limits=(limits, Limits), replace=(replace, bool),
            ordered=(ordered, bool), batch=(batch, Batch | None),
        )  # fmt: skip
        if self._kind != "process" and not self._stands_in:
            refuse_process_options(self._kind, limits, recycle, env)
        self._must_own_unless_importing("subscribe")
        inbox = msgspec.structs.replace(inbox, max_bytes=parse_share(inbox.max_bytes, self._capacity, "Inbox(max_bytes)"))
        with self._lock:
            free = self._subscriptions.free_name(
                handler, name, replace=replace or is_interactive(), batched=batch is not None, durable=self._durable is not None
            )
            spec = make_spec(
                keys, handler, free, to, retry, restart, inbox, limits, snapshot, replicas, env, self._packed_initializer, where,
                ordered, rate, recycle, batch, concurrency, process if self._kind == "process" else None, start,
            )  # fmt: skip
            subscription: Subscription[Any, Any] = Subscription(self, spec, handler)
            self._refuse_leaving(spec.name)
            before = self._subscriptions.get(spec.name)
            if before is not None and before._spec.process != spec.process:
                raise InvalidOption(f"process: got {process!r} for {spec.name!r}, which runs elsewhere: unsubscribe it first")
            host = self._host_of(spec)
            self._subscriptions[spec.name] = subscription
            self._subscriptions.changed()
            if self._engine is not None:
                try:
                    self._engine.subscribe([*host, spec]) if before is None else self._engine.replace(spec)
                except BaseException:
                    self._subscriptions.pop(spec.name)
                    self._subscriptions |= {} if before is None else {spec.name: before}
                    self._subscriptions.changed()
                    for each in host:
                        del self._hosts[each.name]
                    raise
        return subscription

    def _host_of(self, spec: Spec) -> list[Spec]:
        """Return the process that a subscriber shares, if it is the first there.

        Raises InvalidOption: it wants another than there is.
        """
        if spec.process is None:
            return []
        if self._durable is not None:
            raise InvalidOption(
                f"process: got {spec.process!r:.60} on a durable hub, which has a process for each subscriber; leave it None"
            )
        if (host := self._hosts.get(spec.process)) is not None:
            check_same(spec, host)
            return []
        self._hosts[spec.process] = host_of(spec, self._packed_initializer)
        return [self._hosts[spec.process]]

    def subscriber(self, keys: Names | Topic[Any], **options: Unpack[SubscribeOptions]) -> Callable[[F], F]:
        """Subscribe the decorated function or class, which stays what it is."""

        def decorate(handler: F) -> F:
            subscribe: Callable[..., object] = self.subscribe  # a function is called with what its own types say
            subscribe(keys, handler, **options)
            return handler

        return decorate

    @property
    def subscriptions(self) -> Mapping[str, Subscription[Any, Any]]:
        """All subscriptions by name."""
        self._must_own_unless_importing("subscriptions")
        return dict(self._subscriptions)

    def subscription(self, name_or_handler: object) -> Subscription[Any, Any]:
        """Return a subscription by name or handler.

        Raises LookupError with the nearest name.
        """
        self._must_own_unless_importing("subscription")
        return self._subscriptions.find(name_or_handler)

    def subscribers(self, key: str | Topic[Any]) -> list[str]:
        """Return the names of those whose patterns match a key."""
        self._must_own_unless_importing("subscribers")
        return [s.name for s in self._subscriptions.matching(check_key(str_of(key)))]

    # -- publishing

    def publish(
        self, key: str | Topic[T], payload: T, *, ordering_key: str | None = None, headers: dict[str, str] | None = None, now: bool = False,
        confirm: bool = False, priority: int = 0, delay: float = 0.0, expires: float | None = None,
    ) -> EventId:  # fmt: skip
        """Publish one event; pipelined unless ``confirm``. Inside a handler it is committed with the ack (``now=True``: at once).

        ``delay``: seconds before it may start; ``expires``: seconds after which, unless it has started, it is dropped.
        Raises InvalidKey, InvalidOption, PayloadError, HubClosed; with ``confirm`` NoSubscriber.
        """
        here = self._here
        special = headers or now or confirm or priority or delay or ordering_key or expires is not None
        if here is not None and holder.context is None and not special:
            return here(key, payload)
        extra = extra_of(ordering_key, headers, priority, delay, expires, self._now)
        name = check_key(key if type(key) is str else str_of(key))
        is_apart = self._kind == "process" and self._engine is not None and holder.context is None  # no handler of it runs here
        if not is_apart and (context := self._surrounding()) is not None:
            return publish_inside(context, name, payload, extra, now=now, confirm=confirm)
        if self._engine is not None and self._is_ours:
            return self._engine.publish(name, payload, extra, confirm)
        self._must_be_remote("publish")
        self._here = self._publish_from_afar
        return connection_to(self._address).publish(name, payload, extra, confirm=confirm)

    def _publish_from_afar(self, key: str | Topic[Any], payload: object) -> EventId:
        """Publish an event with nothing special from another process than the hub's."""
        return connection_to(self._address).publish_plain(key, payload)

    def publish_batch(self, key: str | Topic[T], payloads: Iterable[T]) -> int:
        """Publish the payloads of an iterable one after the other, with bounded memory; return how many."""
        publish = self._here if self._here is not None and holder.context is None else self.publish
        if isinstance(self._engine, InlineEngine) and holder.context is None:
            return self._engine.publish_batch(functools.partial(publish, key), payloads)
        count = 0
        for payload in payloads:
            publish(key, payload)
            count += 1
        return count

    async def publish_async(
        self, key: str | Topic[T], payload: T, *, ordering_key: str | None = None, headers: dict[str, str] | None = None, now: bool = False,
        confirm: bool = False, priority: int = 0, delay: float = 0.0, expires: float | None = None,
    ) -> EventId:  # fmt: skip
        """Publish without blocking the running loop."""
        publish = functools.partial(
            self.publish, str_of(key), payload, ordering_key=ordering_key, headers=headers, now=now, confirm=confirm, priority=priority,
            delay=delay, expires=expires,
        )  # fmt: skip
        return publish() if self._surrounding() is not None else await asyncio.to_thread(publish)

    def transaction(self) -> Transaction:
        """Collect events that are journaled together on leaving the ``with`` block, or not at all; in a handler with its ack."""
        context = self._surrounding()
        if context is not None:
            return Transaction(context.publish_together, context.codec)
        if self._kind != "process":
            return Transaction(lambda events: self._running("transaction").publish_together(events), CODECS[self._address.codec])
        return self.publisher().transaction()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything that this process published is accepted; seconds.

        Raises DrainTimeout, HubClosed, or what an event was refused for.
        """
        if inside() is not None:
            raise HubError("flush() inside a handler would wait for itself: what a handler publishes is committed with its ack")
        check_timeout(timeout)
        if self._kind == "process":
            connection_to(self._address).flush(timeout)

    def publisher(self) -> Publisher:
        """Return a publisher that can be sent to any process."""
        if self._kind != "process":
            raise HubError(f"engine {self._kind!r} has no publishers in other processes: publish in this one, or use engine='process'")
        return Publisher(self._address)

    @property
    def queue(self) -> HubQueue:
        """The ingress with the interface of ``multiprocessing.Queue``: ``put((key, payload))``."""
        self.publisher()
        return HubQueue(self._address)

    def attach(self, queue: Any) -> None:
        """Read a stock queue of (key, payload) pairs in a thread of this process and publish what comes; None ends it."""
        self._must_own("attach")
        if not callable(getattr(queue, "get", None)):
            raise InvalidOption(f"queue: got {queue!r:.60}; expected a queue of (key, payload) pairs, which has get()")
        threading.Thread(target=self._read_queue, args=(queue,), name="mphub-attached", daemon=True).start()

    def _read_queue(self, queue: Any) -> None:
        """Publish what comes while the hub runs; before and between its runs it stays in the queue."""
        while self._up.wait() and (item := next_of(queue)) is not None:
            try:
                key, payload = item
                self._publish_patiently(key, payload)
            except Exception as error:
                log.error("an attached queue had %.80r, which cannot be published: %s", item, error)

    def _publish_patiently(self, key: str, payload: object) -> None:
        """Publish what has been read already, if need be in the hub's next run."""
        while True:
            try:
                self.publish(key, payload)
                return
            except HubClosed:
                time.sleep(RUN_AGAIN)
            self._up.wait()

    def executor(
        self, name: str = "pool", *, replicas: int | str = "auto", retry: Retry = Retry(max_attempts=1), restart: Restart = Restart(),  # noqa: B008
        inbox: Inbox = Inbox(), limits: Limits = Limits(), recycle: Recycle = Recycle(), env: Mapping[str, str] | None = None,  # noqa: B008
    ) -> HubExecutor:  # fmt: skip
        """Return a ``concurrent.futures.Executor`` whose calls run in the replicas of a subscriber, and which outlives their death.

        Raises InvalidOption, NameTaken.
        """
        if self._address.codec != "pickle":
            raise InvalidOption(f"executor: calls are pickled, and this hub has codec={self._address.codec!r}; expected codec='pickle'")
        return HubExecutor(
            self.subscribe(
                name, run_call, name=name, replicas=replicas, retry=retry, restart=restart, inbox=inbox, limits=limits, recycle=recycle,
                env=env,
            )
        )  # fmt: skip

    # -- asking

    def request(self, key: str | Topic[T], payload: T, *, to: str | None = None, expires: float | None = None) -> Reply[Any]:
        """Ask the one subscriber of a key that answers (``to=`` names one of several).

        ``expires``: seconds within which it must start, else the reply ends with Dropped.
        Raises NoSubscriber, AmbiguousKey. The reply ends with the handler's result or with why there is none.
        """
        return self._request(check_key(str_of(key)), payload, to, expires)

    def _request(self, key: str, payload: object, to: str | None, expires: float | None) -> Reply[Any]:
        extra = extra_of(expires=expires, clock=self._now) if expires is not None else None
        context = self._surrounding()
        if context is not None:
            return context.request(key, payload, check_target(to), extra)
        if self._engine is None or not self._is_ours:
            self._must_be_remote("request")
            return connection_to(self._address).request(key, payload, check_target(to), extra)
        return self._engine.request(key, payload, self._subscriptions.answerer(key, to), extra)

    def map(
        self, key: str | Topic[T], payloads: Iterable[T], *, to: str | None = None, expires: float | None = None, ordered: bool = True,
        errors: str = "raise", progress: Watcher = False, total: int | None = None,
    ) -> Results[Any]:  # fmt: skip
        """Ask for each payload, a bounded number ahead; see ``Subscription.map``."""
        name = check_key(str_of(key))
        ask = functools.partial(self._request, name, to=to, expires=expires)
        ahead = max((each._ahead for each in self._subscriptions.matching(name) if to in (None, each.name)), default=AHEAD)
        return Results(ask, payloads, ordered=ordered, errors=errors, progress=progress, total=total, ahead=ahead)

    def gather(self, key: str | Topic[T], payload: T, *, expires: float | None = None) -> Reply[dict[str, object]]:
        """Ask every subscriber of a key that answers; the reply ends when all have, with what each said, or why it did not, by name.

        Raises NoSubscriber.
        """
        name = check_key(str_of(key))
        self._must_own("gather")
        asked = [subscription.name for subscription in self._subscriptions.matching(name) if subscription._spec.answers]
        if not asked:
            self._subscriptions.answerer(name, None)  # which says why
        return together({each: self._request(name, payload, each, expires) for each in asked})

    def cancel(self, event_id: EventId) -> bool:
        """Withdraw an event from the subscribers that have not started it, counted as ``cancelled``; say whether there was one.

        What a process has in hand is taken back if it can be; a handler that runs sees ``current_event().cancelled``.
        """
        return self._running("cancel").cancel(event_id) > 0

    # -- looking

    def statistics(self) -> HubStatistics:
        """Return the figures of now, or after ``stop()`` the final ones."""
        if self._engine is None and self._final is not None:
            return self._final[0]
        return self._running("statistics").statistics()

    def listen(self, keys: Names | Topic[Any], *, maxsize: int = 1000) -> Tap:
        """See events of some keys or patterns as they are accepted, without being a subscriber: a ``Tap``, from any process.

        It holds nobody: of what its reader does not keep up with ``maxsize`` events wait, the rest is lost and counted (``dropped``).
        Raises InvalidKey, InvalidOption, HubClosed.
        """
        patterns = patterns_of(keys)
        if (size := sum(len(pattern.encode()) for pattern in patterns)) > MAX_PATTERNS:
            raise InvalidOption(f"keys: got {size} bytes of patterns; expected at most {MAX_PATTERNS}: use wildcards")
        check_number("listen", "maxsize", maxsize, 1, whole=True)
        if self._engine is not None and self._is_ours:
            return self._engine.listen(patterns, maxsize)
        self._must_be_remote("listen")
        return tap_on(self._address, patterns, maxsize)[0]

    def on_notice(self, callback: Callable[[Notice], None]) -> None:
        """Call back with each notice (death, FATAL, held, unmatched, ...), in a thread of this process."""
        self._must_own_unless_importing("on_notice")
        if not callable(callback):
            raise InvalidOption(f"callback: got {callback!r:.60}; expected a callable of one Notice")
        self._console.callbacks.append(callback)

    def dead_letters(self, name: str | None = None) -> list[DeadLetter]:
        """Return dead letters, of one subscriber or all, oldest first.

        Raises NoSubscriber: none is or was called so.
        """
        self._known(name)
        if self._engine is None and self._final is not None:
            return [letter for letter in self._final[1] if name is None or letter.subscriber == name]
        return self._running("dead_letters").dead_letters(name)

    def redrive(self, name: str | None = None, ids: Collection[int] | None = None) -> int:
        """Let dead letters wait again with a fresh count of attempts; return how many."""
        return self._running("redrive").redrive(self._known(name), ids)

    def purge(self, name: str | None = None, ids: Collection[int] | None = None) -> int:
        """Drop dead letters, counted as ``purged``; return how many."""
        return self._running("purge").purge(self._known(name), ids)

    def history(
        self, keys: Names | Topic[Any] = ">", since: Moment = None, until: Moment = None, limit: int | None = None
    ) -> Iterator[HistoryRow]:
        """Yield the events under some keys or patterns that were accepted from ``since`` on and before ``until`` (seconds since the epoch,
        or a datetime), oldest first, at most ``limit``, each with what became of it by now. They are read while you go on.

        Raises InvalidKey, InvalidOption: among others if this hub keeps no history (``retention``).
        """
        self._must_keep_history("history()")
        patterns, times = patterns_of(keys), span_of(since, until)
        if limit is not None:
            check_number("history", "limit", limit, 0, whole=True)
        return islice(self._running("history").history(patterns, *times), limit)

    def _replay(self, name: str, keys: Names | Topic[Any], since: Moment, until: Moment) -> int:
        self._must_keep_history("replay()")
        refuse_latest("replay()", self._subscriptions.find(name)._spec.inbox)
        return self._running("replay").replay(name, patterns_of(keys), *span_of(since, until))

    def _must_keep_history(self, what: str) -> None:
        if self._retention is None:
            raise InvalidOption(
                f"{what}: this hub keeps no history; expected a durable one that does: EventHub('folder', retention=Retention())"
            )

    def forget(self, name: str) -> None:
        """Drop what waits in a durable hub for a name that nobody has subscribed in this run, counted as ``forgotten``, and the name.

        Raises InvalidOption; NoSubscriber: nobody is called so; HubError: it is subscribed, and would be without what it waits for.
        """
        engine = self._running("forget")
        with self._lock:
            if self._known(name) is None:
                raise InvalidOption("name: got None; expected the name of a subscriber, as str")
            if name in self._subscriptions:
                raise HubError(f"{name!r} is subscribed: unsubscribe(forget=True) ends it and drops what waits")
            engine.forget(name)

    def _name_absent(self, engine: Engine) -> None:
        """Say for whom events wait whom nobody has subscribed."""
        found = engine.statistics().subscribers
        waiting = {name: one.waiting for name, one in found.items() if name not in self._subscriptions and one.waiting}
        if waiting:
            counts = ", ".join(f"{name} ({count:,} events)" for name, count in waiting.items())
            message = f"nobody has subscribed {counts}: that waits, and so will what is published for them, until forget(name)"
            self._console.notice("absent", None, message, {"waiting": waiting})

    def _known(self, name: str | None) -> str | None:
        """Return the name of somebody who is or was subscribed in this run, or None for all.

        Raises InvalidOption, NoSubscriber.
        """
        if name is not None and not isinstance(name, str):
            raise InvalidOption(f"name: got {name!r:.60}; expected the name of a subscriber, as str")
        if name is None or name in self._subscriptions or name in self.statistics().subscribers:
            return name
        near = nearest(str(name), self._subscriptions)
        raise NoSubscriber(f"name: got {name!r}, which nobody is called" + (f"; did you mean {near!r}?" if near else ""))

    # -- for Subscription

    def _state_of(self, name: str) -> str:
        self._must_own("state")
        engine = self._engine
        return engine.state_of(name)[0] if engine is not None else "STOPPED"

    def _wait_ready(self, name: str, timeout: float | None) -> None:
        state, error, trace = self._running("wait_ready").wait_ready(name, check_timeout(timeout))
        if state != "RUNNING":
            raise StartFailed(f"subscriber {name!r} is {state}: its process could not be set up") from self._running("start").error_of(
                error, trace
            )

    def _operate(self, name: str, what: str) -> None:
        """Restart, pause or resume a subscriber; of one that is gone that changes nothing."""
        engine = self._running(what)
        with self._lock:
            self._refuse_leaving(name)
            getattr(engine, what)(name)

    def _refuse_leaving(self, name: str) -> None:
        """Let nobody change what another thread is ending.

        Raises NoSubscriber.
        """
        if name in self._leaving:
            raise NoSubscriber(f"{name!r} is being unsubscribed")

    def _change(self, name: str, what: str, **fields: Any) -> None:
        """Change a subscription for now and for later starts."""
        self._must_own(what)
        with self._lock:
            self._refuse_leaving(name)
            subscription = self._subscriptions.find(name)
            if self._engine is not None:
                getattr(self._engine, what)(name, **fields)
            subscription._spec = msgspec.structs.replace(subscription._spec, **fields)
            self._subscriptions.changed()

    def _unsubscribe(self, subscription: Subscription[Any, Any], *, drain: bool, forget: bool) -> None:
        self._must_own("unsubscribe")
        name = subscription.name
        if self._subscriptions.get(name) is not subscription:
            return  # done before
        with self._lock:
            self._refuse_leaving(name)
            self._leaving.add(name)
        try:
            if self._engine is not None:
                self._engine.unsubscribe(name, drain=drain, forget=forget)
            self._subscriptions.pop(name, None)
            self._subscriptions.changed()
            self._end_empty(subscription._spec.process)
        finally:
            self._leaving.discard(name)

    def _end_empty(self, host: str | None) -> None:
        """End a process that nobody shares any more."""
        with self._lock:
            if host in self._hosts and not any(other._spec.process == host for other in self._subscriptions.values()):
                del self._hosts[host]
                if self._engine is not None:
                    self._engine.unsubscribe(host, drain=False, forget=True)

    # -- where am I

    def _surrounding(self) -> Context | None:
        """Return what surrounds a handler of this hub; an import in a child makes its hub anew, which is not running."""
        context = inside()
        if context is None or context.folder == self._address.folder or (self._engine is None and self._is_ours):
            return context
        return None

    def _now(self) -> float:
        """Return the time of the handler that this is in, or else of this hub."""
        context = self._surrounding()
        return self._clock() if context is None else context.clock()

    def _running(self, what: str) -> Engine:
        self._must_own(what)
        if self._engine is None:
            raise self._not_running(what)
        return self._engine

    def _not_running(self, what: str) -> HubClosed:
        why = "it was stopped" if self._final else "call start() or enter 'with hub'"
        return HubClosed(f"hub {self.name!r} is not running: {why} before {what}()")

    def _must_own(self, what: str) -> None:
        """Refuse what only the hub's own process can do."""
        context = inside()
        if context is not None and (self._kind != "inline" or what in ("start", "stop", "subscribe", "drain")):
            raise HubError(
                f"this is subscriber {context.name!r}: {what}() does not work in a handler; publish, request and current_event do"
            )
        if not self._is_ours:
            raise HubError(
                f"this process has a handle of hub {self.name!r}, which publishes; {what}() works in the process that made the hub"
            )

    def _must_own_unless_importing(self, what: str) -> None:
        """Refuse likewise, but for a module that a subscriber's process imports: it makes its hub anew, and that is never started."""
        if inside() is None or not (self._engine is None and self._is_ours and is_importing()):
            self._must_own(what)

    def _must_be_remote(self, what: str) -> None:
        if self._is_ours:
            raise self._not_running(what)
        if self._kind != "process":
            raise HubError(LIVES_HERE)


def refuse_latest(what: str, inbox: Inbox) -> None:
    """Refuse the past for an inbox in which it would take the place of what is newer.

    Raises InvalidOption.
    """
    if inbox.overflow == "latest":
        raise InvalidOption(f"{what}: got an inbox with overflow='latest', where an old event would replace a newer one of its key")


def next_of(queue: Any) -> Any:
    """Return the next item of an attached queue, or None at its end; what cannot be loaded is passed over, with a line in the log."""
    while True:
        try:
            return queue.get()
        except Exception as error:
            over = isinstance(error, OSError | EOFError) or getattr(queue, "_closed", False)
            log.error("an attached queue %s: %r", "cannot be read any more" if over else "had something that cannot be loaded", error)
            if over:
                return None


def _handle(address: Address) -> EventHub:
    """Make a hub object in another process: it publishes to the one at ``address``."""
    hub = EventHub(name=address.name)
    hub._address, hub._is_ours = address, False
    return hub


def _here(folder: str) -> EventHub:
    """Find a hub without processes again, for its handlers."""
    for hub in list(_hubs):
        if hub._address.folder == folder and hub._is_ours:
            return hub
    raise HubError(LIVES_HERE)


def _leave_the_short_way() -> None:
    """In a forked child a hub object is only a handle."""
    for hub in list(_hubs):
        hub._here, hub._is_ours = None, False


_hubs: weakref.WeakSet[EventHub] = weakref.WeakSet()
os.register_at_fork(after_in_child=_leave_the_short_way)


def durable_path(path: str | os.PathLike[str] | None, engine: str, durability: str, retention: Retention | None) -> Path | None:
    """Return the folder of a durable hub.

    Raises InvalidOption.
    """
    if path is None:
        for field, value, usual in (("durability", durability, "process"), ("retention", retention, None)):
            if value != usual:
                raise InvalidOption(f"EventHub({field}): got {value!r} without a path, a hub in memory; expected EventHub('folder', ...)")
        return None
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in os.fspath(path):
        raise InvalidOption(f"EventHub(path): got {path!r:.80}; expected a folder, or None for a hub in memory")
    if engine != "process":
        raise InvalidOption(f"EventHub(path): got {str(path)!r} with engine={engine!r}, which keeps events in memory; use engine='process'")
    return Path(path).absolute()


def default_name() -> str:
    """Name a hub after its script and process."""
    script = shortened(os.path.basename(sys.argv[0] if sys.argv else ""))
    return f"{script if script not in ('', '-', '-c') else 'python'}-{getpid()}"


def is_interactive() -> bool:
    """Say whether somebody types: a cell or a function that is run again is meant to replace what it was."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
