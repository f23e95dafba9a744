"""The six metrics as the published programs compute them, and the cohorts of users they are averaged over.

With hits h_1 .. h_K of a list and T the user's relevant items:

    prec        sum h / K                          rec, hitrate   sum h / |T| (hitrate is recall there)
    map         sum h_q prec@q / K                 mrr            sum of 1 / rank over ALL hits; can exceed 1
    ndcg        DCG over the DCG of min(|T|, K) leading hits
    ndcg_local  DCG over the DCG of the list's own hits moved to the front; users without a hit are left out

The usual definitions are in :mod:`gfml.metrics.ranking`.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from gfml.metrics.ranking import find_hits, ndcg

NAMES = ("hitrate", "map", "mrr", "ndcg", "prec", "rec", "ndcg_local")


def paper_metrics(
    top: np.ndarray, relevant: sp.csr_array, k: int, *, whole_list: bool = False
) -> dict[str, np.ndarray]:
    """Values per user [n]; NaN where a user has none.

    Shape: top int [n, >= k]; relevant CSR [n, I]. whole_list: the ideal order of ndcg_local is made of all hits in the
    list that is given, not of the first k alone, as in the port.
    """
    found = find_hits(top, relevant)
    hits, size = found[:, :k].astype(np.float64), np.diff(relevant.indptr)
    rank = np.arange(1, k + 1)
    share = hits.sum(1) / np.where(size > 0, size, np.nan)
    ideal = np.minimum((found if whole_list else found[:, :k]).sum(1), k)
    best = np.concatenate([[0.0], np.cumsum(1 / np.log2(rank + 1))])[ideal]
    values = {
        "hitrate": share,
        "map": (hits * np.cumsum(hits, 1) / rank).sum(1) / k,
        "mrr": (hits / rank).sum(1),
        "ndcg": ndcg(found, size, k),
        "prec": hits.sum(1) / k,
        "rec": share,
        "ndcg_local": np.divide(hits @ (1 / np.log2(rank + 1)), best, out=np.full(len(best), np.nan), where=best > 0),
    }
    return {name: np.where(size > 0, value, np.nan) for name, value in values.items()}


def cohorts(num_users: int, size: int, number: int, seed: int) -> list[np.ndarray]:
    """Disjoint random groups of rows 0 .. num_users - 1: ``number`` of ``size``, smaller when there are too few."""
    size = min(size, num_users // number) or 1
    order = np.random.default_rng(seed).permutation(num_users)
    return [order[start : start + size] for start in range(0, min(number * size, num_users), size)]


def median_popularity(top: np.ndarray, popularity: np.ndarray) -> float:
    """MMR of the paper: median train count of the distinct items in the lists."""
    return float(np.median(popularity[np.unique(top[top >= 0])]))


def cohort_metrics(
    top: np.ndarray,
    relevant: sp.csr_array,
    popularity: np.ndarray,
    k: int,
    groups: list[np.ndarray],
    *,
    whole_list: bool = False,
) -> dict[str, dict[str, float]]:
    """{"map@10": {"mean", "std"}, ...}: means over the groups' means, sample standard deviation between groups."""
    per_user = paper_metrics(top, relevant, k, whole_list=whole_list)
    found: dict[str, list[float]] = {}
    for group in groups:
        for name, values in per_user.items():
            known = values[group][~np.isnan(values[group])]
            found.setdefault(f"{name}@{k}", []).append(float(known.mean()) if len(known) else float("nan"))
        found.setdefault(f"mmr@{k}", []).append(median_popularity(top[group, :k], popularity))
    return {name: _summary(np.array(values)) for name, values in found.items()}


def _summary(values: np.ndarray) -> dict[str, float]:
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else 0.0
    return {"mean": mean, "std": float(known.std(ddof=1)) if len(known) > 1 else 0.0}
