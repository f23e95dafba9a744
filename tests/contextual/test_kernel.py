"""The closed form by lists: equal to the reference for similarities of every kind, and what its machinery promises."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contextual import fused
from contextual.losses import ContextualHybridLoss, Weights, cosine_similarities, hybrid

ROOT = Path(__file__).resolve().parents[2]
HYBRID = Weights(0.4, 0.5, 0.1)
KINDS = ("any numbers", "few numbers", "directions", "duplicates", "one direction")


@pytest.fixture(autouse=True)
def _lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists however large the neighbourhoods."""
    monkeypatch.setattr(fused, "DENSE", 2.0)


def similarities(kind: str, size: int, seed: int) -> torch.Tensor:
    """[size, size]. any numbers: not symmetric, a diagonal like the rest, some above 1; few numbers: ties everywhere;
    duplicates: rounding brings some above 1."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("any numbers", "few numbers"):
        sim = 2.4 * torch.rand(size, size, generator=generator, dtype=torch.float64) - 1.2
        return sim if kind == "any numbers" else (2 * sim).round() / 2
    emb = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        emb = emb[torch.randint(max(2, size // 3), (size,), generator=generator)]
    if kind == "one direction":
        emb = emb[:1] + 1e-3 * emb
    return cosine_similarities(emb)


def both(sim: torch.Tensor, labels: torch.Tensor, weights: Weights, **settings):
    """(terms, gradient by sim) of the lists and of the reference."""
    found = []
    for backend in ("fused", "reference"):
        own = sim.clone(memory_format=torch.preserve_format).requires_grad_()
        terms = hybrid(own, labels, weights, backend=backend, **settings)
        found.append((terms, torch.autograd.grad(terms.loss, own)[0]))
    return found


def agree(sim: torch.Tensor, labels: torch.Tensor, weights: Weights = HYBRID, **settings) -> None:
    """But for the gradient at S = 1 sharp, the corner of max(2 - 2 S, 0): there it passes by definition, while torch
    has had different slopes for it."""
    (terms, grad), (wanted, wanted_grad) = both(sim, labels, weights, **settings)
    for one, other in zip(terms, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert grad.isfinite().all()
    smooth = sim != 1
    torch.testing.assert_close(grad[smooth], wanted_grad[smooth], rtol=0, atol=1e-12)


@given(
    kind=st.sampled_from(KINDS), size=st.integers(7, 33), k=st.sampled_from([2, 3, 4, 5, 7]),
    classes=st.integers(1, 9), seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 0.05, 0.5]),
    weights=st.sampled_from([HYBRID, Weights(1, 0, 0), Weights(0.5, 0.5, 0), Weights(0.9, 0, 0.1)]),
)  # fmt: skip
def test_equal_to_the_reference(kind: str, size: int, k: int, classes: int, seed: int, eps: float, weights) -> None:
    """Everywhere, the diagonal and similarities above 1 included."""
    sim = similarities(kind, size, seed)
    labels = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed + 1))
    agree(sim, labels, weights, k=k, eps=eps, slope=3.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_neighbourhoods_of_everything(kind: str, size: int) -> None:
    agree(similarities(kind, size, 0), torch.arange(size) // 2, k=size)


def test_rounding_brings_similarities_above_one() -> None:
    """There D is cut off at 0 and has no gradient."""
    sim = similarities("duplicates", 24, 3)
    above = sim > 1
    assert above.sum() > above.diagonal().sum() > 0
    _, grad = both(sim, torch.arange(24) // 4, Weights(1, 0, 0))[0]
    assert not grad[above].any()
    assert grad.any()


@pytest.mark.parametrize("size", [40, 200])
def test_single_precision_is_close_to_double(size: int) -> None:
    sim, labels = similarities("directions", size, 0), torch.arange(size) // 4
    (wanted, wanted_grad), _ = both(sim, labels, HYBRID)
    (terms, grad), _ = both(sim.float(), labels, HYBRID)
    assert grad.dtype == terms.size.dtype == torch.float32
    for one, other in zip(terms, wanted, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-6, atol=1e-7)
    grad.fill_diagonal_(0), wanted_grad.fill_diagonal_(0)  # whether rounding brings it above 1 differs
    torch.testing.assert_close(grad, wanted_grad.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twice_the_same(dtype) -> None:
    sim, labels = similarities("directions", 60, 1).to(dtype), torch.arange(60) // 4
    (first, grad), (second, other) = (both(sim, labels, HYBRID)[0] for _ in range(2))
    assert first.loss == second.loss
    assert torch.equal(grad, other)


def test_similarities_and_labels_in_any_layout() -> None:
    sim, labels = similarities("any numbers", 20, 2), torch.arange(20) // 4
    wanted = both(sim, labels, HYBRID)[0]
    wide, apart = torch.zeros(20, 40, dtype=sim.dtype), torch.stack([labels, labels + 1], 1)
    wide[:, ::2] = sim
    for other in (sim.T.contiguous().T, wide[:, ::2]):
        own = other.detach().requires_grad_()
        assert not own.is_contiguous()
        terms = hybrid(own, apart[:, 0], HYBRID)
        assert terms.loss == wanted[0].loss
        assert torch.equal(torch.autograd.grad(terms.loss, own)[0], wanted[1])


@pytest.mark.parametrize(
    "name", [lambda y: y.int(), lambda y: y.to(torch.uint8), lambda y: -y, lambda y: y + 2**62, lambda y: y / 7 - 0.5]
)
def test_labels_of_any_kind(name) -> None:
    sim, labels = similarities("directions", 24, 4), torch.arange(24) % 5
    wanted, found = (both(sim, own, HYBRID)[0] for own in (labels, name(labels)))
    assert found[0].loss == wanted[0].loss
    assert torch.equal(found[1], wanted[1])
    agree(sim, labels > 2)


def test_no_matrix_is_made_before_the_gradient_is_wanted_and_then_one() -> None:
    """By torch's count of bytes."""
    peak_memory = runpy.run_path(str(ROOT / "benchmarks" / "costs.py"))["peak_memory"]
    emb = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    sim, labels = cosine_similarities(emb).requires_grad_(), torch.arange(256) // 4
    matrix = 4 * 256**2
    assert peak_memory(lambda: hybrid(sim, labels, HYBRID).loss) < 0.5 * matrix
    with torch.no_grad():
        assert peak_memory(lambda: hybrid(sim, labels, HYBRID)) < 0.5 * matrix
    peak = peak_memory(lambda: torch.autograd.grad(hybrid(sim, labels, HYBRID).loss, sim))
    assert matrix <= peak < 1.5 * matrix


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("weights", [HYBRID, Weights(1, 0, 0)])
@pytest.mark.parametrize("dense", [0.0, 2.0])
@pytest.mark.parametrize("part", [slice(None), 3])
def test_what_is_no_number_reaches_the_loss(monkeypatch, backend: str, weights: Weights, dense: float, part) -> None:
    monkeypatch.setattr(fused, "DENSE", dense)
    sim = similarities("directions", 12, 6)
    sim[part] = sim[:, part] = torch.nan
    assert hybrid(sim, torch.arange(12) // 4, weights, backend=backend).loss.isnan()


def test_similarities_must_stay_until_the_gradient_is_made() -> None:
    sim = similarities("directions", 12, 7).requires_grad_()
    rows = 1 * sim
    loss = hybrid(rows, torch.arange(12) // 4, HYBRID).loss
    rows.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_few_neighbours_take_lists_and_many_take_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DENSE", 0.2)
    made = []
    original = fused.Listed.__init__
    monkeypatch.setattr(fused.Listed, "__init__", lambda self, *a: made.append(a) or original(self, *a))
    labels = torch.arange(64) // 4
    for kind, k, number in (("directions", 4, 1), ("one direction", 4, 0), ("directions", 32, 0)):
        made.clear()
        emb = similarities(kind, 64, 8)[:, :40]
        ContextualHybridLoss(k=k)(emb, labels)
        assert len(made) == number, (kind, k)


def test_numba_is_imported_by_the_kernel_alone_and_the_kernel_late() -> None:
    for path in (ROOT / "contextual").glob("*.py"):
        top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in top for alias in node.names}
        assert ("gfml.base.compiled.compiled" in names) == (path.name == "kernel.py"), path
        assert "contextual.kernel" not in names, path
