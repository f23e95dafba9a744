"""Simple recommenders as runs: the figures that stand beside every model, lists and figures per user, and a run that loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gfml
from gfml.ranking.evaluation import evaluate
from gfml.report.recommenders import baseline_results
from recsys.baseline import PROGRAM

SMALL = [
    "--dataset",
    "synthetic",
    "--demo-users",
    "80",
    "--demo-items",
    "60",
    "--demo-interactions",
    "1400",
    "--report",
    "0",
    "--topks",
    "20",
]


@pytest.mark.parametrize(
    ("method", "grid"),
    (
        ("popularity", []),
        ("item-knn", ["item-knn.k=5,20", "item-knn.shrink=0,10"]),
        ("ease", ["ease.l2=10,100"]),
        ("ials", ["ials.alpha0=0.1,0.5", "ials.l2=0.01"]),
    ),
)
def test_a_baseline_is_a_run(tmp_path: Path, method: str, grid: list[str]) -> None:
    words = [*SMALL, "--out", str(tmp_path), "--method", method, *(["--baseline-grid", *grid] if grid else [])]
    assert PROGRAM.main(words) == 0
    [path] = tmp_path.glob("baseline-*")
    run = gfml.load(path)
    values = {word.partition("=")[0].partition(".")[2]: word.partition("=")[2].split(",") for word in grid}
    grids = {
        method: {
            name: tuple(map(float, given)) if name != "k" else tuple(map(int, given)) for name, given in values.items()
        }
    }
    beside = baseline_results([method], run.interactions, [20], grids=grids)[method]
    assert run.result["test"] == beside["test"] and run.result["settings"] == beside["settings"]
    again = evaluate(run.experiment.scorer(run.model), run.interactions, "test", [20], beyond=True).means
    assert again == run.result["test"]
    recall = np.load(path / "analysis.npz")["per_user/recall@20"]
    assert recall.mean() == pytest.approx(again["recall@20"], abs=1e-6)
    facts = json.loads((path / "run.json").read_text())
    assert facts["sessions"][-1]["cpu_seconds"] > 0
    # Nothing is drawn: another seed is the same run.
    assert PROGRAM.main([*words, "--seed", "7"]) == 0 and len(list(tmp_path.glob("baseline-*"))) == 1
