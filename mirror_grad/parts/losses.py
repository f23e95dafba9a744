"""Loss terms that several models share: pure functions of tensors, scalars out.

Notation: B triples (user u, positive p, negative q) in a batch. The pairwise loss without the published guard is
:func:`gfml.losses.bpr`; half the sum of squares over B is :func:`gfml.losses.half_mean_square`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gfml import losses


def guarded_bpr(pos: Tensor, neg: Tensor) -> Tensor:
    """-mean log(1e-10 + sigmoid(pos - neg)), as published for BPR, VBPR and LightGCN. Shape: pos, neg [B].

    Its gradient fades for pos - neg below -23, where that of :func:`gfml.losses.bpr` stays 1.
    """
    return -(1e-10 + (pos - neg).sigmoid()).log().mean()


def unsquared_norms(*blocks: Tensor) -> Tensor:
    """sum_j |X_j|_F / rows of the last X: the published regulariser, norms not squared. Shape: each [n_j, D].

    Its gradient is of length 1 / rows for each block, however large the vectors; undefined for an all-zero block,
    where it is 0 here.
    """
    return sum(torch.linalg.vector_norm(block) for block in blocks) / blocks[-1].shape[0]


def ranking_terms(
    user: Tensor, pos: Tensor, neg: Tensor, regularised: tuple[Tensor, ...], weight: float, *, published: bool
) -> dict[str, Tensor]:
    """{"loss", "bpr", "reg"} of dot-product scores.

    fixed: BPR + weight * sum |X_j|^2 / (2 B); published: the guarded BPR + weight * sum |X_j|_F / B.
    Shape: user, pos, neg [B, D]; the regularised blocks [B, any].
    """
    scores = (user * pos).sum(1), (user * neg).sum(1)
    bpr = guarded_bpr(*scores) if published else losses.bpr(*scores)
    reg = unsquared_norms(*regularised) if published else losses.half_mean_square(*regularised)
    return {"loss": bpr + weight * reg, "bpr": bpr, "reg": reg}
