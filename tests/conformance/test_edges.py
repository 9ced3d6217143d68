"""What users do that nobody thinks of: queues attached early, publishers inside handlers, signals ignored, streams closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mphub import EventHub, Inbox, InvalidOption, Retry, current_event
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.procs


@pytest.mark.parametrize("way", ["transaction", "publisher", "publisher.transaction", "publisher.publish_batch", "queue"])
def test_whatever_publishes_in_a_handler_goes_with_the_ack(way: str, engine: str, tmp_path: Path) -> None:
    if engine != "process" and way != "transaction":
        return
    log = tmp_path / "log"
    hub = EventHub(engine=engine, propagate=False)

    def handle(n: int) -> None:
        attempt = current_event().attempt
        if way == "transaction" or way == "publisher.transaction":
            with hub.transaction() if way == "transaction" else hub.publisher().transaction() as together:
                together.publish("out", (n, attempt))
        elif way == "publisher":
            hub.publisher().publish("out", (n, attempt))
        elif way == "publisher.publish_batch":
            hub.publisher().publish_batch("out", [(n, attempt)])
        else:
            hub.queue.put(("out", (n, attempt)), timeout=1)
        if attempt == 1:
            raise KeyError(n)

    hub.subscribe("in", handle, name="in", retry=Retry(2, on=KeyError, delay=0))
    hub.subscribe("out", lambda out: note(log, out), name="out")
    with hub:
        for n in range(3):
            hub.publish("in", n)
    assert sorted(lines(log)) == ["(0, 2)", "(1, 2)", "(2, 2)"]


def test_nonsense_is_refused_at_the_call(engine: str) -> None:
    for options in ({"check": "yes"}, {"propagate": "x"}):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            EventHub(engine=engine, **options)  # type: ignore[arg-type]
    hub = EventHub(engine=engine)
    nonsense: Any = 5
    with pytest.raises(InvalidOption, match="limits"):
        hub.subscribe("k", len, limits=nonsense)
    with pytest.raises(InvalidOption, match="callback"):
        hub.on_notice(nonsense)
    k = hub.subscribe("k", len, name="k", inbox=Inbox(max_bytes="10%"))
    with hub:
        text: Any = "x"
        for call in (hub.flush, hub.drain, k.wait_ready):
            with pytest.raises(InvalidOption, match="timeout: got 'x'"):
                call(text)
        with pytest.raises(InvalidOption, match="progress"):
            hub.drain(progress=nonsense)
        ids: Any
        for ids in ("abc", nonsense):
            with pytest.raises(InvalidOption, match="ids"):
                hub.redrive(ids=ids)
            with pytest.raises(InvalidOption, match="ids"):
                hub.purge(ids=ids)
