from __future__ import annotations

import math

import pytest
import torch

from gfml.distances import SquaredDistance, softplus
from gfml.gravity import unit_rows

NATURAL = ("l2", "l1", "emd", "kl", "emd_softmax", "emd_power2", "kl_softmax")
ALL = (*NATURAL, "kl_compat")
DTYPES = (torch.float64, torch.float32)


def rows(count, width=6, seed=0, dtype=torch.float64):
    return torch.randn(count, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def prepared(tensor, norm, dtype=torch.float64):
    tensor = tensor.to(dtype)
    return unit_rows(tensor) if norm else tensor


# ---------------------------------------------------------------- stored values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", (0, 1))
@pytest.mark.parametrize("name", NATURAL)
def test_values_equal_the_stored_ones(stored, close, kinds, name, norm, dtype):
    golden, distance = stored("gravity"), kinds[name]
    x, y = (prepared(golden[side], norm, dtype) for side in "XY")
    expected = golden[f"natural_Q__{name}__norm{norm}"]
    close(distance.all_pairs(x, y), expected)
    close(distance.paired(x, y.expand(len(x), *y.shape)), expected)


@pytest.mark.parametrize("norm", (0, 1))
@pytest.mark.parametrize("name", NATURAL)
def test_difficult_pairs_equal_the_stored_ones(stored, kinds, name, norm):
    golden, distance = stored("gravity"), kinds[name]
    x, y = (prepared(golden[f"edge_{side}"], norm) for side in "XY")
    expected = golden[f"natural_edge_Q__{name}__norm{norm}"]
    torch.testing.assert_close(distance.paired(x, y), expected, rtol=1e-6, atol=1e-13)
    closed = distance.all_pairs(x, y).diagonal()
    allowed = 1e-12 * (1 + x.square().sum(1) + y.square().sum(1))
    assert ((closed - expected).abs() <= allowed).all()


@pytest.mark.parametrize("norm", (0, 1))
@pytest.mark.parametrize("name", ALL)
def test_difficult_pairs_are_finite_in_single_precision(stored, kinds, name, norm):
    golden, distance = stored("gravity"), kinds[name]
    x, y = (prepared(golden[f"edge_{side}"], norm, torch.float32).requires_grad_() for side in "XY")
    paired, closed = distance.paired(x, y), distance.all_pairs(x.detach(), y.detach())
    grads = torch.autograd.grad(paired.sum(), (x, y))
    assert all(torch.isfinite(part).all() for part in (paired, closed, *grads))
    assert (paired >= 0).all() and (closed >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", (0, 1))
@pytest.mark.parametrize("name", ("l2", "l1", "emd", "kl"))
def test_published_terms_are_reproduced(stored, close, published, name, norm, dtype):
    golden = stored("gravity")
    x, y = (prepared(golden[side], norm, dtype) for side in "XY")
    term = golden["orig_lamb"] * torch.log(published[name].paired(x, y[: len(x)]) + golden["orig_eps"])
    close(term, golden[f"orig_dist_term__{name}__norm{norm}"])


# ---------------------------------------------------------------- brute force


def naive(name, x, y):
    """Q of two lists of floats, term by term."""
    pairs = list(zip(x, y, strict=True))
    if name == "l2":
        return sum((a - b) ** 2 for a, b in pairs)
    if name == "l1":
        return sum(abs(a - b) for a, b in pairs) ** 2
    if name in ("emd_softmax", "kl_softmax"):
        x, y = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (x, y))
        pairs = list(zip(x, y, strict=True))
    if name == "kl_softmax":
        return sum(p * math.log(p / q) for p, q in pairs)
    if name.startswith("emd"):
        cdf = [sum(x[: d + 1]) - sum(y[: d + 1]) for d in range(len(x))]
        value = sum(c * c for c in cdf) / len(cdf)
        return value**2 if name == "emd_power2" else value
    probs = [(1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))) for a, b in pairs]
    if name == "kl_compat":
        return (sum(q * (math.log(q) - p) for p, q in probs) / len(probs)) ** 2
    return sum(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) for p, q in probs)


@pytest.mark.parametrize("name", ALL)
def test_the_three_shapes_equal_loops(close, kinds, name):
    distance, x, y = kinds[name], rows(5), rows(7, seed=1)
    expected = torch.tensor([[naive(name, a, b) for b in y.tolist()] for a in x.tolist()], dtype=torch.float64)
    close(distance.all_pairs(x, y), expected)
    close(distance.paired(x, y.expand(5, 7, 6)), expected)
    close(distance.paired(x, y[:5]), expected.diagonal())
    close(distance.paired(x[:, None].expand(5, 7, 6), y.expand(5, 7, 6)), expected)


@pytest.mark.parametrize("name", ALL)
def test_closed_forms_in_single_precision(kinds, name):
    x, y = (unit_rows(rows(count, 64, seed)) for count, seed in ((20, 2), (30, 3)))
    exact = kinds[name].paired(x, y.expand(20, 30, 64))
    closed = kinds[name].all_pairs(x.float(), y.float())
    torch.testing.assert_close(closed.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ("l2", "emd", "emd_power2"))
def test_far_from_the_origin_the_closed_form_keeps_its_digits(kinds, name):
    x, y = rows(4, seed=4), rows(5, seed=5)
    moved = kinds[name].all_pairs(x.float() + 8, y.float() + 8)
    torch.testing.assert_close(moved.double(), kinds[name].all_pairs(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_no_tensor_of_all_pairs_and_all_coordinates(kinds, largest_tensor, name):
    num_queries, num_keys, width = 40, 50, 16
    x, y = rows(num_queries, width), rows(num_keys, width, seed=1)
    with largest_tensor as largest:
        kinds[name].all_pairs(x, y)
    assert largest.numel == num_queries * num_keys


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ALL)
def test_gradients_equal_differences(kinds, name):
    x, y = rows(3).requires_grad_(), rows(6, seed=1).view(3, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(kinds[name].paired, (x, y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_gradients_at_equal_vectors(kinds, name, dtype):
    x = torch.cat([rows(4, dtype=dtype), torch.zeros(1, 6, dtype=dtype)])
    x, y = x.requires_grad_(), x.detach().clone().requires_grad_()
    grads = torch.autograd.grad(kinds[name].paired(x, y).sum(), (x, y))
    assert all(torch.isfinite(grad).all() for grad in grads)
    if name != "kl_compat":
        limit = 1e-6 if dtype == torch.float32 else 1e-15
        assert all(grad.abs().max() <= limit for grad in grads)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("name", NATURAL)
def test_zero_at_equal_vectors_and_never_negative(kinds, name):
    x, y = rows(30), rows(40, seed=1)
    assert kinds[name].paired(x, x).abs().max() < 1e-15
    assert kinds[name].paired(x, y[:30]).min() > 0
    for dtype in DTYPES:
        near = x.to(dtype)
        assert kinds[name].all_pairs(near, near).min() >= 0
        assert kinds[name].paired(near, near + 1e-8).min() >= 0


@pytest.mark.parametrize("name", NATURAL)
def test_symmetry(kinds, name):
    x, y = rows(5), rows(7, seed=1)
    there, back = kinds[name].all_pairs(x, y), kinds[name].all_pairs(y, x).T
    assert torch.allclose(there, back, rtol=1e-9) != name.startswith("kl")


@pytest.mark.parametrize("name", NATURAL)
def test_translation(kinds, name):
    x, y, shift = rows(5), rows(5, seed=1), rows(1, seed=2)
    moved = kinds[name].paired(x + shift, y + shift)
    invariant = name in ("l2", "l1", "emd", "emd_power2")
    assert torch.allclose(moved, kinds[name].paired(x, y), rtol=1e-9) == invariant


@pytest.mark.parametrize("name", NATURAL)
def test_rotation(kinds, name):
    x, y = rows(5), rows(5, seed=1)
    rotation = torch.linalg.qr(rows(6, seed=2))[0]
    moved = kinds[name].paired(x @ rotation, y @ rotation)
    assert torch.allclose(moved, kinds[name].paired(x, y), rtol=1e-9) == (name == "l2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_large_coordinates_and_zero_rows_are_finite(kinds, name, dtype):
    x = torch.tensor([[50.0, -50.0, 0.0], [-50.0, 50.0, 50.0], [0.0, 0.0, 0.0]], dtype=dtype)
    y = x.flip(0).contiguous()
    x, y = x.requires_grad_(), y.requires_grad_()
    paired = kinds[name].paired(x, y)
    grads = torch.autograd.grad(paired.sum(), (x, y))
    parts = (paired, *grads, kinds[name].all_pairs(x.detach(), y.detach()))
    assert all(torch.isfinite(part).all() for part in parts)
    assert torch.isfinite(kinds[name].paired(unit_rows(x), unit_rows(y))).all()


def test_bernoulli_kl_of_extreme_probabilities(close, kinds):
    # sigma(50) against sigma(-50): log(q / p) = 50 - (-50) up to e^-50.
    x, y = torch.tensor([[50.0]], dtype=torch.float64), torch.tensor([[-50.0]], dtype=torch.float64)
    close(kinds["kl"].paired(x, y), torch.tensor([50.0]))
    close(kinds["kl"].all_pairs(x, y), torch.tensor([[50.0]]))


def test_softplus_is_exact_beyond_the_library_threshold():
    z = torch.tensor([-800.0, -5.0, 0.0, 20.5, 39.0, 800.0], dtype=torch.float64)
    torch.testing.assert_close(softplus(z), torch.logaddexp(z, torch.zeros_like(z)), rtol=1e-14, atol=0)


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("options", ({"kind": "cosine"}, {"emd_input": "cdf"}, {"emd_power": 3}, {"kl_kind": "js"}))
def test_unknown_options_name_the_choices(options):
    with pytest.raises(ValueError, match="choose one of"):
        SquaredDistance(**options)


@pytest.mark.parametrize("name", ALL)
def test_vectors_of_two_widths_are_refused(kinds, name):
    with pytest.raises(ValueError, match="widths 6 and 1"):
        kinds[name].paired(rows(3), rows(3, 1))
    with pytest.raises((ValueError, RuntimeError)):
        kinds[name].all_pairs(rows(3), rows(3, 5))


@pytest.mark.parametrize("width", (8, 64, 256))
def test_emd_sees_one_direction_and_a_half(width: int) -> None:
    """The quadratic form behind emd, read off unit vectors: <d, C d'> = (Q(d + d') - Q(d) - Q(d')) D / 2."""
    units, zero = torch.eye(width, dtype=torch.float64), torch.zeros(1, width, dtype=torch.float64)
    emd = SquaredDistance("emd")
    alone = emd.paired(units, zero)
    sums = emd.paired(units[:, None] + units[None], zero)
    form = (sums - alone[:, None] - alone[None]) * width / 2
    values = torch.linalg.eigvalsh(form)
    assert float(values[-1] / values.sum()) == pytest.approx(0.81, abs=0.01)
    assert float(values.sum() ** 2 / values.square().sum()) == pytest.approx(1.5, abs=0.03)
