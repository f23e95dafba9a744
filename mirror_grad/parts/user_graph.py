"""The user-user layer of DualGNN and DRAGON: a weighted mean over the users with most items in common."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from gfml.sampling import seeded_generator
from gfml.sparse import SparseMatrix


class UserGraph(nn.Module):
    """H_u = sum_j w_uj X_j over k neighbours; w is a softmax of the numbers of items in common.

    counts: CSR [U, U], items in common with the stored neighbours. The k neighbours of largest count are taken (ties:
    smaller id). A user with fewer, but at least one, has some of them several times: the list is filled up by copying
    a uniformly chosen element of it, anew every epoch, as a function of (seed, epoch). A user without has H_u = 0.
    """

    def __init__(self, counts: sp.csr_array, k: int, seed: int) -> None:
        super().__init__()
        self.k, self.seed = k, seed
        self.ids, self.counts, self.degree = _best(counts, k)
        self.set_neighbours(self.ids, self.weights(torch.arange(k).expand_as(self.ids)))
        self.new_epoch(0)

    def new_epoch(self, epoch: int) -> None:
        """Fill up the short lists of epoch 0 (evaluation before training), 1, 2, ..."""
        position = filled_positions(self.degree, self.k, seeded_generator("cpu", self.seed, epoch, 3))
        self.set_neighbours(self.ids.gather(1, position), self.weights(position))

    def weights(self, position: Tensor) -> Tensor:
        """Softmax of the counts at these positions of the lists, [U, k]; 0 for users without neighbours."""
        share = self.counts.gather(1, position).to(torch.get_default_dtype()).softmax(1)
        return share * (self.degree > 0)[:, None]

    def set_neighbours(self, ids: Tensor, weights: Tensor) -> None:
        """Neighbours int64 [U, k] (may repeat) and their weights [U, k]."""
        device = self.operator.values.device if hasattr(self, "operator") else ids.device
        rows = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        self.operator = SparseMatrix(rows, ids.reshape(-1), weights.reshape(-1), (len(ids), len(ids))).to(device)

    def forward(self, users: Tensor) -> Tensor:
        """X [U, D] -> H [U, D]."""
        return self.operator(users)


def filled_positions(degree: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Positions int64 [n, k] into lists of ``degree`` [n] elements: 0, 1, ..., then copies of earlier ones.

    Position s >= degree copies a uniformly chosen earlier one, so early copies tend to be copied again.
    """
    draw = torch.rand((len(degree), k), generator=generator, dtype=torch.float64)
    position = torch.arange(k).expand(len(degree), k).clone()
    for slot in range(1, k):
        earlier = (draw[:, slot] * slot).long()
        copied = position.gather(1, earlier[:, None]).squeeze(1)
        position[:, slot] = torch.where(slot < degree, slot, copied)
    return position


def _best(counts: sp.csr_array, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest entries of each row: columns and values int64 [U, k] (0 beyond the end), and how many there are."""
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    order = np.lexsort((counts.indices, -counts.data, rows))
    rank = np.arange(len(rows)) - np.repeat(counts.indptr[:-1], np.diff(counts.indptr))
    order, rank = order[rank < k], rank[rank < k]
    ids, values = np.zeros((2, counts.shape[0], k), dtype=np.int64)
    ids[rows[order], rank], values[rows[order], rank] = counts.indices[order], counts.data[order]
    degree = np.minimum(np.diff(counts.indptr), k)
    return torch.from_numpy(ids), torch.from_numpy(values), torch.from_numpy(degree.astype(np.int64))
