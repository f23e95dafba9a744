"""The user-user layer of DualGNN and DRAGON: a weighted mean over the users with most items in common."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from gfml.ranking.sampling import seeded_generator
from gfml.ranking.sparse import SparseMatrix


class UserGraph(nn.Module):
    """H_u = sum_j w_uj X_j over at most k neighbours; w is a softmax of the numbers of items in common.

    counts: CSR [U, U], items in common with the stored neighbours. The k neighbours of largest count are taken (ties:
    smaller id). A user without any has H_u = 0.
    padded: as published, a user with fewer neighbours has some of them several times: the list is filled up to k by
    copying a uniformly chosen element of it, anew every epoch, as a function of (seed, epoch). Evaluation uses the
    lists of epoch 0, so that a checkpoint gives the same scores again; in the original it uses those of the moment.
    """

    def __init__(self, counts: sp.csr_array, k: int, seed: int, *, padded: bool) -> None:
        super().__init__()
        self.k, self.seed, self.padded = k, seed, padded
        self.ids, self.counts, self.degree = _best(counts, k)
        self.training_operator = self.operator = self._operator(0)

    def new_epoch(self, epoch: int) -> None:
        """Fill up the short lists for epoch 1, 2, ..."""
        if self.padded:
            self.training_operator = self._operator(epoch).to(self.operator.values)

    def fill(self, positions: Tensor) -> None:
        """Use these positions int64 [U, k] into the lists, as another program drew them; with ``padded`` only."""
        self.training_operator = self.operator = self._operator(0, positions).to(self.operator.values)

    def forward(self, users: Tensor, rows: Tensor | None = None) -> Tensor:
        """X [U, D] -> H [U, D], or H [n, D] of these users alone."""
        operator = self.training_operator if self.training else self.operator
        return operator(users) if rows is None else operator.at(rows, users)

    def _operator(self, epoch: int, filled: Tensor | None = None) -> SparseMatrix:
        position = torch.arange(self.k).expand_as(self.ids)
        used = position < (self.k * (self.degree > 0) if self.padded else self.degree)[:, None]
        if filled is not None:
            position = filled
        elif self.padded:
            position = filled_positions(self.degree, self.k, seeded_generator("cpu", self.seed, epoch, 3))
        counts = self.counts.gather(1, position).to(torch.get_default_dtype())
        weights = counts.masked_fill(~used, -torch.inf).softmax(1)
        rows = torch.arange(len(used))[:, None].expand_as(used)
        shape = (len(used), len(used))
        return SparseMatrix(rows[used], self.ids.gather(1, position)[used], weights[used], shape)


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
