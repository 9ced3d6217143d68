"""The board: what a process holds and how far it is, read by others at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mphub.store.board import RANGES, READY, SIZE, SLOTS, Board


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path / "board", create=True)
    yield board
    board.close()


def mark(board: Board, number: int, state: int) -> None:
    board.map[Board.base + number % SLOTS] = state


def test_another_process_sees_what_was_written(board: Board) -> None:
    board.hand_out(5, 3, 7, 100)
    pid = os.fork()
    if not pid:
        other = Board(board.path)
        mark(other, 6, 3)
        other.set_flag(READY)
        other.add_ran(2)
        os._exit(list(other.ranges()) != [(5, 3, 7, 100)])
    assert os.waitpid(pid, 0)[1] == 0
    assert board.states(5, 3) == b"\x00\x03\x00"
    assert board.flag(READY)
    assert board.add_ran(3) == 5
    assert board.finished_any()


@given(st.integers(0, 3 * SLOTS), st.integers(1, SLOTS))
def test_states_wrap_around(number: int, count: int) -> None:
    path = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"board-test-{os.getpid()}"
    path.unlink(missing_ok=True)
    board = Board(path, create=True)
    try:
        for n in (number, number + count - 1):
            mark(board, n, 4)
        assert board.state(number) == 4
        assert board.states(number, count)[0] == board.states(number, count)[-1] == 4
        assert len(board.states(number, count)) == count
        board.hand_out(number, count, 1, 0)
        assert board.states(number, count) == bytes(count)
    finally:
        board.close()
        path.unlink()


def test_the_ring_keeps_the_newest_ranges(board: Board) -> None:
    for n in range(RANGES + 10):
        board.hand_out(n, 1, n, 0)
    found = list(board.ranges())
    assert len(found) == RANGES
    assert (found[0][0], found[-1][0]) == (10, RANGES + 9)


def test_a_slot_is_of_the_newest_number_that_uses_it(board: Board) -> None:
    board.hand_out(0, 10, 1, 0)
    board.hand_out(SLOTS, 5, 2, 0)
    assert board.number_at(3) == SLOTS + 3
    assert board.number_at(7) == 7
    assert board.number_at(20) is None


def test_a_board_of_one_that_runs_several_remembers_each_slot(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", create=True, scattered=True)
    board.hand_out(5, 1, 1, 0)
    for n in range(RANGES + 10):
        board.hand_out(100 + n, 1, 2, n)
    board.hand_out(SLOTS + 100, 3, 3, 7)
    other = Board(board.path)
    found = list(other.ranges())
    assert (found[0], found[-1], len(found)) == ((5, 1, 1, 0), (SLOTS + 102, 1, 3, 9), RANGES + 11)
    assert (other.number_at(5), other.number_at(101), other.number_at(50)) == (5, SLOTS + 101, None)
    for number in range(5, 15):
        board.cancel(100 + number)
    assert all(other.is_cancelled(100 + number) for number in range(5, 15))
    board.hand_out(SLOTS + 105, 1, 3, 10)
    assert not other.is_cancelled(SLOTS + 105)
    board.close()
    other.close()


def test_what_runs_is_found(board: Board) -> None:
    assert board.running_slot() is None
    mark(board, SLOTS + 9, 1)
    mark(board, 3, 1)
    assert board.running_slot() == 3
    assert list(board.running_slots()) == [3, 9]
    assert board.is_running(9)
    assert not board.finished_any()


def test_a_board_is_made_once_and_takes_its_room_at_once(board: Board) -> None:
    with pytest.raises(FileExistsError):
        Board(board.path, create=True)
    assert board.path.stat().st_size == SIZE
    assert board.path.stat().st_blocks * 512 >= SIZE
