"""Flags that programs share."""

from __future__ import annotations

import pytest

from gfml.base.errors import UserError
from gfml.program.flags import BASELINES, TUNED, baseline_grids
from gfml.report.recommenders import GRIDS


def test_grids_of_baselines() -> None:
    words = ["item-knn.k=100,50", "ease.l2=200", "item-knn.shrink=10", "ials.alpha0=0.05,5e-3"]
    assert baseline_grids(words) == {
        "item-knn": {"k": (50, 100), "shrink": (10.0,)}, "ease": {"l2": (200.0,)}, "ials": {"alpha0": (0.005, 0.05)},
    }  # fmt: skip
    assert baseline_grids(None) == {}


@pytest.mark.parametrize("word", ["item-knn.k=", "item-knn.k=2.5", "ease.k=3", "slim.l2=1", "ease=3", "ials.l2=a"])
def test_a_grid_that_means_nothing_is_named(word: str) -> None:
    with pytest.raises(UserError, match=f"found --baseline-grid {word}, wanted .*item-knn.shrink"):
        baseline_grids([word])


def test_what_flags_know_is_what_baselines_have() -> None:
    assert tuple(GRIDS) == BASELINES
    assert {name: tuple(grid) for name, grid in GRIDS.items() if grid} == TUNED
