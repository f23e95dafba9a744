"""Attention over the views of a node."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AttentionFusion(nn.Module):
    """common = sum_m a_m X_m with a = softmax over the views of q(X_m), q = Linear - tanh - Linear without bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """Views [n, D] each -> (common [n, D], weights [n, number of views], which sum to 1)."""
        stacked = torch.stack(views, 1)
        weights = self.query(stacked).squeeze(2).softmax(1)
        return (weights[:, :, None] * stacked).sum(1), weights
