"""Keys, patterns and names: what is one, and what an error says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mphub.core.keys import check_key, check_name, check_pattern, matches, nearest
from mphub.errors import InvalidKey, InvalidOption

TOKENS = st.text(st.sampled_from("ab_-é0"), min_size=1, max_size=3)
KEYS = st.lists(TOKENS, min_size=1, max_size=4).map(".".join)


@given(KEYS)
def test_dot_separated_tokens_are_a_key_and_match_themselves(key: str) -> None:
    assert check_key(key) == check_pattern(key) == key
    assert matches(key, key)
    assert matches(">", key)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("", "0 characters"),
        ("k" * 256, "256 characters"),
        ("a..b", "empty token"),
        (".a", "empty token"),
        ("a.", "empty token"),
        ("a b", "whitespace"),
        ("a\nb", "whitespace"),
        ("a\x00", "control"),
        ("a.\ud800", "lone surrogate"),
        ("a.*", "wildcards belong in subscribe"),
        (">", "wildcards belong in subscribe"),
    ],
)
def test_what_is_no_key_is_explained(key: str, why: str) -> None:
    with pytest.raises(InvalidKey, match=why) as caught:
        check_key(key)
    assert str(caught.value).startswith("key: got ")


@pytest.mark.parametrize("key", [None, 3, b"orders", ["orders"]])
def test_a_key_is_a_str(key: Any) -> None:
    with pytest.raises((InvalidKey, TypeError)):
        check_key(key)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [("a.>.b", "last token"), ("a.b*", "token of its own"), ("a.>b", "token of its own"), ("a..*", "empty token"), ("", "0 characters")],
)
def test_what_is_no_pattern_is_explained(pattern: str, why: str) -> None:
    with pytest.raises(InvalidKey, match=why) as caught:
        check_pattern(pattern)
    assert str(caught.value).startswith("pattern: got ")


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*", "a", True),
        ("*.b", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        ("*.>", "a.b", True),
        ("a.b", "a.c", False),
    ],
)
def test_wildcards_are_nats_words(pattern: str, key: str, expected: bool) -> None:
    assert matches(pattern, key) is expected


@pytest.mark.parametrize("name", ["", "a b", "a.b", "é", "n" * 65, None])
def test_what_is_no_name_is_explained(name: str) -> None:
    with pytest.raises(InvalidOption, match="name: got"):
        check_name(name)


def test_a_misspelt_key_has_a_nearest_pattern() -> None:
    assert nearest("order.created", ["orders.created", "users.>"]) == "orders.created"
    assert nearest("zzz", ["orders.created"]) is None
