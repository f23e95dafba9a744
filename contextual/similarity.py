"""The contextual similarity, step by step as the paper defines it: the readable reference.

Two pictures are similar when they have the same neighbours. Notation: B pictures; S [B, B] their cosine similarities;
D = max(2 - 2 S, 0) squared distances; k neighbours, the picture itself included; eps a slack in squared-distance
units; slope (paper: alpha) the derivative that stands in for that of a step. Matrices are [B, B] unless said.

Differentiable by autograd: about twenty B x B tensors stay alive for the backward pass. ``contextual.fused`` has the
same value and gradient in closed form. Traceable by torch.compile.

Source: Liao, Tsiligkaridis, Kulis, Supervised Metric Learning to Rank for Retrieval via Contextual Similarity
Optimization, ICML 2023. Difference: divisors are at least 1, so a neighbourhood that covers the batch is no 0 / 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURE = 0.01


@dataclass(frozen=True)
class Steps:
    """What the similarity consists of; the defaults are the method, each field an ablation.

    last: neighbours (step 1), intersection (2) or full (4); the first two are not symmetrised.
    sigmoid: sigmoid(x / 0.01) in place of the step. eps: a slack of its own.
    strangers: count common strangers beside common neighbours; without them the half before the sum goes too.
    intersect: step 2. minimum: min in place of products, memory O(B^3).
    size_grad, expansion_grad: differentiate the sizes |N(i)| and |R(i)| that things are divided by.
    """

    last: str = "full"
    sigmoid: bool = False
    eps: float | None = None
    strangers: bool = True
    intersect: bool = True
    minimum: bool = False
    size_grad: bool = False
    expansion_grad: bool = True


FULL = Steps()
# The names of contextual.names.ABLATIONS.
ABLATED = {
    "none": FULL,
    "neighbours": Steps(last="neighbours", eps=1e-5),
    "neighbours-sigmoid": Steps(last="neighbours", eps=1e-5, sigmoid=True),
    "intersection": Steps(last="intersection"),
    "intersection-inside": Steps(last="intersection", strangers=False),
    "minimum": Steps(minimum=True),
    "sigmoid": Steps(sigmoid=True),
    "inside": Steps(strangers=False),
    "no-intersection": Steps(intersect=False),
    "detach-expansion": Steps(expansion_grad=False),
    "detach-nothing": Steps(size_grad=True),
}


class Context(NamedTuple):
    """similarity: W^, what the loss compares with the labels; neighbours: N; mutual: R (None before step 3)."""

    similarity: Tensor
    neighbours: Tensor
    mutual: Tensor | None


def at_least(x: Tensor, threshold: Tensor, slope: float) -> Tensor:
    """1 where x >= threshold, else 0; the gradient to x is ``slope`` everywhere, that to the threshold is none.

    Differences from a sigmoid: the slope does not fade with the distance from the threshold.
    """
    hard = (x >= threshold.detach()).to(x.dtype)
    return hard + slope * (x - x.detach())


def sq_distances(sim: Tensor) -> Tensor:
    """max(2 - 2 S, 0)."""
    return (2 - 2 * sim).clamp_min(0)


def neighbourhood(sq_distance: Tensor, k: int, *, eps: float, slope: float, sigmoid: bool = False) -> Tensor:
    """N_ij = 1 iff D_ij <= d_i^(k) + eps, where d_i^(k) is the k-th smallest of row i, i itself included."""
    farthest = sq_distance.detach().topk(k, dim=1, largest=False).values[:, -1:]
    near = eps - sq_distance
    if sigmoid:
        return torch.sigmoid((near + farthest) / TEMPERATURE)
    return at_least(near, -farthest, slope)


def intersection(neighbours: Tensor, steps: Steps = FULL) -> Tensor:
    """How much of i's neighbourhood, and of its complement, j shares:

        M+_ij = |N(i) and N(j)| / |N(i)|,   M-_ij = |not N(i) and not N(j)| / |not N(i)|,   (M+ + M-) / 2

    Not symmetric. The sizes carry no gradient. M- is 0 where N(i) is everything.
    """
    inside = _share(neighbours, steps)
    return 0.5 * (inside + _share(1 - neighbours, steps)) if steps.strangers else inside


def _share(members: Tensor, steps: Steps) -> Tensor:
    size = members.sum(1, keepdim=True)
    size = size if steps.size_grad else size.detach()
    return _matmul(members, members.T, steps) / size.clamp_min(1)


def expand(weights: Tensor, mutual: Tensor, steps: Steps = FULL) -> Tensor:
    """Row i becomes the average of the rows of i's mutual neighbours: R W~ / |R(i)|."""
    size = mutual.sum(1, keepdim=True)
    size = size if steps.expansion_grad else size.detach()
    # i is its own neighbour: only rounding of equal distances can bring the size below that.
    return _matmul(mutual, weights, steps) / size.clamp_min(0.5)


def contextual_similarity(
    sim: Tensor, *, k: int = 4, eps: float = 0.05, slope: float = 10.0, steps: Steps = FULL
) -> Context:
    """W^ in [0, 1] from cosine similarities.

        1  N = neighbourhood(k)                       3  R = P and P^T, P = neighbourhood(k // 2);  W = R W~ / |R|
        2  W~ = intersection(N) N                     4  W^ = (W + W^T) / 2

    Shape: sim [B, B], B >= k >= 2. The diagonal means nothing. Depends on S alone: rotating all embeddings changes
    nothing, permuting them permutes W^.
    """
    check(sim, k)
    slack = eps if steps.eps is None else steps.eps
    sq_distance = sq_distances(sim)
    neighbours = neighbourhood(sq_distance, k, eps=slack, slope=slope, sigmoid=steps.sigmoid)
    if steps.last == "neighbours":
        return Context(neighbours, neighbours, None)
    weights = _both(intersection(neighbours, steps), neighbours, steps) if steps.intersect else neighbours
    if steps.last == "intersection":
        return Context(weights, neighbours, None)
    half = neighbourhood(sq_distance, k // 2, eps=slack, slope=slope, sigmoid=steps.sigmoid)
    mutual = _both(half, half.T, steps)
    averaged = expand(weights, mutual, steps)
    return Context(0.5 * (averaged + averaged.T), neighbours, mutual)


def check(sim: Tensor, k: int) -> None:
    """ValueError unless sim is [B, B] with B >= k >= 2."""
    if sim.dim() != 2 or sim.shape[0] != sim.shape[1]:
        raise ValueError(f"found similarities {tuple(sim.shape)}, wanted [B, B]")
    if k < 2:
        raise ValueError(f"found k = {k}, wanted at least 2: half a neighbourhood must hold the picture itself")
    if len(sim) < k:
        raise ValueError(f"found a batch of {len(sim)}, wanted at least k = {k}: raise the batch size or lower k")


def _both(left: Tensor, right: Tensor, steps: Steps) -> Tensor:
    return torch.minimum(left, right) if steps.minimum else left * right


def _matmul(left: Tensor, right: Tensor, steps: Steps) -> Tensor:
    if not steps.minimum:
        return left @ right
    return torch.minimum(left[:, :, None], right[None]).sum(1)
