"""SelfCF with edge dropout on LightGCN (Zhou et al., SelfCF, TORS 2023; arXiv 2107.03019)."""

from __future__ import annotations

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.graphs import LightPropagation
from mirror_grad.parts.losses import cosine_gap, half_square_sum
from mirror_grad.parts.modes import evaluating


class SELFCFED_LGN(MultimodalModel):
    """Predicts a dropped-out copy of the other side's vector: no negatives.

        loss = -mean cos(Q u, stop(i'))/2 - mean cos(Q i, stop(u'))/2 + reg_weight * R(u, i),   x' = dropout(x)

    u, i: rows of LightGCN on A_hat whose entries fall independently with a rate drawn from U(0, 1) for every batch.
    score = (Q u) . i + u . (Q i), from the whole graph.
    fixed: R is half the mean square over the batch; published: half the sum, which outweighs the rest.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        self.light = LightPropagation(data.interactions.train)
        self.predictor = nn.Linear(dim, dim)

    def edge_values(self) -> Tensor:
        """Entries of A_hat, each kept with probability 1 - r and divided by it; r ~ U(0, 1) anew for every call."""
        values = self.light.values
        rate = torch.rand((), device=values.device, dtype=values.dtype)
        return torch.where(torch.rand_like(values) >= rate, values / (1.0 - rate), 0.0)

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        ids = torch.cat([batch.users, self.num_users + batch.pos])
        rows = self.light.at(ids, self.tables.nodes, self.settings.n_layers, values=self.edge_values())
        user, item = rows.chunk(2)
        user_target, item_target = (F.dropout(x.detach(), self.settings.dropout) for x in (user, item))
        cos_ui = 0.5 * (cosine_gap(self.predictor(user), item_target) - 1.0)
        cos_iu = 0.5 * (cosine_gap(self.predictor(item), user_target) - 1.0)
        reg = half_square_sum(user, item) if self.published else losses.half_mean_square(user, item)
        loss = cos_ui + cos_iu + self.settings.reg_weight * reg
        return {"loss": loss, "cos_ui": cos_ui, "cos_iu": cos_iu, "reg": reg}

    def outputs(self) -> tuple[Tensor, Tensor]:
        user, item = self.split(self.light(self.tables.nodes, self.settings.n_layers))
        return torch.cat([self.predictor(user), user], 1), torch.cat([item, self.predictor(item)], 1)

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        user = self.light.of_new_users(self.tables.nodes, self.settings.n_layers, histories)
        return torch.cat([self.predictor(user), user], 1)
