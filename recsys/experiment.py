"""From flags to objects: data checks, model, optimizer, sampler, and the refit on train and validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.cml import FeatureProjection, ItemFeatures, MetricOptions
from gfml.data.interactions import Interactions
from gfml.distances import SquaredDistance
from gfml.engine import distributed
from gfml.engine.distributed import World
from gfml.engine.runs import Run, seed_everything
from gfml.engine.train import FitResult, Step, Terms, WeightAverage
from gfml.fused import FusedPairLoss
from gfml.gravity import Gravity
from gfml.program import steps as program
from gfml.program.cli import Options
from gfml.program.steps import ProjectedStep, build_step, cut_offs
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.evaluation import evaluate
from gfml.ranking.graph import build_graph
from gfml.ranking.pretrained import read_nodes, read_table
from gfml.ranking.sampling import Triples, TripleSampler
from recsys.model import PairOptions, Recommender


def build_model(options: Options, data: Interactions, device: torch.device) -> Recommender:
    """Encoder, gravity and loss as the flags say, with fresh or given tables."""
    distance = SquaredDistance(
        options.dist_mode, emd_input=options.emd_input, emd_power=options.emd_power, kl_kind=options.kl_kind
    )
    gravity = Gravity(
        data.num_users,
        data.num_items,
        distance=distance,
        mass=options.mass_mode,
        combine=options.mass_combine,
        mass_param=options.mass_param,
        mass_init=options.mass_init,
        lamb=options.lamb,
        learn_lamb=options.learn_lamb,
        eps=options.eps,
        emb_norm=bool(options.emb_norm),
    )
    model = Recommender(
        _build_encoder(options, data),
        gravity,
        options.loss_mode,
        pair=PairOptions(options.mix_ratio, options.decay, options.weight_decay, bool(options.compat)),
        metric=MetricOptions(
            margin=options.margin,
            use_rank_weight=options.use_rank_weight,
            cov_weight=options.cov_loss_weight if options.use_cov_loss else 0.0,
            feature_weight=options.feature_l2_reg,
        ),
        radius=options.clip_norm if options.model == "cml" else None,
        features=None if options.features is None else _build_features(options, data.num_items),
    )
    if options.pretrain:
        shape = (data.num_users, data.num_items, options.embedding_dim)
        model.encoder.nodes.data.copy_(read_nodes(options.pretrain_file, shape))
    return model.to(device)


def build_training(
    options: Options, model: Recommender
) -> tuple[torch.optim.Optimizer, Any, Step, WeightAverage | None]:
    """Optimizer, learning-rate schedule, step and running averages."""
    groups = model.parameter_groups(options.lr_decay, bool(options.mass_adamw))
    optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
    step = build_step(options, optimizer, options.clip_grad)
    if options.model == "cml":
        step = ProjectedStep(step, model)
    ema = None
    if options.ema_on:
        averaged = model.gravity.mass.parameters() if options.ema_scope == "mass" else model.parameters()
        ema = WeightAverage(averaged, options.lam_d)
    return optimizer, _schedule(options, optimizer), step, ema


def build_sampler(options: Options, data: Interactions, device: torch.device) -> TripleSampler:
    """Triples of the train part."""
    return TripleSampler(
        data.train,
        batch_size=options.batch_size,
        seed=options.seed,
        scheme=options.sampler,
        num_negatives=options.num_neg,
        device=device,
    )


def loss_of(options: Options, model: Recommender, world: World) -> Callable[[Triples], Terms]:
    """The loss of a batch; with several processes that of this one's rows, all of which make one step together."""
    if world.size > 1:
        _check_shareable(options)
        distributed.average_gradients(model)
    fused = fused_or_reason(options, model)
    return program.shared_loss(
        model.loss if isinstance(fused, str) else fused,
        world,
        reduction="sum" if options.loss_mode == "cml" else "mean",
    )


def fused_or_reason(options: Options, model: Recommender) -> FusedPairLoss | str:
    """The loss with gradients by formula, or why autograd makes them."""
    if options.kernel == "autograd":
        return "--kernel autograd"
    if options.compile or distributed.world_size() > 1:
        return "--compile" if options.compile else "several processes"
    return model.fused_loss()


def _check_shareable(options: Options) -> None:
    """UserError for losses that are no sum over the rows of a batch."""
    whole = {"--compat 1": options.compat, "--use_cov_loss": options.loss_mode == "cml" and options.use_cov_loss,
             "--features": options.features}  # fmt: skip
    for flag, given in whole.items():
        if given:
            raise UserError(
                f"found {flag} with several processes, wanted a loss that is a sum over rows: drop it or start one process"
            )


def metrics(options: Options, data: Interactions, model: Recommender, split: str) -> dict[str, float]:
    """Ranking metrics of one part, for selection; the first process judges for all."""
    return distributed.from_main(lambda: _metrics(options, data, model, split))


def _metrics(options: Options, data: Interactions, model: Recommender, split: str) -> dict[str, float]:
    return evaluate(
        scorer_of(options, model),
        data,
        split,
        cut_offs(options.topks, options.es_metric),
        device=model.encoder.nodes.device,
    ).means


def scorer_of(options: Options, model: Recommender) -> Any:
    """The model's all-item scores as ``--infer_mode`` and ``--mass-scale`` ask for them."""
    return model.scorer(options.infer_mode, options.mass_scale)


def refit(
    options: Options, data: Interactions, world: World, fitted: FitResult, run: Run
) -> tuple[Recommender, Interactions]:
    """A model trained anew on train and validation for the selected number of epochs, and that data."""
    whole = data.refit()
    seed_everything(options.seed)
    model = build_model(options, whole, world.device)
    optimizer, scheduler, step, ema = build_training(options, model)
    model = program.refit(
        model,
        optimizer,
        fitted=fitted,
        run=run,
        family="recsys",
        batches=build_sampler(options, whole, world.device).epoch,
        loss_fn=loss_of(options, model, world),
        step=step,
        scheduler=scheduler,
        ema=ema,
        checkpoint_every=options.checkpoint_every,
        amp=options.amp,
        progress=options.progress,
    )
    return model, whole


def trained_on(options: Options, data: Interactions) -> Interactions:
    """The data that the reported weights saw: with ``--refit`` validation is part of train."""
    return data.refit() if options.refit else data


def load_reported(
    options: Options, data: Interactions, device: torch.device, path: Path, *, done: bool = True
) -> tuple[Recommender, Interactions]:
    """The model that a run's result is about, in eval mode, and the data it was trained on."""
    data = trained_on(options, data) if done else data
    return program.load_reported(build_model(options, data, device), path, done=done), data


def describe(options: Options, data: Interactions, model: Recommender, device: torch.device, run: Run) -> str:
    """What is about to run, in a few lines."""
    gravity = (
        ""
        if options.loss_mode in ("dot", "bpr", "cml")
        else (f", {options.dist_mode} distance, {options.mass_mode} mass, lambda {options.lamb:g}")
    )
    notes = [f"note: {key}: {value}" for key, value in data.notes.items()]
    count = sum(p.numel() for p in model.parameters())
    fused = fused_or_reason(options, model)
    return "\n".join(
        [
            f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
            f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
            *notes,
            f"{options.model}, loss {options.loss_mode}{gravity}; {count:,} parameters on {device}; seed {options.seed}",
            f"gradients by {f'autograd: {fused}' if isinstance(fused, str) else 'formula, row by row'}",
            f"selecting by {options.es_metric} on {'TEST, the original protocol: optimistic' if options.es_on == 'test' else 'validation'}",
            f"run directory {run.path}",
        ]
    )


def _build_encoder(options: Options, data: Interactions) -> Tables:
    if options.model == "lgn":
        return LightGCN(
            build_graph(data.train),
            options.embedding_dim,
            options.num_layers,
            combine=options.combine,
            init=options.init,
            std=options.init_std,
            edge_keep=options.keepprob if options.dropout else 1.0,
            undirected_dropout=options.undirected_dropout,
        )
    return Tables(data.num_users, data.num_items, options.embedding_dim, init=options.init, std=options.init_std)


def _schedule(options: Options, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
    if options.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(options.epochs, 1))
    if options.lr_schedule == "step":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [options.epochs // 2, options.epochs * 3 // 4])
    return None


def _build_features(options: Options, num_items: int) -> ItemFeatures:
    """CML's feature network over every item, as published: those without interactions take part too."""
    table = _read_features(options.features, num_items)
    projection = FeatureProjection(
        table.shape[1],
        options.embedding_dim,
        hidden_dim=options.hidden_layer_dim,
        dropout=options.dropout_rate,
        scale=options.feature_projection_scaling_factor,
        radius=options.clip_norm,
    )
    every = torch.ones(num_items, dtype=torch.bool)
    return ItemFeatures(projection, table, every, ~every, cold_offset=0.0)


def _read_features(file: str, num_items: int) -> Tensor:
    """Item features float32 [I, F] from an .npy or .npz with one table."""
    features = torch.from_numpy(read_table(file).astype(np.float32))
    if len(features) != num_items:
        raise UserError(f"{file} holds {len(features)} rows, wanted one for each of {num_items} items: mend --features")
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"{file} holds numbers that are not finite, wanted finite features: mend the file")
    return features
