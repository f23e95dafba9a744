"""BPR matrix factorisation (Rendle et al., BPR, UAI 2009)."""

from __future__ import annotations

import torch
from torch import Tensor

from gfml.fused import FusedPairLoss, why_not_fused
from gfml.gravity import Gravity
from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.losses import ranking_terms


class BPR(MultimodalModel):
    """score(u, i) = user_u . item_i; features are not used.

    loss = BPR + reg_weight * R over the batch's vectors; R squared (fixed) or not (published), see
    :func:`mirror_grad.parts.losses.ranking_terms`.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.encoder = self.build_encoder(data, dim)

    def build_encoder(self, data: MultimodalData, dim: int) -> Tables:
        return Tables(self.num_users, self.num_items, dim, init="xavier_normal")

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        rows = self.encoder(batch.users, torch.stack([batch.pos, batch.neg], 1))
        ego = (rows.ego_user, *rows.ego_items.unbind(1))
        vectors, weight = (rows.user, *rows.items.unbind(1)), self.settings.reg_weight
        return ranking_terms(*vectors, ego, weight, published=self.published, rows=batch.weight)

    def loss_by_formula(self) -> FusedLoss | str:
        """:meth:`loss` with gradients by formula, where the vectors are tables on a CPU, or why there is none."""
        unused = Gravity(self.num_users, self.num_items, mass="none")
        weight = self.settings.reg_weight
        # The loops tell the penalty with its weight on, from which 0 cannot be divided out.
        reason = why_not_fused(self.encoder, unused, "bpr", compat=self.published) or ("" if weight else "reg_weight 0")
        return reason or FusedLoss(self.encoder, unused, weight)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.encoder.vectors()


class FusedLoss(FusedPairLoss):
    """The terms of :func:`mirror_grad.parts.losses.ranking_terms`, from :class:`gfml.fused.FusedPairLoss`."""

    def __init__(self, encoder: Tables, unused: Gravity, weight: float) -> None:
        super().__init__(encoder, unused, "bpr", decay=weight)

    def __call__(self, batch: Triples) -> dict[str, Tensor]:
        terms = super().__call__(batch)
        return {"loss": terms["loss"], "bpr": terms["dot"], "reg": terms["emb_reg"] / self.decay}
