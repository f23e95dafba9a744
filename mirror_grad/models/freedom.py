"""FREEDOM (Zhou and Shen, A Tale of Two Graphs, MM 2023; arXiv 2211.06924)."""

from __future__ import annotations

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import distinct, projected
from mirror_grad.parts.graphs import ThinnedGraph, mixed_item_graph
from mirror_grad.parts.losses import dot_bpr
from mirror_grad.parts.modes import evaluating


class FREEDOM(MultimodalModel):
    """LightGCN on a user-item graph thinned by degree, plus item vectors smoothed over a frozen item graph.

        item = propagated item + S^L item,   S = mean over the k nearest items, images and texts mixed
        loss = BPR(u, item) + reg_weight * sum_m BPR(u, W_m f_m + b_m)

    Evaluation uses the whole user-item graph. published: the number of kept edges is a truncated float product.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        train = data.interactions.train
        self.graph = ThinnedGraph(train, self.settings.dropout, self.seed, truncate=self.published)
        mixed = mixed_item_graph(data.features, self.settings.knn_k, self.settings.mm_image_weight, data.cache_dir)
        self.item_graph = SparseMatrix.from_scipy(mixed)
        self.features = projected(data.features, dim, trained=self.settings.train_features)

    def new_epoch(self, epoch: int) -> None:
        self.graph.new_epoch(epoch)

    def smoothed_items(self) -> Tensor:
        """S^L times the free item vectors: [I, D]."""
        items = self.tables.nodes[self.num_users :]
        for _ in range(self.settings.n_mm_layers):
            items = self.item_graph(items)
        return items

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        items = torch.cat([batch.pos, batch.neg])
        ids = torch.cat([batch.users, self.num_users + items])
        nodes = self.graph().at(ids, self.tables.nodes, self.settings.n_ui_layers)
        user, item = nodes.split([len(batch), len(items)])
        item = item + F.embedding(items, self.smoothed_items())
        terms = {"bpr": dot_bpr(user, *item.chunk(2), batch.weight)}
        loss = terms["bpr"]
        if self.settings.reg_weight:
            rows, place = distinct(items)
            for name, features in self.features.items():
                pos, neg = F.embedding(place, features(rows)).chunk(2)
                terms[f"bpr_{name}"] = dot_bpr(user, pos, neg, batch.weight)
                loss = loss + self.settings.reg_weight * terms[f"bpr_{name}"]
        return {"loss": loss, **terms}

    def outputs(self) -> tuple[Tensor, Tensor]:
        user, item = self.split(self.graph()(self.tables.nodes, self.settings.n_ui_layers))
        return user, item + self.smoothed_items()

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        return self.graph.whole.of_new_users(self.tables.nodes, self.settings.n_ui_layers, histories)
