"""LayerGCN (Zhou et al., ICDE 2023): propagation refined by the likeness of each layer to the free vectors."""

from __future__ import annotations

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml import losses
from gfml.ranking.encoders import Tables
from gfml.ranking.graph import sum_of_items
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.graphs import ThinnedGraph, wanted_rows
from mirror_grad.parts.losses import dot_bpr, half_square_sum
from mirror_grad.parts.modes import evaluating
from mirror_grad.parts.refine import refined


class LayerGCN(MultimodalModel):
    """E_l = cos(A_hat E_{l-1}, E_0) * A_hat E_{l-1} row by row; output E_1 + ... + E_L, without the free vectors E_0.

    Training leaves out a share ``dropout`` of the edges, drawn anew every epoch: by degree in odd epochs, alike in
    even ones. fixed: BPR and L2 are means over the batch; published: sums, so that the step depends on its size.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        train = data.interactions.train
        self.graph = ThinnedGraph(train, self.settings.dropout, self.seed, alternate=True, truncate=self.published)

    def new_epoch(self, epoch: int) -> None:
        self.graph.new_epoch(epoch)

    def nodes(self, rows: Tensor | None = None) -> Tensor:
        """Final vectors of users, then items: [U + I, D]; or of ``rows`` [n] alone, which take the last layer only there."""
        light, free, depth = self.graph(), self.tables.nodes, self.settings.n_layers
        layer, total = free, torch.zeros_like(free)
        for _ in range(depth if rows is None else depth - 1):
            layer = refined(light(layer, 1, combine="final"), free)
            total = total + layer
        if rows is None:
            return total
        total = F.embedding(rows, total)
        return total + refined(light(layer, 1, rows=rows, combine="final"), F.embedding(rows, free)) if depth else total

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        ids = torch.cat([batch.users, self.num_users + batch.pos, self.num_users + batch.neg])
        rows, place = wanted_rows(ids)
        final = F.embedding(place, self.nodes(rows)).chunk(3)
        ego = self.node_rows(batch, self.tables.nodes)
        bpr = dot_bpr(*final, batch.weight)
        reg = losses.half_mean_square(*ego, weight=batch.weight)
        if self.published:
            bpr, reg = bpr * len(batch), half_square_sum(*ego)
        return {"loss": bpr + self.settings.reg_weight * reg, "bpr": bpr, "reg": reg}

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.split(self.nodes())

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        light, layer, total = self.graph.whole, self.tables.nodes, 0.0
        own = None  # in place of the free vector that a new user lacks: his first layer
        for _ in range(self.settings.n_layers):
            user = sum_of_items(light.graph, layer[light.num_users :], histories)
            own = user if own is None else own
            total = total + F.cosine_similarity(user, own, dim=1)[:, None] * user
            layer = refined(light(layer, 1, combine="final"), self.tables.nodes)
        return total
