"""What a notebook shows of a hub: small tables, whatever its state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mphub import EventHub, HubStatistics, SubscriberStatistics
from tests.helpers import Cells

pytestmark = pytest.mark.timeout(60)


@pytest.mark.procs
def test_where_figures_cannot_be_had_the_table_says_why(tmp_path: Path) -> None:
    hub = EventHub()
    sub = hub.subscribe("k", lambda _: hub._repr_html_(), name="k")
    with hub:
        assert "does not work in a handler" in hub.request("k", 1).result(10)
        child = os.fork()
        if not child:
            Path(tmp_path / "seen").write_text(hub._repr_html_() + sub._repr_html_())
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "seen").read_text().count("in the process that made the hub") == 2


def test_statistics_say_what_the_hub_took_in() -> None:
    statistics = HubStatistics(12345, 3, {"router": 7}, {"a": SubscriberStatistics("RUNNING", waiting=1234, mean=0.00123)})
    table = Cells(statistics._repr_html_())
    assert "12,345 accepted" in table.caption
    assert "3 unmatched" in table.caption
    assert table.rows[1] == ["a", "RUNNING", "1,234", "0", "0", "0", "1.23 ms"]
