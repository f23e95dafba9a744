"""MMGCN (Wei et al., Multi-modal Graph Convolution Network for Personalized Recommendation of Micro-video, MM 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import distinct, keep
from mirror_grad.parts.graphs import bipartite, row_mean
from mirror_grad.parts.losses import dot_bpr

PUBLISHED_LAYERS = 3


class MMGCN(MultimodalModel):
    """The mean over modalities of graph networks that share an id table.

    loss = BPR + reg_weight * [mean(ID_u^2 + ID_i^2 over the batch) + mean P_first^2].
    published: ids and preferences stay at their random start (they are part of the checkpoint all the same), three
    layers, concatenation. fixed: they are trained.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        published = self.published
        self.mean = SparseMatrix.from_scipy(row_mean(bipartite(data.interactions.train)))
        start = nn.init.xavier_normal_(torch.empty(self.num_users + self.num_items, dim))
        keep(self, "id", start, frozen=published)
        layers, concat = (PUBLISHED_LAYERS, True) if published else (self.settings.n_layers, self.settings.concat)
        self.branches = nn.ModuleDict()
        for name, features in data.features.items():
            latent = self.settings.image_latent if name == "image" else None
            how = {"layers": layers, "concat": concat, "frozen": published}
            self.branches[name] = Branch(features, self.num_users, dim, latent, **how)

    def nodes(self, rows: Tensor | None = None) -> Tensor:
        """Final vectors of all nodes, or of these alone: [U + I, D] or [n, D]."""
        return sum(branch(self.mean, self.id, rows) for branch in self.branches.values()) / len(self.branches)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.split(self.nodes())

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        items = torch.cat([batch.pos, batch.neg]) + self.num_users
        rows, place = distinct(torch.cat([batch.users, items]))
        bpr = dot_bpr(*F.embedding(place, self.nodes(rows)).chunk(3), batch.weight)
        ids = [F.embedding(rows, self.id) for rows in (batch.users, items)]
        reg_id = sum(losses.row_mean(rows.square(), batch.weight) for rows in ids)
        reg_pref = next(iter(self.branches.values())).preference.square().mean()
        loss = bpr + self.settings.reg_weight * (reg_id + reg_pref)
        return {"loss": loss, "bpr": bpr, "reg_id": reg_id, "reg_pref": reg_pref}


class Branch(nn.Module):
    """One modality: x = n([P ; G]), then in every layer

        h = lrelu((M x) W), z = lrelu(A x + a) + ID;   x <- lrelu(G [h ; z] + b)   or, added, lrelu(G h + b + z)

    M: mean over neighbours. features [I, width] as they are, or projected to ``latent``. Returns [U + I, D].
    """

    def __init__(
        self, features: Tensor, num_users: int, dim: int, latent: int | None, *, layers: int, concat: bool, frozen: bool
    ) -> None:
        super().__init__()
        self.concat = concat
        self.register_buffer("features", features.to(torch.get_default_dtype()), persistent=False)
        width = latent or features.shape[1]
        self.project = nn.Linear(features.shape[1], latent) if latent else nn.Identity()
        keep(self, "preference", nn.init.xavier_normal_(torch.empty(num_users, width)), frozen=frozen)
        widths = [width] + [dim] * (layers - 1)
        self.message = nn.ModuleList(nn.Linear(size, size, bias=False) for size in widths)
        self.own = nn.ModuleList(nn.Linear(size, dim) for size in widths)
        self.join = nn.ModuleList(nn.Linear(size + dim if concat else size, dim) for size in widths)
        for layer in (*self.message, *self.own, self.join[0]):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, mean: SparseMatrix, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """With rows int64 [n] the last layer is computed only there: [n, D]."""
        nodes = F.normalize(torch.cat([self.preference, self.project(self.features)]), dim=1)
        for message, own, join in zip(self.message, self.own, self.join):
            # The mean comes first: where nothing below the first layer is trained, it then needs no gradient.
            if rows is None or join is not self.join[-1]:
                near = mean(nodes)
            else:
                near, nodes, ids = mean.at(rows, nodes), F.embedding(rows, nodes), F.embedding(rows, ids)
            neighbours = F.leaky_relu(message(near))
            itself = F.leaky_relu(own(nodes)) + ids
            if self.concat:
                nodes = F.leaky_relu(join(torch.cat([neighbours, itself], 1)))
            else:
                nodes = F.leaky_relu(join(neighbours) + itself)
        return nodes
