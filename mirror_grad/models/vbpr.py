"""VBPR (He and McAuley, AAAI 2016): BPR with projected features beside the free item vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import ProjectedFeatures, distinct
from mirror_grad.parts.losses import ranking_terms


class VBPR(MultimodalModel):
    """score(u, i) = user_u . [item_i ; W f_i + b] with the features f = [text ; image] as they are.

    loss = BPR + reg_weight * R over the batch's users [2D] and whole items [2D], projected part included; R squared
    (fixed) or not (published), see :func:`mirror_grad.parts.losses.ranking_terms`.
    Differences from the paper: no biases, no second, low-rank set of vectors.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.user = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.num_users, 2 * dim)))
        self.item = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.num_items, dim)))
        features = torch.cat([data.features[name] for name in ("text", "image") if name in data.features], 1)
        self.features = ProjectedFeatures(features, dim, trained=False)
        nn.init.xavier_normal_(self.features.linear.weight)
        nn.init.zeros_(self.features.linear.bias)

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        user = F.embedding(batch.users, self.user)
        rows, place = distinct(torch.cat([batch.pos, batch.neg]))
        items = torch.cat([F.embedding(rows, self.item), self.features(rows)], 1)
        pos, neg = F.embedding(place, items).chunk(2)
        vectors, weight = (user, pos, neg), self.settings.reg_weight
        return ranking_terms(*vectors, vectors, weight, published=self.published, rows=batch.weight)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.user, torch.cat([self.item, self.features()], 1)
