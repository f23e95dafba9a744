"""The plain rebuilding of MMRec's step against vectors that the program itself gave, and its lists against ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.benchmarks.test_benchmarks import module

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
OPTIONS = {
    "BPR": (), "VBPR": (), "LightGCN": ("n_layers",), "BM3": ("n_layers",), "FREEDOM": ("n_ui_layers", "knn_k"),
    "LATTICE": ("knn_k", "lambda_coeff", "feat_embed_dim", "train_batch_size"), "MMGCN": (), "DRAGON": ("knn_k",),
    "MGCN": ("n_ui_layers", "knn_k", "cl_loss", "train_batch_size"),
}  # fmt: skip
NAMES = {"n_layers": "layers", "n_ui_layers": "layers", "knn_k": "k", "lambda_coeff": "frozen", "cl_loss": "pull",
         "feat_embed_dim": "mapped", "train_batch_size": "rows"}  # fmt: skip


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"mm_{name.lower()}.npz", allow_pickle=False) as found:
        return dict(found)


def built(name: str) -> tuple[Any, dict[str, torch.Tensor], list[torch.Tensor], dict[str, np.ndarray]]:
    """The model with the stored options and numbers, its trained and constant tables, and the batch."""
    mmrec, toy, given = module("mmrec"), stored("toy"), stored(name)
    train = sp.csr_array(toy["R"].astype(np.float64))
    features = {key: torch.from_numpy(toy[f"feat_{key}"]).float() for key in ("image", "text")}
    options: dict[str, Any] = {NAMES[key]: given[f"opt_{key}"].item() for key in OPTIONS[name]}
    options |= {"dropout": 0.0} if name == "BM3" else {}
    dim = int(given["opt_embedding_size"])
    model = mmrec.MODELS[name](train, features, dim=dim, weight=float(given["opt_reg_weight"]), **options)
    if name == "DRAGON":
        model.similar = given["in_user_index"].tolist()
        model.similar_weight = torch.from_numpy(given["in_user_weight"]).float()
    named = {key.replace(".weight", "_w").replace(".bias", "_b"): value for key, value in model.named_parameters()}
    named |= model.constants if name == "MMGCN" else {}
    # Numbers of LATTICE's other backbones.
    assert set(named) == {key[2:] for key in given if key.startswith("p_") and key[2:4] not in ("gc", "bi")}
    with torch.no_grad():
        for key, value in named.items():
            value.copy_(torch.from_numpy(given[f"p_{key}"]))
    return model, named, [torch.from_numpy(toy[f"batch_{key}"]) for key in ("user", "pos", "neg")], given


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_scores_and_gradients_are_the_programs(name: str) -> None:
    model, named, batch, given = built(name)
    loss = model.loss(*batch)
    loss.backward()
    users, items = model.eval().scored()
    np.testing.assert_allclose(loss.item(), given["orig_loss"], rtol=2e-6)
    np.testing.assert_allclose((users @ items.T).detach(), given["orig_score"], rtol=2e-5, atol=2e-6)
    for key, value in named.items():
        grad = value.grad.double()
        sums = [grad.sum(), grad.norm(), (grad * value.double()).sum()]
        np.testing.assert_allclose(
            [x.item() for x in sums], given[f"orig_gradsum_{key}"], rtol=2e-4, atol=1e-5, err_msg=key
        )
        # Of the largest tables only the sums are stored.
        if grad.numel() <= 9000:
            np.testing.assert_allclose(grad, given[f"orig_grad_{key}"], rtol=2e-5, atol=2e-6, err_msg=key)


def test_lattice_learns_its_graph_in_the_first_batch_of_an_epoch() -> None:
    model, named, batch, given = built("LATTICE")
    for part in ("orig", "orig_later_batch"):
        model.zero_grad()
        model.loss(*batch).backward()
        for key in ("user", "item"):
            np.testing.assert_allclose(named[key].grad, given[f"{part}_grad_{key}"], rtol=2e-5, atol=2e-6)
    assert {key for key, value in named.items() if value.grad is None} == set(given["orig_later_batch_no_gradient"])
    model.new_epoch()
    model.loss(*batch).backward()
    assert all(value.grad is not None for value in named.values())


def test_dragon_fills_short_lists_up_from_themselves() -> None:
    model, _, _, given = built("DRAGON")
    toy = stored("toy")
    model.new_epoch()
    shared = toy["R"].astype(int) @ toy["R"].T.astype(int)
    for user, (ids, weights) in enumerate(zip(model.similar, model.similar_weight, strict=True)):
        others = set(np.flatnonzero(shared[user])) - {user}
        assert len(ids) == 40 and (set(ids) == others if others else not weights.any())
        if others:
            torch.testing.assert_close(weights, torch.from_numpy(shared[user, ids]).float().softmax(0))
    assert given["in_user_index"].shape == (len(model.similar), 40)


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
