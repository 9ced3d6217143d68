"""Reads archives back."""

from __future__ import annotations

import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

from mphub import Batch

SOON = Batch(100, 0.02)
"""What an archive is subscribed with, where nothing is to wait."""


def rows(path: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as database:
        return database.execute("SELECT id, time, key, headers, payload, data FROM events ORDER BY time, id").fetchall()


def lines(*paths: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in (gzip.open if path.suffix == ".gz" else open)(path, "rt")]
