"""Accuracy of top-k lists under full ranking.

With T the relevant items of a user and h_j = 1 if the item at rank j is in T, at cut-off K:

    precision  sum_{j<=K} h_j / K
    recall     sum_{j<=K} h_j / |T|                      (denominator |T|, not min(K, |T|))
    ndcg       sum_{j<=K} h_j / log2(j + 1)  over  sum_{j<=min(K,|T|)} 1 / log2(j + 1)
    hit        1 if any h_j, j <= K
    mrr        1 / rank of the first hit within K, else 0
    map        sum_{j<=K} h_j precision@j  over  min(|T|, K)  (map_k: over K; map_n: over |T|)

Users with nothing relevant have no value (NaN) and are left out of means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp

METRICS = ("precision", "recall", "ndcg", "hit", "mrr", "map")
AP_DENOMINATORS = ("min", "k", "n")


def find_hits(top: np.ndarray, relevant: sp.csr_array) -> np.ndarray:
    """bool [n, K]: is top[r, j] stored in row r of ``relevant``? -1 (no item) never is.

    One binary search over the sorted keys row * I + item.
    Shape: top int [n, K] of column ids of relevant CSR [n, I].
    """
    n, num_items = relevant.shape
    if len(top) != n:
        raise ValueError(f"{len(top)} lists but {n} rows of relevant items")
    if not relevant.has_sorted_indices:
        relevant = relevant.sorted_indices()
    keys = np.repeat(np.arange(n, dtype=np.int64) * num_items, np.diff(relevant.indptr)) + relevant.indices
    wanted = np.arange(n, dtype=np.int64)[:, None] * num_items + top
    place = np.searchsorted(keys, wanted)
    keys = np.append(keys, -1)  # the place of a key beyond the last
    return (keys[place] == wanted) & (top >= 0)


def precision(hits: np.ndarray, k: int) -> np.ndarray:
    """sum_{j<=k} h_j / k; hits bool [n, K >= k], returns [n]."""
    return hits[:, :k].sum(axis=1) / k


def recall(hits: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """sum_{j<=k} h_j / |T|; NaN where T is empty."""
    return _ratio(hits[:, :k].sum(axis=1), num_relevant)


def ndcg(hits: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Binary gains discounted by log2(rank + 1), over the best possible value; NaN where T is empty."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    kept = hits[:, :k]
    return _ratio(kept @ discount[: kept.shape[1]], ideal[np.minimum(num_relevant, k)])


def hit(hits: np.ndarray, k: int) -> np.ndarray:
    """1.0 where any of the first k is a hit, else 0.0."""
    return np.asarray(hits[:, :k].any(axis=1), dtype=np.float64)


def mrr(hits: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of the first hit within k; 0 without a hit."""
    return np.where(hits[:, :k].any(axis=1), 1 / (1 + hits[:, :k].argmax(axis=1)), 0.0)


def average_precision(hits: np.ndarray, num_relevant: np.ndarray, k: int, denominator: str = "min") -> np.ndarray:
    """sum_{j<=k} h_j precision@j over min(|T|, k), k or |T| (``min``, ``k``, ``n``); NaN where T is empty."""
    if denominator not in AP_DENOMINATORS:
        raise ValueError(f"unknown denominator {denominator!r}: choose one of {', '.join(AP_DENOMINATORS)}")
    kept = hits[:, :k]
    total = (kept * np.cumsum(kept, axis=1) / np.arange(1, kept.shape[1] + 1)).sum(axis=1)
    below = {"min": np.minimum(num_relevant, k), "k": np.where(num_relevant > 0, k, 0), "n": num_relevant}
    return _ratio(total, below[denominator])


def ranking_metrics(
    top: np.ndarray, relevant: sp.csr_array, ks: Sequence[int], *, map_denominator: str = "min"
) -> dict[str, np.ndarray]:
    """Every metric of the module at every cut-off: ``{"recall@20": float64 [n], ...}``.

    Shape: top int [n, >= max(ks)], best first, -1 for no item; relevant CSR [n, I].
    A user without relevant items is NaN in all of them.
    """
    if top.shape[1] < max(ks):
        raise ValueError(f"lists of length {top.shape[1]} cannot be judged at {max(ks)}")
    hits, num_relevant = find_hits(top, relevant), np.diff(relevant.indptr)
    values = {}
    for k in ks:
        values[f"precision@{k}"] = precision(hits, k)
        values[f"recall@{k}"] = recall(hits, num_relevant, k)
        values[f"ndcg@{k}"] = ndcg(hits, num_relevant, k)
        values[f"hit@{k}"] = hit(hits, k)
        values[f"mrr@{k}"] = mrr(hits, k)
        values[f"map@{k}"] = average_precision(hits, num_relevant, k, map_denominator)
    return {name: np.where(num_relevant > 0, value, np.nan) for name, value in values.items()}


def means(per_user: Mapping[str, np.ndarray], names: Iterable[str] | None = None) -> dict[str, float]:
    """Mean over the users that have a value (are not NaN); a metric that no user has is left out."""
    chosen = per_user if names is None else {name: per_user[name] for name in names}
    counts = {name: np.count_nonzero(~np.isnan(value)) for name, value in chosen.items()}
    return {name: float(np.nansum(value) / counts[name]) for name, value in chosen.items() if counts[name]}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below as float64; NaN where below is 0."""
    return np.divide(above, below, out=np.full(len(below), np.nan), where=np.asarray(below) > 0)
