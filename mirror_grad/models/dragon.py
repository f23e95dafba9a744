"""DRAGON (Zhou et al., Enhancing Dyadic Relations with Homogeneous Graphs, ECAI 2023; arXiv 2301.12097)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from gfml.ranking.topk import FactorScorer
from mirror_grad.models import settings
from mirror_grad.parts.branches import mixing_weights, modality_branches
from mirror_grad.parts.graphs import LightPropagation, mixed_item_graph
from mirror_grad.parts.losses import dot_bpr
from mirror_grad.parts.modes import evaluating
from mirror_grad.parts.user_graph import UserGraph

if TYPE_CHECKING:
    from mirror_grad.data import MultimodalData


class DRAGON(nn.Module):
    """DualGNN's branches side by side: z_i = [v_i ; t_i], z_u = [w_u0 v_u ; w_u1 t_u].

        item = z_i + S^L z_i, user = z_u + H z_u;  S: mean over nearest items, images and texts mixed; H: user graph
        loss = BPR + reg_weight * [sum_m mean P_m[u]^2 + mean w^2]

    published: BPR in bits (/ ln 2); short neighbour lists of users are padded.
    Difference from the published code in both: it holds a trainable copy of the features and two projections that no
    loss reaches, 33 million dead numbers on baby; they are left out.
    """

    Settings = settings.DRAGON

    def __init__(
        self, data: MultimodalData, settings: settings.DRAGON, *, behaviour: str, embedding_dim: int, seed: int
    ) -> None:
        super().__init__()
        self.settings, self.published = settings, behaviour == "published"
        self.light = LightPropagation(data.interactions.train)
        self.branches = modality_branches(data.features, data.num_users, embedding_dim)
        self.user_weight = mixing_weights(data.num_users, len(self.branches))
        mixed = mixed_item_graph(data.features, settings.knn_k, settings.mm_image_weight, data.cache_dir)
        self.item_graph = SparseMatrix.from_scipy(mixed)
        self.user_graph = UserGraph(data.user_graph, settings.user_k, seed, padded=self.published)

    def new_epoch(self, epoch: int) -> None:
        self.user_graph.new_epoch(epoch)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users and all items, [., D * modalities]."""
        users, items = zip(*(self.light.split(branch(self.light)) for branch in self.branches.values()))
        user = torch.cat([weight[:, None] * part for weight, part in zip(self.user_weight.unbind(1), users)], 1)
        item = smooth = torch.cat(items, 1)
        for _ in range(self.settings.n_mm_layers):
            smooth = self.item_graph(smooth)
        return user + self.user_graph(user), item + smooth

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        user, item = self.outputs()
        rows = F.embedding(batch.users, user), F.embedding(batch.pos, item), F.embedding(batch.neg, item)
        bpr = dot_bpr(*rows, batch.weight)
        terms = {"bpr": bpr / math.log(2) if self.published else bpr}
        for name, branch in self.branches.items():
            terms[f"reg_{name}"] = losses.row_mean(F.embedding(batch.users, branch.preference).square(), batch.weight)
        terms["reg_user"] = self.user_weight.square().mean()
        reg = sum(value for name, value in terms.items() if name.startswith("reg"))
        return {"loss": terms["bpr"] + self.settings.reg_weight * reg, **terms}

    @evaluating
    def scorer(self) -> FactorScorer:
        return FactorScorer(*self.outputs())
