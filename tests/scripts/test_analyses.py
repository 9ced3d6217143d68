"""The supervisor script's analyses are pure: each is tested on sources of a few lines."""

from __future__ import annotations

import ast
import random
from array import array

import pytest
from analyses import (
    COMMON,
    GRAM,
    SKETCH,
    TOP,
    WINDOW,
    Complexity,
    Finding,
    Skipped,
    Source,
    Tally,
    closest,
    complexity,
    compressibility,
    cyclomatic,
    fingerprints,
    packed,
    winnow,
)


def source(text: str, path: str = "a.py") -> Source:
    return Source(path, text.encode())


def program(seed: int, names: int = 400) -> str:
    """Return a source of many different words."""
    words = random.Random(seed)
    return "\n".join(f"word{words.randrange(10**6)} = {words.randrange(10**6)}" for _ in range(names))


@pytest.mark.parametrize(
    ("body", "score"),
    [
        ("pass", 1),
        ("if a: pass", 2),
        ("if a: pass\n elif b: pass\n else: pass", 3),
        ("return a and b and c or d", 4),
        ("return [x for y in z for x in y if x if y]", 5),
        ("while a:\n  for b in c: pass", 3),
        ("try: pass\n except A: pass\n except B: pass", 3),
        ("return 1 if a else 2", 2),
        ("match a:\n  case 1: pass\n  case _: pass", 3),
        ("return lambda: a or b", 2),
    ],
)
def test_complexity_is_one_more_than_the_decisions(body: str, score: int) -> None:
    assert cyclomatic(ast.parse(f"def f():\n {body}")) == {"1:f": score}


def test_decisions_count_for_the_innermost_function_alone() -> None:
    text = "class A:\n def f(self):\n  async def g():\n   if a: pass\n  return b or c\nif d: pass"
    assert cyclomatic(ast.parse(text)) == {"2:A.f": 2, "3:A.f.g": 2}


def test_complexity_names_the_worst_functions_of_a_file_first() -> None:
    text = "".join(f"def f{n}(): return {' or '.join('a' * (n + 1))}\n" for n in range(TOP + 2))
    found = complexity(source(text))
    assert isinstance(found, Complexity)
    assert (found.lines, found.functions, found.size) == (TOP + 2, TOP + 2, len(text))
    assert found.worst[0] == (TOP + 2, f"a.py:{TOP + 2}:f{TOP + 1}")
    assert len(found.worst) == TOP


@pytest.mark.parametrize(
    "data",
    [
        b"def",
        b"\xff",
        b"a = '\0'",
        b"# coding: nonsense\n",
        b"(" * 500,
        b"x = " + b"-" * 100_000 + b"1",
        b"\xef\xbb\xbf# coding: latin-1\n",
    ],
    ids=["unparsable", "undecodable", "null byte", "unknown coding", "unclosed", "nested", "contradictory"],
)
def test_what_is_no_python_is_skipped(data: bytes) -> None:
    assert complexity(Source("a.py", data)) == Skipped("a.py")


def test_fingerprints_survive_layout_and_comments() -> None:
    text = program(1)
    other = text.replace(" = ", "=").replace("\n", "  # why\n\n")
    assert fingerprints(source(text)).prints == fingerprints(source(other)).prints != b""


def test_a_long_passage_in_common_is_noticed_wherever_it_stands() -> None:
    passage = program(1, names=(GRAM + WINDOW) // 3 + 1)
    one, other = (
        set(array("I", fingerprints(source(text)).prints)) for text in (passage + "\n" + program(2, 30), program(3, 30) + "\n" + passage)
    )
    assert one & other


def test_fingerprints_of_a_long_file_are_the_least_ones_sorted() -> None:
    prints = list(array("I", packed(range(2 * SKETCH, 0, -1))))
    assert prints == list(range(1, SKETCH + 1))


@pytest.mark.parametrize(("hashes", "kept"), [([], set()), ([3, 1, 2], {1}), ([*range(WINDOW), 0], {0})])
def test_winnowing_keeps_the_least_of_each_window(hashes: list[int], kept: set[int]) -> None:
    assert winnow(hashes) == kept


def test_pairs_are_ranked_by_jaccard_then_by_name() -> None:
    prints = {"d": packed(range(100)), "c": packed(range(100)), "b": packed(range(50, 150)), "a": packed(range(200, 300))}
    assert closest(prints) == [(1.0, "c", "d"), (pytest.approx(1 / 3), "b", "c"), (pytest.approx(1 / 3), "b", "d")]


def test_a_fingerprint_of_too_many_files_is_no_likeness() -> None:
    assert len(closest({f"{n}": packed(range(20)) for n in range(COMMON)})) > 0
    assert closest({f"{n}": packed(range(20)) for n in range(COMMON + 1)}) == []


def test_nearly_empty_files_are_no_pair() -> None:
    assert closest({"a": packed([1]), "b": packed([1])}) == []


def test_noise_is_less_compressible_than_repetition() -> None:
    noise, repetition = Source("n", random.Random(1).randbytes(5000)), Source("r", b"a" * 5000)
    assert compressibility(noise).ratio > 0.9 > 0.1 > compressibility(repetition).ratio
    assert compressibility(Source("empty", b"")).ratio == 1.0


def test_tables_do_not_depend_on_the_order_of_arrival() -> None:
    sources = [source(program(n // 2) + f"\ndef f{n}(): return {' or '.join('a' * (n % 3 + 1))}", f"{n:02}.py") for n in range(24)]
    findings: list[Finding] = [stage(one) for one in sources for stage in (complexity, fingerprints, compressibility)]
    assert tables_of(findings) == tables_of(findings[::-1]) == tables_of(random.Random(1).sample(findings, len(findings)))


def test_a_skipped_file_appears_in_no_table() -> None:
    broken = source("def " + program(1), "broken.py")
    tables = tables_of([stage(broken) for stage in (complexity, fingerprints, compressibility)])
    assert "broken.py" not in tables
    assert "           1  skipped" in tables
    assert "           0  files" in tables


def prints_of(text: str) -> set[int]:
    return set(array("I", fingerprints(source(text)).prints))


def tables_of(findings: list[Finding]) -> str:
    tally = Tally()
    for finding in findings:
        tally.add(finding)
    return tally.tables()
