"""What tests of several folders share."""

from __future__ import annotations

import re

from mphub.testing.traces import eventually

__all__ = ["eventually", "without_address"]


def without_address(value: object) -> str:
    """Name a test's parameter the same in each process: run side by side, they compare what they have collected."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))
