"""DRAGON (Zhou et al., Enhancing Dyadic Relations with Homogeneous Graphs, ECAI 2023; arXiv 2301.12097)."""

from __future__ import annotations

import torch
from torch import Tensor

from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.dualgnn import DualGNN
from mirror_grad.parts.graphs import mixed_item_graph


class DRAGON(DualGNN):
    """DualGNN's branches side by side: z_i = [v_i ; t_i], z_u = [w_u0 v_u ; w_u1 t_u].

        item = z_i + S^L z_i, user = z_u + H z_u;  S: mean over nearest items, images and texts mixed; H: user graph
        loss = BPR + reg_weight * [sum_m mean P_m[u]^2 + mean w^2]

    published: BPR in bits (/ ln 2); short neighbour lists of users are padded.
    Difference from the published code in both: it holds a trainable copy of the features and two projections that no
    loss reaches, 33 million dead numbers on baby; they are left out.
    """

    decays_items = False

    def build(self, data: MultimodalData, dim: int) -> None:
        super().build(data, dim)
        mixed = mixed_item_graph(data.features, self.settings.knn_k, self.settings.mm_image_weight, data.cache_dir)
        self.item_graph = SparseMatrix.from_scipy(mixed)

    def joined(self) -> tuple[Tensor, Tensor]:
        """The same, [., D * modalities]."""
        users, items = self.views()
        user = torch.cat([weight[:, None] * part for weight, part in zip(self.user_weight.unbind(1), users)], 1)
        item = smooth = torch.cat(items, 1)
        for _ in range(self.settings.n_mm_layers):
            smooth = self.item_graph(smooth)
        return user, item + smooth
