"""Squared distances of listed pairs, without gathering a vector per pair.

A batch of 1 000 users has some 80 000 pairs over a few thousand rows. Gathering D numbers for each pair costs more
than everything else in a training step, forward and again backward. With |x - y|^2 = |x|^2 + |y|^2 - 2 x.y the pairs
become a sparse pattern [n users, N nodes]: dot products at its places forward, two sparse products backward.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from gfml.ranking.graph import csr_times_dense


def pair_sq_distances(vectors: Tensor, users: Tensor, indptr: Tensor, nodes: Tensor) -> Tensor:
    """|v[users[r]] - v[nodes[t]]|^2 for the places t of each row r: indptr[r] <= t < indptr[r + 1].

    Shape: vectors [N, D]; users int64 [n]; indptr int64 [n + 1]; nodes int64 [P], repeats allowed -> [P], never
    negative. Gradient flows to ``vectors``, once. Rounding is that of the expanded form: about 1e-7 |v|^2 in float32.
    """
    return _PairDistances.apply(vectors, users, indptr, nodes)


class _PairDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, users: Tensor, indptr: Tensor, nodes: Tensor) -> Tensor:
        rows = torch.repeat_interleave(indptr.diff(), output_size=len(nodes))
        queries, norm = vectors.index_select(0, users), vectors.square().sum(1)
        ctx.save_for_backward(vectors, queries)
        ctx.pattern = (users, indptr, nodes, rows)
        dots = _dots(queries, vectors, indptr, nodes, rows)
        own = norm.index_select(0, users).index_select(0, rows)
        return dots.mul_(-2).add_(own).add_(norm.index_select(0, nodes)).clamp_min_(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("found create_graph: pair distances have no second derivative")
        vectors, queries = ctx.saved_tensors
        users, indptr, nodes, rows = ctx.pattern
        # d/dx sum g |x - y|^2 = 2 (sum of g) x - 2 S y, and the same for y with S^T.
        row_sum = grad.new_zeros(len(users)).index_add_(0, rows, grad)
        to_users = queries * row_sum[:, None] - csr_times_dense(indptr, nodes, grad, vectors)
        order, by_node = _by_node(nodes, len(vectors))
        column_sum = grad.new_zeros(len(vectors)).index_add_(0, nodes, grad)
        product = csr_times_dense(by_node, rows.index_select(0, order), grad.index_select(0, order), queries)
        result = torch.addcmul(product.neg_(), vectors, column_sum[:, None])
        return result.index_add_(0, users, to_users).mul_(2), None, None, None


def _by_node(nodes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The order that sorts the places by node, and where each node's places begin [count + 1]."""
    small = nodes.to(torch.int16 if count < 2**15 else torch.int32)  # short keys sort several times faster
    order = small.argsort(stable=True)
    ends = nodes.new_zeros(count).index_add_(0, nodes, torch.ones_like(nodes)).cumsum(0)
    return order, torch.cat([ends.new_zeros(1), ends])


def _dots(queries: Tensor, vectors: Tensor, indptr: Tensor, nodes: Tensor, rows: Tensor) -> Tensor:
    # A compiled loss has no sparse tensors, and gathers without keeping what it gathered.
    if vectors.device.type != "cpu" or torch.compiler.is_compiling():
        return (queries[rows] * vectors[nodes]).sum(1)
    if len(nodes) > len(queries) * len(vectors):
        # More places than cells: the whole product is smaller, and the library's pattern cannot hold them.
        return (queries @ vectors.T)[rows, nodes]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        shape = (len(queries), len(vectors))
        places = torch.sparse_csr_tensor(indptr, nodes, vectors.new_zeros(len(nodes)), shape, check_invariants=False)
        return torch.sparse.sampled_addmm(places, queries, vectors.T, beta=0).values()
