"""What tests of several folders share."""

from __future__ import annotations

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
