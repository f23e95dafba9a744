"""Against the stored vectors: the paper's relations, the port's, scores of all items, and both families of metrics."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.metrics.ranking import means, ranking_metrics
from gfml.ranking.encoders import Tables
from hlrm.data import History, PairBatch
from hlrm.metrics import paper_metrics
from hlrm.model import HingeOptions, RelationModel, clip_rows_
from hlrm.relations import DiagonalRelation, MemoryRelation, lram, neighbour_attention
from hlrm.scoring import BlockScorer, MemoryScorer

PRECISIONS = (torch.float64, torch.float32)
# name in the file -> kind and settings of the memory relation
MEMORY = {
    "hlr": ("base", {}),
    "hlr_beta": ("base", {"beta": None}),
    "hlr_diff_memory": ("base", {"diff_memory": True}),
    "hlrpp": ("plus", {}),
}


@pytest.fixture(scope="module")
def golden(stored):
    return stored("hlrm")


def encoder_of(golden, prefix, dtype):
    user, item = golden[f"{prefix}user_emb"], golden[f"{prefix}item_emb"]
    encoder = Tables(len(user), len(item), user.shape[1], init="ball").to(dtype)
    with torch.no_grad():
        encoder.nodes.copy_(torch.cat([user, item]))
    return encoder


def memory_model(golden, name="hlr", dtype=torch.float64, **options):
    kind, settings = MEMORY[name]
    if "beta" in settings:
        settings = {"beta": float(golden["memory_beta"])}
    slots, dim = golden["memory_M"].shape
    relation = MemoryRelation(dim, slots, kind, **settings).to(dtype)
    with torch.no_grad():
        relation.key.copy_(golden["memory_K"])
        relation.memory.copy_(golden["memory_M"])
        if relation.user_key is not None:
            relation.user_key.copy_(golden["memory_K_user_slot"])
            relation.user_memory.copy_(golden["memory_M_user_slot"])
    hinge = HingeOptions(float(golden["margin"]), reduction="sum", **options)
    return RelationModel(encoder_of(golden, "memory_", dtype), relation, hinge)


def memory_batch(golden):
    ids = golden["memory_history"]
    history = History(ids.masked_fill(ids == len(golden["item_emb"]), 0), golden["memory_history_len"])
    return PairBatch(golden["users"], golden["pos"], golden["neg"], history)


def both(batch):
    return torch.stack([batch.pos, batch.neg], 1)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", MEMORY)
def test_paper_relations_weights_distances_and_loss(golden, close, name, dtype):
    model, batch = memory_model(golden, name, dtype), memory_batch(golden)
    close(model.loss(batch)["loss"].detach(), golden[f"natural_{name}__loss_sum"])
    found = model.attend(batch.users, both(batch), batch.history)
    sq_distance = model.distances(batch.users, both(batch), batch.history).detach()
    for column, side in enumerate(("pos", "neg")):
        close(sq_distance[:, column], golden[f"natural_{name}__d2_{side}"])
        if name != "hlrpp":
            close(found.vector[:, column].detach(), golden[f"natural_{name}__relation_{side}"])
            close(found.user_weights[:, :, column].detach(), golden[f"natural_{name}__weights_{side}"])
        else:
            wanted = golden[f"natural_hlrpp__preference_{side}"] + golden[f"natural_hlrpp__relation_{side}"]
            close(found.vector[:, column].detach(), wanted)
            close(found.user_weights[:, :, column].detach(), golden[f"natural_hlrpp__relation_weights_{side}"])
            close(found.item_weights[:, :, column].detach(), golden[f"natural_hlrpp__preference_weights_{side}"])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ["hlr", "hlrpp"])
def test_paper_gradients(golden, close, name, dtype):
    model = memory_model(golden, name, dtype)
    model.loss(memory_batch(golden))["loss"].backward()
    user, item = model.encoder.nodes.grad.split([len(golden["user_emb"]), len(golden["item_emb"])])
    found = {"user_emb": user, "item_emb": item, "K": model.relation.key.grad, "M": model.relation.memory.grad}
    for key, value in found.items():
        close(value, golden[f"natural_{name}__grad_{key}"], grad=True)


def test_a_copied_relation(golden, close):
    model = memory_model(golden, copy_relations=True)
    close(model.loss(memory_batch(golden))["loss"].detach(), golden["natural_hlr_copy_relation__loss_sum"])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", MEMORY)
def test_factorised_scores_of_all_items(golden, close, name, dtype):
    """Against the stored scores where there are any, and against the training-time distances always."""
    model, batch = memory_model(golden, name, dtype), memory_batch(golden)
    user, item = (part.detach() for part in model.encoder.vectors())
    scorer = MemoryScorer(user[batch.users], item, model.relation, batch.history, block=3)
    found = scorer.score(torch.arange(len(batch)))
    every = torch.arange(len(item)).expand(len(batch), -1)
    close(found, -model.distances(batch.users, every, batch.history).detach())
    if f"natural_{name}__scores_all_items" in golden:
        close(found, golden[f"natural_{name}__scores_all_items"])


def test_lram(golden, close):
    user, item = golden["memory_user_emb"][golden["users"]], golden["memory_item_emb"][golden["pos"]]
    key, memory = golden["memory_K"], golden["memory_M"]
    close(lram(item, user, key, memory), golden["natural_lram_pairs"])
    close(lram(user, item, key, memory), golden["natural_lram_pairs"])
    close(lram(item[0], torch.zeros_like(item[0]), key, memory), golden["natural_lram_zero"])
    close(golden["natural_lram_zero"], memory.mean(0))


# -- the port


def diagonal_model(golden, kind, dtype=torch.float64):
    """The port's model with its tables rescaled as it does at look-up: only rows that the batch reads."""
    slots, dim = golden["user_attention_key"].shape
    relation = DiagonalRelation(dim, slots, kind).to(dtype)
    encoder = encoder_of(golden, "", dtype)
    with torch.no_grad():
        relation.key.copy_(golden["user_attention_key"])
        relation.value.copy_(golden["user_attention_val"])
        if kind == "plus":
            relation.item_key.copy_(golden["item_attention_key"])
            relation.item_value.copy_(golden["item_attention_val"])
        items = torch.cat([golden["pos"], golden["neg"], golden["history"].reshape(-1)]) + len(golden["user_emb"])
        rows = torch.cat([golden["users"], items]).unique()
        looked_up = encoder.nodes[rows]
        clip_rows_(looked_up, compat=True)
        encoder.nodes[rows] = looked_up
    return RelationModel(encoder, relation, HingeOptions(float(golden["margin"]), squared=False, compat=True))


def diagonal_batch(golden):
    """The port attends to every place of the history, item 0 included."""
    counts = torch.full((len(golden["users"]),), golden["history"].shape[1])
    return PairBatch(golden["users"], golden["pos"], golden["neg"], History(golden["history"], counts))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_port_values_and_gradients(golden, close, kind, dtype):
    model, batch = diagonal_model(golden, kind, dtype), diagonal_batch(golden)
    prefix = f"orig_{kind}__"
    close(
        model.encoder.nodes.detach(), torch.cat([golden[f"{prefix}user_emb_after"], golden[f"{prefix}item_emb_after"]])
    )
    found = model.attend(batch.users, both(batch), batch.history)
    distance = model.distances(batch.users, both(batch), batch.history).detach()
    for column, side in enumerate(("pos", "neg")):
        close(found.vector[:, column].detach(), golden[f"{prefix}relation_{side}"])
        close(found.user_weights[:, :, column].detach(), golden[f"{prefix}user_attention_weights_{side}"])
        if kind == "plus":
            close(found.item_weights[:, :, column].detach(), golden[f"{prefix}item_attention_weights_{side}"])
        close(distance[:, column], golden[f"{prefix}dist_{side}"])
        close(found.vector[:, column].detach(), golden[f"natural_diagonal_{kind}__relation_{side}"])
        close(distance[:, column], golden[f"natural_diagonal_{kind}__dist_{side}"])
    loss = model.loss(batch)["loss"]
    close(loss.detach(), golden[f"{prefix}loss"])
    loss.backward()
    user, item = model.encoder.nodes.grad.split([len(golden["user_emb"]), len(golden["item_emb"])])
    grads = {"user_emb": user, "item_emb": item, "user_attention_key": model.relation.key.grad,
             "user_attention_val": model.relation.value.grad}  # fmt: skip
    if kind == "plus":
        grads |= {
            "item_attention_key": model.relation.item_key.grad,
            "item_attention_val": model.relation.item_value.grad,
        }
    for name, value in grads.items():
        close(value, golden[f"{prefix}grad_{name}"], grad=True)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_port_inference(golden, close, kind):
    """Every item row is looked up there, so every one is rescaled."""
    model = diagonal_model(golden, kind)
    clip_rows_(model.encoder.nodes.data, compat=True)
    batch = diagonal_batch(golden)
    user, item = (part.detach() for part in model.encoder.vectors())
    history = History(batch.history.ids[:1], batch.history.counts[:1])
    scorer = BlockScorer(user[batch.users[:1]], item, model.relation, history, squared=False, block=4)
    found = scorer.score(torch.tensor([0]))[0]
    close(-found, golden[f"orig_{kind}__inference_dist"])
    assert torch.equal(found.topk(10).indices, golden[f"orig_{kind}__inference_top10"])
    attended = model.relation(user[batch.users[:1]], item[None], item[history.ids], history.mask)
    close((user[batch.users[:1]] + attended.vector[0]).detach(), golden[f"orig_{kind}__inference_query"])


def test_the_exact_projection_differs_from_the_port_by_its_1e_7(golden):
    exact, compat = golden["user_emb"].clone(), golden["user_emb"].clone()
    clip_rows_(exact)
    clip_rows_(compat, compat=True)
    difference = (exact - compat).abs().max()
    assert 0 < difference < 2e-7
    long = golden["user_emb"].norm(dim=1) > 1
    assert torch.equal(exact[~long], golden["user_emb"][~long])
    torch.testing.assert_close(exact[long].norm(dim=1), torch.ones(int(long.sum()), dtype=torch.float64))


def test_the_unused_third_module(golden, close):
    user, item = golden["user_emb"][golden["users"]], golden["item_emb"][golden["pos"]]
    diagonal = (golden["item_attention_key"] * golden["item_attention_val"]).sum(0)
    wanted = golden["orig_extended__output"]
    neighbours = golden["extended_neighbour_users"]
    found = [
        neighbour_attention(target, other, neighbours, diagonal).vector[:, 0]
        for target, other in ((user, item), (item, user))
    ]
    assert min(float((one - wanted).abs().max()) for one in found) < 1e-12


# -- vectors printed in the description of the method


def test_printed_vector_of_the_paper_form():
    relation = MemoryRelation(3, 2).double()
    with torch.no_grad():
        relation.key.copy_(torch.tensor([[1.7, -0.5], [0, 0.4], [-0.8, 0]]))
        relation.memory.copy_(torch.tensor([[0, -1.8, 1], [0.6, -0.6, -0.2]]))
    user = torch.tensor([[0.3, -0.1, -0.1]], dtype=torch.float64)
    item = torch.tensor([[[-0.7, 0.3, 0.1]]], dtype=torch.float64)
    history = torch.tensor([[[0.1, -0.8, 0.8], [0.1, -0.2, 1]]], dtype=torch.float64)
    found = relation(user, item, history, torch.ones(1, 2, dtype=torch.bool))
    near = {"rtol": 0, "atol": 1e-6}
    wanted = torch.tensor([0.336032, 0.331331, 0.332637], dtype=torch.float64)
    torch.testing.assert_close(found.user_weights[0, :, 0].detach(), wanted, **near)
    wanted = torch.tensor([0.338419, -1.123163, 0.323163], dtype=torch.float64)
    torch.testing.assert_close(found.vector[0, 0].detach(), wanted, **near)
    assert (user + found.vector[:, 0] - item[:, 0]).square().sum().item() == pytest.approx(4.126558, abs=1e-6)


# -- metrics


def relevant_of(golden):
    indptr, items = golden["metric_truth_indptr"].numpy(), golden["metric_truth_items"].numpy()
    size = int(max(items.max(), golden["metric_recommended"].max())) + 1
    matrix = sp.csr_array((np.ones(len(items), np.float32), items, indptr), shape=(len(indptr) - 1, size))
    matrix.sort_indices()
    return matrix


def test_published_metrics(golden):
    k, relevant = int(golden["metric_k"]), relevant_of(golden)
    found = paper_metrics(golden["metric_recommended"].numpy(), relevant, k, whole_list=True)
    names = {"prec": "prec", "rec": "rec", "hitrate": "hitrate", "map": "map", "mrr": "mrr", "ndcg_global": "ndcg",
             "ndcg_local": "ndcg_local"}  # fmt: skip
    for theirs, ours in names.items():
        per_user = golden[f"orig_metric_user_{theirs}"].numpy()
        np.testing.assert_allclose(np.nan_to_num(found[ours]), per_user, atol=1e-12, err_msg=theirs)
        np.testing.assert_allclose(
            np.nanmean(found[ours]), float(golden[f"orig_metric_{theirs}"]), atol=1e-12, err_msg=theirs
        )
    for name in ("map", "mrr", "hitrate", "ndcg_local"):
        wanted = golden[f"natural_paper_metric_user_{name}"].numpy()
        np.testing.assert_allclose(found[name], wanted, atol=1e-12, err_msg=name)


def test_usual_metrics(golden):
    k = int(golden["metric_k"])
    found = ranking_metrics(golden["metric_recommended"].numpy(), relevant_of(golden), [k])
    names = {"prec": "precision", "rec": "recall", "hit": "hit", "map": "map", "mrr": "mrr", "ndcg": "ndcg"}
    for theirs, ours in names.items():
        np.testing.assert_allclose(
            found[f"{ours}@{k}"], golden[f"natural_metric_user_{theirs}"].numpy(), atol=1e-12, err_msg=theirs
        )
        assert means(found)[f"{ours}@{k}"] == pytest.approx(float(golden[f"natural_metric_{theirs}"]), abs=1e-12)
