"""The user-item graph and LightGCN propagation over it.

Nodes are users 0..U-1, then items U..U+I-1. With R the binary train matrix and d the node degrees,

    A_hat = D^(-1/2) [[0, R], [R^T, 0]] D^(-1/2),     E(k+1) = A_hat E(k)

and the output combines E(0)..E(K) by mean (He et al., LightGCN, SIGIR 2020), sum or final layer. A node
without edges has a zero row in A_hat: its output is E(0) / (K + 1) under mean.

Cost: a product is memory bound. On the CPU it runs as a weighted embedding bag over the CSR rows, several
times faster than the library's sparse-dense product; on other devices as a sparse CSR product. A_hat is
symmetric, so the backward pass is the same product and no transpose is stored. A training step needs the
output only at the rows of its batch: the last forward product is taken at those rows alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.base.optim import zeros_like

COMBINES = ("mean", "sum", "final")
# Rows that hold more than this share of all entries are not picked out: gathering their entries costs more than it saves.
WORTH_PICKING = 1 / 3


@dataclass(frozen=True)
class Graph:
    """A_hat in CSR: ``indptr`` [N + 1], ``indices`` [nnz] (int32 where they fit), ``values`` float32 [nnz].

    ``transposed`` [nnz] holds for each entry (i, j) the position of (j, i): the values of a matrix with this
    pattern, read in that order, are those of its transpose.
    """

    num_users: int
    num_items: int
    indptr: Tensor
    indices: Tensor
    values: Tensor
    transposed: Tensor

    @property
    def num_nodes(self) -> int:
        return self.num_users + self.num_items

    @property
    def num_entries(self) -> int:
        """Stored entries: twice the number of train pairs."""
        return self.indices.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Graph:
        """The same graph elsewhere, values optionally in another float type."""
        moved = {name: getattr(self, name).to(device) for name in ("indptr", "indices", "transposed")}
        return Graph(self.num_users, self.num_items, values=self.values.to(device, dtype), **moved)

    def multiply(self, dense: Tensor, values: Tensor | None = None) -> Tensor:
        """A dense for A with this pattern and ``values`` (A_hat's when None). dense [N, D] -> [N, D]."""
        return csr_times_dense(self.indptr, self.indices, self.values if values is None else values, dense)

    def multiply_rows(self, rows: Tensor, dense: Tensor, values: Tensor | None = None) -> Tensor:
        """Rows ``rows`` of the product only: [len(rows), D]; cost grows with their degrees.

        On the CPU the whole product is taken instead where it costs less; the numbers are the same.
        """
        if rows.device.type == "cpu":
            entries = int((self.indptr[rows + 1] - self.indptr[rows]).sum())
            if entries > WORTH_PICKING * self.num_entries:
                return self.multiply(dense, values)[rows]
        return csr_rows_times_dense(self.indptr, self.indices, self.values if values is None else values, rows, dense)

    def drop_edges(self, keep: float, *, undirected: bool = False) -> Tensor:
        """Values of A_hat with entries kept with probability ``keep`` and divided by it; a fresh mask each call.

        By default the two directions of an edge fall independently, as in the published code, so the result is
        not symmetric; ``undirected`` drops both together. Expectation A_hat. Uses the global generator.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"found keep probability {keep}, wanted 0 < keep <= 1")
        if keep == 1:
            return self.values
        draw = torch.rand(self.num_entries, device=self.values.device)
        if undirected:
            own = torch.arange(self.num_entries, device=draw.device)
            draw = draw[torch.minimum(own, self.transposed)]
        return torch.where(draw < keep, self.values / keep, 0.0)


def build_graph(
    train: sp.csr_array, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Graph:
    """Graph of a binary CSR matrix [U, I] (repeated pairs already counted once). Seconds for millions of pairs."""
    num_users, num_items = train.shape
    by_item = train.T.tocsr()
    by_item.sort_indices()
    degree = np.concatenate([np.diff(train.indptr), np.diff(by_item.indptr)]).astype(np.float64)
    scale = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    indptr = np.concatenate([train.indptr, train.indptr[-1] + by_item.indptr[1:].astype(np.int64)])
    columns = np.concatenate([train.indices.astype(np.int64) + num_users, by_item.indices.astype(np.int64)])
    rows = np.repeat(np.arange(num_users + num_items), degree.astype(np.int64))
    # Entry (u, i) of R is, in R^T's order, where a stable sort of R's columns puts it.
    to_item_order = np.argsort(train.indices, kind="stable")
    transposed = np.empty(2 * train.nnz, dtype=np.int64)
    transposed[train.nnz :] = to_item_order
    transposed[to_item_order] = train.nnz + np.arange(train.nnz)
    small = max(2 * train.nnz, num_users + num_items) < 2**31
    index_type = torch.int32 if small else torch.int64
    return Graph(
        num_users,
        num_items,
        torch.from_numpy(indptr.astype(np.int64)).to(device, index_type),
        torch.from_numpy(columns).to(device, index_type),
        torch.from_numpy(scale[rows] * scale[columns]).to(device, dtype),
        torch.from_numpy(transposed).to(device),
    )


def propagate(
    graph: Graph,
    nodes: Tensor,
    num_layers: int,
    *,
    combine: str = "mean",
    rows: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """LightGCN output of all nodes, or of ``rows`` only.

    Shape: nodes [N, D] (layer 0); rows int64 [n], best without repeats -> [N, D] or [n, D].
    Gradient flows to ``nodes`` by the explicit backward A_hat^T g = A_hat g; not to the edge values.
    values: another value set on the same pattern (:meth:`Graph.drop_edges`); its transpose is used backward.
    combine: mean of layers 0..K, sum, or the final layer. K = 0 returns layer 0.
    """
    if combine not in COMBINES:
        raise ValueError(f"unknown layer combination {combine!r}: choose one of {', '.join(COMBINES)}")
    if num_layers < 0:
        raise ValueError(f"found {num_layers} layers, wanted 0 or more")
    if nodes.shape[0] != graph.num_nodes:
        raise ValueError(f"found {nodes.shape[0]} node vectors, wanted {graph.num_nodes} (users then items)")
    return _Propagate.apply(nodes, graph, num_layers, combine, rows, values)[0]


def propagate_rows(
    graph: Graph, nodes: Tensor, num_layers: int, rows: Tensor, *, combine: str = "mean", values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`propagate` at ``rows``, and ``nodes[rows]``: [n, D] each. Their gradients go into one table, not into two."""
    final, start = _Propagate.apply(nodes, graph, num_layers, combine, rows, values)
    return final, start


@torch.no_grad()
def propagated(
    graph: Graph, nodes: Tensor, num_layers: int, histories: sp.csr_array, *, combine: str = "mean"
) -> Tensor:
    """Vectors [n, D] of new users with ``histories`` (binary CSR [n, I]): their edges carry every layer of their items.

    nodes [U + I, D]: layer 0. Layer k + 1 of a new user is sum over his items i of layer_k(i) / sqrt(|items| degree_i),
    his layer 0 is zero, the result is combined as :func:`propagate` does it. The items stay as trained.
    Cost: num_layers - 1 products.
    """
    weights, layer, summed = layer_weights(num_layers, combine), nodes, 0.0
    for k in range(1, num_layers + 1):
        summed = summed + weights[k] * layer[graph.num_users :]
        layer = graph.multiply(layer) if k < num_layers else layer
    return sum_of_items(graph, summed, histories)


def sum_of_items(graph: Graph, items: Tensor, histories: sp.csr_array) -> Tensor:
    """sum over the items i of each history of items[i] / sqrt(|history| degree_i): [n, D]."""
    degree, device = np.diff(histories.indptr), items.device
    rows, own = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (histories.indptr, histories.indices))
    scale = graph.indptr.diff()[graph.num_users :].to(items.dtype).clamp_min(1).rsqrt()
    weight = torch.from_numpy(np.repeat(1 / np.sqrt(np.maximum(degree, 1)), degree)).to(device, items.dtype)
    return F.embedding_bag(
        own, items, rows, mode="sum", include_last_offset=True, per_sample_weights=weight * scale[own]
    )


def layer_weights(num_layers: int, combine: str) -> list[float]:
    """Weight of E(0)..E(K) in the output."""
    if combine == "final":
        return [0.0] * num_layers + [1.0]
    return [1.0 / (num_layers + 1) if combine == "mean" else 1.0] * (num_layers + 1)


class _Propagate(torch.autograd.Function):
    """sum_k w_k A^k E at chosen rows, and E there; the backward is Horner's scheme with the transpose."""

    @staticmethod
    def forward(
        ctx: Any, nodes: Tensor, graph: Graph, num_layers: int, combine: str, rows: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.graph, ctx.rows, ctx.values = graph, rows, values
        ctx.weights = weights = layer_weights(num_layers, combine)
        pick = (lambda layer: layer) if rows is None else (lambda layer: layer[rows])
        start = None if rows is None else nodes[rows]
        layer, output = nodes, (nodes if start is None else start) * weights[0]
        for k in range(1, num_layers + 1):
            if k == num_layers and rows is not None:
                last = graph.multiply_rows(rows, layer, values)
            else:
                layer = graph.multiply(layer, values)
                last = pick(layer)
            output.add_(last, alpha=weights[k])
        return output, start

    @staticmethod
    def backward(ctx: Any, grad: Tensor, to_start: Tensor | None) -> tuple[Tensor | None, ...]:
        graph, weights, rows = ctx.graph, ctx.weights, ctx.rows
        values = None if ctx.values is None else ctx.values[graph.transposed]
        # g_K = w_K g, then g_k = A^T g_{k+1} + w_k g; g is zero but at the rows.
        if rows is None:
            result = grad * weights[-1]
        else:
            result = zeros_like(grad.new_empty(1, 1).expand(graph.num_nodes, grad.shape[1]))
            result.index_add_(0, rows, grad, alpha=weights[-1])
        for weight in reversed(weights[:-1]):
            result = graph.multiply(result, values)
            if weight and rows is None:
                result.add_(grad, alpha=weight)
            elif weight:
                result.index_add_(0, rows, grad, alpha=weight)
        if to_start is not None:
            result.index_add_(0, rows, to_start)
        return result, None, None, None, None, None


def csr_rows_times_dense(indptr: Tensor, indices: Tensor, values: Tensor, rows: Tensor, dense: Tensor) -> Tensor:
    """Rows ``rows`` [n] of :func:`csr_times_dense`, which may repeat: [n, D]."""
    start = indptr[rows].long()
    length = indptr[rows + 1].long() - start
    ends = length.cumsum(0)
    # Position t of the gathered entries belongs to row r(t); its source is start[r] + (t - first[r]).
    shift = start - (ends - length)
    total = int(ends[-1]) if len(rows) else 0
    source = torch.arange(total, device=rows.device) + torch.repeat_interleave(shift, length, output_size=total)
    ends = torch.cat([ends.new_zeros(1), ends]).to(indptr.dtype)
    return csr_times_dense(ends, indices[source], values[source], dense)


def csr_times_dense(indptr: Tensor, indices: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """Sparse times dense [M, D] -> [len(indptr) - 1, D]; entries may repeat and need no order. No gradient.

    Shape: indptr [n + 1] and indices [nnz] of one integer type, values [nnz].
    """
    if values.dtype != dense.dtype:
        values = values.to(dense.dtype)
    if dense.device.type == "cpu":
        return torch.embedding_bag(dense.contiguous(), indices, indptr, False, 0, False, values, True)[0]
    shape = (indptr.shape[0] - 1, dense.shape[0])
    with warnings.catch_warnings():
        # The library says once that such tensors are in beta state, and once that they are not checked.
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        return torch.sparse_csr_tensor(indptr, indices, values, size=shape, check_invariants=False) @ dense
