"""Whatever is large: lines, exceptions, headers, lists of ids. Nothing of it ends a process or a connection."""

from __future__ import annotations

from pathlib import Path

import mphub
from mphub import EventHub, PayloadError
from tests.procs.test_hub import lines, note


def test_a_transaction_in_a_handler_is_whole_or_not_at_all(engine: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(engine=engine, max_bytes="32MB")

    def handle(n: int) -> None:
        try:
            with hub.transaction() as together:
                for data in (b"", bytes(30_000_000), b""):
                    together.publish("out", data)
        except PayloadError:
            mphub.publish("out", b"refused")

    hub.subscribe("in", handle, name="in")
    hub.subscribe("out", lambda data: note(log, data.decode()), name="out")
    with hub:
        hub.publish("in", 1)
    assert lines(log) == ["refused"]
