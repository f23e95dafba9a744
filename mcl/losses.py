"""The mixed-centric loss, its mining, the gravity terms beside it, and the regulariser of the free tables.

Notation: a batch holds n users and E edges (user, positive), grouped by user; every edge has W negatives.
``sq_pos`` [E] and ``sq_neg`` [E, W] are SQUARED distances; ``segment`` int64 [E] says which of the n users an
edge belongs to. All are pure functions: no model, flag or device.

Source: Gao, Cheng, Perez, Sun, Volkovs, MCL: Mixed-Centric Loss for Collaborative Filtering, WWW 2022. The paper
speaks of distances; its numbers, like the published code, take squared distances in mining, loss and ranking.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gfml.losses import row_mean


class Kept(NamedTuple):
    """Hard pairs: ``pos`` bool [E], ``neg`` bool [E, W]."""

    pos: Tensor
    neg: Tensor


class MixedCentric(NamedTuple):
    """The two halves of the loss, scalars."""

    pos: Tensor
    neg: Tensor


@torch.no_grad()
def mine(sq_pos: Tensor, sq_neg: Tensor, segment: Tensor, num_users: int, margin: float) -> Kept:
    """Pairs that are hard for their user; the thresholds carry no gradient.

        keep positive j  iff  E_uj > min over the user's negatives - margin
        keep negative k  iff  E_uk < max over the user's positives + margin

    The user's negatives are those of all the user's edges. Equality is dropped on both sides. margin may be
    infinite: inf keeps all, -inf none. Cost O(E W): one segment maximum and one segment minimum, no loop.
    """
    _check_shapes(sq_pos, sq_neg, segment)
    farthest = sq_pos.new_full((num_users,), -math.inf).scatter_reduce_(0, segment, sq_pos, "amax")
    nearest = sq_pos.new_full((num_users,), math.inf).scatter_reduce_(0, segment, sq_neg.amin(1), "amin")
    return Kept(sq_pos > nearest[segment] - margin, sq_neg < (farthest[segment] + margin)[:, None])


def mixed_centric(
    sq_pos: Tensor,
    sq_neg: Tensor,
    kept: Kept,
    *,
    alpha: float,
    beta: float,
    offset_pos: float,
    offset_neg: float,
    batch_size: int,
) -> MixedCentric:
    """All kept pairs of the batch in two log-sum-exps.

        L_pos = 1/alpha log(1 + 1/m sum over kept positives of exp( alpha (E + lambda_p)))
        L_neg = 1/beta  log(1 + 1/m sum over kept negatives of exp(-beta  (E + lambda_n)))

    m = ``batch_size`` is the nominal number of users of a batch, a constant also when fewer are present.
    offset_pos = lambda_p and offset_neg = lambda_n are in squared-distance units. A negative drawn twice counts
    twice. Dropped pairs have gradient exactly 0; the positive weights sum to less than 1, the negative ones to more
    than -1. Written as logsumexp over {0, z - log m}: finite where exp alone overflows (in float32 from
    alpha (E + lambda_p) > 88.7 on). With nothing kept the loss is 0.
    """
    pos = _log1p_mean_exp(alpha * (sq_pos + offset_pos), kept.pos, batch_size) / alpha
    neg = _log1p_mean_exp(-beta * (sq_neg + offset_neg), kept.neg, batch_size) / beta
    return MixedCentric(pos, neg)


def _log1p_mean_exp(exponent: Tensor, keep: Tensor, count: int) -> Tensor:
    """log(1 + 1/count * sum of exp over the kept entries)."""
    terms = torch.where(keep, exponent - math.log(count), -math.inf).reshape(-1)
    return torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), 0)


def hardest(sq_neg: Tensor) -> Tensor:
    """Index of the nearest of each edge's own W negatives, the first of equal ones: int64 [E]."""
    return sq_neg.detach().argmin(1)


def pull_push(
    pos: Tensor,
    hard: Tensor,
    *,
    weight_pos: float = 1.0,
    weight_neg: float = 1.0,
    pull_only: bool = False,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gravity loss of the published fork in its two weighted terms: their sum is the loss.

        pull = weight_pos mean(-g(u, positive)),   push = weight_neg mean(g(u, hardest negative))

    Shape: gravity scores pos, hard [E]. No margin and no hinge: the sum is unbounded below. pull_only: mean(-g) of
    the positives alone, unweighted, push 0; every distance then shrinks.
    Because g is mass minus distance term, no mass enters the gradient of any distance: under this loss masses cannot
    move a vector. weight [E]: of each edge in the means, summing to 1; None: all alike.
    """
    pull, push = row_mean(-pos, weight), row_mean(hard, weight)
    return (pull, torch.zeros_like(pull)) if pull_only else (weight_pos * pull, weight_neg * push)


def ego_reg(nodes: Tensor, users: Tensor, pos: Tensor, neg: Tensor, weight: Tensor | None = None) -> Tensor:
    """L2 of the free rows, repeated as often as the batch holds them:

        1/2 (sum over edges |u|^2 + sum over edges |p|^2) / E + 1/2 (sum over negatives |n|^2) / (number of negatives)

    Shape: nodes [N, D]; node ids users, pos [E]; neg [E, W] or [E]; weight [E] of the edges, summing to 1, None: all
    alike. Rows are weighted by how often they occur, so no row is gathered twice.
    """
    total = nodes.new_zeros(nodes.shape[0])
    for ids in (users, pos, neg.view(len(pos), -1)):
        each = nodes.new_full((1,), 1 / ids.numel())
        if weight is not None:
            each = (weight.to(nodes.dtype) * (len(ids) / ids.numel())).view(-1, *[1] * (ids.dim() - 1))
        total.index_add_(0, ids.reshape(-1), each.expand(ids.shape).reshape(-1))
    return 0.5 * (nodes.square().sum(1) @ total)


def _check_shapes(sq_pos: Tensor, sq_neg: Tensor, segment: Tensor) -> None:
    if sq_neg.dim() != 2 or sq_neg.shape[:1] != sq_pos.shape or segment.shape != sq_pos.shape:
        found = f"{tuple(sq_pos.shape)}, {tuple(sq_neg.shape)} and {tuple(segment.shape)}"
        raise ValueError(f"found distances and segments {found}, wanted [E], [E, W] and [E]")
