"""At most one line a second about the same thing."""

from __future__ import annotations


class Limiter:
    """Lets the first of a kind through, then one a second with the count of those between."""

    def __init__(self) -> None:
        self._seen: dict[object, tuple[float, int]] = {}

    def allows(self, about: object, now: float, count: int = 1) -> tuple[bool, bool, int]:
        """Return (may pass, is the first, how many stand behind it: those held back since the last, and what it counts for)."""
        found = self._seen.get(about)
        if found is None:
            self._seen[about] = (now, 0)
            return True, True, count - 1
        last, held_back = found
        if now - last < 1.0:
            self._seen[about] = (last, held_back + count)
            return False, False, 0
        self._seen[about] = (now, 0)
        return True, False, held_back + count - 1
