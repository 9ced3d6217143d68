"""The docs are true: every ``python`` block runs and prints the ``text`` block behind it, links lead somewhere.

A block tagged ``py`` shows what others write and is not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def blocks() -> Iterator[object]:
    for page in PAGES:
        for place, found in enumerate(BLOCK.finditer(page.read_text()), 1):
            yield pytest.param(found[1], found[2], id=f"{page.stem}-{place}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("code", "expected"), list(blocks()))
def test_examples_run_and_print_what_the_page_says(code: str, expected: str | None, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=50, check=False)
    assert found.returncode == 0, found.stderr
    assert expected is None or found.stdout == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_there_are_examples() -> None:
    assert len(list(blocks())) >= 9
