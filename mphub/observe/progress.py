"""How far something is: told to a callable, drawn as a bar, or said in a line every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from mphub.errors import InvalidOption
from mphub.events import Progress

Watcher = bool | Callable[[Progress], None]


def check_progress(progress: object) -> None:
    """Refuse what is no watcher.

    Raises InvalidOption.
    """
    if not (isinstance(progress, bool) or callable(progress)):
        raise InvalidOption(f"progress: got {progress!r:.60}; expected True, False or a callable taking Progress")


@contextlib.contextmanager
def watching(progress: Watcher) -> Iterator[Callable[[Progress], None] | None]:
    """Yield what tells progress, or None: a callable, a bar on a terminal with rich, else a line every 10 s."""
    if not progress:
        yield None
    elif callable(progress):
        yield progress
    elif sys.stderr.isatty() and (bar := rich_bar()) is not None:
        task = bar.add_task("events", total=None)
        with bar:
            yield lambda p: bar.update(task, completed=p.done, total=p.total)
    else:
        yield Lines()


class Lines:
    """Prints how far it is, every 10 s."""

    def __init__(self) -> None:
        self.next = time.monotonic() + 10.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() >= self.next:
            self.next += 10.0
            print(
                f"mphub: {progress.done:,} of {progress.total:,}, {progress.dead:,} dead, {progress.rate:,.0f}/s",
                file=sys.stderr,
            )


def rich_bar() -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        return None
    from rich.console import Console as RichConsole

    return Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=RichConsole(stderr=True))
