"""Keys and patterns: dot-separated tokens; ``*`` is one token, ``>`` the rest (one or more)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from mphub.errors import InvalidKey, InvalidOption

MAX_LENGTH = 255
MAX_CACHED = 1 << 17
"""Keys that a process remembers; beyond that each costs a publisher and the router some microseconds more."""
_TOKEN = re.compile(r"[^\s.*>\x00-\x1f\x7f\ud800-\udfff]+")
_KEY = re.compile(rf"{_TOKEN.pattern}(?:\.{_TOKEN.pattern})*")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


known: set[str] = set()
"""Keys that have been checked; a set, as a least-recently-used cache of many keys costs twice as much."""


def check_key(key: str) -> str:
    """Return a key that events can have.

    Raises InvalidKey.
    """
    if type(key) is str and key in known:
        return key
    if not (isinstance(key, str) and len(key) <= MAX_LENGTH and _KEY.fullmatch(key)):
        _check(key, "key", wild=False)  # which says what is wrong
    if len(known) >= MAX_CACHED:
        known.clear()
    known.add(key)
    return key


@lru_cache(maxsize=MAX_CACHED)
def check_pattern(pattern: str) -> str:
    """Return a pattern that can be subscribed to.

    Raises InvalidKey.
    """
    _check(pattern, "pattern", wild=True)
    return pattern


def _check(key: str, what: str, *, wild: bool) -> None:
    if not isinstance(key, str):
        raise InvalidKey(f"{what}: got {type(key).__name__} {key!r:.60}; expected a str such as 'orders.created', or a Topic")
    if not 1 <= len(key) <= MAX_LENGTH:
        raise InvalidKey(f"{what}: got {len(key)} characters; expected 1 to {MAX_LENGTH}")
    tokens = key.split(".")
    for i, token in enumerate(tokens):
        if wild and (token == "*" or (token == ">" and i == len(tokens) - 1)):
            continue
        if not _TOKEN.fullmatch(token):
            raise InvalidKey(f"{what}: got {key!r}; {_why(token, wild=wild)}")


def _why(token: str, *, wild: bool) -> str:
    if token == "":
        return "it has an empty token: expected tokens between single dots, as in 'orders.created'"
    if not wild and ("*" in token or ">" in token):
        return "wildcards belong in subscribe(); publish to one key, as in 'orders.created'"
    if wild and token == ">":
        return "'>' stands for the rest: it can only be the last token"
    if wild and ("*" in token or ">" in token):
        return f"a wildcard is a token of its own, unlike in {token!r}: expected '*' or '>' alone between dots"
    if any("\ud800" <= character <= "\udfff" for character in token):
        return f"token {token!r} has a lone surrogate, which utf-8 cannot encode: put such a text into the payload"
    return f"token {token!r} has whitespace or a control character: use '_' or '-' instead"


def check_name(name: str, field: str = "name") -> str:
    """Return a subscriber's name.

    Raises InvalidOption.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidOption(f"{field}: got {name!r:.80}; expected 1 to 64 letters, digits, '_' or '-'")
    return name


def check_target(name: str | None) -> str | None:
    """Return the name of the one that is to answer, if any.

    Raises InvalidOption.
    """
    return None if name is None else check_name(name, "to")


def matches(pattern: str, key: str) -> bool:
    """Say whether a key falls under a pattern."""
    wanted, got = pattern.split("."), key.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(got) <= len(wanted):
            return False
        got = got[: len(wanted)]
    return len(wanted) == len(got) and all(w in ("*", g) for w, g in zip(wanted, got, strict=True))


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the most similar word, if one is similar at all."""
    import difflib  # for an error message only

    return next(iter(difflib.get_close_matches(word, list(words), 1, 0.6)), None)
