"""Each model in the limits of its settings, where it must become something known."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gfml.ranking.graph import build_graph
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models import damrs, lgmrec, smore

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toy.py"))))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def toy(stored):
    return stored("mm_toy")


@pytest.fixture
def data(toy):
    return kit.toy_data(toy)


@pytest.fixture
def batch(toy):
    return kit.toy_batch(toy)


def dense(matrix, size):
    return matrix(torch.eye(size))


def adjacency(data):
    graph = build_graph(data.interactions.train, dtype=torch.float64)
    return graph.multiply(torch.eye(graph.num_nodes))


def grads(model, batch):
    return kit.gradients(model.train().loss(batch)["loss"], model)


@pytest.mark.parametrize("name", ["LightGCN", "BM3", "FREEDOM"])
@pytest.mark.parametrize("layers", [0, 2])
def test_propagation_is_the_mean_of_matrix_powers(name, layers, data):
    option = {"n_ui_layers": layers, "n_mm_layers": 0} if name == "FREEDOM" else {"n_layers": layers}
    model = kit.build(name, data, **option).eval()
    nodes = (model.encoder if name == "LightGCN" else model.tables).nodes.detach()
    power, total = nodes, nodes
    for _ in range(layers):
        power = adjacency(data) @ power
        total = total + power
    user, item = (total / (layers + 1)).split([30, 24])
    if name == "BM3":
        found = model.outputs()
        torch.testing.assert_close(found[0], user)
        torch.testing.assert_close(found[1], item + nodes[30:])
        return
    scorer = model.scorer()
    torch.testing.assert_close(scorer.user, user)
    torch.testing.assert_close(scorer.item, item + (nodes[30:] if name == "FREEDOM" else 0))


def test_vbpr_without_features_is_bpr_on_the_first_half(data, batch):
    blank = MultimodalData(data.interactions, {"image": torch.zeros(24, 5)})
    model, bpr = kit.build("VBPR", blank, reg_weight=0.0), kit.build("BPR", data, reg_weight=0.0)
    kit.fill(bpr, {"encoder.nodes": torch.cat([model.user[:, :8], model.item])})
    torch.testing.assert_close(model.loss(batch)["loss"], bpr.loss(batch)["loss"])
    torch.testing.assert_close(kit.scores(model), kit.scores(bpr))


def test_freedom_without_weight_leaves_the_projections_alone(data, batch):
    found = grads(kit.build("FREEDOM", data, reg_weight=0.0), batch)
    assert not any(grad.any() for name, grad in found.items() if name.startswith("features"))


@pytest.mark.parametrize("weight, name", [(1.0, "image"), (0.0, "text")])
def test_freedom_with_one_graph_alone(weight, name, data):
    both = kit.build("FREEDOM", data, mm_image_weight=weight, knn_k=4)
    alone = kit.build("FREEDOM", MultimodalData(data.interactions, {name: data.features[name]}), knn_k=4)
    torch.testing.assert_close(dense(both.item_graph, 24), dense(alone.item_graph, 24))


def test_freedom_trains_on_the_thinned_graph_and_judges_on_the_whole(data, batch):
    model = kit.build("FREEDOM", data, dropout=0.8)
    whole = kit.scores(model)
    model.new_epoch(1)
    first = model.train().loss(batch)["loss"]
    model.new_epoch(2)
    assert not torch.equal(model.train().loss(batch)["loss"], first)
    assert torch.equal(kit.scores(model), whole)


def test_bm3_at_its_minimum(data, batch):
    """Without dropout and with Q the identity, features equal to their items and users to items give gaps of 0."""
    model = kit.build("BM3", data, n_layers=0, dropout=0.0, reg_weight=0.0)
    with torch.no_grad():
        model.predictor.weight.copy_(torch.eye(8))
        model.predictor.bias.zero_()
        direction = torch.randn(8)
        model.tables.nodes.copy_(direction.expand_as(model.tables.nodes))
        for part in model.features.values():
            part.linear.weight.zero_()
            part.linear.bias.copy_(3 * direction)
    torch.testing.assert_close(model.loss(batch)["loss"], torch.zeros(()), atol=1e-12, rtol=0)


def test_selfcf_without_dropping_is_deterministic_and_its_score_is_symmetric(data, batch, monkeypatch):
    model = kit.build("SELFCFED_LGN", data, dropout=0.0)
    values = model.light.values
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(shape[0], **options))
    assert torch.equal(model.edge_values(), values)
    monkeypatch.undo()
    monkeypatch.setattr(model, "edge_values", lambda: values)
    assert torch.equal(model.train().loss(batch)["loss"], model.loss(batch)["loss"])
    user, item = model.light.split(model.light(model.tables.nodes, 2))
    wanted = model.predictor(user) @ item.T + user @ model.predictor(item).T
    torch.testing.assert_close(kit.scores(model), wanted.detach())


def test_selfcf_drops_directed_edges_and_keeps_their_mean(data):
    model = kit.build("SELFCFED_LGN", data)
    draws = [model.edge_values() for _ in range(3000)]
    shares = torch.tensor([(draw > 0).double().mean() for draw in draws])
    # The rate itself is uniform; what is kept is divided by its share.
    assert shares.mean() == pytest.approx(0.5, abs=0.03) and shares.std() == pytest.approx(12**-0.5, abs=0.03)
    one = draws[int((shares - 0.5).abs().argmin())]
    kept = one > 0
    torch.testing.assert_close(
        one[kept] / model.light.values[kept], torch.full((int(kept.sum()),), 2.0), rtol=0.2, atol=0
    )
    assert not torch.equal(kept, kept[model.light.transposed])


def test_layergcn_by_dense_loop(data):
    model = kit.build("LayerGCN", data, n_layers=3, dropout=0.0).eval()
    ego = layer = model.tables.nodes
    total = torch.zeros_like(ego)
    for _ in range(3):
        layer = adjacency(data) @ layer
        weight = F.cosine_similarity(layer, ego, dim=1)
        assert weight.abs().max() <= 1 + 1e-12
        layer = weight[:, None] * layer
        total = total + layer
    torch.testing.assert_close(model.nodes(), total)
    assert not kit.build("LayerGCN", data, n_layers=0).nodes().any()


def test_layergcn_takes_the_last_layer_at_the_batch_alone(data):
    model = kit.build("LayerGCN", data, n_layers=3, dropout=0.0)
    rows = torch.tensor([0, 3, 4, data.num_users + 2])
    torch.testing.assert_close(model.nodes(rows), model.nodes()[rows])
    assert not kit.build("LayerGCN", data, n_layers=0).nodes(rows).any()


def test_lattice_sparse_and_dense_graphs_agree(data):
    model = kit.build("LATTICE", data, knn_k=4, lambda_coeff=0.6, feat_embed_dim=5)
    found = sum(graph(torch.eye(24), values) for graph, values in model.item_graph())
    share, learned, frozen = model.modal_weight.softmax(0), 0, 0
    assert share.sum().item() == pytest.approx(1)
    for weight, (name, part) in zip(share, model.features.items()):
        unit = F.normalize(part(), dim=1)
        similarity = unit @ unit.T
        kept = torch.zeros_like(similarity).scatter(1, similarity.topk(4).indices, 1.0)
        learned = learned + weight * similarity * kept
        frozen = frozen + weight * dense(model.frozen[name], 24)
    scale = learned.sum(1).rsqrt()
    wanted = 0.4 * scale[:, None] * learned * scale + 0.6 * frozen
    torch.testing.assert_close(found, wanted)


def test_lattice_rebuilds_every_so_many_batches(data, batch):
    model = kit.build("LATTICE", data, knn_k=4, rebuild_every=3)
    learned = [grads(model, Triples(batch.users, batch.pos, batch.neg))["modal_weight"].any().item() for _ in range(7)]
    assert learned == [True, False, False, True, False, False, True]
    model.new_epoch(2)
    again = Triples(batch.users, batch.pos, batch.neg)
    # Both halves of a mirrored batch are of the same kind.
    assert grads(model, again)["modal_weight"].any() and grads(model, again)["modal_weight"].any()
    alone = kit.build("LATTICE", data, knn_k=4, lambda_coeff=0.0)
    assert len(alone.item_graph()) == 1 and len(kit.build("LATTICE", data, lambda_coeff=1.0).item_graph()) == 2


def test_mgcn_with_equal_views_has_nothing_specific(data, batch):
    same = MultimodalData(data.interactions, dict.fromkeys(("image", "text"), data.features["text"]))
    model = kit.build("MGCN", same, knn_k=4)
    for group in (model.features, model.gate):
        group["text"].load_state_dict(group["image"].state_dict())
    view, other = model.views().values()
    common, weights = model.fusion(view, other)
    torch.testing.assert_close(weights.sum(1), torch.ones(54))
    torch.testing.assert_close(common, view)
    torch.testing.assert_close(model.sides()[0], common / 3)
    terms = kit.build("MGCN", data, knn_k=4, cl_loss=0.0, reg_weight=0.0).loss(batch)
    assert torch.equal(terms["loss"], terms["bpr"])


def test_grcn_routing_moves_preferences_only_when_fixed(data):
    for behaviour in ("published", "fixed"):
        model = kit.build("GRCN", data, behaviour=behaviour, latent_embedding=6)
        preference, items = model.routed("image")
        inert = torch.equal(preference, F.normalize(model.preference["image"], dim=1))
        assert inert == (behaviour == "published")
        torch.testing.assert_close(items.norm(dim=1), torch.ones(24))
        shares = [model.refined(name)[1] for name in ("image", "text")]
        assert (model.edge_weights(shares) >= 0).all()
        assert model.outputs()[0].shape == (30, 8 + 12)


def test_grcn_routing_by_loop(data):
    model = kit.build("GRCN", data, latent_embedding=6, n_layers=2)
    items = F.normalize(F.leaky_relu(model.features["text"]()), dim=1)
    preference = F.normalize(model.preference["text"], dim=1)
    train = data.interactions.train
    for _ in range(2):
        rows = []
        for user in range(30):
            own = items[train.indices[train.indptr[user] : train.indptr[user + 1]]]
            rows.append(preference[user] + (own @ preference[user]).softmax(0) @ own)
        preference = F.normalize(torch.stack(rows), dim=1)
    torch.testing.assert_close(model.routed("text")[0], preference)


def test_slmrec_does_not_look_at_negatives(data, batch):
    model = kit.build("SLMRec", data)
    other = Triples(batch.users, batch.pos, batch.neg.flip(0))
    assert torch.equal(model.loss(batch)["loss"], model.loss(other)["loss"])


@pytest.mark.parametrize("name", ["DualGNN", "DRAGON"])
def test_lonely_users_get_no_message(name, data, toy):
    model, lonely = kit.build(name, data), int(toy["lonely_user"])
    user = model.outputs()[0]
    weight = model.user_weight[lonely]
    own = [model.light.split(branch(model.light))[0][lonely] for branch in model.branches.values()]
    wanted = (
        sum(w * part for w, part in zip(weight, own))
        if name == "DualGNN"
        else torch.cat([w * p for w, p in zip(weight, own)])
    )
    torch.testing.assert_close(user[lonely], wanted)


def test_dualgnn_mixes_as_published_and_as_meant(data):
    fixed = kit.build("DualGNN", data)
    published = kit.build("DualGNN", data, behaviour="published")
    published.load_state_dict(fixed.state_dict() | {"item_weight": published.item_weight})
    lonely = 7
    v, t = (branch(fixed.light)[lonely] for branch in fixed.branches.values())
    w0, w1 = fixed.user_weight[lonely]
    torch.testing.assert_close(fixed.outputs()[0][lonely], w0 * v + w1 * t)
    torch.testing.assert_close(published.outputs()[0][lonely], w0 * (v + t) + w1 * t)


def test_mmgcn_published_tables_stay_and_fixed_ones_move(data, batch):
    for behaviour in ("published", "fixed"):
        model = kit.build("MMGCN", data, behaviour=behaviour)
        before = {key: value.clone() for key, value in model.state_dict().items() if key == "id" or "preference" in key}
        model.loss(batch)["loss"].backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        moved = [not torch.equal(model.state_dict()[key], value) for key, value in before.items()]
        assert len(before) == 3 and all(moved) == any(moved) == (behaviour == "fixed")


def test_smore_unit_weights_filter_nothing_and_the_fused_graph_takes_the_larger_entry(data):
    model = kit.build("SMORE", data, image_knn_k=4, text_knn_k=3)
    with torch.no_grad():
        for weight in model.filter.values():
            weight.copy_(torch.tensor([1.0, 0.0]))
    found = model.content()
    for name, part in model.features.items():
        torch.testing.assert_close(found[name], part())
    image, text = (dense(model.item_graphs[name], 24) for name in ("image", "text"))
    wanted = torch.where((image != 0) & (text != 0), torch.maximum(image, text), image + text)
    torch.testing.assert_close(dense(model.item_graphs["fusion"], 24), wanted)
    backwards = smore.larger_entries(*(model.item_graphs[name].to_scipy() for name in ("text", "image")))
    assert abs(backwards - model.item_graphs["fusion"].to_scipy()).max() < 1e-12


def test_smore_fused_spectrum_is_a_convolution_over_the_channels(data):
    model = kit.build("SMORE", data, image_knn_k=4, text_knn_k=4)
    with torch.no_grad():
        model.filter["fusion"].copy_(torch.tensor([1.0, 0.0]))
    image, text = (part() for part in model.features.values())
    shift = (torch.arange(8)[:, None] - torch.arange(8)) % 8
    wanted = torch.einsum("ic,ikc->ik", image, text[:, shift]) / 8**0.5
    torch.testing.assert_close(model.content()["fusion"], wanted)


@pytest.mark.parametrize("fusion", ["mean", "sum", "concat"])
@pytest.mark.parametrize("weighting", ["equal", "alpha", "normalized"])
def test_mmgcf_item_inputs(fusion, weighting, data, batch):
    model = kit.build("MMGCF", data, fusion=fusion, weighting=weighting)
    items, (v, t), e = model.items(), [part() for part in model.features.values()], model.item
    if weighting == "normalized":
        parts = [2 * F.normalize(e, dim=1), F.normalize(v, dim=1), F.normalize(t, dim=1)]
        wanted = {"mean": sum(parts) / 3, "sum": sum(parts), "concat": torch.cat(parts, 1)}
    else:
        modal = {"mean": (v + t) / 2, "sum": v + t, "concat": torch.cat([v, t], 1)}[fusion]
        own, modal = (e, modal) if weighting == "equal" else (e / 2, modal / 2)
        wanted = (
            {"concat": torch.cat([own, modal], 1)}
            if fusion == "concat"
            else {"mean": (own + modal) / 2, "sum": own + modal}
        )
    torch.testing.assert_close(items, wanted[fusion])
    assert model.loss(batch)["loss"].isfinite() and kit.scores(model).shape == (30, 24)


def test_pgl_principal_part_is_the_truncated_decomposition(data, batch):
    model = kit.build("PGL", data, mode="global", rank=5)
    block = adjacency(data)[:30, 30:]
    left, values, right = torch.linalg.svd(block, full_matrices=False)
    wanted = left[:, :5] * values[:5] @ right[:5]
    assert model.left.shape == (30, 5)
    torch.testing.assert_close(model.left @ model.right.T, wanted)
    user, item = model.low_rank(model.user, model.items())
    nodes, operator = torch.cat([model.user, model.items()]), torch.zeros(54, 54)
    operator[:30, 30:], operator[30:, :30] = wanted, wanted.T
    torch.testing.assert_close(torch.cat([user, item]), (nodes + operator @ nodes + operator @ operator @ nodes) / 3)
    assert kit.build("PGL", data, mode="global", rank=99).left.shape == (30, 23)
    assert torch.equal(model.left, kit.build("PGL", data, mode="global", rank=5).left)
    contrasted = kit.build("PGL", data, reg_weight=0.5).loss(batch)
    torch.testing.assert_close(contrasted["loss"], contrasted["bpr"] + 0.5 * contrasted["nce"])


def test_lgmrec_memberships_sum_to_one_and_noise_is_for_training(data):
    for behaviour in ("fixed", "published"):
        model = kit.build("LGMRec", data, behaviour=behaviour).eval()
        user, item = model.memberships("image")
        torch.testing.assert_close(user.sum(1), torch.ones(30))
        torch.testing.assert_close(item.sum(1), torch.ones(24))
        assert torch.equal(model.memberships("image")[1], item) == (behaviour == "fixed")
    model.train()
    assert not torch.equal(model.memberships("image")[1], model.memberships("image")[1])


def test_lgmrec_hyperedges_by_loop(data):
    model = kit.build("LGMRec", data, n_hyper_layer=2).eval()
    of_user, of_item = model.memberships("text")
    start = torch.randn(24, 8)
    items = start
    for _ in range(2):
        edges = torch.stack([sum(of_item[i, e] * items[i] for i in range(24)) for e in range(4)])
        items, users = of_item @ edges, of_user @ edges
    torch.testing.assert_close(model.hyperedges("text", start), (users, items))
    train = torch.from_numpy(data.interactions.train.todense()).double()
    logits = model.features_text @ model.hyper["text"].weight.T
    torch.testing.assert_close(of_user, (train @ logits / 0.2).softmax(1))


def test_lgmrec_contrast_by_loop():
    first, second, ids = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([3, 0, 3])
    total = 0.0
    for i in ids:
        cosine = F.cosine_similarity(first[i][None], second, dim=1) / 0.2
        total = total - cosine[i] + cosine.logsumexp(0)
    torch.testing.assert_close(lgmrec.contrast(first, second, ids), total)


def test_damrs_graphs_keep_what_both_modalities_find_alike(data):
    graphs = damrs.agreeing_graphs(dict(data.features), 3)
    cosine = {name: F.cosine_similarity(f[:, None], f[None], dim=2) for name, f in data.features.items()}
    agreed = torch.stack([c >= c.mean() for c in cosine.values()]).all(0)
    for name, graph in graphs.items():
        kept = torch.where(agreed, cosine[name], 0.0)
        for item in range(24):
            best = kept[item].topk(3)
            assert sorted(graph[[item]].indices.tolist()) == sorted(best.indices[best.values > 0].tolist())
        sizes = np.diff(graph.indptr)
        rows = np.repeat(np.arange(24), sizes)
        np.testing.assert_allclose(graph.data, 1 / np.sqrt(sizes[rows] * sizes[graph.indices]))


def test_damrs_session_graph(data):
    train = data.interactions.train.todense()
    together = train.T @ train
    found = damrs.session_graph(data.interactions.train, 3, 2)
    for item in range(24):
        others = sorted((j for j in range(24) if j != item), key=lambda j: (-together[item, j], j))[:3]
        wanted = {item, *(j for j in others if together[item, j] >= 2)}
        assert set(found[[item]].indices.tolist()) == wanted


def test_doubting_bpr_by_loop():
    pos, neg, a, b = torch.randn(6), torch.randn(6), torch.rand(6, 3), torch.rand(6, 3)
    average, total = a.mean(), 0.0
    for n in range(6):
        trust = a[n].mean() * torch.exp(-a[n].var(unbiased=False)) ** 2
        doubt = max(0.0, float(b[n].max() - b.mean())) if a[n].mean() < average else 0.0
        assert 0 <= trust <= 1 and 0 <= doubt <= 1
        x = pos[n] - neg[n]
        total = total - trust * torch.log(x.sigmoid()) - doubt * torch.log((-x).sigmoid())
    torch.testing.assert_close(damrs.doubting_bpr(pos, neg, a, b), total / 6)


def test_graded_neighbours_by_loop():
    views, total = [torch.randn(12, 4) for _ in range(3)], 0.0
    rows = torch.tensor([0, 5, 7])
    cosine = [F.cosine_similarity(v[rows][:, None], v[None], dim=2) for v in views]
    share = [(c / 0.2).softmax(1) for c in cosine]
    for own in range(3):
        for n in range(3):
            graded = sum(share[m][n] for m in range(3)) + share[own][n]
            first = graded.topk(2).indices.tolist()
            exps = (cosine[own][n] / 0.2).exp()
            rest = [j for j in range(12) if j not in first]
            second = sorted(rest, key=lambda j: -float(exps[j]))[:2]
            near, next_near = exps[first].sum() / exps.sum(), exps[second].sum() / exps[rest].sum()
            total = total - near.log() - next_near.log()
    torch.testing.assert_close(damrs.graded_neighbours(views, rows, 2, 0.2).mean(), total / 9)


def test_preference_divergence():
    user, first, second = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)
    p, q = ((user @ F.normalize(x, dim=1).T).sigmoid() for x in (first, second))
    bernoulli = torch.distributions.Bernoulli
    both = torch.distributions.kl_divergence(bernoulli(p), bernoulli(q)) + torch.distributions.kl_divergence(
        bernoulli(q), bernoulli(p)
    )
    torch.testing.assert_close(damrs.preference_divergence(user, first, second), both.mean())
    assert damrs.preference_divergence(user, first, first) == 0
    assert damrs.preference_divergence(1e4 * user, first, -first).isfinite()
