"""Asking for many: in order or as they are done, with failures in place, with progress, in a loop of either kind."""

from __future__ import annotations

import pytest

from mphub import EventHub, NoSubscriber, Subscriber
from tests.helpers import halve

pytestmark = pytest.mark.timeout(60)


def test_all_that_answer_are_asked(engine: str) -> None:
    class Silent(Subscriber[int, None]):
        answers = False

        def handle(self, payload: int) -> None:
            pass

    hub = EventHub(engine=engine, check=False)
    hub.subscribe("k", lambda n: n + 1, name="one")
    hub.subscribe(["k", "other"], lambda n: n * 2, name="two")
    hub.subscribe("k", halve, name="half")
    hub.subscribe("k", Silent)
    with hub:
        found = hub.gather("k", 5).result(10)
        assert (found["one"], found["two"], str(found["half"])) == (6, 10, "5 is odd")
        assert isinstance(found["half"], ValueError)
        assert set(found) == {"one", "two", "half"}
        assert hub.gather("other", 5).result(10) == {"two": 10}
        with pytest.raises(NoSubscriber, match="nobody"):
            hub.gather("nobody", 1)
