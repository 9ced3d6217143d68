"""History as its user sees it: the router's rows, one after the other, as events and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from math import inf
from typing import Any

from mphub.core.spans import contains, indexes
from mphub.errors import InvalidOption, PayloadError
from mphub.events import EventId, HistoryRow, Outcome
from mphub.store.blobs import Blobs
from mphub.wire.frames import Extra, PastRow, split, views
from mphub.wire.payloads import Codec

Moment = float | datetime | None
"""Seconds since the epoch, a datetime (of local time if it names no zone), or no bound."""


def span_of(since: Moment, until: Moment) -> tuple[float, float]:
    """Return from when on and until when, in seconds since the epoch.

    Raises InvalidOption.
    """
    return seconds_of("since", since, 0.0), seconds_of("until", until, inf)


def seconds_of(field: str, moment: Moment, default: float) -> float:
    if moment is None:
        return default
    try:
        if isinstance(moment, datetime):
            return moment.timestamp()
        if isinstance(moment, int | float) and not isinstance(moment, bool) and moment == moment:
            return float(moment)
    except (OverflowError, ValueError, OSError):  # a time of no calendar, or a year that the clock of this machine does not know
        pass
    raise InvalidOption(f"{field}: got {moment!r:.60}; expected seconds since the epoch, a datetime, or None")


def events_of(row: PastRow, blobs: Blobs, codec: Codec) -> Iterator[HistoryRow]:
    """Yield the events of a row."""
    batch, events = row.batch, [] if row.batch.blob is not None else split(row.body)
    for index in indexes(row.spans):
        extra = (batch.extras or {}).get(index, Extra())
        yield HistoryRow(
            id=EventId.make(batch.publisher, batch.number + index), key=batch.key(index), ordering_key=extra.ordering_key,
            priority=extra.priority, headers=extra.headers or {}, published_at=batch.published_at, accepted_at=row.at,
            outcomes=outcomes_of(row, index), _read=reader(row, index, events, blobs, codec),
        )  # fmt: skip


def outcomes_of(row: PastRow, index: int) -> dict[str, Outcome]:
    outcomes = {name: Outcome("waiting") for name, spans in row.matched.items() if spans is None or contains(spans, index)}
    for subscriber, first, end in row.ends:
        if first <= index < end.behind:
            outcomes[subscriber] = Outcome(end.state, end.reason, end.attempts, end.seconds, end.at)
    return outcomes


def reader(row: PastRow, index: int, events: list[bytes], blobs: Blobs, codec: Codec) -> Callable[[], Any]:
    """Return what reads the payload of an event when it is wanted."""
    if (name := row.batch.blob) is None:
        return lambda: codec.load_any(events[index])

    def read() -> Any:
        try:
            data = blobs.copy(name)
        except FileNotFoundError:
            raise PayloadError("this payload was large, and history has let it go since: read payloads while you go through it") from None
        return codec.load_any(bytes(data if row.batch.count == 1 else views(data)[index]))

    return read
