"""LightGCN training as its formula reads: whole-graph propagation by a COO product, autograd, dense Adam.

The oracle of :mod:`gfml.ranking.graph` and the plain side of the benchmark.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


def coo_adjacency(train: sp.csr_array) -> Tensor:
    """D^(-1/2) [[0, R], [R^T, 0]] D^(-1/2) as a torch COO matrix [N, N], float32."""
    whole = sp.block_array([[None, train], [train.T, None]]).tocoo()
    degree = np.bincount(whole.row, minlength=whole.shape[0])
    values = 1 / np.sqrt(degree[whole.row] * degree[whole.col])
    places = torch.from_numpy(np.stack([whole.row, whole.col]).astype(np.int64))
    return torch.sparse_coo_tensor(places, torch.from_numpy(values.astype(np.float32)), whole.shape).coalesce()


def propagate_all(adjacency: Tensor, nodes: Tensor, num_layers: int) -> Tensor:
    """Mean of layers 0..K for every node."""
    layers = [nodes]
    for _ in range(num_layers):
        layers.append(torch.sparse.mm(adjacency, layers[-1]))
    return torch.stack(layers).mean(0)


def training_step(
    adjacency: Tensor, nodes: Tensor, optimizer: torch.optim.Optimizer, triple: tuple[Tensor, Tensor, Tensor],
    num_users: int, num_layers: int, decay: float,
) -> float:  # fmt: skip
    """One BPR step on users, positives and negatives [B]; returns the loss."""
    users, pos, neg = triple
    final = propagate_all(adjacency, nodes, num_layers)
    user, good, bad = final[users], final[pos + num_users], final[neg + num_users]
    ego = [nodes[users], nodes[pos + num_users], nodes[neg + num_users]]
    loss = torch.nn.functional.softplus((user * bad).sum(1) - (user * good).sum(1)).mean()
    loss = loss + decay * 0.5 * sum(rows.square().sum() for rows in ego) / len(users)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
