"""The model: full gradients, what masses can and cannot do, collapse, mixing, and the published regularisers."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.engine.distributed import World
from gfml.gravity import Gravity
from gfml.program.steps import shared_loss
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.graph import build_graph
from gfml.ranking.topk import topk_items
from mcl.model import GravityOptions, MetricRecommender, MixedCentricOptions
from mcl.sampler import UserBatchSampler

NUM_USERS, NUM_ITEMS, DIM = 12, 30, 5


@pytest.fixture(scope="module")
def train():
    return sp.csr_array((np.random.default_rng(3).random((NUM_USERS, NUM_ITEMS)) < 0.2).astype(np.float32))


def make(train, mode="gfml", *, layers=3, dtype=torch.float64, decay=0.0, lamb=1.0, mass=None, **options):
    torch.manual_seed(0)
    if layers:
        encoder = LightGCN(build_graph(train, dtype=dtype), DIM, layers, combine="sum", init="xavier_uniform")
    else:
        encoder = Tables(NUM_USERS, NUM_ITEMS, DIM)
    gravity = None
    if mode != "mcl":
        gravity = Gravity(
            NUM_USERS, NUM_ITEMS, mass_param="relu", mass_init="xavier", lamb=lamb, eps=1.0, emb_norm=False
        )
        if mass is not None:
            torch.nn.init.normal_(gravity.mass.user, std=mass), torch.nn.init.normal_(gravity.mass.item, std=mass)
    mixed, attraction = MixedCentricOptions(NUM_USERS, margin=0.3), GravityOptions(**options)
    return MetricRecommender(encoder, gravity, mode, mixed=mixed, attraction=attraction, decay=decay).to(dtype)


def batches(train, count=1):
    sampler = UserBatchSampler(train, batch_size=NUM_USERS, num_negatives=4, seed=0)
    return [batch for epoch in range(1, count + 1) for batch in sampler.epoch(epoch)]


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    model.loss(batch)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def trained(model, train, steps=12, lr=0.05):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    values = []
    for batch in batches(train, steps):
        optimizer.zero_grad()
        loss = model.loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("mode", ["mcl", "gfml", "mix"])
def test_finite_differences_through_three_layers(train, mode):
    model, batch = make(train, mode, decay=0.1, mass=1.0), batches(train)[0]
    parameters = dict(model.named_parameters())

    def loss(*values):
        return torch.func.functional_call(
            _Loss(model), {f"model.{k}": v for k, v in zip(parameters, values, strict=True)}, (batch,)
        )

    values = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-5)


def test_a_batch_equals_the_plain_form(train):
    """Values and gradients of a sampled batch against difference vectors, a loop over users and bare exponentials."""
    path = Path(__file__).with_name("reference_mcl.py")
    spec = importlib.util.spec_from_file_location("reference_mcl", path)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    for batch in batches(train, 3):
        model = make(train, "mcl", layers=2)
        ours = gradients(model, batch)["encoder.nodes"].clone()
        model.zero_grad()
        wanted = plain.plain_loss(
            model.encoder.outputs(),
            batch.users,
            batch.counts,
            batch.pos + NUM_USERS,
            batch.neg + NUM_USERS,
            batch_size=NUM_USERS,
            margin=0.3,
        )
        wanted.backward()
        torch.testing.assert_close(model.loss(batch)["loss"], wanted)
        torch.testing.assert_close(ours, model.encoder.nodes.grad)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)["loss"]


def test_masses_cannot_influence_a_distance_ranking(train):
    """Gravity is mass minus distance term: the vectors' gradient holds no mass, so lists by distance are identical
    whether masses are trained, frozen or started elsewhere; lists by gravity are not."""
    one, other = make(train, mass=0.1), make(train, mass=5.0)
    batch = batches(train)[0]
    assert not torch.equal(one.gravity.mass.item, other.gravity.mass.item)
    assert torch.equal(gradients(one, batch)["encoder.nodes"], gradients(other, batch)["encoder.nodes"])
    frozen = make(train, mass=2.0)
    frozen.gravity.mass.requires_grad_(False)
    for model in (one, other, frozen):
        trained(model, train)
    assert torch.equal(one.encoder.nodes, other.encoder.nodes) and torch.equal(one.encoder.nodes, frozen.encoder.nodes)
    users = torch.arange(NUM_USERS)
    lists = {
        score: [topk_items(m.scorer(score), users, 10, seen=train) for m in (one, other, frozen)]
        for score in ("distance", "gravity")
    }
    assert all(torch.equal(lists["distance"][0], other) for other in lists["distance"][1:])
    assert not torch.equal(lists["gravity"][0], lists["gravity"][1])


def test_user_masses_have_no_gradient_at_equal_weights_and_one_sign_otherwise(train):
    batch = batches(train)[0]
    equal = gradients(make(train, mass=1.0), batch)["gravity.mass.user"]
    assert equal.abs().max() < 1e-15
    model = make(train, mass=1.0, weight_pos=1.5)
    grads = gradients(model, batch)
    active = torch.zeros(NUM_USERS, dtype=torch.bool)
    active[batch.users] = model.gravity.mass.user[batch.users] > 0
    assert active.any() and (grads["gravity.mass.user"][active] < 0).all()
    for side in ("user", "item"):
        dead = getattr(model.gravity.mass, side) < 0
        assert dead.any() and (grads[f"gravity.mass.{side}"][dead] == 0).all()


def test_lambda_only_scales_the_gradient_of_the_vectors(train):
    batch = batches(train)[0]
    one, five = make(train, lamb=1.0), make(train, lamb=5.0)
    grads = [gradients(model, batch)["encoder.nodes"] for model in (one, five)]
    torch.testing.assert_close(grads[1], 5 * grads[0])
    trained(one, train), trained(five, train)
    torch.testing.assert_close(one.encoder.nodes, five.encoder.nodes, rtol=0, atol=1e-5)


def test_pull_only_collapses(train):
    model = make(train, layers=0, pull_only=True)
    user, item = model.encoder.vectors()
    before = torch.cdist(user, item).mean().item()
    values = trained(model, train, steps=40)
    assert model.loss(batches(train)[0])["push"] == 0
    user, item = model.encoder.vectors()
    linked = torch.from_numpy(train.toarray() > 0)
    assert values[-1] < values[0]
    assert torch.cdist(user, item)[linked].mean() < 0.5 * before


def test_mixing_ends_at_its_two_parts(train):
    batch = batches(train)[0]
    mcl, gfml = (make(train, mode, decay=0.0, mass=1.0).loss(batch)["loss"] for mode in ("mcl", "gfml"))
    for ratio, wanted in ((0.0, mcl), (1.0, gfml), (0.25, 0.75 * mcl + 0.25 * gfml)):
        torch.testing.assert_close(make(train, "mix", mass=1.0, mix_ratio=ratio).loss(batch)["loss"], wanted)


def test_the_regulariser_of_mode_gfml_touches_only_the_hardest_negatives(train):
    batch = batches(train)[0]
    model = make(train, layers=0, decay=1.0)
    _, sq_neg = model.sq_distances(batch)
    nearest = sq_neg.argmin(1, keepdim=True)
    touched = torch.zeros(NUM_USERS + NUM_ITEMS, dtype=torch.bool)
    for ids in (batch.users, batch.pos + NUM_USERS, batch.neg.gather(1, nearest)[:, 0] + NUM_USERS):
        touched[ids] = True
    model.zero_grad()
    model.ego_reg(batch, nearest).backward()
    moved = model.encoder.nodes.grad.abs().sum(1) > 0
    assert torch.equal(moved, touched) and not touched.all()
    full = make(train, "mix", layers=0, decay=1.0)
    torch.testing.assert_close(full.ego_reg(batch, nearest), make(train, "mcl", layers=0).ego_reg(batch, nearest))
    assert full.ego_reg(batch, nearest) != model.ego_reg(batch, nearest)


@pytest.mark.parametrize("score", ["distance", "gravity"])
def test_ranking_by_factors_equals_brute_force(train, score):
    model = make(train, mass=1.0)
    users = torch.arange(NUM_USERS)
    user, item = (part.detach() for part in model.encoder.vectors())
    sq_distance = (user[:, None] - item[None]).square().sum(-1)
    if score == "gravity":
        mass = model.gravity.mass
        scores = mass.log_user()[:, None] + mass.log_item() - torch.log(sq_distance + 1)
    else:
        scores = -sq_distance
    torch.testing.assert_close(model.scorer(score).score(users), scores)
    scores[torch.from_numpy(train.toarray() > 0)] = -torch.inf
    assert torch.equal(topk_items(model.scorer(score), users, 10, seen=train), scores.topk(10).indices)


def test_edges_drop_in_training_only(train):
    torch.manual_seed(0)
    encoder = LightGCN(build_graph(train), DIM, 3, combine="sum", edge_keep=0.5)
    whole = encoder.eval().outputs()
    assert torch.equal(whole, torch.cat(encoder.vectors()))
    mean = torch.stack([encoder.train().outputs() for _ in range(2)])
    assert not torch.equal(mean[0], mean[1])


def test_wrong_calls_are_refused(train):
    model = make(train, "mcl")
    with pytest.raises(ValueError, match="no masses"):
        model.scorer("gravity")
    with pytest.raises(ValueError, match="unknown score"):
        model.scorer("dot")
    with pytest.raises(ValueError, match="needs a gravity score"):
        MetricRecommender(copy.deepcopy(model.encoder), None, "mix", mixed=model.mixed)
    with pytest.raises(ValueError, match="unknown mode"):
        MetricRecommender(model.encoder, None, "bpr", mixed=model.mixed)


@pytest.mark.parametrize("size", (2, 5))
def test_processes_share_the_edges_of_a_batch_in_mode_gfml(train, size):
    """The mean of their gradients is that of the batch; in the other modes it is not."""
    for mode in ("gfml", "mix", "mcl"):
        model, (batch,) = make(train, mode, decay=0.1, mass=0.5, weight_neg=0.5), batches(train)
        parameters, alike = list(model.parameters()), []
        whole = torch.autograd.grad(model.loss(batch)["loss"], parameters)
        worlds = [World(rank, size, torch.device("cpu")) for rank in range(size)]
        losses = [shared_loss(model.loss, world, reduction="mean")(batch)["loss"] for world in worlds]
        for expected, found in zip(whole, torch.autograd.grad(sum(losses) / size, parameters), strict=True):
            assert expected.abs().max() > 0
            alike.append(torch.allclose(found, expected, rtol=1e-9, atol=1e-12))
        assert all(alike) == (mode == "gfml")


@pytest.mark.parametrize("mode", ("mcl", "gfml", "mix"))
def test_padding_changes_nothing(train, mode):
    """Batches of different sizes, with a user who has none; padded ones have one shape, and forms that a recording tells apart."""
    model = make(train, mode, decay=0.1)
    options = {"batch_size": 5, "num_negatives": 4, "seed": 0}
    padded = UserBatchSampler(train, **options, constant=True)
    padded._room = int(np.sort(np.diff(train.indptr))[-5:].sum())
    shapes, sizes = set(), set()
    for found, wanted in zip(padded.epoch(1), UserBatchSampler(train, **options).epoch(1), strict=True):
        terms = [{name: float(value.detach()) for name, value in model.loss(b).items()} for b in (found, wanted)]
        assert terms[0] == pytest.approx(terms[1], rel=1e-12)
        torch.testing.assert_close(gradients(model, found), gradients(model, wanted), rtol=1e-10, atol=1e-12)
        shapes.add(tuple(part.shape for part in vars(found).values()))
        sizes.add(len(wanted))
    assert len(shapes) == 1 and len(sizes) > 1 and len(wanted.users) < 5


def test_room_of_padded_batches_is_seldom_exceeded():
    rng = np.random.default_rng(0)
    train = sp.csr_array((rng.random((3000, 400)) < rng.pareto(2, (3000, 1)) * 0.02).astype(np.float32))
    sampler = UserBatchSampler(train, batch_size=200, num_negatives=1, seed=0, constant=True)
    batches = [batch for epoch in (1, 2) for batch in sampler.epoch(epoch)]
    padded = [batch for batch in batches if batch.weight is not None]
    assert len(padded) >= len(batches) - 1 and len({len(batch) for batch in padded}) == 1
    real = [int((batch.weight > 0).sum()) for batch in padded]
    assert np.mean(real) > 0.6 * len(padded[0]) and all(float(b.weight.sum()) == pytest.approx(1) for b in padded)
