"""Properties of the mixed-centric loss, its mining, the gravity terms and the regulariser."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.gravity import Gravity
from mcl import losses

OPTIONS = {"alpha": 1.25, "beta": 5.0, "offset_pos": 6.5, "offset_neg": -0.5, "batch_size": 4}
DTYPES = (torch.float64, torch.float32)


def ragged(counts, width, seed=0, scale=4.0):
    """Random distances of users with ``counts`` positives each, and the segments."""
    generator = torch.Generator().manual_seed(seed)
    edges = sum(counts)
    sq_pos = scale * torch.rand(edges, generator=generator, dtype=torch.float64)
    sq_neg = scale * torch.rand(edges, width, generator=generator, dtype=torch.float64)
    return sq_pos, sq_neg, torch.repeat_interleave(torch.tensor(counts))


def total(sq_pos, sq_neg, segment, margin=1.0, num_users=None, **options):
    kept = losses.mine(sq_pos, sq_neg, segment, num_users or int(segment.max()) + 1, margin)
    return sum(losses.mixed_centric(sq_pos, sq_neg, kept, **{**OPTIONS, **options}))


def naive(sq_pos, sq_neg, segment, margin=1.0, alpha=1.25, beta=5.0, offset_pos=6.5, offset_neg=-0.5, batch_size=4):
    """The definition with plain loops over users and pairs."""
    pos = neg = 0.0
    for user in segment.unique().tolist():
        own_pos = sq_pos[segment == user].tolist()
        own_neg = sq_neg[segment == user].flatten().tolist()
        pos += sum(math.exp(alpha * (e + offset_pos)) for e in own_pos if e > min(own_neg) - margin)
        neg += sum(math.exp(-beta * (e + offset_neg)) for e in own_neg if e < max(own_pos) + margin)
    return math.log(1 + pos / batch_size) / alpha + math.log(1 + neg / batch_size) / beta


@pytest.fixture
def worked():
    """Two users with hand-computed results."""
    sq_pos = torch.tensor([0.5, 1.2, 3.0, 0.2], dtype=torch.float64)
    sq_neg = torch.tensor([[2.6, 4.5], [5.0, 1.9], [3.5, 4.1], [0.9, 2.0]], dtype=torch.float64)
    return sq_pos, sq_neg, torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_worked_example(worked, close, dtype):
    sq_pos, sq_neg, segment = worked
    kept = losses.mine(sq_pos, sq_neg, segment, 2, 1.0)
    assert kept.pos.tolist() == [False, True, True, True]
    assert sq_neg[kept.neg].tolist() == [2.6, 1.9, 3.5, 0.9]
    found = losses.mixed_centric(sq_pos.to(dtype), sq_neg.to(dtype), kept, **{**OPTIONS, "batch_size": 2})
    assert found.pos.item() == pytest.approx(9.0472186, abs=1e-6)
    assert found.neg.item() == pytest.approx(0.0131833, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 10**6), st.floats(-3, 3))
def test_mining_and_loss_equal_the_loops(counts, width, seed, margin):
    sq_pos, sq_neg, segment = ragged(counts, width, seed)
    assert total(sq_pos, sq_neg, segment, margin).item() == pytest.approx(
        naive(sq_pos, sq_neg, segment, margin), rel=1e-9
    )


@pytest.mark.parametrize("largest", [65.0, 90.0, 1e3, 1e4])
def test_float32_stays_finite_where_the_plain_form_is_infinite(largest):
    sq_pos = torch.tensor([0.1, largest], requires_grad=True)
    sq_neg = torch.tensor([[0.3], [largest]], requires_grad=True)
    segment = torch.tensor([0, 0])
    assert torch.exp(1.25 * (sq_pos + 6.5)).sum().isinf()
    kept = losses.mine(sq_pos, sq_neg, segment, 1, 1.0)
    found = losses.mixed_centric(sq_pos, sq_neg, kept, **OPTIONS)
    (found.pos + found.neg).backward()
    assert found.pos.item() == pytest.approx(largest + 6.5 - math.log(4) / 1.25, rel=1e-6)
    assert found.neg.item() == pytest.approx(math.log(1 + math.exp(1) / 4) / 5, rel=1e-5)
    assert sq_pos.grad.isfinite().all() and sq_neg.grad.isfinite().all()


def test_gradients_of_the_pairs():
    sq_pos, sq_neg, segment = ragged([3, 1, 2], 4)
    sq_pos.requires_grad_(), sq_neg.requires_grad_()
    kept = losses.mine(sq_pos, sq_neg, segment, 3, -1.5)
    assert 0 < kept.pos.sum() < 6 and 0 < kept.neg.sum() < 24
    sum(losses.mixed_centric(sq_pos, sq_neg, kept, **OPTIONS)).backward()
    pos, neg = torch.exp(1.25 * (sq_pos + 6.5)) * kept.pos, torch.exp(-5 * (sq_neg - 0.5)) * kept.neg
    torch.testing.assert_close(sq_pos.grad, pos / (4 + pos.sum()))
    torch.testing.assert_close(sq_neg.grad, -neg / (4 + neg.sum()))
    assert 0 < sq_pos.grad.sum() < 1 and -1 < sq_neg.grad.sum() < 0
    assert (sq_pos.grad[~kept.pos] == 0).all() and (sq_neg.grad[~kept.neg] == 0).all()


def test_finite_differences():
    sq_pos, sq_neg, segment = ragged([2, 3], 3, seed=2)
    sq_pos.requires_grad_(), sq_neg.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: total(a, b, segment), (sq_pos, sq_neg))


def test_thresholds_carry_no_gradient():
    # The farthest positive sets the negatives' threshold, and yet the negatives' half does not depend on it.
    sq_pos = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    sq_neg = torch.tensor([[2.0], [9.0]], dtype=torch.float64)
    kept = losses.mine(sq_pos, sq_neg, torch.tensor([0, 0]), 1, 0.5)
    found = losses.mixed_centric(sq_pos, sq_neg, kept, **OPTIONS)
    assert kept.neg.any() and not found.neg.requires_grad


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_margin_keeps_more(seed):
    sq_pos, sq_neg, segment = ragged([4, 1, 3], 3, seed)
    before = losses.mine(sq_pos, sq_neg, segment, 3, -math.inf)
    assert not before.pos.any() and not before.neg.any()
    for margin in (-1.0, 0.0, 0.5, 2.0, math.inf):
        kept = losses.mine(sq_pos, sq_neg, segment, 3, margin)
        assert (kept.pos >= before.pos).all() and (kept.neg >= before.neg).all()
        before = kept
    assert before.pos.all() and before.neg.all()
    assert total(sq_pos, sq_neg, segment, -math.inf) == 0


def test_equal_distances_are_dropped():
    kept = losses.mine(torch.tensor([1.0]), torch.tensor([[2.0]]), torch.tensor([0]), 1, 1.0)
    assert not kept.pos.any() and not kept.neg.any()
    kept = losses.mine(torch.tensor([1.0]), torch.tensor([[2.0]]), torch.tensor([0]), 1, 1.001)
    assert kept.pos.all() and kept.neg.all()


def test_orders_do_not_matter():
    counts, width = [3, 1, 2], 4
    sq_pos, sq_neg, segment = ragged(counts, width)
    wanted = total(sq_pos, sq_neg, segment)
    generator = torch.Generator().manual_seed(1)
    edges = torch.randperm(6, generator=generator)
    torch.testing.assert_close(total(sq_pos[edges], sq_neg[edges], segment[edges]), wanted)
    torch.testing.assert_close(total(sq_pos, sq_neg, 2 - segment), wanted)
    torch.testing.assert_close(total(sq_pos, sq_neg[:, torch.randperm(width, generator=generator)], segment), wanted)


def test_negatives_belong_to_the_user_in_the_loss_and_to_the_edge_in_the_gravity_terms():
    sq_pos, sq_neg, segment = ragged([3, 2], 2)
    moved = sq_neg.clone()
    moved[0, 1], moved[1, 1] = sq_neg[1, 1], sq_neg[0, 1]
    torch.testing.assert_close(total(sq_pos, moved, segment), total(sq_pos, sq_neg, segment))
    assert not torch.equal(moved.amin(1), sq_neg.amin(1))


def test_a_repeated_user_adds_its_terms_again():
    sq_pos, sq_neg, segment = ragged([2, 1], 2)
    twice = total(torch.cat([sq_pos, sq_pos[:2]]), torch.cat([sq_neg, sq_neg[:2]]), torch.tensor([0, 0, 1, 2, 2]))
    kept = losses.mine(sq_pos, sq_neg, segment, 2, 1.0)
    times = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    pos = (times * kept.pos * torch.exp(1.25 * (sq_pos + 6.5))).sum()
    neg = (times[:, None] * kept.neg * torch.exp(-5 * (sq_neg - 0.5))).sum()
    torch.testing.assert_close(twice, torch.log1p(pos / 4) / 1.25 + torch.log1p(neg / 4) / 5)


def test_the_gravity_example(close):
    gravity = Gravity(2, 4, mass_param="relu", lamb=2.0, eps=1.0, emb_norm=False).double()
    with torch.no_grad():
        gravity.mass.user.copy_(torch.tensor([0.5, -0.3]))
        gravity.mass.item.copy_(torch.tensor([1.0, 0.2, 0.4, -1.0]))
    users, E = torch.tensor([0, 1]), lambda *values: torch.tensor(values, dtype=torch.float64)
    pos = gravity.from_sq_distance(E(0.5, 2.0), gravity.mass(users, torch.tensor([0, 1])))
    hard = gravity.from_sq_distance(E(1.0, 3.0), gravity.mass(users, torch.tensor([2, 3])))
    torch.testing.assert_close(-pos, E(-0.287682, 2.014903), atol=1e-6, rtol=0)
    torch.testing.assert_close(hard, E(-0.644357, -2.772589), atol=1e-6, rtol=0)
    pull, push = losses.pull_push(pos, hard, weight_pos=1.5, weight_neg=1.0)
    assert (pull + push).item() == pytest.approx(-0.413057, abs=1e-6)
    alone, nothing = losses.pull_push(pos, hard, weight_pos=1.5, pull_only=True)
    assert alone.item() == pytest.approx(0.863610, abs=1e-6) and nothing == 0


def test_hardest_is_the_first_of_the_nearest():
    assert losses.hardest(torch.tensor([[3.0, 1.0, 1.0], [0.5, 2.0, 0.5]])).tolist() == [1, 0]


def test_the_regulariser_counts_every_occurrence():
    nodes = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    users, pos, neg = torch.tensor([0, 0, 1]), torch.tensor([3, 4, 3]), torch.tensor([[5, 5], [6, 4], [3, 5]])
    square = nodes.square().sum(1)
    wanted = 0.5 * (square[users].sum() + square[pos].sum()) / 3 + 0.5 * square[neg].sum() / 6
    found = losses.ego_reg(nodes, users, pos, neg)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, nodes), torch.autograd.grad(wanted, nodes))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[E\], \[E, W\]"):
        losses.mine(torch.ones(3), torch.ones(2, 4), torch.zeros(3, dtype=torch.int64), 1, 1.0)
