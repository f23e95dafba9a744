"""From flags to objects: model, optimizer, mirror step, batches, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from gfml.base.errors import UserError
from gfml.base.weights import read_weights
from gfml.engine.runs import Run
from gfml.engine.train import Step, plain_step
from gfml.mirror import MirrorGradient
from gfml.program import steps as program
from gfml.program.cli import Options
from gfml.program.steps import cut_offs
from gfml.ranking.evaluation import Evaluation, evaluate
from gfml.ranking.sampling import TripleBatches, TripleSampler
from mirror_grad import foreign
from mirror_grad.data import MultimodalData
from mirror_grad.models import MODELS, load_model
from mirror_grad.options import arm_of

LEARNERS = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def build_model(options: Options, data: MultimodalData, device: torch.device) -> nn.Module:
    """The model of the flags with fresh parameters."""
    build = load_model(options.model)
    model = build(
        data, options.settings, behaviour=options.behaviour, embedding_dim=options.embedding_dim, seed=options.seed
    )
    return model.to(device)


def build_training(
    options: Options, model: nn.Module
) -> tuple[torch.optim.Optimizer, Step, torch.optim.lr_scheduler.LRScheduler | None]:
    """Optimizer, ordinary or mirror step, and the schedule of the learning rate (stepped every epoch)."""
    groups = (
        model.optimizer_groups()
        if hasattr(model, "optimizer_groups")
        else [p for p in model.parameters() if p.requires_grad]
    )
    fused = {"fused": True} if options.learner == "adam" else {}
    optimizer = LEARNERS[options.learner](
        groups, lr=options.learning_rate * arm_factor(options), weight_decay=options.weight_decay, **fused
    )
    base, period = options.learning_rate_scheduler
    scheduler = None
    if base != 1.0:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: base ** (epoch / period))
    return optimizer, build_step(options, optimizer), scheduler


def build_step(options: Options, optimizer: torch.optim.Optimizer) -> Step:
    """The ordinary step, or the mirror step of the flags."""
    if options.mirror == "off":
        return partial(plain_step, clip_norm=options.clip_grad_norm)
    return MirrorGradient(
        optimizer,
        options.mirror_alpha1,
        options.mirror_alpha2,
        options.mirror_every,
        options.mirror,
        counter=options.mirror_counter,
        phase=options.mirror_phase,
        rng=options.mirror_rng,
        wd=options.mirror_wd,
        clip=options.clip_grad_norm,
        clip_halves=options.mirror_clip_halves,
        diagnostics=options.mirror_diagnostics,
    )


def arm_factor(options: Options) -> float:
    """The learning rate's factor in the arm equal-lr, 1 elsewhere.

    Adam: the net movement per batch of the two half-steps against that of plain Adam under a constant gradient,
    (a1 - a2 + n - 1) / (n sqrt((a1^2 + a2^2 + n - 1) / (n + 1))) for a mirror step every n batches. SGD and the others:
    (a1 - a2 + n - 1) / n.
    """
    if options.mirror_arm != "equal-lr":
        return 1.0
    first, second, every = options.mirror_alpha1, options.mirror_alpha2, options.mirror_every
    moved = (first - second + every - 1) / every
    if options.learner != "adam":
        return moved
    return moved / math.sqrt((first**2 + second**2 + every - 1) / (every + 1))


def build_batches(
    options: Options, data: MultimodalData, model: nn.Module, device: torch.device
) -> Callable[[int], TripleBatches]:
    """batches(epoch): every train pair once, shuffled, each with one negative among the items of train.

    The model's ``new_epoch`` runs first, so that what it draws for an epoch is there after a resume too.
    """
    sampler = TripleSampler(
        data.interactions.train,
        batch_size=options.batch_size,
        seed=options.seed,
        scheme="interaction",
        negatives="train-items",
        num_negatives=int(MODELS[options.model].needs_negatives),
        device=device,
    )

    def batches(epoch: int) -> TripleBatches:
        if hasattr(model, "new_epoch"):
            model.new_epoch(epoch)
        return sampler.epoch(epoch)

    return batches


def judge_split(
    options: Options, data: MultimodalData, model: nn.Module, split: str, *, beyond: bool = False
) -> Evaluation:
    """Full ranking of one part, from the model's parameters as they are now."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        scorer = model.scorer()
    return evaluate(
        scorer,
        data.interactions,
        split,
        cut_offs(options.topks, options.select_metric),
        beyond=beyond,
        mask_valid=options.test_mask == "seen",
        device=device,
        definitions=program.definitions_of(options, judging=beyond),
    )


def metrics(options: Options, data: MultimodalData, model: nn.Module, split: str) -> dict[str, float]:
    """Ranking metrics of one part, for stopping and selection; rounded where the flags ask for it."""
    means = judge_split(options, data, model, split).means
    digits = options.round_metrics
    return means if digits is None else {name: round(value, digits) for name, value in means.items()}


def weights_model(
    options: Options, data: MultimodalData, device: torch.device, path: Path
) -> tuple[nn.Module, list[str]]:
    """The model with a file's weights, in eval mode, and notes: best.pt, last.pt, final.pt, a bare state of tensors, or a
    file of Mirror-Gradient's or MMRec's own program, whose names are translated.

    UserError when the file is damaged, or its names or shapes are another model's.
    """
    state, notes = read_weights(path), []
    found = foreign.recognise(state)
    if found and options.model not in found:
        raise foreign.other_model(options.model, found, path)
    if found:
        dim = options.embedding_dim
        notes = foreign.adapt(options, state)
    model = build_model(options, data, torch.device("cpu"))
    if found:
        state = foreign.rename(options.model, state)
        if options.behaviour == "published":
            notes += foreign.complete(model, options.model, state, data, options.seed, dim)
        else:
            state = {name: value for name, value in state.items() if name != "item_weight"}
    return load_weights(options, model, path, state).to(device), notes


def load_weights(options: Options, model: nn.Module, path: Path, state: dict[str, torch.Tensor]) -> nn.Module:
    """Put the named tensors of a file into the model, in eval mode. UserError when names or shapes are another model's."""
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        found = f"{path} lacks {', '.join(missing[:3]) or 'nothing'} and has {', '.join(unknown[:3]) or 'nothing'} beyond {options.model}'s"
        raise UserError(f"{found}: give the --model and the hyper-parameters it was trained with")
    other = next((name for name, value in wanted.items() if state[name].shape != value.shape), None)
    if other is not None:
        shapes = f"{other} {tuple(state[other].shape)}, wanted {tuple(wanted[other].shape)}"
        raise UserError(f"{path} has {shapes}: give the --dataset and the hyper-parameters it was trained with")
    model.load_state_dict(state)
    return model.eval()


def load_reported(options: Options, data: MultimodalData, device: torch.device, run: Run) -> nn.Module:
    """The model that a run's result is about, in eval mode."""
    return program.load_reported(build_model(options, data, device), run.path, done=run.is_done)


def describe(options: Options, data: MultimodalData, model: nn.Module, run: Run) -> str:
    """What is about to run, in a few lines."""
    return "\n".join(_description(options, data, model, run))


def _description(options: Options, data: MultimodalData, model: nn.Module, run: Run) -> Iterator[str]:
    inter = data.interactions
    yield (
        f"{inter.name}: {data.num_users:,} users x {data.num_items:,} items; train {inter.train.nnz:,}, "
        f"validation {inter.valid.nnz:,}, test {inter.test.nnz:,} interactions"
    )
    yield from (f"note: {key}: {value}" for key, value in inter.notes.items())
    tables = [
        f"{name} {table.shape[1]} wide, {int(data.known[name].sum()):,} items" for name, table in data.features.items()
    ]
    if data.feature_source == "random":
        yield "note: features are RANDOM NOISE as asked: only times mean anything"
    yield f"features: {', '.join(tables) or 'none'} ({data.feature_source})"
    count, settings = sum(p.numel() for p in model.parameters()), vars(options.settings)
    yield f"{options.model}, {options.behaviour}: {', '.join(f'{key} {value}' for key, value in settings.items())}"
    arm, factor = arm_of(options), arm_factor(options)
    mirror = f"alpha1 {options.mirror_alpha1:g}, alpha2 {options.mirror_alpha2:g}, every {options.mirror_every}"
    yield f"arm {arm}: mirror {options.mirror}{'' if options.mirror == 'off' else ', ' + mirror}; learning rate {options.learning_rate * factor:g}"
    yield f"{count:,} parameters; seed {options.seed}; masked in test lists: {options.test_mask}"
    on = "TEST: optimistic" if options.select_on == "test" else "validation"
    yield f"selecting by {options.select_metric} on {on}; run directory {run.path}"
