from __future__ import annotations

import threading

import pytest
import torch
from numba import njit

from gfml.base.compiled import Team, compiled, in_threads


def test_works_where_machine_code_cannot_be_kept() -> None:
    """numba keeps the code of a function beside its file; this one has none."""
    names = {}
    exec("def twice(x):\n    return 2 * x", names)
    with pytest.raises(RuntimeError, match="no locator available"):
        njit(cache=True)(names["twice"])
    assert compiled(names["twice"])(21) == 42


@pytest.mark.parametrize("number", [1, 3])
def test_parts_are_shared_out_and_come_back_in_order(threads, number: int) -> None:
    threads(number)
    meet = threading.Barrier(number, timeout=20)

    def work(part: int) -> tuple[int, int, int]:
        meet.wait()  # passed only if as many threads as asked for are at work
        return part * part, threading.get_ident(), torch.get_num_threads()

    found = in_threads(work, range(2 * number))
    assert [square for square, _, _ in found] == [part * part for part in range(2 * number)]
    assert len({thread for _, thread, _ in found}) == number
    assert {inner for _, _, inner in found} == {1}
    assert torch.get_num_threads() == number
    made_later = []
    other = threading.Thread(target=lambda: made_later.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert made_later == [number]


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_comes_out_and_the_number_of_threads_stays(threads, number: int) -> None:
    threads(number)
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda part: 1 // part, [1, 0, 2])
    assert torch.get_num_threads() == number


def test_a_team_keeps_its_threads_and_the_caller_works_too() -> None:
    team, seen = Team(), []
    for parts in (1, 3, 2, 3):
        meet = threading.Barrier(parts, timeout=20)

        def work(part: int, meet: threading.Barrier = meet) -> None:
            meet.wait()
            seen.append((part, threading.get_ident()))

        team(work, parts)
    assert sorted(part for part, _ in seen) == sorted([0, 0, 1, 2, 0, 1, 0, 1, 2])
    assert {thread for part, thread in seen if part == 0} == {threading.get_ident()}
    assert len({thread for _, thread in seen}) == 3
    with pytest.raises(ZeroDivisionError):
        team(lambda part: 1 // (part - 1), 2)
