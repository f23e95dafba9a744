"""MVGAE (Yi and Chen, Multi-Modal Variational Graph Auto-Encoder for Recommendation Systems, TMM 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import keep
from mirror_grad.parts.gaussian import kl_to_standard, product_of_experts, sample
from mirror_grad.parts.graphs import bipartite, row_mean, with_itself

NOISE = 0.1
Gaussian = tuple[Tensor, Tensor]


class MVGAE(MultimodalModel):
    """Gaussian node vectors from each modality and from a free item table ("collab"), joined by products of experts.

        z ~ N(mu, 0.1^2 var), y = sigmoid(z), score = y_u . y_i of the means
        loss = sum over {fused, each expert} of rec + beta KL,   rec = BPR of y_u . y_p against y_u . y_q

    The image and text experts are joined first, then the collaborative one.
    published: items are looked up in the block of the users; q is the best of all negatives of the batch, so most
    often an item the user likes; both scores pass through a second sigmoid that saturates (the gradient all but
    vanishes); rec is a sum in bits; the free tables stay at their random start. It ranks at random.
    fixed: items are items, q is the triple's negative, one sigmoid, means, natural logarithm, trained tables.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.mean = SparseMatrix.from_scipy(row_mean(with_itself(bipartite(data.interactions.train))))
        keep(self, "collab", nn.init.xavier_normal_(torch.empty(self.num_items, dim)), frozen=self.published)
        widths = {name: table.shape[1] for name, table in data.features.items()} | {"collab": dim}
        self.experts = nn.ModuleDict(
            {
                name: Expert(
                    width, self.num_users, self.settings.latent, dim, self.settings.dropout, frozen=self.published
                )
                for name, width in widths.items()
            }
        )
        for name, table in data.features.items():
            self.register_buffer(f"features_{name}", table.to(torch.get_default_dtype()), persistent=False)

    def distributions(self) -> dict[str, Gaussian]:
        """(mean, log-variance) of all nodes by expert, and "fused"."""
        inputs = {name: self.collab if name == "collab" else getattr(self, f"features_{name}") for name in self.experts}
        found = {name: expert(inputs[name], self.mean) for name, expert in self.experts.items()}
        *modalities, collab = found.values()
        return {"fused": product_of_experts(product_of_experts(*modalities), collab)} | found

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        terms, loss = {}, 0.0
        for name, (mean, log_variance) in self.distributions().items():
            terms[f"rec_{name}"] = self.reconstruction(sample(mean, log_variance, NOISE), batch)
            terms[f"kl_{name}"] = kl_to_standard(mean, log_variance)
            loss = loss + terms[f"rec_{name}"] + self.settings.beta * terms[f"kl_{name}"]
        return {"loss": loss, **terms}

    def reconstruction(self, nodes: Tensor, batch: Triples) -> Tensor:
        """BPR of the positives against their negatives, or against the best negative of the batch. nodes: z [N, D]."""
        first = 0 if self.published else self.num_users
        nodes = nodes.sigmoid()
        user = F.embedding(batch.users, nodes)
        pos = (user * F.embedding(batch.pos + first, nodes)).sum(1)
        neg = F.embedding(batch.neg + first, nodes)
        whole_batch = self.published or self.settings.batch_negatives
        neg = (user @ neg.T).amax(1) if whole_batch else (user * neg).sum(1)
        if self.published:
            return losses.bpr(pos.sigmoid(), neg.sigmoid()) * len(batch) / math.log(2)
        return losses.bpr(pos, neg)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.split(self.distributions()["fused"][0].sigmoid())


class Expert(nn.Module):
    """Encoder of one modality: x = n([P ; W F + b]), one layer, then mean and log-variance [U + I, D].

    conv_k(x) = dropout(n(mean over neighbours and itself of (x W_k) + b_k));  x <- lrelu(g1 lrelu(conv_1 x))
    mean = g4 lrelu(conv_4 x) + lrelu(l4 x);  log-variance = g5 lrelu(conv_5 x) + lrelu(l5 x)
    """

    def __init__(self, width: int, num_users: int, latent: int, dim: int, dropout: float, *, frozen: bool) -> None:
        super().__init__()
        self.dropout = dropout
        keep(self, "preference", nn.init.xavier_normal_(torch.empty(num_users, latent)), frozen=frozen)
        self.project = nn.Linear(width, latent)
        sizes = {"1": latent, "4": dim, "5": dim}
        self.conv = nn.ModuleDict({k: nn.Linear(size, dim, bias=False) for k, size in sizes.items()})
        self.bias = nn.ParameterDict({k: nn.Parameter(torch.zeros(dim)) for k in sizes})
        self.g = nn.ModuleDict({k: nn.Linear(dim, dim) for k in sizes})
        self.own = nn.ModuleDict({k: nn.Linear(dim, dim) for k in ("4", "5")})

    def forward(self, features: Tensor, mean: SparseMatrix) -> Gaussian:
        nodes = F.normalize(torch.cat([self.preference, self.project(features)]), dim=1)
        nodes = F.leaky_relu(self.layer("1", nodes, mean))
        return tuple(self.layer(k, nodes, mean) + F.leaky_relu(self.own[k](nodes)) for k in ("4", "5"))

    def layer(self, k: str, nodes: Tensor, mean: SparseMatrix) -> Tensor:
        convolved = F.normalize(mean(self.conv[k](nodes)) + self.bias[k], dim=1)
        return self.g[k](F.leaky_relu(F.dropout(convolved, self.dropout, self.training)))
