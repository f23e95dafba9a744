"""Pair distances without gathering: values and gradients against the plain form."""

from __future__ import annotations

import pytest
import torch

from mcl.pairs import pair_sq_distances

USERS = torch.tensor([2, 0, 5])
INDPTR = torch.tensor([0, 3, 3, 7])
NODES = torch.tensor([6, 6, 7, 9, 2, 5, 6])


def vectors(dtype=torch.float64, scale=1.0):
    return scale * torch.randn(10, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))


def plain(v):
    rows = torch.repeat_interleave(INDPTR.diff())
    return (v[USERS][rows] - v[NODES]).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradient_equal_the_gathered_form(close, dtype):
    ours, theirs = vectors(dtype).requires_grad_(), vectors(dtype).requires_grad_()
    weights = torch.linspace(-1, 2, len(NODES), dtype=dtype)
    found, wanted = pair_sq_distances(ours, USERS, INDPTR, NODES), plain(theirs)
    close(found, wanted.detach())
    (found * weights).sum().backward(), (wanted * weights).sum().backward()
    close(ours.grad, theirs.grad, grad=True)


def test_finite_differences():
    v = vectors().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pair_sq_distances(x, USERS, INDPTR, NODES)[:5], (v,))


def test_a_pair_of_one_node_is_never_negative():
    # Node 5 is compared with itself: the expanded form rounds around 0.
    found = pair_sq_distances(vectors(torch.float32, 100.0), USERS, INDPTR, NODES)
    assert (found >= 0).all() and found[5] < 1.0


def test_many_nodes_sort_by_wider_keys():
    v = torch.randn(40_000, 2, dtype=torch.float64, requires_grad=True)
    nodes = torch.tensor([39_999, 33_000, 1, 39_999])
    pair_sq_distances(v, torch.tensor([0]), torch.tensor([0, 4]), nodes).sum().backward()
    ours, v.grad = v.grad, None
    (v[0] - v[nodes]).square().sum().backward()
    torch.testing.assert_close(ours, v.grad)


@pytest.mark.parametrize("places", [29, 30, 31, 500])
def test_more_pairs_than_cells(close, places):
    """Small data with many negatives lists a user's item many times: 3 users x 10 nodes have 30 cells."""
    generator = torch.Generator().manual_seed(1)
    nodes = torch.randint(10, (places,), generator=generator)
    indptr = torch.tensor([0, places // 3, places // 2, places])
    ours, theirs = vectors().requires_grad_(), vectors().requires_grad_()
    found = pair_sq_distances(ours, USERS, indptr, nodes)
    wanted = (theirs[USERS][torch.repeat_interleave(indptr.diff())] - theirs[nodes]).square().sum(1)
    close(found, wanted.detach())
    weights = torch.linspace(-1, 2, places, dtype=torch.float64)
    (found * weights).sum().backward(), (wanted * weights).sum().backward()
    close(ours.grad, theirs.grad, grad=True)


def test_second_derivatives_are_refused() -> None:
    """Rather than wrong: what the backward pass needs of the first is not followed."""
    v = vectors().requires_grad_()
    with pytest.raises(RuntimeError, match="pair distances have no second derivative"):
        torch.autograd.grad(pair_sq_distances(v, USERS, INDPTR, NODES).sum(), v, create_graph=True)
