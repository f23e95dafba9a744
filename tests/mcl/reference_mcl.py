"""The mixed-centric loss in its plain form: a difference vector for every pair, a loop over users, bare exponentials."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_loss(
    vectors: Tensor,
    users: Tensor,
    counts: Tensor,
    pos: Tensor,
    neg: Tensor,
    *,
    batch_size: int,
    alpha: float = 1.25,
    beta: float = 5.0,
    offset_pos: float = 6.5,
    offset_neg: float = -0.5,
    margin: float = 1.0,
) -> Tensor:
    """vectors [N, D]; node ids users [n], pos [E], neg [E, W]; counts [n] positives of each user."""
    query = vectors[users.repeat_interleave(counts)]
    sq_pos = (query - vectors[pos]).square().sum(-1)
    sq_neg = (query[:, None] - vectors[neg]).square().sum(-1)
    total_pos = total_neg = 0.0
    for own_pos, own_neg in zip(sq_pos.split(counts.tolist()), sq_neg.split(counts.tolist()), strict=True):
        kept_pos = own_pos[own_pos > own_neg.detach().min() - margin]
        kept_neg = own_neg[own_neg < own_pos.detach().max() + margin]
        total_pos = total_pos + torch.exp(alpha * (kept_pos + offset_pos)).sum()
        total_neg = total_neg + torch.exp(-beta * (kept_neg + offset_neg)).sum()
    return torch.log(1 + total_pos / batch_size) / alpha + torch.log(1 + total_neg / batch_size) / beta
