"""Simple recommenders that a new one has to beat: popularity, item neighbours and EASE.

All are deterministic, read ``data.train`` only and are scorers for ``gfml.ranking.evaluation.evaluate``. To report
a test number, choose with ``select_*`` on the validation part, then rebuild the best one on ``data.refit()``::

    choice = select_ease(data, [50.0, 100.0, 200.0])
    evaluate(ease(data.refit(), **choice.settings), data, "test", [20])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import lapack
from torch import Tensor

from gfml.base.errors import UserError, choice_error
from gfml.data.interactions import Interactions
from gfml.ranking.evaluation import evaluate
from gfml.ranking.topk import FactorScorer, Scorer

SIMILARITIES = ("cosine", "jaccard")
# Rows of the item x item matrix that are handled at a time in EASE.
BLOCK = 512
# Stored pair of items in a block of the neighbour search: count, column, row, similarity, sort keys and order.
BYTES_PER_PAIR = 64


def popularity(data: Interactions) -> FactorScorer:
    """score(u, i) = number of train interactions of i, the same for every user.

    Items of equal count keep the tie order of the ranking, the lower id first.
    """
    counts = torch.from_numpy(data.item_popularity).float()[:, None]
    return FactorScorer(user=torch.ones(data.num_users, 1), item=counts)


@dataclass(frozen=True)
class NeighbourScorer:
    """score(u, j) = sum over i in history[u] of weights[i, j]; history CSR [U, I], weights CSR [I, I]."""

    history: sp.csr_array
    weights: sp.csr_array

    @property
    def num_users(self) -> int:
        return self.history.shape[0]

    @property
    def num_items(self) -> int:
        return self.history.shape[1]

    def score(self, users: Tensor) -> Tensor:
        """Users int64 [B] to float32 [B, I], on the device of ``users``; computed on the CPU."""
        scores = (self.history[users.cpu().numpy()] @ self.weights).toarray()
        return torch.from_numpy(scores).to(users.device)

    def factors(self) -> None:
        return None


@dataclass(frozen=True)
class LinearScorer:
    """score(u, j) = sum over i in history[u] of weights[i, j]; history CSR [U, I], weights a tensor [I, I]."""

    history: sp.csr_array
    weights: Tensor

    @property
    def num_users(self) -> int:
        return self.history.shape[0]

    @property
    def num_items(self) -> int:
        return self.history.shape[1]

    def score(self, users: Tensor) -> Tensor:
        """Users int64 [B] to [B, I], in the type and on the device of ``weights``."""
        rows = self.history[users.cpu().numpy()]
        items, starts = (torch.from_numpy(a.astype(np.int64)) for a in (rows.indices, rows.indptr))
        items, starts = items.to(self.weights.device), starts.to(self.weights.device)
        return torch.nn.functional.embedding_bag(items, self.weights, starts, mode="sum", include_last_offset=True)

    def factors(self) -> None:
        return None


def item_knn(
    data: Interactions, k: int = 100, shrink: float = 0.0, similarity: str = "cosine", memory_mb: int = 256
) -> NeighbourScorer:
    """Item neighbours: score(u, j) = sum over i in the history of u that are among the k nearest of j of s(i, j).

    With c users in common and n_i users of i: cosine s = c / (sqrt(n_i n_j) + shrink),
    jaccard s = c / (n_i + n_j - c + shrink). Pairs without a common user are no neighbours; of equally
    similar items the lower id is nearer. An item is not its own neighbour.
    Units: shrink in users; memory_mb MiB of working memory beside the k neighbours of each item.
    Differences from Deshpande and Karypis: similarities are not normalised per item.
    Reference: Deshpande and Karypis, Item-based Top-N Recommendation Algorithms, TOIS 2004.
    """
    if similarity not in SIMILARITIES:
        raise choice_error("similarity", similarity, SIMILARITIES)
    if k < 1 or int(k) != k:
        raise UserError(f"found k={k} neighbours, wanted a whole number of at least 1")
    if not (0 <= shrink < np.inf):
        raise UserError(f"found shrink={shrink}, wanted a finite number of users, at least 0")
    by_item = data.train.T.tocsr()
    blocks = [
        _nearest(by_item, data.train, slice(start, stop), int(k), shrink, similarity)
        for start, stop in _item_blocks(data, memory_mb * 2**20 // BYTES_PER_PAIR)
    ]
    if not blocks:
        raise UserError(f"found no items in {data.name}, wanted at least one")
    # Row j of the blocks holds the neighbours of j; the scores need them in column j.
    return NeighbourScorer(data.train, sp.vstack(blocks, format="csr").T.tocsr())


def _item_blocks(data: Interactions, pairs: int) -> Iterator[tuple[int, int]]:
    """Ranges of items with at most ``pairs`` stored pairs together, or of one item."""
    reach = np.minimum(data.train.T @ data.user_activity, data.num_items)
    upto = np.concatenate([[0], np.cumsum(reach)])
    start = 0
    while start < data.num_items:
        stop = max(start + 1, int(np.searchsorted(upto, upto[start] + pairs, side="right")) - 1)
        yield start, stop
        start = stop


def _nearest(
    by_item: sp.csr_array, train: sp.csr_array, block: slice, k: int, shrink: float, similarity: str
) -> sp.csr_array:
    """The k most similar items of each item in the block, CSR [block, I] float32."""
    common = sp.coo_array(by_item[block] @ train)
    rows, columns, count = common.row, common.col, common.data.astype(np.float64)
    num_users = np.diff(by_item.indptr).astype(np.float64)
    of_row, of_column = num_users[block][rows], num_users[columns]
    below = np.sqrt(of_row * of_column) if similarity == "cosine" else of_row + of_column - count
    value = np.where(columns == rows + block.start, -1.0, count / (below + shrink))
    order = np.lexsort((columns, -value, rows))
    starts = np.searchsorted(rows[order], np.arange(common.shape[0]))
    rank = np.arange(len(order)) - starts[rows[order]]
    kept = order[(rank < k) & (value[order] > 0)]
    return sp.csr_array((value[kept].astype(np.float32), (rows[kept], columns[kept])), shape=common.shape)


def ease(data: Interactions, l2: float, memory_gib: float = 8.0) -> LinearScorer:
    """The linear item-item model with zero self-weight: argmin_B |X - X B|^2 + l2 |B|^2, diag(B) = 0.

    In closed form P = (X'X + l2)^-1, B_ij = -P_ij / P_jj off the diagonal; X is the binary train matrix.
    Solved in float64 where that fits the limit, else in float32; the weights are kept in float32.
    Memory: 12 bytes (float64) or 4 bytes (float32) per pair of items.
    Errors: UserError if l2 is not positive or if not even float32 fits ``memory_gib``.
    Reference: Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019.
    """
    if not (0 < l2 < np.inf):
        raise UserError(f"found l2={l2}, wanted a finite number above 0")
    pairs = data.num_items**2
    if 4 * pairs > memory_gib * 2**30:
        raise UserError(
            f"EASE on {data.num_items} items needs {4 * pairs / 2**30:.2f} GiB, the limit is {memory_gib:g} GiB: "
            "raise the limit (memory_gib) or use item_knn"
        )
    dtype = np.float64 if 12 * pairs <= memory_gib * 2**30 else np.float32
    return LinearScorer(data.train, torch.from_numpy(_ease_weights(_inverse(data.train, l2, dtype))))


def _inverse(train: sp.csr_array, l2: float, dtype: type) -> np.ndarray:
    """(X'X + l2)^-1, [I, I], in the memory of one such matrix; only the upper triangle is filled."""
    num_items = train.shape[1]
    by_item = train.T.tocsr()
    matrix = np.empty((num_items, num_items), dtype=dtype)
    for start in range(0, num_items, BLOCK):
        matrix[start : start + BLOCK] = (by_item[start : start + BLOCK] @ train).toarray()
    matrix.flat[:: num_items + 1] += l2
    factor, invert = (lapack.dpotrf, lapack.dpotri) if dtype == np.float64 else (lapack.spotrf, lapack.spotri)
    # LAPACK counts by columns: the transpose is passed without a copy, and its lower triangle is our upper one.
    cholesky, info = factor(matrix.T, lower=1, clean=0, overwrite_a=1)
    if info == 0:
        inverse, info = invert(cholesky, lower=1, overwrite_c=1)
    if info != 0:
        name = np.dtype(dtype).name
        raise UserError(f"EASE could not be solved in {name} with l2={l2}: raise l2 or the memory limit")
    return inverse.T


def _ease_weights(inverse: np.ndarray) -> np.ndarray:
    """-P_ij / P_jj with zeros on the diagonal, float32 [I, I], from the upper triangle of P; ``inverse`` is used up."""
    num_items = len(inverse)
    weights = inverse if inverse.dtype == np.float32 else np.empty((num_items, num_items), dtype=np.float32)
    scale = -1.0 / inverse.diagonal()
    for start in range(0, num_items, BLOCK):
        stop = min(start + BLOCK, num_items)
        corner = np.triu(inverse[start:stop, start:stop])
        inverse[start:stop, start:stop] = corner + np.triu(corner, 1).T
        inverse[stop:, start:stop] = inverse[start:stop, stop:].T
        weights[start:stop] = inverse[start:stop] * scale
    np.fill_diagonal(weights, 0.0)
    return weights


class Selection(NamedTuple):
    """The outcome of a search: the best settings, their scorer, and the validation ndcg@20 of every candidate."""

    settings: dict[str, Any]
    scorer: Scorer
    scores: list[tuple[dict[str, Any], float]]


def select_ease(data: Interactions, grid: Iterable[float], memory_gib: float = 8.0) -> Selection:
    """The l2 of the grid with the highest ndcg@20 on ``data.valid``; the first of equal ones."""
    return _select(lambda l2: ease(data, l2, memory_gib), data, [{"l2": l2} for l2 in grid])


def select_knn(data: Interactions, grid: Iterable[Mapping[str, Any]], memory_mb: int = 256) -> Selection:
    """The ``item_knn`` settings of the grid with the highest ndcg@20 on ``data.valid``; the first of equal ones.

    grid: keyword arguments, such as ``[{"k": 50, "shrink": 10.0}, {"k": 100}]``.
    """
    return _select(lambda **given: item_knn(data, memory_mb=memory_mb, **given), data, [dict(given) for given in grid])


def _select(build: Callable[..., Scorer], data: Interactions, grid: list[dict[str, Any]]) -> Selection:
    if data.valid.nnz == 0:
        raise UserError(f"{data.name} has no validation part to choose on: cut one off (`val_ratio`)")
    if not grid:
        raise ValueError("the grid is empty")
    best, scores = None, []
    for settings in grid:
        scorer = build(**settings)
        value = evaluate(scorer, data, "valid", [20]).means["ndcg@20"]
        if best is None or value > max(found for _, found in scores):
            best = settings, scorer
        scores.append((settings, value))
    return Selection(*best, scores)
