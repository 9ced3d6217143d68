"""Every error that mphub raises. Messages say what was got, what was expected and what to do."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from math import inf
from operator import index


class MphubError(Exception):
    """The root of all errors of this package."""


class UsageError(MphubError):
    """The call was wrong: nothing happened."""


class InvalidKey(UsageError, ValueError):
    """A key or pattern that cannot be one."""


class InvalidOption(UsageError, ValueError):
    """An option, name or handler that cannot be one."""


class PayloadError(UsageError, TypeError):
    """A payload or result that cannot be sent."""


class NameTaken(UsageError, ValueError):
    """Another handler is subscribed under that name."""


class NoSubscriber(UsageError, LookupError):
    """Nobody subscribes to the key of a request or confirmed event."""


class AmbiguousKey(UsageError):
    """Several subscribers could answer a request; ``to=`` chooses."""


class HubError(MphubError):
    """The hub is not in the state that the call needs."""


class HubClosed(HubError):
    """The hub is not running, was stopped, or is gone."""


class HubExists(HubError):
    """Another process runs this hub."""


class HubFailed(HubError):
    """The hub's own processes died again and again."""


class StartFailed(HubError):
    """A subscriber did not become RUNNING; the cause has its traceback."""


class JournalError(HubError):
    """The journal cannot be used."""


class ArchiveError(HubError):
    """An archive cannot be written."""


class WorkError(MphubError):
    """Something became of an event that its sender did not wish."""


class HandlerCrashed(WorkError):
    """The process died while it handled a request, as often as was allowed."""

    def __init__(self, exit: str | int | None, pid: int | None) -> None:
        super().__init__(exit, pid)
        self.exit, self.pid = exit, pid

    def __str__(self) -> str:
        return f"the handler's process {self.pid} ended with {self.exit}"


class HandlerTimeout(WorkError, TimeoutError):
    """A handler overran ``limits.timeout`` (seconds)."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the handler ran longer than its limit of {self.seconds} s"


class EventExpired(WorkError, TimeoutError):
    """An event was not started in time."""


class Dropped(WorkError):
    """An event was dropped by a rule that the user set."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the event was dropped: {self.reason}"


class SubscriberFatal(WorkError):
    """A subscriber is not started any more and has work left; ``hub.subscription(name).restart()`` tries again.

    ``state``: FATAL after too many deaths in a row; STOPPED if its ``Restart.mode`` says so.
    """

    def __init__(self, name: str, state: str = "FATAL") -> None:
        super().__init__(name, state)
        self.name, self.state = name, state

    def __str__(self) -> str:
        return f"subscriber {self.name!r} is {self.state} with work left: mend the cause, then hub.subscription({self.name!r}).restart()"


class SubscriberPaused(WorkError):
    """A subscriber is paused with work left."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"subscriber {self.name!r} is PAUSED with work left"


class DeadLettersLeft(WorkError):
    """Events died in this run and were neither purged nor redriven.

    ``counts`` maps subscriber -> reason -> events, ``unmatched`` key -> events.
    """

    def __init__(self, counts: Mapping[str, Mapping[str, int]], unmatched: Mapping[str, int]) -> None:
        super().__init__(dict(counts), dict(unmatched))
        self.counts, self.unmatched = counts, unmatched

    def __str__(self) -> str:
        parts = [f"{name}: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()) for name, reasons in self.counts.items()]
        lost = f"; unmatched keys: {', '.join(map(repr, self.unmatched))}" if self.unmatched else ""
        return f"dead letters are left ({'; '.join(parts)}{lost}): see hub.dead_letters(), redrive or purge them, or pass check=False"


class DrainTimeout(MphubError, TimeoutError):
    """Work was left when the time was up; ``pending`` says how much of whom."""

    def __init__(self, message: str, pending: Mapping[str, int]) -> None:
        super().__init__(message, dict(pending))
        self.message, self.pending = message, pending

    def __str__(self) -> str:
        return self.message


class RemoteTraceback(Exception):
    """The traceback of another process, as the cause of its exception."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


class RemoteError(MphubError):
    """The text of an exception that cannot be loaded in this process."""


class Reject(Exception):
    """Raise in a handler: this event is a dead letter, now."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(Exception):
    """Raise in a handler: run this event again after some seconds; counts as an attempt.

    Raises InvalidOption.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < inf:
            raise InvalidOption(f"RetryLater(seconds): got {seconds!r}; expected a number of at least 0")
        super().__init__(seconds)
        self.seconds = seconds


class BatchFailed(Exception):
    """Raise in a handler of batches: these events failed, ``{place in the batch: exception}``; the others succeeded.

    ``results``: one for each payload, as the handler would have returned; those of the events that failed do not count.
    Raises InvalidOption.
    """

    def __init__(self, errors: Mapping[int, BaseException], results: Sequence[object] | None = None) -> None:
        if not isinstance(errors, Mapping) or not all(_is_place(i) and isinstance(e, BaseException) for i, e in errors.items()):
            raise InvalidOption(
                f"BatchFailed(errors): got {errors!r:.80}; expected a dict of places in the batch, from 0 on, to exceptions"
            )
        super().__init__(dict(errors), results)
        self.errors = {index(place): error for place, error in errors.items()}
        self.results = results

    def __str__(self) -> str:
        if not self.errors:
            return "no event of the batch failed"
        place, error = next(iter(self.errors.items()))
        return f"{len(self.errors)} events of the batch failed, first the one at {place}: {error!r}"


def _is_place(value: object) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__") and index(value) >= 0


def load_error(data: bytes, remote: str = "") -> BaseException:
    """Unpickle another process's exception, with its traceback there as the cause; a RemoteError if it cannot be loaded here."""
    error: object
    try:
        error = pickle.loads(data)
    except Exception as reason:
        last = remote.strip().rpartition("\n")[2] or "an exception"
        error = RemoteError(f"{last} (cannot be loaded here: {type(reason).__name__}: {reason})")
    if not isinstance(error, BaseException):
        error = RemoteError(f"{error!r} (no exception)")
    if remote:
        error.__cause__ = RemoteTraceback(remote)
    return error
