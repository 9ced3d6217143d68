"""What waits keeps its place: by priority, then by time, then as it came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mphub.core.spans import indexes
from mphub.core.window import Portion, Window

STEPS = st.lists(st.tuples(st.sampled_from(["add", "early", "take", "drop"]), st.integers(-3, 3), st.integers(0, 2)), max_size=60)


@given(STEPS)
def test_events_wait_by_priority_then_by_time_then_as_they_came(steps: list[tuple[str, int, int]]) -> None:
    window, expected = Window(), list[Portion]()
    for number, (what, rank, due) in enumerate(steps):
        row: Any = SimpleNamespace(id=number, batch=SimpleNamespace(extras=None))
        if what == "add":
            expected.append(Portion(row, [(0, 1)], 10, rank=rank))
            window.add(expected[-1])
        elif what == "early" and (rank < 0 or due):
            expected.append(Portion(row, [(0, 1)], 10, due=float(due), rank=min(rank, 0)))
            window.add_early([expected[-1]])
        elif what == "take" and expected:
            assert window.waiting[0].portion is expected[0]
            window.taken(window.waiting, [(0, 1)])
            del expected[0]
        elif what == "drop" and expected:
            oldest = next((portion for portion in expected if portion.rank >= 0), expected[0])
            assert [portion for portion, _ in window.take_oldest(1)] == [oldest], "what is urgent is dropped last"
            expected.remove(oldest)
        expected.sort(key=lambda portion: portion.place)
        assert [piece.portion for piece in window.waiting] == expected
        assert all(list(indexes(piece.spans)) == [0] for piece in window.waiting)
        assert (window.loaded, window.loaded_bytes) == (len(expected), 10 * len(expected))
