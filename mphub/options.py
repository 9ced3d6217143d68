"""Options: frozen, validated when made; an error names the field."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from mphub.errors import InvalidOption

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
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if found and found[2].upper() in _UNITS and (size := int(float(found[1]) * _UNITS[found[2].upper()])) > 0:
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


def check_number(owner: str, field: str, value: Any, least: float, *, whole: bool = False, above: bool = False) -> None:
    """Refuse what is no finite number from ``least`` on (or above it).

    Raises InvalidOption.
    """
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least or (above and value == least):
        kind = "an int" if whole else "a number"
        raise InvalidOption(f"{owner}({field}): got {value!r}; expected {kind} {'above' if above else 'of at least'} {least:g}")


def check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the words.

    Raises InvalidOption.
    """
    if value not in choices:
        raise InvalidOption(f"{owner}({field}): got {value!r}; expected one of {', '.join(map(repr, choices))}")


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
        return min(self.delay * self.factor ** min(deaths_in_a_row - 2, 1000), self.max_delay) if self.delay else 0.0


class Retry:
    """How often an event is tried.

    A death is redelivered up to ``max_attempts``; an exception only if it is an instance of ``on`` (a class or a tuple of them), after
    ``delay`` seconds that grow by ``factor`` up to ``max_delay``.
    """

    __slots__ = ("delay", "factor", "max_attempts", "max_delay", "on")

    def __init__(
        self,
        max_attempts: int = 3,
        *,
        on: type[BaseException] | tuple[type[BaseException], ...] = (),
        delay: float = 1.0,
        factor: float = 2.0,
        max_delay: float = 30.0,
    ) -> None:
        check_number("Retry", "max_attempts", max_attempts, 1, whole=True)
        classes = on if isinstance(on, tuple) else (on,)
        for one in classes:
            if not (isinstance(one, type) and issubclass(one, BaseException)):
                raise InvalidOption(f"Retry(on): got {one!r}; expected an exception class or a tuple of them")
        check_number("Retry", "delay", delay, 0)
        check_number("Retry", "factor", factor, 1)
        check_number("Retry", "max_delay", max_delay, 0)
        for field, value in zip(self.__slots__, (delay, factor, max_attempts, max_delay, classes), strict=True):
            object.__setattr__(self, field, value)

    max_attempts: int
    on: tuple[type[BaseException], ...]
    delay: float
    factor: float
    max_delay: float

    def __setattr__(self, field: str, value: object) -> None:
        raise AttributeError(f"Retry is frozen: make a new one instead of setting {field}")

    def __repr__(self) -> str:
        return (
            f"Retry(max_attempts={self.max_attempts}, on={self.on!r}, delay={self.delay}, factor={self.factor}, max_delay={self.max_delay})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Retry) and all(getattr(self, f) == getattr(other, f) for f in self.__slots__)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, f) for f in self.__slots__))


class Inbox(msgspec.Struct, frozen=True):
    """How much may wait for one subscriber, in events and bytes, and what becomes of more.

    ``block`` makes publishers of its keys wait while it is RUNNING; ``dead_letter`` makes dead letters with reason ``overflow``.
    """

    maxsize: int = 100_000
    max_bytes: int | str = "256MB"
    overflow: str = "block"
    expires: float | None = None

    def __post_init__(self) -> None:
        check_number("Inbox", "maxsize", self.maxsize, 1, whole=True)
        msgspec.structs.force_setattr(self, "max_bytes", parse_size(self.max_bytes, "Inbox(max_bytes)"))
        if self.overflow in ("drop_oldest", "drop_newest", "latest"):
            raise InvalidOption(f"Inbox(overflow): {self.overflow!r} is not available in this version; use 'block' or 'dead_letter'")
        check_choice("Inbox", "overflow", self.overflow, ("block", "dead_letter"))
        if self.expires is not None:
            raise InvalidOption("Inbox(expires): not available in this version; leave it None")


class Limits(msgspec.Struct, frozen=True):
    """Seconds that one event may run, and that a start may take."""

    timeout: float | None = None
    start_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.timeout is not None:
            check_number("Limits", "timeout", self.timeout, 0, above=True)
        check_number("Limits", "start_timeout", self.start_timeout, 0, above=True)


class Stop(msgspec.Struct, frozen=True):
    """The stop ladder: ask, wait ``ask`` seconds, SIGTERM, wait ``term`` seconds, SIGKILL."""

    ask: float = 5.0
    term: float = 2.0

    def __post_init__(self) -> None:
        check_number("Stop", "ask", self.ask, 0)
        check_number("Stop", "term", self.term, 0)


class Snapshot(msgspec.Struct, frozen=True):
    """When a subscriber's state is committed: after ``every`` events or ``period`` seconds, and at once when it is idle."""

    every: int = 1000
    period: float = 1.0

    def __post_init__(self) -> None:
        check_number("Snapshot", "every", self.every, 1, whole=True)
        check_number("Snapshot", "period", self.period, 0)
