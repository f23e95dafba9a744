"""Retrieval by cosine: who are a query's nearest neighbours, and are they of its class?

References are ranked by descending cosine. In a set judged by itself (no reference given) the query is taken out by
its index, so exact duplicates of it stay. With R the number of references of the query's class and rel_i = 1 if the
reference at rank i is of it:

    recall@K     1 if any rel_i, i <= K             (0 for a query without a match: it cannot be found)
    r_precision  sum_{i<=R} rel_i / R
    map@r        sum_{i<=R} rel_i precision@i / R   (Musgrave, Belongie, Lim, A Metric Learning Reality Check, 2020)
    map          sum_i rel_i precision@i / R        over the whole ranking

The last three are NaN for queries without a match and left out of means. Equal cosines are ranked in no stated order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gfml.distances import common_floats


@dataclass(frozen=True)
class Retrieval:
    """What :func:`retrieve` found.

    means: {"recall@1": ..., "map@r": ..., "r_precision": ..., and "map" if asked}. per_query: the same names, [Q].
    neighbours [Q, T]: reference indices, nearest first; right [Q, T]: of the query's class? cosines [Q, T].
    unmatched: queries without any reference of their class.
    """

    means: dict[str, float]
    per_query: dict[str, np.ndarray] = field(repr=False)
    neighbours: np.ndarray = field(repr=False)
    right: np.ndarray = field(repr=False)
    cosines: np.ndarray = field(repr=False)
    unmatched: int = 0


@torch.no_grad()
def retrieve(
    query: Tensor,
    query_labels: Tensor,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    keep: int = 10,
    whole: bool = False,
    memory_mib: int = 256,
) -> Retrieval:
    """Judge a set by itself, or queries against references, in blocks of queries.

    Shape: query [Q, D] and reference [N, D] of any floating-point types and lengths, computed in the wider one and in
        float32 at least; labels [Q] and [N] integers.
    keep: neighbours returned per query. whole: also the mean average precision over the whole ranking.
    memory_mib: size of one block's working memory; results do not depend on it. 60k x 60k in 256 MiB needs below
        1 GiB in all.
    Raises ValueError when shapes or kinds of numbers disagree, there is nothing to rank, a K is not positive or an
        embedding not finite.

    Examples:
        >>> points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> retrieve(points, torch.tensor([0, 0, 1, 1]), ks=[1]).means
        {'recall@1': 1.0, 'map@r': 1.0, 'r_precision': 1.0}
    """
    alone = reference is None
    if reference is None:
        reference, reference_labels = query, query_labels
    elif reference_labels is None:
        raise ValueError("found references without labels, wanted one label for each")
    query, reference = common_floats(query, reference)
    _check(query, query_labels, reference, reference_labels, ks, alone)
    classes, both = torch.unique(torch.cat([query_labels, reference_labels]), return_inverse=True)
    query_class, reference_class = both[: len(query)], both[len(query) :]
    relevant = torch.bincount(reference_class, minlength=len(classes))[query_class] - int(alone)
    reference = F.normalize(reference, dim=1)
    query = reference if alone else F.normalize(query, dim=1)
    candidates = len(reference) - int(alone)
    depth = min(candidates, max(*ks, keep, int(relevant.max()), 1))

    found: dict[str, Tensor] = {}
    size = _block_size(len(reference), depth, whole, query.element_size(), memory_mib)
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        cosines = query[part] @ reference.T
        if alone:
            own = torch.arange(start, start + len(cosines), device=query.device)
            cosines.scatter_(1, own[:, None], -torch.inf)
        block = _judge(cosines, query_class[part], reference_class, relevant[part], ks, keep, depth, candidates, whole)
        for name, values in block.items():
            # One array for all blocks: small pieces kept from each would hold its freed memory apart.
            found.setdefault(name, values.new_empty(len(query), *values.shape[1:]))[part] = values
    return _collected(found, int((relevant == 0).sum()))


def nmi(embeddings: Tensor, labels: Tensor, *, seed: int = 0) -> float:
    """Normalised mutual information of the classes and a k-means clustering of the unit vectors into as many groups.

    Means by scikit-learn: 4 starts; mini-batches where points times groups exceed 50 million. Shape: [N, D], [N].
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.metrics import normalized_mutual_info_score

    [embeddings] = common_floats(embeddings)
    points, classes = F.normalize(embeddings, dim=1).cpu().numpy(), labels.cpu().numpy()
    groups = len(np.unique(classes))
    method = KMeans if len(points) * groups <= 50_000_000 else MiniBatchKMeans
    found = method(groups, n_init=4, random_state=seed).fit_predict(points)
    return float(normalized_mutual_info_score(classes, found))


def by_class(found: Retrieval, query_labels: Tensor | np.ndarray) -> list[dict[str, float]]:
    """For every class with queries: its id ("class"), number of queries and means of every metric; hardest first."""
    labels = np.asarray(query_labels)
    rows = []
    for label in np.unique(labels):
        own = labels == label
        means = {name: _mean(values[own]) for name, values in found.per_query.items()}
        rows.append({"class": int(label), "queries": int(own.sum()), **means})
    first = next(iter(found.per_query))
    return sorted(rows, key=lambda row: (row[first], row["class"]))


def _check(
    query: Tensor, query_labels: Tensor, reference: Tensor, reference_labels: Tensor, ks: Sequence[int], alone: bool
) -> None:
    if query.ndim != 2 or reference.ndim != 2 or query.shape[1] != reference.shape[1]:
        raise ValueError(
            f"found shapes {tuple(query.shape)} and {tuple(reference.shape)}, wanted [Q, D] and [N, D] with labels"
        )
    if query_labels.shape != (len(query),) or reference_labels.shape != (len(reference),):
        raise ValueError(
            f"found {len(query_labels)} and {len(reference_labels)} labels for {len(query)} and {len(reference)} rows"
        )
    if len(query) == 0 or len(reference) <= int(alone):
        raise ValueError(f"found {len(query)} queries and {len(reference)} references, wanted something to rank")
    if not ks or min(ks) < 1:
        raise ValueError(f"found the list lengths {list(ks)}, wanted positive numbers")
    if not (torch.isfinite(query).all() and torch.isfinite(reference).all()):
        raise ValueError("found embeddings that are not finite")


def _block_size(num_references: int, depth: int, whole: bool, element: int, memory_mib: int) -> int:
    """Queries per block: cosines, their ranking (values, indices, hits, counts) and, for ``whole``, a full sort."""
    per_query = num_references * (2 * element + (element + 8 + 8 + 16 if whole else 0)) + depth * (element + 8 + 8 + 32)
    return max(1, (memory_mib << 20) // per_query)


def _judge(
    cosines: Tensor,
    query_class: Tensor,
    reference_class: Tensor,
    relevant: Tensor,
    ks: Sequence[int],
    keep: int,
    depth: int,
    candidates: int,
    whole: bool,
) -> dict[str, Tensor]:
    """Metrics and neighbours of one block of queries."""
    values, indices = cosines.topk(depth, dim=1)
    right = reference_class[indices] == query_class[:, None]
    ranks = torch.arange(1, depth + 1, device=cosines.device, dtype=torch.float64)
    within = right & (ranks <= relevant[:, None])
    share = 1.0 / relevant.double()  # infinite without a match, and 0 times it is NaN
    precision = right.cumsum(1) / ranks
    block = {f"recall@{k}": right[:, :k].any(dim=1).double() for k in ks}
    block |= {"map@r": (precision * within).sum(1) * share, "r_precision": within.sum(1) * share}
    if whole:
        order = cosines.argsort(dim=1, descending=True)[:, :candidates]
        hits = reference_class[order] == query_class[:, None]
        every = torch.arange(1, candidates + 1, device=cosines.device, dtype=torch.float64)
        block["map"] = (hits.cumsum(1) / every * hits).sum(1) * share
    shown = min(keep, depth)
    return block | {"neighbours": indices[:, :shown], "right": right[:, :shown], "cosines": values[:, :shown]}


def _collected(found: dict[str, Tensor], unmatched: int) -> Retrieval:
    joined = {name: values.cpu().numpy() for name, values in found.items()}
    pictures = {name: joined.pop(name) for name in ("neighbours", "right", "cosines")}
    means = {name: _mean(values) for name, values in joined.items()}
    return Retrieval(means, joined, **pictures, unmatched=unmatched)


def _mean(values: np.ndarray) -> float:
    """Mean of the values that exist; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
