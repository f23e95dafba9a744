"""Gravity attention as its formula reads: every pair's distance by the library, squared, then a softmax.

No closed form, no backward pass of its own, separate maps: what the core's layer is timed and compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainGravityAttention(nn.Module):
    """softmax( (m_j - lamb log(1 + |q_i - k_j|^2)) / sqrt(width) ) in every head; l1 distances with ``p=1``."""

    def __init__(self, width: int, num_heads: int, num_tokens: int, lamb: float, p: float = 2.0) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mass = nn.Parameter(torch.rand(num_tokens))
        self.num_heads, self.lamb, self.p, self.divisor = num_heads, lamb, p, width**0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        sq_distance = torch.cdist(q, k, p=self.p) ** 2
        weights = ((self.mass - self.lamb * torch.log1p(sq_distance)) / self.divisor).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))
