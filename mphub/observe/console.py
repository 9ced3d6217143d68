"""What a hub tells its user without any set-up: through ``logging``, whose last resort is stderr."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mphub.events import Notice
from mphub.observe.statistics import HubStatistics

log = logging.getLogger("mphub")
SEVERITY = {
    "death": "error",
    "FATAL": "critical",
    "held": "warning",
    "shortage": "error",
    "abandoned": "error",
    "unmatched": "warning",
    "failure": "warning",
    "dead_letter": "warning",
}
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL}


MAX_UNWRITTEN = 1 << 20
"""Characters of output that wait for a slow reader."""


class Console:
    """Turns pushes of the hub's processes into log records, output lines and notices, in a thread of its own.

    So a callback may call the hub, and a terminal that nobody reads stops nothing but this.
    """

    def __init__(self, unmatched: str) -> None:
        self.unmatched = unmatched
        self.callbacks: list[Callable[[Notice], None]] = []
        self._queue: queue.SimpleQueue[tuple[str, dict[str, Any]] | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unwritten = self._dropped = 0

    def hear(self, what: str, args: dict[str, Any]) -> None:
        """Take one push; output lines that exceed a megabyte unwritten are dropped and counted."""
        if what == "output":
            size = sum(map(len, args["lines"]))
            if self._unwritten + size > MAX_UNWRITTEN:
                self._dropped += len(args["lines"])
                return
            self._unwritten += size
        self._put((what, args))

    def flush(self, timeout: float) -> None:
        """Wait until what was heard so far is told, at most some seconds."""
        if self._thread is not None and self._thread is not threading.current_thread():
            told = threading.Event()
            self._put(told)
            told.wait(timeout)

    def close(self, timeout: float) -> None:
        """Tell what was heard, at most some seconds, and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(timeout)

    def _put(self, item: tuple[str, dict[str, Any]] | threading.Event) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mphub-console", daemon=True)
            self._thread.start()
        self._queue.put(item)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._tell(*item)

    def _tell(self, what: str, args: dict[str, Any]) -> None:
        """Deal with one push; a callback's failure is logged and disturbs nobody."""
        if what == "notice":
            self.notice(**args)
        elif what == "output":
            self._output(**args)
        elif what == "log":
            logging.getLogger("mphub.router").log(LEVELS[args["level"]], args["message"])

    def notice(self, kind: str, subscriber: str | None, message: str, details: dict[str, Any]) -> None:
        notice = Notice(kind, SEVERITY.get(kind, "warning"), subscriber, message, time.time(), details)
        self._log(notice)
        for callback in self.callbacks:
            try:
                callback(notice)
            except Exception:
                log.exception("a callback of on_notice failed")

    def _log(self, notice: Notice) -> None:
        if notice.kind == "unmatched" and self.unmatched == "ignore":
            return
        name = f"mphub.subscriber.{notice.subscriber}" if notice.subscriber else "mphub"
        logging.getLogger(name).log(LEVELS[notice.severity], text_of(notice))

    def _output(self, subscriber: str, stream: str, lines: list[str]) -> None:
        self._unwritten -= sum(map(len, lines))
        if self._dropped:
            lines, self._dropped = [f"... {self._dropped} lines dropped: nobody read them", *lines], 0
        target = sys.stdout if stream == "out" else sys.stderr
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or there is none
            target.write("".join(f"{line}\n" for line in lines))
            target.flush()


def text_of(notice: Notice) -> str:
    """Put a notice into words."""
    details, who = notice.details, notice.subscriber
    if notice.kind == "failure":
        text = notice.message.rstrip()
        return f"{_failed(notice)}:\n{text}" if details.get("first") else f"{_failed(notice)}: {text.rpartition(chr(10))[2]}"
    if notice.kind == "dead_letter":
        more = f" (+{details['more']} more)" if details.get("more") else ""
        head = f"{who}: event {details['id']} of key {details['key']!r} is a dead letter"
        return f"{head}: {notice.message} after {details['attempts']} attempts{more}"
    trace = details.get("traceback")
    head = f"{who}: {notice.message}" if who else notice.message
    return f"{head}\n{trace.rstrip()}" if trace else head


def _failed(notice: Notice) -> str:
    details = notice.details
    if details["id"] == "teardown":
        return f"{notice.subscriber}: teardown failed"
    more = f" (+{details['more']} more)" if details.get("more") else ""
    return f"{notice.subscriber}: event {details['id']} of key {details['key']!r} failed, attempt {details['attempt']}{more}"


def farewell(name: str, statistics: HubStatistics, left: int, what: str) -> None:
    """Say how it went, in one line: to the log, or to stderr if there is none."""
    subscribers = statistics.subscribers.values()
    line = (
        f"mphub: hub {name!r} stopped: {sum(s.handled for s in subscribers):,} handled, {sum(s.dead for s in subscribers):,} dead, "
        f"{statistics.unmatched:,} unmatched, {left:,} {what}"
    )
    if log.hasHandlers():
        log.info(line)
    else:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(line, file=sys.stderr)
