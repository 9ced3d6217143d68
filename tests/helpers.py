"""What tests of several folders share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], timeout: float = 5.0, interval: float = 0.01) -> bool:
    """Poll until the condition is true, at most ``timeout`` seconds, and return whether it became true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True


def without_address(value: object) -> str:
    """Name a test's parameter the same in each process: run side by side, they compare what they have collected."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))
