"""What an MCL run is made of: the model of the flags, its optimizer and batches of users, and both ways to rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gfml.base.optim import light
from gfml.engine.train import WeightAverage
from gfml.fused import path_text
from gfml.gravity import Gravity, Mass
from gfml.program.experiment import Training
from gfml.program.recommender import Recommender, mass_text
from gfml.program.steps import build_step
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.evaluation import Evaluation
from gfml.ranking.graph import build_graph
from gfml.ranking.topk import Scorer
from gfml.report.recommenders import judged_text
from mcl.model import SCORES, GravityOptions, MetricRecommender, MixedCentricOptions
from mcl.sampler import UserBatchSampler


class MCL(Recommender):
    """Users and their positives against the hardest negatives, by squared distance, gravity, or both."""

    @property
    def name(self) -> str:
        return f"{self.settings.encoder} {self.settings.mode}"

    @property
    def label(self) -> str:
        return f"{self.data.name}-{self.settings.encoder}-{self.settings.mode}"

    def build(self, *, start: bool = True) -> MetricRecommender:
        s, data = self.settings, self.data
        # The encoder first: equal seeds give equal tables in every mode and for any masses.
        encoder, gravity = self._encoder(), None
        if s.mode != "mcl":
            gravity = Gravity(
                data.num_users, data.num_items, mass_param=s.mass_param, mass_init=s.mass_init, lamb=s.grav_lambda,
                eps=1.0, emb_norm=False,
            )  # fmt: skip
            if s.ema and s.ema_scope == "frozen":
                gravity.mass.requires_grad_(False)
        mixed = MixedCentricOptions(s.batch_size, s.alpha, s.beta, s.mcl_lambda_p, s.mcl_lambda_n, s.margin)
        attraction = GravityOptions(s.grav_weight_pos, s.grav_weight_neg, bool(s.gfml_opt), s.mix_ratio)
        model = MetricRecommender(encoder, gravity, s.mode, mixed=mixed, attraction=attraction, decay=s.decay)
        return model.to(self.device)

    def _encoder(self) -> Tables:
        s, data = self.settings, self.data
        if s.encoder == "tables":
            return Tables(data.num_users, data.num_items, s.embedding_dim)
        kept = s.keep_prob if s.dropout else 1.0
        graph = build_graph(data.train)
        return LightGCN(graph, s.embedding_dim, s.num_layers, combine=s.combine, init="xavier_uniform", edge_keep=kept)

    def training(self, model: MetricRecommender) -> Training:
        s = self.settings
        optimizer = light(torch.optim.Adam)([p for p in model.parameters() if p.requires_grad], lr=s.lr, fused=True)
        ema = None
        if s.ema:
            averaged = model.parameters() if s.ema_scope == "all" else model.gravity.mass.parameters()
            ema = WeightAverage(averaged, s.ema_decay)
        sampler = UserBatchSampler(
            self.data.train, batch_size=s.batch_size, num_negatives=s.num_neg, seed=s.seed, drop_last=s.drop_last,
            duplicate_batches=s.duplicate_batches, device=self.device,
            constant=self.device.type != "cpu" and self.world.size == 1,
        )  # fmt: skip
        loss = self.shared(model.loss, model, reduction="mean")
        return Training(optimizer, sampler.epoch, loss, build_step(s, optimizer, s.clip_grad), ema=ema)

    @property
    def steps_per_epoch(self) -> int:
        """A batch is of users."""
        return -(-self.data.num_users // self.settings.batch_size)

    unshared = ("--mode mcl", "--mode mix", "--mode gfml --dropout 1")

    def sharing_problem(self) -> str | None:
        if self.settings.mode != "gfml":
            return f"--mode {self.settings.mode}, one log-sum-exp over all pairs of a batch,"
        return "--dropout 1" if self.settings.dropout else None

    def scorer(self, model: MetricRecommender, split: str = "test") -> Scorer:
        return model.scorer(self.settings.score)

    def mass(self, model: MetricRecommender) -> Mass | None:
        return None if model.gravity is None else model.gravity.mass

    def evaluate(self, model: nn.Module, split: str) -> Mapping[str, float]:
        """Ranking metrics; "sum" is recall + ndcg over ``--topks``."""
        means = super().evaluate(model, split)
        return means | {"sum": sum(means[f"{name}@{k}"] for name in ("recall", "ndcg") for k in self.settings.topks)}

    def facts(self, model: MetricRecommender, test: Evaluation) -> dict[str, Any]:
        """Models with masses are judged by both scores: "test" is that of ``--score``, "scores" holds both."""
        facts: dict[str, Any] = {"score": self.settings.score}
        if model.gravity is not None:
            scorers = {score: model.scorer(score) for score in SCORES}
            facts["scores"] = {
                score: self.evaluation(model, "test", beyond=True, scorer=scorer).means
                for score, scorer in scorers.items()
            }
        return facts

    def describe(self, model: MetricRecommender) -> list[str]:
        s = self.settings
        mixed = (
            f"alpha {s.alpha:g}, beta {s.beta:g}, lambda_p {s.mcl_lambda_p:g}, "
            f"lambda_n {s.mcl_lambda_n:g}, margin {s.margin:g}"
        )
        gravity = f"gravity lambda {s.grav_lambda:g}, weights {s.grav_weight_pos:g} / {s.grav_weight_neg:g}"
        terms = {"mcl": mixed, "gfml": gravity, "mix": f"{mixed}; {gravity}, share {s.mix_ratio:g}"}[s.mode]
        reason = (
            "a batch has all items of its users" if s.mode == "gfml" else "one log-sum-exp over all pairs of a batch"
        )
        return [
            f"{s.encoder}, mode {s.mode}: {terms}; ranking by {s.score}",
            path_text(f"{reason}; distances by formula"),
        ]

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        other = {score: means for score, means in result.get("scores", {}).items() if score != result["score"]}
        rows = {f"{result['model']}, by {result['score']}": result["test"]}
        rows |= {f"{result['model']}, by {score}": means for score, means in other.items()}
        return judged_text(result, rows) + mass_text(result.get("mass", {}))
