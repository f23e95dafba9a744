from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.cml import FeatureProjection, ItemFeatures, MetricOptions
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.gravity import Gravity
from gfml.losses import LOSS_MODES
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.evaluation import evaluate
from gfml.ranking.graph import build_graph
from gfml.ranking.sampling import Triples, TripleSampler
from gfml.ranking.topk import topk_items
from recsys.model import INFER_MODES, MODELS, PairOptions, Recommender

NUM_USERS, NUM_ITEMS, DIM = 6, 9, 5
DISTS = ("l2", "l1", "emd", "kl")
MASSES = ("none", "user", "item", "both_sum", "both_product")
GRAVITY_LOSSES = ("gravity", "bpr_gra", "mix", "mix_bpr")
ALL_USERS, ALL_ITEMS = torch.arange(NUM_USERS), torch.arange(NUM_ITEMS)


def make_encoder(model, train, width, **options):
    if model == "lgn":
        return LightGCN(build_graph(train), width, 2, **options)
    return Tables(*train.shape, width, init="ball" if model == "cml" else "xavier_uniform")


def make_gravity(shape, mode="both_sum", **options):
    mass, _, combine = mode.partition("_")
    return Gravity(*shape, mass=mass, combine=combine or "sum", **options)


def random_train(seed=0):
    return sp.csr_array((np.random.default_rng(seed).random((NUM_USERS, NUM_ITEMS)) < 0.4).astype(np.float32))


def make_model(
    model="mf",
    loss="gravity",
    mode="both_sum",
    pair=PairOptions(),
    metric=MetricOptions(margin=1.9, use_rank_weight=False),
    radius=None,
    **options,
):
    torch.manual_seed(0)
    encoder = make_encoder(model, random_train(), DIM)
    encoder.nodes.data.normal_()
    gravity = make_gravity((NUM_USERS, NUM_ITEMS), mode, **options)
    for table in gravity.mass.parameters():
        table.data.normal_()
    return Recommender(encoder, gravity, loss, pair=pair, metric=metric, radius=radius).double()


# ---------------------------------------------------------------- stored values through the module


def from_stored(golden, encoder, mode, loss, compat=False, **options):
    """A model with the tables of a stored file, in double precision."""
    settings = {"lamb": float(golden["lamb"]), "eps": float(golden["eps"])} | options
    gravity = make_gravity((encoder.num_users, encoder.num_items), mode, **settings)
    weights = (float(golden[name]) for name in ("rho", "decay", "wd"))
    model = Recommender(encoder, gravity, loss, pair=PairOptions(*weights, compat)).double()
    encoder.nodes.data.copy_(torch.cat([golden["user_emb"], golden["item_emb"]]))
    for side, table in (("user", model.gravity.mass.user), ("item", model.gravity.mass.item)):
        if table is not None:
            table.data.copy_(golden[f"a_{side}"])
    return model, Triples(golden["users"], golden["pos"], golden["neg"])


def gradients(model):
    """The gradients by the names of the stored files; zero where a table took no part."""
    mass, encoder = model.gravity.mass, model.encoder
    user, item = encoder.nodes.grad.split([encoder.num_users, encoder.num_items])
    found = {"user": user, "item": item}
    for name, table, count in (("a_user", mass.user, encoder.num_users), ("a_item", mass.item, encoder.num_items)):
        has_grad = table is not None and table.grad is not None
        found[name] = table.grad if has_grad else torch.zeros(count, dtype=torch.float64)
    return found


@pytest.mark.parametrize("dist,mode", (("l2", "both_sum"), ("l1", "both_sum"), ("emd", "item"), ("kl", "both_product")))
@pytest.mark.parametrize("loss", GRAVITY_LOSSES)
def test_gravity_on_propagated_vectors_equals_the_stored_values(stored, close, loss, dist, mode):
    golden = stored("lightgcn")
    users, items = golden["train_edges"].T.numpy()
    train = csr_from_pairs(users, items, int(golden["num_users"]), int(golden["num_items"]))
    encoder = LightGCN(build_graph(train, dtype=torch.float64), 4, int(golden["gravity_num_layers"]))
    model, batch = from_stored(golden, encoder, mode, loss, distance=dist)
    key = f"natural_gravity__{loss}__{dist}__{mode}"
    value = model.loss(batch)["loss"]
    value.backward()
    close(value.detach(), golden[f"{key}__loss"])
    for name, grad in gradients(model).items():
        close(grad, golden[f"{key}__grad_{name}"], grad=True)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("loss", (*GRAVITY_LOSSES, "dot", "bpr"))
def test_losses_on_tables_equal_the_stored_values(stored, close, published, loss, dist):
    golden = stored("recsys_losses")
    plain = loss in ("dot", "bpr")
    compat = {"distance": published[dist], "mass_param": "relu", "eps": 0.01, "compat": True}
    cells = (
        ("natural", "both_sum", "both_sum__softplus__norm1", {"distance": dist}),
        ("orig", "both_product", "both__norm1", compat),
    )
    for prefix, mode, tag, options in cells:
        model, batch = from_stored(golden, Tables(6, 9, 5), mode, loss, **options)
        cell = loss if plain else f"{loss}__{dist}__{tag}"
        value = model.loss(batch)["loss"]
        value.backward()
        close(value.detach(), golden[f"{prefix}_loss__{cell}"])
        for name, grad in gradients(model).items():
            stored_name = name if name.startswith("a_") else f"{name}_emb"
            if not (plain and name.startswith("a_")):
                close(grad, golden[f"{prefix}_grad__{cell}__{stored_name}"], grad=True)
        one = Triples(*(part[:1] for part in (batch.users, batch.pos, batch.neg)))
        key = f"{prefix}_loss_b1__{cell}" if prefix == "natural" or plain else f"orig_loss_b1__{loss}"
        if key in golden and (prefix == "natural" or dist == "l2"):
            close(model.loss(one)["loss"].detach(), golden[key])


@pytest.mark.parametrize("loss", LOSS_MODES)
@pytest.mark.parametrize("model", MODELS)
def test_several_negatives_average_over_single_ones(close, model, loss):
    module = make_model(model, loss)
    users, pos = torch.tensor([0, 3, 5, 3]), torch.tensor([8, 1, 1, 0])
    neg = torch.tensor([[0, 2, 4], [7, 7, 3], [5, 6, 0], [2, 4, 8]])
    whole = module.loss(Triples(users, pos, neg))["loss"]
    single = [module.loss(Triples(users, pos, column))["loss"] for column in neg.T]
    if loss == "cml":
        # The largest hinge of each pair; every one of them is at most the sum over its pair.
        assert whole >= max(single) - 1e-12
    else:
        close(whole.detach(), torch.stack(single).mean().detach())
    assert all(part.shape == () for part in module.loss(Triples(users[:1], pos[:1], neg[:1])).values())


# ---------------------------------------------------------------- one score for training and ranking


def pairwise(module, mass_scale=1.0):
    """The score of every pair, one pair at a time, from the vectors a training batch sees."""
    loss, rho = module.loss_mode, module.pair.mix_ratio
    rows = []
    for user in ALL_USERS:
        users = user.expand(NUM_ITEMS)
        batch = module.encoder(users, ALL_ITEMS[:, None])
        x, y = batch.user, batch.items[:, 0]
        dot, gravity = (x * y).sum(1), module.gravity(x, y, users, ALL_ITEMS)
        if mass_scale != 1:
            gravity = gravity + (mass_scale - 1) * module.gravity.mass(users, ALL_ITEMS)
        if loss == "cml":
            rows.append(-(x - y).square().sum(1))
        elif loss in ("dot", "bpr"):
            rows.append(dot)
        else:
            rows.append(gravity if loss in ("gravity", "bpr_gra") else (1 - rho) * dot + rho * gravity)
    return torch.stack(rows)


@pytest.mark.parametrize("loss", LOSS_MODES)
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_ranking_scores_equal_pairwise_scores(close, model, loss):
    uses_gravity = loss in GRAVITY_LOSSES
    for dist in DISTS if uses_gravity else DISTS[:1]:
        for mode in MASSES if uses_gravity else MASSES[:1]:
            for norm in (False, True) if uses_gravity else (True,):
                module = make_model(
                    model, loss, mode, PairOptions(mix_ratio=0.3), distance=dist, emb_norm=norm, lamb=1.5, eps=0.02
                )
                scorer, expected = module.scorer(), pairwise(module)
                close(scorer.score(ALL_USERS), expected)
                close(scorer.score(torch.tensor([4, 1, 4])), expected[[4, 1, 4]])
                order = expected.argsort(1, descending=True)
                factors = scorer.factors()
                if factors is not None:
                    assert torch.equal((factors.user @ factors.item.T).argsort(1, descending=True), order)
                assert torch.equal(topk_items(scorer, ALL_USERS, NUM_ITEMS, seen=None), order)
                blended, product = "mix" in loss, mode == "both_product"
                assert (factors is None) == (uses_gravity and (blended or product or dist == "l1"))


@pytest.mark.parametrize("loss", GRAVITY_LOSSES)
@torch.no_grad()
def test_mass_scale_reaches_the_ranking(close, loss):
    module = make_model(loss=loss)
    for scale in (0.0, 0.5, 1.0):
        close(module.scorer(mass_scale=scale).score(ALL_USERS), pairwise(module, scale))
    assert module.ranks_by_gravity and not make_model(loss="bpr").ranks_by_gravity


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_mixtures_rank_like_their_ends(close, model):
    ends = {loss: make_model(model, loss).scorer() for loss in ("dot", "bpr", "gravity")}
    for mixed, first in (("mix", "dot"), ("mix_bpr", "bpr")):
        for rho, end in ((0.0, first), (1.0, "gravity")):
            scorer = make_model(model, mixed, pair=PairOptions(mix_ratio=rho)).scorer()
            close(scorer.score(ALL_USERS), ends[end].score(ALL_USERS))
            for ours, theirs in zip(scorer.factors(), ends[end].factors(), strict=True):
                assert torch.equal(ours, theirs)


@torch.no_grad()
def test_infer_modes(close):
    for model in ("mf", "lgn"):
        for loss in LOSS_MODES:
            module = make_model(model, loss)
            dot, gravity = make_model(model, "dot"), make_model(model, "gravity")
            close(module.scorer("dot").score(ALL_USERS), pairwise(dot))
            close(module.scorer("gravity").score(ALL_USERS), pairwise(gravity))
            close(module.scorer("mat").score(ALL_USERS), module.scorer().score(ALL_USERS))
            raw = make_model(model, "gravity", emb_norm=False)
            published = raw if (model, loss) == ("mf", "gravity") else dot
            close(module.scorer("original").score(ALL_USERS), pairwise(published).sigmoid())
            assert module.scorer("original").factors() is None  # saturated scores tie, and the ties are part of it
    assert set(INFER_MODES) == {"dot", "gravity", "mat", "original"}


@pytest.mark.parametrize(
    "call",
    (
        lambda: make_model(loss="bpr_grav"),
        lambda: make_model().scorer("matrix"),
        lambda: Recommender(Tables(2, 3, 4), Gravity(2, 3), "hinge"),
    ),
)
def test_unknown_choices_are_refused(call):
    with pytest.raises(ValueError, match="choose one of"):
        call()


# ---------------------------------------------------------------- parts


def test_parts_of_the_metric_loss(close):
    torch.manual_seed(0)
    features = torch.randn(NUM_ITEMS, 4, dtype=torch.float64)
    projection = FeatureProjection(4, DIM, dropout=0.0)
    metric = MetricOptions(margin=0.7, use_rank_weight=True, cov_weight=2.0, feature_weight=0.4)
    every = torch.ones(NUM_ITEMS, dtype=torch.bool)
    module = Recommender(
        make_encoder("cml", random_train(), DIM),
        make_gravity((NUM_USERS, NUM_ITEMS), "none"),
        "cml",
        metric=metric,
        radius=0.9,
        features=ItemFeatures(projection, features, every, ~every, cold_offset=0.0),
    ).double()
    users, pos, neg = torch.tensor([0, 5, 0]), torch.tensor([1, 2, 3]), torch.tensor([[4, 1], [7, 7], [4, 8]])
    parts = module.loss(Triples(users, pos, neg))
    user, item = module.encoder.vectors()
    sq = lambda u, i: ((user[u] - item[i]) ** 2).sum()  # noqa: E731
    hinge = 0.0
    for u, p, row in zip(users, pos, neg, strict=True):
        hinges = [0.7 + sq(u, p) - sq(u, n) for n in row]
        rank = NUM_ITEMS * sum(h.item() > 0 for h in hinges) // 2
        hinge += math.log(rank + 1) * max(*hinges, torch.zeros(()))
    close(parts["hinge"].detach(), hinge.detach())
    rows = torch.stack([user[0], user[5], item[1], item[2], item[3]])
    matrix = torch.cov(rows.T, correction=0)
    close(parts["covariance"].detach(), 2 * (matrix.square().sum() - matrix.diagonal().square().sum()).detach())
    batch = [1, 2, 3, 4, 7, 8]
    close(parts["features"].detach(), 0.4 * (projection(features[batch]) - item[batch]).square().sum().detach())
    close(parts["loss"].detach(), sum(parts[name] for name in ("hinge", "covariance", "features")).detach())
    assert not any(value.shape == features.shape for value in module.state_dict().values())


def test_the_ball_holds_every_point_and_only_with_a_radius():
    module = make_model("cml", "cml", radius=1.0)
    module.encoder.nodes.data.mul_(torch.linspace(0.1, 5, NUM_USERS + NUM_ITEMS)[:, None])
    before = module.encoder.nodes.detach().clone()
    module.project()
    norms = before.norm(dim=1, keepdim=True)
    assert (norms > 1).any() and (norms < 1).any()
    torch.testing.assert_close(module.encoder.nodes.detach(), before / norms.clamp_min(1))
    free = make_model("mf", "bpr")
    free.loss(Triples(torch.tensor([2]), torch.tensor([4]), torch.tensor([0])))
    kept = free.encoder.nodes.detach().clone()
    free.project()
    assert torch.equal(free.encoder.nodes, kept)


def test_decay_spares_masses_and_lambda():
    module = make_model("lgn", "gravity", learn_lamb=True)
    mass = {id(table) for table in module.gravity.mass.parameters()}
    for mass_decays in (False, True):
        decays = {id(p): g["weight_decay"] for g in module.parameter_groups(0.3, mass_decays) for p in g["params"]}
        assert len(decays) == len(list(module.parameters()))
        assert decays[id(module.encoder.nodes)] == 0.3 and decays[id(module.gravity.log_lamb)] == 0.0
        assert {decays[key] for key in mass} == {0.3 if mass_decays else 0.0}


# ---------------------------------------------------------------- learning


def blocks(num_users, num_items, size):
    """User u likes the items of block u modulo the number of blocks."""
    liked = np.arange(num_items)[None, :] // size == np.arange(num_users)[:, None] % (num_items // size)
    return sp.csr_array(liked.astype(np.float32))


def train_model(module, train, epochs, lr, num_negatives=1):
    optimizer = torch.optim.AdamW(module.parameter_groups(0.0, False), lr=lr)
    sampler = TripleSampler(train, batch_size=train.nnz, seed=0, scheme="interaction", num_negatives=num_negatives)
    losses = []
    for epoch in range(epochs):
        for batch in sampler.epoch(epoch):
            optimizer.zero_grad()
            loss = module.loss(batch)["loss"]
            loss.backward()
            optimizer.step()
            module.project()
            losses.append(loss.item())
    return losses


CELLS = [(model, loss, "l2", 60) for model in MODELS for loss in LOSS_MODES]
CELLS += [(model, "gravity", dist, 250) for model in MODELS for dist in DISTS[1:]]


@pytest.mark.parametrize("model,loss,dist,steps", CELLS)
def test_a_block_structure_is_learnt(model, loss, dist, steps):
    torch.manual_seed(0)
    train = blocks(20, 30, 5)
    # In the unit ball kl stays below about 1/2: only a mass below 1 lets a score be negative.
    mass_param = "exp" if dist == "kl" else "softplus"
    module = Recommender(
        make_encoder(model, train, 16),
        make_gravity(train.shape, distance=dist, emb_norm=dist != "kl", mass_param=mass_param),
        loss,
        metric=MetricOptions(margin=0.5, use_rank_weight=False),
        radius=1.0 if model == "cml" else None,
    )
    losses = train_model(module, train, steps, 0.05)
    top = topk_items(module.scorer(), torch.arange(20), 5, seen=None)
    hits = train.toarray()[np.arange(20)[:, None], top.numpy()]
    assert hits.mean() > 0.9 and np.mean(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("mass", ("none", "user", "item", "both"))
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("loss", ("gravity", "mix", "bpr_gra", "mix_bpr"))
def test_every_gravity_cell_learns(loss, dist, mass):
    """After 250 steps at least .85 of the five items that a user is given are of his block; by chance, and by popularity, it is .17."""
    torch.manual_seed(0)
    train = blocks(20, 30, 5)
    gravity = make_gravity(train.shape, mass, distance=dist, emb_norm=dist != "kl")
    module = Recommender(make_encoder("mf", train, 16), gravity, loss)
    losses = train_model(module, train, 250, 0.05)
    top = topk_items(module.scorer(), torch.arange(20), 5, seen=None)
    hits = train.toarray()[np.arange(20)[:, None], top.numpy()]
    assert hits.mean() > 0.85 and np.mean(losses[-5:]) < 0.6 * losses[0]


def test_metric_learning_gathers_the_items_of_a_block():
    torch.manual_seed(0)
    train = blocks(20, 30, 15)
    module = Recommender(
        make_encoder("cml", train, 8),
        make_gravity(train.shape, "none"),
        "cml",
        metric=MetricOptions(margin=0.5, use_rank_weight=True),
        radius=1.0,
    )
    train_model(module, train, 100, 0.05, num_negatives=5)
    top = topk_items(module.scorer(), torch.arange(20), 5, seen=None)
    assert train.toarray()[np.arange(20)[:, None], top.numpy()].all()
    item = module.encoder.vectors()[1].detach()
    between = torch.cdist(item[:15], item[15:]).min()
    assert max(torch.pdist(item[:15]).max(), torch.pdist(item[15:]).max()) < between
    assert module.encoder.nodes.norm(dim=1).max() <= 1 + 1e-6


def test_pairs_listed_twice_change_no_metric():
    rng = np.random.default_rng(0)
    users, items = rng.integers(NUM_USERS, size=8), rng.integers(NUM_ITEMS, size=8)
    empty = sp.csr_array((NUM_USERS, NUM_ITEMS), dtype=np.float32)
    once, twice = (
        Interactions("toy", empty, empty, csr_from_pairs(np.tile(users, n), np.tile(items, n), NUM_USERS, NUM_ITEMS))
        for n in (1, 2)
    )
    scorer = make_model().scorer()
    assert evaluate(scorer, once, "test", (1, 3, 5)).means == evaluate(scorer, twice, "test", (1, 3, 5)).means
