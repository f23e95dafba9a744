"""DualGNN (Wang et al., Dual Graph Neural Network for Multimedia Recommendation, TMM 2021)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.sampling import Triples
from gfml.ranking.topk import FactorScorer
from mirror_grad.models import settings
from mirror_grad.parts.branches import mixing_weights, modality_branches
from mirror_grad.parts.graphs import LightPropagation
from mirror_grad.parts.losses import dot_bpr
from mirror_grad.parts.modes import evaluating
from mirror_grad.parts.user_graph import UserGraph

if TYPE_CHECKING:
    from mirror_grad.data import MultimodalData


class DualGNN(nn.Module):
    """A graph network per modality; item = sum_m item_m, user = a + H a with a = sum_m w_um user_m, H the user graph.

        loss = BPR + reg_weight * [sum_m mean P_m[u]^2 + mean w^2]

    published: the users' mix is w_u0 (v + t) + w_u1 t, because the item sum is written into the first branch; BPR in
    bits (/ ln 2); a second set of weights, of items, that nothing reads, is decayed; short neighbour lists are padded.
    Differences from the published code in both: no layers and no dropped items that nothing reads.
    """

    Settings = settings.DualGNN

    def __init__(
        self, data: MultimodalData, settings: settings.DualGNN, *, behaviour: str, embedding_dim: int, seed: int
    ) -> None:
        super().__init__()
        self.settings, self.published = settings, behaviour == "published"
        self.light = LightPropagation(data.interactions.train)
        self.branches = modality_branches(data.features, data.num_users, embedding_dim)
        self.user_weight = mixing_weights(data.num_users, len(self.branches))
        if self.published:
            self.item_weight = mixing_weights(data.num_items, len(self.branches))
        self.user_graph = UserGraph(data.user_graph, settings.user_k, seed, padded=self.published)

    def new_epoch(self, epoch: int) -> None:
        self.user_graph.new_epoch(epoch)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users and all items."""
        users, items = zip(*(self.light.split(branch(self.light)) for branch in self.branches.values()))
        if self.published:
            users = (sum(users), *users[1:])
        mixed = sum(weight[:, None] * user for weight, user in zip(self.user_weight.unbind(1), users))
        return mixed + self.user_graph(mixed), sum(items)

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        user, item = self.outputs()
        rows = F.embedding(batch.users, user), F.embedding(batch.pos, item), F.embedding(batch.neg, item)
        bpr = dot_bpr(*rows, batch.weight)
        terms = {"bpr": bpr / math.log(2) if self.published else bpr}
        for name, branch in self.branches.items():
            terms[f"reg_{name}"] = losses.row_mean(F.embedding(batch.users, branch.preference).square(), batch.weight)
        terms["reg_user"] = self.user_weight.square().mean()
        if self.published:
            terms["reg_item"] = self.item_weight.square().mean()
        reg = sum(value for name, value in terms.items() if name.startswith("reg"))
        return {"loss": terms["bpr"] + self.settings.reg_weight * reg, **terms}

    @evaluating
    def scorer(self) -> FactorScorer:
        return FactorScorer(*self.outputs())
