"""BPR matrix factorisation (Rendle et al., BPR, UAI 2009)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from gfml.ranking.topk import FactorScorer
from mirror_grad.models import settings
from mirror_grad.parts.losses import ranking_terms

if TYPE_CHECKING:
    from mirror_grad.data import MultimodalData


class BPR(nn.Module):
    """score(u, i) = user_u . item_i; features are not used.

    loss = BPR + reg_weight * R over the batch's vectors; R squared (fixed) or not (published), see
    :func:`mirror_grad.parts.losses.ranking_terms`.
    """

    Settings = settings.BPR

    def __init__(
        self, data: MultimodalData, settings: settings.BPR, *, behaviour: str, embedding_dim: int, seed: int
    ) -> None:
        super().__init__()
        self.settings, self.published = settings, behaviour == "published"
        self.encoder = self.build_encoder(data, embedding_dim)

    def build_encoder(self, data: MultimodalData, embedding_dim: int) -> Tables:
        return Tables(data.num_users, data.num_items, embedding_dim, init="xavier_normal")

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        rows = self.encoder(batch.users, torch.stack([batch.pos, batch.neg], 1))
        ego = (rows.ego_user, *rows.ego_items.unbind(1))
        vectors, weight = (rows.user, *rows.items.unbind(1)), self.settings.reg_weight
        return ranking_terms(*vectors, ego, weight, published=self.published, rows=batch.weight)

    def scorer(self) -> FactorScorer:
        user, item = self.encoder.vectors()
        return FactorScorer(user.detach(), item.detach())
