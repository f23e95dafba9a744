"""Item neighbours by content (the baseline of Dacrema et al., RecSys 2019; arXiv 1907.06902)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gfml.ranking.baselines import NeighbourScorer
from gfml.ranking.neighbours import nearest_rows
from mirror_grad.models import settings

if TYPE_CHECKING:
    from mirror_grad.data import MultimodalData


class ItemKNNCBF(nn.Module):
    """score(u, j) = sum over i in the history of u of s(i, j), for j among the k nearest of i; nothing is trained.

    s(i, j) = f_i . f_j / (|f_i| |f_j| + shrink) with f = [image ; text]. An item is its own neighbour.
    """

    Settings = settings.ItemKNNCBF

    def __init__(
        self, data: MultimodalData, settings: settings.ItemKNNCBF, *, behaviour: str, embedding_dim: int, seed: int
    ) -> None:
        super().__init__()
        features = torch.cat([data.features[name] for name in ("image", "text") if name in data.features], 1)
        weights = nearest_rows(features, settings.knn_k, shrink=settings.shrink, cache_dir=data.cache_dir)
        self.neighbours = NeighbourScorer(data.interactions.train, weights)

    def scorer(self) -> NeighbourScorer:
        return self.neighbours
