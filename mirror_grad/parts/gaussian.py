"""Diagonal Gaussians of variational auto-encoders: product of experts, KL divergence, sampling."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 1e-8


def product_of_experts(*experts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, log-variance) of the normalised product of Gaussians given as (mean, log-variance).

    With T = 1 / (exp(logvar) + 1e-8): mean = sum(mean T) / sum(T), variance = 1 / sum(T). No prior takes part: two
    equal experts halve the variance and keep the mean. Shape: [n, D] each.
    """
    precision = [1.0 / (log_variance.exp() + GUARD) for _, log_variance in experts]
    total = sum(precision)
    mean = sum(mean * weight for (mean, _), weight in zip(experts, precision)) / total
    return mean, -total.log()


def kl_to_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, var) | N(0, 1)), summed over the dimensions, averaged over the rows: scalar >= 0. Shape: [n, D]."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()


def sample(mean: Tensor, log_variance: Tensor, scale: float = 1.0) -> Tensor:
    """mean + scale * std * noise; log-variances above 10 count as 10. Uses the global generator."""
    return mean + scale * torch.randn_like(mean) * (0.5 * log_variance.clamp_max(10.0)).exp()
