"""Sums in blocks of rows against the same sums at once: value, gradients of both orders, what stands in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mirror_grad.parts import blocks
from mirror_grad.parts.blocks import row_cross_entropy, sum_in_blocks


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def three_rows_a_block(monkeypatch):
    """Blocks of three rows for a matrix of five columns, the last one shorter."""
    monkeypatch.setitem(blocks.NUMBERS_PER_BLOCK, "cpu", 15)


def test_cross_entropy_is_that_of_the_whole_matrix(three_rows_a_block):
    first, second, targets = rows(8, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_(), torch.tensor([0, 4, 4, 1, 2, 3, 0, 1])
    ours = row_cross_entropy(first, second, targets, 3.0)
    plain = F.cross_entropy(3.0 * first @ second.T, targets, reduction="sum")
    torch.testing.assert_close(ours, plain)
    for found, wanted in zip(torch.autograd.grad(2 * ours, (first, second)), torch.autograd.grad(2 * plain, (first, second))):
        torch.testing.assert_close(found, wanted)


def test_gradients_of_both_orders(three_rows_a_block):
    inputs = rows(7, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    targets = torch.arange(7) % 5
    assert torch.autograd.gradcheck(lambda a, b: row_cross_entropy(a, b, targets, 2.0), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: row_cross_entropy(a, b, targets, 2.0), inputs)


def test_only_inputs_that_want_a_gradient_have_one(three_rows_a_block):
    first, second = rows(7, 3), rows(5, 3, seed=1).requires_grad_()
    (found,) = torch.autograd.grad(row_cross_entropy(first, second, torch.arange(7) % 5), second)
    assert found.shape == second.shape
    with torch.no_grad():
        assert not row_cross_entropy(first, second, torch.arange(7) % 5).requires_grad


def test_one_block_at_a_time(three_rows_a_block):
    seen = []

    def term(block, number, shared):
        seen.append(len(block))
        assert not number.requires_grad
        return (number[:, None] * (block @ shared.T).square()).sum()

    x, number, y = rows(8, 3).requires_grad_(), torch.arange(8), rows(5, 3, seed=1).requires_grad_()
    total = sum_in_blocks(term, (x, number), (y,), 5)
    assert seen == [3, 3, 2]
    wanted = (number[:, None] * (x @ y.T).square()).sum()
    torch.testing.assert_close(total, wanted)
    for found, known in zip(torch.autograd.grad(total, (x, y)), torch.autograd.grad(wanted, (x, y))):
        torch.testing.assert_close(found, known)


def test_logits_beyond_the_largest_number_are_finite():
    first, second = rows(4, 3).requires_grad_(), 1e200 * rows(5, 3, seed=1)
    value = row_cross_entropy(first, second, torch.arange(4))
    assert value.isfinite() and torch.autograd.grad(value, first)[0].isfinite().all()
