"""BM3 (Zhou et al., Bootstrap Latent Representations for Multi-modal Recommendation, WWW 2023; arXiv 2207.05969)."""

from __future__ import annotations

import scipy.sparse as sp
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import distinct, projected
from mirror_grad.parts.graphs import LightPropagation
from mirror_grad.parts.losses import cosine_gap, half_square_sum, unsquared_norms
from mirror_grad.parts.modes import evaluating


class BM3(MultimodalModel):
    """Each side predicts a dropped-out copy of the other, features that of the item and of themselves; no negatives.

        u, i = LightGCN rows, i with its free vector added; x_m = W_m f_m + b_m; x' = dropout(stop(x)), Q linear
        gap(x, y') = 1 - mean cos(Q x, y')
        loss = gap(u, i') + gap(i, u') + cl_weight * sum_m [gap(x_m, i') + gap(x_m, x_m')] + reg_weight * R
        score = (Q u) . (Q i)

    fixed: R = (|U|^2 + |I|^2) / (2 num_items) over all propagated vectors; published: (|U|_F + |I|_F) / num_items.
    An item that occurs twice in a batch has one mask, as published (on the CPU).
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        self.light = LightPropagation(data.interactions.train)
        self.features = projected(data.features, dim, trained=self.settings.train_features)
        self.predictor = nn.Linear(dim, dim)
        for layer in (self.predictor, *(part.linear for part in self.features.values())):
            nn.init.xavier_normal_(layer.weight)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Propagated vectors of all users and, with their free vectors added, of all items."""
        user, item = self.split(self.light(self.tables.nodes, self.settings.n_layers))
        return user, item + self.tables.vectors()[1]

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        all_users, all_items = self.outputs()
        (users, at_user), (items, at_item) = distinct(batch.users), distinct(batch.pos)
        rows = {"user": F.embedding(users, all_users), "item": F.embedding(items, all_items)}
        rows |= {name: part(items) for name, part in self.features.items()}
        place = dict.fromkeys(rows, at_item) | {"user": at_user}
        target = {n: F.embedding(place[n], F.dropout(x.detach(), self.settings.dropout)) for n, x in rows.items()}
        online = {n: F.embedding(place[n], self.predictor(x)) for n, x in rows.items()}

        terms = {"ui": cosine_gap(online["user"], target["item"]), "iu": cosine_gap(online["item"], target["user"])}
        loss = terms["ui"] + terms["iu"]
        for name in self.features:
            terms[f"{name}_item"] = cosine_gap(online[name], target["item"])
            terms[f"{name}_{name}"] = cosine_gap(online[name], target[name])
            loss = loss + self.settings.cl_weight * (terms[f"{name}_item"] + terms[f"{name}_{name}"])
        if self.published:
            terms["reg"] = unsquared_norms(all_users, all_items)
        else:
            terms["reg"] = half_square_sum(all_users, all_items) / len(all_items)
        return {"loss": loss + self.settings.reg_weight * terms["reg"], **terms}

    def factors(self) -> tuple[Tensor, Tensor]:
        user, item = self.outputs()
        return self.predictor(user), self.predictor(item)

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        return self.predictor(self.light.of_new_users(self.tables.nodes, self.settings.n_layers, histories))
