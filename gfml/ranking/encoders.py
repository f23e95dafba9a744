"""Where user and item vectors come from: free tables (matrix factorisation) or LightGCN over them.

One table holds all nodes, users first: a batch costs one gather forward and one scatter backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.ranking.graph import Graph, propagate, propagate_rows, propagated

INITS = ("xavier_uniform", "xavier_normal", "normal", "ball")


class Embedded(NamedTuple):
    """Vectors of a batch: ``user`` [B, D], ``items`` [B, 1 + W, D] (positive first); ``ego_*`` are the free rows.

    The score uses ``user`` and ``items``; embedding regularisers take the ego (layer-0) rows. Without a graph
    the two are the same tensors.
    """

    user: Tensor
    items: Tensor
    ego_user: Tensor
    ego_items: Tensor


class Tables(nn.Module):
    """Free vectors of users and items: one parameter ``nodes`` [U + I, D].

    init: xavier_uniform (bound sqrt(6 / (rows + D)) per table), xavier_normal (deviation sqrt(2 / (rows + D)) per
        table), normal (N(0, std^2)), or ball
    (N(0, 1 / D), rows longer than 1 pulled onto the unit sphere).
    """

    def __init__(
        self, num_users: int, num_items: int, embedding_dim: int, *, init: str = "xavier_uniform", std: float = 0.1
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"found embedding_dim {embedding_dim}, wanted at least 1")
        self.num_users, self.num_items = num_users, num_items
        parts = [_initial_rows(count, embedding_dim, init, std) for count in (num_users, num_items)]
        self.nodes = nn.Parameter(torch.cat(parts))

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users [U, D] and all items [I, D]."""
        return self.nodes[: self.num_users], self.nodes[self.num_users :]

    def outputs(self) -> Tensor:
        """Final vectors of all nodes [U + I, D], users first, with gradient: for batches that touch most items."""
        return self.nodes

    def forward(self, users: Tensor, items: Tensor) -> Embedded:
        """Vectors of a batch. Shape: users int64 [B]; items int64 [B, 1 + W]."""
        rows = F.embedding(self._node_ids(users, items), self.nodes)
        user, items = self._shape(rows, users, items)
        return Embedded(user, items, user, items)

    def _node_ids(self, users: Tensor, items: Tensor) -> Tensor:
        return torch.cat([users, items.reshape(-1) + self.num_users])

    def _shape(self, rows: Tensor, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        user, item = rows.split([len(users), items.numel()])
        return user, item.view(*items.shape, -1)


class LightGCN(Tables):
    """LightGCN (He et al., SIGIR 2020): the tables propagated ``num_layers`` times over the train graph.

    combine: mean of layers 0..K (default), sum or final. edge_keep < 1 drops edges in training only, anew for
    every batch (``undirected_dropout`` drops both directions together). The graph is no part of the state dict.
    """

    def __init__(
        self,
        graph: Graph,
        embedding_dim: int,
        num_layers: int,
        *,
        combine: str = "mean",
        init: str = "normal",
        std: float = 0.1,
        edge_keep: float = 1.0,
        undirected_dropout: bool = False,
    ) -> None:
        super().__init__(graph.num_users, graph.num_items, embedding_dim, init=init, std=std)
        self.graph, self.num_layers, self.combine = graph, num_layers, combine
        self.edge_keep, self.undirected_dropout = edge_keep, undirected_dropout

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users and items, from the whole graph; no gradient. One propagation."""
        return propagate(self.graph, self.nodes, self.num_layers, combine=self.combine).split(
            [self.num_users, self.num_items]
        )

    def new_users(self, histories: sp.csr_array) -> Tensor | None:
        """Vectors [n, D] of users who are not in the graph, from their items; None without layers."""
        if not self.num_layers:
            return None
        return propagated(self.graph, self.nodes.detach(), self.num_layers, histories, combine=self.combine)

    def outputs(self, rows: Tensor | None = None) -> Tensor:
        """As :meth:`Tables.outputs`, or at ``rows`` only: [n, D]."""
        kept = self._kept_edges()
        return propagate(self.graph, self.nodes, self.num_layers, combine=self.combine, rows=rows, values=kept)

    def _kept_edges(self) -> Tensor | None:
        if not self.training or self.edge_keep == 1:
            return None
        return self.graph.drop_edges(self.edge_keep, undirected=self.undirected_dropout)

    def forward(self, users: Tensor, items: Tensor) -> Embedded:
        """As :meth:`Tables.forward`; on the CPU the last layer is computed only where the batch needs it."""
        ids = self._node_ids(users, items)
        # Elsewhere the whole layer costs less than learning the number of rows, which would stall the device.
        if ids.device.type == "cpu":
            rows, place = ids.unique(return_inverse=True)
            how = {"combine": self.combine, "values": self._kept_edges()}
            final, start = propagate_rows(self.graph, self.nodes, self.num_layers, rows, **how)
        else:
            final, start, place = self.outputs(), self.nodes, ids
        user, item = self._shape(F.embedding(place, final), users, items)
        ego_user, ego_item = self._shape(F.embedding(place, start), users, items)
        return Embedded(user, item, ego_user, ego_item)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # The graph is no buffer (it would enter every checkpoint), so it follows the module's device here.
        super()._apply(fn, recurse)
        self.graph = self.graph.to(self.nodes.device, self.nodes.dtype)
        return self


def _initial_rows(count: int, width: int, init: str, std: float) -> Tensor:
    rows = torch.empty(count, width)
    if init == "xavier_uniform":
        return nn.init.xavier_uniform_(rows)
    if init == "xavier_normal":
        return nn.init.xavier_normal_(rows)
    if init == "normal":
        return nn.init.normal_(rows, std=std)
    if init == "ball":
        nn.init.normal_(rows, std=1 / math.sqrt(width))
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1)
    raise ValueError(f"unknown initialisation {init!r}: choose one of {', '.join(INITS)}")
