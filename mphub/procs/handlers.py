"""From what users subscribe to what a process runs: functions, coroutine functions, classes, instances, partials, ``module:attr``."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mphub.core.keys import check_name, matches
from mphub.errors import BatchFailed, HubError, InvalidOption, PayloadError, Reject, RetryLater
from mphub.options import backoff
from mphub.subscriber import Subscriber
from mphub.wire.frames import Joined
from mphub.wire.specs import Spec

if TYPE_CHECKING:
    import asyncio


@dataclass(frozen=True)
class Work:
    """What a subscriber's process is given, pickled: opaque to supervisor and router."""

    handler: object
    on: type[BaseException] | tuple[type[BaseException], ...]
    delay: float
    factor: float
    max_delay: float
    to: str | None
    where: Callable[[Any], object] | Mapping[str, object] | None = None


@dataclass
class Runner:
    """A handler ready to run."""

    call: Callable[[Any], Any]
    subscriber: Subscriber[Any, Any] | None = None
    close: Callable[[], None] = lambda: None
    is_async: bool = False
    function: Callable[[Any], Any] = lambda payload: None
    """What the handler is by itself: a coroutine function, if it is one."""
    loop: asyncio.Runner | None = None
    """Where its coroutines run."""
    wants: Callable[[Any], object] | None = None
    """Whether an event is for the handler at all."""


def nothing() -> tuple[Work, Runner]:
    """Return what a process has that runs the handlers of others."""
    return Work(None, (), 0.0, 1.0, 0.0, None), Runner(lambda payload: None)


def check_where(where: object) -> None:
    """Refuse what is no filter.

    Raises InvalidOption.
    """
    if not callable(where) and not (isinstance(where, Mapping) and where and all(isinstance(name, str) for name in where)):
        raise InvalidOption(f"where: got {where!r:.60}; expected a function of the payload, or a mapping of items or attributes to values")


def predicate(where: Callable[[Any], object] | Mapping[str, object] | None) -> Callable[[Any], object] | None:
    """Return a function that says whether a payload is wanted; a mapping compares items of a mapping, attributes of anything else."""
    if where is None or callable(where):
        return where
    missing = object()

    def has_all(payload: object) -> bool:
        if isinstance(payload, Mapping):
            return all(payload.get(name, missing) == value for name, value in where.items())
        return all(getattr(payload, name, missing) == value for name, value in where.items())

    return has_all


def check_handler(handler: object, *, batched: bool = False) -> None:
    """Refuse at ``subscribe`` what can never be called with one payload, or with a list of them.

    Raises InvalidOption.
    """
    target = handler.func if isinstance(handler, functools.partial) else handler
    if isinstance(target, type):
        if not issubclass(target, Subscriber):
            raise InvalidOption(
                f"handler: got the class {target.__name__}; expected a subclass of mphub.Subscriber, or a function of one payload"
            )
        _check_class(target, batched)
        return
    if isinstance(handler, str):
        if handler.count(":") != 1 or not all(handler.split(":")):
            raise InvalidOption(f"handler: got {handler!r}; expected 'module:attribute'")
        return
    if not callable(handler) and not isinstance(handler, Subscriber):
        raise InvalidOption(
            f"handler: got {type(handler).__name__} {handler!r:.60}; expected a function, a coroutine function, "
            "a Subscriber class or instance, or 'module:attribute'"
        )
    if isinstance(handler, Subscriber):
        _check_class(type(handler), batched)
    else:
        what = "one argument, the list of payloads" if batched else "one argument, the payload"
        _check_runs(handler)
        _check_takes(handler, (None,), repr(getattr(handler, "__name__", handler)), what)


def _check_class(target: type[Subscriber[Any, Any]], batched: bool) -> None:
    """Refuse a class whose methods cannot be called as they will be."""
    if batched and target.handle_batch is Subscriber.handle_batch:
        raise InvalidOption(f"handler: class {target.__name__} has no handle_batch(self, payloads), which batch= needs: define it")
    if not batched and target.handle is Subscriber.handle:
        raise InvalidOption(f"handler: class {target.__name__} has no handle(self, payload): define it, or pass batch= for handle_batch")
    method: Callable[..., object]
    name, method, what = (
        ("handle_batch", target.handle_batch, "a list of payloads") if batched else ("handle", target.handle, "one payload")
    )
    _check_runs(method)
    _check_takes(method, (None, None), f"{target.__name__}.{name}", f"self and {what}")
    for name in ("setup", "teardown", "snapshot", "restore"):
        if inspect.iscoroutinefunction(getattr(target, name)):
            raise InvalidOption(f"handler: {target.__name__}.{name} is a coroutine function: only handle and handle_batch may be one")


def _check_runs(function: Any) -> None:
    """Refuse what does nothing when it is called."""
    for call in (function, getattr(function, "__call__", None)):  # noqa: B004 (an object whose __call__ is one)
        if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
            raise InvalidOption(
                f"handler: {getattr(function, '__qualname__', function)!r} is a generator function, of which nothing runs when it is "
                "called; expected a function: return a list, or publish each item with mphub.publish"
            )


def _check_takes(function: Callable[..., object], arguments: tuple[None, ...], name: str, what: str) -> None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return  # builtins without a signature
    try:
        signature.bind(*arguments)
    except TypeError:
        raise InvalidOption(f"handler: {name} takes {signature}; expected a callable with {what}") from None


def subscriber_class(handler: object) -> type[Subscriber[Any, Any]] | None:
    """Return the Subscriber class behind a handler, if that can be told without importing anything."""
    target = handler.func if isinstance(handler, functools.partial) else handler
    if isinstance(target, type) and issubclass(target, Subscriber):
        return target
    return type(target) if isinstance(target, Subscriber) else None


def default_name(handler: object) -> str:
    """Name a subscription after its handler."""
    if isinstance(handler, str):
        handler_name = handler.split(":")[1].rpartition(".")[2]
    else:
        target = handler.func if isinstance(handler, functools.partial) else handler
        handler_name = getattr(target, "__name__", type(target).__name__)
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "" for c in handler_name)[:64]
    return check_name("handler" if handler_name == "<lambda>" or not name else name)


def load(work: Work, name: str, replica: int = 0, *, batched: bool = False) -> Runner:
    """Build what runs; in the subscriber's process."""
    runner = _runner(work, name, replica, batched)
    runner.wants = predicate(work.where)
    return runner


def _runner(work: Work, name: str, replica: int, batched: bool) -> Runner:
    handler = _import(work.handler) if isinstance(work.handler, str) else work.handler
    made = handler
    if isinstance(handler, type) or (isinstance(handler, functools.partial) and isinstance(handler.func, type)):
        made = handler()
    if not isinstance(made, Subscriber):
        return _callable(made)
    made.name, made.replica, made.log = name, replica, logging.getLogger(f"mphub.subscriber.{name}")
    runner = _callable(made.handle_batch if batched else made.handle)
    runner.subscriber = made
    return runner


def retry_after(work: Work, error: BaseException, attempt: int) -> tuple[bool, float]:
    """Say whether an event that raised is to run again, and after how many seconds."""
    if isinstance(error, RetryLater):
        return True, error.seconds
    if isinstance(error, Reject) or not isinstance(error, work.on):
        return False, 0.0
    return True, backoff(work.delay, work.factor, attempt - 1, work.max_delay)


def check_other(spec: Spec | Joined, key: str, target: str | None) -> None:
    """Refuse what a handler asks of its own subscriber.

    Raises HubError.
    """
    if target == spec.name or (target is None and spec.answers and any(matches(pattern, key) for pattern in spec.patterns)):
        raise HubError(f"request({key!r}) in {spec.name!r}, which is the one to answer it, would wait for itself: call the function")


def check_asked_only(published: Sequence[object]) -> None:
    """Refuse what a filter has published: it is asked before its batch is whole, which may run and fail several times.

    Raises HubError.
    """
    if published:
        raise HubError("where: a filter of a subscriber with batch= has published; expected it to only look: publish in the handler")


def call_batch(
    call: Callable[[Any], Any], payloads: list[Any], asked: Sequence[bool]
) -> tuple[Sequence[object], dict[int, BaseException]]:  # fmt: skip
    """Handle a batch; return a result for each payload, and the exceptions of those that failed. ``asked``: who waits for a result.

    Raises what the handler raises for all of them together; InvalidOption, PayloadError: what it says of them does not fit.
    """
    count = len(payloads)
    errors: dict[int, BaseException] = {}
    try:
        results = call(payloads)
    except BatchFailed as failed:
        errors, results = dict(failed.errors), failed.results
        if errors and max(errors) >= count:
            raise InvalidOption(
                f"BatchFailed(errors): got the place {max(errors)}; expected places of a batch of {count}, from 0 on"
            ) from None
    if results is None and not any(waits and place not in errors for place, waits in enumerate(asked)):
        return [None] * count, errors
    return _results_of(results, count), errors


def _results_of(results: Any, count: int) -> Sequence[object]:
    """Return what a handler of batches returned as a list; an array will do."""
    if not hasattr(results, "__len__") or isinstance(results, str | bytes | Mapping | Set):
        what = f"{type(results).__name__} {results!r:.60}" if results is not None else "None, though somebody waits for an answer"
        raise PayloadError(f"results of a batch: got {what}; expected a list with one for each of {count} payloads")
    found = list(results)
    if len(found) != count:
        raise PayloadError(f"results of a batch: got {len(found)} of them; expected a list with one for each of {count} payloads")
    return found


def _callable(function: Any) -> Runner:
    _check_runs(function)  # a 'module:attribute' is seen here for the first time
    call = function
    if not inspect.iscoroutinefunction(function) and not inspect.isfunction(function) and not inspect.ismethod(function):
        call = getattr(function, "__call__", function)  # noqa: B004 (an object whose __call__ is a coroutine function)
    if not inspect.iscoroutinefunction(call) and not inspect.iscoroutinefunction(getattr(function, "func", None)):
        return Runner(function)
    import asyncio  # half the imports of a child, for coroutine handlers only

    loop = asyncio.Runner()
    return Runner(lambda payload: loop.run(function(payload)), close=loop.close, is_async=True, function=function, loop=loop)


def _import(path: str) -> object:
    module, _, attribute = path.partition(":")
    found: object = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def loads(data: bytes | memoryview) -> Work:
    work: Work = pickle.loads(data)
    return work
