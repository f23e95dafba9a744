"""The graph models with user graphs, routing, frozen tables or noise against the stored vectors."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gfml.ranking.sparse import SparseMatrix

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toy.py"))))
# The published degrees carry a guard of 1e-7, ours do not; the loss terms pass it on.
GUARD = {"rtol": 1e-7, "atol": 1e-7}
MODALITIES = ("image", "text")


@pytest.fixture(autouse=True)
def double():
    """Golden vectors are float64; models take torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def toy(stored):
    return stored("mm_toy")


@pytest.fixture
def data(toy):
    return kit.toy_data(toy)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, **GUARD)


def load(model, golden, names):
    return kit.fill(model, {ours: golden[f"p_{name}"] for ours, name in names.items()})


def check(model, batch, golden, prefix, parts, names, *, score=lambda x: x):
    """Total, parts (ours -> stored), stored gradients, scores of one variant."""
    terms = model.train().loss(batch)
    same(terms["loss"], golden[f"{prefix}loss"])
    for ours, theirs in parts.items():
        same(terms[ours], golden[f"{prefix}part_{theirs}"])
    check_grads(model, terms["loss"], golden, prefix, names)
    same(score(kit.scores(model)), golden[f"{prefix}score"])


def check_grads(model, loss, golden, prefix, names):
    found = kit.gradients(loss, model)
    compared = [ours for ours, theirs in names.items() if f"{prefix}grad_{theirs}" in golden and ours in found]
    assert compared
    for ours in compared:
        same(found[ours], golden[f"{prefix}grad_{names[ours]}"])


def linear(ours, theirs):
    return {f"{ours}.weight": f"{theirs}_w", f"{ours}.bias": f"{theirs}_b"}


def branch_names():
    found = {"user_weight": "wu"}
    for m in MODALITIES:
        found |= {f"branches.{m}.preference": f"{m}_pref"}
        found |= linear(f"branches.{m}.mlp.0", f"{m}_mlp1") | linear(f"branches.{m}.mlp.2", f"{m}_mlp2")
    return found


def set_user_graph(model, golden, prefix="in_"):
    """The stored neighbours, for training and evaluation."""
    ids, weights = golden[f"{prefix}user_index"], golden[f"{prefix}user_weight"]
    rows = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    graph = SparseMatrix(rows, ids.flatten(), weights.flatten(), (len(ids), len(ids)))
    model.user_graph.operator = model.user_graph.training_operator = graph


BRANCH_PARTS = {"reg_image": "reg_pref_image", "reg_text": "reg_pref_text", "reg_user": "reg_wu"}


@pytest.mark.parametrize("variant, prefix", [("in_", "orig_"), ("in_k6_", "orig_k6_")])
def test_dualgnn_as_published(stored, toy, data, variant, prefix):
    golden, names = stored("mm_dualgnn"), branch_names() | {"item_weight": "wi"}
    model = load(kit.build("DualGNN", data, behaviour="published", embedding_dim=64, reg_weight=0.1), golden, names)
    set_user_graph(model, golden, variant)
    parts = {"bpr": "bpr_log2", "reg_item": "reg_wi"} | BRANCH_PARTS
    check(model, kit.toy_batch(toy), golden, prefix, parts, names)
    if variant == "in_":
        same(model.user_graph(torch.eye(30)), golden["graph_user_operator"])


def test_dualgnn_fixed(stored, toy, data):
    """Intended mix, natural logarithm, no unused item weights (the stored total decays them)."""
    golden, names = stored("mm_dualgnn"), branch_names()
    model = load(kit.build("DualGNN", data, embedding_dim=64, reg_weight=0.1), golden, names)
    set_user_graph(model, golden)
    terms = model.train().loss(kit.toy_batch(toy))
    same(terms["loss"] + 0.1 * golden["fixed_mix_ln_part_reg_wi"], golden["fixed_mix_ln_loss"])
    same(terms["bpr"], golden["fixed_mix_ln_part_bpr_ln"])
    check_grads(model, terms["loss"], golden, "fixed_mix_ln_", names)
    same(kit.scores(model), golden["fixed_mix_ln_score"])


@pytest.mark.parametrize(
    "behaviour, variant, prefix, bpr",
    [
        ("published", "in_", "orig_", "bpr_log2"),
        ("published", "in_k6_", "orig_k6_", "bpr_log2"),
        ("fixed", "in_", "fixed_ln_", "bpr_ln"),
    ],
)
def test_dragon(stored, toy, data, behaviour, variant, prefix, bpr):
    golden, names = stored("mm_dragon"), branch_names()
    model = kit.build(
        "DRAGON",
        data,
        behaviour=behaviour,
        embedding_dim=64,
        reg_weight=0.1,
        knn_k=5,
        n_mm_layers=1,
        mm_image_weight=0.1,
    )
    load(model, golden, names)
    set_user_graph(model, golden, variant)
    check(model, kit.toy_batch(toy), golden, prefix, {"bpr": bpr} | BRANCH_PARTS, names)
    same(model.item_graph(torch.eye(24)), golden["graph_item"])


def test_slmrec(stored, toy, data):
    golden = stored("mm_slmrec")
    names = linear("fuse.user", "fuse_user") | linear("fuse.item", "fuse_item")
    names |= {key: value for n in range(1, 6) for key, value in linear(f"heads.g{n}", f"g{n}").items()}
    names |= {key: value for m in MODALITIES for key, value in linear(f"features.{m}.linear", f"{m}_proj").items()}
    model = kit.build("SLMRec", data, layer_num=3, temp=0.2, ssl_temp=0.5, ssl_alpha=0.5)
    kit.fill(model, {"tables.nodes": kit.nodes(golden)} | {ours: golden[f"p_{name}"] for ours, name in names.items()})
    parts = {name: name for name in ("main", "fac_image", "fac_text")}
    check(model, kit.toy_batch(toy), golden, "orig_", parts, names, score=torch.sigmoid)
    same(
        kit.gradients(model.train().loss(kit.toy_batch(toy))["loss"], model)["tables.nodes"],
        kit.nodes(golden, "orig_grad_"),
    )


@pytest.mark.parametrize(
    "adj_type, key",
    [
        ("pre", "graph_ui"),
        ("plain", "graph_ui_plain"),
        ("norm", "graph_ui_norm"),
        ("gcmc", "graph_ui_gcmc"),
        ("mean", "graph_ui_mean"),
    ],
)
def test_slmrec_graphs(stored, data, adj_type, key):
    same(kit.build("SLMRec", data, adj_type=adj_type).graph(torch.eye(54)), stored("mm_slmrec")[key])


@pytest.mark.parametrize("behaviour, prefix", [("published", "orig_"), ("fixed", "fixed_routing_")])
def test_grcn(stored, toy, data, behaviour, prefix):
    golden = stored("mm_grcn")
    names = {"id": "id", "confidence": "conf"} | {f"preference.{m}": f"{m}_pref" for m in MODALITIES}
    names |= {key: value for m in MODALITIES for key, value in linear(f"features.{m}.linear", f"{m}_proj").items()}
    model = load(
        kit.build("GRCN", data, behaviour=behaviour, latent_embedding=6, n_layers=3, reg_weight=0.1), golden, names
    )
    parts = {"bpr": "bpr", "reg_id": "reg_id", "reg_all": "reg_pref_image_all"} | {
        f"reg_{m}": f"reg_pref_{m}_batch" for m in MODALITIES
    }
    check(model, kit.toy_batch(toy), golden, prefix, parts, names)
    # Stored edges: every train pair as user -> item, then as item -> user; ours stand by target, then source.
    users, items = toy["train_user"], toy["train_item"] + 30
    target, source = torch.cat([items, users]), torch.cat([users, items])
    order = torch.from_numpy(np.lexsort((source, target)))
    assert torch.equal(model.edges.row_of.long(), target[order]) and torch.equal(
        model.edges.indices.long(), source[order]
    )
    shares = []
    for name in MODALITIES:
        same(model.routed(name)[0], golden[f"{prefix}mid_pref_{name}"])
        shares.append(model.refined(name)[1])
        same(shares[-1], golden[f"{prefix}mid_att_{name}"][order])
    same(model.edge_weights(shares), golden[f"{prefix}mid_edge_weight"][order])
    sums = torch.zeros(54).index_add(0, target[order], shares[0].detach())
    same(sums[sums > 0], torch.ones(int((sums > 0).sum())))
    assert kit.scores(model).shape == (30, 24) and model.outputs()[0].shape[1] == 8 + 2 * 6


def mmgcn_names():
    found = {"id": "id"}
    for m in MODALITIES:
        found |= {f"branches.{m}.preference": f"{m}_pref"}
        for n in range(3):
            found |= {f"branches.{m}.message.{n}.weight": f"{m}_conv{n + 1}"}
            found |= linear(f"branches.{m}.own.{n}", f"{m}_lin{n + 1}") | linear(
                f"branches.{m}.join.{n}", f"{m}_g{n + 1}"
            )
    return found | linear("branches.image.project", "image_proj")


def mmgcn_values(golden, concat=True):
    """Stored parameters by our names: messages are stored in x out; without concatenation part of ``join`` is unused."""
    found = {ours: golden[f"p_{name}"] for ours, name in mmgcn_names().items()}
    for ours, value in found.items():
        if ".message." in ours:
            found[ours] = value.T
        if ".join." in ours and ours.endswith("weight") and not concat:
            found[ours] = value[:, :-8]
    return found


@pytest.mark.parametrize("behaviour", ["published", "fixed"])
def test_mmgcn(stored, toy, data, behaviour):
    golden = stored("mm_mmgcn")
    model = kit.fill(kit.build("MMGCN", data, behaviour=behaviour, reg_weight=0.1), mmgcn_values(golden))
    names = {ours: name for ours, name in mmgcn_names().items() if ".message." not in ours}
    parts = {"bpr": "bpr", "reg_id": "reg_id", "reg_pref": "reg_pref"}
    check(model, kit.toy_batch(toy), golden, "orig_", parts, names)
    grads = kit.gradients(model.train().loss(kit.toy_batch(toy))["loss"], model)
    same(grads["branches.text.message.0.weight"], golden["orig_grad_text_conv1"].T)
    same(grads["branches.image.message.2.weight"], golden["orig_grad_image_conv3"].T)
    for name in MODALITIES:
        same(model.branches[name](model.mean, model.id), golden[f"orig_mid_rep_{name}"])
    # Published: constants that every checkpoint holds; fixed: parameters with the gradients stored for them.
    assert ("id" in grads) == (behaviour == "fixed") and "id" in model.state_dict()


def test_mmgcn_without_concatenation(stored, toy, data):
    golden = stored("mm_mmgcn")
    model = kit.fill(kit.build("MMGCN", data, reg_weight=0.1, concat=False), mmgcn_values(golden, concat=False))
    names = {"id": "id"} | {f"branches.{m}.preference": f"{m}_pref" for m in MODALITIES}
    check(model, kit.toy_batch(toy), golden, "orig_noconcat_", {}, names)


def mvgae_names():
    found = {"collab": "collab"}
    for m in (*MODALITIES, "collab"):
        found |= {f"experts.{m}.preference": f"{m}_pref"} | linear(f"experts.{m}.project", f"{m}_proj")
        for k in "145":
            found |= {f"experts.{m}.conv.{k}.weight": f"{m}_conv{k}_w", f"experts.{m}.bias.{k}": f"{m}_conv{k}_b"}
            found |= linear(f"experts.{m}.g.{k}", f"{m}_g{k}")
        for k in "45":
            found |= linear(f"experts.{m}.own.{k}", f"{m}_lin{k}")
    return found


def mvgae(golden, data, behaviour):
    model = kit.build("MVGAE", data, behaviour=behaviour, beta=0.1, dropout=0.0, batch_negatives=True)
    values = {ours: golden[f"p_{name}"] for ours, name in mvgae_names().items()}
    return kit.fill(model, {ours: value.T if ".conv." in ours else value for ours, value in values.items()})


MVGAE_PARTS = {f"{kind}_{m}": f"{kind}_{m}" for kind in ("rec", "kl") for m in ("fused", "collab", *MODALITIES)}


@pytest.mark.parametrize("behaviour, prefix", [("published", "orig_"), ("fixed", "fixed_offset_single_")])
def test_mvgae_without_noise(stored, toy, data, monkeypatch, behaviour, prefix):
    golden = stored("mm_mvgae")
    model = mvgae(golden, data, behaviour)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    names = {ours: name for ours, name in mvgae_names().items() if ".conv." not in ours}
    check(model, kit.toy_batch(toy), golden, prefix, MVGAE_PARTS, names)
    found = model.distributions()
    same(found["fused"][0], golden["orig_mid_mu"])
    same(found["fused"][1], golden["orig_mid_logvar"])
    for name in (*MODALITIES, "collab"):
        same(found[name][0], golden[f"orig_mid_mu_{name}"])
        same(found[name][1], golden[f"orig_mid_logvar_{name}"])


def test_mvgae_with_stored_noise(stored, toy, data, monkeypatch):
    golden = stored("mm_mvgae")
    model, draws = mvgae(golden, data, "published"), iter(golden["in_noise_draws"])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws))
    terms = model.train().loss(kit.toy_batch(toy))
    same(terms["loss"], golden["orig_noise_loss"])
    for name in MVGAE_PARTS:
        same(terms[name], golden[f"orig_noise_part_{name}"])


def test_mvgae_looks_up_items_behind_the_users(stored, toy, data):
    """Exchanging a user's and an item's vector changes the loss of the fixed form as exchanging their roles does."""
    model, batch = mvgae(stored("mm_mvgae"), data, "fixed"), kit.toy_batch(toy)
    nodes = torch.randn(54, 8)
    unused = int(next(u for u in range(30) if u not in batch.users))
    moved = nodes.clone()
    moved[unused] += 1
    assert torch.equal(model.reconstruction(nodes, batch), model.reconstruction(moved, batch))
    moved[30 + int(batch.pos[0])] += 1
    assert not torch.equal(model.reconstruction(nodes, batch), model.reconstruction(moved, batch))
