"""From the arguments of ``subscribe`` to a spec: checked here, pickled once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, TypedDict

import msgspec

from mphub.core.keys import check_key, check_name, check_pattern
from mphub.errors import InvalidKey, InvalidOption
from mphub.events import Topic, str_of
from mphub.options import Batch, Inbox, Limits, Rate, Recycle, Restart, Retry, Snapshot, parse_share
from mphub.procs import boot, handlers
from mphub.subscriber import Subscriber
from mphub.wire import codec
from mphub.wire.frames import is_text
from mphub.wire.specs import NOWHERE, Spec, Surroundings

MAX_CONCURRENCY = 10_000
MAX_REPLICAS = 1000
"""Each is a process of 5 MB at least."""
THREAD_VARIABLES = (
    b"OMP_NUM_THREADS", b"OPENBLAS_NUM_THREADS", b"MKL_NUM_THREADS", b"BLIS_NUM_THREADS", b"VECLIB_MAXIMUM_THREADS",
    b"NUMEXPR_NUM_THREADS", b"NUMBA_NUM_THREADS", b"POLARS_MAX_THREADS",
)  # fmt: skip
"""What numeric libraries read when they are imported."""


class CommonOptions(TypedDict, total=False):
    """The options of ``subscribe`` that say nothing of what a handler is called with."""

    name: str | None
    to: str | Topic[Any] | None
    retry: Retry
    restart: Restart
    inbox: Inbox
    limits: Limits
    snapshot: Snapshot | None
    replicas: int | str
    ordered: bool
    concurrency: int
    process: str | None
    where: Where
    rate: Rate | None
    recycle: Recycle
    env: Mapping[str, str] | None
    replace: bool
    start: str


class PlainOptions(CommonOptions, total=False):
    """The options of ``subscribe`` for a function of one payload."""

    batch: None


class SubscribeOptions(CommonOptions, total=False):
    """The options of ``subscribe`` and ``subscriber``."""

    batch: Batch | None


Where = Callable[[Any], object] | Mapping[str, object] | None
Handler = Callable[..., object] | type[Subscriber[Any, Any]] | Subscriber[Any, Any] | str


def make_spec(
    keys: str | Topic[Any] | Sequence[str | Topic[Any]], handler: Handler, name: str, to: str | Topic[Any] | None,
    retry: Retry, restart: Restart, inbox: Inbox, limits: Limits, snapshot: Snapshot | None, replicas: int | str,
    env: Mapping[str, str] | None, initializer: bytes, where: Where, ordered: bool, rate: Rate | None, recycle: Recycle,
    batch: Batch | None, concurrency: int, process: str | None, start: str,
) -> Spec:  # fmt: skip
    """Check a subscription and pickle its handler.

    Raises InvalidKey, InvalidOption, PayloadError.
    """
    handlers.check_handler(handler, batched=batch is not None)
    if where is not None:
        handlers.check_where(where)
    check_types(retry=(retry, Retry), restart=(restart, Restart), inbox=(inbox, Inbox), limits=(limits, Limits))
    target = None if to is None else check_key(str_of(to))
    work = handlers.Work(handler, retry.on, retry.delay, retry.factor, retry.max_delay, target, where)
    cls = handlers.subscriber_class(handler)
    saves = snapshot_rule(cls, snapshot)
    check_concurrency(concurrency, saves, batch)
    if process is not None:
        check_shared(
            replicas=(replicas, 1), ordered=(ordered, False), batch=(batch, None), snapshot=(saves, None), recycle=(recycle, Recycle()),
            rate=(rate, None), env=(env or None, None), limits=(limits.timeout, None), inbox=(inbox.overflow, "block"),
        )  # fmt: skip
    return Spec(
        name=check_name(name), patterns=patterns_of(keys), handler=codec.encode(work, f"the handler of {name!r}"),
        surroundings=surroundings(env or {}) if process is None else NOWHERE, initializer=initializer if process is None else b"",
        process=process and host_name(process),
        inbox=inbox, limits=limits, restart=restart, max_attempts=retry.max_attempts,
        snapshot=saves, answers=True if cls is None else cls.answers,
        replicas=replicas_of(replicas), ordered=ordered, rate=rate, batch=batch, concurrency=concurrency,
        recycle=in_bytes(recycle), start=start,
    )  # fmt: skip


def host_name(process: str) -> str:
    """Return what the process is called that some subscribers share: no subscriber has such a name.

    Raises InvalidOption.
    """
    return f"process:{check_name(process, 'process')}"


def check_shared(**options: tuple[object, object]) -> None:
    """Refuse what one of several subscribers that share a process cannot have by itself.

    Raises InvalidOption.
    """
    for field, (value, usual) in options.items():
        if value != usual:
            what = {"limits": "limits(timeout)", "inbox": "inbox(overflow)"}.get(field, field)
            raise InvalidOption(f"{what}: got {value!r:.60} with process=, whose subscribers share one process; leave out one of the two")


def host_of(spec: Spec, initializer: bytes) -> Spec:
    """Return the process of a subscriber that is the first one there."""
    assert spec.process is not None
    return Spec(
        name=spec.process, patterns=[], handler=b"", surroundings=surroundings({}), inbox=spec.inbox, limits=spec.limits,
        restart=spec.restart, max_attempts=1, initializer=initializer, answers=False, hosts=True,
    )  # fmt: skip


def check_same(spec: Spec, host: Spec) -> None:
    """Refuse what differs from what the first subscriber of a process has set for it.

    Raises InvalidOption.
    """
    for field in ("restart", "inbox", "limits"):
        value, first = getattr(spec, field), getattr(host, field)
        if value != first:
            raise InvalidOption(f"{field}: got {value!r:.120}; expected {first!r:.120}, which the first subscriber of this process has set")


def patterns_of(keys: object) -> list[str]:
    """Return the patterns, each once.

    Raises InvalidKey.
    """
    if isinstance(keys, str | Topic):
        keys = [keys]
    if not isinstance(keys, list | tuple | set | frozenset) or not keys:
        raise InvalidKey(f"keys: got {type(keys).__name__} {keys!r:.60}; expected a key, pattern, Topic, or a list of them")
    return list(dict.fromkeys(check_pattern(str_of(key)) for key in keys))


def replicas_of(replicas: int | str) -> int:
    """Return how many processes: as many as this one may use cores if ``"auto"``.

    Raises InvalidOption.
    """
    if replicas == "auto":
        return boot.cpu_limit()
    if isinstance(replicas, bool) or not isinstance(replicas, int) or not 1 <= replicas <= MAX_REPLICAS:
        raise InvalidOption(f"replicas: got {replicas!r:.60}; expected an int from 1 to {MAX_REPLICAS}, or 'auto'")
    return replicas


def in_bytes(recycle: Recycle) -> Recycle:
    """Return it with bytes in place of a percentage."""
    if not isinstance(recycle.max_rss, str):
        return recycle
    return msgspec.structs.replace(recycle, max_rss=parse_share(recycle.max_rss, boot.memory_limit(), "Recycle(max_rss)"))


def check_concurrency(count: int, snapshot: Snapshot | None, batch: Batch | None) -> None:
    """Refuse what is no number of events that one process can run at a time.

    Raises InvalidOption.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_CONCURRENCY:
        raise InvalidOption(f"concurrency: got {count!r:.60}; expected an int from 1 to {MAX_CONCURRENCY}")
    if count > 1 and snapshot is not None:
        raise InvalidOption(f"concurrency: got {count} with snapshots, which would hold half of the events that run; use replicas instead")
    if count > 1 and batch is not None:
        raise InvalidOption(
            f"concurrency: got {count} with batch=, which handles several at once already: use replicas for several batches"
        )


def snapshot_rule(cls: type[Subscriber[Any, Any]] | None, rule: Snapshot | None) -> Snapshot | None:
    """Return when snapshots are taken: by default whenever the class defines ``snapshot``."""
    defines = cls is not None and cls.snapshot is not Subscriber.snapshot
    if rule is None:
        return Snapshot() if defines else None
    check_types(snapshot=(rule, Snapshot))
    if cls is not None and not defines:
        raise InvalidOption(f"snapshot: class {cls.__name__} has no snapshot() and restore(): define both")
    if cls is None:
        raise InvalidOption("snapshot: the handler is a function; only a Subscriber class can have snapshot() and restore()")
    return rule


def surroundings(env: Mapping[str, str]) -> Surroundings:
    """Note what this process looks like now, and what is to differ: every incarnation begins with it.

    Raises InvalidOption.
    """
    if not isinstance(env, Mapping) or not all(is_variable(name, value) for name, value in env.items()):
        raise InvalidOption(f"env: got {env!r:.80}; expected a mapping of str to str, as for os.environ")
    path = [os.getcwdb() if entry == "" else os.fsencode(entry) for entry in sys.path]
    changed = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
    return Surroundings(os.getcwdb(), path, dict(os.environb) | changed)


def is_variable(name: object, value: object) -> bool:
    return is_text(name) and is_text(value) and name != "" and "=" not in str(name) and "\0" not in f"{name}{value}"


def share_cores(spec: Spec, processes: int) -> Spec:
    """Let numeric libraries use no more threads than a process's share of the cores, unless the user has said how many.

    Else eight replicas with eight BLAS threads each crowd eight cores eightfold (joblib and loky do the same).
    """
    if processes == 1:
        return spec
    share = str(max(1, boot.cpu_limit() // processes)).encode()
    environment = dict.fromkeys(THREAD_VARIABLES, share) | spec.surroundings.environment
    return msgspec.structs.replace(spec, surroundings=msgspec.structs.replace(spec.surroundings, environment=environment))


def refuse_process_options(engine: str, limits: Limits, recycle: Recycle, env: Mapping[str, str] | None) -> None:
    """Refuse what only a process of its own can have.

    Raises InvalidOption.
    """
    if limits.timeout is not None:
        where = "your thread" if engine == "inline" else "threads of this process"
        raise InvalidOption(f"limits(timeout): the {engine} engine runs handlers in {where} and cannot end one; use engine='process'")
    if recycle != Recycle():
        raise InvalidOption(f"recycle: the {engine} engine runs handlers in this process, which cannot be replaced; use engine='process'")
    if env:
        raise InvalidOption(f"env: the {engine} engine runs handlers in this process: set os.environ, or use engine='process'")


def check_types(**options: tuple[object, type | UnionType]) -> None:
    for field, (value, wanted) in options.items():
        if not isinstance(value, wanted):
            name = str(wanted) if isinstance(wanted, UnionType) else wanted.__name__ + ("" if wanted is bool else "(...)")
            raise InvalidOption(f"{field}: got {value!r:.60}; expected {name}")
