"""The contextual loss and its companions with their gradients in closed form: same numbers, less time and memory.

Notation as in ``contextual.similarity``, with n = |N(i)|, m = B - n, r = |R(i)|, each at least 1 as a divisor, and
A = dL/dW^ = 2 / B^2 (W^ - Y) off the diagonal:

    C  = dL/dW~ = R (A / r)                       H = C o N / 2,  K+ = H / n + (H / n)^T,  K- = H / m + (H / m)^T
    Q  = dL/dR  = (A W~^T - rowsum(A o W)) / r    G_P = (Q + Q^T) o P^T
    dL/dN + dL/dP = K+ N - K- (1 - N) + (M+ + M-) / 2 o C + G_P;   dL/dS = 2 slope times that, 0 where S > 1

Five products of B x B matrices: N N^T, R W~, A W~^T, R (A / r), (K+ + K-) N. The left factor of each is zero almost
everywhere while neighbourhoods are small. There are two ways, the same for the caller:

    :func:`listed`       on a CPU, while neighbourhoods are small: machine code over lists of neighbours
                         (``contextual.kernel``). The only B x B matrix is dL/dS, made by the backward pass.
    :func:`contextual`   on other devices and for large neighbourhoods: the products as they stand. Value and dL/dS
                         are computed together, and dL/dS is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Above this share of filled places dense products are the faster ones.
DENSE = 0.2


class Weights(NamedTuple):
    """Of the hybrid's three terms."""

    context: float
    contrast: float
    reg: float


class Settings(NamedTuple):
    """Of the hybrid's terms, as :func:`hybrid` takes them."""

    k: int
    eps: float
    slope: float
    pos_margin: float
    neg_margin: float
    reg_sim: float


class Contextual(NamedTuple):
    """value: the loss; grad: its derivative by every similarity [B, B], None when none was asked for; size, mutual:
    |N(i)| and |R(i)|, both [B]."""

    value: Tensor
    grad: Tensor | None
    size: Tensor
    mutual: Tensor


class _Once(torch.autograd.Function):
    """A scalar whose gradient by ``sim`` is ``gradient`` of the gradient by the scalar itself and of ``saved``."""

    @staticmethod
    def forward(ctx, sim: Tensor, value: Tensor, gradient: Callable[[Tensor, Tensor], Tensor], saved: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(saved)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "found create_graph with the closed form, which has no second derivative: use backend='reference'"
            )
        return ctx.gradient(upstream, *ctx.saved_tensors), None, None, None


def attach(sim: Tensor, value: Tensor, gradient: Callable[[Tensor, Tensor], Tensor], saved: Tensor) -> Tensor:
    """``value``, differentiable by ``sim`` once: gradient(upstream, saved) is called in the backward pass."""
    return _Once.apply(sim, value, gradient, saved)


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


class Listed:
    """The weighted sum of the three terms for one batch, by lists of neighbours; made by :func:`listed`.

    parts: contextual, contrastive and reg, None for a weight of 0; loss: their sum; none has a gradient. size, mutual:
    |N(i)| and |R(i)|, both [B]. What is kept for the gradient grows with the number of neighbours, not with B^2.
    """

    def __init__(
        self, sim: Tensor, labels: Tensor, rows: Tensor, number: int, num_half: int, weights: Weights, own: Settings
    ) -> None:
        s, batch, kind = _array(sim), len(sim), sim.dtype
        self.weights, self.slope, self.labels = weights, own.slope, _names(labels)
        self.size, self.mutual = rows[2], rows[3]
        self.margins = s.dtype.type(own.pos_margin), s.dtype.type(own.neg_margin)
        lists = _room(torch.uint32, 3 * (batch + 1) + 3 * number + num_half)
        self.memory = rows.numpy(), lists, _room(kind, 3, number)
        squares, total, lacking, exceeding, attracted, repelled = _kernel().forward(
            s, self.labels, *self.margins, weights.contrast != 0, *self.memory, _room(torch.float64, 4, batch)
        )
        self.active = max(attracted, 1), max(repelled, 1)
        self.off = total / batch**2 - own.reg_sim
        # What is nan is nobody's neighbour: S = nan would not reach the loss.
        parts = squares / batch**2 + 0 * total, lacking / self.active[0] + exceeding / self.active[1], self.off**2
        loss = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        self.loss, *parts = torch.from_numpy(np.array([loss, *parts], s.dtype)).unbind()
        self.parts = [part if weight else None for weight, part in zip(weights, parts, strict=True)]

    def gradient(self, upstream: Tensor, sim: Tensor) -> Tensor:
        """dL/dS times ``upstream``, which has one element."""
        grad = torch.empty(sim.shape, dtype=sim.dtype)
        context, contrast, reg = (upstream.item() * weight for weight in self.weights)
        pull, push = (contrast / active for active in self.active)
        _kernel().backward(
            _array(sim), self.labels, *self.margins, context * 4 * self.slope / sim.numel(), pull, push,
            2 * reg * self.off / sim.numel(), *self.memory, grad.numpy(),
        )  # fmt: skip
        return grad


def listed(sim: Tensor, labels: Tensor, weights: Weights, own: Settings) -> Listed | None:
    """None where matrix products are the better way. Shape: sim [B, B], without gradient; labels [B]."""
    batch = len(sim)
    if sim.device.type != "cpu" or own.k >= DENSE * batch:
        return None
    s, rows = _array(sim), torch.empty(8, batch, dtype=sim.dtype)
    number, num_half = _kernel().count(s, own.k, s.dtype.type(own.eps / 2), rows.numpy())
    return Listed(sim, labels, rows, number, num_half, weights, own) if number < DENSE * batch**2 else None


def _kernel() -> ModuleType:
    """numba is not imported before it is needed."""
    from contextual import kernel

    return kernel


def _array(sim: Tensor) -> np.ndarray:
    return sim.detach().contiguous().numpy()


def _room(kind: torch.dtype, *shape: int) -> np.ndarray:
    """Uninitialised, and made by torch, whose profiler then knows of it."""
    return torch.empty(shape, dtype=kind).numpy()


def _names(labels: Tensor) -> np.ndarray:
    """Labels of any kind as integers, equal where they are."""
    labels = labels.detach()
    if labels.is_floating_point():
        labels = labels.unique(return_inverse=True)[1]
    return labels.long().contiguous().numpy()


@torch.no_grad()
def contextual(sim: Tensor, labels: Tensor, *, k: int, eps: float, slope: float, needs_grad: bool = True) -> Contextual:
    """The contextual loss and, if wanted, its gradient: the formulas as they stand, with matrix products.

    Shape: sim [B, B]; labels [B]. D <= d^(k) + eps is read as S >= min(s^(k), 1) - eps / 2.
    """
    nearest = sim.topk(k, dim=1).values.clamp_max_(1).sub_(eps / 2)
    neighbours, half = sim >= nearest[:, k - 1 :], sim >= nearest[:, k // 2 - 1, None]
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
    # What is nan is nobody's neighbour: S = nan would not reach the loss.
    value = error.square().sum() / batch**2 + 0 * sim.sum()
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


def _less_labels(similarity: Tensor, labels: Tensor) -> Tensor:
    """W^ - Y off the diagonal, in place."""
    return similarity.sub_((labels[:, None] == labels).to(similarity.dtype)).fill_diagonal_(0)


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
