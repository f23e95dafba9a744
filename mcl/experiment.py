"""From flags to objects: data checks, model, optimizer, sampler, evaluation, and the refit on train and validation."""

from __future__ import annotations

from functools import partial

import torch

from gfml.cli import Options
from gfml.data.interactions import Interactions
from gfml.encoders import LightGCN, Tables
from gfml.errors import UserError
from gfml.evaluation import Evaluation, evaluate
from gfml.graph import build_graph
from gfml.gravity import Gravity
from gfml.mirror import MirrorGradient
from gfml.runs import Run, seed_everything
from gfml.train import FitResult, Step, WeightAverage, fit, plain_step
from mcl.model import GravityOptions, MetricRecommender, MixedCentricOptions
from mcl.sampler import UserBatchSampler


def check_against_data(options: Options, data: Interactions) -> None:
    """Rules between flags and data, before any training. UserError names both."""
    largest = max(cut_offs(options))
    if largest > data.num_items:
        raise UserError(f"found a list length of {largest}, wanted at most the {data.num_items} items of {data.name}: mend --topks")
    if options.select_on == "val" and data.valid.nnz == 0:
        raise UserError(f"{data.name} has no validation part to select on: give --val_ratio 0.1, or --select-on test and say so")
    if data.test.nnz == 0:
        raise UserError(f"{data.name} has no test interactions, wanted at least one: give --split per-user to cut some off")


def require_earlier_run(options: Options, run: Run) -> None:
    """With ``--load 1`` a missing checkpoint is an error, not a fresh start."""
    if options.load and not run.file("last.pt").exists():
        raise UserError(f"--load 1 found no checkpoint in {run.path}: train first, or give --load 0")


def cut_offs(options: Options) -> tuple[int, ...]:
    """The list lengths to judge: ``--topks`` and the one that selects."""
    k = options.select_metric.partition("@")[2]
    return tuple(sorted({*options.topks, *([int(k)] if k else [])}))


def build_model(options: Options, data: Interactions, device: torch.device) -> MetricRecommender:
    """Encoder, gravity and losses as the flags say, with fresh tables."""
    # The encoder first: equal seeds give equal tables in every mode and for any masses.
    encoder, gravity = _build_encoder(options, data), None
    if options.mode != "mcl":
        gravity = Gravity(
            data.num_users, data.num_items, mass_param=options.mass_param, mass_init=options.mass_init,
            lamb=options.grav_lambda, eps=1.0, emb_norm=False,
        )
        if options.ema and options.ema_scope == "frozen":
            gravity.mass.requires_grad_(False)
    mixed = MixedCentricOptions(
        options.batch_size, options.alpha, options.beta, options.mcl_lambda_p, options.mcl_lambda_n, options.margin
    )
    attraction = GravityOptions(options.grav_weight_pos, options.grav_weight_neg, bool(options.gfml_opt), options.mix_ratio)
    model = MetricRecommender(encoder, gravity, options.mode, mixed=mixed, attraction=attraction, decay=options.decay)
    return model.to(device)


def build_training(options: Options, model: MetricRecommender) -> tuple[torch.optim.Optimizer, Step, WeightAverage | None]:
    """Optimizer, step and running averages."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=options.lr, fused=True)
    step: Step = partial(plain_step, clip_norm=options.clip_grad)
    if options.mirror != "off":
        step = MirrorGradient(
            optimizer, options.mirror_alpha1, options.mirror_alpha2, options.mirror_every, options.mirror,
            clip=options.mirror_clip,
        )
    ema = None
    if options.ema:
        averaged = model.parameters() if options.ema_scope == "all" else model.gravity.mass.parameters()
        ema = WeightAverage(averaged, options.ema_decay)
    return optimizer, step, ema


def build_sampler(options: Options, data: Interactions, device: torch.device) -> UserBatchSampler:
    """Batches of users of the train part."""
    return UserBatchSampler(
        data.train, batch_size=options.batch_size, num_negatives=options.num_neg, seed=options.seed,
        drop_last=options.drop_last, duplicate_batches=options.duplicate_batches, device=device,
    )


def judge_split(
    options: Options, data: Interactions, model: MetricRecommender, split: str, *, score: str | None = None, beyond: bool = False
) -> Evaluation:
    """Full ranking of one part by ``--score``, or by another score."""
    scorer = model.scorer(score or options.score)
    return evaluate(scorer, data, split, cut_offs(options), beyond=beyond, device=model.encoder.nodes.device)


def metrics(options: Options, data: Interactions, model: MetricRecommender, split: str) -> dict[str, float]:
    """Ranking metrics of one part, for selection; "sum" is recall + ndcg over ``--topks``."""
    means = judge_split(options, data, model, split).means
    return means | {"sum": sum(means[f"{name}@{k}"] for name in ("recall", "ndcg") for k in options.topks)}


def refit(
    options: Options, data: Interactions, device: torch.device, fitted: FitResult, run: Run
) -> tuple[MetricRecommender, Interactions]:
    """A model trained anew on train and validation for the selected number of epochs, and that data.

    It has a run directory of its own inside the run, so an interrupted refit continues too.
    """
    whole = data.refit()
    seed_everything(options.seed)
    model = build_model(options, whole, device)
    optimizer, step, ema = build_training(options, model)
    with Run.open(run.path, "mcl", run.config, name="refit") as inner:
        if inner.is_done:
            model.load_state_dict(inner.load_best()["model"])
            return model.eval(), whole
        fit(
            model, optimizer, batches=build_sampler(options, whole, device).epoch, loss_fn=model.loss, step=step, ema=ema,
            evaluate=None, select=None, run=inner, epochs=fitted.best_epoch or 0, checkpoint_every=options.checkpoint_every,
            progress=options.progress,
        )
        inner.finish({"selection": {**fitted.selection(), "refit": "train and validation, for the selected number of epochs"}})
    return model, whole


def describe(options: Options, data: Interactions, model: MetricRecommender, sampler: UserBatchSampler, run: Run) -> str:
    """What is about to run, in a few lines."""
    mixed = (
        f"alpha {options.alpha:g}, beta {options.beta:g}, lambda_p {options.mcl_lambda_p:g}, "
        f"lambda_n {options.mcl_lambda_n:g}, margin {options.margin:g}"
    )
    gravity = f"gravity lambda {options.grav_lambda:g}, weights {options.grav_weight_pos:g} / {options.grav_weight_neg:g}"
    terms = {"mcl": mixed, "gfml": gravity, "mix": f"{mixed}; {gravity}, share {options.mix_ratio:g}"}[options.mode]
    notes = [f"note: {key}: {value}" for key, value in data.notes.items()]
    count = sum(p.numel() for p in model.parameters())
    return "\n".join([
        f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
        f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
        *notes,
        f"{options.encoder}, mode {options.mode}: {terms}",
        f"{count:,} parameters on {sampler.device}; {sampler.num_batches} steps an epoch; seed {options.seed}",
        f"ranking by {options.score}; selecting by {options.select_metric} on "
        f"{'TEST, the original protocol: optimistic' if options.select_on == 'test' else 'validation'}",
        f"run directory {run.path}",
    ])


def _build_encoder(options: Options, data: Interactions) -> Tables:
    if options.encoder == "tables":
        return Tables(data.num_users, data.num_items, options.embedding_dim)
    return LightGCN(
        build_graph(data.train), options.embedding_dim, options.num_layers, combine=options.combine,
        init="xavier_uniform", edge_keep=options.keep_prob if options.dropout else 1.0,
    )
