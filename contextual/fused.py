"""The contextual loss and its companions with their gradients in closed form: same numbers, less time and memory.

Value and dL/dS are computed together; only dL/dS is kept for the backward pass. Notation as in
``contextual.similarity``, with n = |N(i)|, m = B - n, r = |R(i)|, each at least 1 as a divisor, and
A = dL/dW^ = 2 / B^2 (W^ - Y) off the diagonal:

    C  = dL/dW~ = R (A / r)                       H = C o N / 2,  K+ = H / n + (H / n)^T,  K- = H / m + (H / m)^T
    Q  = dL/dR  = (A W~^T - rowsum(A o W)) / r    G_P = (Q + Q^T) o P^T
    dL/dN + dL/dP = K+ N - K- (1 - N) + (M+ + M-) / 2 o C + G_P;   dL/dS = 2 slope times that, 0 where S > 1

Five products of B x B matrices: N N^T, R W~, A W~^T, R (A / r), (K+ + K-) N. The left factor of each is zero almost
everywhere while neighbourhoods are small. On the CPU :func:`_listed` then visits only what is there (embedding bags
over lists of neighbours) and holds little more than two B x B matrices at a time; :func:`_dense` multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Above this share of filled places dense products are the faster ones.
DENSE = 0.25
# Counts up to here are exact in half precision.
HALF_EXACT = 2048


class Contextual(NamedTuple):
    """value: the loss; grad: its derivative by every similarity [B, B], None when none was asked for; size, mutual:
    |N(i)| and |R(i)|, both [B]."""

    value: Tensor
    grad: Tensor | None
    size: Tensor
    mutual: Tensor


class _Known(torch.autograd.Function):
    """A scalar whose gradient by ``sim`` is known already."""

    @staticmethod
    def forward(ctx, sim: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "found create_graph with the closed form, which has no second derivative: use backend='reference'"
            )
        return upstream * ctx.saved_tensors[0], None, None


def attach(sim: Tensor, value: Tensor, grad: Tensor | None) -> Tensor:
    """``value``, differentiable by ``sim`` once."""
    return value if grad is None else _Known.apply(sim, value, grad)


class _Gram(torch.autograd.Function):
    """F F^T; its backward pass is one product."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.T

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            return (upstream + upstream.T) @ rows


def gram(rows: Tensor) -> Tensor:
    """rows rows^T. Shape: [B, D] -> [B, B]."""
    return _Gram.apply(rows)


@torch.no_grad()
def contextual(sim: Tensor, labels: Tensor, *, k: int, eps: float, slope: float, needs_grad: bool = True) -> Contextual:
    """The contextual loss and, if wanted, its gradient.

    Shape: sim [B, B]; labels [B]. D <= d^(k) + eps is read as S >= min(s^(k), 1) - eps / 2.
    """
    nearest = sim.topk(k, dim=1).values.clamp_max_(1).sub_(eps / 2)
    neighbours, half = sim >= nearest[:, k - 1 :], nearest[:, k // 2 - 1]
    if sim.device.type == "cpu" and neighbours.count_nonzero().item() < DENSE * len(sim) ** 2:
        i, j = neighbours.nonzero(as_tuple=True)
        del neighbours
        return _listed(sim, labels, i, j, half, slope, needs_grad)
    return _dense(sim, labels, neighbours, sim >= half[:, None], slope, needs_grad)


def _dense(sim: Tensor, labels: Tensor, neighbours: Tensor, half: Tensor, slope: float, needs_grad: bool) -> Contextual:
    """The formulas as they stand, with matrix products."""
    batch, member = len(sim), neighbours.to(sim.dtype)
    mutual = (half & half.T).to(sim.dtype)
    size, num_mutual = member.sum(1), mutual.sum(1)
    inside, outside, share = size.clamp_min(1), (batch - size).clamp_min(1), num_mutual.clamp_min(0.5)
    overlap = member @ member.T
    # Common strangers are counted from common neighbours, exactly.
    strangers = overlap.sub(size).add_((batch - size)[:, None]).div_(outside[:, None])
    overlap.div_(inside[:, None]).add_(strangers).mul_(0.5)
    del strangers, neighbours
    weights = overlap * member
    averaged = (mutual @ weights).div_(share[:, None])
    error = _less_labels(averaged.T.contiguous().add_(averaged).mul_(0.5), labels)
    value = error.square().sum() / batch**2
    if not needs_grad:
        return Contextual(value, None, size, num_mutual)

    lean = torch.einsum("ij,ij->i", error, averaged)
    del averaged
    expansion = (error @ weights.T).sub_(lean[:, None]).div_(share[:, None])
    del weights
    grad = (expansion + expansion.T).masked_fill_(~half.T, 0)
    del expansion
    spread = mutual @ error.div_(share[:, None])
    del error, mutual
    grad.addcmul_(overlap, spread)
    del overlap
    common = spread.mul_(member)
    lost = 0.5 * (common.sum(1) / outside + (1 / outside) @ common)
    common.mul_((0.5 / inside + 0.5 / outside)[:, None])
    grad.addmm_(common + common.T, member).sub_(lost[:, None])
    return Contextual(value, grad.mul_(4 * slope / batch**2).masked_fill_(sim > 1, 0), size, num_mutual)


def _listed(
    sim: Tensor, labels: Tensor, i: Tensor, j: Tensor, half: Tensor, slope: float, needs_grad: bool
) -> Contextual:
    """The same with lists: (i, j) the neighbours row by row, (p, q) the half-neighbours among them."""
    batch, rows = len(sim), torch.arange(len(sim))
    near = sim[i, j]
    inner = near >= half[i]
    over, p, q = near > 1, i[inner], j[inner]
    both = (sim[q, p] >= half[q]).to(sim.dtype)
    start, half_start = torch.searchsorted(i, rows), torch.searchsorted(p, rows)
    size = torch.diff(start, append=start.new_tensor([len(i)])).to(sim.dtype)
    num_mutual = sim.new_zeros(batch).index_add_(0, p, both)
    # A picture is its own neighbour: only rounding of equal distances can make it otherwise.
    inside, outside, share = size.clamp_min(1), (batch - size).clamp_min(1), num_mutual.clamp_min(0.5)

    met = _bag(j, _turned(i, j, batch), start)[i, j].to(sim.dtype)
    weights = met.div(inside[i]).add_(met.sub_(size[j]).add_((batch - size)[i]).div_(outside[i])).mul_(0.5)
    averaged = _bag(q, sim.new_zeros(batch, batch).index_put_((i, j), weights), half_start, both).div_(share[:, None])
    error = averaged.T.contiguous().add_(averaged).mul_(0.5)
    del averaged, near, inner, met
    error = _less_labels(error, labels)
    value = error.square().sum() / batch**2
    if not needs_grad:
        return Contextual(value, None, size, num_mutual)

    # W~ A = (A W~^T)^T: Q^T before its division, wanted at the half-neighbourhoods alone.
    turned = _bag(j, error, start, weights)
    there, back = turned[p, q], turned[q, p]
    del turned, weights
    lean = sim.new_zeros(batch).index_add_(0, p, both * back) / share
    expansion = (there - lean[q]) / share[q] + (back - lean[p]) / share[p]
    grad = _bag(q, error, half_start, both / share[q])
    del error
    common, per_both = grad[i, j], 0.5 / inside + 0.5 / outside
    lost = 0.5 * common / outside[i]
    lost = sim.new_zeros(batch).index_add_(0, i, lost).index_add_(0, j, lost)
    _times_overlap(grad, i, j, start, per_both, 0.5 / outside, size)
    _add_mixed(grad, i, j, common.mul_(per_both[i]))
    grad.sub_(lost[:, None]).index_put_((q, p), expansion, accumulate=True).mul_(4 * slope / batch**2)
    return Contextual(value, grad.index_put_((i[over], j[over]), sim.new_zeros(())), size, num_mutual)


def _times_overlap(
    grad: Tensor, i: Tensor, j: Tensor, start: Tensor, per_both: Tensor, per_outside: Tensor, size: Tensor
) -> None:
    """grad *= (M+ + M-) / 2 in place, some rows at a time."""
    turned, strangers = _turned(i, j, len(grad)), (len(grad) - size) * per_outside
    for rows, column, begin in _blocks(j, start):
        overlap = _bag(column, turned, begin).to(grad.dtype)
        overlap.mul_(per_both[rows, None]).addr_(per_outside[rows], size, alpha=-1)
        grad[rows] *= overlap.add_(strangers[rows, None])
        del overlap  # or the next block would stand beside it


def _add_mixed(grad: Tensor, i: Tensor, j: Tensor, weights: Tensor) -> None:
    """grad += (T + T^T) N in place, T holding ``weights`` at the places (i, j) of N; some rows at a time."""
    member = torch.zeros_like(grad).index_put_((i, j), grad.new_ones(()))
    row, order = torch.cat([i, j]).sort()
    start = torch.searchsorted(row, torch.arange(len(grad)))
    del row
    column, weights = torch.cat([j, i])[order], torch.cat([weights, weights])[order]
    del order
    for rows, near, begin, own in _blocks(column, start, weights):
        grad[rows] += _bag(near, member, begin, own)


def _blocks(column: Tensor, start: Tensor, *lists: Tensor) -> Iterator[tuple]:
    """The lists of a quarter of the rows, but at least of 64, at a time: (rows, columns, starts, ...)."""
    rows = max(64, -(-len(start) // 4))
    for first in range(0, len(start), rows):
        last = first + rows
        part = slice(int(start[first]), int(start[last]) if last < len(start) else len(column))
        yield slice(first, last), column[part], start[first:last] - part.start, *(each[part] for each in lists)


def _less_labels(similarity: Tensor, labels: Tensor) -> Tensor:
    """W^ - Y off the diagonal, in place."""
    return similarity.sub_((labels[:, None] == labels).to(similarity.dtype)).fill_diagonal_(0)


def _bag(column: Tensor, right: Tensor, start: Tensor, weights: Tensor | None = None) -> Tensor:
    """Left @ right, where row b of left holds weights (ones) at the columns listed from start[b] on."""
    return functional.embedding_bag(column, right, start, mode="sum", per_sample_weights=weights)


def _turned(i: Tensor, j: Tensor, batch: int) -> Tensor:
    """N^T in the smallest type that counts up to ``batch`` exactly."""
    kind = torch.float16 if batch <= HALF_EXACT else torch.float32
    return torch.zeros(batch, batch, dtype=kind).index_put_((j, i), torch.ones((), dtype=kind))


@torch.no_grad()
def contrastive(
    sim: Tensor,
    labels: Tensor,
    *,
    pos_margin: float,
    neg_margin: float,
    onto: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Mean of max(0, pos_margin - s) over active positive pairs plus that of max(0, s - neg_margin) over negatives.

    onto: [B, B], receives weight times the gradient in place; None: no gradient.
    """
    same = labels[:, None] == labels
    negative = _active(sim.sub(neg_margin), same, onto, weight)
    return negative + _active(sim.neg().add_(pos_margin), same.fill_diagonal_(False).logical_not_(), onto, -weight)


def _active(excess: Tensor, outside: Tensor, onto: Tensor | None, weight: float) -> Tensor:
    """Mean of the positive entries that are not ``outside``; uses up ``excess``."""
    excess.clamp_min_(0).masked_fill_(outside, 0)
    number = excess.count_nonzero().clamp_min_(1).to(excess.dtype)
    mean = excess.sum() / number
    if onto is not None:
        onto.add_(excess.sign_().mul_(weight / number))
    return mean


@torch.no_grad()
def similarity_target(sim: Tensor, target: float, *, onto: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """(mean S - target)^2. onto: as in :func:`contrastive`."""
    off = sim.mean() - target
    if onto is not None:
        onto.add_(off * (2 * weight / sim.numel()))
    return off.square()
