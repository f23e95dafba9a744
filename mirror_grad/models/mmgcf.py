"""MMGCF: LightGCN with multimodal item inputs (UMAP 2026)."""

from __future__ import annotations

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import projected
from mirror_grad.parts.graphs import ThinnedGraph
from mirror_grad.parts.losses import dot_bpr
from mirror_grad.parts.modes import evaluating


class MMGCF(MultimodalModel):
    """Item inputs join the free vector and the projected features; LightGCN over a graph thinned by degree every epoch.

        equal       x = join(e, join_m(W_m f_m + b_m))
        alpha       x = join(s e, (1 - s) join_m(.)),  s a learned share
        normalized  x = join(M n(e), n(W_m f_m + b_m), ...),  n: rows of length 1, M modalities

    join: mean, sum, or concatenation (then users are as wide as items).
    loss = BPR + reg_weight * |final rows|^2 / (2 B).
    Written from a description of the method, without numbers of the published code to compare with; the width of the
    users under concatenation is our reading.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.graph = ThinnedGraph(data.interactions.train, self.settings.dropout, self.seed)
        self.features = projected(data.features, dim, trained=False)
        wide = dim * (1 + len(self.features)) if self.settings.fusion == "concat" else dim
        self.user = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.num_users, wide)))
        self.item = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.num_items, dim)))
        if self.settings.weighting == "alpha":
            self.share = nn.Parameter(torch.zeros(()))

    def new_epoch(self, epoch: int) -> None:
        self.graph.new_epoch(epoch)

    def join(self, *parts: Tensor) -> Tensor:
        """One [I, ...] of several."""
        if self.settings.fusion == "concat":
            return torch.cat(parts, 1)
        return sum(parts) / (len(parts) if self.settings.fusion == "mean" else 1)

    def items(self) -> Tensor:
        """Item inputs of the propagation."""
        modal = [part() for part in self.features.values()]
        if self.settings.weighting == "normalized":
            own = len(modal) * F.normalize(self.item, dim=1)
            return self.join(own, *(F.normalize(part, dim=1) for part in modal))
        if self.settings.weighting == "alpha":
            share = self.share.sigmoid()
            return self.join(share * self.item, (1 - share) * self.join(*modal))
        return self.join(self.item, self.join(*modal))

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        ids = torch.cat([batch.users, self.num_users + batch.pos, self.num_users + batch.neg])
        rows = self.graph().at(ids, torch.cat([self.user, self.items()]), self.settings.n_layers).chunk(3)
        bpr, reg = dot_bpr(*rows, batch.weight), losses.half_mean_square(*rows, weight=batch.weight)
        return {"loss": bpr + self.settings.reg_weight * reg, "bpr": bpr, "reg": reg}

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.split(self.graph()(torch.cat([self.user, self.items()]), self.settings.n_layers))

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        nodes = torch.cat([self.user, self.items()])
        return self.graph.whole.of_new_users(nodes, self.settings.n_layers, histories)
