"""The benchmark runs and its rows hold what the heading says. No time is judged here."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> dict:
    return runpy.run_path(str(ROOT / "scripts" / "bench.py"))


def test_rows_of_every_part_on_small_data(bench: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    parts = ["sampling", "lightgcn", "evaluation", "scoring"]
    assert bench["main"](["recsys", "--big", "demo", "--only", *parts, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    works = " ".join(row["work"] for row in rows)
    for wanted in ("sampling", "LightGCN step", "full evaluation", "gravity l2", "gravity l1"):
        assert wanted in works
    for row in rows:
        assert row["ours_cpu"] > 0
        if row["other_cpu"]:
            assert row["ratio"] == pytest.approx(row["ours_cpu"] / row["other_cpu"])
    assert "ratio" in capsys.readouterr().out


def test_the_plain_lightgcn_step_is_the_same_step(bench: dict) -> None:
    """What ours is timed against computes the same update."""
    import numpy as np
    import torch

    from gfml.data.interactions import csr_from_pairs
    from gfml.engine.train import plain_step
    from gfml.gravity import Gravity
    from gfml.ranking.encoders import LightGCN
    from gfml.ranking.graph import build_graph
    from gfml.ranking.sampling import Triples
    from recsys.model import PairOptions, Recommender

    rng = np.random.default_rng(0)
    train = csr_from_pairs(rng.integers(0, 12, 60), rng.integers(0, 9, 60), 12, 9)
    torch.manual_seed(0)
    model = Recommender(
        LightGCN(build_graph(train), 8, 3), Gravity(12, 9, mass="none"), "bpr", pair=PairOptions(decay=1e-2)
    )
    from benchmarks import costs

    plain = costs.reference("lightgcn")
    nodes = torch.nn.Parameter(model.encoder.nodes.detach().clone())
    triple = tuple(torch.from_numpy(rng.integers(0, n, 16)) for n in (12, 9, 9))
    mine = torch.optim.Adam(model.parameters(), lr=1e-2)
    theirs = torch.optim.Adam([nodes], lr=1e-2)
    for _ in range(3):
        loss = plain_step(lambda: model.loss(Triples(*triple)), mine)["loss"].item()
        other = plain.training_step(plain.coo_adjacency(train), nodes, theirs, triple, 12, 3, 1e-2)
        assert loss == pytest.approx(other, rel=1e-5)
    assert torch.allclose(model.encoder.nodes, nodes, atol=1e-4)


def test_vision_rows(bench: dict, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert bench["main"](["vision", "--batch", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    works = {row["work"] for row in rows}
    assert {"attention layer, gravity", "attention layer, split 6", "training step of 1, vit_gra full"} <= works
    assert {row["against"] for row in rows} >= {"torch's fused attention", "vit"}
    assert all(row["ours_cpu"] > 0 and row["ratio"] > 0 for row in rows)


def test_contextual_rows(bench: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert bench["main"](["contextual", "--sizes", "32", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 6
    assert all(row["ours_cpu"] > 0 and row["ratio"] > 0 and "B 32" in row["work"] for row in rows)
    assert capsys.readouterr().out.count("peak memory of") == 6


def test_peak_memory_counts_what_is_held_at_once(bench: dict) -> None:
    import torch

    from benchmarks import costs

    def call() -> None:
        first = torch.ones(1000)
        second = first + 1  # two of 4,000 bytes
        del first
        second.exp_()

    assert 8000 <= costs.peak_memory(call) < 8100


def test_rows_of_the_multimodal_models(bench: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """One row a model, an epoch of all its batches; published costs stand only beside the data they were measured on."""
    assert bench["main"](["mirror", "--data", "demo", "--models", "BPR", "LightGCN"]) == 0
    out = capsys.readouterr().out
    assert "BPR epoch on demo" in out and "LightGCN epoch on demo" in out and "MMRec" not in out
