"""What tests of several kinds of faults use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mphub.procs import boot


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield where this test's runtime folders are, apart from those of other hubs, which would sweep them.

    Its path is short: that of a socket has 108 bytes at most.
    """
    with tempfile.TemporaryDirectory(prefix="place-") as name:
        monkeypatch.setattr(boot, "runtime_parent", lambda: (Path(name), False))
        yield Path(name)
