"""Evaluation written as plain loops over users, items and ranks: the oracle, and the plain side of the benchmark."""

from __future__ import annotations

import math

import numpy as np


def reference_order(scores, seen) -> list[int]:
    """Item ids that may be recommended, score descending, then lower id."""
    allowed = [i for i in range(len(scores)) if i not in seen and scores[i] != -math.inf]
    return sorted(allowed, key=lambda i: (-float(scores[i]), i))


def reference_topk(scores, seen, k: int) -> list[int]:
    """The first k of the order, padded with -1."""
    order = reference_order(scores, seen)[:k]
    return order + [-1] * (k - len(order))


def reference_metrics(top: list[int], relevant: set[int], k: int) -> dict[str, float]:
    """Metrics of one user by their sums; ``relevant`` is not empty."""
    hits, dcg, first, precisions = 0, 0.0, None, []
    for rank, item in enumerate(top[:k], start=1):
        if item in relevant:
            hits += 1
            dcg += 1 / math.log2(rank + 1)
            first = first or rank
            precisions.append(hits / rank)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))
    return {
        f"precision@{k}": hits / k,
        f"recall@{k}": hits / len(relevant),
        f"ndcg@{k}": dcg / ideal,
        f"hit@{k}": float(hits > 0),
        f"mrr@{k}": 1 / first if first else 0.0,
        f"map@{k}": sum(precisions) / min(len(relevant), k),
        f"map_k@{k}": sum(precisions) / k,
        f"map_n@{k}": sum(precisions) / len(relevant),
    }


def rows_as_sets(matrix, users) -> list[set[int]]:
    """The stored columns of each wanted row of a CSR matrix."""
    return [set(matrix.indices[matrix.indptr[u] : matrix.indptr[u + 1]].tolist()) for u in users]


def reference_evaluate(scores, data, split: str, ks) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Lists [n, max(ks)] and values {"recall@20": [n]} of the users that have items in the split.

    scores [U, I] is indexable by user; one user is ranked at a time.
    """
    judged = data.split(split)
    users = [u for u in range(data.num_users) if judged.indptr[u + 1] > judged.indptr[u]]
    seen = rows_as_sets(data.seen(split), users)
    relevant = rows_as_sets(judged, users)
    top = [reference_topk(scores[u], hidden, max(ks)) for u, hidden in zip(users, seen, strict=True)]
    rows = [
        {name: value for k in ks for name, value in reference_metrics(listed, wanted, k).items()}
        for listed, wanted in zip(top, relevant, strict=True)
    ]
    return np.array(top), {name: np.array([row[name] for row in rows]) for name in rows[0]}
