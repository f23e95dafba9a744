"""LayerGCN's refinement: compiled loops, tensor operations and the library's cosine give the same."""

import pytest
import torch
import torch.nn.functional as F

from mirror_grad.parts import refine
from mirror_grad.parts.refine import refined


def inputs(dtype=torch.float64, rows=9):
    generator = torch.Generator().manual_seed(0)
    layer, free, grad = (torch.randn(rows, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    layer[0] = 0.0
    return [x.to(dtype).requires_grad_() for x in (layer, free)], grad.to(dtype)


def by_library(layer, free):
    return F.cosine_similarity(layer, free, dim=1)[:, None] * layer


def value_and_gradients(kind, dtype=torch.float64, rows=9):
    given, grad = inputs(dtype, rows)
    value = kind(*given)
    return [value, *torch.autograd.grad(value, given, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["compiled", "tensors"])
def test_is_the_library_cosine(how, dtype, monkeypatch):
    """A row of zeros gives zeros."""
    if how == "tensors":
        monkeypatch.setattr(refine, "_by_rows", lambda *tables: False)
    found = value_and_gradients(refined, dtype)
    torch.testing.assert_close(found, value_and_gradients(by_library, dtype))
    assert not found[0][0].any() and not found[1][0].any()


def test_half_precision_takes_tensors():
    found = value_and_gradients(refined, torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in found)
    torch.testing.assert_close([x.double() for x in found], value_and_gradients(by_library), rtol=0.05, atol=0.05)


def test_second_derivatives():
    (layer, free), _ = inputs()
    assert torch.autograd.gradgradcheck(
        refined, (layer.detach()[1:].requires_grad_(), free.detach()[1:].requires_grad_())
    )


def test_inputs_that_are_no_blocks_of_memory():
    (layer, free), _ = inputs()
    wide = torch.cat([layer, free], 1).detach()
    torch.testing.assert_close(refined(wide[:, :5], wide[:, 5:]), by_library(layer, free))
    # The gradient of a sum is one number that is read everywhere.
    torch.testing.assert_close(
        torch.autograd.grad(refined(layer, free).sum(), (layer, free)),
        torch.autograd.grad(by_library(layer, free).sum(), (layer, free)),
    )


def test_same_bits_for_any_number_of_threads():
    rows, before = 4 * refine.ROWS_PER_THREAD + 3, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = value_and_gradients(refined, torch.float32, rows)
        torch.set_num_threads(3)
        three = value_and_gradients(refined, torch.float32, rows)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
