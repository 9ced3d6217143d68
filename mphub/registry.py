"""Who is subscribed to a hub: by name, by handler, by key."""

from __future__ import annotations

from typing import Any

from mphub.core.keys import MAX_CACHED, matches, nearest
from mphub.errors import AmbiguousKey, InvalidOption, NameTaken, NoSubscriber
from mphub.procs import handlers
from mphub.subscribing import Handler
from mphub.subscription import Subscription


class Registry(dict[str, Subscription[Any, Any]]):
    """A hub's subscriptions by name, in the order made."""

    def __init__(self) -> None:
        super().__init__()
        self._answering: dict[str, str] = {}
        """key -> who answers it, of those that were asked for."""

    def free_name(self, handler: Handler, name: str | None, *, replace: bool = False, batched: bool = False, durable: bool = False) -> str:
        """Return the name asked for, or one after the handler; the same handler once more gets a number, unless it is to be replaced.

        Raises InvalidOption, NameTaken.
        """
        if name is not None:
            if name in self and not replace:
                raise NameTaken(f"name: {name!r} is subscribed already: choose another, pass replace=True, or unsubscribe that one first")
            return name
        handlers.check_handler(handler, batched=batched)
        base = handlers.default_name(handler)
        nameless = isinstance(handler, str) or getattr(handler, "__name__", "<lambda>") == "<lambda>"
        taken = self.get(base)
        if durable and (nameless or taken is not None):
            raise InvalidOption(
                f"name: got None for {handler!r:.60}; expected a name, which a durable hub does not guess: by it is found what waits"
            )
        if taken is None:
            return base
        if replace and not nameless:
            return base
        if taken._handler is not handler and not nameless:
            raise NameTaken(f"name: another handler is subscribed as {base!r}: pass name= to tell them apart")
        number = 2
        while f"{base}-{number}" in self:
            number += 1
        return f"{base}-{number}"

    def find(self, name_or_handler: object) -> Subscription[Any, Any]:
        """Return a subscription by name or handler.

        Raises NoSubscriber with the nearest name.
        """
        if isinstance(name_or_handler, str) and name_or_handler in self:
            return self[name_or_handler]
        for subscription in self.values():
            if name_or_handler in (subscription.name, subscription._handler) or name_or_handler is subscription._handler:
                return subscription
        near = nearest(str(name_or_handler), self)
        hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(self) or 'none'}"
        raise NoSubscriber(f"no subscription {name_or_handler!r}; {hint}")

    def matching(self, key: str) -> list[Subscription[Any, Any]]:
        """Return those whose patterns match a key."""
        return [s for s in self.values() if any(matches(pattern, key) for pattern in s.keys)]

    def answerer(self, key: str, to: str | None) -> str:
        """Return the name of the one that answers requests of a key.

        Raises NoSubscriber, AmbiguousKey.
        """
        if to is not None:
            return self.find(to).name
        found = self._answering.get(key)
        if found is None:
            if len(self._answering) >= MAX_CACHED:
                self._answering.clear()
            found = self._answering[key] = self._only_answerer(key)
        return found

    def changed(self) -> None:
        """Forget who answers: a subscription has come, gone or changed its keys."""
        self._answering.clear()

    def _only_answerer(self, key: str) -> str:
        answering = [s.name for s in self.matching(key) if s._spec.answers]
        if len(answering) == 1:
            return answering[0]
        if answering:
            raise AmbiguousKey(f"{key!r} has several subscribers that answer: {', '.join(answering)}; choose one with to=")
        near = nearest(key, [pattern for s in self.values() for pattern in s.keys])
        raise NoSubscriber(f"no subscriber answers {key!r}" + (f" (nearest pattern: {near!r})" if near else ""))
