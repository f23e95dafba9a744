"""The plain rebuilding of MMRec's step against vectors that the program itself gave, and its lists against ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.benchmarks.test_benchmarks import module

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
OPTIONS = {"BPR": (), "VBPR": (), "LightGCN": ("n_layers",), "BM3": ("n_layers",), "FREEDOM": ("n_ui_layers", "knn_k")}
NAMES = {"n_layers": "layers", "n_ui_layers": "layers", "knn_k": "k"}


def stored(name: str) -> dict[str, np.ndarray]:
    path = GOLDEN / f"mm_{name.lower()}.npz"
    if not path.exists():
        pytest.skip("needs the stored vectors of the published programs")
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_scores_and_gradients_are_the_programs(name: str) -> None:
    mmrec, toy, given = module("mmrec"), stored("toy"), stored(name)
    train = sp.csr_array(toy["R"].astype(np.float64))
    features = {key: torch.from_numpy(toy[f"feat_{key}"]).float() for key in ("image", "text")}
    options: dict[str, Any] = {NAMES[key]: int(given[f"opt_{key}"]) for key in OPTIONS[name]}
    options |= {"dropout": 0.0} if name == "BM3" else {}
    model = mmrec.MODELS[name](train, features, dim=8, weight=float(given["opt_reg_weight"]), **options)
    named = {key.replace(".weight", "_w").replace(".bias", "_b"): value for key, value in model.named_parameters()}
    assert set(named) == {key[2:] for key in given if key.startswith("p_")}
    with torch.no_grad():
        for key, value in named.items():
            value.copy_(torch.from_numpy(given[f"p_{key}"]))
    batch = [torch.from_numpy(toy[f"batch_{key}"]) for key in ("user", "pos", "neg")]
    loss = model.loss(*batch)
    loss.backward()
    users, items = model.eval().scored()
    np.testing.assert_allclose(loss.item(), given["orig_loss"], rtol=2e-6)
    np.testing.assert_allclose((users @ items.T).detach(), given["orig_score"], rtol=2e-5, atol=2e-6)
    for key, value in named.items():
        np.testing.assert_allclose(value.grad, given[f"orig_grad_{key}"], rtol=2e-5, atol=2e-6, err_msg=key)


def test_an_epoch_keeps_a_fifth_of_the_edges_and_draws_free_items() -> None:
    mmrec, toy = module("mmrec"), stored("toy")
    train = sp.csr_array(toy["R"].astype(np.float64))
    features = {key: torch.from_numpy(toy[f"feat_{key}"]).float() for key in ("image", "text")}
    torch.manual_seed(0)
    model = mmrec.FREEDOM(train, features, dim=8)
    batches, optimizer = mmrec.Batches(train), torch.optim.Adam(model.parameters(), lr=1e-3)
    assert mmrec.train_epoch(model, batches, optimizer) > mmrec.train_epoch(model, batches, optimizer)
    assert model.thinned._nnz() == 2 * int(stored("freedom")["in_kept_edges"])
    (batch,) = batches.epoch(triples=True)
    assert sorted(zip(*(ids.tolist() for ids in batch[:2]), strict=True)) == list(zip(*train.nonzero(), strict=True))
    assert not train.toarray()[batch[0], batch[2]].any()


def test_validation_is_the_programs() -> None:
    mmrec, given = module("mmrec"), stored("eval")
    users, items, labels = (given[f"inter_{key}"] for key in ("user", "item", "label"))
    shape = int(given["n_users"]), int(given["n_items"])
    rows = {part: labels == part for part in (0, 1)}
    train, valid = (sp.csr_array((np.ones(rows[p].sum()), (users[rows[p]], items[rows[p]])), shape) for p in rows)
    model = mmrec.BPR(train, {}, dim=shape[1])
    with torch.no_grad():
        model.user.copy_(torch.from_numpy(given["scores"]))
        model.item.copy_(torch.eye(shape[1]))
    found = mmrec.validate(model, train, valid)
    for row, name in zip(given["valid_exact"], given["metric_names"], strict=True):
        for value, k in zip(row, given["topk"], strict=True):
            assert found[f"{name}@{k}"] == pytest.approx(value, rel=1e-9), (name, k)
