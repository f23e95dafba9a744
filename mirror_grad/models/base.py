"""What the models share: how they are made, the rows of a batch, and ranking by a dot product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.ranking.sampling import Triples
from gfml.ranking.topk import FactorScorer
from mirror_grad.data import MultimodalData
from mirror_grad.parts.modes import evaluating


class MultimodalModel(nn.Module):
    """A model of users and items. A subclass says what it is made of, what its final vectors are, and its loss.

    settings: the dataclass of its hyper-parameters. behaviour: "fixed", or "published", which repeats the faults of the
    published code. seed: of what is drawn once an epoch.
    """

    def __init__(
        self, data: MultimodalData, settings: Any, *, behaviour: str = "fixed", embedding_dim: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        self.settings, self.published, self.seed = settings, behaviour == "published", seed
        self.num_users, self.num_items = data.num_users, data.num_items
        self.build(data, embedding_dim)

    def build(self, data: MultimodalData, dim: int) -> None:
        """Create parameters and buffers. dim: width of the vectors."""
        raise NotImplementedError

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        """{"loss": scalar, named terms} of a batch of ids [B]; called twice on a mirrored batch."""
        raise NotImplementedError

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Final vectors of all users [U, D] and all items [I, D]."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """The vectors whose dot product is the score: the final ones, if a model says nothing else."""
        return self.outputs()

    @evaluating
    def scorer(self) -> FactorScorer:
        """Scores of all items from the parameters of the moment, in eval mode."""
        user, item = self.factors()
        return FactorScorer(user.detach(), item.detach())

    def split(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the users and of the items among those of all nodes [U + I, D]."""
        user, item = nodes.split([self.num_users, self.num_items])
        return user, item

    def node_rows(self, batch: Triples, nodes: Tensor) -> tuple[Tensor, ...]:
        """Rows of a batch's users, positives and negatives among those of all nodes [U + I, D]: [B, D] each."""
        ids = torch.cat([batch.users, self.num_users + batch.pos, self.num_users + batch.neg])
        return F.embedding(ids, nodes).chunk(3)

    def final_rows(self, batch: Triples) -> tuple[Tensor, Tensor, Tensor]:
        """Final vectors of a batch's users, positives and negatives: [B, D] each."""
        user, item = self.outputs()
        return F.embedding(batch.users, user), F.embedding(batch.pos, item), F.embedding(batch.neg, item)
