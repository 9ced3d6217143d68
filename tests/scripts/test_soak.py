"""The soak's checker finds what it is for; a short soak under all faults finds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from soak import check

SOAK = Path(soak.__file__)
ALL = [(1, 0), (1, 1), (1, 2), (2, 0)]


def test_what_agrees_is_fine() -> None:
    found = check(ALL, ALL[:3], [(1, 0), (2, 0), (1, 1), (1, 2)])
    assert (found.attempted, found.accepted, found.delivered, found.doubled) == (4, 3, 4, 0)
    assert (found.lost, found.unexpected, found.reordered) == ([], [], [])


def test_what_was_accepted_and_never_came_is_lost() -> None:
    assert check(ALL, ALL, [(1, 0), (1, 2), (2, 0)]).lost == [(1, 1)]


def test_what_was_only_attempted_may_be_missing() -> None:
    assert check(ALL, ALL[:2], ALL[:2]).lost == []


def test_what_nobody_sent_is_unexpected() -> None:
    assert check(ALL, [], [(3, 7)]).unexpected == [(3, 7)]


def test_a_first_delivery_behind_a_later_one_is_out_of_order() -> None:
    assert check(ALL, ALL, [(1, 0), (1, 2), (2, 0), (1, 1)]).reordered == [(1, 1)]


def test_a_second_delivery_is_counted_and_not_out_of_order() -> None:
    found = check(ALL, ALL, [(1, 0), (1, 1), (1, 0), (1, 2), (2, 0)])
    assert (found.doubled, found.reordered, found.lost) == (1, [], [])


def test_a_note_that_a_death_has_cut_short_is_none(tmp_path: Path) -> None:
    whole = [(185, 3971), (185, 3972), (185, 3973)]
    for event in whole:
        soak.note(tmp_path / "notes", *event)
    text = (tmp_path / "notes").read_bytes()
    length = len(text) // 3
    for cut in range(length):
        (tmp_path / "notes").write_bytes(text[:length] + text[length : length + cut] + text[2 * length :])
        assert list(soak.events_in(tmp_path / "notes")) == [whole[0], whole[2]]


def test_gaps_and_percentiles() -> None:
    assert soak.longest_gap([0, 10**9, 4 * 10**9]) == 3.0
    assert soak.longest_gap([5]) == 0
    assert soak.percentile([3.0, 1.0, 2.0], 0.5) == 2.0


@pytest.mark.parametrize("arguments", [["--rates", "subscribers=3"], ["--rates", "router=many"], ["--seconds", "0"], ["--publishers", "x"]])
def test_a_typo_is_explained(arguments: list[str]) -> None:
    found = subprocess.run([sys.executable, str(SOAK), *arguments], capture_output=True, text=True, env=environment(), check=False)
    assert found.returncode == 2
    assert arguments[1] in found.stderr


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_soak_finds_nothing() -> None:
    command = [sys.executable, str(SOAK), "--seconds", "8", "--rates", "supervisor=0.4,router=0.8,subscriber=15,terminate=10,restart=1"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOAK.parents[1]), os.environ.get("PYTHONPATH", "")])}
