"""The model ials of the program: what the library's iALS gives, continued, listed and folded in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfml import load as load_run
from gfml.base.checkpoints import load_state
from gfml.base.runs import read_metrics, read_result
from gfml.data.interactions import csr_from_pairs
from gfml.program.recommend import recommend, recommend_new
from gfml.ranking.ials import IALS
from recsys.main import main

FLAGS = ("--model", "ials", "--epochs", "5", "--eval-every", "1")


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    return load_run(train(tmp_path_factory.mktemp("ials"), "run", *FLAGS))


def test_tables_are_those_of_the_library(run):
    settings, data, nodes = run.settings, run.data, load_state(run.path / "final.pt")["model"]["encoder.nodes"]
    solver = IALS(data.train, settings.embedding_dim, l2=0.02, alpha0=0.05)
    torch.manual_seed(settings.seed)
    solver.item = run.experiment.build().encoder.vectors()[1].detach()
    values, tables = [], []
    for _ in range(5):
        solver.epoch()
        values.append(solver.objective() / data.train.nnz)
        tables.append(torch.cat([solver.user, solver.item]))
    assert torch.equal(tables[read_result(run.path)["selection"]["epoch"] - 1], nodes)
    found = [row["train/loss"] for row in read_metrics(run.path)]
    assert found == pytest.approx(values, rel=1e-6) and values == sorted(values, reverse=True)


def test_lists_and_new_users(run):
    user, item = run.model.encoder.vectors()
    seen = run.data.train_and_valid.toarray()[3] > 0
    scores = (item @ user[3]).detach().numpy()
    scores[seen] = -np.inf
    assert recommend(run, [3], 5).items[0].tolist() == np.argsort(-scores, kind="stable")[:5].tolist()
    own = run.data.train[[3]].indices
    solver = IALS(run.data.train, item.shape[1], l2=0.02, alpha0=0.05)
    solver.item = item.detach()
    vector = solver.fold_in(csr_from_pairs(np.zeros_like(own), own, 1, len(item)))[0]
    lists = recommend_new(run, own, 5, include_seen=True)
    order = np.argsort(-(item.detach() @ vector).numpy(), kind="stable")[:5]
    assert lists.items[0].tolist() == order.tolist()


def test_an_interrupted_run_continues_exactly(train, tmp_path, monkeypatch):
    whole = train(tmp_path, "whole", *FLAGS)
    with monkeypatch.context() as patch:
        epoch, calls = IALS.epoch, []

        def interrupted(solver: IALS) -> None:
            calls.append(solver)
            if len(calls) == 4:
                raise KeyboardInterrupt
            epoch(solver)

        patch.setattr(IALS, "epoch", interrupted)
        with pytest.raises(AssertionError):
            train(tmp_path, "parts", *FLAGS, "--checkpoint-every", "1")
    parts = train(tmp_path, "parts", *FLAGS, "--checkpoint-every", "1")
    first, second = (load_state(path / "final.pt")["model"]["encoder.nodes"] for path in (whole, parts))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "flags", ["--loss_mode bpr", "--lr 0.1", "--optimizer adagrad", "--num-neg 3", "--mirror fused"]
)
def test_flags_without_effect_are_refused(fail, tmp_path, flags):
    assert "drop" in fail(main, "--dataset", "demo", "--out", str(tmp_path), "--model", "ials", *flags.split())
