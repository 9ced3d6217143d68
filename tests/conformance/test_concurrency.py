"""``concurrency``: several events at a time in one process, coroutines on one loop or functions in threads."""

from __future__ import annotations

from typing import Any

import pytest

from mphub import EventHub, InvalidOption

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_it_can_be_said_to_engines_that_run_one_at_a_time(engine: str) -> None:
    hub = EventHub(engine=engine)
    sub = hub.subscribe("k", lambda n: n, concurrency=10)
    with hub:
        assert list(sub.map(range(5))) == list(range(5))


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True, "many", None, 10_001])
def test_concurrency_is_a_number(engine: str, concurrency: Any) -> None:
    with pytest.raises(InvalidOption, match=r"concurrency: got .*; expected an int from 1 to 10000"):
        EventHub(engine=engine).subscribe("k", print, concurrency=concurrency)
