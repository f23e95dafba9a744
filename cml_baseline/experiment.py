"""What a CML run is made of: points in a ball, their optimizer and triples, and how the catalogue is judged by groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cml_baseline import data as sources
from cml_baseline.report import draw, write_items
from cml_baseline.table import EpochTable, read_epochs
from gfml.base.files import atomic_open
from gfml.base.optim import light
from gfml.cml import FeatureProjection, ItemFeatures, MetricLearner, MetricOptions
from gfml.data.interactions import Interactions
from gfml.distances import SquaredDistance
from gfml.engine.runs import Run
from gfml.engine.train import FitResult, Optimizers
from gfml.fused import FusedHinge, path_text, why_no_fused_hinge
from gfml.program.experiment import Judged, Training
from gfml.program.index import measure_index
from gfml.program.recommender import Recommender
from gfml.program.steps import ProjectedStep, build_step, check_judgeable
from gfml.ranking.evaluation import Evaluation
from gfml.ranking.sampling import TripleSampler, TwoStageSampler
from gfml.report.recommenders import USUAL_METRICS, other_conventions, table_columns, text_table
from gfml.report.stored import read_arrays

# Recall of item groups, by popularity in train: the most popular fifth, the other 80 %, and items train never shows.
GROUPS = ("q1", "tail", "cold")


class CML(Recommender):
    """Train pairs against the nearest of some drawn negatives, by squared distance."""

    @classmethod
    def load(cls, settings: Any) -> Interactions:
        data = sources.load(settings)
        check_judgeable(data, settings.topks, settings.select_metric, settings.select_on)
        return data

    @property
    def name(self) -> str:
        return "cml" if self.settings.features is None else "cml with features"

    @property
    def label(self) -> str:
        return self.data.name

    @property
    def progress(self) -> bool | None:
        """The table of epochs stands for the lines."""
        return bool(self.settings.progress) and self.world.is_main

    # -- building and training

    def build(self, *, start: bool = True) -> MetricLearner:
        s = self.settings
        loss = MetricOptions(
            margin=s.margin, use_rank_weight=s.rank_weight, rank_floor=s.rank_floor, reduction=s.reduction,
            cov_weight=s.cov_weight, cov_form=s.cov_form, feature_weight=s.feature_weight,
        )  # fmt: skip
        model = MetricLearner(
            self.data.num_users, self.data.num_items, s.embedding_dim, options=loss, radius=s.clip_norm, std=s.init_std,
            features=self._features(),
        )  # fmt: skip
        return model.to(self.device)

    def _features(self) -> ItemFeatures | None:
        s, table = self.settings, sources.features(self.settings, self.data)
        if table is None:
            return None
        projection = FeatureProjection(
            table.values.shape[1], s.embedding_dim, hidden_dim=s.hidden_dim, dropout=s.dropout, scale=s.feature_scale,
            radius=s.clip_norm,
        )  # fmt: skip
        cold = torch.from_numpy(self.data.item_popularity == 0)
        values, known = torch.from_numpy(table.values), torch.from_numpy(table.known)
        return ItemFeatures(projection, values, known, cold, cold_offset=s.cold_offset)

    def training(self, model: MetricLearner) -> Training:
        """Every step ends with the projection into the ball. The feature network takes Adam always."""
        s = self.settings
        optimizer = self._optimizer(model)
        step = ProjectedStep(build_step(s, optimizer, s.clip_grad), model)
        fused = self.fused_or_reason(model)
        loss = self.shared(model.loss if isinstance(fused, str) else fused, model, reduction=s.reduction)
        return Training(optimizer, self._sampler(model).epoch, loss, step=step)

    def fused_or_reason(self, model: MetricLearner) -> FusedHinge | str:
        """The loss with gradients by formula, or why autograd makes them."""
        reason = self.why_autograd or why_no_fused_hinge(model.encoder, model.options, model.features)
        return reason or FusedHinge(model.encoder, model.options)

    def _optimizer(self, model: MetricLearner) -> torch.optim.Optimizer | Optimizers:
        s, points = self.settings, list(model.encoder.parameters())
        network = [] if model.features is None else list(model.features.parameters())
        if s.optimizer == "adam":
            groups = [{"params": points, "lr": s.lr}, *([{"params": network, "lr": s.feature_lr}] if network else [])]
            return light(torch.optim.Adam)(groups, fused=True)
        optimizer = light(torch.optim.Adagrad)(points, s.lr, initial_accumulator_value=s.accumulator, foreach=True)
        return (
            Optimizers(optimizer, light(torch.optim.Adam)(network, s.feature_lr, fused=True)) if network else optimizer
        )

    def _sampler(self, model: MetricLearner) -> TripleSampler:
        """Every train pair once an epoch, with negatives as ``--sampler`` says."""
        s = self.settings
        common = {"batch_size": s.batch_size, "seed": s.seed, "scheme": "interaction", "num_negatives": s.num_neg, "device": self.device, "constant": self.constant_batches}  # fmt: skip
        if s.sampler == "two-stage":
            return TwoStageSampler(
                self.data.train, item_vectors=lambda: model.encoder.vectors()[1], num_candidates=s.candidates,
                refresh=s.refresh, **common,
            )  # fmt: skip
        return TripleSampler(self.data.train, negatives=s.sampler, **common)

    unshared = ("--cov-weight", "--features")

    def sharing_problem(self) -> str | None:
        if self.settings.cov_weight:
            return "--cov-weight"
        return "--features" if self.settings.features else None

    # -- judging and files

    def item_space(self, model: MetricLearner) -> tuple[torch.Tensor, SquaredDistance]:
        return model.vectors()[1].detach(), SquaredDistance("l2")

    def vectors(self, model: MetricLearner) -> tuple[torch.Tensor, torch.Tensor]:
        user, item = model.vectors()
        return user.detach(), item.detach()

    def judge(self, model: MetricLearner, fitted: FitResult | None, run: Run) -> Judged:
        judged = super().judge(model, fitted, run)
        judged.result["epochs"] = read_epochs(run.path / "epochs.csv")
        return judged

    def facts(self, model: MetricLearner, test: Evaluation) -> dict[str, Any]:
        return {"cold_items": int((self.data.item_popularity == 0).sum())}

    def arrays(self, model: MetricLearner, test: Evaluation) -> dict[str, np.ndarray]:
        user, item = (part.cpu().numpy() for part in self.vectors(model))
        arrays = super().arrays(model, test) | {"user": user, "item": item}
        if (offsets := model.offsets()) is not None:
            arrays["item_offset"] = offsets.cpu().numpy()
        if self.data.item_ids is not None:
            arrays["item_ids"] = np.asarray([str(name) for name in self.data.item_ids.tolist()])
        return arrays

    def tracker(self, run: Run, training: Training | None) -> EpochTable:
        s, first = self.settings, training.batches(1)
        # The reported loss is a mean over batches; times this it is the sum over the epoch's pairs.
        factor = len(first) if s.reduction == "sum" else len(first.users)
        usual = super().tracker(run, training)
        shown = [f"recall@{k}" for k in s.topks]
        return EpochTable(
            usual.log_dir, run.file("epochs.csv"), s.select_on, shown, factor, quiet=not self.world.is_main
        )

    def finished(self, model: MetricLearner, judged: Judged, run: Run) -> None:
        write_items(run.path, self.data, sources.item_info(self.settings, self.data))
        self.again(run)

    def again(self, run: Run) -> None:
        if self.settings.ann != "off" and self.world.is_main:
            index_vectors(run.path, self.settings.ann)

    def page(self, run: Run, judged: Judged) -> Path:
        return draw([run.path])

    # -- words

    def describe(self, model: MetricLearner) -> list[str]:
        s, lines = self.settings, []
        if model.features is not None:
            known, cold = int(model.features.known.sum()), int(model.features.placed.sum())
            lines.append(
                f"note: features: {model.features.features.shape[1]} columns for {known:,} of {self.data.num_items:,} items; "
                f"{cold:,} cold items are placed by them"
            )
        weight = "log(1 + rank)" if s.rank_weight else "none"
        return [
            *lines,
            f"CML: D {s.embedding_dim}, margin {s.margin:g}, ball {s.clip_norm:g}, rank weight {weight}, "
            f"covariance {s.cov_weight:g}; {s.num_neg} {s.sampler} negatives, {s.optimizer} {s.lr:g}, batch {s.batch_size:,}",
            path_text(self.fused_or_reason(model), 3 * s.batch_size),
        ]

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        """The results table and the recall of item groups."""
        rows = {result["model"]: result["test"]}
        rows |= {name: found["test"] for name, found in result["baselines"].items() if "test" in found}
        selection, k = result["selection"], max(result["topks"])
        every = [f"{group}_recall@{k}" for group in GROUPS]
        groups = [name for name in every if any(name in row for row in rows.values())]
        usual = [name for name in table_columns(rows, result["topks"]) if not name.startswith(("head_", "tail_"))]
        skipped = [
            f"{name} left out: {found['skipped']}" for name, found in result["baselines"].items() if "skipped" in found
        ]
        return "\n".join([
            f"\ntest of {result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}; {USUAL_METRICS}",
            text_table(rows, usual),
            f"\nby popularity in train: q1 the most popular fifth, tail the other 80 %, cold {result['cold_items']:,} items "
            "without interactions",
            text_table(rows, groups),
            *other_conventions(rows),
            *skipped,
        ])  # fmt: skip


def index_vectors(path: Path, kind: str, top: int = 100) -> dict[str, Any]:
    """Write what ranks (``vectors.npz``), an index of it and how that does into the run's folder ``ann``; the last."""
    arrays = read_arrays(path)
    user, item = search_vectors(arrays)
    kept = {"user": user, "item": item} | {name: arrays[name] for name in ("item_ids",) if name in arrays}
    with atomic_open(path / "ann" / "vectors.npz", "wb") as stream:
        np.savez_compressed(stream, **kept)
    return measure_index(path / "ann", user, item, kind, top)


def search_vectors(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """User and item vectors whose squared distance is what ranks: one coordinate more where cold items have an offset."""
    user, item = arrays["user"], arrays["item"]
    if not arrays.get("item_offset", np.zeros(1)).any():
        return user, item
    more = np.sqrt(arrays["item_offset"], dtype=np.float32)[:, None]
    return np.concatenate([user, np.zeros_like(user[:, :1])], 1), np.concatenate([item, more], 1)
