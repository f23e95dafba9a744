"""PGL (Yu et al., Mind Individual Information! Principal Graph Learning for Multimedia Recommendation, AAAI 2025)."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from gfml.ranking.sampling import Triples, seeded_generator
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import projected
from mirror_grad.parts.graphs import ThinnedGraph, bipartite, mixed_item_graph, symmetric
from mirror_grad.parts.losses import dot_bpr, info_nce
from mirror_grad.parts.modes import evaluating

TEMPERATURE = 0.2


class PGL(MultimodalModel):
    """Items are their projected features side by side, n(W_m f_m + b_m); users have a table per modality.

        item = propagated item + S^L item,  S = mean over the k nearest items, images and texts mixed
        loss = BPR + reg_weight * mean over users and items of InfoNCE(dropout(x), dropout(x))

    Training propagates over a sub-graph, evaluation over the whole graph. local: edges drawn by degree every epoch.
    global: A_hat of the largest singular triplets, kept as factors; the published code drops its small entries and
    weights the triplets otherwise, which takes a dense [N, N].
    Written from a description of the method, without numbers of the published code to compare with.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        train, local = data.interactions.train, self.settings.mode == "local"
        self.graph = ThinnedGraph(train, self.settings.dropout if local else 0.0, self.seed)
        if not local:
            for name, factor in zip(("left", "right"), principal_factors(train, self.settings.rank)):
                self.register_buffer(name, factor, persistent=False)
        self.features = projected(data.features, dim, trained=self.settings.train_features)
        width = dim * len(self.features)
        self.user = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.num_users, width)))
        mixed = mixed_item_graph(data.features, self.settings.knn_k, self.settings.mm_image_weight, data.cache_dir)
        self.item_graph = SparseMatrix.from_scipy(mixed)

    def new_epoch(self, epoch: int) -> None:
        self.graph.new_epoch(epoch)

    def items(self) -> Tensor:
        """Item inputs: [I, D * modalities]."""
        return torch.cat([F.normalize(part(), dim=1) for part in self.features.values()], 1)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users and all items."""
        items = smooth = self.items()
        for _ in range(self.settings.n_mm_layers):
            smooth = self.item_graph(smooth)
        if self.training and self.settings.mode == "global":
            user, item = self.low_rank(self.user, items)
        else:
            nodes = torch.cat([self.user, items])
            user, item = self.split(self.graph()(nodes, self.settings.n_ui_layers))
        return user, item + smooth

    def low_rank(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of layers 0..L under the low-rank A_hat = [[0, left right^T], [right left^T, 0]]."""
        users, items = user, item
        for _ in range(self.settings.n_ui_layers):
            user, item = self.left @ (self.right.T @ item), self.right @ (self.left.T @ user)
            users, items = users + user, items + item
        return users / (self.settings.n_ui_layers + 1), items / (self.settings.n_ui_layers + 1)

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        rows = self.final_rows(batch)
        terms = {"bpr": dot_bpr(*rows)}
        loss = terms["bpr"]
        if self.settings.reg_weight:
            drop = self.settings.feature_dropout
            pairs = [(F.dropout(x, drop), F.dropout(x, drop)) for x in rows[:2]]
            terms["nce"] = sum(info_nce(*pair, TEMPERATURE) for pair in pairs) / 2
            loss = loss + self.settings.reg_weight * terms["nce"]
        return {"loss": loss, **terms}

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        nodes = torch.cat([self.user, self.items()])
        return self.graph.whole.of_new_users(nodes, self.settings.n_ui_layers, histories)


def principal_factors(train: sp.csr_array, rank: int) -> tuple[Tensor, Tensor]:
    """(left [U, k], right [I, k]): left right^T is the best rank-k part of R_hat, k below its smaller side."""
    normalised = symmetric(bipartite(train))[: train.shape[0], train.shape[0] :]
    rank = min(rank, min(train.shape) - 1)
    start = torch.rand(min(train.shape), generator=seeded_generator("cpu", 0), dtype=torch.float64).numpy()
    left, values, right = svds(normalised, k=rank, v0=start)
    root = np.sqrt(values)
    factors = (torch.from_numpy(np.ascontiguousarray(factor)) for factor in (left * root, right.T * root))
    return tuple(factor.to(torch.get_default_dtype()) for factor in factors)
