"""New users: exactly training's own scores where that is a theorem, in nearly the same order where vectors are learned."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import spearmanr

from gfml.base.errors import UserError
from gfml.cml import SquaredDistanceScorer
from gfml.data.interactions import csr_from_pairs, pairs_from_csr
from gfml.data.options import load_dataset
from gfml.gravity import Gravity, GravityScorer
from gfml.ranking.baselines import ease, item_knn, popularity
from gfml.ranking.encoders import LightGCN
from gfml.ranking.foldin import fold_in
from gfml.ranking.graph import build_graph, propagated
from gfml.ranking.topk import DenseScorer, FactorScorer


@pytest.fixture(scope="module")
def data():
    return load_dataset("demo", demo_users=200, demo_items=120, demo_interactions=5000, cache=False)


@pytest.mark.parametrize("build", [lambda data: ease(data, 50.0), item_knn, popularity])
def test_linear_recommenders_score_a_known_history_as_in_training(data, build):
    scorer, users = build(data), torch.tensor([0, 7, 42])
    new = fold_in(scorer, data.train[[0, 7, 42]])
    assert torch.equal(new.score(torch.arange(3)), scorer.score(users))


def trained(data, kind, dim=16, epochs=120):
    torch.manual_seed(0)
    user, item = (torch.nn.Parameter(torch.randn(count, dim) * 0.1) for count in data.train.shape)
    gravity = Gravity(*data.train.shape, mass="both", lamb=3.0)
    optimizer = torch.optim.Adam([user, item, *gravity.parameters()], lr=0.01)
    users, items = (torch.from_numpy(side) for side in pairs_from_csr(data.train))

    def score(chosen):
        if kind == "gravity":
            return gravity(user[users], item[chosen], users, chosen)
        return (user[users] * item[chosen]).sum(1) if kind == "dot" else -(user[users] - item[chosen]).square().sum(1)

    for _ in range(epochs):
        other = torch.randint(data.num_items, (len(users),))
        loss = torch.nn.functional.softplus(score(other) - score(items)).mean()
        loss = loss + 1e-3 * (user.square().sum() + item.square().sum()) / len(users)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    user, item = user.detach(), item.detach()
    if kind == "gravity":
        return GravityScorer(gravity, user, item)
    return FactorScorer(user, item) if kind == "dot" else SquaredDistanceScorer(user, item)


@pytest.mark.parametrize("kind", ["dot", "distance", "gravity"])
def test_vectors_found_from_items_rank_as_the_trained_ones(data, kind):
    scorer, known = trained(data, kind), torch.arange(20)
    new = fold_in(scorer, data.train[:20])
    own, found = scorer.score(known).detach(), new.score(torch.arange(20))
    assert np.mean([spearmanr(a, b).statistic for a, b in zip(own, found, strict=True)]) > 0.9
    # One alone gets to the last digit what he gets among others.
    alone = fold_in(scorer, data.train[[13]]).score(torch.tensor([0]))
    assert torch.equal(alone[0], found[13]) and torch.equal(new.score(torch.tensor([13]))[0], found[13])


def test_scores_of_listed_pairs_are_those_of_whole_rows(data):
    items = torch.randint(data.num_items, (9, 7), generator=torch.Generator().manual_seed(0))
    for kind in ("dot", "distance", "gravity"):
        scorer, users = trained(data, kind, epochs=2), torch.arange(9)
        whole = scorer.score(users).detach().gather(1, items)
        torch.testing.assert_close(scorer.at(users, items).detach(), whole, rtol=1e-5, atol=1e-5)
        if kind != "gravity":  # its new users have a mean mass of their own
            torch.testing.assert_close(scorer.against()(scorer.user[:9]), scorer.score(users), rtol=1e-5, atol=1e-5)


def test_propagation_equals_a_graph_with_one_more_user():
    rng = np.random.default_rng(0)
    users, items = rng.integers(12, size=60), rng.integers(9, size=60)
    train, history = csr_from_pairs(users, items, 12, 9), csr_from_pairs(np.zeros(3, int), np.array([1, 4, 7]), 1, 9)
    nodes, layers = torch.randn(21, 5, dtype=torch.float64), []
    dense = torch.from_numpy(np.block([[np.zeros((12, 12)), train.toarray()], [train.toarray().T, np.zeros((9, 9))]]))
    scale = dense.sum(1).clamp_min(1).rsqrt()
    adjacency, layer = scale[:, None] * dense * scale, nodes
    for _ in range(4):
        layers.append(layer[12:])
        layer = adjacency @ layer
    graph = build_graph(train, dtype=torch.float64)
    found = propagated(graph, nodes, 3, history)[0]
    wanted = torch.zeros(5, dtype=torch.float64)
    for k in range(3):  # layer k + 1 of the new user, from layer k of his items
        for item in (1, 4, 7):
            wanted += layers[k][item] / (3 * max(float(dense[12 + item].sum()), 1)) ** 0.5
    torch.testing.assert_close(found, wanted / 4)
    # Of a user of the graph it is what LightGCN computes, but for his own start.
    model = LightGCN(build_graph(train), 5, 3)
    model.nodes.data = nodes.float()
    model.nodes.data[:12] = 0
    torch.testing.assert_close(model.new_users(train), model.vectors()[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["mean", "sum", "final"])
def test_users_of_a_graph_are_propagated(data, combine):
    """But for his own start, here zero, a known user comes out as trained; without layers there is nothing to propagate."""
    torch.manual_seed(0)
    model = LightGCN(build_graph(data.train), 8, 3, combine=combine)
    model.nodes.data[: data.num_users] = 0
    scorer = FactorScorer(*model.vectors())
    new = fold_in(scorer, data.train[:9], model)
    torch.testing.assert_close(new.vectors, scorer.user[:9], rtol=1e-4, atol=1e-6)
    flat = LightGCN(build_graph(data.train), 8, 0)
    scorer = FactorScorer(*flat.vectors())
    assert torch.equal(fold_in(scorer, data.train[:2], flat).vectors, fold_in(scorer, data.train[:2]).vectors)


def test_who_cannot_be_folded_in_is_told():
    scorer = FactorScorer(torch.randn(3, 2), torch.randn(4, 2))
    with pytest.raises(UserError, match="new user 2 has no item"):
        fold_in(scorer, sp.csr_array(np.array([[1, 0, 0, 0], [0, 0, 0, 0]])))
    with pytest.raises(UserError, match="DenseScorer cannot take a new user"):
        fold_in(DenseScorer(torch.randn(3, 4)), sp.csr_array(np.array([[1, 0, 0, 0]])))
