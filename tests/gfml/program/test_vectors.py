"""Vectors under the ids of the source, and an index whose nearest items are the best ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gfml
from gfml.program import index, vectors
from gfml.program.cli import run_main
from gfml.program.recommend import recommend
from recsys.main import main

TINY = (
    "--dataset synthetic --demo-users 60 --demo-items 40 --demo-interactions 900 --epochs 1 --eval-every 1 --baselines none "
    "--report 0 --embedding-dim 8 --topks 5 --select-metric ndcg@5 --no-progress --run-name run"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> gfml.program.loading.Loaded:
    out = tmp_path_factory.mktemp("runs")
    assert run_main(main, [*TINY, "--out", str(out)]) == 0
    return gfml.load(out / "run")


def test_parquet_and_npz_hold_the_same(run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from safetensors.numpy import load_file

    assert run_main(vectors.main, [str(run.path), "--output", str(tmp_path)]) == 0
    assert run_main(vectors.main, [str(run.path), "--output", str(tmp_path), "--form", "npz"]) == 0
    table, stored = parquet.read_table(tmp_path / "items.parquet").to_pydict(), np.load(tmp_path / "vectors.npz")
    found = run.model.encoder.vectors()[1].detach().numpy()
    np.testing.assert_array_equal(np.array(table["vector"], np.float32), found)
    np.testing.assert_array_equal(load_file(tmp_path / "vectors.safetensors")["item_vector"], found)
    np.testing.assert_allclose(table["log_mass"], run.model.gravity.mass.log_item().detach().numpy(), rtol=1e-6)
    assert table["id"] == stored["item_id"].tolist() == list(range(40))


def test_the_nearest_items_of_the_index_are_the_best_ones(run) -> None:
    user, item = vectors.search_space(run)
    nearest = index.exact_search(user, item, 6)
    best = recommend(run, range(60), 6, include_seen=True).items
    assert (nearest == best).mean() > 0.99
