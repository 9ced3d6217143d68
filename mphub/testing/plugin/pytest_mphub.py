"""The pytest plugin of mphub: ``mphub.testing`` as fixtures.

It is installed beside the package, so that pytest, which loads it in every run, imports nothing of mphub where nothing of mphub is tested.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mphub.hub import EventHub
    from mphub.testing import Clock

RAISED = pytest.StashKey[bool]()
"""Whether a test has failed, before its fixtures are torn down."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "mphub(**options): options of the EventHub that the fixtures hub and process_hub make, as in mphub(check=False)"
    )


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "call":
        item.stash[RAISED] = call.excinfo is not None


@pytest.fixture
def _mphub_clock() -> Clock:
    from mphub.testing import Clock

    return Clock()


@pytest.fixture
def clock(_mphub_clock: Clock) -> Clock:
    """The clock of the fixture ``hub``: it stands still until ``clock.advance(seconds)``."""
    return _mphub_clock


@pytest.fixture
def hub(request: pytest.FixtureRequest, _mphub_clock: Clock) -> Iterator[EventHub]:
    """A running hub in the test's own thread: deterministic, and what a handler raises, ``publish`` raises."""
    yield from _hub(request, "inline", _mphub_clock)


@pytest.fixture
def process_hub(request: pytest.FixtureRequest) -> Iterator[EventHub]:
    """A running hub with its processes; the test fails if it leaves one, or a dead letter."""
    root = str(request.config.rootpath)
    with pytest.MonkeyPatch.context() as patch:
        if root not in sys.path:  # as in importlib mode: a test's module has a name from there on, by which a process looks for it
            patch.setattr(sys, "path", [*sys.path, root])
        yield from _hub(request, "process", None)


def _hub(request: pytest.FixtureRequest, engine: str, clock: Clock | None) -> Iterator[EventHub]:
    from mphub.hub import EventHub
    from mphub.testing import running

    marker = request.node.get_closest_marker("mphub")
    with running(EventHub(engine=engine, **(marker.kwargs if marker else {})), engine, clock=clock) as hub:
        yield hub
        if request.node.stash.get(RAISED, False):  # its failure is the news: nothing is waited for or added to it
            hub._check = False
            hub.stop(drain=False)
