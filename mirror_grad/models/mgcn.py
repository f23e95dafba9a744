"""MGCN (Yu et al., Multi-View Graph Convolutional Network for Multimedia Recommendation, MM 2023; arXiv 2308.03588)."""

from __future__ import annotations

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.encoders import Tables
from gfml.ranking.graph import sum_of_items
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import distinct, projected
from mirror_grad.parts.fusion import AttentionFusion
from mirror_grad.parts.graphs import LightPropagation, weighted_item_graph
from mirror_grad.parts.losses import dot_bpr, info_nce
from mirror_grad.parts.modes import evaluating

TEMPERATURE = 0.2


class MGCN(MultimodalModel):
    """Item vectors purified by their features, smoothed over item graphs, and fused with the user-item view.

        x_m  = e * sigmoid(gate_m(W_m f_m + b_m)) for the items, smoothed over the graph of m; users: R_hat x_m
        C    = LightGCN rows;  common = attention over the x_m;  s_m = sigmoid(prefer_m(C)) * (x_m - common)
        side = (sum_m s_m + common) / (modalities + 1);  output C + side
        loss = BPR + reg_weight * |batch rows|^2 / (2 B) + cl_loss * [InfoNCE(side_p, C_p) + InfoNCE(side_u, C_u)]

    With one modality its view is the common one, and nothing is specific.
    Difference from the published code: the L2 term is divided by the rows of the batch, there by the configured batch
    size, which differs on the last, shorter batch.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        k = self.settings.knn_k
        self.build_views(data, dim, {n: weighted_item_graph(f, k, data.cache_dir) for n, f in data.features.items()})
        self.build_gates(dim)
        self.fusion = AttentionFusion(dim)

    def build_views(self, data: MultimodalData, dim: int, graphs: dict[str, sp.csr_array]) -> None:
        """Tables, projected features, the user-item graph, and an item graph for each view."""
        self.tables = Tables(self.num_users, self.num_items, dim)
        self.light = LightPropagation(data.interactions.train)
        self.features = projected(data.features, dim, trained=self.settings.train_features)
        self.item_graphs = nn.ModuleDict({name: SparseMatrix.from_scipy(graph) for name, graph in graphs.items()})

    def build_gates(self, dim: int) -> None:
        """What purifies the items of each view, and what is preferred of it."""
        self.gate = nn.ModuleDict({name: nn.Linear(dim, dim) for name in self.item_graphs})
        self.prefer = nn.ModuleDict({name: nn.Linear(dim, dim) for name in self.item_graphs})

    def content(self) -> dict[str, Tensor]:
        """The features of each view: [I, D] each."""
        return {name: part() for name, part in self.features.items()}

    def of_items(self) -> dict[str, Tensor]:
        """Items as each view sees them: [I, D] each."""
        ids, views = self.tables.nodes[self.num_users :], {}
        for name, rows in self.content().items():
            items = ids * self.gate[name](rows).sigmoid()
            for _ in range(self.settings.n_layers):
                items = self.item_graphs[name](items)
            views[name] = items
        return views

    def views(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """The same of users and items, or of these nodes alone: [U + I, D] or [n, D] each."""
        # No user has a vector before his items are summed, and no item is changed by users who have none.
        nodes = {name: F.pad(items, (0, 0, self.num_users, 0)) for name, items in self.of_items().items()}
        return {name: self.light(part, 1, rows=rows, combine="sum") for name, part in nodes.items()}

    def side(self, ids: Tensor, views: dict[str, Tensor]) -> Tensor:
        """What the modalities say of nodes, by their propagated ids."""
        common, _ = self.fusion(*views.values())
        own = sum(self.prefer[name](ids).sigmoid() * (view - common) for name, view in views.items())
        return (own + common) / (len(views) + 1)

    def sides(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(what the modalities say, propagated ids) of all nodes, or of these alone: [U + I, D] or [n, D] each."""
        ids = self.light(self.tables.nodes, self.settings.n_ui_layers, rows=rows)
        return self.side(ids, self.views(rows)), ids

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.split(sum(self.sides()))

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        rows, place = distinct(torch.cat([batch.users, self.num_users + batch.pos, self.num_users + batch.neg]))
        # Elsewhere than on the CPU all nodes cost less than learning how many entries those of the batch have.
        rows, place = (rows, place) if rows.device.type == "cpu" else (None, rows)
        side, ids = self.sides(rows)
        final = F.embedding(place, side + ids).chunk(3)
        terms = {"bpr": dot_bpr(*final), "reg": losses.half_mean_square(*final)}
        for name, part in zip(("user", "item"), place.chunk(3)):
            terms[f"nce_{name}"] = info_nce(side, ids, TEMPERATURE, part)
        contrast = self.settings.cl_loss * (terms["nce_item"] + terms["nce_user"])
        return {"loss": terms["bpr"] + self.settings.reg_weight * terms["reg"] + contrast, **terms}

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        views = {name: sum_of_items(self.light.graph, items, histories) for name, items in self.of_items().items()}
        ids = self.light.of_new_users(self.tables.nodes, self.settings.n_ui_layers, histories)
        return self.side(ids, views) + ids
