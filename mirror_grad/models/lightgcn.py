"""LightGCN (He et al., SIGIR 2020) with BPR."""

from __future__ import annotations

import torch

from gfml.ranking import encoders
from gfml.ranking.graph import build_graph
from mirror_grad.data import MultimodalData
from mirror_grad.models.bpr import BPR


class LightGCN(BPR):
    """BPR on vectors propagated over the train graph (mean of layers 0..n_layers); regularised are the free vectors."""

    def build_encoder(self, data: MultimodalData, dim: int) -> encoders.LightGCN:
        graph = build_graph(data.interactions.train, dtype=torch.get_default_dtype())
        return encoders.LightGCN(graph, dim, self.settings.n_layers, init="xavier_uniform")
