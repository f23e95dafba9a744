"""HLR and HLR++ with the paper's or the port's relations, LRML and CML as their limits, TransCF and attention over the history beside them.

Relevance is minus the distance between u + r and v, where the relation r depends on the user, the item and the user's
history. A batch is users, positives, negatives and histories; the loss is a hinge, and every optimizer step is followed
by a projection of all vectors into the ball.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.cml import SquaredDistanceScorer
from gfml.losses import project_to_ball_, reduced
from gfml.ranking.encoders import Tables
from gfml.ranking.topk import Scorer
from hlrm.data import History, PairBatch
from hlrm.relations import DISTANCE_EPS, Attended, MemoryRelation, Relation
from hlrm.scoring import BlockScorer, MemoryScorer, TranslatedScorer, neighbour_means


@dataclass(frozen=True)
class HingeOptions:
    """margin: in units of the distance. squared: squared distances, as in the paper. reduction: sum (paper) or mean.

    copy_relations: the negative takes the positive's relation. radius: of the ball. clip_memory: rows of key and memory
    are kept within length 1 too. compat: clip by min(1, radius / (norm + 1e-7)) instead of the exact projection.
    """

    margin: float = 0.2
    squared: bool = True
    reduction: str = "mean"
    copy_relations: bool = False
    radius: float = 1.0
    clip_memory: bool = False
    compat: bool = False


def distances(query: Tensor, items: Tensor, squared: bool) -> Tensor:
    """|q - v|^2, or |q - v + 1e-6| where not squared. Shape: both [..., D] -> [...]."""
    if squared:
        return (query - items).square().sum(-1)
    return (query - items + DISTANCE_EPS).norm(dim=-1)


@torch.no_grad()
def clip_rows_(table: Tensor, radius: float = 1.0, *, compat: bool = False) -> None:
    """In place: pull rows longer than ``radius`` onto the sphere; compat: times radius / (norm + 1e-7)."""
    if not compat:
        project_to_ball_(table, radius=radius)
        return
    norm = table.norm(dim=1, keepdim=True)
    table.mul_(torch.where(norm > radius, radius / (norm + 1e-7), torch.ones_like(norm)))


class RelationModel(nn.Module):
    """Points of users and items, a relation between them, and the hinge. relation None: CML."""

    def __init__(self, encoder: Tables, relation: Relation | None, options: HingeOptions = HingeOptions()) -> None:
        super().__init__()
        if options.reduction not in ("sum", "mean"):
            raise ValueError(f"unknown reduction {options.reduction!r}: choose sum or mean")
        self.encoder, self.relation, self.options = encoder, relation, options

    def attend(self, users: Tensor, items: Tensor, history: History) -> Attended:
        """The relation of users [B] with items [B, C] and its weights; histories as drawn."""
        embedded = self.encoder(users, items)
        return self._relate(embedded.user, embedded.items, history)

    def distances(self, users: Tensor, items: Tensor, history: History) -> Tensor:
        """Distances of users [B] to items [B, C]: [B, C]; smaller is better."""
        embedded = self.encoder(users, items)
        relation = self._relate(embedded.user, embedded.items, history).vector
        return distances(embedded.user[:, None] + relation, embedded.items, self.options.squared)

    def loss(self, batch: PairBatch) -> dict[str, Tensor]:
        """{"loss": hinge over the pairs}: what :func:`gfml.engine.train.fit` takes."""
        return {"loss": self._hinge(self._pair_distances(batch), batch.weight)}

    def project(self) -> None:
        """After an optimizer step: all vectors back into the ball, and the memory's rows with clip_memory.

        All, not the batch's alone: under Adam every row moves at every step. Frozen tables stay as they are.
        """
        if self.encoder.nodes.requires_grad:
            clip_rows_(self.encoder.nodes.data, self.options.radius, compat=self.options.compat)
        if self.options.clip_memory and self.relation is not None:
            for table in self.relation.parameters():
                clip_rows_(table.data, compat=self.options.compat)

    def scorer(self, history: History, *, train: sp.csr_array, block: int = 0, memory_mb: float = 256) -> Scorer:
        """All-item scores; history: of every user. train: for neighbour means. block: most items at a time, 0: any."""
        user, item = (part.detach() for part in self.encoder.vectors())
        if self.relation is None:
            return SquaredDistanceScorer(user, item)
        kind = MemoryScorer if isinstance(self.relation, MemoryRelation) else BlockScorer
        return kind(user, item, self.relation, history, squared=self.options.squared, block=block, memory_mb=memory_mb)

    def _pair_distances(self, batch: PairBatch) -> Tensor:
        """[B, 2]: to the positive and to the negative."""
        embedded = self.encoder(batch.users, torch.stack([batch.pos, batch.neg], 1))
        related = embedded.items[:, :1] if self.options.copy_relations else embedded.items
        relation = self._relate(embedded.user, related, batch.history).vector
        return distances(embedded.user[:, None] + relation, embedded.items, self.options.squared)

    def _relate(self, user: Tensor, items: Tensor, history: History) -> Attended:
        if self.relation is None:
            return Attended(torch.zeros_like(items), items.new_zeros(len(user), 0, items.shape[1]))
        vectors = F.embedding(history.ids + self.encoder.num_users, self.encoder.nodes)
        return self.relation(user, items, vectors, history.mask)

    def _hinge(self, found: Tensor, weight: Tensor | None) -> Tensor:
        pairs = (self.options.margin + found[:, 0] - found[:, 1]).clamp_min(0)
        return reduced(pairs, self.options.reduction, weight)


class TranslatedModel(RelationModel):
    """TransCF-style: r = (mean of the user's items) * (mean of the item's users), coordinate by coordinate.

    Training takes means over drawn histories of both sides, judging over all train neighbours. To the hinge it adds
    neighbour_weight times |u - mean of items|^2 + |v - mean of users|^2 and distance_weight times the squared distance
    of the positive, means over the batch. Source: Park, Kim, Xie, Yu, Collaborative Translational Metric Learning,
    ICDM 2018 (there with neighbourhoods in full at every step).
    """

    def __init__(
        self,
        encoder: Tables,
        options: HingeOptions = HingeOptions(),
        *,
        neighbour_weight: float,
        distance_weight: float,
    ) -> None:
        super().__init__(encoder, None, options)
        self.neighbour_weight, self.distance_weight = neighbour_weight, distance_weight

    def loss(self, batch: PairBatch) -> dict[str, Tensor]:
        """Hinge and the two regularisers by name."""
        embedded = self.encoder(batch.users, torch.stack([batch.pos, batch.neg], 1))
        taste = self._mean(batch.history, self.encoder.num_users)
        crowd = self._mean(batch.audience, 0).view(2, len(batch), -1).transpose(0, 1)
        query = embedded.user[:, None] + taste[:, None] * crowd
        found = distances(query, embedded.items, self.options.squared)
        near = (embedded.user - taste).square().sum(1) + (embedded.items[:, 0] - crowd[:, 0]).square().sum(1)
        close = distances(query[:, 0], embedded.items[:, 0], True)
        how = self.options.reduction, batch.weight
        parts = {"hinge": self._hinge(found, batch.weight), "neighbours": self.neighbour_weight * reduced(near, *how),
                 "distance": self.distance_weight * reduced(close, *how)}  # fmt: skip
        return {"loss": sum(parts.values()), **parts}

    def scorer(self, history: History, *, train: sp.csr_array, block: int = 0, memory_mb: float = 256) -> Scorer:
        """All-item scores from the means over all train neighbours."""
        user, item = (part.detach() for part in self.encoder.vectors())
        return TranslatedScorer(
            user, item, neighbour_means(train, item), neighbour_means(sp.csr_array(train.T.tocsr()), user)
        )

    def _mean(self, history: History, offset: int) -> Tensor:
        """Mean vector of each row's neighbours, 0 without any: [B, D]."""
        vectors = F.embedding(history.ids + offset, self.encoder.nodes) * history.mask.unsqueeze(2)
        return vectors.sum(1) / history.counts.clamp_min(1).unsqueeze(1)
