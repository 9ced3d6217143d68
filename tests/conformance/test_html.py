"""What a notebook shows of a hub: small tables, whatever its state."""

from __future__ import annotations

import pytest

from mphub import EventHub
from mphub.reply import Reply
from tests.helpers import Cells

pytestmark = pytest.mark.timeout(60)


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
