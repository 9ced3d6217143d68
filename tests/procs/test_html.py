"""What a notebook shows of a hub: small tables, whatever its state."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mphub import EventHub, HubStatistics, SubscriberStatistics
from mphub.reply import Reply

pytestmark = pytest.mark.timeout(60)


class Cells(HTMLParser):
    """Reads a table back, and sees that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.caption = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open[-1] == "caption":
            self.caption += data


def test_a_hub_is_a_table_before_while_and_after_it_runs(engine: str) -> None:
    hub = EventHub(engine=engine, check=False, propagate=None if engine == "process" else False, name="<b>&mine")
    sub = hub.subscribe(["a.<x", "b.*"], lambda n: 1 / n, name="sub")
    head = ["name", "keys", "state", "waiting", "running", "handled", "dead", "mean"]
    before = Cells(hub._repr_html_())
    assert before.caption == repr(hub)
    assert before.rows == [head, ["sub", "a.<x, b.*", "STOPPED", "", "", "", "", ""]]
    assert before.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    with hub:
        hub.publish_batch("b.c", [1, 2, 0])
        hub.drain()
        running = Cells(hub._repr_html_())
        assert running.rows[1][:-1] == ["sub", "a.<x, b.*", "RUNNING", "0", "0", "2", "1"]
        assert running.rows[1][-1].endswith("s")
        assert Cells(sub._repr_html_()).rows == running.rows
        assert Cells(hub.statistics()._repr_html_()).rows[1][0] == "sub"
        sub.unsubscribe()
        assert Cells(hub._repr_html_()).rows[1][:-1] == ["sub", "", "STOPPED", "0", "0", "2", "1"]
    for shown in (hub, sub):
        assert Cells(shown._repr_html_()).rows[1][2:-1] == ["STOPPED", "0", "0", "2", "1"]
    assert Cells(sub._repr_html_()).caption == repr(sub)


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


def test_answers_are_shown_as_they_stand_and_never_waited_for(engine: str) -> None:
    reply: Reply[object] = Reply()
    assert Cells(reply._repr_html_()).rows[1] == ["", "pending", ""]
    hub = EventHub(engine=engine)
    good = hub.subscribe("good", lambda _: "<i>")
    hub.subscribe("bad", lambda _: 1 / 0)
    with hub, good.map(range(100)) as results:
        for answer, kind in ((hub.request("good", 1), "str"), (hub.request("bad", 1), "ZeroDivisionError")):
            answer.exception(10)
            assert Cells(answer._repr_html_()).rows[1] == [str(answer.id), "finished", kind]
        next(iter(results))
        head, row = Cells(results._repr_html_()).rows
        assert dict(zip(head, row, strict=True)) == {"taken": "1", "under way": "64", "failed": "0", "total": "100"}
