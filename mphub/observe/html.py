"""What notebooks show of a hub, its subscriptions, figures and answers: small tables, every text in them escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mphub.observe.statistics import SubscriberStatistics

FIGURES = ("waiting", "running", "handled", "dead", "mean")


def table(caption: str, head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a table as HTML."""
    above = f"<caption>{escape(caption)}</caption><thead>{row('th', head)}</thead>"
    return f"<table>{above}<tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table>"


def row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"


def figures(of: SubscriberStatistics | None) -> list[str]:
    """Return what is told of one subscriber, empty while nothing is known."""
    if of is None:
        return [""] * len(FIGURES)
    return [f"{count:,}" for count in (of.waiting, of.running, of.handled, of.dead)] + [duration(of.mean)]


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def subscribers(caption: str, keys: Mapping[str, Sequence[str]], ask: Callable[[], Mapping[str, SubscriberStatistics]]) -> str:
    """Return a table of subscribers, those with keys first; if their figures cannot be had it says why, as a cell must not fail."""
    try:
        known = ask()
    except Exception as error:
        known, caption = {}, f"{caption}: {error}"
    found = {name: known.get(name) for name in [*keys, *(name for name in known if name not in keys)]}
    rows = [
        (name, ", ".join(keys.get(name, ())), one.state if one is not None else "STOPPED", *figures(one)) for name, one in found.items()
    ]
    return table(caption, ("name", "keys", "state", *FIGURES), rows)
