"""A table of one's own in every recommender: why training stopped, and lists that do not depend on company."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from gfml.base.runs import read_result
from gfml.program.cli import run_main
from gfml.program.loading import load
from gfml.program.recommend import recommend, recommend_new

COMMON = ["--epochs", "1000", "--patience", "2", "--eval-every", "1", "--device", "cpu", "--threads", "1", "--report", "0",
          "--baselines", "none", "--no-progress", "--no-cache"]  # fmt: skip
# A rate that moves nothing, so that the first evaluation is the best.
PROGRAMS = {
    "mcl": ("mcl.main", ["--lr", "1e-12", "--topks", "5", "--select-metric", "recall@5", "--dim", "8"]),
    "cml": ("cml_baseline.main", ["--lr", "1e-12", "--topks", "5", "--select-metric", "recall@5", "--dim", "8"]),
    "hlr": ("hlrm.train", ["--lr", "1e-12", "--topk", "5", "--emb_size", "8", "--num_inter", "6"]),
    "transcf": ("hlrm.train", ["--lr", "1e-12", "--topk", "5", "--emb_size", "8", "--num_inter", "6", "--model", "transcf"]),
    "diagonal": ("hlrm.train", ["--lr", "1e-12", "--topk", "5", "--emb_size", "8", "--num_inter", "6", "--relation-form", "diagonal"]),
    "mirror": ("mirror_grad.main", ["--model", "LightGCN", "--learning-rate", "1e-12", "--topks", "5"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    lines = {f"u{user:02d},i{item:02d}" for user in range(40) for item in rng.choice(30, 9, replace=False)}
    path = tmp_path_factory.mktemp("own") / "own.csv"
    path.write_text("user_id,item_id\n" + "\n".join(sorted(lines)) + "\n")
    return path


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_reason_of_the_stop_is_told_and_lists_are_equal_to_the_last_digit(
    name: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, flags = PROGRAMS[name]
    words = ["--dataset", str(table), "--out", str(tmp_path), "--run-name", "run", *COMMON, *flags]
    assert run_main(importlib.import_module(module).main, words) == 0
    selection = read_result(tmp_path / "run")["selection"]
    printed = capsys.readouterr()
    evaluations = 3 if name == "mirror" else 2  # one more, as published
    assert selection["stopped"].startswith(f"stopped at epoch {1 + evaluations}: no better val/")
    assert selection["stopped"] in printed.out + printed.err

    run = load(tmp_path / "run", device="cpu")
    whole = recommend(run, range(40), 7)
    for user in (0, 17, 39):
        alone = recommend(run, [user], 7)
        np.testing.assert_array_equal(alone.items[0], whole.items[user])
        np.testing.assert_array_equal(alone.columns["score"][0], whole.columns["score"][user])
    new = recommend_new(run, run.interactions.train[[17]].indices, 7)
    assert (new.items >= 0).all() and not set(new.items[0]) & set(run.interactions.train[[17]].indices)
