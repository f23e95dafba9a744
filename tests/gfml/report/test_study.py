"""Ranks over data sets: groups that do not differ, the picture, and what the page says."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfml.report import study


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
