"""Spans: ranges of event indexes in a row. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter

Spans = list[tuple[int, int]]
"""Ranges [first, last) of event indexes in a row, ascending."""


def length(spans: Spans) -> int:
    if len(spans) == 1:  # nearly always
        return spans[0][1] - spans[0][0]
    return sum(b - a for a, b in spans)


def contains(spans: Spans, index: int) -> bool:
    return any(a <= index < b for a, b in spans)


def indexes(spans: Spans) -> Iterator[int]:
    for a, b in spans:
        yield from range(a, b)


def first_of(spans: Spans, count: int) -> Spans:
    """Return the first so many indexes of some spans."""
    found: Spans = []
    for a, b in spans:
        if count <= 0:
            break
        found.append((a, min(b, a + count)))
        count -= b - a
    return found


def spans_of(numbers: Iterable[int]) -> Spans:
    """Join ascending indexes to spans."""
    spans: Spans = []
    for i in numbers:
        if spans and spans[-1][1] == i:
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
    return spans


def within(spans: Spans, first: int, end: int) -> Spans:
    """Return the part of some spans, ascending, that is in [first, end)."""
    found: Spans = []
    for at in range(bisect_right(spans, first, key=itemgetter(1)), len(spans)):
        a, b = spans[at]
        if a >= end:
            break
        found.append((max(a, first), min(b, end)))
    return found


def subtract(spans: Spans, gone: Spans) -> Spans:
    """Return ``spans`` without ``gone``; both ascending."""
    if not gone:
        return spans
    count = len(gone)
    if gone == spans[:count]:  # nearly always: the first ones
        return spans[count:]
    left: Spans = []
    cuts = iter(gone)
    cut = next(cuts, None)
    for a, b in spans:
        start = a
        while cut is not None and cut[1] <= start:
            cut = next(cuts, None)
        while cut is not None and cut[0] < b:
            if cut[0] > start:
                left.append((start, cut[0]))
            start = max(start, cut[1])
            if cut[1] > b:
                break
            cut = next(cuts, None)
        if start < b:
            left.append((start, b))
    return left
