"""The docs are true: every ``python`` block runs, as a script of its own (or as tests) in a fresh process, and links lead somewhere.

A ``text`` block behind a ``python`` block is its stdout, a ``stderr`` block its stderr, where numbers of processes, ids, folders and line
numbers may differ and a line of three dots stands for any lines. A block tagged ``py`` shows what others write, or a signature, and is
not run; nor is one without a tag.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mphub

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference" / "api.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PYTEST = ("-m", "pytest", "-p", "mphub.testing", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
"""How a block is run that defines tests."""
VARIABLE = (
    (r"\b[0-9a-f]{26,}\b", "ID"),
    (r"\bprocess \d+", "process N"),
    (r"\(pid \d+\)", "(pid N)"),
    (r'File ".*", line \d+', 'File "F", line L'),
)
"""What differs from run to run."""


class Example(NamedTuple):
    """A block that runs, and what the page says that it prints."""

    name: str
    code: str
    expected: dict[str, str]


def examples_of(name: str, text: str) -> Iterator[Example]:
    """Yield the examples of a page; outputs belong to the block before them."""
    found: list[Example] = []
    for tag, content in BLOCK.findall(text):
        if tag == "python":
            found.append(Example(f"{name}-{len(found) + 1}", content, {}))
        elif tag in ("text", "stderr"):
            assert found, f"{name}: a {tag} block before any python block"
            found[-1].expected[tag] = content
    yield from found


EXAMPLES = [example for page in PAGES for example in examples_of(page.stem, page.read_text(encoding="utf-8"))]


def masked(output: str) -> str:
    for pattern, word in VARIABLE:
        output = re.sub(pattern, word, output)
    return output


def agrees(output: str, expected: str) -> bool:
    """Compare what is printed with what the page says; a line of three dots stands for any lines."""
    lines = (r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in masked(expected).splitlines())
    return re.fullmatch("".join(lines), masked(output)) is not None


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are commonly made."""
    plain = (re.sub(r"[^\w\- ]", "", heading).strip() for heading in HEADING.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))))
    return {heading.lower().replace(" ", "-") for heading in plain}


def section_of(name: str, text: str) -> str:
    """Return the part of the reference under the heading of a name, or else the lines that have it."""
    found = re.search(rf"^(#+) (?:.*, )?{name}(?:,.*)?$", text, re.MULTILINE)
    if found is None:
        return "\n".join(line for line in text.splitlines() if f"`{name}`" in line)
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def what_to_name(name: str) -> Iterator[str]:
    """Yield what the reference has to say of a public name: members, parameters of functions and methods, options."""
    found = getattr(mphub, name)
    if inspect.isfunction(found) or name == "EventHub":
        yield from inspect.signature(found).parameters
    for member, value in vars(found).items() if inspect.isclass(found) else ():
        if not member.startswith("_"):
            yield member
            if inspect.isfunction(value):
                yield from list(inspect.signature(value).parameters)[1:]
    if inspect.isclass(found):
        yield from (field for field in vars(found).get("__annotations__", ()) if not field.startswith("_"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run_and_print_what_the_page_says(example: Example, tmp_path: Path) -> None:
    script = tmp_path / "test_example.py"
    script.write_text(example.code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *(PYTEST if "\ndef test_" in example.code else ()), str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    if "text" in example.expected:
        assert done.stdout == example.expected["text"], done.stderr
    if "stderr" in example.expected:
        assert agrees(done.stderr, example.expected["stderr"]), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            there = page.parent / target if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("name", mphub.__all__)
def test_the_reference_has_every_public_name_with_all_that_belongs_to_it(name: str) -> None:
    section = section_of(name, REFERENCE.read_text(encoding="utf-8"))
    assert section, f"{REFERENCE.name} has neither a heading nor a row for {name}"
    code = re.findall(r"```.*?```|`[^`]+`", section, re.DOTALL)
    words = {word for piece in code for word in re.findall(r"\w+", piece)}
    missing = sorted(set(what_to_name(name)) - words)
    assert not missing, f"{REFERENCE.name} does not say of {name}: {', '.join(missing)}"


def test_the_architecture_has_every_module() -> None:
    named = set(re.findall(r"`(\w+)`", (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")))
    modules = {path.stem for path in (ROOT / "mphub").rglob("*.py")} - {"__init__", "__main__"}
    assert not modules - named, f"architecture.md has no place for {', '.join(sorted(modules - named))}"


def test_there_are_examples_on_every_page_that_teaches() -> None:
    pages = {example.name.rpartition("-")[0] for example in EXAMPLES}
    teaching = {"README", *(page.stem for folder in ("tutorial", "how-to") for page in (DOCS / folder).glob("*.md"))}
    assert teaching - {"session"} <= pages  # which a script writes, and a test of its own types again


def test_what_differs_from_run_to_run_is_no_difference() -> None:
    page = "work: process 1 ended with 3\n...\nValueError: no\n"
    assert agrees('work: process 22 ended with 3\n  File "/a", line 3\nValueError: no\n', page)
    assert not agrees("work: process 22 ended with 4\nValueError: no\n", page)
