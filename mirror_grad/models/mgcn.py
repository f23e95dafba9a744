"""MGCN (Yu et al., Multi-View Graph Convolutional Network for Multimedia Recommendation, MM 2023; arXiv 2308.03588)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.encoders import Tables
from gfml.ranking.graph import sum_of_items
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from gfml.ranking.topk import FactorScorer
from mirror_grad.models import settings
from mirror_grad.parts.features import projected
from mirror_grad.parts.fusion import AttentionFusion
from mirror_grad.parts.graphs import LightPropagation, user_block, weighted_item_graph
from mirror_grad.parts.losses import dot_bpr, info_nce
from mirror_grad.parts.modes import evaluating

if TYPE_CHECKING:
    from mirror_grad.data import MultimodalData

TEMPERATURE = 0.2


class MGCN(nn.Module):
    """Item vectors purified by their features, smoothed over item graphs, and fused with the user-item view.

        x_m  = e * sigmoid(gate_m(W_m f_m + b_m)) for the items, smoothed over the graph of m; users: R_hat x_m
        C    = LightGCN rows;  common = attention over the x_m;  s_m = sigmoid(prefer_m(C)) * (x_m - common)
        side = (sum_m s_m + common) / (modalities + 1);  output C + side
        loss = BPR + reg_weight * |batch rows|^2 / (2 B) + cl_loss * [InfoNCE(side_p, C_p) + InfoNCE(side_u, C_u)]

    With one modality its view is the common one, and nothing is specific.
    Difference from the published code: the L2 term is divided by the rows of the batch, there by the configured batch
    size, which differs on the last, shorter batch.
    """

    Settings = settings.MGCN

    def __init__(
        self, data: MultimodalData, settings: settings.MGCN, *, behaviour: str, embedding_dim: int, seed: int
    ) -> None:
        super().__init__()
        self.settings = settings
        self.tables = Tables(data.num_users, data.num_items, embedding_dim)
        train = data.interactions.train
        self.light = LightPropagation(train)
        self.to_users = SparseMatrix.from_scipy(user_block(train))
        self.features = projected(data.features, embedding_dim, trained=settings.train_features)
        graphs = {n: weighted_item_graph(f, settings.knn_k, data.cache_dir) for n, f in data.features.items()}
        self.item_graphs = nn.ModuleDict({name: SparseMatrix.from_scipy(graph) for name, graph in graphs.items()})
        self.gate = nn.ModuleDict({name: nn.Linear(embedding_dim, embedding_dim) for name in graphs})
        self.prefer = nn.ModuleDict({name: nn.Linear(embedding_dim, embedding_dim) for name in graphs})
        self.fusion = AttentionFusion(embedding_dim)

    def of_items(self, name: str) -> Tensor:
        """Items as one modality sees them: [I, D]."""
        items = self.tables.nodes[self.tables.num_users :]
        items = items * self.gate[name](self.features[name]()).sigmoid()
        for _ in range(self.settings.n_layers):
            items = self.item_graphs[name](items)
        return items

    def view(self, name: str) -> Tensor:
        """The same of users and items: [U + I, D]."""
        items = self.of_items(name)
        return torch.cat([self.to_users(items), items])

    def side(self, content: Tensor, views: dict[str, Tensor]) -> Tensor:
        """What the modalities say of nodes, by their content."""
        common, _ = self.fusion(*views.values())
        own = sum(self.prefer[name](content).sigmoid() * (view - common) for name, view in views.items())
        return (own + common) / (len(views) + 1)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """(side, content) of all nodes, [U + I, D] each."""
        content = self.light(self.tables.nodes, self.settings.n_ui_layers)
        return self.side(content, {name: self.view(name) for name in self.features}), content

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        side, content = self.outputs()
        first = self.tables.num_users
        ids = torch.cat([batch.users, first + batch.pos, first + batch.neg])
        final = F.embedding(ids, side + content).chunk(3)
        at = {"user": batch.users, "item": first + batch.pos}
        terms = {"bpr": dot_bpr(*final), "reg": losses.half_mean_square(*final)}
        for name, rows in at.items():
            terms[f"nce_{name}"] = info_nce(side, content, TEMPERATURE, rows)
        contrast = self.settings.cl_loss * (terms["nce_item"] + terms["nce_user"])
        return {"loss": terms["bpr"] + self.settings.reg_weight * terms["reg"] + contrast, **terms}

    @evaluating
    def scorer(self) -> FactorScorer:
        return FactorScorer(*self.light.split(sum(self.outputs())))

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        views = {name: sum_of_items(self.light.graph, self.of_items(name), histories) for name in self.features}
        content = self.light.of_new_users(self.tables.nodes, self.settings.n_ui_layers, histories)
        return self.side(content, views) + content
