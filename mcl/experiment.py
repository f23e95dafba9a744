"""From flags to objects: data checks, model, optimizer, sampler, evaluation, and the refit on train and validation."""

from __future__ import annotations

from pathlib import Path

import torch

from gfml.data.interactions import Interactions
from gfml.engine.runs import Run, seed_everything
from gfml.engine.train import FitResult, Step, WeightAverage
from gfml.gravity import Gravity
from gfml.program import steps as program
from gfml.program.cli import Options
from gfml.program.steps import build_step, cut_offs, definitions_of
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.evaluation import Evaluation, evaluate
from gfml.ranking.graph import build_graph
from mcl.model import GravityOptions, MetricRecommender, MixedCentricOptions
from mcl.sampler import UserBatchSampler


def build_model(options: Options, data: Interactions, device: torch.device) -> MetricRecommender:
    """Encoder, gravity and losses as the flags say, with fresh tables."""
    # The encoder first: equal seeds give equal tables in every mode and for any masses.
    encoder, gravity = _build_encoder(options, data), None
    if options.mode != "mcl":
        gravity = Gravity(
            data.num_users,
            data.num_items,
            mass_param=options.mass_param,
            mass_init=options.mass_init,
            lamb=options.grav_lambda,
            eps=1.0,
            emb_norm=False,
        )
        if options.ema and options.ema_scope == "frozen":
            gravity.mass.requires_grad_(False)
    mixed = MixedCentricOptions(
        options.batch_size, options.alpha, options.beta, options.mcl_lambda_p, options.mcl_lambda_n, options.margin
    )
    attraction = GravityOptions(
        options.grav_weight_pos, options.grav_weight_neg, bool(options.gfml_opt), options.mix_ratio
    )
    model = MetricRecommender(encoder, gravity, options.mode, mixed=mixed, attraction=attraction, decay=options.decay)
    return model.to(device)


def build_training(
    options: Options, model: MetricRecommender
) -> tuple[torch.optim.Optimizer, Step, WeightAverage | None]:
    """Optimizer, step and running averages."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=options.lr, fused=True)
    step = build_step(options, optimizer, options.clip_grad)
    ema = None
    if options.ema:
        averaged = model.parameters() if options.ema_scope == "all" else model.gravity.mass.parameters()
        ema = WeightAverage(averaged, options.ema_decay)
    return optimizer, step, ema


def build_sampler(options: Options, data: Interactions, device: torch.device) -> UserBatchSampler:
    """Batches of users of the train part."""
    return UserBatchSampler(
        data.train,
        batch_size=options.batch_size,
        num_negatives=options.num_neg,
        seed=options.seed,
        drop_last=options.drop_last,
        duplicate_batches=options.duplicate_batches,
        device=device,
    )


def judge_split(
    options: Options,
    data: Interactions,
    model: MetricRecommender,
    split: str,
    *,
    score: str | None = None,
    beyond: bool = False,
) -> Evaluation:
    """Full ranking of one part by ``--score``, or by another score."""
    scorer = model.scorer(score or options.score)
    return evaluate(
        scorer,
        data,
        split,
        cut_offs(options.topks, options.select_metric),
        beyond=beyond,
        device=model.encoder.nodes.device,
        definitions=definitions_of(options, judging=beyond),
    )


def metrics(options: Options, data: Interactions, model: MetricRecommender, split: str) -> dict[str, float]:
    """Ranking metrics of one part, for selection; "sum" is recall + ndcg over ``--topks``."""
    means = judge_split(options, data, model, split).means
    return means | {"sum": sum(means[f"{name}@{k}"] for name in ("recall", "ndcg") for k in options.topks)}


def refit(
    options: Options, data: Interactions, device: torch.device, fitted: FitResult, run: Run
) -> tuple[MetricRecommender, Interactions]:
    """A model trained anew on train and validation for the selected number of epochs, and that data."""
    whole = data.refit()
    seed_everything(options.seed)
    model = build_model(options, whole, device)
    optimizer, step, ema = build_training(options, model)
    model = program.refit(
        model,
        optimizer,
        fitted=fitted,
        run=run,
        family="mcl",
        batches=build_sampler(options, whole, device).epoch,
        loss_fn=model.loss,
        step=step,
        ema=ema,
        checkpoint_every=options.checkpoint_every,
        progress=options.progress,
    )
    return model, whole


def load_reported(
    options: Options, data: Interactions, device: torch.device, path: Path, *, done: bool
) -> tuple[MetricRecommender, Interactions]:
    """The model that a run's result is about, in eval mode, and the data it was trained on."""
    data = data.refit() if options.refit and done else data
    return program.load_reported(build_model(options, data, device), path, done=done), data


def describe(
    options: Options, data: Interactions, model: MetricRecommender, sampler: UserBatchSampler, run: Run
) -> str:
    """What is about to run, in a few lines."""
    mixed = (
        f"alpha {options.alpha:g}, beta {options.beta:g}, lambda_p {options.mcl_lambda_p:g}, "
        f"lambda_n {options.mcl_lambda_n:g}, margin {options.margin:g}"
    )
    gravity = (
        f"gravity lambda {options.grav_lambda:g}, weights {options.grav_weight_pos:g} / {options.grav_weight_neg:g}"
    )
    terms = {"mcl": mixed, "gfml": gravity, "mix": f"{mixed}; {gravity}, share {options.mix_ratio:g}"}[options.mode]
    notes = [f"note: {key}: {value}" for key, value in data.notes.items()]
    count = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
            f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
            *notes,
            f"{options.encoder}, mode {options.mode}: {terms}",
            f"{count:,} parameters on {sampler.device}; {sampler.num_batches} steps an epoch; seed {options.seed}",
            f"ranking by {options.score}; selecting by {options.select_metric} on "
            f"{'TEST, the original protocol: optimistic' if options.select_on == 'test' else 'validation'}",
            f"run directory {run.path}",
        ]
    )


def _build_encoder(options: Options, data: Interactions) -> Tables:
    if options.encoder == "tables":
        return Tables(data.num_users, data.num_items, options.embedding_dim)
    return LightGCN(
        build_graph(data.train),
        options.embedding_dim,
        options.num_layers,
        combine=options.combine,
        init="xavier_uniform",
        edge_keep=options.keep_prob if options.dropout else 1.0,
    )
