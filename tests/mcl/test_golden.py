"""Against the stored vectors of the published programs: distances, mined pairs, losses, gradients, scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.gravity import Gravity
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.graph import build_graph
from mcl import losses
from mcl.model import GravityOptions, MetricRecommender, MixedCentricOptions
from mcl.sampler import UserBatch

TAGS = ("L0_sum", "LK_sum", "LK_mean", "LK_final")
PRECISIONS = (torch.float64, torch.float32)
# name in the file -> (mode, pull only, wanted part names)
RUNS = {
    "mcl": ("mcl", False),
    "fork_mcl": ("mcl", False),
    "gfml": ("gfml", False),
    "gfml_opt1": ("gfml", True),
    "mix": ("mix", False),
    "mix_opt1": ("mix", True),
}


@pytest.fixture(scope="module")
def golden(stored):
    return stored("mcl")


def batch_of(golden) -> UserBatch:
    counts = golden["counts"]
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    segment = torch.repeat_interleave(counts)
    return UserBatch(golden["users"][first], counts, segment, golden["pos"], golden["negs"])


def encoder_of(golden, tag, dtype):
    user, item = golden["user_emb"], golden["item_emb"]
    if tag.startswith("L0"):
        encoder = Tables(len(user), len(item), user.shape[1])
    else:
        edges = golden["train_edges"].numpy()
        matrix = sp.csr_array((np.ones(len(edges), np.float32), edges.T), shape=(len(user), len(item)))
        encoder = LightGCN(
            build_graph(matrix, dtype=torch.float64), user.shape[1], int(golden["num_layers"]), combine=tag[3:]
        )
    encoder = encoder.to(dtype)
    with torch.no_grad():
        encoder.nodes.copy_(torch.cat([user, item]))
    return encoder


def model_of(golden, name, tag="L0_sum", dtype=torch.float64, decay=None, margin=None):
    mode, pull_only = RUNS[name]
    number = lambda key: float(golden[key])  # noqa: E731
    gravity = None
    if mode != "mcl":
        gravity = Gravity(
            len(golden["a_user"]),
            len(golden["a_item"]),
            mass_param="relu",
            lamb=number("grav_lambda"),
            eps=1.0,
            emb_norm=False,
        ).to(dtype)
        with torch.no_grad():
            gravity.mass.user.copy_(golden["a_user"])
            gravity.mass.item.copy_(golden["a_item"])
    mixed = MixedCentricOptions(
        int(golden["batch_size_nominal"]),
        number("alpha"),
        number("beta"),
        number("mcl_lambda_p"),
        number("mcl_lambda_n"),
        number("margin") if margin is None else margin,
    )
    attraction = GravityOptions(number("grav_weight_pos"), number("grav_weight_neg"), pull_only, number("mix_ratio"))
    decay = number("decay") if decay is None else decay
    return MetricRecommender(
        encoder_of(golden, tag, dtype), gravity, mode, mixed=mixed, attraction=attraction, decay=decay
    )


def mixed_centric_of(golden, sq_pos, sq_neg, margin=None):
    model, batch = model_of(golden, "mcl", margin=margin), batch_of(golden)
    options = model.mixed
    kept = losses.mine(sq_pos, sq_neg, batch.segment, len(batch.users), options.margin)
    found = losses.mixed_centric(
        sq_pos,
        sq_neg,
        kept,
        alpha=options.alpha,
        beta=options.beta,
        offset_pos=options.lambda_p,
        offset_neg=options.lambda_n,
        batch_size=options.batch_size,
    )
    return kept, found


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("name", RUNS)
def test_loss_regulariser_and_gradients(golden, close, name, tag, dtype):
    model = model_of(golden, name, tag, dtype)
    terms = model.loss(batch_of(golden))
    terms["loss"].backward()
    decay = float(golden["decay"])
    prefix = f"orig_{name}__{tag}__"
    close(terms["loss"] - terms["reg"], golden[f"{prefix}loss"])
    close(terms["reg"] / decay, golden[f"{prefix}reg"])
    split = [len(golden["user_emb"]), len(golden["item_emb"])]
    for grad, side in zip(model.encoder.nodes.grad.split(split), ("user", "item"), strict=True):
        close(grad, golden[f"{prefix}grad_{side}_emb"], grad=True)
    if model.gravity is not None:
        for side in ("user", "item"):
            close(getattr(model.gravity.mass, side).grad, golden[f"{prefix}grad_a_{side}"], grad=True)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("tag", TAGS)
def test_distances_mined_pairs_and_their_gradients(golden, close, tag, dtype):
    model, batch = model_of(golden, "mcl", tag, dtype), batch_of(golden)
    sq_pos, sq_neg = (part.detach() for part in model.sq_distances(batch))
    prefix = f"natural_mcl__{tag}__"
    close(sq_pos, golden[f"{prefix}E_pos"])
    close(sq_neg, golden[f"{prefix}E_neg"])
    sq_pos.requires_grad_(), sq_neg.requires_grad_()
    kept, found = mixed_centric_of(golden, sq_pos, sq_neg)
    for program in ("natural", "orig"):
        assert torch.equal(kept.pos, golden[f"{program}_mcl__{tag}__keep_pos"])
        assert torch.equal(kept.neg, golden[f"{program}_mcl__{tag}__keep_neg"])
    close(found.pos, golden[f"{prefix}L_pos"])
    close(found.neg, golden[f"{prefix}L_neg"])
    (found.pos + found.neg).backward()
    close(sq_pos.grad, golden[f"{prefix}dL_dEpos"], grad=True)
    close(sq_neg.grad, golden[f"{prefix}dL_dEneg"], grad=True)


@pytest.mark.parametrize("tag", TAGS)
def test_gravity_terms_and_hardest_negatives(golden, close, tag):
    model, batch = model_of(golden, "gfml", tag), batch_of(golden)
    _, sq_neg = model.sq_distances(batch)
    assert torch.equal(losses.hardest(sq_neg), golden[f"natural_gfml__{tag}__hardest_index"])
    terms = model.loss(batch)
    close(terms["pull"], float(golden["grav_weight_pos"]) * golden[f"natural_gfml__{tag}__up"].mean())
    close(terms["push"], float(golden["grav_weight_neg"]) * golden[f"natural_gfml__{tag}__un"].mean())


@pytest.mark.parametrize("tag", TAGS)
def test_scores_of_all_items(golden, close, tag):
    model = model_of(golden, "gfml", tag)
    users = torch.arange(len(golden["user_emb"]))
    close(model.scorer("distance").score(users), golden[f"orig_rating__{tag}"])
    close(model.scorer("gravity").score(users), golden[f"natural_score_gravity__{tag}"])


def test_where_the_published_loss_overflows_ours_is_finite_and_right(golden, close):
    assert math.isinf(golden["orig_overflow_f32__loss"]) and golden["orig_overflow_f32__grad_user_emb"].isnan().any()
    for dtype in PRECISIONS:
        model = model_of(golden, "mcl", dtype=dtype, decay=0.0)
        with torch.no_grad():
            model.encoder.nodes.mul_(float(golden["overflow_scale"]))
        terms = model.loss(batch_of(golden))
        terms["loss"].backward()
        close(terms["mcl_pos"], golden["natural_overflow__L_pos"])
        close(terms["mcl_neg"], golden["natural_overflow__L_neg"])
        wanted = torch.cat([golden["natural_overflow__grad_user_emb"], golden["natural_overflow__grad_item_emb"]])
        close(model.encoder.nodes.grad, wanted, grad=True)


@pytest.mark.parametrize(("name", "margin"), [("minus_large", -1e6), ("plus_large", 1e6)])
def test_extreme_margins(golden, close, name, margin):
    model = model_of(golden, "mcl")
    kept, found = mixed_centric_of(golden, *model.sq_distances(batch_of(golden)), margin=margin)
    assert torch.equal(kept.pos, golden[f"natural_margin_{name}__keep_pos"])
    assert torch.equal(kept.neg, golden[f"natural_margin_{name}__keep_neg"])
    close(found.pos, golden[f"natural_margin_{name}__L_pos"])
    close(found.neg, golden[f"natural_margin_{name}__L_neg"])
    close(found.pos + found.neg, golden[f"orig_margin_{name}__loss"])


@pytest.mark.parametrize("name", ["gfml", "mix"])
def test_a_batch_of_one_edge(golden, close, name):
    user, pos, *neg = golden["one_edge_row"][0]
    one = torch.tensor
    batch = UserBatch(one([user]), one([1]), one([0]), one([pos]), one([neg]))
    terms = model_of(golden, name).loss(batch)
    close(terms["loss"] - terms["reg"], golden[f"orig_one_edge__{name}__loss"])
    close(terms["reg"] / float(golden["decay"]), golden[f"orig_one_edge__{name}__reg"])
