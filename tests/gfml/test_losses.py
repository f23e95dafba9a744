from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from gfml import losses
from gfml.distances import SquaredDistance
from gfml.gravity import Gravity

PAIR_MODES = ("dot", "bpr", "gravity", "bpr_gra", "mix", "mix_bpr")
GRAVITY_MODES = ("gravity", "bpr_gra", "mix", "mix_bpr")
DISTS = ("l2", "l1", "emd", "kl")
MASSES = ("none", "user", "item", "both_sum", "both_product")
TABLES = ("user_emb", "item_emb", "a_user", "a_item")


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- stored values of the pair losses


class MatrixFactorisation:
    """The batch of the stored vectors scored from its tables; single: the first triple alone."""

    def __init__(self, golden, distance="l2", mode="both_sum", param="softplus", norm=1, single=False, compat=False):
        self.tables = {name: golden[name].clone().requires_grad_() for name in TABLES}
        size = 1 if single else len(golden["users"])
        self.users, self.pos, self.neg = (golden[name][:size] for name in ("users", "pos", "neg"))
        mass, _, combine = mode.partition("_")
        self.gravity = Gravity(
            len(golden["a_user"]),
            len(golden["a_item"]),
            distance=distance,
            mass=mass,
            combine=combine or "sum",
            mass_param=param,
            lamb=float(golden["lamb"]),
            eps=float(golden["orig_eps" if compat else "eps"]),
            emb_norm=bool(norm),
        )
        for side in ("user", "item"):
            if getattr(self.gravity.mass, side) is not None:
                delattr(self.gravity.mass, side)
                setattr(self.gravity.mass, side, self.tables[f"a_{side}"])
        self.options = {
            "decay": float(golden["decay"]),
            "mass_decay": float(golden["wd"]),
            "mix_ratio": float(golden["rho"]),
            "compat": compat,
        }

    def vectors(self):
        user, item = self.tables["user_emb"], self.tables["item_emb"]
        return user[self.users], item[self.pos], item[self.neg]

    def dot(self):
        user, pos, neg = self.vectors()
        return (user * pos).sum(1), (user * neg).sum(1)

    def scores(self):
        user, pos, neg = self.vectors()
        return self.gravity(user, pos, self.users, self.pos), self.gravity(user, neg, self.users, self.neg)

    def mass_reg(self):
        mass = self.gravity.mass
        user = None if mass.user is None else mass.user[self.users]
        pos, neg = (None if mass.item is None else mass.item[ids] for ids in (self.pos, self.neg))
        return (losses.mass_reg_compat if self.options["compat"] else losses.mass_reg)(user, pos, neg)

    def loss(self, mode):
        return losses.pair_loss(
            mode,
            dot=self.dot(),
            gravity=self.scores(),
            emb_reg=losses.embedding_reg(*self.vectors()),
            mass=self.mass_reg(),
            **self.options,
        )

    def gradient(self, name):
        grad = self.tables[name].grad
        return torch.zeros_like(self.tables[name]) if grad is None else grad


@pytest.fixture
def golden(stored):
    return stored("recsys_losses")


def stored_cells():
    """(distance, mass mode, mass map, normalised) of the stored gravity losses."""
    for dist in DISTS:
        for mode in MASSES:
            yield from ((dist, mode, "softplus", norm) for norm in (0, 1))
    for mode in MASSES[1:]:
        yield from (("l2", mode, param, 1) for param in ("relu", "exp"))


@pytest.mark.parametrize("dist,mode,param,norm", list(stored_cells()))
def test_losses_equal_the_stored_ones(golden, close, dist, mode, param, norm):
    model = MatrixFactorisation(golden, dist, mode, param, norm)
    cell = f"{dist}__{mode}__{param}__norm{norm}"
    close(losses.bce(*model.scores()).detach(), golden[f"natural_part__bce_gravity__{cell}"])
    close(losses.bpr(*model.scores()).detach(), golden[f"natural_part__bpr_gravity__{cell}"])
    close(torch.as_tensor(model.mass_reg()).double().detach(), golden[f"natural_part__R_mass__{mode}"])
    for loss_mode in GRAVITY_MODES:
        for table in model.tables.values():
            table.grad = None
        loss = model.loss(loss_mode)["loss"]
        close(loss.detach(), golden[f"natural_loss__{loss_mode}__{cell}"])
        loss.backward()
        keys = {name: f"natural_grad__{loss_mode}__{cell}__{name}" for name in TABLES}
        for name in [name for name in TABLES if keys[name] in golden]:
            close(model.gradient(name), golden[keys[name]], grad=True)


def test_every_stored_gradient_is_compared(golden):
    cells = {"__".join((*cell[:3], f"norm{cell[3]}")) for cell in stored_cells()}
    known = {f"natural_grad__{mode}__{cell}__{name}" for mode in GRAVITY_MODES for cell in cells for name in TABLES}
    known |= {f"natural_grad__{mode}__{name}" for mode in ("dot", "bpr") for name in TABLES}
    assert not [key for key in golden if key.startswith("natural_grad") and key not in known]


@pytest.mark.parametrize("single", (False, True))
@pytest.mark.parametrize("mode", ("dot", "bpr"))
def test_dot_losses_equal_the_stored_ones(golden, close, mode, single):
    model, tag = MatrixFactorisation(golden, single=single), "_b1" if single else ""
    loss = model.loss(mode)["loss"]
    close(loss.detach(), golden[f"natural_loss{tag}__{mode}"])
    close(losses.bce(*model.dot()).detach(), golden[f"natural_part{tag}__bce_dot"])
    close(losses.bpr(*model.dot()).detach(), golden[f"natural_part{tag}__bpr_dot"])
    close(losses.embedding_reg(*model.vectors()).detach(), golden[f"natural_part{tag}__R_emb"])
    loss.backward()
    for name in TABLES[:2] if not single else ():
        close(model.gradient(name), golden[f"natural_grad__{mode}__{name}"], grad=True)


@pytest.mark.parametrize("dist", DISTS)
def test_a_single_triple(golden, close, dist):
    model, cell = MatrixFactorisation(golden, dist, single=True), f"{dist}__both_sum__softplus__norm1"
    close(losses.bce(*model.scores()).detach(), golden[f"natural_part_b1__bce_gravity__{cell}"])
    close(losses.bpr(*model.scores()).detach(), golden[f"natural_part_b1__bpr_gravity__{cell}"])
    close(model.mass_reg().detach(), golden["natural_part_b1__R_mass__both_sum"])
    for mode in GRAVITY_MODES:
        close(model.loss(mode)["loss"].detach(), golden[f"natural_loss_b1__{mode}__{cell}"])


@pytest.mark.parametrize("norm", (0, 1))
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("mode", PAIR_MODES)
def test_published_losses_are_reproduced(golden, close, published, mode, dist, norm):
    model = MatrixFactorisation(golden, published[dist], "both_product", "relu", norm, compat=True)
    cell = mode if mode in ("dot", "bpr") else f"{mode}__{dist}__both__norm{norm}"
    loss = model.loss(mode)["loss"]
    close(loss.detach(), golden[f"orig_loss__{cell}"])
    loss.backward()
    compared = 0
    for name in TABLES:
        if (key := f"orig_grad__{cell}__{name}") in golden:
            compared += 1
            close(model.gradient(name), golden[key], grad=True)
    assert compared == (2 if mode in ("dot", "bpr") else 4 if norm or dist == "l2" else 0)


def test_published_parts_are_reproduced(golden, close, published):
    model = MatrixFactorisation(golden, published["l2"], "both_product", "relu", compat=True)
    parts = model.loss("bpr")
    close(parts["dot"].detach(), golden["orig_part__bpr__softplus"])
    close(parts["emb_reg"].detach() / model.options["decay"], golden["orig_part__bpr__R_emb"])
    for mode, key in (("both_sum", "orig_Rm__both"), ("user", "compat_Rm__user"), ("item", "compat_Rm__item")):
        close(MatrixFactorisation(golden, "l2", mode, compat=True).mass_reg().detach(), golden[key])
    single = MatrixFactorisation(golden, published["l2"], "both_product", "relu", single=True, compat=True)
    for mode in PAIR_MODES[:-1]:  # the published mix_bpr stops at a batch of one
        close(single.loss(mode)["loss"].detach(), golden[f"orig_loss_b1__{mode}"])


# ---------------------------------------------------------------- gradients


def squares():
    """Squared distances with hinges and minima at least 1e-2 away from a tie."""
    sq_pos = torch.tensor([0.3, 0.9, 0.05, 1.4], dtype=torch.float64)
    sq_neg = torch.tensor([[0.5, 0.2, 2.0], [3.0, 2.9, 2.0], [0.4, 0.1, 0.9], [1.0, 1.7, 0.6]], dtype=torch.float64)
    return sq_pos, sq_neg


def mass_arguments():
    return randn(4), randn(4, seed=1), randn(4, 3, seed=2)


GRADIENT_CASES = {
    "bpr": (losses.bpr, (randn(4), randn(4, 3, seed=1))),
    "bce": (losses.bce, (randn(4), randn(4, 3, seed=1))),
    "half_mean_square": (losses.half_mean_square, (randn(4, 3), randn(4, 2, 3, seed=1))),
    "embedding_reg": (losses.embedding_reg, (randn(4, 3), randn(4, 3, seed=1), randn(4, 2, 3, seed=2))),
    "mass_reg": (losses.mass_reg, mass_arguments()),
    "mass_reg_compat": (losses.mass_reg_compat, mass_arguments()),
    **{
        f"covariance_{form}": (partial(losses.covariance, form=form), (randn(6, 3),))
        for form in ("squared", "paper", "signed")
    },
    **{
        f"warp_hinge_{weight}_{reduction}": (
            lambda pos, neg, weight=weight, reduction=reduction: (
                losses.warp_hinge(pos, neg, margin=0.5, num_items=100, use_rank_weight=weight, reduction=reduction).loss
            ),
            squares(),
        )
        for weight in (False, True)
        for reduction in ("sum", "mean")
    },
    **{
        f"pair_loss_{mode}_{compat}": (
            lambda dp, dn, gp, gn, mode=mode, compat=compat: losses.pair_loss(
                mode,
                dot=(dp, dn),
                gravity=(gp, gn),
                emb_reg=dp.square().sum(),
                mass=gn.square().sum(),
                decay=0.1,
                mass_decay=0.2,
                mix_ratio=0.3,
                compat=compat,
            )["loss"],
            (randn(4), randn(4, 3, seed=1), randn(4, seed=2), randn(4, 3, seed=3)),
        )
        for mode in PAIR_MODES
        for compat in (False, True)
    },
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_equal_differences(case):
    function, arguments = GRADIENT_CASES[case]
    value = function(*arguments)
    assert value.shape == () and value.dtype == torch.float64
    assert torch.autograd.gradcheck(function, [argument.clone().requires_grad_() for argument in arguments])


# ---------------------------------------------------------------- identities of the pair losses


def loss_of(mode, **options):
    scores = {"dot": (randn(6), randn(6, seed=1)), "gravity": (randn(6, seed=2), randn(6, seed=3))}
    settings = {"emb_reg": randn(1).square().sum(), "mass": 0.7, "decay": 0.1, "mass_decay": 0.3} | scores | options
    return losses.pair_loss(mode, **settings)


@pytest.mark.parametrize("mixed,first", (("mix", "dot"), ("mix_bpr", "bpr")))
def test_mixtures_end_in_their_parts(close, mixed, first):
    close(loss_of(mixed, mix_ratio=0.0, mass_decay=0.0)["loss"], loss_of(first)["loss"])
    close(loss_of(mixed, mix_ratio=0.0)["loss"], loss_of(first)["loss"] + 0.3 * 0.7)
    close(loss_of(mixed, mix_ratio=1.0)["loss"], loss_of("gravity")["loss"])


def test_parts_sum_to_the_loss(close):
    for mode, rho in ((mode, 0.3) for mode in PAIR_MODES):
        parts = loss_of(mode, mix_ratio=rho)
        mixed = "mix" in mode
        weights = {"dot": 1 - rho if mixed else 1, "gravity": rho if mixed else 1}
        close(parts.pop("loss"), sum(weights.get(name, 1) * value for name, value in parts.items()))
        expected = {"emb_reg"} | ({"dot"} if mode in ("dot", "bpr") or mixed else set())
        assert set(parts) == expected | ({"gravity", "mass_reg"} if mode in GRAVITY_MODES else set())


def test_a_regulariser_without_weight_is_left_out():
    assert set(loss_of("gravity", decay=0.0, mass_decay=0.0)) == {"loss", "gravity"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_logit_form_equals_probabilities_and_stays_finite(close, dtype):
    pos, neg = randn(50).to(dtype) * 3, randn(50, 4, seed=1).to(dtype) * 3
    naive = -0.5 * (pos.sigmoid().log().mean() + (1 - neg.sigmoid()).log().mean())
    torch.testing.assert_close(losses.bce(pos, neg), naive, rtol=1e-6, atol=1e-6)
    extreme = torch.tensor([-1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    for loss in (losses.bce, losses.bpr):
        value = loss(extreme, -extreme)
        assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, extreme)[0]).all()
    close(losses.bce(extreme[:1], extreme[1:2]).detach(), torch.tensor(1e4))


def test_pairwise_loss_is_the_ratio_of_forces(close):
    pos, neg = randn(5), randn(5, 3, seed=1)
    close(losses.bpr(pos, neg), torch.log(1 + neg.exp() / pos.exp()[:, None]).mean())


def twice(part):
    return None if part is None else torch.cat([part, part])


@pytest.mark.parametrize("missing", ((), (0,), (1, 2), (0, 1, 2)))
@pytest.mark.parametrize("width", (None, 3))
def test_regularisers_do_not_depend_on_repetition(close, missing, width):
    shape = (4,) if width is None else (4, width)
    masses = [randn(4), randn(4, seed=1), randn(*shape, seed=2)]
    masses = [None if index in missing else part for index, part in enumerate(masses)]
    value = losses.mass_reg(*masses)
    assert value.shape == ()
    present = [part.square().reshape(4, -1).mean(1).sum() / 8 for part in masses if part is not None]
    close(value.double(), sum(present, torch.zeros((), dtype=torch.float64)))
    close(losses.mass_reg(*map(twice, masses)).double(), value.double())
    rows = [randn(4, 5), randn(4, 5, seed=1), randn(*shape, 5, seed=2)]
    reg = losses.embedding_reg(*rows)
    close(reg, sum(part.square().sum(-1).reshape(4, -1).mean(1).sum() / 8 for part in rows))
    close(losses.embedding_reg(*map(twice, rows)), reg)


@pytest.mark.parametrize("width", (None, 3))
def test_rows_without_weight_change_nothing(close, width):
    """Four real rows and three that repeat the first: every loss of weighted rows is that of the four."""
    wide = () if width is None else (width,)
    where, weight = torch.tensor([0, 1, 2, 3, 0, 0, 0]), torch.tensor([0.25] * 4 + [0.0] * 3, dtype=torch.float64)
    pos, neg, rows = randn(4), randn(4, *wide, seed=1), (randn(4, 5), randn(4, 5, seed=1), randn(4, *wide, 5, seed=2))
    cases = [
        (losses.bpr, (pos, neg)), (losses.bce, (pos, neg)), (losses.embedding_reg, rows),
        (losses.mass_reg, (pos, pos.neg(), neg)), (losses.row_mean, (neg,)),
        (lambda p, w=None: losses.reduced(p, "sum", w), (pos,)), (lambda p, w=None: losses.reduced(p, "mean", w), (pos,)),
        (lambda a, b, w=None: losses.row_mean(torch.cat([a, b]), w), (pos, pos.exp())),
    ]  # fmt: skip
    if width:
        for how in ("sum", "mean"):
            options = {"margin": 0.5, "num_items": 50, "reduction": how}
            cases.append((lambda p, n, w=None, o=options: losses.warp_hinge(p, n, weight=w, **o).loss, (pos, neg)))
    for loss, parts in cases:
        parts = [part.clone().requires_grad_() for part in parts]
        wanted, found = loss(*parts), loss(*(part[where] for part in parts), weight)
        close(found, wanted)
        for one, two in zip(torch.autograd.grad(found, parts), torch.autograd.grad(wanted, parts), strict=True):
            close(one, two, grad=True)


def test_published_masses_weigh_more_with_the_batch(close):
    masses = (*mass_arguments()[:2], randn(4, seed=2))
    user, pos, neg = masses
    close(losses.mass_reg_compat(*masses), 0.5 * (user.square().sum() + pos.square().sum() + neg.square().sum() / 4))
    close(losses.mass_reg_compat(user, None, None), user.square().sum() / 8)
    assert losses.mass_reg_compat(*map(twice, masses)) > 1.5 * losses.mass_reg_compat(*masses)
    assert losses.mass_reg_compat(None, None, None) == 0


@pytest.mark.parametrize("scale", (0.1, 3.0, 1e3))
def test_published_sigmoids_bound_the_gravity_part(scale):
    scores = (scale * randn(200), scale * randn(200, 2, seed=1))
    for mode, low, high in (("mix", 0.5032, 1.0032), ("mix_bpr", 0.5032, 1.0032), ("bpr_gra", 0.3132, 1.3133)):
        part = losses.pair_loss(mode, dot=scores, gravity=scores, compat=True)["gravity"]
        assert low < part < high
    best = (torch.full((3,), 1e4), torch.full((3,), -1e4))
    floor = losses.pair_loss("mix", dot=best, gravity=best, compat=True)["gravity"]
    assert floor.item() == pytest.approx(0.5 * (math.log1p(math.exp(-1)) + math.log(2)), rel=1e-6)


@pytest.mark.parametrize(
    "mode,combine,zero", (("both", "sum", True), ("user", "sum", True), ("both", "product", False))
)
def test_pairwise_loss_sees_user_mass_only_as_a_product(mode, combine, zero):
    gravity = Gravity(5, 7, mass=mode, combine=combine).double()
    for table in gravity.mass.parameters():
        table.data.copy_(randn(len(table)))
    ids = torch.arange(5)
    x, pos, neg = randn(5, 4), randn(5, 4, seed=1), randn(5, 4, seed=2)
    scores = gravity(x, pos, ids, ids), gravity(x, neg, ids, ids + 2)
    user = gravity.mass.user
    pairwise, pointwise = (
        torch.autograd.grad(loss(*scores), user, retain_graph=True)[0] for loss in (losses.bpr, losses.bce)
    )
    assert (pairwise.abs().max() < 1e-16) == zero and (pointwise != 0).all()


@pytest.mark.parametrize("width", (None, 1, 4))
@pytest.mark.parametrize("mode", PAIR_MODES)
def test_one_pair_is_a_batch(mode, width):
    pos, neg = randn(1), randn(1) if width is None else randn(1, width)
    parts = losses.pair_loss(mode, dot=(pos, neg), gravity=(pos, neg), decay=0.1, emb_reg=pos.square().sum())
    assert all(part.shape == () and torch.isfinite(part) for part in parts.values())


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("loss", (losses.bpr, losses.bce))
@pytest.mark.parametrize(
    "pos,neg", (((4,), (1,)), ((4, 1), (4,)), ((4,), (4, 3, 2)), ((3,), (4, 3)), ((4, 3), (4,)), ((), (4,)))
)
def test_scores_that_would_broadcast_silently_are_refused(loss, pos, neg):
    with pytest.raises(ValueError, match=r"wanted \[B\] with \[B\] or \[B, W\]"):
        loss(randn(*pos), randn(*neg))


@pytest.mark.parametrize("loss", (losses.bpr, losses.bce))
def test_many_negatives_are_averaged(close, loss):
    pos, neg = randn(4), randn(4, 3, seed=1)
    close(loss(pos, neg), torch.stack([loss(pos, column) for column in neg.T]).mean())
    close(loss(pos, neg[:, :1]), loss(pos, neg[:, 0]))


@pytest.mark.parametrize(
    "call",
    (
        lambda: losses.warp_hinge(randn(4), randn(4), margin=1, num_items=9),
        lambda: losses.warp_hinge(randn(4), randn(3, 2), margin=1, num_items=9),
        lambda: losses.warp_hinge(randn(4, 1), randn(4, 2), margin=1, num_items=9),
        lambda: losses.warp_hinge(randn(4), randn(4, 2), margin=1, num_items=9, reduction="max"),
        lambda: losses.covariance(randn(4, 2), "diagonal"),
        lambda: losses.half_mean_square(),
        lambda: losses.pair_loss("cml", dot=(randn(1), randn(1))),
        lambda: losses.pair_loss("mx", dot=(randn(1), randn(1))),
        lambda: losses.pair_loss("mix", dot=(randn(1), randn(1))),
        lambda: losses.pair_loss("bpr", gravity=(randn(1), randn(1))),
    ),
)
def test_wrong_arguments_are_refused(call):
    with pytest.raises(ValueError, match="wanted|choose|needs|no rows"):
        call()


# ---------------------------------------------------------------- the metric-learning hinge


@pytest.fixture
def cml(stored):
    return stored("cml")


WEIGHTS = {"floor": {}, "nofloor": {"rank_floor": False}, "noweight": {"use_rank_weight": False}}


def distances_of(cml, dtype=torch.float64):
    user, item = (cml[f"{side}_emb"].to(dtype, copy=True).requires_grad_() for side in ("user", "item"))
    q = SquaredDistance("l2").paired
    return user, item, q(user[cml["users"]], item[cml["pos"]]), q(user[cml["users"]], item[cml["negs"]])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("weight", WEIGHTS)
def test_hinges_equal_the_stored_ones(cml, close, weight, dtype):
    user, item, sq_pos, sq_neg = distances_of(cml, dtype)
    options = {"margin": float(cml["margin"]), "num_items": int(cml["num_items"])} | WEIGHTS[weight]
    result = losses.warp_hinge(sq_pos, sq_neg, **options)
    close(sq_pos.detach(), cml["natural_d2_pos"])
    close(sq_neg.detach(), cml["natural_d2_neg"])
    close(result.pair_loss.detach(), cml[f"natural_pair_loss_{weight}"])
    close(result.loss.detach(), cml[f"natural_loss_sum__{weight}"])
    mean = losses.warp_hinge(sq_pos, sq_neg, reduction="mean", **options)
    close(mean.loss.detach(), cml[f"natural_loss_mean__{weight}"])
    assert torch.equal(result.imposters, cml["natural_imposters"])
    assert torch.equal(result.hardest, cml["natural_hardest_index"])
    result.loss.backward()
    if weight != "nofloor":
        close(user.grad, cml[f"natural_grad_sum__{weight}__user_emb"], grad=True)
        close(item.grad, cml[f"natural_grad_sum__{weight}__item_emb"], grad=True)


def test_rank_weights(cml, close):
    imposters, num_negatives = cml["natural_imposters"], cml["negs"].shape[1]
    for name, floor in (("floor", True), ("nofloor", False)):
        weights = losses.rank_weight(imposters, num_negatives, int(cml["num_items"]), floor=floor)
        close(weights, cml[f"natural_weight_{name}"])
        close(weights.expm1(), cml[f"natural_rank_{name}"].double())
    for num_items, width, count, floor, expected in (
        (105, 10, 3, True, 3.4657359),
        (105, 10, 3, False, 3.4812401),
        (25975, 20, 1, True, 7.1693500),
        (3706, 10, 0, True, 0.0),
        (3706, 10, 10, True, 8.2179782),
        (2**24 + 1, 1, 1, True, math.log(2**24 + 2)),
    ):
        found = losses.rank_weight(torch.tensor([count]), width, num_items, floor=floor).item()
        assert found == pytest.approx(expected, abs=1e-7)
    weights = losses.rank_weight(torch.arange(11), 10, 3706)
    assert (weights.diff() > 0).all() and weights[0] == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_hand_computed_hinge(dtype):
    user = torch.tensor([[0.6, 0.0]], dtype=dtype, requires_grad=True)
    pos = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    neg = torch.tensor([[[0.6, 0.8], [-0.6, 0.0], [0.6, 0.3], [-0.8, 0.0]]], dtype=dtype, requires_grad=True)
    q = SquaredDistance("l2").paired
    result = losses.warp_hinge(q(user, pos), q(user, neg), margin=0.5, num_items=100)
    result.loss.backward()
    assert (result.imposters.item(), result.hardest.item()) == (2, 2)
    assert result.loss.item() == pytest.approx(3.0275057, abs=1e-6)
    expected = torch.zeros(4, 2, dtype=dtype)
    expected[2, 1] = -2.359095
    pairs = ((user, [[4.718191, 2.359095]]), (pos, [[-4.718191, 0.0]]), (neg, expected[None]))
    for leaf, value in pairs:
        torch.testing.assert_close(leaf.grad, torch.as_tensor(value, dtype=dtype), rtol=0, atol=2e-6)


def test_imposters_are_strict_and_ties_take_the_first():
    sq_pos, sq_neg = torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 2.0], [0.25, 0.25]])
    result = losses.warp_hinge(sq_pos, sq_neg, margin=0.5, num_items=10)
    assert result.imposters.tolist() == [0, 2] and result.hardest.tolist() == [0, 0]
    assert result.pair_loss[0] == 0


def test_order_of_negatives_and_repetition_of_the_batch(close):
    sq_pos, sq_neg = squares()
    options = {"margin": 0.5, "num_items": 100}
    result = losses.warp_hinge(sq_pos, sq_neg, **options)
    close(losses.warp_hinge(sq_pos, sq_neg[:, [2, 0, 1]], **options).pair_loss, result.pair_loss)
    doubled = (sq_pos.repeat(2), sq_neg.repeat(2, 1))
    close(losses.warp_hinge(*doubled, **options).loss, 2 * result.loss)
    means = [losses.warp_hinge(*pair, reduction="mean", **options).loss for pair in ((sq_pos, sq_neg), doubled)]
    close(means[1], means[0])
    # A far negative changes the rank through W, never the chosen negative.
    wider = losses.warp_hinge(sq_pos, torch.cat([sq_neg, torch.full((4, 1), 99.0)], 1), **options)
    assert torch.equal(wider.hardest, result.hardest) and torch.equal(wider.imposters, result.imposters)


def test_distances_without_gradient_get_it_from_the_hardest(close):
    sq_pos, sq_neg = (part.requires_grad_() for part in squares())
    options = {"margin": 0.5, "num_items": 100}
    plain = losses.warp_hinge(sq_pos, sq_neg, **options)
    hardest = sq_neg.detach().gather(1, plain.hardest[:, None])[:, 0].requires_grad_()
    split = losses.warp_hinge(sq_pos, sq_neg.detach(), sq_hardest=hardest, **options)
    close(split.pair_loss.detach(), plain.pair_loss.detach())
    expected = torch.autograd.grad(plain.loss, sq_neg)[0].gather(1, plain.hardest[:, None])[:, 0]
    close(torch.autograd.grad(split.loss, hardest)[0], expected, grad=True)


def test_a_margin_beyond_the_ball_makes_every_negative_an_imposter():
    sq_pos, sq_neg = 4 * torch.rand(8), 3.99 * torch.rand(8, 5)
    result = losses.warp_hinge(sq_pos, sq_neg, margin=4.0, num_items=50)
    assert (result.imposters == 5).all()
    assert torch.equal(losses.rank_weight(result.imposters, 5, 50), torch.full((8,), 51.0, dtype=torch.float64).log())


# ---------------------------------------------------------------- covariance and ball


def test_covariance_forms(cml, close):
    rows = cml["covariance_rows"].clone().requires_grad_()
    for form in ("squared", "paper", "signed"):
        close(losses.covariance(rows, form).detach(), cml[f"natural_cov_loss__{form}"])
    value = losses.covariance(rows)
    close(value.detach() / rows.shape[1], cml["natural_cov_loss__squared_over_D"])
    close(torch.autograd.grad(value, rows)[0], cml["natural_cov_loss__squared__grad_rows"], grad=True)
    by_hand = torch.tensor([[1, 0, 0.5], [0, 1, -0.5], [-0.5, 0.2, 0.3], [0.4, -0.6, 0]], dtype=torch.float64)
    for form, expected in (("squared", 0.0675820), ("paper", 0.0790914), ("signed", -0.33875)):
        assert losses.covariance(by_hand, form).item() == pytest.approx(expected, abs=1e-7)


def test_covariance_penalises_correlation_only(close):
    rows = randn(40, 3)
    rotation = torch.linalg.eigh(torch.cov(rows.T))[1]
    assert losses.covariance(rows @ rotation).abs() < 1e-20 < losses.covariance(rows)
    close(losses.covariance(rows * torch.tensor([1.0, -1, 1])), losses.covariance(rows))
    close(losses.covariance(rows + 5), losses.covariance(rows))


@pytest.mark.parametrize("form", ("squared", "paper", "signed"))
def test_covariance_never_forms_a_matrix_of_all_pairs_of_rows(largest_tensor, form):
    rows = randn(3000, 4).requires_grad_()
    with largest_tensor as largest:
        losses.covariance(rows, form).backward()
    assert largest.numel == rows.numel()


def test_projection_equals_the_stored_one_bit_for_bit_inside(cml, close):
    before, radius = cml["projection_in"], float(cml["clip_norm"])
    table = before.clone()
    losses.project_to_ball_(table, radius=radius)
    close(table, cml["natural_projection_out"])
    inside = before.norm(dim=1) <= radius
    assert inside.any() and (~inside).any() and torch.equal(table[inside], before[inside])
    again = table.clone()
    losses.project_to_ball_(again, radius=radius)
    close(again, table)
    assert table.norm(dim=1).max() <= radius + 1e-6


def test_projection_of_chosen_rows():
    table = 3 * torch.nn.functional.normalize(randn(6, 4)).float()
    before, rows = table.clone(), torch.tensor([4, 1, 4])
    losses.project_to_ball_(table, rows, radius=1.5)
    untouched = [0, 2, 3, 5]
    assert torch.equal(table[untouched], before[untouched])
    torch.testing.assert_close(table[[1, 4]], before[[1, 4]] / 2)


@pytest.mark.parametrize("form", ["squared", "paper", "signed"])
def test_equal_rows_have_no_covariance_and_a_finite_gradient(form) -> None:
    rows = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    value = losses.covariance(rows, form)
    value.backward()
    assert value.item() == 0 and rows.grad.abs().max() == 0


@pytest.mark.parametrize("form", ["squared", "paper", "signed"])
@pytest.mark.parametrize("rows, weight", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_weighted_covariance_of_mixed_types(form, rows, weight):
    values, counts = randn(5, 3).to(rows), torch.tensor([1, 1, 0, 1, 1])
    found = losses.covariance(values, form, counts.to(weight))
    wanted = losses.covariance(values[counts > 0].double(), form)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mode", PAIR_MODES)
def test_scores_in_half_precision_are_summed_in_float32(mode):
    """In bfloat16 the sum of 5 000 terms near 1 would stop at 256."""
    scores = [(randn(5000, seed=seed).bfloat16(), randn(5000, 2, seed=seed + 9).bfloat16()) for seed in (0, 1)]
    rows = [randn(5000, 3, seed=seed).bfloat16() for seed in (2, 3, 4)]

    def loss(dtype):
        (dot, gravity), cast = (
            [tuple(part.to(dtype) for part in pair) for pair in scores],
            [row.to(dtype) for row in rows],
        )
        return losses.pair_loss(mode, dot=dot, gravity=gravity, emb_reg=losses.embedding_reg(*cast), decay=0.1)

    found, wanted = loss(torch.bfloat16), loss(torch.float64)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-6
    )
