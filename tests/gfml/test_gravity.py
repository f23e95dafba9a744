from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from gfml.gravity import MASS_MODES, MASS_PARAMS, Gravity, GravityScorer, Mass, log_mass, unit_rows
from gfml.ranking.topk import Scorer, topk_items

DISTS = ("l2", "l1", "emd", "kl")
KINDS = (*DISTS, "emd_softmax", "emd_power2", "kl_softmax", "kl_compat")
MODES = ("none", "user", "item", "both_sum", "both_product")
DTYPES = (torch.float64, torch.float32)
GRID = [(mode, param) for mode in MODES for param in (MASS_PARAMS if mode != "none" else ("softplus",))]
# Mass maps other than softplus are stored for l2 alone.
STORED = [(dist, *cell) for dist in DISTS for cell in GRID if dist == "l2" or cell[1] == "softplus"]


def rows(count, width=6, seed=0, dtype=torch.float64):
    return torch.randn(count, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_gravity(distance, mode="both_sum", a_user=None, a_item=None, dtype=torch.float64, **options):
    """A gravity score with the given raw masses; mode as in the stored vectors."""
    mass, _, combine = mode.partition("_")
    a_user = rows(5, 1, 90)[:, 0] if a_user is None else a_user
    a_item = rows(7, 1, 91)[:, 0] if a_item is None else a_item
    gravity = Gravity(len(a_user), len(a_item), distance=distance, mass=mass, combine=combine or "sum", **options).to(
        dtype
    )
    for table, raw in ((gravity.mass.user, a_user), (gravity.mass.item, a_item)):
        if table is not None:
            table.data.copy_(raw)
    return gravity


def pairs(x, y):
    """Every query with every key as one batch: vectors, users, items for the pairwise form."""
    items = torch.arange(len(y)).expand(len(x), len(y))
    return x, y[items], torch.arange(len(x)), items


@pytest.fixture
def golden(stored):
    return stored("gravity")


def from_golden(golden, distance, mode, norm, *, dtype=torch.float64, **options):
    settings = {"lamb": float(golden["lamb_values"][1]), "eps": float(golden["eps_values"][0])} | options
    gravity = make_gravity(
        distance, mode, golden["a_user"], golden["a_item"], dtype, emb_norm=bool(int(norm)), **settings
    )
    return gravity, golden["X"].to(dtype), golden["Y"].to(dtype)


# ---------------------------------------------------------------- stored values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", "01")
@pytest.mark.parametrize("dist,mode,param", STORED)
def test_scores_equal_the_stored_ones(golden, close, dist, norm, mode, param, dtype):
    key = f"natural_g__{dist}__norm{norm}__{mode}__{param}"
    gravity, x, y = from_golden(golden, dist, mode, norm, mass_param=param, dtype=dtype)
    close(gravity.all_items(x, y, torch.arange(5)).detach(), golden[key])
    score = gravity(*pairs(x, y)).detach()
    close(score, golden[key])


@pytest.mark.parametrize("norm", "01")
@pytest.mark.parametrize("name", KINDS[:-1])
def test_distance_terms_equal_the_stored_ones(golden, close, kinds, name, norm):
    for a, lamb in enumerate(golden["lamb_values"].tolist()):
        for b, eps in enumerate(golden["eps_values"].tolist()):
            gravity, x, y = from_golden(golden, kinds[name], "none", norm, lamb=lamb, eps=eps)
            close(-gravity.all_items(x, y), golden[f"natural_dist_term__{name}__norm{norm}"][a, b])


@pytest.mark.parametrize("param", MASS_PARAMS)
def test_log_masses_equal_the_stored_ones(golden, close, param):
    for side in ("user", "item"):
        close(log_mass(golden[f"a_{side}"], param), golden[f"natural_logmass__{param}__{side}"])
    for mode in MODES[1:]:
        mass = from_golden(golden, "l2", mode, 1, mass_param=param)[0].mass
        expected = golden[f"natural_mu__{mode}__{param}"]
        close(mass.all_items(torch.arange(5)).detach().expand(5, 7), expected)
        items = torch.arange(7).expand(5, 7)
        close(mass(torch.arange(5), items).detach().expand(5, 7), expected)
        close(mass(torch.arange(5), torch.arange(5)).detach(), expected.diagonal())


@pytest.mark.parametrize("mode", ("both_sum", "both_product"))
@pytest.mark.parametrize("norm", "01")
@pytest.mark.parametrize("name", KINDS[:-1])
def test_gradients_equal_the_stored_ones(golden, close, kinds, name, norm, mode):
    gravity, x, y = from_golden(golden, kinds[name], mode, norm)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    (golden["grad_weights"] * gravity(*pairs(x, y))).sum().backward()
    found = {"X": x.grad, "Y": y.grad, "a_user": gravity.mass.user.grad, "a_item": gravity.mass.item.grad}
    prefix = f"natural_grad__{name}__norm{norm}__{mode}__softplus__"
    for key in [key for key in golden if key.startswith(prefix)]:
        close(found.pop(key.removeprefix(prefix)), golden[key], grad=True)
    assert len(found) == (0 if name == "l2" else 2)


@pytest.mark.parametrize("norm", "01")
@pytest.mark.parametrize("dist", DISTS)
def test_published_scores_are_reproduced(golden, close, published, dist, norm):
    options = {"mass_param": "relu", "lamb": float(golden["orig_lamb"]), "eps": float(golden["orig_eps"])}
    for mode in ("user", "item", "both_sum", "both_product"):
        gravity, x, y = from_golden(golden, published[dist], mode, norm, **options)
        ids = torch.arange(5)
        score = gravity(x, y[:5], ids, ids).detach()
        if mode != "both_product":
            close(score, golden[f"compat_g__{mode}__{dist}__norm{norm}"])
            continue
        close(score, golden[f"orig_g__{mode}__{dist}__norm{norm}"])
        close(score.sigmoid(), golden[f"orig_p__{mode}__{dist}__norm{norm}"])
        close(gravity.all_items(x, y, ids).detach(), golden[f"orig_g_all__{mode}__{dist}__norm{norm}"])


# The published kl ranking takes the logarithm of negative numbers and is mostly NaN: nothing to reproduce.
@pytest.mark.parametrize("mode", ("item", "both"))
@pytest.mark.parametrize("dist", ("l2", "l1", "emd"))
def test_published_ranking_scores_ignore_the_normalisation(golden, close, published, dist, mode):
    gravity, x, y = from_golden(
        golden,
        published[dist],
        "both_product" if mode == "both" else mode,
        1,
        mass_param="relu",
        lamb=float(golden["orig_lamb"]),
        eps=float(golden["orig_eps"]),
    )
    score = GravityScorer(gravity, x, y, emb_norm=False).score(torch.arange(5))
    close(score, golden[f"orig_infer_logit__{mode}__{dist}"])
    close(score.sigmoid(), golden[f"orig_infer_prob__{mode}__{dist}"])


def test_the_metric_learning_fork_is_reproduced(golden, close):
    options = {"mass_param": "relu", "lamb": float(golden["orig_lamb"]), "eps": 1.0}
    gravity, x, y = from_golden(golden, "l2", "both_sum", 0, **options)
    ids = torch.arange(5)
    close(gravity(x, y[:5], ids, ids).detach(), golden["orig_mcl_g__both_sum__l2"])


# ---------------------------------------------------------------- one score in every shape


@pytest.mark.parametrize("mode,param", GRID)
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_all_items_equal_pairs(close, kinds, name, mode, param):
    x, y = rows(5, seed=1), rows(7, seed=2)
    for norm in (False, True):
        gravity = make_gravity(kinds[name], mode, mass_param=param, lamb=1.7, emb_norm=norm)
        full = gravity.all_items(x, y, torch.arange(5))
        cells = [(torch.tensor([u]), torch.tensor([i])) for u in range(5) for i in range(7)]
        single = torch.cat([gravity(x[u], y[i], u, i) for u, i in cells])
        close(full, single.view(5, 7))
        close(full, gravity(*pairs(x, y)))
        some = torch.tensor([3, 0, 3])
        close(GravityScorer(gravity, x, y).score(some), full[some])


def test_one_and_many_keys_for_one_user(close):
    gravity, x, y = make_gravity("l2"), rows(3), rows(12, seed=1).view(3, 4, 6)
    users, items = torch.tensor([4, 0, 2]), torch.tensor([[0, 1, 2, 3], [6, 5, 4, 3], [1, 1, 0, 6]])
    wide = gravity(x, y, users, items)
    assert wide.shape == (3, 4)
    for w in range(4):
        close(wide[:, w].detach(), gravity(x, y[:, w], users, items[:, w]).detach())
    with pytest.raises((ValueError, RuntimeError)):
        gravity(x, y[:, 0, :5], users, items[:, 0])


@pytest.mark.parametrize("learn_lamb,norm", ((False, True), (True, False)))
@pytest.mark.parametrize("mode,param", GRID)
@pytest.mark.parametrize("name", KINDS)
def test_factors_rank_like_the_score(kinds, name, mode, param, norm, learn_lamb):
    gravity = make_gravity(kinds[name], mode, mass_param=param, lamb=2.3, emb_norm=norm, learn_lamb=learn_lamb)
    scorer = GravityScorer(gravity, rows(5, seed=1), rows(7, seed=2))
    factors = scorer.factors()
    exists = mode != "both_product" and name not in ("l1", "emd_power2", "kl_compat")
    assert (factors is not None) == exists and isinstance(scorer, Scorer)
    order = scorer.score(torch.arange(5)).argsort(1, descending=True)
    if factors is not None:
        assert not factors.user.requires_grad and not factors.item.requires_grad
        assert torch.equal((factors.user @ factors.item.T).argsort(1, descending=True), order)
    assert torch.equal(topk_items(scorer, torch.arange(5), 7, seen=None), order)


def assert_sorted(scores, order, slack):
    ranked = scores.gather(1, order)
    assert (ranked[:, 1:] <= ranked[:, :-1] + slack).all()


@pytest.mark.parametrize("spread", (1.0, 29.0, 1e3))
@pytest.mark.parametrize("lamb", (0.1, 1.0, 4.0))
@pytest.mark.parametrize("name", ("l2", "emd", "kl", "kl_softmax", "emd_softmax"))
def test_factors_hold_with_extreme_masses(kinds, name, lamb, spread):
    num_users, num_items = 20, 300
    shuffled = torch.randperm(num_items, generator=torch.Generator().manual_seed(3))
    a_item = torch.linspace(-spread * lamb, spread * lamb, num_items)[shuffled]
    for param, raw in (("exp", a_item), ("softplus", 2 * a_item)):
        gravity = make_gravity(
            kinds[name], "item", torch.zeros(num_users), raw, torch.float32, mass_param=param, lamb=lamb, eps=1e-4
        )
        x, y = rows(num_users, 16, 1, torch.float32), rows(num_items, 16, 2, torch.float32)
        scorer = GravityScorer(gravity, x, y)
        order = topk_items(scorer, torch.arange(num_users), num_items, seen=None)
        exact = gravity.double()
        exact = GravityScorer(exact, x.double(), y.double()).score(torch.arange(num_users))
        # Rounding of Q near 1e-3 in single precision moves lambda log(Q + eps) by about this much.
        assert_sorted(exact, order, 2e-3 * lamb)
        assert (scorer.factors() is None) == (spread > 30)


def test_mass_scale_damps_popularity_in_the_factors_too(close):
    gravity = make_gravity("l2", "both_sum", a_item=torch.tensor([-3.0, 9, 1, 0, 2, -1, 4]), mass_param="exp")
    x, y, users = rows(5, seed=1), rows(7, seed=2), torch.arange(5)
    distance_term = make_gravity("l2", "none").all_items(x, y)
    orders = []
    for scale in (0.0, 0.4, 1.0):
        scorer = GravityScorer(gravity, x, y, mass_scale=scale)
        close(scorer.score(users), distance_term + scale * gravity.mass.all_items(users).detach())
        orders.append(scorer.score(users).argsort(1, descending=True))
        factors = scorer.factors()
        assert torch.equal((factors.user @ factors.item.T).argsort(1, descending=True), orders[-1])
    assert (orders[2][:, 0] == 1).all() and not torch.equal(orders[0], orders[2])


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("dist", DISTS)
def test_score_at_equal_vectors(close, dist, norm):
    gravity, x, ids = make_gravity(dist, lamb=1.3, eps=0.02, emb_norm=norm), rows(5), torch.arange(5)
    with torch.no_grad():
        close(gravity(x, x, ids, ids), gravity.mass(ids, ids) - 1.3 * math.log(0.02))


def test_score_falls_with_the_distance_and_its_derivative_by_lambda(close):
    gravity = make_gravity("l2", "none", lamb=1.96, learn_lamb=True)
    sq_distance = torch.linspace(0, 40, 200, dtype=torch.float64)
    score = gravity.from_sq_distance(sq_distance)
    assert (score.diff() < 0).all()
    slope = torch.autograd.grad(score[7], gravity.log_lamb)[0]
    close(slope / gravity.lamb.detach(), -torch.log(sq_distance[7] + gravity.eps), grad=True)
    assert gravity.lamb.item() == pytest.approx(1.96, rel=1e-6)


def test_force_times_distance_is_the_product_of_masses(close, kinds):
    gravity, x, y = make_gravity("kl", lamb=2.5, emb_norm=False), rows(5, seed=1), rows(7, seed=2)
    with torch.no_grad():
        force = gravity.all_items(x, y, torch.arange(5)).exp()
        user, item = (1 + table.exp() for table in (gravity.mass.user, gravity.mass.item))
        close(force * (kinds["kl"].all_pairs(x, y) + gravity.eps) ** 2.5, user[:, None] * item)


@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("dist", DISTS)
def test_gradients_equal_differences(dist, norm):
    gravity = make_gravity(dist, "both_product", learn_lamb=True, emb_norm=norm)
    x, y = rows(3).requires_grad_(), rows(6, seed=1).view(3, 2, 6).requires_grad_()
    users, items = torch.tensor([4, 1, 1]), torch.tensor([[0, 1], [2, 2], [6, 0]])
    names, values = zip(*gravity.named_parameters(), strict=True)

    def score(x, y, *values):
        return torch.func.functional_call(gravity, dict(zip(names, values, strict=True)), (x, y, users, items))

    assert torch.autograd.gradcheck(score, (x, y, *values))


def test_gradient_norm_of_l2(close):
    lamb, eps = 1.7, 0.01
    gravity = make_gravity("l2", "none", lamb=lamb, eps=eps, emb_norm=False)
    radius = torch.linspace(0, 1, 1001, dtype=torch.float64)
    y = rows(1)
    direction = unit_rows(rows(1, seed=1))
    x = (y + radius[:, None] * direction).requires_grad_()
    grad = torch.autograd.grad(gravity(x, y.expand_as(x)).sum(), x)[0]
    close(grad, -2 * lamb * (x - y).detach() / (radius.square() + eps)[:, None], grad=True)
    norm = grad.norm(dim=1)
    assert norm[0] == 0 and int(norm.argmax()) == 100
    assert norm.max().item() == pytest.approx(lamb / math.sqrt(eps), rel=1e-9)


def test_only_item_mass_changes_a_ranking():
    x, y = rows(5, seed=1), rows(7, seed=2)
    order = {
        mode: make_gravity("l2", mode, a_item=torch.linspace(0, 30, 7), mass_param="exp")
        .all_items(x, y, torch.arange(5))
        .argsort(1, descending=True)
        for mode in MODES
    }
    assert torch.equal(order["user"], order["none"])
    assert torch.equal(order["both_sum"], order["item"])
    assert torch.equal(order["item"], torch.arange(6, -1, -1).expand(5, 7))
    assert not torch.equal(order["item"], order["none"])
    assert not torch.equal(order["both_product"], order["item"])


def test_ranking_ignores_constants_and_the_sigmoid():
    score = make_gravity("l2").all_items(rows(5, seed=1), rows(7, seed=2), torch.arange(5)).detach()
    order = score.argsort(1, descending=True)
    assert torch.equal((score - 3.5).argsort(1, descending=True), order)
    assert torch.equal(score.sigmoid().argsort(1, descending=True), order)


def test_sum_is_the_log_of_the_product_of_masses(close):
    mass = make_gravity("l2", "both_sum").mass
    ids = torch.arange(5)
    with torch.no_grad():
        close(mass(ids, ids), torch.log((1 + mass.user.exp()) * (1 + mass.item[:5].exp())))


def test_product_with_a_massless_user_ignores_items():
    gravity = make_gravity("l2", "both_product", a_user=torch.tensor([-1.0, 2.0]), mass_param="relu")
    with torch.no_grad():
        mu = gravity.mass.all_items(torch.arange(2))
    assert (mu[0] == 0).all() and (mu[1] > 0).any()


@pytest.mark.parametrize("param", MASS_PARAMS)
def test_gradient_of_a_mass(param):
    raw = torch.tensor([-30.0, -1.0, -1e-3, 1e-3, 1.0, 30.0], dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(log_mass(raw, param).sum(), raw)[0]
    assert ((grad == 0) == (raw < 0)).all() if param == "relu" else (grad > 0).all()


@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("dist", DISTS)
def test_scaling_a_vector(dist, norm):
    gravity, x, y = make_gravity(dist, emb_norm=norm), rows(5, seed=1), rows(7, seed=2)
    users = torch.arange(5)
    before = gravity.all_items(x, y, users)
    for after in (gravity.all_items(3 * x, y, users), gravity.all_items(x, 0.2 * y, users)):
        assert torch.allclose(after, before, rtol=1e-9, atol=1e-11) == norm


@pytest.mark.parametrize("dist", DISTS)
def test_zero_vectors_are_finite(dist):
    gravity = make_gravity(dist)
    x = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    y = rows(7).requires_grad_()
    score = gravity(*pairs(x, y))
    grads = torch.autograd.grad(score.sum(), (x, y))
    assert all(torch.isfinite(part).all() for part in (score, *grads, gravity.all_items(x, y, torch.arange(5))))


def test_unit_rows(close):
    x = torch.cat([rows(4) * torch.tensor([[1e-6], [1.0], [1e3], [1e8]]), torch.zeros(1, 6)]).requires_grad_()
    expected = torch.nn.functional.normalize(x)
    close(unit_rows(x).detach(), expected.detach())
    weights = rows(5, seed=1)
    ours, theirs = (torch.autograd.grad((weights * unit).sum(), x)[0] for unit in (unit_rows(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- parts and contract


def test_masses_exist_where_the_mode_has_them():
    for mode in MASS_MODES:
        mass = Mass(3, 4, mode)
        assert (mass.user is not None) == (mode in ("user", "both"))
        assert (mass.item is not None) == (mode in ("item", "both"))
        raw = mass.raw(torch.tensor([2, 0]), torch.tensor([[1], [3]]))
        assert [None if part is None else tuple(part.shape) for part in raw] == [
            (2,) if mass.user is not None else None,
            (2, 1) if mass.item is not None else None,
        ]
        for side, table in (("user", mass.user), ("item", mass.item)):
            if table is None:
                with pytest.raises(ValueError, match=f"no {side} mass"):
                    getattr(mass, f"log_{side}")()


def test_initial_masses():
    torch.manual_seed(0)
    assert all((Mass(50, 60, param=param).item == 0).all() for param in ("softplus", "exp"))
    alive = Mass(500, 600, param="relu")
    assert alive.user.min() >= 0.1 and alive.item.min() >= 0.1
    published = Mass(6040, 3706, param="relu", init="xavier")
    assert published.user.std().item() == pytest.approx(0.0182, rel=0.05)
    assert published.item.std().item() == pytest.approx(0.0232, rel=0.05)
    assert (published.item < 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "options",
    (
        {"mass": "items"},
        {"combine": "mean"},
        {"mass_param": "elu"},
        {"mass_init": "zeros"},
        {"distance": "cosine"},
        *({name: value} for name in ("lamb", "eps") for value in (0.0, -1.0, math.inf, math.nan)),
    ),
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="choose|wanted a finite"):
        Gravity(2, 3, **options)


@pytest.mark.parametrize("dist", DISTS)
def test_autocast_leaves_distances_in_single_precision(dist):
    gravity = make_gravity(dist, dtype=torch.float32)
    x, y, users, items = pairs(rows(5, dtype=torch.float32), rows(7, seed=1, dtype=torch.float32))
    rounded = x.bfloat16().float(), y.bfloat16().float()
    with torch.no_grad():
        plain, full = gravity(x, y, users, items), gravity.all_items(x, y[0], users)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(gravity(x, y, users, items), plain)
            assert torch.equal(gravity.all_items(x, y[0], users), full)
            assert torch.equal(gravity(x.bfloat16(), y.bfloat16(), users, items), gravity(*rounded, users, items))


MEMORY = """
import resource, sys, torch
from gfml.distances import SquaredDistance
from gfml.gravity import Gravity, GravityScorer
torch.set_num_threads(1)
num_users, num_items, width = 100, 91_599, 64
user, item = torch.randn(num_users, width), torch.randn(num_items, width)
small = torch.randn(200, width)
def scorers(user, item):
    for kind, options in (("l2", {}), ("l1", {}), ("emd", {}), ("kl", {}), ("emd", {"emd_input": "softmax"}),
                          ("emd", {"emd_power": 2}), ("kl", {"kl_kind": "softmax"}), ("kl", {"kl_kind": "compat"})):
        gravity = Gravity(num_users, len(item), distance=SquaredDistance(kind, **options), combine="product")
        yield kind, options, GravityScorer(gravity, user, item)
for _, _, scorer in scorers(user, small):
    scorer.score(torch.arange(num_users))
# Not ru_maxrss: a new program inherits that of the process that started it.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
for kind, options, scorer in scorers(user, item):
    assert scorer.score(torch.arange(num_users)).shape == (num_users, num_items)
    print(kind, *options.values(), round(peak() - before, 1))
sys.exit(peak() - before >= 160)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read in KiB, as Linux reports it")
def test_scoring_a_large_catalogue_stays_below_160_mb():
    # Large blocks go back at once: what glibc keeps for later is no part of what scoring needs, and differs by 80 MB.
    steady = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, env=steady)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("mode", "side"), [("item", "item"), ("user", "user"), ("both", "user")])
def test_forgotten_ids_of_masses_are_told(mode, side) -> None:
    """The table of all masses would broadcast where the batch has as many rows."""
    gravity = Gravity(4, 4, mass=mode)
    x, y, ids = torch.ones(4, 3), torch.zeros(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match=f"mass mode '{mode}' needs {side} ids, found none: give {side}s"):
        gravity(x, y)
    if mode != "item":
        with pytest.raises(ValueError, match="needs user ids"):
            gravity.all_items(x, y)
    if mode == "both":
        with pytest.raises(ValueError, match="needs item ids"):
            gravity(x, y, ids)
    assert gravity(x, y, ids, ids).shape == (4,) and gravity.all_items(x, y, ids).shape == (4, 4)
    with pytest.raises(ValueError, match=rf"found {side} ids of shape \(1,\), wanted \(4,"):
        gravity(x, y, ids[:1], ids[:1])


def test_user_masses_belong_to_rows_of_as_many_candidates() -> None:
    """Without item ids, which this mode does not read, masses [B] would broadcast along W = B candidates."""
    torch.manual_seed(0)
    gravity = Gravity(4, 4, mass="user")
    torch.nn.init.normal_(gravity.mass.user)
    x, y, users = torch.randn(4, 3), torch.randn(4, 4, 3), torch.tensor([2, 0, 3, 1])
    found = gravity(x, y, users)
    for b in range(4):
        assert torch.allclose(found[b], gravity(x[[b] * 4], y[b], users[[b] * 4]))
    for mode in ("item", "both"):
        with pytest.raises(ValueError, match=r"found item ids of shape \(4,\), wanted \(4, 4\)"):
            Gravity(4, 4, mass=mode)(x, y, users, users)
