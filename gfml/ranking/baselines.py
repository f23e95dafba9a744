"""Simple recommenders that a new one has to beat: popularity, item neighbours and EASE.

All are deterministic, read ``data.train`` only and are scorers for ``gfml.ranking.evaluation.evaluate``. To report
a test number, choose with :func:`select` on the validation part, then rebuild the best one on ``data.refit()``::

    choice = select(partial(ease, data), data, {"l2": (50.0, 100.0, 200.0)})
    evaluate(ease(data.refit(), **choice.settings), data, "test", [20])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
# Values of each setting in ascending order.
Grid = Mapping[str, Sequence[Any]]
# Rows of the item x item matrix that are handled at a time in EASE.
BLOCK = 512
# Items whose neighbours are searched at a time.
ITEMS = 256


def popularity(data: Interactions) -> FactorScorer:
    """score(u, i) = number of train interactions of i, the same for every user.

    Items of equal count keep the tie order of the ranking, the lower id first.
    """
    counts = torch.from_numpy(data.item_popularity).float()[:, None]
    return FactorScorer(user=torch.ones(data.num_users, 1), item=counts)


@dataclass(frozen=True)
class LinearScorer:
    """score(u, j) = sum over i in history[u] of weights[i, j]; history CSR [U, I], weights a tensor [I, I]."""

    history: sp.csr_array
    weights: Any

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


class NeighbourScorer(LinearScorer):
    """The same with sparse weights, CSR [I, I]."""

    def score(self, users: Tensor) -> Tensor:
        """Users int64 [B] to float32 [B, I], on the device of ``users``; computed on the CPU."""
        scores = (self.history[users.cpu().numpy()] @ self.weights).toarray()
        return torch.from_numpy(scores).to(users.device)


def item_knn(data: Interactions, k: int = 100, shrink: float = 0.0, similarity: str = "cosine") -> NeighbourScorer:
    """Item neighbours: score(u, j) = sum over i in the history of u that are among the k nearest of j of s(i, j).

    With c users in common and n_i users of i: cosine s = c / (sqrt(n_i n_j) + shrink),
    jaccard s = c / (n_i + n_j - c + shrink). Pairs without a common user are no neighbours; of equally
    similar items the lower id is nearer. An item is not its own neighbour.
    Units: shrink in users.
    Memory: 12 bytes per neighbour and a few numbers per item, however many pairs of items have users in common.
    Differences from Deshpande and Karypis: similarities are not normalised per item.
    Reference: Deshpande and Karypis, Item-based Top-N Recommendation Algorithms, TOIS 2004.
    """
    from gfml.base.compiled import in_threads
    from gfml.ranking.loops import nearest_items

    if similarity not in SIMILARITIES:
        raise choice_error("similarity", similarity, SIMILARITIES)
    if k < 1 or int(k) != k:
        raise UserError(f"found k={k} neighbours, wanted a whole number of at least 1")
    if not (0 <= shrink < np.inf):
        raise UserError(f"found shrink={shrink}, wanted a finite number of users, at least 0")
    num_items = data.num_items
    if not num_items:
        raise UserError(f"found no items in {data.name}, wanted at least one")
    train, by_item = data.train, data.train.T.tocsr()
    patterns = (by_item.indptr, by_item.indices), (train.indptr, train.indices)
    size, wide = np.diff(by_item.indptr).astype(np.float64), min(int(k), num_items)

    def search(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        items = slice(start, min(start + ITEMS, num_items))
        values, ids = np.zeros((items.stop - start, wide)), np.full((items.stop - start, wide), -1, dtype=np.int32)
        room = np.zeros(num_items, np.int32), np.empty(num_items + 1, np.int32)
        nearest_items(start, *patterns, size, float(shrink), similarity == "jaccard", room, values, ids)
        kept = ids >= 0
        return kept.sum(axis=1), ids[kept], values[kept].astype(np.float32)

    counts, ids, values = (
        np.concatenate(parts) for parts in zip(*in_threads(search, range(0, num_items, ITEMS)), strict=True)
    )
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(ids.dtype)
    # Row j of what was found holds the neighbours of j; the scores need them in column j.
    nearest = sp.csr_array((values, ids, starts), shape=(num_items, num_items))
    return NeighbourScorer(train, nearest.T.tocsr())


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
    from gfml.base.compiled import in_threads
    from gfml.ranking.loops import common_users

    num_items = train.shape[1]
    by_item = train.T.tocsr()
    matrix = np.zeros((num_items, num_items), dtype=dtype)
    patterns = (by_item.indptr, by_item.indices), (train.indptr, train.indices)
    in_threads(lambda start: common_users(start, *patterns, matrix[start : start + BLOCK]), range(0, num_items, BLOCK))
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
    """The outcome of a search: the best settings, their scorer, and the validation ndcg@20 of every point tried."""

    settings: dict[str, Any]
    scorer: Scorer
    scores: list[tuple[dict[str, Any], float]]


def select(build: Callable[..., Scorer], data: Interactions, grid: Grid) -> Selection:
    """The settings of a grid with the highest ndcg@20 on ``data.valid``, found by climbing.

    Start in the middle; along one setting after the other step to the neighbouring value that is better, as long as
    there is one, until no setting has a better neighbour. Of equal points the first tried stays. A grid of one value
    per setting is that point.
    build: ``build(**settings)`` gives the scorer.
    """
    if data.valid.nnz == 0:
        raise UserError(f"{data.name} has no validation part to choose on: cut one off (`val_ratio`)")
    if not all(len(values) for values in grid.values()):
        raise ValueError("a setting of the grid has no values")
    tried: dict[tuple[int, ...], float] = {}
    best: tuple[float, tuple[int, ...], Scorer] | None = None

    def better(point: tuple[int, ...]) -> bool:
        """Whether a new point is the best so far, which it becomes."""
        nonlocal best
        if point in tried or any(not 0 <= at < len(values) for at, values in zip(point, grid.values(), strict=True)):
            return False
        scorer = build(**_settings(grid, point))
        tried[point] = evaluate(scorer, data, "valid", [min(20, data.num_items)]).means[
            f"ndcg@{min(20, data.num_items)}"
        ]
        if best is not None and tried[point] <= best[0]:
            return False
        best = tried[point], point, scorer
        return True

    better(tuple(len(values) // 2 for values in grid.values()))
    assert best is not None
    moved = True
    while moved:
        moved = False
        for axis in range(len(grid)):
            for step in (1, -1):
                while better(tuple(at + step * (number == axis) for number, at in enumerate(best[1]))):
                    moved = True
    scores = [(_settings(grid, point), value) for point, value in tried.items()]
    return Selection(_settings(grid, best[1]), best[2], scores)


def _settings(grid: Grid, point: tuple[int, ...]) -> dict[str, Any]:
    return {name: values[at] for (name, values), at in zip(grid.items(), point, strict=True)}
