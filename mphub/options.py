"""Options: frozen, validated when made; an error names the field."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

import msgspec

from mphub.errors import InvalidOption

MOST = 2**63 - 1
"""What any header can carry."""
MOST_TOGETHER = 8192
"""Events that one process holds for a handler at most."""
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(value: int | str, field: str = "size") -> int:
    """Return bytes from ``512``, ``"512MB"`` or ``"0.5GiB"``.

    Raises InvalidOption.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if found and found[2].upper() in _UNITS and 0 < (size := int(float(found[1][:25]) * _UNITS[found[2].upper()])) <= MOST:
        return size
    raise InvalidOption(f"{field}: got {value!r}; expected bytes as a positive int or a size such as '512MB' or '2GiB'")


def parse_share(value: int | str, total: int, field: str = "max_bytes") -> int:
    """Return bytes from a size, or from a percentage of ``total``.

    Raises InvalidOption.
    """
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1])
        except ValueError:
            share = math.nan
        if 0 < share <= 100:
            return max(1, int(total * share / 100))
        raise InvalidOption(f"{field}: got {value!r}; expected a percentage above 0% up to 100%")
    return parse_size(value, field)


def check_share(value: int | str, field: str) -> int | str:
    """Return bytes, or a percentage as it is: the hub knows of what.

    Raises InvalidOption.
    """
    share = parse_share(value, 100, field)
    return value if isinstance(value, str) and value.strip().endswith("%") else share


def check_number(owner: str, field: str, value: Any, least: float, *, whole: bool = False, above: bool = False) -> None:
    """Refuse what is no finite number from ``least`` on (or above it).

    Raises InvalidOption.
    """
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= MOST  # not so for nan
    if not good or (above and value == least):
        kind = "an int" if whole else "a number"
        raise InvalidOption(f"{owner}({field}): got {value!r}; expected {kind} {'above' if above else 'of at least'} {least:g}")


def backoff(delay: float, factor: float, repeats: int, max_delay: float) -> float:
    """Return the seconds before the next try: ``delay`` times ``factor`` for each repeat, at most ``max_delay``."""
    try:
        return min(delay * float(factor) ** repeats, max_delay)
    except OverflowError:
        return max_delay if delay else 0.0


def check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the words.

    Raises InvalidOption.
    """
    if value not in choices:
        raise InvalidOption(f"{owner}({field}): got {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_timeout(timeout: float | None) -> float | None:
    """Return seconds to wait, or None for as long as it takes.

    Raises InvalidOption.
    """
    if timeout is not None and (not isinstance(timeout, int | float) or isinstance(timeout, bool) or math.isnan(timeout)):
        raise InvalidOption(f"timeout: got {timeout!r:.60}; expected seconds as a number, or None")
    return timeout


def refuse_unavailable(**options: tuple[object, object]) -> None:
    """Refuse options of later versions.

    Raises InvalidOption.
    """
    for field, (value, default) in options.items():
        if value != default:
            raise InvalidOption(f"{field}: got {value!r:.60}; this version has only {field}={default!r}")


class Restart(msgspec.Struct, frozen=True):
    """When a process that died is started again.

    More than ``max_restarts`` deaths in a row with no event finished in between make it FATAL. The first restart is immediate; the delay
    (seconds) grows by ``factor`` from the second death in a row up to ``max_delay`` and goes back with each finished event.
    """

    mode: str = "always"
    max_restarts: int = 8
    delay: float = 0.1
    factor: float = 2.0
    max_delay: float = 30.0

    def __post_init__(self) -> None:
        check_choice("Restart", "mode", self.mode, ("always", "on-failure", "never"))
        check_number("Restart", "max_restarts", self.max_restarts, 0, whole=True)
        check_number("Restart", "delay", self.delay, 0)
        check_number("Restart", "factor", self.factor, 1)
        check_number("Restart", "max_delay", self.max_delay, 0)

    def delay_for(self, deaths_in_a_row: int) -> float:
        """Return the seconds before the next start."""
        if deaths_in_a_row <= 1:
            return 0.0
        return backoff(self.delay, self.factor, deaths_in_a_row - 2, self.max_delay)


@dataclass(frozen=True)
class Retry:
    """How often an event is tried.

    A death is redelivered up to ``max_attempts``; an exception only if it is an instance of ``on`` (a class or a tuple of them), after
    ``delay`` seconds that grow by ``factor`` up to ``max_delay``.
    """

    max_attempts: int = 3
    _: KW_ONLY
    on: type[BaseException] | tuple[type[BaseException], ...] = ()
    delay: float = 1.0
    factor: float = 2.0
    max_delay: float = 30.0

    def __post_init__(self) -> None:
        check_number("Retry", "max_attempts", self.max_attempts, 1, whole=True)
        object.__setattr__(self, "on", self.on if isinstance(self.on, tuple) else (self.on,))
        for one in self.on if isinstance(self.on, tuple) else ():
            if not (isinstance(one, type) and issubclass(one, BaseException)):
                raise InvalidOption(f"Retry(on): got {one!r}; expected an exception class or a tuple of them")
        check_number("Retry", "delay", self.delay, 0)
        check_number("Retry", "factor", self.factor, 1)
        check_number("Retry", "max_delay", self.max_delay, 0)


OVERFLOWS = ("block", "dead_letter", "drop_oldest", "drop_newest", "latest")


class Inbox(msgspec.Struct, frozen=True):
    """How much may wait for one subscriber, in events and bytes, and what becomes of more.

    ``block`` makes publishers of its keys wait while it is RUNNING; ``dead_letter`` makes dead letters with reason ``overflow``;
    ``drop_oldest`` and ``drop_newest`` drop, counted as ``overflow``; ``latest`` keeps the newest event of each key, whatever the size, and
    drops the oldest keys beyond it. ``expires``: seconds after which, in a durable hub, what waits for a name that nobody subscribes is
    dropped, with a notice.
    """

    maxsize: int = 100_000
    max_bytes: int | str = "256MB"
    overflow: str = "block"
    expires: float | None = None

    def __post_init__(self) -> None:
        check_number("Inbox", "maxsize", self.maxsize, 1, whole=True)
        msgspec.structs.force_setattr(self, "max_bytes", check_share(self.max_bytes, "Inbox(max_bytes)"))
        check_choice("Inbox", "overflow", self.overflow, OVERFLOWS)
        if self.expires is not None:
            check_number("Inbox", "expires", self.expires, 0)


class Limits(msgspec.Struct, frozen=True):
    """Seconds that one event may run, and that a start may take."""

    timeout: float | None = None
    start_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.timeout is not None:
            check_number("Limits", "timeout", self.timeout, 0, above=True)
        check_number("Limits", "start_timeout", self.start_timeout, 0, above=True)


class Recycle(msgspec.Struct, frozen=True):
    """When a process is replaced: once it has run ``max_events`` events, is ``max_age`` seconds old, or takes more than ``max_rss`` bytes.

    ``max_rss`` is a size, or a percentage of the memory (of the cgroup, if that has less). Whichever comes first counts.
    """

    max_events: int | None = None
    max_age: float | None = None
    max_rss: int | str | None = None

    def __post_init__(self) -> None:
        if self.max_events is not None:
            check_number("Recycle", "max_events", self.max_events, 1, whole=True)
        if self.max_age is not None:
            check_number("Recycle", "max_age", self.max_age, 0, above=True)
        if self.max_rss is not None:
            msgspec.structs.force_setattr(self, "max_rss", check_share(self.max_rss, "Recycle(max_rss)"))


class Stop(msgspec.Struct, frozen=True):
    """The stop ladder: ask, wait ``ask`` seconds, SIGTERM, wait ``term`` seconds, SIGKILL."""

    ask: float = 5.0
    term: float = 2.0

    def __post_init__(self) -> None:
        check_number("Stop", "ask", self.ask, 0)
        check_number("Stop", "term", self.term, 0)


class Retention(msgspec.Struct, frozen=True):
    """How much history a durable hub keeps: what is older than ``max_age`` seconds goes, and of more than ``max_bytes`` the oldest.

    ``max_bytes`` is a size, or a percentage of the disk; the hub's own ``max_bytes``, of what is unfinished, comes on top.
    """

    max_age: float | None = None
    max_bytes: int | str = "25%"

    def __post_init__(self) -> None:
        if self.max_age is not None:
            check_number("Retention", "max_age", self.max_age, 0, above=True)
        msgspec.structs.force_setattr(self, "max_bytes", check_share(self.max_bytes, "Retention(max_bytes)"))


class Rate(msgspec.Struct, frozen=True):
    """At most ``count`` events start in any ``per`` seconds; what exceeds that waits, or is dropped on arrival, counted as ``rate``."""

    count: int
    per: float
    excess: str = "wait"

    def __post_init__(self) -> None:
        check_number("Rate", "count", self.count, 1, whole=True)
        check_number("Rate", "per", self.per, 0, above=True)
        check_choice("Rate", "excess", self.excess, ("wait", "drop"))


class Snapshot(msgspec.Struct, frozen=True):
    """When a subscriber's state is committed: after ``every`` events or ``period`` seconds, and at once when it is idle."""

    every: int = 1000
    period: float = 1.0

    def __post_init__(self) -> None:
        check_number("Snapshot", "every", self.every, 1, whole=True)
        check_number("Snapshot", "period", self.period, 0)


class Batch(msgspec.Struct, frozen=True):
    """How many events a handler gets with one call: ``size``, or those that have come ``wait`` seconds after the first of them."""

    size: int = 100
    wait: float = 0.05

    def __post_init__(self) -> None:
        check_number("Batch", "size", self.size, 1, whole=True)
        if self.size > MOST_TOGETHER:
            raise InvalidOption(f"Batch(size): got {self.size!r}; expected an int from 1 to {MOST_TOGETHER}")
        check_number("Batch", "wait", self.wait, 0)
