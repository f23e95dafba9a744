"""Item neighbours by content (the baseline of Dacrema et al., RecSys 2019; arXiv 1907.06902)."""

from __future__ import annotations

import torch

from gfml.ranking.baselines import NeighbourScorer
from gfml.ranking.neighbours import nearest_rows
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel


class ItemKNNCBF(MultimodalModel):
    """score(u, j) = sum over i in the history of u of s(i, j), for j among the k nearest of i; nothing is trained.

    s(i, j) = f_i . f_j / (|f_i| |f_j| + shrink) with f = [image ; text]. An item is its own neighbour.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        features = torch.cat([data.features[name] for name in ("image", "text") if name in data.features], 1)
        weights = nearest_rows(features, self.settings.knn_k, shrink=self.settings.shrink, cache_dir=data.cache_dir)
        self.neighbours = NeighbourScorer(data.interactions.train, weights)

    def scorer(self) -> NeighbourScorer:
        return self.neighbours
