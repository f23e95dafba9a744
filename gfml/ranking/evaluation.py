"""Full-ranking evaluation of a scorer on one part of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions
from gfml.metrics.beyond import beyond_accuracy
from gfml.metrics.ranking import means, ranking_metrics
from gfml.ranking.topk import Scorer, full_precision, rows_per_block, topk_items


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
) -> Evaluation:
    """Rank all items for every user with at least one item in ``split`` and judge the lists.

    Masked: train for ``valid``, train and valid for ``test``, nothing for ``train`` (a fit check).
    Items that never occur in train stay candidates.
    mask_seen: False masks nothing, as some published programs do: known items then fill the top ranks.
    mask_valid: False leaves validation items in the lists of ``test``, as MMRec's protocol does: they cost ranks and
        cannot be hits.
    beyond: add group recall, exposure, coverage, popularity and novelty (gfml.metrics.beyond).
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
    relevant = part[users]
    per_user = ranking_metrics(top, relevant, ks)
    totals: dict[str, float] = {}
    if beyond:
        lists_per_user, totals = beyond_accuracy(top, relevant, data.train, users, ks)
        per_user |= lists_per_user
    cold = int(np.count_nonzero(data.user_activity[users] == 0))
    return Evaluation(split, ks, means(per_user) | totals, per_user, users, top, cold)


def check_cutoffs(ks: Sequence[int]) -> tuple[int, ...]:
    """Distinct positive integers, ascending."""
    found = tuple(sorted({int(k) for k in ks}))
    if not found or found[0] < 1:
        raise ValueError(f"cut-offs must be positive integers, at least one, not {list(ks)}")
    return found


@torch.no_grad()
def mean_item_scores(
    scorer: Scorer, users: np.ndarray, *, memory_mb: float = 256, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Mean of score() for every item over ``users``, float64 [I].

    Not from factors(): a ranking key is only some increasing image of the score.
    """
    if len(users) == 0:
        raise ValueError("a mean over users needs at least one user")
    ids = torch.as_tensor(users, dtype=torch.int64, device=device)
    rows = rows_per_block(len(ids), scorer.num_items, memory_mb)
    with full_precision():
        total = sum(scorer.score(chunk).sum(dim=0, dtype=torch.float64) for chunk in ids.split(rows))
    return (total / len(users)).cpu().numpy()
