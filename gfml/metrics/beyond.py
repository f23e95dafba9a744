"""Beyond accuracy: who is recommended, how concentrated, how popular, and how the tail fares.

pop(i) is the number of train interactions of item i; L_u the top-K list of user u, T_u its relevant items.

Item groups (popularity descending, ties by lower id):
    head, tail            the most popular 20 % of items (rounded up), and the rest
    q1 .. q5              five groups of equal item count, q1 the most popular
    shorthead, longtail   the fewest most popular items that hold 80 % of train interactions, and the rest
    cold                  pop = 0
User groups, by train activity in the same way: users_q1 .. users_q5 (q1 the most active).

Names reported by ``beyond_accuracy`` at each cut-off K, e.g. ``head_recall@20``:
    <group>_recall, <group>_ndcg  relevance restricted to the group; users with relevant items in it
    <group>_exposure              share of all recommended slots filled by the group
    <group>_train_share, <group>_judged_share   the group's share of train / judged interactions (no cut-off)
    users_q<g>_recall, users_q<g>_ndcg        accuracy of one fifth of the users
    coverage, gini, entropy       of the exposure of all items
    arp, aplt, aclt, novelty, popularity_lift   of the lists, mean over users
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from gfml.data.interactions import column_counts
from gfml.metrics.ranking import find_hits, ndcg, recall


def by_popularity(popularity: np.ndarray) -> np.ndarray:
    """Ids by popularity descending, then lower id."""
    return np.argsort(-np.asarray(popularity, dtype=np.float64), kind="stable")


def head_items(popularity: np.ndarray, fraction: float = 0.2) -> np.ndarray:
    """bool [I]: the most popular ``fraction`` of all items, rounded up."""
    count = int(np.ceil(fraction * len(popularity) - 1e-9))
    head = np.zeros(len(popularity), dtype=bool)
    head[by_popularity(popularity)[:count]] = True
    return head


def mass_head(popularity: np.ndarray, share: float = 0.8) -> np.ndarray:
    """bool [I]: the fewest most popular items that hold ``share`` of all interactions."""
    order = by_popularity(popularity)
    held = np.cumsum(np.asarray(popularity, dtype=np.float64)[order])
    head = np.zeros(len(order), dtype=bool)
    if len(order) and held[-1] > 0:
        head[order[: np.searchsorted(held, share * held[-1] * (1 - 1e-12)) + 1]] = True
    return head


def quantile_groups(popularity: np.ndarray, groups: int = 5) -> np.ndarray:
    """int64 [I] in 0 .. groups - 1: equal item counts (they differ by at most 1), 0 the most popular."""
    labels = np.empty(len(popularity), dtype=np.int64)
    labels[by_popularity(popularity)] = np.arange(len(popularity)) * groups // max(1, len(popularity))
    return labels


def item_groups(popularity: np.ndarray, quantiles: int = 5) -> dict[str, np.ndarray]:
    """Every item group of the module as a bool mask [I]."""
    head, short = head_items(popularity), mass_head(popularity)
    labels = quantile_groups(popularity, quantiles)
    fifths = {f"q{g + 1}": labels == g for g in range(quantiles)}
    cold = np.asarray(popularity) == 0
    return {"head": head, "tail": ~head, **fifths, "shorthead": short, "longtail": ~short, "cold": cold}


def count_in_group(relevant: sp.csr_array, group: np.ndarray) -> np.ndarray:
    """|T_u and g| for every row of ``relevant`` [n, I]; int64 [n]."""
    inside = np.concatenate([[0], np.cumsum(group[relevant.indices])])
    return inside[relevant.indptr[1:]] - inside[relevant.indptr[:-1]]


def group_hits(top: np.ndarray, hits: np.ndarray, group: np.ndarray) -> np.ndarray:
    """bool [n, K]: a hit on an item of the group."""
    return hits & group[top]


def group_recall(top: np.ndarray, hits: np.ndarray, relevant: sp.csr_array, group: np.ndarray, k: int) -> np.ndarray:
    """|L_u and T_u and g| / |T_u and g| [n]; NaN for users without relevant items in g."""
    return recall(group_hits(top, hits, group), count_in_group(relevant, group), k)


def group_ndcg(top: np.ndarray, hits: np.ndarray, relevant: sp.csr_array, group: np.ndarray, k: int) -> np.ndarray:
    """NDCG where only items of g are relevant (ideal from |T_u and g|) [n]; NaN without such items."""
    return ndcg(group_hits(top, hits, group), count_in_group(relevant, group), k)


def exposure_counts(top: np.ndarray, num_items: int) -> np.ndarray:
    """How often each item is recommended, int64 [I]; -1 (no item) does not count."""
    return np.bincount(top[top >= 0], minlength=num_items)


def share(counts: np.ndarray, group: np.ndarray) -> float:
    """The group's part of all counts; NaN if there are none."""
    total = counts.sum()
    return float(counts[group].sum() / total) if total else float("nan")


def coverage(exposure: np.ndarray) -> float:
    """Distinct items recommended to anyone / I."""
    return float(np.count_nonzero(exposure) / len(exposure))


def gini(exposure: np.ndarray) -> float:
    """sum_j (2j - I - 1) c_j / (I sum c), c ascending over all I items: 0 even, (I - 1) / I all on one."""
    counts, num = np.sort(exposure).astype(np.float64), len(exposure)
    total = counts.sum()
    return float((2 * np.arange(1, num + 1) - num - 1) @ counts / (num * total)) if total else float("nan")


def effective_coverage(exposure: np.ndarray) -> float:
    """exp(entropy of the exposure shares) / I: 1 even, 1 / I all on one."""
    p = exposure[exposure > 0] / max(1, exposure.sum())
    return float(np.exp(-(p * np.log(p)).sum()) / len(exposure)) if len(p) else float("nan")


def list_mean(top: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of values[i] over the items of each list, float64 [n]; NaN for an empty list."""
    taken = top >= 0
    total = np.where(taken, values[top], 0.0).sum(axis=1)
    return np.divide(total, taken.sum(axis=1), out=np.full(len(top), np.nan), where=taken.any(axis=1))


def mean_popularity(top: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """ARP: mean pop(i) over each list, [n]."""
    return list_mean(top, popularity.astype(np.float64))


def tail_share(top: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """APLT: share of each list in the tail, [n]."""
    return list_mean(top, tail.astype(np.float64))


def tail_count(top: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """ACLT: number of tail items in each list, float64 [n]."""
    return ((top >= 0) & tail[top]).sum(axis=1).astype(np.float64)


def novelty(top: np.ndarray, popularity: np.ndarray, num_users: int) -> np.ndarray:
    """Mean of -log2(pop(i) / num_users) over each list, in bits, [n]; pop 0 counts as 1.

    num_users: those with train interactions, so that an item which all of them have carries 0 bits.
    """
    return list_mean(top, -np.log2(np.maximum(popularity, 1) / num_users))


def popularity_lift(top: np.ndarray, train: sp.csr_array, users: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Mean pop(i) of the list / mean pop(i) of the user's train items - 1, [n]; NaN without train items."""
    sums, counts = train @ popularity.astype(np.float64), np.diff(train.indptr)
    profile = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)[users]
    return mean_popularity(top, popularity) / profile - 1


def beyond_accuracy(
    top: np.ndarray, relevant: sp.csr_array, train: sp.csr_array, users: np.ndarray, ks: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Values per user [n] (NaN where undefined) and figures of all lists together; names in the module text.

    Shape: top int [n, >= max(ks)]; relevant CSR [n, I], rows as top; train CSR [U, I]; users int [n].
    """
    popularity = column_counts(train)
    groups, hits = item_groups(popularity), find_hits(top, relevant)
    per_user, totals = {}, group_shares(groups, popularity, relevant)
    fifths = quantile_groups(np.diff(train.indptr))[users]
    for k in ks:
        for name, group in groups.items():
            per_user[f"{name}_recall@{k}"] = group_recall(top, hits, relevant, group, k)
            per_user[f"{name}_ndcg@{k}"] = group_ndcg(top, hits, relevant, group, k)
        per_user |= user_group_accuracy(hits, np.diff(relevant.indptr), fifths, k)
        per_user |= list_statistics(top[:, :k], train, users, popularity, groups["tail"], k)
        totals |= exposure_statistics(exposure_counts(top[:, :k], train.shape[1]), groups, k)
    return per_user, {name: value for name, value in totals.items() if value == value}


def group_shares(groups: dict[str, np.ndarray], popularity: np.ndarray, relevant: sp.csr_array) -> dict[str, float]:
    """Each group's share of the train and of the judged interactions."""
    judged = np.bincount(relevant.indices, minlength=len(popularity))
    shares = {f"{name}_train_share": share(popularity, group) for name, group in groups.items()}
    return shares | {f"{name}_judged_share": share(judged, group) for name, group in groups.items()}


def user_group_accuracy(
    hits: np.ndarray, num_relevant: np.ndarray, labels: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    """recall and ndcg at k of each user group, NaN for users outside it."""
    values = {"recall": recall(hits, num_relevant, k), "ndcg": ndcg(hits, num_relevant, k)}
    return {
        f"users_q{g + 1}_{name}@{k}": np.where(labels == g, value, np.nan)
        for g in range(5)
        for name, value in values.items()
    }


def list_statistics(
    top: np.ndarray, train: sp.csr_array, users: np.ndarray, popularity: np.ndarray, tail: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    """arp, aplt, aclt, novelty and popularity_lift of each list of length k."""
    return {
        f"arp@{k}": mean_popularity(top, popularity),
        f"aplt@{k}": tail_share(top, tail),
        f"aclt@{k}": tail_count(top, tail),
        f"novelty@{k}": novelty(top, popularity, int(np.count_nonzero(np.diff(train.indptr)))),
        f"popularity_lift@{k}": popularity_lift(top, train, users, popularity),
    }


def exposure_statistics(exposure: np.ndarray, groups: dict[str, np.ndarray], k: int) -> dict[str, float]:
    """coverage, gini, entropy and the exposure share of each group."""
    whole = {"coverage": coverage(exposure), "gini": gini(exposure), "entropy": effective_coverage(exposure)}
    parts = {f"{name}_exposure": share(exposure, group) for name, group in groups.items()}
    return {f"{name}@{k}": value for name, value in (whole | parts).items()}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation in [-1, 1], ties by mean rank; NaN if either is constant."""
    return _correlation("spearmanr", first, second)


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b in [-1, 1]; NaN if either is constant."""
    return _correlation("kendalltau", first, second)


def _correlation(name: str, first: np.ndarray, second: np.ndarray) -> float:
    from scipy import stats

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(getattr(stats, name)(first, second).statistic)
