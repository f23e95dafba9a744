from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from gfml import fused, losses
from gfml.cml import MetricOptions, metric_loss
from gfml.distances import SquaredDistance
from gfml.engine.train import plain_step
from gfml.fused import FusedHinge, FusedPairLoss, touched_rows, why_no_fused_hinge, why_not_fused
from gfml.gravity import Gravity
from gfml.mirror import MODES, MirrorGradient
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.graph import build_graph
from gfml.ranking.sampling import Triples

LOSSES = ("dot", "bpr", "gravity", "bpr_gra", "mix", "mix_bpr")
DISTANCES = {
    "l2": SquaredDistance("l2"),
    "l1": SquaredDistance("l1"),
    "emd": SquaredDistance("emd"),
    "emd squared": SquaredDistance("emd", emd_power=2),
    "emd softmax": SquaredDistance("emd", emd_input="softmax"),
    "kl": SquaredDistance("kl"),
    "kl softmax": SquaredDistance("kl", kl_kind="softmax"),
}
MASSES = (("none", "sum"), ("user", "sum"), ("item", "sum"), ("both", "sum"), ("both", "product"))
WEIGHTS = {"decay": 1e-2, "mass_decay": 2e-2, "mix_ratio": 0.3}
NUM_USERS, NUM_ITEMS, WIDTH = 7, 9, 6


class Model(nn.Module):
    """Tables and a gravity score, with the loss of autograd from the parts of the core."""

    def __init__(
        self, loss="gravity", distance="l2", mass="both", *, kind=torch.float64, width=WIDTH, seed=0, **gravity
    ):
        super().__init__()
        torch.manual_seed(seed)
        distance = DISTANCES.get(distance, distance)
        settings = {"lamb": 1.7, "learn_lamb": True, "mass_init": "xavier"} | gravity
        self.loss_mode = loss
        self.encoder = Tables(NUM_USERS, NUM_ITEMS, width, init="normal", std=0.5)
        self.gravity = Gravity(NUM_USERS, NUM_ITEMS, distance=distance, mass=mass, **settings)
        self.to(kind)

    def plain(self, batch):
        items = torch.cat([batch.pos[:, None], batch.neg.view(len(batch), -1)], 1)
        user, item, *_ = self.encoder(batch.users, items)
        raw_user, raw_item = self.gravity.mass.raw(batch.users, items)
        raw_items = (None, None) if raw_item is None else (raw_item[:, 0], raw_item[:, 1:])
        parts = {name: (values[:, 0], values[:, 1:]) for name, values in {
            "dot": (user[:, None] * item).sum(-1), "gravity": self.gravity(user, item, batch.users, items)}.items()}  # fmt: skip
        return losses.pair_loss(
            self.loss_mode,
            **parts,
            emb_reg=losses.embedding_reg(user, item[:, 0], item[:, 1:]),
            mass=losses.mass_reg(raw_user, *raw_items) if self.loss_mode not in ("dot", "bpr") else 0.0,
            **WEIGHTS,
        )

    def formula(self):
        return FusedPairLoss(self.encoder, self.gravity, self.loss_mode, **WEIGHTS)

    def gradients(self, loss, batch, scale=1.0):
        self.zero_grad(set_to_none=True)
        terms = loss(batch)
        (scale * terms["loss"]).backward()
        found = {name: None if p.grad is None else p.grad.clone() for name, p in self.named_parameters()}
        return {name: value.detach().item() for name, value in terms.items()}, found


def triples(size=20, negatives=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, generator=generator)
    neg = draw(NUM_ITEMS, (size,) if negatives == 1 else (size, negatives))
    return Triples(draw(NUM_USERS, (size,)), draw(NUM_ITEMS, (size,)), neg)


def assert_as_autograd(model, batch, tolerance=1e-12):
    (terms, found), (wanted_terms, wanted) = (
        model.gradients(loss, batch, 1.5) for loss in (model.formula(), model.plain)
    )
    assert terms.keys() == wanted_terms.keys()
    assert terms == pytest.approx(wanted_terms, rel=tolerance, abs=tolerance)
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_cell_is_as_autograd(loss: str, distance: str) -> None:
    """20 pairs of 7 users and 9 items: every row occurs several times."""
    for (mass, combine), norm, negatives in itertools.product(MASSES, (True, False), (1, 3)):
        model = Model(loss, distance, mass, combine=combine, emb_norm=norm)
        assert_as_autograd(model, triples(negatives=negatives))


@pytest.mark.parametrize("param", ("softplus", "relu", "exp"))
@pytest.mark.parametrize("mass", MASSES)
def test_mass_parametrisations(mass: tuple[str, str], param: str) -> None:
    for loss, learn in itertools.product(("gravity", "bpr_gra", "mix_bpr"), (True, False)):
        assert_as_autograd(
            Model(loss, "l2", mass[0], combine=mass[1], mass_param=param, learn_lamb=learn), triples(30, 2)
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_small_and_degenerate_batches(loss: str) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    for batch in (triples(1), triples(1, 5), Triples(one, one, one), Triples(one.expand(6), *2 * [triples(6).pos])):
        for distance in DISTANCES:
            assert_as_autograd(Model(loss, distance), batch)


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_of_zeros_and_of_huge_numbers(distance: str) -> None:
    model = Model("mix", distance, learn_lamb=False)
    with torch.no_grad():
        model.encoder.nodes[0] = model.encoder.nodes[NUM_USERS] = 0
        model.encoder.nodes[1], model.encoder.nodes[NUM_USERS + 1] = 1e-14, -1e-14
        model.encoder.nodes[2], model.encoder.nodes[NUM_USERS + 2] = 50, -50
    for norm in (True, False):
        model.gravity.emb_norm = norm
        model.gradients(model.formula(), triples(40))
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        _, wanted = model.gradients(model.plain, triples(40))
        for name, gradient in wanted.items():
            assert gradient.isfinite().all()
            # Unit rows made of rows near zero have slopes of 1e12.
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_against_a_plain_loop() -> None:
    """bpr and l2 gravity with their derivatives written out for one coordinate at a time."""
    model, batch = Model("mix_bpr", "l2", "item", mass_param="exp", emb_norm=False, learn_lamb=False), triples(15, 2)
    x, a = model.encoder.nodes.detach().numpy(), model.gravity.mass.item.detach().numpy()
    wanted, by_mass, count = np.zeros_like(x), np.zeros_like(a), len(batch)
    for u, p, n in zip(batch.users.tolist(), batch.pos.tolist(), batch.neg.tolist(), strict=True):
        rows = [NUM_USERS + i for i in (p, *n)]
        for k, row in enumerate(rows[1:]):
            chance = 1 / (1 + np.exp(-(x[u] @ (x[row] - x[rows[0]])))) * 0.7 / count / 2
            wanted[u] += chance * (x[row] - x[rows[0]])
            wanted[row] += chance * x[u]
            wanted[rows[0]] -= chance * x[u]
            assert k < 2
        for k, (item, row) in enumerate(zip((p, *n), rows, strict=True)):
            q = ((x[u] - x[row]) ** 2).sum() + 0.01
            force = np.exp(a[item]) * q**-1.7
            slope = 0.3 / count * 0.5 * (-1 / (1 + force) if k == 0 else force / (1 + force) / 2)
            wanted[u] += slope * -1.7 / q * 2 * (x[u] - x[row])
            wanted[row] -= slope * -1.7 / q * 2 * (x[u] - x[row])
            by_mass[item] += slope + 2e-2 / count * a[item] / (1 if k == 0 else 2)
            wanted[row] += 1e-2 / count * x[row] / (1 if k == 0 else 2)
        wanted[u] += 1e-2 / count * x[u]
    _, found = model.gradients(model.formula(), batch)
    np.testing.assert_allclose(found["encoder.nodes"].numpy(), wanted, atol=1e-12)
    np.testing.assert_allclose(found["gravity.mass.item"].numpy(), by_mass, atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_single_precision_follows_double(distance: str) -> None:
    single, double = (Model("mix_bpr", distance, kind=kind, width=64) for kind in (torch.float32, torch.float64))
    double.load_state_dict(single.state_dict())
    terms, found = single.gradients(single.formula(), triples(200))
    wanted_terms, wanted = double.gradients(double.formula(), triples(200))
    assert terms == pytest.approx(wanted_terms, rel=1e-5)
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("distance", ("l2", "emd softmax"))
def test_any_number_of_threads_gives_the_same_bits(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "COORDINATES_PER_THREAD", 1)
    before, found = torch.get_num_threads(), {}
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            model = Model("mix", distance, kind=torch.float32)
            loss = model.formula()
            found[number] = [model.gradients(loss, triples(50, 2, seed)) for seed in range(4)]
    finally:
        torch.set_num_threads(before)
    for number in (2, 4):
        for (terms, one), (wanted_terms, other) in zip(found[number], found[1], strict=True):
            assert terms == wanted_terms
            assert all(torch.equal(one[name], other[name]) for name in other)


def test_small_batches_take_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert [fused.threads_for(fused.COORDINATES_PER_THREAD * n // 2) for n in (1, 3, 5, 100)] == [1, 1, 2, 3]
        loss = Model(width=64).formula()
        assert "row; 1 of 3 threads, since a batch has 6,400 numbers" in fused.path_text(loss, 100)
        assert "threads" not in fused.path_text(loss, 100_000) and "autograd: so" in fused.path_text("so")
    finally:
        torch.set_num_threads(before)


def test_the_kept_gradient_has_the_rows_of_the_last_batch_alone() -> None:
    model = Model()
    loss = model.formula()
    for seed in range(5):
        batch = triples(3, seed=seed)
        _, found = model.gradients(loss, batch)
        _, wanted = model.gradients(model.plain, batch)
        torch.testing.assert_close(found, wanted)
        model.gradients(loss, batch)
        rows = torch.cat([batch.users, batch.pos + NUM_USERS, batch.neg + NUM_USERS]).unique()
        assert sorted(touched_rows(model.encoder.nodes.grad)) == rows.tolist()
        items = torch.cat([batch.pos, batch.neg]).unique()
        assert sorted(touched_rows(model.gravity.mass.item.grad)) == items.tolist()
        assert sorted(touched_rows(model.gravity.mass.user.grad)) == batch.users.unique().tolist()


def test_gradients_are_kept_in_the_same_memory_and_survive_what_others_do_to_them() -> None:
    model = Model()
    loss = model.formula()
    model.gradients(loss, triples(3))
    place = model.encoder.nodes.grad.data_ptr()
    model.encoder.nodes.grad += 1  # no row is known to be zero any more
    assert touched_rows(model.encoder.nodes.grad) is None
    _, found = model.gradients(loss, triples(3, seed=5))
    assert model.encoder.nodes.grad.data_ptr() == place
    _, wanted = model.gradients(model.plain, triples(3, seed=5))
    torch.testing.assert_close(found, wanted)


def test_a_gradient_that_is_there_grows() -> None:
    model = Model()
    loss, sums = model.formula(), {}
    for seed in (1, 2):
        _, found = model.gradients(model.plain, triples(seed=seed))
        sums = {name: gradient + sums.get(name, 0) for name, gradient in found.items()}
    model.zero_grad(set_to_none=True)
    for seed in (1, 2):
        loss(triples(seed=seed))["loss"].backward()
    assert touched_rows(model.encoder.nodes.grad) is None
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, sums)
    model.zero_grad(set_to_none=True)
    both = loss(triples(seed=1))["loss"] + loss(triples(seed=2))["loss"]
    both.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, sums)


@pytest.mark.parametrize("mode", ("plain", "clipped", *(mode for mode in MODES)))
def test_steps_are_those_of_autograd(mode: str) -> None:
    found = []
    for by_formula in (True, False):
        model = Model("mix")
        loss = model.formula() if by_formula else model.plain
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = partial(plain_step, clip_norm=0.05 if mode == "clipped" else None)
        if mode in MODES:
            step = MirrorGradient(optimizer, 1.0, 0.4, 2, mode, clip=0.05)
        for seed in range(8):
            batch = triples(6, seed=seed)
            step(lambda loss=loss, batch=batch: loss(batch), optimizer)
        found.append(dict(model.named_parameters()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_what_has_no_fused_form_says_why() -> None:
    model = Model()
    graph = build_graph(sp.csr_array(np.eye(NUM_USERS, NUM_ITEMS)))
    published = Gravity(NUM_USERS, NUM_ITEMS, distance=SquaredDistance("kl", kl_kind="compat"))
    assert why_not_fused(model.encoder, model.gravity, "gravity") is None
    assert "graph" in why_not_fused(LightGCN(graph, 4, 1), model.gravity, "bpr")
    assert "published" in why_not_fused(model.encoder, model.gravity, "mix", compat=True)
    assert "kl" in why_not_fused(model.encoder, published, "mix")
    assert why_not_fused(model.encoder, published, "bpr") is None
    assert "bfloat16" in why_not_fused(Tables(3, 3, 2).to(torch.bfloat16), model.gravity, "bpr")
    assert why_no_fused_hinge(model.encoder, MetricOptions(), None) is None
    assert "covariance" in why_no_fused_hinge(model.encoder, MetricOptions(cov_weight=1.0), None)
    assert "features" in why_no_fused_hinge(model.encoder, MetricOptions(), object())
    with pytest.raises(ValueError, match="published kl"):
        FusedPairLoss(model.encoder, published, "mix")


@pytest.mark.parametrize("reduction", ("sum", "mean"))
@pytest.mark.parametrize("ranks", ((False, True), (True, True), (True, False)))
def test_the_hinge_is_as_autograd(ranks: tuple[bool, bool], reduction: str) -> None:
    options = MetricOptions(0.4, use_rank_weight=ranks[0], rank_floor=ranks[1], reduction=reduction)
    seen = set()
    for negatives, size in itertools.product((1, 4), (1, 30)):
        model, batch = Model(), triples(size, negatives)
        model.encoder.nodes.data /= 2
        _, mined = metric_loss(model.encoder, batch, options)
        seen |= set((mined.hinge.pair_loss > 0).tolist())
        (terms, found), (wanted_terms, wanted) = (
            model.gradients(loss, batch, 1.5)
            for loss in (FusedHinge(model.encoder, options), lambda b, m=model: metric_loss(m.encoder, b, options)[0])
        )
        assert terms == pytest.approx(wanted_terms, rel=1e-12)
        assert terms.keys() == wanted_terms.keys()
        torch.testing.assert_close(found["encoder.nodes"], wanted["encoder.nodes"], rtol=1e-12, atol=1e-12)
    assert seen == {True, False}


def test_there_is_no_second_derivative() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="second derivative"):
        model.formula()(triples())["loss"].backward(create_graph=True)
