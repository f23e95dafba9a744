"""GRCN (Wei et al., Graph-Refined Convolutional Network for Multimedia Recommendation, MM 2020; arXiv 2111.02036)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import projected
from mirror_grad.parts.graphs import bipartite
from mirror_grad.parts.losses import dot_bpr


class GRCN(MultimodalModel):
    """Preferences routed to by a user's items weight the edges on which id vectors are propagated.

    Per modality X = n(lrelu(W F + b)) and P = n(P), n: rows of length 1. Routing, ``n_layers`` times:
    P <- n(P + sum_i a_ui X_i), a = softmax over the items of u of P_u . X_i. Then once over all edges, both ways:
    out = z + sum_j a_ij z_j for z = [P ; X], a = softmax over the neighbours of i of z_i . z_j.
    Edge i <- j has the weight w = relu(max_m a_ij c_jm) with learned confidences c; the ids: x0 = n(E), x1 = w x0,
    x2 = w x1. Output [x0 + x1 + x2 ; out_v ; out_t].
        loss = BPR + reg_weight * [mean(E_u^2 + E_i^2) + mean P_first^2 + sum_m mean P_m[u]^2]

    published: routing sends messages to items alone, so that it leaves P = n(P).
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        nodes, train = self.num_users + self.num_items, data.interactions.train
        self.to_users = SparseMatrix.from_scipy(train)
        self.edges = SparseMatrix.from_scipy(bipartite(train))
        self.id = nn.Parameter(nn.init.xavier_normal_(torch.empty(nodes, dim)))
        self.confidence = nn.Parameter(nn.init.xavier_normal_(torch.empty(nodes, len(data.features))))
        self.features = projected(data.features, self.settings.latent_embedding, trained=False)
        shape = self.num_users, self.settings.latent_embedding
        self.preference = nn.ParameterDict(
            {name: nn.Parameter(nn.init.xavier_normal_(torch.empty(shape))) for name in self.features}
        )
        for part in self.features.values():
            nn.init.xavier_normal_(part.linear.weight)

    def routed(self, name: str) -> tuple[Tensor, Tensor]:
        """Preferences of the users after routing, and the items' vectors X, of one modality."""
        items = F.normalize(F.leaky_relu(self.features[name]()), dim=1)
        preference = F.normalize(self.preference[name], dim=1)
        for _ in range(0 if self.published else self.settings.n_layers):
            share = self.to_users.row_softmax(self.to_users.dots(preference, items))
            preference = F.normalize(preference + self.to_users(items, share), dim=1)
        return preference, items

    def refined(self, name: str) -> tuple[Tensor, Tensor]:
        """Output of one modality [U + I, latent], and the attention on every directed edge [nnz]."""
        nodes = torch.cat(self.routed(name))
        share = self.edges.row_softmax(self.edges.dots(nodes, nodes))
        return nodes + self.edges(nodes, share), share

    def edge_weights(self, shares: list[Tensor]) -> Tensor:
        """relu of the largest confident attention of each directed edge: [nnz]."""
        source = F.embedding(self.edges.indices, self.confidence)
        return (torch.stack(shares, 1) * source).amax(1).relu()

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users and all items, [., D + latent * modalities]."""
        views, shares = zip(*(self.refined(name) for name in self.features))
        weights = self.edge_weights(list(shares))
        first = F.normalize(self.id, dim=1)
        second = self.edges(first, weights)
        return self.split(torch.cat([first + second + self.edges(second, weights), *views], 1))

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        rows = self.final_rows(batch)
        bpr = dot_bpr(*rows, batch.weight)
        items = torch.cat([batch.pos, batch.neg]) + self.num_users
        ids = [F.embedding(rows, self.id) for rows in (batch.users, items)]
        terms = {"bpr": bpr, "reg_id": sum(losses.row_mean(rows.square(), batch.weight) for rows in ids)}
        terms["reg_all"] = next(iter(self.preference.values())).square().mean()
        for name, preference in self.preference.items():
            terms[f"reg_{name}"] = losses.row_mean(F.embedding(batch.users, preference).square(), batch.weight)
        reg = sum(value for name, value in terms.items() if name.startswith("reg"))
        return {"loss": bpr + self.settings.reg_weight * reg, **terms}
