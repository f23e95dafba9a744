"""The contextual similarity by plain loops over sets, in Python floats: nothing shared with the code under test."""

from __future__ import annotations

from collections.abc import Sequence


def neighbourhoods(sim: Sequence[Sequence[float]], k: int, eps: float) -> list[set[int]]:
    """N(i): all j with D_ij at most the k-th smallest of row i (i itself included) plus eps."""
    found = []
    for row in sim:
        distance = [max(2 - 2 * s, 0.0) for s in row]
        reach = sorted(distance)[k - 1] + eps
        found.append({j for j, d in enumerate(distance) if d <= reach})
    return found


def similarity(sim: Sequence[Sequence[float]], k: int, eps: float) -> list[list[float]]:
    """W^; the complement of a neighbourhood that is everything shares nothing."""
    items = range(len(sim))
    near, half = neighbourhoods(sim, k, eps), neighbourhoods(sim, k // 2, eps)
    shared = [[0.0] * len(sim) for _ in items]
    for i in items:
        for j in near[i]:
            inside = len(near[i] & near[j]) / len(near[i])
            far_i, far_j = set(items) - near[i], set(items) - near[j]
            outside = len(far_i & far_j) / len(far_i) if far_i else 0.0
            shared[i][j] = (inside + outside) / 2
    mutual = [[j for j in items if j in half[i] and i in half[j]] for i in items]
    averaged = [[sum(shared[m][j] for m in mutual[i]) / len(mutual[i]) for j in items] for i in items]
    return [[(averaged[i][j] + averaged[j][i]) / 2 for j in items] for i in items]


def loss(sim: Sequence[Sequence[float]], labels: Sequence[int], k: int, eps: float) -> float:
    """Squared differences from the labels off the diagonal, over B^2."""
    found, items = similarity(sim, k, eps), range(len(sim))
    return sum((found[i][j] - (labels[i] == labels[j])) ** 2 for i in items for j in items if i != j) / len(sim) ** 2


def average_precision(sim: Sequence[Sequence[float]], labels: Sequence[int], query: int, step) -> float:
    """AP of one query, itself among its positives; step(x): how much an item x more similar is ranked before."""
    items, row = range(len(sim)), sim[query]
    positives = [j for j in items if labels[j] == labels[query]]
    total = 0.0
    for j in positives:
        rank = 1 + sum(step(row[i] - row[j]) for i in items if i != j)
        among = 1 + sum(step(row[i] - row[j]) for i in positives if i != j)
        total += among / rank
    return total / len(positives)
