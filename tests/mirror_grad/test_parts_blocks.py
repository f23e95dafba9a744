"""Sums in blocks of rows against the same sums at once: value, gradients of both orders, what stands in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mirror_grad.parts import blocks
from mirror_grad.parts.blocks import batch_cross_entropy, log_sum_exps, sum_in_blocks


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def three_rows_a_block(monkeypatch):
    """Blocks of three rows for a matrix of five columns, the last one shorter."""
    monkeypatch.setitem(blocks.NUMBERS_PER_BLOCK, "cpu", 15)


def test_weighted_log_sum_exps_are_those_of_the_whole_matrix(three_rows_a_block):
    first, second = rows(8, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    weight, count = torch.arange(8.0, dtype=torch.float64), torch.tensor([1.0, 2, 1, 3, 1], dtype=torch.float64)
    ours = log_sum_exps(first, second, 3.0, weight=weight, count=count)
    plain = (weight * (count * (3.0 * first @ second.T).exp()).sum(1).log()).sum()
    torch.testing.assert_close(ours, plain)
    for found, wanted in zip(
        torch.autograd.grad(2 * ours, (first, second)), torch.autograd.grad(2 * plain, (first, second))
    ):
        torch.testing.assert_close(found, wanted)


def test_repeated_rows_count_as_often_as_they_occur(three_rows_a_block):
    first, second = rows(4, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    place, other = torch.tensor([0, 3, 3, 1, 0, 2]), torch.tensor([4, 4, 0, 1, 2, 4])
    ours = batch_cross_entropy(first, second, place, other, 2.0)
    plain = F.cross_entropy(2.0 * first[place] @ second[other].T, torch.arange(6))
    torch.testing.assert_close(ours, plain)
    for found, wanted in zip(torch.autograd.grad(ours, (first, second)), torch.autograd.grad(plain, (first, second))):
        torch.testing.assert_close(found, wanted)


def test_gradients_of_both_orders(three_rows_a_block):
    inputs = rows(7, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: log_sum_exps(a, b, 2.0), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: log_sum_exps(a, b, 2.0), inputs)


def test_second_derivatives_where_one_side_is_made_of_the_other(three_rows_a_block):
    """As users and items of one graph are: the shared part was counted twice."""
    x, v = rows(8, 3), rows(8, 3, seed=1)
    found, wanted = (
        torch.autograd.functional.hvp(loss, x, v)[1]
        for loss in (lambda z: log_sum_exps(z, 2 * z), lambda z: (2 * z @ z.T).logsumexp(1).sum())
    )
    torch.testing.assert_close(found, wanted)


def test_only_inputs_that_want_a_gradient_have_one(three_rows_a_block):
    first, second = rows(7, 3), rows(5, 3, seed=1).requires_grad_()
    (found,) = torch.autograd.grad(log_sum_exps(first, second), second)
    assert found.shape == second.shape
    with torch.no_grad():
        assert not log_sum_exps(first, second).requires_grad


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
    value = log_sum_exps(first, second)
    assert value.isfinite() and torch.autograd.grad(value, first)[0].isfinite().all()
