"""The model: an encoder whose squared distances rank, and the losses of a batch in three modes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gfml.cml import SquaredDistanceScorer
from gfml.gravity import Gravity, GravityScorer
from gfml.ranking.encoders import Tables
from gfml.ranking.topk import Scorer
from mcl import losses
from mcl.pairs import pair_sq_distances
from mcl.sampler import UserBatch

MODES = ("mcl", "gfml", "mix")
SCORES = ("distance", "gravity")


@dataclass(frozen=True)
class MixedCentricOptions:
    """alpha, beta: temperatures; lambda_p, lambda_n: offsets; margin: slack of the mining (the paper's epsilon).

    Offsets and margin are in squared-distance units. batch_size: the constant m of the loss.
    """

    batch_size: int
    alpha: float = 1.25
    beta: float = 5.0
    lambda_p: float = 6.5
    lambda_n: float = -0.5
    margin: float = 1.0


@dataclass(frozen=True)
class GravityOptions:
    """Weights of the pull and push terms, and the share of the gravity loss in mode mix."""

    weight_pos: float = 1.0
    weight_neg: float = 1.0
    pull_only: bool = False
    mix_ratio: float = 0.5


class MetricRecommender(nn.Module):
    """Ranks by minus squared distance (or by gravity) and gives the loss of a batch of users.

        mcl   L_MCL                                + decay R
        gfml  L_gravity                            + decay R, where R sees only the hardest negatives
        mix   (1 - rho) L_MCL + rho L_gravity      + decay R

    gravity: score and masses of the modes gfml and mix; None for mcl.
    """

    def __init__(
        self,
        encoder: Tables,
        gravity: Gravity | None,
        mode: str,
        *,
        mixed: MixedCentricOptions,
        attraction: GravityOptions = GravityOptions(),
        decay: float = 1e-4,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
        if (gravity is None) != (mode == "mcl"):
            raise ValueError(f"mode {mode!r} {'has no' if mode == 'mcl' else 'needs a'} gravity score")
        self.encoder, self.gravity, self.mode = encoder, gravity, mode
        self.mixed, self.attraction, self.decay = mixed, attraction, decay

    def loss(self, batch: UserBatch) -> dict[str, Tensor]:
        """{"loss": total, named parts}: what :func:`gfml.engine.train.fit` takes."""
        sq_pos, sq_neg = self.sq_distances(batch)
        nearest = None if self.mode == "mcl" else losses.hardest(sq_neg)[:, None]
        parts: dict[str, Tensor] = {}
        if self.mode != "gfml":
            parts |= self._mixed_centric(batch, sq_pos, sq_neg)
        if nearest is not None:
            hard = (table.gather(1, nearest)[:, 0] for table in (sq_neg, batch.neg))
            parts |= self._attraction(batch, sq_pos, *hard)
        if self.decay:
            parts["reg"] = self.decay * self.ego_reg(batch, nearest)
        shares = self._shares()
        return {"loss": sum(shares.get(name, 1.0) * value for name, value in parts.items()), **parts}

    def sq_distances(self, batch: UserBatch) -> tuple[Tensor, Tensor]:
        """Squared distances of the batch's positives [E] and negatives [E, W], with gradient."""
        items = torch.cat([batch.pos[:, None], batch.neg], 1)
        ends = batch.counts.cumsum(0) * items.shape[1]
        indptr = torch.cat([ends.new_zeros(1), ends])
        nodes = items.reshape(-1) + self.encoder.num_users
        sq_distance = pair_sq_distances(self.encoder.outputs(), batch.users, indptr, nodes).view(items.shape)
        return sq_distance[:, 0], sq_distance[:, 1:]

    def ego_reg(self, batch: UserBatch, nearest: Tensor | None) -> Tensor:
        """The regulariser before ``decay``; in mode gfml only the negatives ``nearest`` [E, 1] take part."""
        neg = batch.neg.gather(1, nearest) if self.mode == "gfml" else batch.neg
        first = self.encoder.num_users
        return losses.ego_reg(
            self.encoder.nodes, batch.users[batch.segment], batch.pos + first, neg + first, batch.weight
        )

    def scorer(self, score: str = "distance") -> Scorer:
        """All-item ranking: minus the squared distance (as published), or the gravity score with its masses."""
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}: choose one of {', '.join(SCORES)}")
        user, item = (part.detach() for part in self.encoder.vectors())
        if score == "distance":
            return SquaredDistanceScorer(user, item)
        if self.gravity is None:
            raise ValueError("mode mcl has no masses: rank by distance")
        return GravityScorer(self.gravity, user, item)

    def _mixed_centric(self, batch: UserBatch, sq_pos: Tensor, sq_neg: Tensor) -> dict[str, Tensor]:
        options = self.mixed
        kept = losses.mine(sq_pos, sq_neg, batch.segment, len(batch.users), options.margin)
        if batch.weight is not None:
            real = batch.weight > 0
            kept = losses.Kept(kept.pos & real, kept.neg & real[:, None])
        found = losses.mixed_centric(
            sq_pos, sq_neg, kept, alpha=options.alpha, beta=options.beta, offset_pos=options.lambda_p,
            offset_neg=options.lambda_n, batch_size=options.batch_size,
        )  # fmt: skip
        return {"mcl_pos": found.pos, "mcl_neg": found.neg}

    def _attraction(self, batch: UserBatch, sq_pos: Tensor, sq_hard: Tensor, hard: Tensor) -> dict[str, Tensor]:
        options, users = self.attraction, batch.users[batch.segment]
        pos, neg = (
            self.gravity.from_sq_distance(sq_distance, self.gravity.mass(users, items))
            for sq_distance, items in ((sq_pos, batch.pos), (sq_hard, hard))
        )
        pull, push = losses.pull_push(
            pos,
            neg,
            weight_pos=options.weight_pos,
            weight_neg=options.weight_neg,
            pull_only=options.pull_only,
            weight=batch.weight,
        )
        return {"pull": pull, "push": push}

    def _shares(self) -> dict[str, float]:
        """Weights of the named parts in the total; 1 where none is given."""
        if self.mode != "mix":
            return {}
        rho = self.attraction.mix_ratio
        return {"mcl_pos": 1 - rho, "mcl_neg": 1 - rho, "pull": rho, "push": rho}
