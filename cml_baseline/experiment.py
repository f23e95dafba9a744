"""From flags to objects: model, optimizer, sampler, evaluation, and the refit on train and validation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from cml_baseline.data import cut_offs, features
from gfml.cli import Options
from gfml.cml import FeatureProjection, ItemFeatures, MetricLearner, MetricOptions
from gfml.data.interactions import Interactions
from gfml.evaluation import Evaluation, evaluate
from gfml.mirror import MirrorGradient
from gfml.runs import EXTENDABLE, Run, damaged, load_state, seed_everything
from gfml.sampling import TripleSampler, TwoStageSampler
from gfml.train import FitResult, FollowedStep, Step, fit, load_best, plain_step


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
    return ItemFeatures(projection, torch.from_numpy(table.values), torch.from_numpy(table.known), cold)


def build_training(options: Options, model: MetricLearner) -> tuple[torch.optim.Optimizer, Step]:
    """Optimizer and step; every step ends with the projection into the ball."""
    groups = [{"params": list(model.encoder.parameters()), "lr": options.lr}]
    if model.features is not None:
        groups.append({"params": list(model.features.parameters()), "lr": options.feature_lr})
    if options.optimizer == "adagrad":
        optimizer: torch.optim.Optimizer = torch.optim.Adagrad(groups, initial_accumulator_value=options.accumulator, foreach=True)
    else:
        optimizer = torch.optim.Adam(groups, fused=True)
    step: Step = partial(plain_step, clip_norm=options.clip_grad)
    if options.mirror != "off":
        step = MirrorGradient(
            optimizer, options.mirror_alpha1, options.mirror_alpha2, options.mirror_every, options.mirror,
            clip=options.mirror_clip,
        )  # fmt: skip
    return optimizer, FollowedStep(step, model.project)


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


def judge_split(
    options: Options, data: Interactions, model: MetricLearner, split: str, *, beyond: bool = False
) -> Evaluation:
    """Full ranking of one part by squared distance."""
    return evaluate(model.scorer(), data, split, cut_offs(options), beyond=beyond, device=model.encoder.nodes.device)


def refit(
    options: Options, data: Interactions, device: torch.device, fitted: FitResult, run: Run
) -> tuple[MetricLearner, Interactions]:
    """A model trained anew on train and validation for the selected number of epochs, and that data.

    It has a run directory of its own inside the run, so an interrupted refit continues too.
    """
    whole, epochs = data.refit(), fitted.best_epoch or 0
    config = {key: value for key, value in run.config.items() if key not in EXTENDABLE} | {"epochs": epochs}
    seed_everything(options.seed)
    model = build_model(options, whole, device)
    optimizer, step = build_training(options, model)
    with Run.open(run.path, "cml_baseline", config, name=f"refit-{epochs}") as inner:
        if inner.is_done:
            model.load_state_dict(inner.load_best()["model"])
            return model.eval(), whole
        fit(
            model, optimizer, batches=build_sampler(options, whole, model, device).epoch, loss_fn=model.loss, step=step,
            evaluate=None, select=None, run=inner, epochs=epochs, checkpoint_every=options.checkpoint_every,
            progress=options.progress or False,
        )  # fmt: skip
        inner.finish({"selection": {**fitted.selection(), "refit": "on train and validation, for the selected epochs"}})
    return model, whole


def load_reported(
    options: Options, data: Interactions, device: torch.device, path: Path, *, done: bool = True
) -> tuple[MetricLearner, Interactions]:
    """The model that a run's result is about, in eval mode, and the data it was trained on.

    done False: the best weights so far of an unfinished run. UserError when the file is missing or damaged.
    """
    if not done:
        model = build_model(options, data, device)
        load_best(model, path)
        return model.eval(), data
    data = data.refit() if options.refit else data
    model, saved = build_model(options, data, device), load_state(path / "final.pt")
    try:
        model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError) as error:
        raise damaged(path / "final.pt", f"of another model: {str(error).splitlines()[0]}") from error
    return model.eval(), data


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
    return "\n".join([
        f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
        f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
        *notes,
        f"CML: D {options.embedding_dim}, margin {options.margin:g}, ball {options.clip_norm:g}, rank weight {weight}, "
        f"covariance {options.cov_weight:g}; {options.num_neg} {options.sampler} negatives, "
        f"{options.optimizer} {options.lr:g}, batch {options.batch_size:,}",
        f"{count:,} parameters on {device}; seed {options.seed}",
        f"selecting by {options.select_metric} on {'TEST: optimistic' if options.select_on == 'test' else 'validation'}",
        f"run directory {run.path}",
    ])
