"""The modality branch of DualGNN and DRAGON, and the mixing weights of their users."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_grad.parts.graphs import LightPropagation

HIDDEN = 256


class ModalityBranch(nn.Module):
    """x = n([P ; W2 lrelu(W1 F)]), output x + A_hat x + A_hat^2 x; n makes rows of length 1.

    P [U, D]: the users' preferences, free. features [I, width], fixed. Returns [U + I, D], users first.
    """

    def __init__(self, features: Tensor, num_users: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", features.to(torch.get_default_dtype()), persistent=False)
        self.preference = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_users, dim)))
        self.mlp = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, dim))

    def forward(self, light: LightPropagation) -> Tensor:
        nodes = F.normalize(torch.cat([self.preference, self.mlp(self.features)]), dim=1)
        return light(nodes, 2, combine="sum")


def modality_branches(features: Mapping[str, Tensor], num_users: int, dim: int) -> nn.ModuleDict:
    """A :class:`ModalityBranch` for every modality, by name."""
    return nn.ModuleDict({name: ModalityBranch(rows, num_users, dim) for name, rows in features.items()})


def mixing_weights(count: int, modalities: int) -> nn.Parameter:
    """Free weights [count, modalities] that start as a softmax of Xavier-normal noise."""
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(count, modalities)).softmax(1))
