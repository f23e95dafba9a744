"""Popularity damped when ranking, without retraining, and what that trades: the frontier of head against tail recall."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gfml.data.interactions import Interactions
from gfml.ranking.evaluation import evaluate
from gfml.ranking.topk import Scorer

# Users whose scores tell how far scores lie apart.
SAMPLE = 1000
# Figures of a point of a frontier, each at the cut-off.
KEPT = ("recall", "ndcg", "head_recall", "tail_recall", "coverage", "arp")


@dataclass(frozen=True)
class Damped:
    """score(u, i) - penalty_i; penalty [I]."""

    scorer: Scorer
    penalty: Tensor

    @property
    def num_users(self) -> int:
        return self.scorer.num_users

    @property
    def num_items(self) -> int:
        return self.scorer.num_items

    def score(self, users: Tensor) -> Tensor:
        scores = self.scorer.score(users)
        return scores - self.penalty.to(scores)

    def factors(self) -> None:
        return None


def damped(scorer: Scorer, data: Interactions, gamma: float) -> Scorer:
    """The scorer with gamma * s * log(1 + n_i) taken off, n_i the train interactions of item i; itself for gamma 0.

    s is the mean over users of the standard deviation of their scores over items, so that one gamma means about the same for
    scores of any scale. Below 0 popularity is raised.
    """
    if gamma == 0:
        return scorer
    users = torch.arange(0, data.num_users, max(1, data.num_users // SAMPLE))
    with torch.no_grad():
        spread = float(scorer.score(users).double().std(dim=1).mean())
    counts = torch.from_numpy(np.log1p(data.item_popularity))
    return Damped(scorer, gamma * spread * counts)


def frontier(
    scorer: Scorer, data: Interactions, gammas: Iterable[float], k: int, splits: Sequence[str] = ("valid", "test")
) -> list[dict[str, float | str]]:
    """Figures of the damped scorer, a point per split and gamma: {"split", "gamma", "recall@20", "head_recall@20", ...}."""
    points = []
    for gamma in gammas:
        ranked = damped(scorer, data, gamma)
        for split in splits:
            means = evaluate(ranked, data, split, [k], beyond=True).means
            points.append(
                {"split": split, "gamma": gamma} | {f"{name}@{k}": means.get(f"{name}@{k}", 0.0) for name in KEPT}
            )
    return points


def frontier_area(heads: Sequence[float], tails: Sequence[float]) -> float:
    """Area of all (head, tail) at or below some point of a frontier: the larger, the more of both can be had.

    >>> frontier_area([2.0, 1.0], [1.0, 3.0])
    4.0
    """
    area, reached = 0.0, 0.0
    for head, tail in sorted(zip(heads, tails, strict=True), reverse=True):
        # From the largest head on, only what lies above all tails so far is new.
        area += head * max(0.0, tail - reached)
        reached = max(reached, tail)
    return area
