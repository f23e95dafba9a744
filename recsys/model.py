"""The recommender: an encoder (MF, LightGCN or CML tables), a gravity score and one of seven losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gfml import losses
from gfml.cml import ItemFeatures, MetricOptions, SquaredDistanceScorer, metric_loss
from gfml.fused import DevicePairLoss, FusedHinge, FusedPairLoss, why_no_fused_hinge
from gfml.gravity import Gravity, GravityScorer
from gfml.ranking.encoders import Embedded, Tables
from gfml.ranking.sampling import Triples
from gfml.ranking.topk import Factors, FactorScorer, Scorer

MODELS = ("mf", "lgn", "cml")
INFER_MODES = ("mat", "dot", "gravity", "original")


@dataclass(frozen=True)
class PairOptions:
    """Weights of the six pair losses (:func:`gfml.losses.pair_loss`)."""

    mix_ratio: float = 0.5
    decay: float = 1e-4
    mass_decay: float = 1e-2
    compat: bool = False


class Recommender(nn.Module):
    """Scores users and items and gives the loss of a batch of triples.

    encoder makes the vectors; gravity the gravity score (its masses are never propagated over a graph).
    metric and features are CML's loss and its feature regulariser; radius is that of its ball, None: no ball.
    """

    def __init__(
        self,
        encoder: Tables,
        gravity: Gravity,
        loss_mode: str,
        *,
        pair: PairOptions = PairOptions(),
        metric: MetricOptions = MetricOptions(),
        radius: float | None = None,
        features: ItemFeatures | None = None,
    ) -> None:
        super().__init__()
        if loss_mode not in losses.LOSS_MODES:
            raise ValueError(f"unknown loss mode {loss_mode!r}: choose one of {', '.join(losses.LOSS_MODES)}")
        self.encoder, self.gravity, self.loss_mode = encoder, gravity, loss_mode
        self.pair, self.metric, self.radius, self.features = pair, metric, radius, features

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        """{"loss": total, named parts}: what :func:`gfml.engine.train.fit` takes."""
        if self.loss_mode == "cml":
            return metric_loss(self.encoder, batch, self.metric, self.features)[0]
        items = torch.cat([batch.pos[:, None], batch.neg.view(len(batch), -1)], 1)
        embedded = self.encoder(batch.users, items)
        return losses.pair_loss(
            self.loss_mode,
            dot=self._split(self._dot(embedded)) if self.loss_mode in ("dot", "bpr", "mix", "mix_bpr") else None,
            gravity=self._gravity_scores(embedded, batch.users, items),
            emb_reg=losses.embedding_reg(
                embedded.ego_user, embedded.ego_items[:, 0], embedded.ego_items[:, 1:], batch.weight
            ),
            mass=self._mass_reg(batch.users, items, batch.weight),
            decay=self.pair.decay,
            mass_decay=self.pair.mass_decay,
            mix_ratio=self.pair.mix_ratio,
            compat=self.pair.compat,
            weight=batch.weight,
        )

    def fused_loss(self, *, on_device: bool = False) -> FusedPairLoss | FusedHinge | str:
        """:meth:`loss` with gradients by formula, on other devices than the CPU if ``on_device``; or why there is none."""
        if self.loss_mode == "cml":
            return why_no_fused_hinge(self.encoder, self.metric, self.features) or FusedHinge(self.encoder, self.metric)
        there = on_device and self.encoder.nodes.device.type != "cpu"
        kind = DevicePairLoss if there else FusedPairLoss
        reason = kind.why_not(self.encoder, self.gravity, self.loss_mode, compat=self.pair.compat)
        weights = {"decay": self.pair.decay, "mass_decay": self.pair.mass_decay, "mix_ratio": self.pair.mix_ratio}
        return reason or kind(self.encoder, self.gravity, self.loss_mode, **weights)

    def project(self) -> None:
        """After an optimizer step: pull every point into the ball, when there is one; momentum moves them all."""
        if self.radius is not None:
            losses.project_to_ball_(self.encoder.nodes.data, radius=self.radius)

    @property
    def ranks_by_gravity(self) -> bool:
        """Whether the default ranking contains the gravity score, and so the item masses."""
        return self._ranking_score("mat") in ("gravity", "blend")

    def scorer(self, infer_mode: str = "mat", mass_scale: float = 1.0) -> Scorer:
        """All-item scores with the score that was trained.

        mat: dot and bpr rank by the dot product; gravity and bpr_gra by g; mix and mix_bpr by
        (1 - rho) dot + rho g; cml by minus the squared distance. dot and gravity force one of the two.
        original: as published: only loss mode gravity on MF ranks by g, on vectors that are not normalised, and every
        score passes through a float32 sigmoid, which is exactly 1 from about 16.7 on, so that high scores tie.
        mass_scale: factor on the log-masses in g.
        """
        if infer_mode == "original":
            return SaturatedScorer(self._original_scorer())
        user, item = (part.detach() for part in self.encoder.vectors())
        choice = self._ranking_score(infer_mode)
        if choice == "dot":
            return FactorScorer(user, item)
        if choice == "cml":
            return SquaredDistanceScorer(user, item)
        if choice == "blend":
            return BlendScorer(self.gravity, user, item, self.pair.mix_ratio, mass_scale)
        return GravityScorer(self.gravity, user, item, mass_scale=mass_scale)

    def _original_scorer(self) -> Scorer:
        user, item = (part.detach() for part in self.encoder.vectors())
        if self.loss_mode == "gravity" and type(self.encoder) is Tables:
            return GravityScorer(self.gravity, user, item, emb_norm=False)
        return FactorScorer(user, item)

    def _ranking_score(self, infer_mode: str) -> str:
        if infer_mode not in INFER_MODES:
            raise ValueError(f"unknown infer mode {infer_mode!r}: choose one of {', '.join(INFER_MODES)}")
        if infer_mode in ("dot", "gravity"):
            return infer_mode
        return {"gravity": "gravity", "bpr_gra": "gravity", "mix": "blend", "mix_bpr": "blend", "cml": "cml"}.get(
            self.loss_mode, "dot"
        )

    def parameter_groups(self, decay: float, mass_decays: bool) -> list[dict[str, object]]:
        """Optimizer groups: decoupled decay on tables and projections, on masses only if asked, never on lambda."""
        mass = list(self.gravity.mass.parameters())
        lamb = [p for name, p in self.gravity.named_parameters() if name == "log_lamb"]
        special = {id(p) for p in mass + lamb}
        rest = [p for p in self.parameters() if id(p) not in special]
        groups = [(rest, decay), (mass, decay if mass_decays else 0.0), (lamb, 0.0)]
        return [{"params": params, "weight_decay": weight} for params, weight in groups if params]

    def _gravity_scores(self, embedded: Embedded, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.loss_mode in ("dot", "bpr"):
            return None
        return self._split(self.gravity(embedded.user, embedded.items, users, items))

    def _mass_reg(self, users: Tensor, items: Tensor, weight: Tensor | None) -> Tensor | float:
        if self.loss_mode in ("dot", "bpr") or not self.pair.mass_decay:
            return 0.0
        user, item = self.gravity.mass.raw(users, items)
        pos, neg = (None, None) if item is None else self._split(item)
        return losses.mass_reg_compat(user, pos, neg) if self.pair.compat else losses.mass_reg(user, pos, neg, weight)

    @staticmethod
    def _dot(embedded: Embedded) -> Tensor:
        return (embedded.user[:, None] * embedded.items).sum(-1)

    @staticmethod
    def _split(scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores[:, 0], scores[:, 1:]


class BlendScorer:
    """(1 - rho) dot + rho g for all items; no dot-product form, so blocks are scored in full."""

    def __init__(self, gravity: Gravity, user: Tensor, item: Tensor, mix_ratio: float, mass_scale: float = 1.0) -> None:
        self.dot = FactorScorer(user, item)
        self.gravity = GravityScorer(gravity, user, item, mass_scale=mass_scale)
        self.mix_ratio = mix_ratio
        self.num_users, self.num_items = user.shape[0], item.shape[0]

    def score(self, users: Tensor) -> Tensor:
        """Blended scores of users [B] with every item: [B, I]."""
        return self.dot.score(users).mul_(1 - self.mix_ratio).add_(self.gravity.score(users), alpha=self.mix_ratio)

    @property
    def user(self) -> Tensor:
        """User vectors [U, D]."""
        return self.dot.user

    @property
    def item(self) -> Tensor:
        """Item vectors [I, D]."""
        return self.dot.item

    def at(self, users: Tensor, items: Tensor) -> Tensor:
        """Blended scores of users [B] with their own items int64 [B, K]: [B, K]."""
        return (1 - self.mix_ratio) * self.dot.at(users, items) + self.mix_ratio * self.gravity.at(users, items)

    def against(self, items: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Blended scores of user vectors [B, D] with all items, or with items int64 [W]."""
        dot, gravity, share = self.dot.against(items), self.gravity.against(items), self.mix_ratio
        return lambda vectors: (1 - share) * dot(vectors) + share * gravity(vectors)

    def factors(self) -> Factors | None:
        """The dot product alone when rho is 0, the gravity form when it is 1, else None."""
        if self.mix_ratio == 0:
            return self.dot.factors()
        return self.gravity.factors() if self.mix_ratio == 1 else None


class SaturatedScorer:
    """sigmoid(score) of another scorer, ranked as it is: ties and all (the published programs' ranking)."""

    def __init__(self, inner: Scorer) -> None:
        self.inner = inner
        self.num_users, self.num_items = inner.num_users, inner.num_items

    def score(self, users: Tensor) -> Tensor:
        """Probabilities of users [B] with every item: [B, I]."""
        return self.inner.score(users).sigmoid_()

    def factors(self) -> Factors | None:
        """None: the ties are part of the ranking."""
        return None
