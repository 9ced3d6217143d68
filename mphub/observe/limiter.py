"""At most one line a second about the same thing."""

from __future__ import annotations


class Limiter:
    """Lets the first of a kind through, then one a second with the count of those between."""

    def __init__(self) -> None:
        self._seen: dict[object, tuple[float, int]] = {}

    def allows(self, about: object, now: float) -> tuple[bool, bool, int]:
        """Return (may pass, is the first, how many were held back since the last)."""
        found = self._seen.get(about)
        if found is None:
            self._seen[about] = (now, 0)
            return True, True, 0
        last, held_back = found
        if now - last < 1.0:
            self._seen[about] = (last, held_back + 1)
            return False, False, 0
        self._seen[about] = (now, 0)
        return True, False, held_back
