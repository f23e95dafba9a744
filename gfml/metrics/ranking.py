"""Accuracy of top-k lists under full ranking.

With T the relevant items of a user and h_j = 1 if the item at rank j is in T, at cut-off K:

    precision  sum_{j<=K} h_j / K
    recall     sum_{j<=K} h_j / |T|                      (denominator |T|, not min(K, |T|))
    ndcg       sum_{j<=K} h_j / log2(j + 1)  over  sum_{j<=min(K,|T|)} 1 / log2(j + 1)
    hit        1 if any h_j, j <= K
    mrr        1 / rank of the first hit within K, else 0
    map        sum_{j<=K} h_j precision@j  over  min(|T|, K)  (map_k: over K; map_n: over |T|)

With graded relevance, g(r) the gain of rating r (:data:`GAINS`):

    ndcg       sum_{j<=K} g(r_j) / log2(j + 1)  over  the same sum of the user's largest gains

Users with nothing relevant have no value (NaN) and are left out of means. An item that is twice in a list counts once,
at its first rank; its later places are misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp

METRICS = ("precision", "recall", "ndcg", "hit", "mrr", "map")
AP_DENOMINATORS = ("min", "k", "n")
# Gain of a rating; exp1 is what Elliot and WarpRec take, linear what trec_eval does.
GAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda rating: np.asarray(rating, dtype=np.float64),
    "exp": lambda rating: np.exp2(rating) - 1,
    "exp1": lambda rating: np.exp2(np.asarray(rating, dtype=np.float64) + 1) - 1,
}


def find_hits(top: np.ndarray, relevant: sp.csr_array) -> np.ndarray:
    """bool [n, K]: is top[r, j] stored in row r of ``relevant``, for the first time in its row? -1 (no item) never is.

    Shape: top int [n, K] of column ids of relevant CSR [n, I].
    """
    return find_places(top, relevant) >= 0


def find_places(top: np.ndarray, relevant: sp.csr_array, *, repeats: bool = False) -> np.ndarray:
    """int64 [n, K]: where top[r, j] is stored in ``relevant.data``; -1 where it is not, and for repeats within a row
    unless these are asked for.

    One binary search over the sorted keys row * I + item. ``relevant`` must have sorted indices.
    Errors: ValueError for another number of rows.
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
    place[(keys[place] != wanted) | (top < 0)] = -1
    if repeats:
        return place
    rows, columns = np.nonzero(place >= 0)  # by row, then rank: the first of equal places is the best rank
    _, first = np.unique(place[rows, columns], return_index=True)
    repeated = np.ones(len(rows), dtype=bool)
    repeated[first] = False
    place[rows[repeated], columns[repeated]] = -1
    return place


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


def graded_ndcg(gains: np.ndarray, relevant_gains: sp.csr_array, k: int) -> np.ndarray:
    """Gains discounted by log2(rank + 1), over those of the user's k largest gains in order; NaN where these are 0.

    Shape: gains float [n, K >= k] of the list, 0 for a miss; relevant_gains CSR [n, I] of all relevant items.
    """
    kept = gains[:, :k]
    found = kept @ (1 / np.log2(np.arange(2, kept.shape[1] + 2)))
    rows = np.repeat(np.arange(relevant_gains.shape[0]), np.diff(relevant_gains.indptr))
    order = np.lexsort((-relevant_gains.data, rows))
    rank = np.arange(len(rows)) - np.repeat(relevant_gains.indptr[:-1], np.diff(relevant_gains.indptr))
    ideal = np.where(rank < k, relevant_gains.data[order] / np.log2(rank + 2), 0.0)
    return _ratio(found, np.bincount(rows, weights=ideal, minlength=len(gains)))


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
    top: np.ndarray,
    relevant: sp.csr_array,
    ks: Sequence[int],
    *,
    map_denominator: str = "min",
    graded: str | None = None,
) -> dict[str, np.ndarray]:
    """Every metric of the module at every cut-off: ``{"recall@20": float64 [n], ...}``.

    Shape: top int [n, >= max(ks)], best first, -1 for no item; relevant CSR [n, I], its data ratings if graded.
    A user without relevant items is NaN in all of them.
    graded: a name of :data:`GAINS`; adds ``graded_ndcg@K``.

    Examples:
        >>> top = np.array([[2, 0], [1, 2]])
        >>> relevant = sp.csr_array(np.array([[1, 0, 0], [0, 1, 1]]))
        >>> {name: value.tolist() for name, value in ranking_metrics(top, relevant, [2]).items() if name != "ndcg@2"}
        {'precision@2': [0.5, 1.0], 'recall@2': [1.0, 1.0], 'hit@2': [1.0, 1.0], 'mrr@2': [0.5, 1.0], 'map@2': [0.5, 1.0]}
    """
    if top.shape[1] < max(ks):
        raise ValueError(f"lists of length {top.shape[1]} cannot be judged at {max(ks)}")
    if not relevant.has_sorted_indices:
        relevant = relevant.sorted_indices()
    places, num_relevant = find_places(top, relevant), np.diff(relevant.indptr)
    hits, values = places >= 0, {}
    for k in ks:
        values[f"precision@{k}"] = precision(hits, k)
        values[f"recall@{k}"] = recall(hits, num_relevant, k)
        values[f"ndcg@{k}"] = ndcg(hits, num_relevant, k)
        values[f"hit@{k}"] = hit(hits, k)
        values[f"mrr@{k}"] = mrr(hits, k)
        values[f"map@{k}"] = average_precision(hits, num_relevant, k, map_denominator)
    if graded is not None:
        gains = with_gains(relevant, graded)
        found = list_gains(places, gains)
        values |= {f"graded_ndcg@{k}": graded_ndcg(found, gains, k) for k in ks}
    return {name: np.where(num_relevant > 0, value, np.nan) for name, value in values.items()}


def with_gains(relevant: sp.csr_array, graded: str) -> sp.csr_array:
    """The same relevant items, their ratings replaced by float64 gains."""
    if graded not in GAINS:
        raise ValueError(f"unknown gain {graded!r}: choose one of {', '.join(GAINS)}")
    return sp.csr_array((GAINS[graded](relevant.data), relevant.indices, relevant.indptr), shape=relevant.shape)


def list_gains(places: np.ndarray, gains: sp.csr_array) -> np.ndarray:
    """float64 [n, K]: the gain of each listed item, 0 for a miss; places from :func:`find_places`."""
    return np.where(places >= 0, np.append(gains.data, 0.0)[places], 0.0)


def means(per_user: Mapping[str, np.ndarray], names: Iterable[str] | None = None) -> dict[str, float]:
    """Mean over the users that have a value (are not NaN); a metric that no user has is left out."""
    chosen = per_user if names is None else {name: per_user[name] for name in names}
    counts = {name: np.count_nonzero(~np.isnan(value)) for name, value in chosen.items()}
    return {name: float(np.nansum(value) / counts[name]) for name, value in chosen.items() if counts[name]}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below as float64; NaN where below is 0."""
    return np.divide(above, below, out=np.full(len(below), np.nan), where=np.asarray(below) > 0)
