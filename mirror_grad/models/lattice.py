"""LATTICE (Zhang et al., Mining Latent Structures for Multimedia Recommendation, MM 2021; arXiv 2104.09036), sparse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.encoders import Tables
from gfml.ranking.neighbours import nearest_ids
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.features import projected
from mirror_grad.parts.graphs import bipartite, row_mean, weighted_item_graph, with_itself
from mirror_grad.parts.losses import dot_bpr

# A sum of sparse matrices, each with the values it has at the moment.
ItemGraph = list[tuple[SparseMatrix, Tensor]]


class LATTICE(MultimodalModel):
    """Item vectors smoothed over a graph that is learned from the features, added to a collaborative backbone.

        learned_m = cosines of the k nearest items by W_m f_m + b_m;  a = softmax(modal weights)
        S = (1 - lambda) scale(sum_m a_m learned_m) + lambda sum_m a_m frozen_m;  item = backbone item + S^L e / |S^L e|
        loss = BPR + reg_weight * |batch rows|^2 / (2 B)

    scale divides by the roots of the row sums at both ends. The gradient reaches the projections through the cosines
    of the chosen pairs. A graph has k entries a row and modality: nothing is dense in items twice.

    fixed: the graph is rebuilt with gradient every ``rebuild_every`` batches, in both halves of a mirrored one; in
    between it is constant. published: rebuilt at the first batch of an epoch only, without gradient in its second half.
    Difference from the published code: the L2 term is divided by the rows of the batch.
    """

    # See gfml.engine.capture.
    host_state = "LATTICE counts batches to know when to rebuild its item graph"

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        self.adjacency = SparseMatrix.from_scipy(row_mean(with_itself(bipartite(data.interactions.train))))
        self.features = projected(data.features, self.settings.feat_embed_dim, trained=self.settings.train_features)
        frozen = {n: weighted_item_graph(f, self.settings.knn_k, data.cache_dir) for n, f in data.features.items()}
        self.frozen = nn.ModuleDict({name: SparseMatrix.from_scipy(graph) for name, graph in frozen.items()})
        self.modal_weight = nn.Parameter(torch.full((len(data.features),), 0.5))
        layers = self.settings.n_ui_layers if self.settings.cf_model == "ngcf" else 0
        self.sums, self.products = (nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers)) for _ in range(2))
        self.new_epoch(0)

    def new_epoch(self, epoch: int) -> None:
        """Count batches anew; the first of an epoch rebuilds the item graph."""
        self._batch, self._number, self._kept = None, -1, None

    def item_graph(self) -> ItemGraph:
        """S from the live parameters, with gradient."""
        share = dict(zip(self.features, self.modal_weight.softmax(0)))
        frozen = self.settings.lambda_coeff
        parts = [(self.frozen[name], frozen * share[name] * self.frozen[name].values) for name in share if frozen]
        if frozen < 1:
            graph, values = self.learned_graph(share)
            parts.append((graph, (1 - frozen) * values))
        return parts

    def learned_graph(self, share: dict[str, Tensor]) -> tuple[SparseMatrix, Tensor]:
        """scale(sum_m a_m learned_m) with gradient to the projections and the modal weights."""
        columns, cosines = [], []
        for name, weight in share.items():
            unit = F.normalize(self.features[name](), dim=1)
            ids = nearest_ids(unit, self.settings.knn_k)
            columns.append(ids)
            cosines.append(weight * (unit[:, None, :] * F.embedding(ids, unit)).sum(2))
        columns, cosines = torch.cat(columns, 1), torch.cat(cosines, 1)
        rows = torch.arange(len(columns), device=columns.device).repeat_interleave(columns.shape[1])
        graph = SparseMatrix(rows, columns.flatten(), cosines.detach().flatten(), (len(columns), len(columns)))
        total = cosines.sum(1)
        scale = torch.where(total > 0, total.clamp_min(1e-12), torch.inf).rsqrt()
        values = scale[rows] * cosines.flatten() * scale[columns.flatten()]
        return graph, values[graph.order]

    def backbone(self) -> Tensor:
        """Collaborative vectors of users, then items: [U + I, D]."""
        layer = self.tables.nodes
        if self.settings.cf_model == "mf":
            return layer
        total = layer
        for depth in range(self.settings.n_ui_layers):
            side = self.adjacency(layer)
            if self.settings.cf_model == "lightgcn":
                layer = side
                total = total + layer
                continue
            layer = F.leaky_relu(self.sums[depth](side)) + F.leaky_relu(self.products[depth](layer * side))
            layer = F.dropout(layer, self.settings.mess_dropout, self.training)
            total = total + F.normalize(layer, dim=1)
        return total / (self.settings.n_ui_layers + 1)

    def outputs(self, item_graph: ItemGraph | None = None) -> tuple[Tensor, Tensor]:
        """Final vectors of all users and all items; without an item graph, by that of the live parameters."""
        item_graph = self.item_graph() if item_graph is None else item_graph
        user, item = self.split(self.backbone())
        smooth = self.tables.nodes[self.num_users :]
        for _ in range(self.settings.n_layers):
            smooth = sum(graph(smooth, values) for graph, values in item_graph)
        return user, item + F.normalize(smooth, dim=1)

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        if self._must_rebuild(batch):
            item_graph = self.item_graph()
            self._kept = [(graph, values.detach()) for graph, values in item_graph]
        else:
            item_graph = self._kept
        user, item = self.outputs(item_graph)
        rows = F.embedding(batch.users, user), F.embedding(batch.pos, item), F.embedding(batch.neg, item)
        bpr, reg = dot_bpr(*rows), losses.half_mean_square(*rows)
        return {"loss": bpr + self.settings.reg_weight * reg, "bpr": bpr, "reg": reg}

    def _must_rebuild(self, batch: Triples) -> bool:
        """Whether this batch learns the item graph, or uses that of an earlier one as a constant."""
        again = batch is self._batch
        if not again:
            self._batch, self._number = batch, self._number + 1
        if self.published:
            return self._number == 0 and not again
        return self._number % self.settings.rebuild_every == 0
