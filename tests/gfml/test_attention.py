"""Gravity attention: stored vectors, loops, gradients, and what follows from its definition."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.fx
from torch import Tensor, nn

from gfml.attention import (
    PLAIN,
    AttentionSettings,
    ContentMass,
    GravityAttention,
    PositionMass,
    attention_weights,
    gravity_attentions,
    gravity_layers,
    gravity_logits,
    log_masses,
    mass_parameters,
    pairwise,
    parameter_groups,
    power_law_weights,
    replace_attention,
    summarize_weights,
)
from gfml.distances import DISTANCES, SquaredDistance

F64 = torch.float64
KERNELS = ("auto", "explicit")
MIXES = {
    "off": {"mix": "off"},
    "normal": {"mix": "normal"},
    "split0": {"mix": "split"},
    "split1": {"mix": "split", "split_mix": True},
}
MASSES = {
    "none": {"mass": "none"},
    "key": {},
    "key_softplus": {"mass_param": "softplus"},
    "per_head": {"per_head": True},
    "content": {"mass": "content"},
    "sum": {"query_mass": True},
    "product": {"query_mass": True, "mass_combine": "product"},
}


@pytest.fixture
def golden(stored: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return stored("gravity_attention")


def stored_layer(golden: dict[str, Tensor], dtype: torch.dtype = F64, **options: object) -> GravityAttention:
    """The layer of the stored vectors: its maps and masses under the given settings."""
    numbers = {
        "lamb": golden["lamb_gra"].item(),
        "lamb_mix": golden["lamb_mix"].item(),
        "num_split": golden["num_split"].item(),
    }
    _, n, width = golden["x"].shape
    layer = GravityAttention(width, golden["num_heads"].item(), n, AttentionSettings(**{**numbers, **options})).to(
        dtype
    )
    with torch.no_grad():
        for part in ("weight", "bias"):
            layer.qkv.get_parameter(part).copy_(
                torch.cat([golden[f"param__{name}_{part}"] for name in ("query", "key", "value")])
            )
            layer.proj.get_parameter(part).copy_(golden[f"param__out_{part}"])
        if isinstance(layer.mass, ContentMass):
            layer.mass.weight.copy_(golden["content_mass_weight"])
        elif layer.mass is not None:
            layer.mass.key.copy_(golden["mass_key_per_head"] if options.get("per_head") else golden["mass_key"].T)
            if layer.mass.query is not None:
                layer.mass.query.copy_(golden["mass_query"].T)
    return layer


def check_layer(layer: GravityAttention, golden: dict[str, Tensor], tag: str, close: Callable[..., None]) -> None:
    x = golden["x"].to(layer.qkv.weight.dtype)
    if f"{tag}__logits" in golden:
        close(layer.logits(x), golden[f"{tag}__logits"])
    if f"{tag}__probs" in golden:
        close(layer.weights(x), golden[f"{tag}__probs"])
    close(layer(x), golden[f"{tag}__out"])


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("distance", "mix", "mass"), [*itertools.product(("l2", "l1"), MIXES, ("none", "key"))])
def test_layers_are_the_stored_ones(golden, close, distance, mix, mass, kernel, dtype) -> None:
    layer = stored_layer(golden, dtype, distance=distance, kernel=kernel, **MIXES[mix], **MASSES[mass])
    check_layer(layer, golden, f"natural__{distance}__{mix}__scale_sqrt_hidden__mass_{mass}", close)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("distance", "mix", "scale"), [*itertools.product(("l2", "l1"), ("off", "split1"), ("sqrt_head", "none"))]
)
def test_divisors_are_the_stored_ones(golden, close, distance, mix, scale, kernel) -> None:
    layer = stored_layer(golden, distance=distance, kernel=kernel, scale=scale, **MIXES[mix])
    check_layer(layer, golden, f"natural__{distance}__{mix}__scale_{scale}__mass_key", close)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mass", ["sum", "product", "per_head", "key_softplus"])
def test_masses_are_the_stored_ones(golden, close, mass, kernel) -> None:
    layer = stored_layer(golden, kernel=kernel, **MASSES[mass])
    check_layer(layer, golden, f"natural__l2__off__scale_sqrt_hidden__mass_{mass}", close)


@pytest.mark.parametrize("kernel", KERNELS)
def test_content_mass_is_the_stored_one(golden, close, kernel) -> None:
    """The stored logits carry a bias per head, which the softmax cancels and the layer does not have."""
    layer = stored_layer(golden, kernel=kernel, **MASSES["content"])
    tag = "natural__l2__off__scale_sqrt_hidden__mass_content"
    bias = golden["content_mass_bias"][:, None, None] / golden["x"].shape[-1] ** 0.5
    close(layer.logits(golden["x"]) + bias, golden[f"{tag}__logits"])
    close(layer.weights(golden["x"]), golden[f"{tag}__probs"])
    close(layer(golden["x"]), golden[f"{tag}__out"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("distance", "mix"), [*itertools.product(("l2", "l1"), MIXES)])
def test_published_layers(golden, close, distance, mix, kernel) -> None:
    """Without mass and with the original order of heads a layer is what the published code computes."""
    options = {"distance": distance, "kernel": kernel, "mass": "none", "head_order": "original", **MIXES[mix]}
    layer = stored_layer(golden, **options)
    check_layer(layer, golden, f"orig__{distance}__{mix}", close)
    if mix.startswith("split"):
        close(layer.logits(golden["x"]), golden[f"compat__{distance}__{mix}__logits"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_published_full_is_plain_attention(golden, close, kernel) -> None:
    layer = stored_layer(golden, mix="split", num_split=0, kernel=kernel)
    check_layer(layer, golden, "orig__mass_pos_full", close)
    check_layer(layer, golden, "natural__dot", close)
    assert golden["orig_mass_has_gradient"].item() == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("distance", "mix"), [*itertools.product(("l2", "l1"), MIXES)])
def test_gradients_are_the_stored_ones(golden, close, distance, mix, kernel) -> None:
    layer = stored_layer(golden, distance=distance, kernel=kernel, learn_lamb=True, **MIXES[mix])
    with torch.no_grad():  # lambda to the last digit: it was rounded to float32
        layer.raw_lamb.fill_(math.log(math.expm1(golden["lamb_gra"].item())))
    x = golden["x"].clone().requires_grad_()
    (golden["grad_weights"] * layer(x)).sum().backward()
    tag, width = f"natural_grad__{distance}__{mix}__scale_sqrt_hidden__mass_key", x.shape[-1]
    close(x.grad, golden[f"{tag}__x"], grad=True)
    close(layer.mass.key.grad.T, golden[f"{tag}__mass_key"], grad=True)
    close(layer.qkv.weight.grad[:width], golden[f"{tag}__query_weight"], grad=True)
    close(layer.qkv.weight.grad[width : 2 * width], golden[f"{tag}__key_weight"], grad=True)
    # one lambda per head through softplus; the stored gradient is of one shared lambda
    close((layer.raw_lamb.grad / layer.raw_lamb.detach().sigmoid()).sum(), golden[f"{tag}__lamb"], grad=True)


def rows(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loop_sq_distance(x: Tensor, y: Tensor, kind: str) -> float:
    if kind == "l2":
        return sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))
    return sum(abs(a - b) for a, b in zip(x.tolist(), y.tolist(), strict=True)) ** 2


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_logits_by_loops(kind) -> None:
    q, k, mass = rows(0, 2, 3, 5, 4), rows(1, 2, 3, 5, 4), rows(2, 5)
    k[0, 0, 1] = q[0, 0, 2]
    found = gravity_logits(q, k, mass, lamb=3.0, divisor=2.5, distance=SquaredDistance(kind))
    for b, h, i, j in itertools.product(range(2), range(3), range(5), range(5)):
        wanted = (mass[j].item() - 3 * math.log1p(loop_sq_distance(q[b, h, i], k[b, h, j], kind))) / 2.5
        assert found[b, h, i, j].item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("kind", DISTANCES)
def test_all_pairs_equal_matching_pairs(kind) -> None:
    distance = SquaredDistance(kind)
    q, k = rows(0, 2, 5, 4), rows(1, 2, 5, 4)
    wanted = distance.paired(q[:, :, None].expand(-1, -1, 5, -1), k[:, None].expand(-1, 5, -1, -1))
    torch.testing.assert_close(pairwise(q, k, distance), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mix", MIXES)
def test_kernels_agree_forward_and_backward(kind, mix) -> None:
    """Closed form and definition, in float32; both of them move every parameter."""
    settings = AttentionSettings(lamb=3.0, distance=kind, num_split=2, learn_lamb=True, per_head=True, **MIXES[mix])
    x, grad = rows(0, 4, 9, 24, dtype=torch.float32), rows(1, 4, 9, 24, dtype=torch.float32)
    results = []
    for kernel in KERNELS:
        torch.manual_seed(0)
        layer = GravityAttention(24, 4, 9, replace(settings, kernel=kernel))
        given = x.clone().requires_grad_()
        out = layer(given)
        (out * grad).sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in layer.parameters())])
    for auto, explicit in zip(*results, strict=True):
        torch.testing.assert_close(auto, explicit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("column_shape", [(4,), (1, 2, 1, 4), (2, 2, 1, 4)])
def test_closed_form_gradients_by_differences(alpha, column_shape) -> None:
    q, k = rows(0, 2, 2, 4, 3).requires_grad_(), rows(1, 2, 2, 4, 3).requires_grad_()
    column, beta = rows(2, *column_shape).requires_grad_(), rows(3, 2, 1, 1).abs().add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *parts: power_law_weights(*parts, alpha), (q, k, column, beta))
    assert torch.autograd.gradcheck(lambda q, k: power_law_weights(q, k, column.detach(), 1.5, alpha), (q, k))


def test_closed_form_is_a_power_law() -> None:
    q, k, column = rows(0, 1, 2, 6, 4), rows(1, 1, 2, 6, 4), rows(2, 6)
    force = column.exp() * (1 + (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)) ** -1.7
    found = power_law_weights(q, k, column, 1.7)
    torch.testing.assert_close(found, force / force.sum(-1, keepdim=True), rtol=1e-12, atol=1e-14)


def test_no_pull_is_uniform_and_a_strong_one_picks_the_nearest() -> None:
    q, k = rows(0, 2, 2, 7, 3), rows(1, 2, 2, 7, 3)
    even = power_law_weights(q, k, q.new_zeros(()), 0.0)
    torch.testing.assert_close(even, torch.full_like(even, 1 / 7), rtol=0, atol=0)
    sharp = power_law_weights(q, k, q.new_zeros(()), 1e4)
    nearest = torch.cdist(q, k).argmin(-1)
    assert torch.equal(sharp.argmax(-1), nearest)
    assert sharp.gather(-1, nearest[..., None]).min() > 0.99


def test_far_from_the_origin_nothing_breaks() -> None:
    """In float32 the closed form of equal far points may come out below zero: it counts as zero."""
    far = 3e4 * rows(0, 2, 3, 40, 8, dtype=torch.float32).requires_grad_()
    z = 1 + (far.square().sum(-1)[..., None] + far.square().sum(-1)[..., None, :] - 2 * far @ far.mT)
    assert z.min() < 0
    weights = power_law_weights(far, far, torch.zeros(()), 2.0)
    assert weights.isfinite().all() and torch.equal(weights.argmax(-1), torch.arange(40).expand(2, 3, 40))


def small(seed: int = 0, **options: object) -> GravityAttention:
    torch.manual_seed(seed)
    return GravityAttention(12, 3, 5, AttentionSettings(**options)).double()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mix", MIXES)
def test_query_masses_cancel_and_key_masses_do_not(mix, kernel) -> None:
    layer = small(query_mass=True, num_split=2, kernel=kernel, **MIXES[mix])
    x, grad = rows(0, 2, 5, 12), rows(1, 2, 5, 12)
    before = layer(x)
    (before * grad).sum().backward()
    assert layer.mass.query.grad.abs().max() < 1e-15
    assert layer.mass.key.grad.abs().min() > 1e-6
    with torch.no_grad():
        layer.mass.query.add_(rows(2, 1, 5))
        layer.mass.key.add_(3.0)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.mass.key[0, 0] += 1
    assert (layer(x) - before).abs().max() > 1e-4


def test_products_of_masses_feel_the_query_mass() -> None:
    layer = small(mass_combine="product")
    layer(rows(0, 2, 5, 12)).square().sum().backward()
    assert layer.mass.query.grad.abs().min() > 1e-9


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_huge_mass_attracts_everything(kernel) -> None:
    layer = small(kernel=kernel)
    with torch.no_grad():
        layer.mass.key[0, 3] = 1e4 * layer.divisor
    x = rows(0, 2, 5, 12).requires_grad_()
    assert torch.equal(layer.weights(x)[..., 3], torch.ones(2, 3, 5, dtype=F64))
    out = layer(x)
    torch.testing.assert_close(out[:, :1].expand_as(out), out)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_moving_all_queries_and_keys_changes_nothing(kind) -> None:
    q, k, by = rows(0, 2, 2, 5, 3), rows(1, 2, 2, 5, 3), rows(2, 3)
    options = {"lamb": 2.0, "divisor": 1.0, "distance": SquaredDistance(kind)}
    torch.testing.assert_close(gravity_logits(q + by, k + by, 0.0, **options), gravity_logits(q, k, 0.0, **options))


@pytest.mark.parametrize("mix", MIXES)
def test_tokens_may_come_in_any_order_with_their_masses(mix) -> None:
    layer, x, order = small(num_split=2, **MIXES[mix]), rows(0, 2, 5, 12), torch.tensor([3, 0, 4, 1, 2])
    before = layer(x)
    with torch.no_grad():
        layer.mass.key.copy_(layer.mass.key[:, order])
    torch.testing.assert_close(layer(x[:, order]), before[:, order])


@pytest.mark.parametrize("kernel", KERNELS)
def test_mixes_end_at_plain_and_at_gravity_attention(kernel) -> None:
    x = rows(0, 2, 5, 12)
    plain, gravity = (small(kernel=kernel, **o)(x) for o in ({"mix": "split", "num_split": 0}, {}))
    assert (plain - gravity).abs().max() > 1e-3
    for options, wanted in (
        ({"mix": "normal", "lamb_mix": 0.0}, plain),
        ({"mix": "split", "num_split": 3, "split_mix": True, "lamb_mix": 0.0}, plain),
        ({"mix": "normal", "lamb_mix": 1.0}, gravity),
        ({"mix": "split", "num_split": 3}, gravity),
        ({"mix": "split", "num_split": 3, "split_mix": True, "lamb_mix": 1.0}, gravity),
    ):
        torch.testing.assert_close(small(kernel=kernel, **options)(x), wanted, rtol=1e-12, atol=1e-12)


def head_outputs(layer: GravityAttention, x: Tensor) -> Tensor:
    """Outputs of the heads [B, n, H, d], before the output map."""
    layer.proj = nn.Identity()
    return layer(x).unflatten(-1, (layer.num_heads, layer.head_width))


@pytest.mark.parametrize("order", ["natural", "original"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_head_reads_only_its_own_queries_keys_and_values(order, part) -> None:
    layer, x = small(mix="split", num_split=2, head_order=order), rows(0, 2, 5, 12)
    before = head_outputs(layer, x).detach()
    d = layer.head_width
    for head in range(3):
        with torch.no_grad():
            first = "qkv".index(part) * 12 + head * d
            saved = layer.qkv.weight.clone()
            layer.qkv.weight[first : first + d] += rows(head, d, 12)
            changed = (head_outputs(layer, x) - before).abs().amax((0, 1, 3)) > 1e-9
            layer.qkv.weight.copy_(saved)
        # original: the dot head 2 weighs the values of head 0, the gravity heads 0 and 1 those of 1 and 2
        place = head if order == "natural" or part == "v" else (head + 1) % 3
        assert changed.tolist() == [index == place for index in range(3)]


def test_original_order_is_a_relabelling_of_values_and_outputs() -> None:
    """Values moved by num_split heads and output columns moved with them give the natural layer."""
    natural, original = (small(mix="split", num_split=2, head_order=o) for o in ("natural", "original"))
    shift = torch.cat([torch.arange(8, 12), torch.arange(0, 8)])
    with torch.no_grad():
        for part in ("weight", "bias"):
            values = original.qkv.get_parameter(part)[24:]
            values.copy_(values[shift])
        original.proj.weight.copy_(original.proj.weight[:, shift])
    x = rows(0, 2, 5, 12)
    torch.testing.assert_close(original(x), natural(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_finite_where_queries_meet_keys(kind, kernel) -> None:
    layer = small(distance=kind, kernel=kernel)
    with torch.no_grad():
        layer.qkv.weight[:12], layer.qkv.bias[:12] = layer.qkv.weight[12:24], layer.qkv.bias[12:24]
    x = rows(0, 1, 5, 12)
    x[:, 1] = x[:, 0]
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_the_pull_on_a_query_is_bounded() -> None:
    """|d logit / d q| <= lambda / S, reached at distance 1."""
    q, k = torch.zeros(9, 1, 1, 3, dtype=F64).requires_grad_(), torch.zeros(9, 1, 1, 3, dtype=F64)
    k[:, 0, 0, 0] = torch.linspace(0, 4, 9, dtype=F64)
    gravity_logits(q, k, 0.0, lamb=3.0, divisor=2.0).sum().backward()
    pull = q.grad.norm(dim=-1).flatten()
    assert pull.max().item() == pytest.approx(1.5) and pull.argmax() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_keeps_distances_in_float32(dtype, kernel) -> None:
    torch.manual_seed(0)
    layer, x = GravityAttention(48, 4, 9, AttentionSettings(scale="none", kernel=kernel)), rows(0, 2, 9, 48).float()
    exact = layer.double().weights(x.double())
    layer.float()
    with torch.autocast("cpu", dtype=dtype):
        q, k, _ = layer._project(x)
        logits = layer._gravity_logits(q, k)
        assert logits.dtype == torch.float32 and layer.weights(x).dtype == torch.float32
        out = layer(x)
        assert out.dtype == dtype
        weights = layer._gravity_weights(q, k)
    # what is lost is the rounding of q and k themselves
    torch.testing.assert_close(logits, gravity_logits(q.float(), k.float(), layer._mass(k), lamb=1.0, divisor=1.0))
    torch.testing.assert_close(weights.double(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_weights_and_grads(kernel) -> None:
    """A layer converted to bfloat16 as a whole runs too; its results are near those in float32."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = GravityAttention(
            24, 4, 9, AttentionSettings(mix="split", num_split=2, split_mix=True, kernel=kernel)
        ).to(dtype)
        out = layer(rows(0, 2, 9, 24).to(dtype))
        (out.float() * rows(1, 2, 9, 24).float()).sum().backward()
        results[dtype] = [out.float(), *(p.grad.float() for p in layer.parameters())]
    for full, half in zip(*results.values(), strict=True):
        assert (full - half).abs().max() < 0.05 * full.abs().max() + 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", ["off", "split1"])
def test_a_hundred_steps_under_autocast_stay_finite(dtype, mix) -> None:
    torch.manual_seed(0)
    layer = GravityAttention(16, 4, 5, AttentionSettings(lamb=3.0, num_split=2, **MIXES[mix]))
    head, x, y = nn.Linear(16, 3), torch.randn(32, 5, 16), torch.randint(3, (32,))
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(100):
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.cross_entropy(head(layer(x).mean(1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.5 * losses[0]


def test_dropout_only_while_training() -> None:
    torch.manual_seed(0)
    layer, x = GravityAttention(12, 3, 5, dropout=0.5), rows(0, 2, 5, 12).float()
    assert (layer(x) == 0).float().mean() == pytest.approx(0.5, abs=0.2)
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and (layer(x) != 0).all()


def test_masses_are_drawn_beside_the_global_generator() -> None:
    """A layer with masses has the same maps as one without, and the next layer too."""
    built = []
    for settings in (PLAIN, AttentionSettings()):
        torch.manual_seed(3)
        built.append((GravityAttention(12, 3, 5, settings), GravityAttention(12, 3, 5, settings)))
    for plain, gravity in zip(*built, strict=True):
        assert torch.equal(plain.qkv.weight, gravity.qkv.weight) and torch.equal(plain.proj.bias, gravity.proj.bias)
    first, second = (layer.mass.key for layer in built[1])
    assert not torch.equal(first, second) and (first >= 0).all() and (first < 1).all()
    assert not PositionMass(5, init="zeros").key.any()


def test_content_masses_follow_the_keys() -> None:
    layer, x = small(mass="content"), rows(0, 2, 5, 12)
    distance_only = small(mass="none")(x)
    torch.testing.assert_close(layer(x), distance_only)
    layer(x).square().sum().backward()
    assert layer.mass.weight.grad.abs().min() > 0
    with torch.no_grad():
        layer.mass.weight.add_(1)
    assert (layer(x) - distance_only).abs().max() > 1e-4
    assert small(mass="content", mass_param="softplus").mass.bias is not None and layer.mass.bias is None


def test_learned_lambda_starts_at_its_value_and_moves() -> None:
    layer, x = small(lamb=2.5, learn_lamb=True, mix="split", num_split=2), rows(0, 2, 5, 12)
    torch.testing.assert_close(layer.lamb, torch.full((2, 1, 1), 2.5, dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer(x), small(lamb=2.5, mix="split", num_split=2)(x), rtol=1e-6, atol=1e-8)
    layer(x).square().sum().backward()
    assert layer.raw_lamb.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l3"}, "unknown distance 'l3'"),
        ({"mix": "on"}, "unknown mix"),
        ({"lamb": -1.0}, "found lambda -1.0"),
        ({"lamb": math.nan}, "found lambda nan"),
        ({"lamb": 0.0, "learn_lamb": True}, "> 0 if it is learned"),
        ({"lamb_mix": 1.5}, "found lamb_mix 1.5"),
        ({"mix": "split", "num_split": 4}, "found num_split 4 and 3 heads"),
        ({"mass": "content", "query_mass": True}, "no query side"),
    ],
)
def test_settings_that_make_no_sense(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        GravityAttention(12, 3, 5, AttentionSettings(**options))


def test_wrong_shapes_and_masks() -> None:
    with pytest.raises(ValueError, match="heads divide"):
        GravityAttention(12, 5, 5)
    layer = small()
    with pytest.raises(ValueError, match="found 6 tokens, wanted 5"):
        layer(rows(0, 1, 6, 12))
    with pytest.raises(ValueError, match="no masks"):
        layer(rows(0, 1, 5, 12), attn_mask=torch.zeros(5, 5))
    small(mass="none")(rows(0, 1, 6, 12))


def test_layers_by_mass_pos() -> None:
    found = {name: [*gravity_layers(name, 4)] for name in ("full", "full_fix", "head", "tail")}
    assert found == {"full": [0, 1, 2, 3], "full_fix": [0, 1, 2, 3], "head": [0], "tail": [3]}
    with pytest.raises(ValueError, match="unknown mass_pos"):
        gravity_layers("middle", 4)


def tiny_timm() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, img_size=32, depth=3).eval()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_timm_model_keeps_its_output_without_gravity_heads(kernel) -> None:
    model, images = tiny_timm(), rows(0, 2, 3, 32, 32).float()
    before, random_numbers = model(images), torch.get_rng_state()
    names = {*model.state_dict()}
    assert replace_attention(model, AttentionSettings(mix="split", num_split=0, kernel=kernel)) is model
    assert len([*gravity_attentions(model)]) == 3
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert {*model.state_dict()} == names
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("mass_pos", "layers", "tables"), [("full", 3, 3), ("full_fix", 3, 1), ("head", 1, 1), ("tail", 1, 1)]
)
def test_gravity_in_a_timm_model(mass_pos, layers, tables) -> None:
    model, images = tiny_timm(), rows(0, 2, 3, 32, 32).float()
    before = model(images)
    replace_attention(model, AttentionSettings(lamb=3.0), mass_pos=mass_pos)
    found = dict(gravity_attentions(model))
    assert len(found) == layers and len(mass_parameters(model)) == tables
    if layers == 1:
        assert [*found] == [f"blocks.{0 if mass_pos == 'head' else 2}.attn"]
    assert all(layer.num_tokens == 5 for layer in found.values())
    out = model(images)
    assert (out - before).abs().max() > 1e-4
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_attention_that_cannot_be_replaced() -> None:
    from timm.models.vision_transformer import Attention

    with pytest.raises(ValueError, match=r"no standard timm attention"):
        replace_attention(nn.Linear(2, 2), AttentionSettings())
    model = nn.Sequential(Attention(12, num_heads=3, dim_out=6))
    with pytest.raises(ValueError, match="changes the width"):
        replace_attention(model, AttentionSettings(), num_tokens=5)


def test_norms_of_a_timm_layer_are_carried_over() -> None:
    from timm.models.vision_transformer import Attention

    torch.manual_seed(0)
    model = nn.Sequential(
        Attention(12, num_heads=3, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm)
    )
    x = rows(0, 2, 5, 12).float()
    before = model(x)
    replace_attention(model, PLAIN, num_tokens=5)
    torch.testing.assert_close(model(x), before)


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    shared = PositionMass(5)
    settings = AttentionSettings(mix="split", num_split=2, learn_lamb=True)
    return nn.Sequential(*(GravityAttention(12, 3, 5, settings, mass=shared) for _ in range(2)))


def test_masses_and_lambdas_do_not_decay() -> None:
    model = two_layers()
    decaying, free = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert {id(p) for p in free["params"]} == {id(model[0].mass.key), id(model[0].raw_lamb), id(model[1].raw_lamb)}
    assert len(decaying["params"]) + len(free["params"]) == len([*model.parameters()])
    assert len(parameter_groups(nn.Linear(2, 2), 0.1)) == 1
    before = model[0].mass.key.clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model[0].mass.key, before)


def test_maps_for_reports() -> None:
    model, x = two_layers().train(), rows(0, 4, 5, 12).float()
    found = attention_weights(model, x)
    assert [*found] == ["0", "1"] and model.training and not found["0"].requires_grad
    torch.testing.assert_close(found["0"], model[0].weights(x))
    torch.testing.assert_close(found["1"], model[1].weights(model[0](x)))
    assert not model[0]._forward_pre_hooks
    assert {name: tuple(mass.shape) for name, mass in log_masses(model).items()} == {"0": (1, 5), "1": (1, 5)}


def test_summary_of_weights_by_loops() -> None:
    weights = rows(0, 3, 2, 4, 4).softmax(-1)
    weights[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = summarize_weights(weights)
    for head in range(2):
        terms = [[p * math.log(p) for p in row if p] for b in range(3) for row in weights[b, head].tolist()]
        assert found.entropy[head].item() == pytest.approx(-sum(map(sum, terms)) / 12)
        assert found.first_token[head].item() == pytest.approx(weights[:, head, :, 0].mean().item())
    torch.testing.assert_close(found.received.sum(-1), torch.ones(2, dtype=F64))
    even = summarize_weights(torch.full((1, 1, 4, 4), 0.25))
    assert even.entropy.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("mix", ["split1", "off"])
def test_the_layer_can_be_traced_for_compilation(mix) -> None:
    layer, x = small(num_split=2, learn_lamb=mix == "off", **MIXES[mix]), rows(0, 2, 5, 12)
    layer(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name])


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_the_layer_is_the_plain_formula(kind) -> None:
    """What the layer is timed against computes the same, forward and backward."""
    spec = importlib.util.spec_from_file_location(
        "reference_attention", Path(__file__).parent / "reference_attention.py"
    )
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    other = plain.PlainGravityAttention(12, 3, 5, 3.0, 2.0 if kind == "l2" else 1.0).double()
    layer, x = small(lamb=3.0, distance=kind), rows(0, 2, 5, 12)
    with torch.no_grad():
        for part in ("weight", "bias"):
            maps = (other.query, other.key, other.value)
            layer.qkv.get_parameter(part).copy_(torch.cat([each.get_parameter(part) for each in maps]))
            layer.proj.get_parameter(part).copy_(other.out.get_parameter(part))
        layer.mass.key.copy_(other.mass[None])
    ours, theirs = layer(x), other(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for out in (ours, theirs):
        out.square().sum().backward()
    torch.testing.assert_close(layer.mass.key.grad[0], other.mass.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(layer.qkv.weight.grad[:12], other.query.weight.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mix", MIXES)
def test_a_gpu_gives_the_same(mix) -> None:
    layer, x = small(lamb=3.0, num_split=2, **MIXES[mix]), rows(0, 2, 5, 12)
    wanted = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), wanted, rtol=1e-9, atol=1e-9)


# -- models of timm at other sizes, with dropped patches, traced, differentiated twice


def small_vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2, num_classes=5, **options
    )


@pytest.mark.parametrize("name", ["pit_ti_224", "mobilevit_xxs", "crossvit_9_240"])
def test_staged_models_have_masses_for_each_layer_s_tokens(name) -> None:
    model = timm.create_model(name, num_classes=3)
    size = model.pretrained_cfg["input_size"]
    replace_attention(model, AttentionSettings())
    layers = dict(gravity_attentions(model))
    seen: dict[str, int] = {}
    for key, layer in layers.items():
        layer.register_forward_pre_hook(lambda own, inputs, key=key: seen.__setitem__(key, inputs[0].shape[1]))
    assert model.eval()(torch.zeros(1, *size)).shape == (1, 3)
    assert seen == {key: layer.mass.key.shape[1] for key, layer in layers.items()} and len(set(seen.values())) > 1
    with pytest.raises(ValueError, match="which cannot share their masses"):
        replace_attention(timm.create_model(name), AttentionSettings(), mass_pos="full_fix")


def test_a_model_of_no_known_tokens_is_one_line() -> None:
    model = timm.create_model("mobilevit_xxs", num_classes=3)
    with pytest.raises(
        ValueError, match="cannot tell how many tokens the attention of ByobNet sees .*: give num_tokens"
    ):
        replace_attention(model, AttentionSettings(), input_size=(5, 64, 64))
    replace_attention(model, AttentionSettings(mass="content"))
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("how", ["dynamic_img_size", "set_input_size"])
def test_masses_follow_the_position_embedding_to_other_sizes(how) -> None:
    """Resampled by the same library function; at the model's own size nothing changes, also after a copy."""
    from timm.layers import resample_abs_pos_embed

    model = small_vit(**({how: True} if how == "dynamic_img_size" else {}))
    replace_attention(model, AttentionSettings(lamb=0.0, scale="none"))
    model = copy.deepcopy(model).eval()
    if how == "set_input_size":
        model.set_input_size((96, 32))
    found = attention_weights(model, torch.randn(2, 3, 96, 32))
    for name, layer in gravity_attentions(model):
        assert layer.mass.key.shape == (1, 17)
        masses = resample_abs_pos_embed(layer.mass.key[..., None], [6, 2], [4, 4], num_prefix_tokens=1)[0, :, 0]
        torch.testing.assert_close(found[name], masses.softmax(0).expand(2, 2, 13, 13))
    masses.sum().backward()
    if how == "dynamic_img_size":
        own = attention_weights(model, torch.randn(1, 3, 64, 64))
        torch.testing.assert_close(own[name], layer.mass.key[0].softmax(0).expand(1, 2, 17, 17))
    with pytest.raises(ValueError, match="found 13 tokens, wanted"):
        layer.grid.now = (4, 4)
        layer(torch.zeros(1, 13, 24))


def test_dropped_patches_take_their_masses_along() -> None:
    model = small_vit(patch_drop_rate=0.5)
    replace_attention(model, AttentionSettings(lamb=0.0, scale="none"))
    name, layer = next(iter(gravity_attentions(model)))
    seen = []
    layer.register_forward_pre_hook(lambda own, inputs: seen.append(own.weights(inputs[0])))
    model.train()(torch.randn(3, 3, 64, 64)).sum().backward()
    kept = layer.grid.kept
    assert kept.shape == (3, 8) and not torch.equal(kept[0], kept[1])
    for picture in range(3):
        masses = torch.stack(
            [layer.mass.key[0, 0], *(layer.mass.key[0, 1 + place] for place in kept[picture].tolist())]
        )
        torch.testing.assert_close(seen[0][picture], masses.softmax(0).expand(2, 9, 9))
    assert layer.mass.key.grad.abs().sum() > 0
    assert attention_weights(model, torch.randn(1, 3, 64, 64))[name].shape == (1, 2, 17, 17)  # none are dropped in eval


def test_masses_and_lambdas_do_not_decay_in_timm_s_groups() -> None:
    from timm.optim import param_groups_weight_decay

    model = replace_attention(small_vit(), AttentionSettings(learn_lamb=True), mass_pos="full_fix")
    names = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "blocks.0.attn.mass.key", "blocks.1.attn.raw_lamb"} <= names
    free = param_groups_weight_decay(model, 0.1, no_weight_decay_list=names)[0]
    assert free["weight_decay"] == 0
    assert all(any(own is one for one in free["params"]) for own in mass_parameters(model))
    assert pickle.loads(pickle.dumps(model)).no_weight_decay() == names


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mix": "normal"},
        {"mix": "split", "num_split": 1},
        {"mass": "content"},
        {"mass": "none"},
        {"distance": "l1"},
    ],
)
def test_torch_fx_traces_what_the_model_computes(settings) -> None:
    model = replace_attention(small_vit(), AttentionSettings(**settings)).eval()
    traced = torch.fx.symbolic_trace(model)
    with pytest.raises(ValueError, match="knows no masks"):
        traced(torch.zeros(2, 3, 64, 64), is_causal=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_second_derivatives_of_the_closed_form(alpha) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 3, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    column = torch.randn(1, 2, 1, 3, dtype=torch.float64, generator=generator).requires_grad_()
    beta = torch.tensor([[[0.7]], [[1.6]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *inputs: power_law_weights(*inputs, alpha), (q, k, column, beta))


def test_fused_dot_heads_have_no_second_derivative_and_transforms_take_the_definition() -> None:
    x = rows(3, 2, 3, 8).requires_grad_()
    layer, explicit = (
        GravityAttention(8, 2, 3, replace(PLAIN, kernel=kernel)).double() for kernel in ("auto", "explicit")
    )
    explicit.load_state_dict(layer.state_dict())
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="give the settings kernel='explicit'"):
        first.square().sum().backward()
    found, wanted = (
        torch.func.hessian(lambda z, own=own: own(z).square().sum())(x.detach()) for own in (layer, explicit)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "settings", [{"mix": "normal"}, {"mass": "content"}, {"mass": "content", "mix": "normal", "learn_lamb": True}]
)
def test_second_derivatives_where_masses_and_dot_terms_come_from_the_keys(settings) -> None:
    """Against the definition: their part of the gradient to the keys was counted twice."""
    layer, explicit = (
        GravityAttention(8, 2, 3, AttentionSettings(kernel=kernel, **settings)).double()
        for kernel in ("auto", "explicit")
    )
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 3, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    explicit.load_state_dict(layer.state_dict())
    found, wanted = (
        torch.autograd.functional.hvp(lambda z, own=own: own(z).square().sum(), x, v) for own in (layer, explicit)
    )
    torch.testing.assert_close(found, wanted)


def test_functional_transforms_work_or_name_what_does() -> None:
    layer, explicit = (GravityAttention(8, 2, 3, AttentionSettings(kernel=kernel)) for kernel in ("auto", "explicit"))
    explicit.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    found, wanted = (torch.func.grad(lambda v, own=own: own(v).square().sum())(x) for own in (layer, explicit))
    torch.testing.assert_close(found, wanted)
    found, wanted = (torch.func.jacrev(lambda v, own=own: own(v).sum(0))(x) for own in (layer, explicit))
    torch.testing.assert_close(found, wanted)
    wanted = torch.func.grad(lambda v: explicit(v).square().sum())(x)
    per_row = torch.func.vmap(torch.func.grad(lambda v: explicit(v[None]).square().sum()))(x)
    torch.testing.assert_close(per_row, wanted)
    with pytest.raises(ValueError, match="cannot be mapped over: give the settings kernel='explicit'"):
        torch.func.vmap(lambda v: layer(v[None]).sum())(x)
    with pytest.raises(ValueError, match="forward mode AD. Give the settings kernel='explicit'"):
        torch.func.jvp(lambda v: layer(v), (x,), (x,))


def test_no_gravity_heads_need_the_split_mix() -> None:
    for mix in ("off", "normal"):
        with pytest.raises(ValueError, match=f"num_split 0, no gravity heads, with mix '{mix}'.*give mix='split'"):
            AttentionSettings(mix=mix, num_split=0)


def flex_form(q, k, v, column, beta, alpha):
    """The power law as a change of FlexAttention's dot products, with norms and masses as captured buffers."""
    from torch.nn.attention.flex_attention import flex_attention

    query_norm, key_norm = q.square().sum(-1), k.square().sum(-1)
    twice = torch.tensor(
        2 * alpha, dtype=q.dtype, device=q.device
    )  # a second Python number would be a symbol, which FlexAttention refuses

    def score(dot, b, h, i, j):
        z = (1 + query_norm[b, h, i] + key_norm[b, h, j] - 2 * dot).clamp_min(1)
        return column[h, j] - beta[h] * z.log() + twice * dot

    attend = torch.compile(flex_attention) if q.device.type == "cuda" else flex_attention
    return attend(q, k, v, score_mod=score, scale=1.0)


@pytest.mark.parametrize("alpha", (0.0, 0.1))
def test_flex_attention_gives_the_same(alpha) -> None:
    """On the CPU it has no backward pass."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 33, 16, dtype=torch.float64).unbind()
    column, beta = torch.randn(3, 33).double(), torch.rand(3).double()
    wanted = power_law_weights(q, k, column[:, None], beta[:, None, None], alpha) @ v
    torch.testing.assert_close(flex_form(q, k, v, column, beta, alpha), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_attention_gives_the_kernels_gradients() -> None:
    from gfml.attention import power_law_attention

    torch.manual_seed(0)
    found = []
    for flex in (True, False):
        torch.manual_seed(0)
        shapes = (2, 3, 65, 32), (2, 3, 65, 32), (2, 3, 65, 32), (3, 65), (3,)
        inputs = [torch.rand(shape, device="cuda", requires_grad=True) for shape in shapes]
        q, k, v, column, beta = inputs
        out = flex_form(*inputs, 0.1) if flex else power_law_attention(
            q, k, v, column[:, None], beta[:, None, None], alpha=0.1)  # fmt: skip
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
