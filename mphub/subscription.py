"""A subscription, as its hub's process holds it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mphub.events import DeadLetter, Topic
from mphub.observe import html
from mphub.observe.progress import Watcher
from mphub.observe.statistics import SubscriberStatistics
from mphub.past import Moment
from mphub.reply import Reply
from mphub.results import AHEAD, Results
from mphub.subscribing import patterns_of, replicas_of
from mphub.wire.specs import Spec

if TYPE_CHECKING:
    from mphub.hub import EventHub

T = TypeVar("T")
R = TypeVar("R")


class Subscription(Generic[T, R]):
    """One subscriber: ask it, look at it, restart it, end it. Made by ``hub.subscribe``."""

    def __init__(self, hub: EventHub, spec: Spec, handler: object) -> None:
        self._hub, self._spec, self._handler = hub, spec, handler

    def __repr__(self) -> str:
        state = f": {self.state}" if self._hub._is_ours else ""
        return f"<Subscription {self.name!r} to {', '.join(self.keys)}{state}>"

    def _repr_html_(self) -> str:
        own = self.name
        return html.subscribers(repr(self), {own: self.keys}, lambda: {n: s for n, s in self._hub._figures().items() if n == own})

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._spec.patterns)

    @property
    def state(self) -> str:
        """STARTING, RUNNING, PAUSED, BACKOFF, STOPPING, STOPPED or FATAL."""
        return self._hub._state_of(self.name)

    def request(self, payload: T, *, expires: float | None = None) -> Reply[R]:
        """Ask this subscriber, which must start within ``expires`` seconds; the reply ends with its result or with why there is none."""
        return self._hub._request(self._own_key(), payload, self.name, expires)

    def map(
        self, payloads: Iterable[T], *, ordered: bool = True, errors: str = "raise", progress: Watcher = False, total: int | None = None
    ) -> Results[R]:
        """Ask it for each payload, a bounded number ahead; results come in the order of the payloads, or as they are done.

        errors: ``raise`` ends the loop with the first exception, ``return`` gives it in the place of the result. progress: True for a bar
        (rich) or lines, or a callable taking ``Progress``, ten times a second at most; total: how many, if the payloads do not know.
        Raises InvalidOption.
        """
        return Results(self.request, payloads, ordered=ordered, errors=errors, progress=progress, total=total, ahead=self._ahead)

    @property
    def _ahead(self) -> int:
        """Requests that are worth to be under way: while one batch of each replica runs, the next one fills."""
        size = self._spec.batch.size if self._spec.batch is not None else 1
        return max(AHEAD, 2 * size * self._spec.replicas)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until it is RUNNING; seconds.

        Raises StartFailed if it is FATAL first, TimeoutError.
        """
        self._hub._wait_ready(self.name, timeout)

    def restart(self) -> None:
        """End its process by the ladder and start another; charged to nobody. Also revives a FATAL one."""
        self._hub._operate(self.name, "restart")

    def pause(self) -> None:
        """Let what runs finish and start nothing more; what comes meanwhile waits, and beyond the inbox's bound becomes dead letters.

        It stays paused until ``resume``, also when its process or the supervisor dies.
        """
        self._hub._operate(self.name, "pause")

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._hub._operate(self.name, "resume")

    def scale(self, replicas: int | str) -> None:
        """Have so many replicas from now on (``"auto"``: one for each core); those that go finish what they run.

        Raises InvalidOption.
        """
        self._hub._change(self.name, "scale", replicas=replicas_of(replicas))

    def set_keys(self, keys: str | Topic[Any] | Sequence[str | Topic[Any]]) -> None:
        """Have the events of other keys or patterns from now on; what waits already stays.

        Raises InvalidKey.
        """
        self._hub._change(self.name, "set_keys", patterns=patterns_of(keys))

    def unsubscribe(self, *, drain: bool = True, forget: bool = False) -> None:
        """Route nothing more to it, let it finish what waits (or drop that, counted as ``unsubscribed``), and end it.

        Of one that is FATAL, STOPPED or PAUSED what waits is dropped in any case. A durable hub ends only its processes, unless told to
        ``forget``: what waits, and what is published for it from now on, waits for the next subscriber of its name.
        """
        self._hub._unsubscribe(self, drain=drain, forget=forget)

    def statistics(self) -> SubscriberStatistics:
        return self._hub.statistics().subscribers[self.name]

    def dead_letters(self) -> list[DeadLetter]:
        return self._hub.dead_letters(self.name)

    def replay(self, keys: str | Topic[Any] | Sequence[str | Topic[Any]] = ">", since: Moment = None, until: Moment = None) -> int:
        """Let it have events of the past again that are for it, under some keys and accepted from ``since`` on and before ``until``
        (seconds since the epoch, or a datetime); return how many.

        Nobody else gets them. Waits while its inbox is full. A delay, a time to expire and a priority do not hold any more.
        Raises InvalidKey, InvalidOption (this hub keeps no history), SubscriberPaused, SubscriberFatal (its inbox is full).
        """
        return self._hub._replay(self.name, keys, since, until)

    def redrive(self, ids: Collection[int] | None = None) -> int:
        """Let its dead letters (or those of some ids) wait again; return how many."""
        return self._hub.redrive(self.name, ids)

    def purge(self, ids: Collection[int] | None = None) -> int:
        """Drop its dead letters, counted as ``purged``; return how many."""
        return self._hub.purge(self.name, ids)

    def _own_key(self) -> str:
        """The key of its requests: its first pattern if that is a key, else its name."""
        first = self._spec.patterns[0]
        return self.name if "*" in first or ">" in first else first
