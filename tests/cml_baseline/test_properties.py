"""What Collaborative Metric Learning promises, whatever the numbers: invariances, the ball, ranks, features, learning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gfml.cml import BLOCK, FeatureProjection, ItemFeatures, MetricLearner, MetricOptions, mined_hinge, sq_distances_to
from gfml.data.interactions import csr_from_pairs
from gfml.engine.train import plain_step
from gfml.losses import covariance
from gfml.program.steps import ProjectedStep
from gfml.ranking.sampling import Triples, TripleSampler
from gfml.ranking.topk import topk_items

NUM_USERS, NUM_ITEMS, WIDTH = 12, 40, 6


def random_model(seed=0, dtype=torch.float64, **settings) -> MetricLearner:
    torch.manual_seed(seed)
    options = MetricOptions(**{"margin": 0.7} | settings.pop("options", {}))
    return MetricLearner(NUM_USERS, NUM_ITEMS, WIDTH, options=options, **settings).to(dtype)


def random_batch(size=30, num_negatives=5, seed=1) -> Triples:
    generator = torch.Generator().manual_seed(seed)
    return Triples(
        torch.randint(NUM_USERS, (size,), generator=generator), torch.randint(NUM_ITEMS, (size,), generator=generator),
        torch.randint(NUM_ITEMS, (size, num_negatives), generator=generator),
    )  # fmt: skip


def lists(model, k=8):
    return topk_items(model.scorer(), torch.arange(NUM_USERS), k, seen=None)


def moved(model, move) -> MetricLearner:
    with torch.no_grad():
        model.encoder.nodes.copy_(move(model.encoder.nodes))
    return model


# ---------------------------------------------------------------- gradients and invariances


def test_gradients_equal_differences():
    model, batch = random_model(options={"cov_weight": 3.0}), random_batch()
    nodes = model.encoder.nodes
    (grad,) = torch.autograd.grad(model.loss(batch)["loss"], nodes)
    step, rng = 1e-6, np.random.default_rng(0)
    for place in zip(rng.integers(len(nodes), size=40), rng.integers(WIDTH, size=40)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                nodes[place] += sign * step
                values.append(model.loss(batch)["loss"].item())
                nodes[place] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(grad[place].item(), rel=1e-5, abs=1e-6)


def test_rotation_and_reflection_change_nothing_but_the_covariance():
    rotation = torch.linalg.qr(
        torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    before, batch = random_model(), random_batch()
    for turn in (rotation, -rotation):
        after = moved(random_model(), lambda nodes, turn=turn: nodes @ turn)
        torch.testing.assert_close(after.loss(batch)["loss"], before.loss(batch)["loss"])
        assert torch.equal(lists(after), lists(before))
        assert not math.isclose(
            covariance(after.encoder.nodes).item(), covariance(before.encoder.nodes).item(), rel_tol=1e-3
        )


def test_translation_changes_nothing_at_all():
    before, batch = random_model(options={"cov_weight": 2.0}), random_batch()
    after = moved(random_model(options={"cov_weight": 2.0}), lambda nodes: nodes + 3.0)
    torch.testing.assert_close(after.loss(batch)["loss"], before.loss(batch)["loss"])
    assert torch.equal(lists(after), lists(before))


def test_sign_flips_of_single_dimensions_leave_the_squared_penalty():
    nodes = random_model().encoder.nodes.detach()
    flipped = nodes * torch.tensor([1, -1, 1, 1, -1, 1])
    torch.testing.assert_close(covariance(flipped), covariance(nodes))
    assert covariance(nodes) > 0
    assert abs(covariance(flipped, "signed") - covariance(nodes, "signed")) > 1e-3
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert covariance(grid) == pytest.approx(0)


# ---------------------------------------------------------------- the ball


@pytest.mark.parametrize("radius", (1.0, 0.4))
@pytest.mark.parametrize("optimizer", ("adagrad", "adam"))
def test_after_every_step_all_points_are_in_the_ball(optimizer, radius):
    model = random_model(dtype=torch.float32, radius=radius)
    assert model.encoder.nodes.norm(dim=1).max() <= radius + 1e-6
    kind = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[optimizer]
    optimiser, step = kind(model.parameters(), lr=0.5), ProjectedStep(plain_step, model)
    for seed in range(8):
        batch = random_batch(size=4, seed=seed)
        step(lambda batch=batch: model.loss(batch), optimiser)
        assert model.encoder.nodes.norm(dim=1).max() <= radius + 1e-6


def test_points_inside_stay_bit_for_bit_and_twice_is_once():
    model = moved(random_model(radius=0.5), lambda nodes: 0.2 * torch.randn_like(nodes))
    before = model.encoder.nodes.detach().clone()
    inside = before.norm(dim=1) < 0.5
    assert inside.any() and not inside.all()
    model.project()
    once = model.encoder.nodes.detach().clone()
    assert torch.equal(once[inside], before[inside])
    model.project()
    torch.testing.assert_close(model.encoder.nodes.detach(), once, rtol=0, atol=1e-15)


# ---------------------------------------------------------------- ranks and negatives


def test_weights_grow_with_imposters_and_have_no_gradient():
    model, batch = random_model(), random_batch(size=60)
    hinge = mined_hinge(model.encoder, batch.users, batch.pos, batch.neg, margin=0.7).hinge
    plain = mined_hinge(model.encoder, batch.users, batch.pos, batch.neg, margin=0.7, use_rank_weight=False).hinge
    weight = hinge.pair_loss / plain.pair_loss
    for imposters in range(6):
        of = hinge.imposters == imposters
        wanted = math.log(1 + math.floor(NUM_ITEMS * imposters / 5))
        if imposters == 0:
            assert (hinge.pair_loss[of] == 0).all()
        elif of.any():
            torch.testing.assert_close(weight[of], torch.full_like(weight[of], wanted))
    assert 0 < (hinge.imposters == 5).sum() < 60
    # A margin that turns no negative into an imposter leaves the weights: the loss grows by their sum.
    wider = mined_hinge(model.encoder, batch.users, batch.pos, batch.neg, margin=0.7 + 1e-9).hinge
    assert torch.equal(wider.imposters, hinge.imposters)
    torch.testing.assert_close(
        (wider.loss - hinge.loss) / 1e-9, weight.nan_to_num()[hinge.pair_loss > 0].sum(), rtol=1e-4, atol=0
    )


def test_order_of_negatives_and_far_ones():
    model, batch = random_model(), random_batch()
    shuffled = Triples(batch.users, batch.pos, batch.neg[:, [3, 1, 4, 0, 2]])
    torch.testing.assert_close(model.loss(shuffled)["loss"], model.loss(batch)["loss"])
    with torch.no_grad():
        model.encoder.nodes[NUM_USERS + 39] = 100.0
    batch = Triples(batch.users, batch.pos % 39, batch.neg % 39)
    far = torch.cat([batch.neg, torch.full((len(batch), 1), 39)], 1)
    near, wide = (mined_hinge(model.encoder, batch.users, batch.pos, neg, margin=0.7) for neg in (batch.neg, far))
    assert torch.equal(near.items, wide.items) and torch.equal(near.hinge.imposters, wide.hinge.imposters)
    assert wide.hinge.loss < near.hinge.loss


def test_with_a_huge_margin_every_negative_is_an_imposter():
    model, batch = random_model(), random_batch()
    hinge = mined_hinge(model.encoder, batch.users, batch.pos, batch.neg, margin=4.0).hinge
    assert (hinge.imposters == 5).all()
    plain = mined_hinge(model.encoder, batch.users, batch.pos, batch.neg, margin=4.0, use_rank_weight=False).hinge
    torch.testing.assert_close(hinge.loss, math.log(NUM_ITEMS + 1) * plain.loss)


def test_repeating_the_batch_doubles_the_sum_and_keeps_the_mean():
    batch = random_batch()
    twice = Triples(*(torch.cat([part, part]) for part in (batch.users, batch.pos, batch.neg)))
    for reduction, factor in (("sum", 2.0), ("mean", 1.0)):
        model = random_model(options={"reduction": reduction})
        torch.testing.assert_close(model.loss(twice)["loss"], factor * model.loss(batch)["loss"])


def test_equal_points_have_finite_gradients():
    model = moved(random_model(), torch.zeros_like)
    (grad,) = torch.autograd.grad(model.loss(random_batch())["loss"], model.encoder.nodes)
    assert torch.isfinite(grad).all()


def test_distances_do_not_depend_on_the_block_size(monkeypatch):
    model, batch = random_model(dtype=torch.float32), random_batch(size=50)
    whole = sq_distances_to(model.encoder, batch.users, batch.neg)
    naive = (model.encoder.nodes[NUM_USERS + batch.neg] - model.encoder.nodes[batch.users][:, None]).square().sum(-1)
    torch.testing.assert_close(whole, naive.detach())
    for block in (1, 7 * 5 * WIDTH, BLOCK):
        monkeypatch.setattr("gfml.cml.BLOCK", block)
        assert torch.equal(sq_distances_to(model.encoder, batch.users, batch.neg), whole)
    assert sq_distances_to(model.encoder, batch.users[:0], batch.neg[:0]).shape == (0, 5)


def test_order_of_scores_is_order_of_distances():
    model = random_model()
    user, item = model.vectors()
    distance = ((user[:, None] - item) ** 2).sum(-1)
    seen = csr_from_pairs(np.arange(NUM_USERS), np.arange(NUM_USERS), NUM_USERS, NUM_ITEMS)
    top = topk_items(model.scorer(), torch.arange(NUM_USERS), 5, seen=seen)
    distance[torch.arange(NUM_USERS), torch.arange(NUM_USERS)] = torch.inf
    assert torch.equal(top, distance.argsort(dim=1, stable=True)[:, :5])


# ---------------------------------------------------------------- features


def item_features(cold=(), unknown=(), dropout=0.5, **options):
    torch.manual_seed(5)
    projection = FeatureProjection(7, WIDTH, hidden_dim=9, dropout=dropout)
    known, is_cold = (torch.ones(NUM_ITEMS, dtype=torch.bool), torch.zeros(NUM_ITEMS, dtype=torch.bool))
    known[list(unknown)], is_cold[list(cold)] = False, True
    return ItemFeatures(projection, torch.randn(NUM_ITEMS, 7), known, is_cold, **options)


def test_items_start_at_their_projection():
    features = item_features(unknown=[4])
    model = MetricLearner(NUM_USERS, NUM_ITEMS, WIDTH, features=features)
    projected = features.projection.eval()(features.features)
    torch.testing.assert_close(model.encoder.nodes[NUM_USERS:][features.known], projected[features.known])
    assert not torch.allclose(model.encoder.nodes[NUM_USERS + 4], projected[4])


def test_cold_items_stand_at_their_projection_and_train_nothing():
    features = item_features(cold=[2, 9], unknown=[9])
    model = MetricLearner(NUM_USERS, NUM_ITEMS, WIDTH, features=features)
    with torch.no_grad():
        model.encoder.nodes.copy_(torch.randn_like(model.encoder.nodes))
    model.train()
    placed, again = model.vectors()[1], model.vectors()[1]
    assert torch.equal(placed, again) and model.features.projection.training
    free = model.encoder.nodes[NUM_USERS:].detach()
    assert torch.equal(placed[torch.arange(NUM_ITEMS) != 2], free[torch.arange(NUM_ITEMS) != 2])
    torch.testing.assert_close(placed[2], features.projection.eval()(features.features[2]).detach())
    loss = features.loss(model.encoder, torch.tensor([2, 9, 2]))
    assert loss == 0
    scores = model.scorer().score(torch.arange(NUM_USERS))
    distance = (model.vectors()[0] - placed[2]).square().sum(1)
    missed = (features.projection.eval()(features.features) - free).square().sum(1)[features.held].mean().detach()
    torch.testing.assert_close(scores[:, 2], -distance - 0.5 * missed)
    # One in ten of the 38 warm items is held out: it has features, starts at its projection and trains nothing.
    assert features.held.sum() == 4 and not (features.held & features.trained).any() and features.trained.sum() == 34
    assert features.loss(model.encoder, features.held.nonzero()[:, 0]) == 0
    literal = MetricLearner(
        NUM_USERS, NUM_ITEMS, WIDTH, features=item_features(cold=[2, 9], unknown=[9], cold_offset=0.0)
    )
    assert literal.offsets() is None and literal.features.trained.sum() == 38
    placed = literal.vectors()[1][2]
    torch.testing.assert_close(
        literal.scorer().score(torch.arange(NUM_USERS))[:, 2], -(literal.vectors()[0] - placed).square().sum(1)
    )
    assert not item_features().held.any()


def test_the_feature_loss_pulls_each_item_of_the_batch_once():
    features = item_features(dropout=0.0)
    model = MetricLearner(NUM_USERS, NUM_ITEMS, WIDTH, options=MetricOptions(feature_weight=0.3), features=features)
    with torch.no_grad():
        model.encoder.nodes.mul_(2.0)
    batch = Triples(torch.tensor([0, 1]), torch.tensor([3, 3]), torch.tensor([[5, 6], [6, 3]]))
    (grad,) = torch.autograd.grad(model.loss(batch)["features"], model.encoder.nodes)
    with torch.no_grad():
        wanted = torch.zeros_like(grad)
        rows = torch.tensor([3, 5, 6])
        wanted[NUM_USERS + rows] = (
            2 * 0.3 * (model.encoder.nodes[NUM_USERS + rows] - features.projection(features.features[rows]))
        )
    torch.testing.assert_close(grad, wanted)


def test_features_are_no_part_of_a_checkpoint():
    model = MetricLearner(NUM_USERS, NUM_ITEMS, WIDTH, features=item_features())
    assert sorted(model.state_dict()) == ["encoder.nodes"] + [
        f"features.projection.{layer}.{part}" for layer in ("hidden", "output") for part in ("bias", "weight")
    ]


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="wanted as many"):
        ItemFeatures(
            FeatureProjection(3, 2),
            torch.zeros(4, 3),
            torch.ones(4, dtype=torch.bool),
            torch.zeros(5, dtype=torch.bool),
        )


# ---------------------------------------------------------------- learning


def two_blocks():
    """20 users x 30 items in two blocks."""
    users, items = np.divmod(np.arange(300), 15)
    return csr_from_pairs(users, items + 15 * (users // 10), 20, 30)


@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.Adagrad, 0.1), (torch.optim.Adam, 0.05)])
def test_two_blocks_are_told_apart(kind, lr):
    torch.manual_seed(0)
    train = two_blocks()
    model = MetricLearner(20, 30, 8)
    optimizer = kind(model.parameters(), lr=lr)
    sampler = TripleSampler(train, batch_size=60, seed=0, scheme="interaction", num_negatives=5)
    step, steps = ProjectedStep(plain_step, model), 0
    for epoch in range(200):
        for batch in sampler.epoch(epoch):
            step(lambda batch=batch: model.loss(batch), optimizer)
            steps += 1
        if steps >= 190:
            break
    top = topk_items(model.scorer(), torch.arange(20), 15, seen=None).numpy()
    assert (top // 15 == np.arange(20)[:, None] // 10).all()
    item = model.vectors()[1]
    distance = torch.cdist(item, item)
    same = torch.block_diag(torch.ones(15, 15), torch.ones(15, 15)).bool()
    own, other = (distance * same).sum(1) / 14, (distance * ~same).sum(1) / 15
    assert (own < other).all() and own.mean() < 0.7 * other.mean()
