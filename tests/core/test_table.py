"""The routing table gives what trying every pattern gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mphub.core import table
from mphub.core.keys import matches
from mphub.core.table import RoutingTable

TOKEN = st.sampled_from(["a", "b", "c"])
KEY = st.lists(TOKEN, min_size=1, max_size=4).map(".".join)
PATTERN = st.tuples(st.lists(st.one_of(TOKEN, st.just("*")), max_size=3), st.one_of(TOKEN, st.sampled_from(["*", ">"]))).map(
    lambda parts: ".".join([*parts[0], parts[1]])
)


class Box:
    """Somebody who subscribes."""


@settings(deadline=None)
@given(st.lists(st.lists(PATTERN, min_size=1, max_size=3), max_size=6), st.sets(st.integers(0, 5)), st.lists(KEY, max_size=12))
def test_it_matches_as_trying_every_pattern_does(subscriptions: list[list[str]], leaving: set[int], keys: list[str]) -> None:
    routes: RoutingTable[Box] = RoutingTable()
    boxes = [Box() for _ in subscriptions]
    for box, patterns in zip(boxes, subscriptions, strict=True):
        for pattern in patterns:
            routes.add(pattern, box)
    for key in keys:  # the cache must not outlive what comes now
        routes.match(key)
    for i in leaving:
        if i < len(boxes):
            routes.remove(boxes[i])
    for key in keys:
        expected = [
            box
            for i, (box, patterns) in enumerate(zip(boxes, subscriptions, strict=True))
            if i not in leaving and any(matches(pattern, key) for pattern in patterns)
        ]
        assert list(routes.match(key)) == expected


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_CACHED", 10)
    routes: RoutingTable[str] = RoutingTable()
    routes.add("k.*", "one")
    for n in range(100):
        assert routes.match(f"k.{n}") == ("one",)
        assert len(routes._cache) <= 10
