"""Against stored vectors and hand-computed values: the whole model's loss, and the published port's numbers."""

from __future__ import annotations

import math

import pytest
import torch

from gfml import losses
from gfml.cml import FeatureProjection, ItemFeatures, MetricLearner, MetricOptions
from gfml.ranking.sampling import Triples
from gfml.ranking.topk import FactorScorer

PRECISIONS = (torch.float64, torch.float32)


@pytest.fixture
def golden(stored):
    return stored("cml")


def learner_of(golden, features=False, dtype=torch.float64, **options) -> MetricLearner:
    user, item = golden["user_emb"], golden["item_emb"]
    model = MetricLearner(
        len(user), len(item), user.shape[1], options=MetricOptions(margin=float(golden["margin"]), **options),
        radius=float(golden["clip_norm"]), features=features_of(golden) if features else None,
    ).to(dtype)  # fmt: skip
    model.encoder.nodes.data.copy_(torch.cat([user, item]))
    return model.eval()


def features_of(golden) -> ItemFeatures:
    hidden, width = golden["mlp_W1"].shape
    projection = FeatureProjection(
        width,
        len(golden["mlp_b2"]),
        hidden_dim=hidden,
        scale=float(golden["feature_scale"]),
        radius=float(golden["clip_norm"]),
    ).double()
    for parameter, name in zip(projection.parameters(), ("mlp_W1", "mlp_b1", "mlp_W2", "mlp_b2"), strict=True):
        parameter.data.copy_(golden[name])
    count = len(golden["features"])
    return ItemFeatures(
        projection, golden["features"], torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    )


def batch_of(golden) -> Triples:
    return Triples(golden["users"], golden["pos"], golden["negs"])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("reduction", ("sum", "mean"))
@pytest.mark.parametrize("form", ("squared", "paper", "signed"))
def test_the_whole_loss(golden, close, form, reduction, dtype):
    options = {
        "cov_form": form, "cov_weight": float(golden["cov_weight"]), "reduction": reduction,
        "feature_weight": float(golden["feature_weight"]),
    }  # fmt: skip
    model = learner_of(golden, features=True, dtype=dtype, **options)
    if dtype == torch.float32:
        assert model.features.features.dtype == torch.float32
    parts = model.loss(batch_of(golden))
    hinge = golden[f"natural_loss_{reduction}__floor"]
    spread = golden["cov_weight"] * golden[f"natural_cov_loss__{form}"]
    pulled = golden["feature_weight"] * golden["natural_feature_loss_batch_items"]
    close(parts["hinge"].detach(), hinge)
    close(parts["covariance"].detach(), spread)
    close(parts["features"].detach(), pulled)
    close(parts["loss"].detach(), hinge + spread + pulled)


def test_lists_of_the_model(golden, close):
    model = learner_of(golden)
    users = torch.arange(len(golden["user_emb"]))
    close(model.scorer().score(users), golden["natural_scores"])


@pytest.mark.parametrize("weighted", (0, 1))
def test_the_published_port_is_these_parts_put_together_otherwise(golden, close, weighted):
    """The port ranks over the negatives of ALL rows of the batch, adds half the mean squared norm and rates by the dot."""
    user, item = (golden[f"{side}_emb"].clone().requires_grad_() for side in ("user", "item"))
    rows = user[golden["users"]], item[golden["pos"]], item[golden["negs"][:, 0]]
    sq_pos, sq_neg = ((rows[0] - other).square().sum(1) for other in rows[1:])
    hinge = losses.warp_hinge(
        sq_pos, sq_neg.detach().expand(len(sq_neg), -1), margin=float(golden["margin"]), num_items=int(golden["num_items"]),
        use_rank_weight=bool(weighted), rank_floor=False, sq_hardest=sq_neg,
    ).loss  # fmt: skip
    name = f"orig_gfml_port__rankweight{weighted}"
    # The port's rank is in single precision.
    tolerance = {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(hinge.detach(), golden[f"{name}__hinge_part"], **tolerance)
    total = hinge + losses.half_mean_square(*rows)
    torch.testing.assert_close(total.detach(), golden[f"{name}__loss"], **tolerance)
    for grad, side in zip(torch.autograd.grad(total, (user, item)), ("user", "item"), strict=True):
        torch.testing.assert_close(grad, golden[f"{name}__grad_{side}_emb"], **tolerance)
    rating = FactorScorer(golden["user_emb"], golden["item_emb"]).score(torch.arange(len(user))).sigmoid()
    close(rating, golden[f"{name}__rating"])
    assert not golden["orig_gfml_port__cov_runs"]


# ---------------------------------------------------------------- values computed by hand

USER = [0.6, 0.0]
ITEMS = [[0.0, 0.0], [0.6, 0.8], [-0.6, 0.0], [0.6, 0.3], [-0.8, 0.0]]


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_pair_with_four_negatives(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # 100 items, those beyond the first five far from everything that matters here.
    model = MetricLearner(1, 100, 2, options=MetricOptions(margin=0.5)).to(device, dtype)
    with torch.no_grad():
        model.encoder.nodes[:6] = torch.tensor([USER, *ITEMS], dtype=dtype)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    parts = model.loss(Triples(zero, zero, torch.tensor([[1, 2, 3, 4]], device=device)))
    assert parts["loss"].item() == pytest.approx(0.77 * math.log(51), abs=2e-6) == pytest.approx(3.0275057, abs=2e-6)
    (grad,) = torch.autograd.grad(parts["loss"], model.encoder.nodes)
    wanted = torch.zeros(101, 2, dtype=dtype)
    wanted[0], wanted[1], wanted[4] = torch.tensor(
        [[4.718191, 2.359095], [-4.718191, 0.0], [0.0, -2.359095]], dtype=dtype
    )
    torch.testing.assert_close(grad.cpu(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("num_items", "num_negatives", "imposters", "floor", "weight"),
    [(105, 10, 3, True, 3.4657359), (105, 10, 3, False, 3.4812401), (25975, 20, 1, True, 7.1693500),
     (3706, 10, 0, True, 0.0), (3706, 10, 10, True, 8.2179782)],
)  # fmt: skip
def test_rank_weights(num_items, num_negatives, imposters, floor, weight):
    found = losses.rank_weight(torch.tensor([imposters]), num_negatives, num_items, floor=floor)
    assert found.item() == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize(("form", "value"), [("squared", 0.0675820), ("paper", 0.0790914), ("signed", -0.33875)])
def test_covariance_penalties(form, value):
    rows = torch.tensor([[1, 0, 0.5], [0, 1, -0.5], [-0.5, 0.2, 0.3], [0.4, -0.6, 0]], dtype=torch.float64)
    assert losses.covariance(rows, form).item() == pytest.approx(value, abs=1e-7)
