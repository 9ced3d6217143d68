"""What the supervisor script finds out about source files: pure functions, one per stage, and the tally of their findings."""

from __future__ import annotations

import ast
import lzma
import re
import warnings
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import chain, combinations
from typing import TypeVar
from zlib import crc32

TOP = 10
"""Rows of the tables of functions and of files."""
PAIRS = 5
"""Rows of the table of pairs."""
GRAM = 8
"""Tokens in a row that are hashed together: shorter repetitions count for nothing."""
WINDOW = 64
"""Neighbouring hashes of which the least is kept: every repetition of GRAM + WINDOW - 1 tokens is noticed."""
SKETCH = 256
"""Fingerprints kept per file, the least ones, so that the state stays small however long a file is."""
COMMON = 20
"""Files that may share a fingerprint; in more of them it is idiom (a licence, a usual head) and says nothing."""
LEAST_PRINTS = 8
"""Fingerprints a file needs to be compared: two nearly empty files are no discovery."""
LEAST_BYTES = 2048
"""Size from which compressibility is ranked: below, the compressor's own header decides."""

Score = TypeVar("Score", int, float)

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.match_case
TOKENS = re.compile(rb"#[^\n]*|(\w+|[^\w\s])")


@dataclass(frozen=True, slots=True)
class Source:
    """A file as the scanner read it: all stages see the same bytes."""

    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that cannot be read, or is no Python: it appears in no table."""

    path: str


@dataclass(frozen=True, slots=True)
class Complexity:
    """The lines and bytes of a file, and its most complex functions, as (score, name)."""

    path: str
    lines: int
    size: int
    functions: int
    worst: list[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """A file's fingerprints: sorted unsigned 32-bit numbers, packed because they are pickled with every snapshot."""

    path: str
    prints: bytes


@dataclass(frozen=True, slots=True)
class Compressibility:
    """Compressed size over size."""

    path: str
    size: int
    ratio: float


Finding = Skipped | Complexity | Fingerprints | Compressibility


def complexity(source: Source) -> Complexity | Skipped:
    """Measure the cyclomatic complexity of every function of a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's opinion of somebody else's escapes
            tree = ast.parse(source.data)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # also: undecodable, null bytes, nested too deeply
        return Skipped(source.path)
    scores = cyclomatic(tree)
    worst = by_score((score, f"{source.path}:{name}") for name, score in scores.items())
    return Complexity(source.path, len(source.data.splitlines()), len(source.data), len(scores), worst)


def cyclomatic(tree: ast.AST) -> dict[str, int]:
    """Return 1 + the number of decisions by ``line:qualified.name``; an inner function's count for itself alone."""
    scores: dict[str, int] = {}
    todo: list[tuple[ast.AST, str, str]] = [(tree, "", "")]
    while todo:  # a stack of our own: depth of nesting is the author's choice
        node, scope, owner = todo.pop()
        if isinstance(node, FUNCTIONS | ast.ClassDef):
            scope = f"{scope}.{node.name}" if scope else node.name
        if isinstance(node, FUNCTIONS):
            owner = f"{node.lineno}:{scope}"
            scores[owner] = 1
        elif owner:
            scores[owner] += decisions(node)
        todo.extend((child, scope, owner) for child in ast.iter_child_nodes(node))
    return scores


def decisions(node: ast.AST) -> int:
    """Return the ways that a node adds to those through its function."""
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    return int(isinstance(node, BRANCHES))


def fingerprints(source: Source) -> Fingerprints:
    """Take a file's winnowed fingerprints, which survive changes of layout and comments, and moving a passage."""
    tokens = array("I", (crc32(token) for token in TOKENS.findall(source.data) if token)).tobytes()
    return Fingerprints(source.path, packed(winnow(grams(tokens))))


def grams(tokens: bytes) -> list[int]:
    """Hash each run of GRAM tokens of four bytes."""
    width = 4 * GRAM
    return [crc32(tokens[at : at + width]) for at in range(0, len(tokens) - width + 1, 4)]


def winnow(hashes: list[int]) -> set[int]:
    """Keep the least hash of each window: what two files share, they keep in common, wherever it stands."""
    return {min(hashes[at : at + WINDOW]) for at in range(max(1, len(hashes) - WINDOW + 1))} if hashes else set()


def packed(prints: Iterable[int]) -> bytes:
    return array("I", nsmallest(SKETCH, prints)).tobytes()


def compressibility(source: Source) -> Compressibility:
    """Compress a file as well as lzma can."""
    size = len(source.data)
    return Compressibility(source.path, size, len(lzma.compress(source.data)) / size if size else 1.0)


def closest(prints: Mapping[str, bytes]) -> list[tuple[float, str, str]]:
    """Return the pairs of files with the highest Jaccard index over fingerprints that are not common, ties by name."""
    holders: defaultdict[int, list[str]] = defaultdict(list)
    for path in sorted(prints):
        for fingerprint in array("I", prints[path]):
            holders[fingerprint].append(path)
    rare = [paths for paths in holders.values() if len(paths) <= COMMON]
    sizes = Counter(chain.from_iterable(rare))
    shared = Counter(pair for paths in rare if len(paths) > 1 for pair in combinations(paths, 2))
    ranked = (
        (-count / (sizes[one] + sizes[other] - count), one, other)
        for (one, other), count in shared.items()
        if min(sizes[one], sizes[other]) >= LEAST_PRINTS
    )
    return [(-index, one, other) for index, one, other in nsmallest(PAIRS, ranked)]


@dataclass
class Tally:
    """All findings so far, no larger than the tables need; a sum, so that an event lost or counted twice would show."""

    files: int = 0
    lines: int = 0
    functions: int = 0
    size: int = 0
    skipped: set[str] = field(default_factory=set)
    worst: list[tuple[int, str]] = field(default_factory=list)
    prints: dict[str, bytes] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Take in one finding; the order makes no difference."""
        match finding:
            case Skipped(path):
                self.skipped.add(path)
            case Complexity(lines=lines, size=size, functions=functions, worst=worst):
                self.files, self.lines = self.files + 1, self.lines + lines
                self.functions, self.size = self.functions + functions, self.size + size
                self.worst = by_score([*self.worst, *worst])
            case Fingerprints(path, prints):
                self.prints[path] = prints
            case Compressibility(path, size, ratio) if size >= LEAST_BYTES:
                self.ratios[path] = ratio

    def tables(self) -> str:
        """Write the final tables."""
        prints = {path: prints for path, prints in self.prints.items() if path not in self.skipped}
        ratios = [(ratio, path) for path, ratio in self.ratios.items() if path not in self.skipped]
        counts = {"files": self.files, "lines": self.lines, "functions": self.functions, "bytes": self.size, "skipped": len(self.skipped)}
        return "\n".join(
            [
                *table("Totals", (f"{count:>12,}  {name}" for name, count in counts.items())),
                *table("Most complex functions", (f"{score:>12,}  {name}" for score, name in self.worst)),
                *table("Closest pairs", (f"{index:>12.3f}  {one}  {other}" for index, one, other in closest(prints))),
                *table("Least compressible files", (f"{ratio:>12.3f}  {path}" for ratio, path in by_score(ratios))),
            ]
        )


def by_score(rows: Iterable[tuple[Score, str]]) -> list[tuple[Score, str]]:
    """Return the TOP highest, ties by name."""
    return sorted(rows, key=lambda row: (-row[0], row[1]))[:TOP]


def table(title: str, rows: Iterable[str]) -> list[str]:
    return [title, *rows, ""]
