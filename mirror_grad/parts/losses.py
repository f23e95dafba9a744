"""Loss terms that several models share: pure functions of tensors, scalars out.

Notation: B triples (user u, positive p, negative q) in a batch. The pairwise loss without the published guard is
:func:`gfml.losses.bpr`; half the sum of squares over B is :func:`gfml.losses.half_mean_square`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gfml import losses
from mirror_grad.parts.blocks import batch_cross_entropy
from mirror_grad.parts.features import distinct


def guarded_bpr(pos: Tensor, neg: Tensor) -> Tensor:
    """-mean log(1e-10 + sigmoid(pos - neg)), as published for BPR, VBPR and LightGCN. Shape: pos, neg [B].

    Its gradient fades for pos - neg below -23, where that of :func:`gfml.losses.bpr` stays 1.
    """
    return -(1e-10 + (pos - neg).sigmoid()).log().mean()


def dot_bpr(user: Tensor, pos: Tensor, neg: Tensor, weight: Tensor | None = None) -> Tensor:
    """:func:`gfml.losses.bpr` of dot products. Shape: [B, D] each; weight [B]."""
    return losses.bpr((user * pos).sum(1), (user * neg).sum(1), weight)


def unsquared_norms(*blocks: Tensor) -> Tensor:
    """sum_j |X_j|_F / rows of the last X: the published regulariser, norms not squared. Shape: each [n_j, D].

    Its gradient is of length 1 / rows for each block, however large the vectors, and 0 for an all-zero block.
    """
    return sum(torch.linalg.vector_norm(block) for block in blocks) / blocks[-1].shape[0]


def half_square_sum(*blocks: Tensor) -> Tensor:
    """sum_j |X_j|_F^2 / 2: a regulariser that grows with the batch."""
    return 0.5 * sum(block.square().sum() for block in blocks)


def ranking_terms(
    user: Tensor,
    pos: Tensor,
    neg: Tensor,
    regularised: tuple[Tensor, ...],
    weight: float,
    *,
    published: bool,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """{"loss", "bpr", "reg"} of dot-product scores.

    fixed: BPR + weight * sum |X_j|^2 / (2 B); published: the guarded BPR + weight * sum |X_j|_F / B.
    Shape: user, pos, neg [B, D]; the regularised blocks [B, any]; rows [B]: weights of the rows (fixed alone).
    """
    scores = (user * pos).sum(1), (user * neg).sum(1)
    bpr = guarded_bpr(*scores) if published else losses.bpr(*scores, rows)
    reg = unsquared_norms(*regularised) if published else losses.half_mean_square(*regularised, weight=rows)
    return {"loss": bpr + weight * reg, "bpr": bpr, "reg": reg}


def cosine_gap(online: Tensor, target: Tensor) -> Tensor:
    """1 - mean cos(online, target); no gradient to the target. Shape: [B, D] each."""
    return 1.0 - F.cosine_similarity(online, target.detach(), dim=1).mean()


def info_nce(first: Tensor, second: Tensor, temperature: float, ids: Tensor | None = None) -> Tensor:
    """mean_i -log(exp(cos(x_i, y_i) / t) / sum_j exp(cos(x_i, y_j) / t)): a row against all rows of its batch.

    Shape: first, second [B, D]; with ids int64 [B] the batch consists of these rows of both, [N, D] each. log B when all
    rows are alike; repeated rows are each other's false negatives. One direction; by log-sum-exp, where the published
    sums overflow for small temperatures. Never holds [B, B].
    """
    rows, place = (None, torch.arange(len(first), device=first.device)) if ids is None else distinct(ids)
    x, y = (F.normalize(part if rows is None else F.embedding(rows, part), dim=1) for part in (first, second))
    return batch_cross_entropy(x, y, place, place, 1 / temperature)
