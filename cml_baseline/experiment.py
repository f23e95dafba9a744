"""From flags to objects: model, optimizer, sampler, evaluation, and the refit on train and validation."""

from __future__ import annotations

from pathlib import Path

import torch

from cml_baseline.data import features
from gfml.cml import FeatureProjection, ItemFeatures, MetricLearner, MetricOptions
from gfml.data.interactions import Interactions
from gfml.engine.runs import Run, seed_everything
from gfml.engine.train import FitResult, Optimizers, Step
from gfml.program import steps as program
from gfml.program.cli import Options
from gfml.ranking.evaluation import Evaluation, evaluate
from gfml.ranking.sampling import TripleSampler, TwoStageSampler


def build_model(options: Options, data: Interactions, device: torch.device) -> MetricLearner:
    """Points in a ball, with the feature network if there are features."""
    loss = MetricOptions(
        margin=options.margin, use_rank_weight=options.rank_weight, rank_floor=options.rank_floor,
        reduction=options.reduction, cov_weight=options.cov_weight, cov_form=options.cov_form,
        feature_weight=options.feature_weight,
    )  # fmt: skip
    model = MetricLearner(
        data.num_users, data.num_items, options.embedding_dim, options=loss, radius=options.clip_norm,
        std=options.init_std, features=_build_features(options, data),
    )  # fmt: skip
    return model.to(device)


def _build_features(options: Options, data: Interactions) -> ItemFeatures | None:
    table = features(options, data)
    if table is None:
        return None
    projection = FeatureProjection(
        table.values.shape[1], options.embedding_dim, hidden_dim=options.hidden_dim, dropout=options.dropout,
        scale=options.feature_scale, radius=options.clip_norm,
    )  # fmt: skip
    cold = torch.from_numpy(data.item_popularity == 0)
    values, known = torch.from_numpy(table.values), torch.from_numpy(table.known)
    return ItemFeatures(projection, values, known, cold, cold_offset=options.cold_offset)


def build_training(options: Options, model: MetricLearner) -> tuple[torch.optim.Optimizer | Optimizers, Step]:
    """Optimizer and step; every step ends with the projection into the ball. The feature network takes Adam always."""
    points = list(model.encoder.parameters())
    network = [] if model.features is None else list(model.features.parameters())
    if options.optimizer == "adam":
        groups = [
            {"params": points, "lr": options.lr},
            *([{"params": network, "lr": options.feature_lr}] if network else []),
        ]
        optimizer: torch.optim.Optimizer | Optimizers = torch.optim.Adam(groups, fused=True)
    else:
        optimizer = torch.optim.Adagrad(points, options.lr, initial_accumulator_value=options.accumulator, foreach=True)
        if network:
            optimizer = Optimizers(optimizer, torch.optim.Adam(network, options.feature_lr, fused=True))
    return optimizer, program.ProjectedStep(program.build_step(options, optimizer, options.clip_grad), model)


def build_sampler(options: Options, data: Interactions, model: MetricLearner, device: torch.device) -> TripleSampler:
    """Every train pair once an epoch, with negatives as ``--sampler`` says."""
    common = {
        "batch_size": options.batch_size, "seed": options.seed, "scheme": "interaction",
        "num_negatives": options.num_neg, "device": device,
    }  # fmt: skip
    if options.sampler == "two-stage":
        return TwoStageSampler(
            data.train, item_vectors=lambda: model.encoder.vectors()[1], num_candidates=options.candidates,
            refresh=options.refresh, **common,
        )  # fmt: skip
    return TripleSampler(data.train, negatives=options.sampler, **common)


def cut_offs(options: Options) -> tuple[int, ...]:
    """The list lengths to judge: ``--topks`` and the one that selects."""
    return program.cut_offs(options.topks, options.select_metric)


def judge_split(
    options: Options, data: Interactions, model: MetricLearner, split: str, *, beyond: bool = False
) -> Evaluation:
    """Full ranking of one part by squared distance."""
    return evaluate(
        model.scorer(),
        data,
        split,
        cut_offs(options),
        beyond=beyond,
        device=model.encoder.nodes.device,
        definitions=program.definitions_of(options, judging=beyond),
    )


def refit(
    options: Options, data: Interactions, device: torch.device, fitted: FitResult, run: Run
) -> tuple[MetricLearner, Interactions]:
    """A model trained anew on train and validation for the selected number of epochs, and that data."""
    whole = data.refit()
    seed_everything(options.seed)
    model = build_model(options, whole, device)
    optimizer, step = build_training(options, model)
    program.refit(
        model, optimizer, fitted=fitted, run=run, family="cml_baseline", step=step, loss_fn=model.loss,
        batches=build_sampler(options, whole, model, device).epoch, checkpoint_every=options.checkpoint_every,
        progress=options.progress or False,
    )  # fmt: skip
    return model, whole


def load_reported(
    options: Options, data: Interactions, device: torch.device, path: Path, *, done: bool
) -> tuple[MetricLearner, Interactions]:
    """The model that a run's result is about, in eval mode, and the data it was trained on."""
    data = data.refit() if options.refit and done else data
    return program.load_reported(build_model(options, data, device), path, done=done), data


def describe(options: Options, data: Interactions, model: MetricLearner, device: torch.device, run: Run) -> str:
    """What is about to run, in a few lines."""
    notes = [f"note: {key}: {value}" for key, value in data.notes.items()]
    if model.features is not None:
        known, cold = int(model.features.known.sum()), int(model.features.placed.sum())
        notes.append(
            f"features: {model.features.features.shape[1]} columns for {known:,} of {data.num_items:,} items; "
            f"{cold:,} cold items are placed by them"
        )
    weight = "log(1 + rank)" if options.rank_weight else "none"
    count = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
            f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
            *notes,
            f"CML: D {options.embedding_dim}, margin {options.margin:g}, ball {options.clip_norm:g}, rank weight {weight}, "
            f"covariance {options.cov_weight:g}; {options.num_neg} {options.sampler} negatives, "
            f"{options.optimizer} {options.lr:g}, batch {options.batch_size:,}",
            f"{count:,} parameters on {device}; seed {options.seed}",
            f"selecting by {options.select_metric} on {'TEST: optimistic' if options.select_on == 'test' else 'validation'}",
            f"run directory {run.path}",
        ]
    )
