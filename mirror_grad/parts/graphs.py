"""Operators on users and items: normalisations of the train graph, its thinning, item graphs, the user-user graph.

Matrices are scipy's until a model puts them into a :class:`gfml.ranking.sparse.SparseMatrix`; nothing here is dense in users or
items twice. Repeated pairs of a train matrix that counts them weigh as often as they occur; the data of this project
holds each pair once, and then symmetric() is LightGCN's A_hat.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.data.interactions import csr_from_pairs, pairs_from_csr
from gfml.ranking.graph import Graph, build_graph, propagate, propagated
from gfml.ranking.neighbours import nearest_rows
from gfml.ranking.sampling import seeded_generator


def bipartite(train: sp.csr_array) -> sp.csr_array:
    """[[0, R], [R^T, 0]] for R [U, I]: nodes are users, then items."""
    return sp.block_array([[None, train], [train.T, None]], format="csr").astype(np.float64)


def with_itself(adjacency: sp.csr_array) -> sp.csr_array:
    """A + I."""
    return (adjacency + sp.eye_array(adjacency.shape[0])).tocsr()


def symmetric(adjacency: sp.csr_array) -> sp.csr_array:
    """D^(-1/2) A D^(-1/2) with the row sums D; a node without edges has a zero row.

    Difference from the published code: that adds 1e-7 to the degrees where it does not treat zero otherwise.
    """
    scale = sp.diags_array(_power(adjacency.sum(1), -0.5))
    return (scale @ adjacency @ scale).tocsr()


def row_mean(adjacency: sp.csr_array) -> sp.csr_array:
    """D^(-1) A: the mean over neighbours; rows sum to 1, or to 0 where there is no neighbour."""
    return (sp.diags_array(_power(adjacency.sum(1), -1.0)) @ adjacency).tocsr()


def _power(sums: np.ndarray, exponent: float) -> np.ndarray:
    """sums^exponent where the sum is positive, else 0."""
    return np.power(sums, exponent, out=np.zeros(len(sums)), where=sums > 0)


def wanted_rows(ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """The rows to take of a last layer, None for all, and where in them ``ids`` [n] are: int64 [n].

    On the CPU each row once; elsewhere the whole layer costs less than learning the number of different nodes, which would
    stall the device.
    """
    return ids.unique(return_inverse=True) if ids.device.type == "cpu" else (None, ids)


class LightPropagation(nn.Module):
    """Propagation over A_hat of a train matrix, see :func:`gfml.ranking.graph.propagate`; moves with the model around it."""

    def __init__(self, train: sp.csr_array) -> None:
        super().__init__()
        self.num_users, self.num_items = train.shape
        graph = build_graph(train, dtype=torch.get_default_dtype())
        for name in ("indptr", "indices", "values", "transposed"):
            self.register_buffer(name, getattr(graph, name), persistent=False)

    @property
    def graph(self) -> Graph:
        return Graph(self.num_users, self.num_items, self.indptr, self.indices, self.values, self.transposed)

    def forward(
        self,
        nodes: Tensor,
        num_layers: int,
        *,
        rows: Tensor | None = None,
        values: Tensor | None = None,
        combine: str = "mean",
    ) -> Tensor:
        """nodes [N, D] -> [N, D], or the given rows of it; ``values`` of the same pattern replace those of A_hat."""
        return propagate(self.graph, nodes, num_layers, combine=combine, rows=rows, values=values)

    def at(self, ids: Tensor, nodes: Tensor, num_layers: int, *, values: Tensor | None = None) -> Tensor:
        """The propagated vectors of nodes ``ids`` [n], which may repeat: [n, D]. values: as in :meth:`forward`."""
        rows, place = wanted_rows(ids)
        return F.embedding(place, self(nodes, num_layers, rows=rows, values=values))

    def of_new_users(self, nodes: Tensor, num_layers: int, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories, see :func:`gfml.ranking.graph.propagated`: [n, D]."""
        return propagated(self.graph, nodes, num_layers, histories)

    def split(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the users and of the items."""
        user, item = nodes.split([self.num_users, self.num_items])
        return user, item


def edge_weights(train: sp.csr_array) -> Tensor:
    """1 / sqrt(deg_u deg_i) of each train pair, by user, then item: float64 [E]."""
    users, items = pairs_from_csr(train)
    degree = np.bincount(users, minlength=train.shape[0]), np.bincount(items, minlength=train.shape[1])
    return torch.from_numpy(1.0 / np.sqrt(degree[0][users] * degree[1][items].astype(np.float64)))


def thinned(
    train: sp.csr_array, dropout: float, generator: torch.Generator, *, by_degree: bool = True, truncate: bool = False
) -> sp.csr_array:
    """A random part of the train pairs, ``dropout`` of them left out: E - ceil(E dropout) pairs without replacement.

    by_degree: pairs are drawn in proportion to :func:`edge_weights`, so that those of popular nodes fall more often;
    else all alike. truncate: the number is the truncated float product E (1 - dropout), as published, which can be one
    fewer.
    The graph of the kept pairs has its own degrees. Drawn as the smallest of Exp(1) / weight, which is drawing one by
    one in proportion to the weights and has no limit on their number.
    """
    count = int(train.nnz * (1.0 - dropout))
    if not truncate:
        count = train.nnz - math.ceil(round(train.nnz * dropout, 6))
    weights = edge_weights(train) if by_degree else torch.ones(train.nnz, dtype=torch.float64)
    clock = torch.empty(train.nnz, dtype=torch.float64).exponential_(generator=generator) / weights
    kept = clock.topk(count, largest=False).indices.numpy()
    users, items = pairs_from_csr(train)
    return csr_from_pairs(users[kept], items[kept], *train.shape)


class ThinnedGraph(nn.Module):
    """The train graph, whole for evaluation and thinned anew every epoch for training.

    An epoch's graph is a function of (seed, epoch). dropout 0 trains on the whole graph. ``alternate``: pairs fall by
    degree in odd epochs and alike in even ones (LayerGCN). truncate: see :func:`thinned`.
    """

    def __init__(
        self, train: sp.csr_array, dropout: float, seed: int, *, alternate: bool = False, truncate: bool = False
    ) -> None:
        super().__init__()
        self.train_matrix, self.dropout, self.seed = train, dropout, seed
        self.alternate, self.truncate = alternate, truncate
        self.whole = LightPropagation(train)
        self.part = self.whole

    def new_epoch(self, epoch: int) -> None:
        """Draw the graph of epoch 1, 2, ..."""
        if not self.dropout:
            return
        generator = seeded_generator("cpu", self.seed, epoch, 2)
        by_degree = not self.alternate or epoch % 2 == 1
        kept = thinned(self.train_matrix, self.dropout, generator, by_degree=by_degree, truncate=self.truncate)
        self.set_part(kept)

    def set_part(self, train: sp.csr_array) -> None:
        """Train on the graph of these pairs."""
        self.part = LightPropagation(train).to(self.whole.values)

    def forward(self) -> LightPropagation:
        """The graph to use now: the part while training, else the whole."""
        return self.part if self.training else self.whole


def binary_item_graph(features: Tensor, k: int, cache_dir: Path | None = None) -> sp.csr_array:
    """Mean over the k nearest items: ones, scaled by the row sums of both ends; frozen graphs of FREEDOM and DRAGON.

    Directed; every entry is 1 / k and every row sums to 1 where all items have features. Values: float64.
    """
    graph = nearest_rows(features, k, cache_dir=cache_dir).astype(np.float64)
    graph.data[:] = 1.0
    return symmetric(graph)


def weighted_item_graph(features: Tensor, k: int, cache_dir: Path | None = None) -> sp.csr_array:
    """Cosines of the k nearest items, scaled by the row sums of both ends; graphs of LATTICE and MGCN. Values: float64.

    Difference from the published code: a row whose cosines do not sum to a positive number is empty there where the
    original has NaN.
    """
    return symmetric(nearest_rows(features, k, cache_dir=cache_dir).astype(np.float64))


def mixed_item_graph(
    features: dict[str, Tensor], k: int, image_weight: float, cache_dir: Path | None = None
) -> sp.csr_array:
    """image_weight * image graph + (1 - image_weight) * text graph of :func:`binary_item_graph`.

    With one modality alone its graph has the whole weight; a graph of weight 0 is not searched.
    """
    weights = {"image": image_weight, "text": 1.0 - image_weight} if len(features) > 1 else dict.fromkeys(features, 1.0)
    return sum(
        weight * binary_item_graph(features[name], k, cache_dir) for name, weight in weights.items() if weight
    ).tocsr()
