from __future__ import annotations

import pytest
import torch

from gfml.cml import FeatureProjection, SquaredDistanceScorer, covariance_rows, feature_loss, first_of_each, mined_hinge
from gfml.losses import covariance, project_to_ball_, warp_hinge
from gfml.ranking.encoders import Tables
from gfml.ranking.topk import topk_items

WEIGHTS = {"floor": {}, "nofloor": {"rank_floor": False}, "noweight": {"use_rank_weight": False}}


@pytest.fixture
def golden(stored):
    return stored("cml")


def encoder_of(golden, move=lambda rows: rows):
    user, item = golden["user_emb"], golden["item_emb"]
    encoder = Tables(len(user), len(item), user.shape[1]).double()
    encoder.nodes.data.copy_(move(torch.cat([user, item])))
    return encoder


def hinge_of(golden, encoder, **options):
    batch = (golden["users"], golden["pos"], options.pop("neg", golden["negs"]))
    return mined_hinge(encoder, *batch, margin=float(golden["margin"]), **options)


# ---------------------------------------------------------------- the mined hinge


@pytest.mark.parametrize("weight", WEIGHTS)
def test_mined_hinges_equal_the_stored_ones(golden, close, weight):
    encoder = encoder_of(golden)
    mined = hinge_of(golden, encoder, **WEIGHTS[weight])
    close(mined.hinge.loss.detach(), golden[f"natural_loss_sum__{weight}"])
    close(mined.hinge.pair_loss.detach(), golden[f"natural_pair_loss_{weight}"])
    assert torch.equal(mined.hinge.imposters, golden["natural_imposters"])
    hardest = golden["negs"].gather(1, golden["natural_hardest_index"][:, None])[:, 0]
    assert torch.equal(mined.items, torch.stack([golden["pos"], hardest], 1))
    close(mined.embedded.items.detach(), golden["item_emb"][mined.items])
    mined.hinge.loss.backward()
    if weight != "nofloor":
        for part, side in zip(encoder.nodes.grad.split([encoder.num_users, encoder.num_items]), ("user", "item")):
            close(part, golden[f"natural_grad_sum__{weight}__{side}_emb"], grad=True)
    mean = hinge_of(golden, encoder, reduction="mean", **WEIGHTS[weight])
    close(mean.hinge.loss.detach(), golden[f"natural_loss_mean__{weight}"])


def test_the_published_port_without_rank_weight(golden, close):
    mined = hinge_of(golden, encoder_of(golden), neg=golden["negs"][:, 0], use_rank_weight=False)
    close(mined.hinge.loss.detach(), golden["orig_gfml_port__rankweight0__hinge_part"])


def rotation(rows):
    generator = torch.Generator().manual_seed(0)
    return rows @ torch.linalg.qr(torch.randn(4, 4, dtype=rows.dtype, generator=generator))[0]


@pytest.mark.parametrize("move", (rotation, lambda rows: rows + 3.0, torch.neg))
def test_moving_the_space_moves_nothing_else(golden, close, move):
    before, after = encoder_of(golden), encoder_of(golden, move)
    first, second = (hinge_of(golden, encoder) for encoder in (before, after))
    close(second.hinge.loss.detach(), first.hinge.loss.detach())
    assert torch.equal(second.items, first.items)
    close(scores(after), scores(before))


@pytest.mark.parametrize("negatives", (1, 5))
def test_many_negatives_in_one_call_equal_the_plain_hinge(golden, close, negatives):
    encoder, neg = encoder_of(golden), golden["negs"][:, :negatives]
    batch = encoder(golden["users"], torch.cat([golden["pos"][:, None], neg], 1))
    sq_distance = (batch.user[:, None] - batch.items).square().sum(-1)
    plain = warp_hinge(sq_distance[:, 0], sq_distance[:, 1:], margin=float(golden["margin"]), num_items=43)
    mined = hinge_of(golden, encoder, neg=neg if negatives > 1 else neg[:, 0])
    close(mined.hinge.loss.detach(), plain.loss.detach())
    grads = [torch.autograd.grad(hinge.loss, encoder.nodes)[0] for hinge in (mined.hinge, plain)]
    close(grads[0], grads[1], grad=True)


# ---------------------------------------------------------------- regularisers and the ball


def test_rows_under_the_covariance_penalty(golden, close):
    rows, weight = covariance_rows(encoder_of(golden), golden["users"], golden["pos"])
    assert weight is None
    close(rows.detach(), golden["covariance_rows"])
    close(torch.cov(rows.detach().T, correction=0), golden["natural_covariance"])


def test_only_touched_rows_are_pulled_into_the_ball(golden):
    encoder = encoder_of(golden, lambda rows: 4 * rows)
    before = encoder.nodes.detach().clone()
    users, items = golden["users"], golden["negs"]
    project_to_ball_(encoder.nodes.data, torch.cat([users, items.flatten() + encoder.num_users]), radius=1.1)
    touched = torch.zeros(len(before), dtype=torch.bool)
    touched[torch.cat([users, items.flatten() + encoder.num_users])] = True
    outside = before.norm(dim=1) > 1.1
    after = encoder.nodes.detach()
    assert (touched & outside).any() and (touched & ~outside).any() and (~touched & outside).any()
    assert torch.equal(after[~(touched & outside)], before[~(touched & outside)])
    pulled = after[touched & outside].norm(dim=1)
    torch.testing.assert_close(pulled, torch.full_like(pulled, 1.1))


def projection_of(golden, **options):
    hidden, num_features = golden["mlp_W1"].shape
    settings = {"hidden_dim": hidden, "scale": float(golden["feature_scale"]), "radius": float(golden["clip_norm"])}
    module = FeatureProjection(num_features, len(golden["mlp_b2"]), **settings | options).double()
    weights = (golden[name] for name in ("mlp_W1", "mlp_b1", "mlp_W2", "mlp_b2"))
    for parameter, value in zip(module.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    return module


def test_feature_projection_and_losses_equal_the_stored_ones(golden, close):
    projection, encoder = projection_of(golden).eval(), encoder_of(golden)
    projected = projection(golden["features"])
    close(projected.detach(), golden["natural_feature_projection"])
    assert projected.norm(dim=1).max() <= 1 + 1e-12
    items = encoder.vectors()[1]
    whole = feature_loss(projected, items)
    close(whole.detach(), golden["natural_feature_loss"])
    batch = torch.cat([golden["pos"], golden["negs"].flatten()]).unique()
    close(feature_loss(projected[batch], items[batch]).detach(), golden["natural_feature_loss_batch_items"])
    spread = covariance(covariance_rows(encoder, golden["users"], golden["pos"])[0])
    total = hinge_of(golden, encoder).hinge.loss + golden["feature_weight"] * whole + golden["cov_weight"] * spread
    close(total.detach(), golden["natural_total__sum_floor"])
    grad = torch.autograd.grad(whole, encoder.nodes)[0][encoder.num_users :]
    close(grad, 2 * (items - projected).detach(), grad=True)


def test_dropout_of_features_acts_in_training_only(golden):
    projection, features = projection_of(golden), golden["features"]
    torch.manual_seed(0)
    assert not torch.equal(projection(features), projection(features))
    projection.eval()
    assert torch.equal(projection(features), projection(features))


def test_gradients_of_the_projection_equal_differences(golden):
    projection = projection_of(golden, dropout=0.0)
    norms = projection(golden["features"]).norm(dim=1)
    inside, clipped = ((norms < 0.99).nonzero()[:2, 0], (norms > 0.999).nonzero()[:2, 0])
    assert len(inside) == len(clipped) == 2
    features = golden["features"][torch.cat([inside, clipped])]
    assert torch.autograd.gradcheck(lambda *_: projection(features), tuple(projection.parameters()))
    assert torch.isfinite(projection(torch.zeros(1, features.shape[1], dtype=torch.float64))).all()


# ---------------------------------------------------------------- ranking


def scores(encoder):
    scorer = SquaredDistanceScorer(*(part.detach() for part in encoder.vectors()))
    return scorer.score(torch.arange(encoder.num_users))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_scores_and_lists_equal_the_stored_ones(golden, close, dtype):
    scorer = SquaredDistanceScorer(golden["user_emb"].to(dtype), golden["item_emb"].to(dtype))
    users = torch.arange(scorer.num_users)
    close(scorer.score(users), golden["natural_scores"])
    close(scorer.score(users[[3, 1, 3]]), golden["natural_scores"][[3, 1, 3]])
    assert torch.equal(topk_items(scorer, users, 10, seen=None), golden["natural_top10_items"])
    factors = scorer.factors()
    close((factors.user @ factors.item.T - scorer.score(users)).std(1), torch.zeros(len(users)))


@pytest.mark.parametrize("form", ("squared", "paper", "signed"))
def test_copies_of_weight_zero_are_as_good_as_distinct_rows(form):
    """What other devices than the CPU do, where learning the number of distinct rows would stall them."""
    ids, table = torch.tensor([3, 1, 3, 3, 0, 1]), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    first = first_of_each(ids)
    assert sorted(ids[first].tolist()) == [0, 1, 3]
    found, wanted = covariance(table[ids], form, first.double()), covariance(table[ids.unique()], form)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, table)[0] for value in (found, wanted)))
