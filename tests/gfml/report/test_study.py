"""Ranks over data sets: groups that do not differ, the picture, and what the page says."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfml.report import one_setting, study
from gfml.report.reproduce import Cell


@given(st.lists(st.floats(1, 9), min_size=3, max_size=9).map(sorted), st.floats(0.1, 5))
def test_two_methods_share_a_bar_where_they_do_not_differ(ranks: list[float], cd: float) -> None:
    groups = study.cliques(ranks, cd)
    for first, second in combinations(range(len(ranks)), 2):
        together = any(low <= first and second <= high for low, high in groups)
        assert together == (ranks[second] - ranks[first] < cd)
    assert not any(a != b and a[0] <= b[0] and b[1] <= a[1] for a in groups for b in groups)


def rows_of(*figures: tuple[str, dict[str, float]]) -> list[dict[str, str]]:
    return [{"method": f"{data}, {name}", "ndcg": str(value)} for data, own in figures for name, value in own.items()]


def test_methods_that_every_data_set_has_are_ranked(tmp_path: Path) -> None:
    rows = rows_of(("one", {"a": 0.1, "b": 0.3, "c": 0.2, "d": 9.0}), ("two", {"c": 0.5, "a": 0.4, "b": 0.6}))
    number, methods, found = study._ranked(rows, "ndcg")
    assert (number, methods, found.ranks.tolist()) == (2, ["b", "c", "a"], [1.0, 2.0, 3.0])
    text = study._across(rows, "ndcg", "toy")
    assert "b 1.00, c 2.00, a 3.00" in text and "results/toy-ranks.png" in text
    (tmp_path / "results").mkdir()
    study._draw_ranks(tmp_path, "toy", rows, "ndcg")
    assert (tmp_path / "results" / "toy-ranks.png").read_bytes().startswith(b"\x89PNG")
    labels = [text.get_text().strip() for text in study.rank_figure(methods, [1.0, 2.0, 3.0], found.cd).axes[0].texts]
    assert {"b  1.00", "c  2.00", "a  3.00", f"critical difference {found.cd:.2f}"} <= set(labels)


@pytest.mark.parametrize(
    "rows", (rows_of(("one", {"a": 1, "b": 2, "c": 3})), rows_of(("one", {"a": 1}), ("two", {"a": 2})))
)
def test_too_few_data_sets_or_methods_say_nothing(rows: list[dict[str, str]], tmp_path: Path) -> None:
    assert study._across(rows, "ndcg", "toy") == ""
    study._draw_ranks(tmp_path, "toy", rows, "ndcg")
    assert not list(tmp_path.iterdir())


def trials_of(method: str, **values: float) -> list[dict[str, str]]:
    return [{"method": method, "point": point, "value": str(value)} for point, value in values.items()]


TRIALS = [
    *trials_of("one, M", a=1.0, b=0.98, c=0.5),
    *trials_of("two, M", a=0.10, b=0.39, c=0.40),
    *trials_of("one, N", a=1.0),
]


def test_the_setting_that_does_for_most_data_sets_comes_first() -> None:
    shared = one_setting.shared_points(TRIALS)
    assert list(shared) == ["M"]
    assert [one.point for one in shared["M"]] == ["b", "c", "a"]
    assert shared["M"][0].shares == pytest.approx({"one": 0.98, "two": 0.975})
    assert one_setting.untuned_shares(TRIALS) == {"M": pytest.approx({"one": 0.98, "two": 0.975}), "N": {"one": 1.0}}


def test_a_point_that_one_search_lacks_is_no_shared_one() -> None:
    rows = [*trials_of("one, M", a=1.0, b=0.9), *trials_of("two, M", b=0.2)]
    assert [one.point for one in one_setting.shared_points(rows)["M"]] == ["b"]


def test_defaults_are_set_against_the_tuned_row() -> None:
    rows = rows_of(("one", {"M": 0.5, "M, defaults": 0.49}), ("two", {"M": 0.2, "M, defaults": 0.19}))
    cells = [
        Cell(f"{data}, M, defaults", (), 1, against=(f"{data}, M", f"{data}, X")) for data in ("one", "two", "three")
    ]
    assert one_setting.default_shares(rows, cells, "ndcg") == {"M": pytest.approx({"one": 0.98, "two": 0.95})}
    text = one_setting.section(TRIALS, rows, cells, "ndcg")
    assert "| M | 0.980 | 0.950 | 1 of 2 | 0.965 |" in text and "| M | `b` | 0.980 | 0.975 | 2 of 2 | 0.978 |" in text
    assert one_setting.section([], [], cells, "ndcg") == ""
