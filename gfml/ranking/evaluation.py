"""Full-ranking evaluation of a scorer on one part of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions
from gfml.metrics.beyond import beyond_accuracy
from gfml.metrics.conventions import Case, judge_as
from gfml.metrics.ranking import means, ranking_metrics
from gfml.ranking.topk import Scorer, full_precision, rows_per_block, topk_items


@dataclass(frozen=True)
class Definitions:
    """Which definitions figures follow beside or instead of the usual ones.

    metrics_as: names of gfml.metrics.conventions whose figures are added, as ``elliot:ndcg@20``.
    map_denominator: what average precision is divided by, see gfml.metrics.ranking.
    graded: a gain of gfml.metrics.ranking by which ``graded_ndcg`` weighs the test ratings, which these conventions read too.
    """

    metrics_as: tuple[str, ...] = ()
    map_denominator: str = "min"
    graded: str | None = None


USUAL = Definitions()


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    split: the part judged.
    ks: cut-offs, ascending.
    means: ``{"recall@20": 0.18, ...}``, means over users that have a value; with ``beyond`` also the
        figures of all lists together. A metric without any user (no cold item in the split) is left out.
    per_user: ``{"recall@20": float64 [n]}``, rows as ``users``; NaN where a user has no value.
    users: int64 [n], ascending: the judged users, those with at least one item in the split.
    top: int64 [n, max(ks)], recommended items, best first, -1 where no candidate was left.
    cold_users: how many judged users have no train history; they count in the means.
    """

    split: str
    ks: tuple[int, ...]
    means: dict[str, float]
    per_user: dict[str, np.ndarray]
    users: np.ndarray
    top: np.ndarray
    cold_users: int


def evaluate(
    scorer: Scorer,
    data: Interactions,
    split: str,
    ks: Sequence[int],
    *,
    beyond: bool = False,
    mask_seen: bool = True,
    mask_valid: bool = True,
    memory_mb: float = 256,
    device: torch.device | str = "cpu",
    definitions: Definitions = USUAL,
) -> Evaluation:
    """Rank all items for every user with at least one item in ``split`` and judge the lists.

    Masked: train for ``valid``, train and valid for ``test``, nothing for ``train`` (a fit check).
    Items that never occur in train stay candidates.
    mask_seen: False masks nothing, as some published programs do: known items then fill the top ranks.
    mask_valid: False leaves validation items in the lists of ``test``, as MMRec's protocol does: they cost ranks and
        cannot be hits.
    beyond: add group recall, exposure, coverage, popularity and novelty (gfml.metrics.beyond).
    definitions: what is computed otherwise or in addition.
    device: where the user ids given to ``score`` live; ignored for scorers with factors.
    Errors: UserError for an empty split or a cut-off beyond the catalogue; ValueError for bad ks.
    """
    ks = check_cutoffs(ks)
    part = data.split(split)
    users = np.flatnonzero(np.diff(part.indptr)).astype(np.int64)
    if len(users) == 0:
        raise UserError(
            f"found no {split} interactions in {data.name}, wanted at least one: cut some off or choose another split"
        )
    seen = None
    if mask_seen and split != "train":
        seen = data.seen(split) if mask_valid else data.train
    ids = torch.from_numpy(users).to(device)
    top = topk_items(scorer, ids, ks[-1], seen=seen, memory_mb=memory_mb).cpu().numpy()
    graded = definitions.graded if split == "test" else None
    if graded:
        part = data.rated_test
    relevant = part[users]
    per_user = ranking_metrics(top, relevant, ks, map_denominator=definitions.map_denominator, graded=graded)
    totals: dict[str, float] = {}
    if beyond:
        lists_per_user, totals = beyond_accuracy(top, relevant, data.train, users, ks)
        per_user |= lists_per_user
    for name in definitions.metrics_as:
        judged_per_user, judged = _as_others(
            name, scorer, data, part, ks, seen=seen, memory_mb=memory_mb, device=device
        )
        per_user |= {f"{name}:{metric}": values[users] for metric, values in judged_per_user.items()}
        totals |= {f"{name}:{metric}": value for metric, value in judged.items()}
    cold = int(np.count_nonzero(data.user_activity[users] == 0))
    return Evaluation(split, ks, means(per_user) | totals, per_user, users, top, cold)


def _as_others(
    name: str,
    scorer: Scorer,
    data: Interactions,
    part: sp.csr_array,
    ks: Sequence[int],
    *,
    seen: sp.csr_array | None,
    memory_mb: float,
    device: torch.device | str,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Figures of a convention over the lists of all users of ``part``: per user [U], and means and figures of all lists.

    Conventions that drop the items that train lacks get lists that are longer by as many, so that they stay full.
    """
    users = np.flatnonzero(np.diff(part.indptr))
    cold = int(np.count_nonzero(data.item_popularity == 0))
    depth = min(data.num_items, ks[-1] + (cold if name in ("cornac", "warprec") else 0))
    ids = torch.from_numpy(users).to(device)
    top = np.full((data.num_users, depth), -1, dtype=np.int64)
    top[users] = topk_items(scorer, ids, depth, seen=seen, memory_mb=memory_mb).cpu().numpy()
    ranks = truth_ranks(scorer, data, part, memory_mb=memory_mb, device=device) if name == "cornac" else None
    figures = judge_as(name, Case(top, part, data.train, ranks=ranks), ks)
    return figures.per_user, figures.means


@torch.no_grad()
def truth_ranks(
    scorer: Scorer,
    data: Interactions,
    part: sp.csr_array,
    *,
    memory_mb: float = 256,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """For every stored pair of ``part``: how many known candidates score as high or higher, itself included; int64 [nnz].

    Candidates: the items of train that are not the user's own, and his items in ``part``. Ties take the worst rank.
    """
    users = np.flatnonzero(np.diff(part.indptr))
    cold = torch.from_numpy(data.item_popularity == 0).to(device)
    found = np.empty(part.nnz, dtype=np.int64)
    for rows in torch.from_numpy(users).split(rows_per_block(len(users), data.num_items, memory_mb)):
        with full_precision():
            scores = scorer.score(rows.to(device)).double()
        own, item = _pairs(part, rows.numpy())
        wanted = scores[own, item]
        scores[_pairs(data.train, rows.numpy())] = -torch.inf
        scores[own, item] = wanted
        scores[:, cold] = -torch.inf
        order = scores.sort(dim=1).values
        above = scores.shape[1] - torch.searchsorted(order[own], wanted[:, None])[:, 0]
        start, end = part.indptr[rows[0]], part.indptr[rows[-1] + 1]
        found[start:end] = above.cpu().numpy()
    return found


def _pairs(part: sp.csr_array, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored pairs of these rows: their place among ``rows``, and the item."""
    block = part[rows]
    return torch.from_numpy(np.repeat(np.arange(len(rows)), np.diff(block.indptr))), torch.from_numpy(
        block.indices.astype(np.int64)
    )


def check_cutoffs(ks: Sequence[int]) -> tuple[int, ...]:
    """Distinct positive integers, ascending."""
    found = tuple(sorted({int(k) for k in ks}))
    if not found or found[0] < 1:
        raise ValueError(f"cut-offs must be positive integers, at least one, not {list(ks)}")
    return found
