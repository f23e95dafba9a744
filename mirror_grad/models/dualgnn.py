"""DualGNN (Wang et al., Dual Graph Neural Network for Multimedia Recommendation, TMM 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.graphs import LightPropagation
from mirror_grad.parts.losses import dot_bpr
from mirror_grad.parts.user_graph import UserGraph

HIDDEN = 256


class DualGNN(MultimodalModel):
    """A graph network per modality; item = sum_m item_m, user = a + H a with a = sum_m w_um user_m, H the user graph.

        loss = BPR + reg_weight * [sum_m mean P_m[u]^2 + mean w^2]

    published: the users' mix is w_u0 (v + t) + w_u1 t, because the item sum is written into the first branch; BPR in
    bits (/ ln 2); a second set of weights, of items, that nothing reads, is decayed; short neighbour lists are padded.
    Differences from the published code in both: no layers and no dropped items that nothing reads.
    """

    # Whether the published code decays weights of the items too.
    decays_items = True

    def build(self, data: MultimodalData, dim: int) -> None:
        self.light = LightPropagation(data.interactions.train)
        self.branches = nn.ModuleDict({n: Branch(f, self.num_users, dim) for n, f in data.features.items()})
        self.user_weight = mixing_weights(self.num_users, len(self.branches))
        if self.published and self.decays_items:
            self.item_weight = mixing_weights(self.num_items, len(self.branches))
        self.user_graph = UserGraph(data.user_graph, self.settings.user_k, self.seed, padded=self.published)

    def new_epoch(self, epoch: int) -> None:
        self.user_graph.new_epoch(epoch)

    def views(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Users and items as each modality sees them: [U, D] and [I, D] each."""
        users, items = zip(*(self.split(branch(self.light)) for branch in self.branches.values()))
        return users, items

    def joined(self) -> tuple[Tensor, Tensor]:
        """The users' mixes before the user graph, and the final vectors of the items."""
        users, items = self.views()
        if self.published:
            users = (sum(users), *users[1:])
        return sum(weight[:, None] * user for weight, user in zip(self.user_weight.unbind(1), users)), sum(items)

    def outputs(self) -> tuple[Tensor, Tensor]:
        user, item = self.joined()
        return user + self.user_graph(user), item

    def final_rows(self, batch: Triples) -> tuple[Tensor, Tensor, Tensor]:
        user, item = self.joined()
        users = F.embedding(batch.users, user) + self.user_graph(user, batch.users)
        return users, F.embedding(batch.pos, item), F.embedding(batch.neg, item)

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        rows = self.final_rows(batch)
        bpr = dot_bpr(*rows, batch.weight)
        terms = {"bpr": bpr / math.log(2) if self.published else bpr}
        for name, branch in self.branches.items():
            terms[f"reg_{name}"] = losses.row_mean(F.embedding(batch.users, branch.preference).square(), batch.weight)
        terms["reg_user"] = self.user_weight.square().mean()
        if self.published and self.decays_items:
            terms["reg_item"] = self.item_weight.square().mean()
        reg = sum(value for name, value in terms.items() if name.startswith("reg"))
        return {"loss": terms["bpr"] + self.settings.reg_weight * reg, **terms}


class Branch(nn.Module):
    """x = n([P ; W2 lrelu(W1 F)]), output x + A_hat x + A_hat^2 x; n makes rows of length 1.

    P [U, D]: the users' preferences, free. features [I, width], fixed. Returns [U + I, D], users first.
    """

    def __init__(self, features: Tensor, num_users: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", features.to(torch.get_default_dtype()), persistent=False)
        self.preference = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_users, dim)))
        self.mlp = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, dim))

    def forward(self, light: LightPropagation) -> Tensor:
        nodes = F.normalize(torch.cat([self.preference, self.mlp(self.features)]), dim=1)
        return light(nodes, 2, combine="sum")


def mixing_weights(count: int, modalities: int) -> nn.Parameter:
    """Free weights [count, modalities] that start as a softmax of Xavier-normal noise."""
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(count, modalities)).softmax(1))
