"""From flags to objects: data checks, model, optimizer, sampler, and the refit on train and validation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfml.cli import Options
from gfml.cml import FeatureProjection
from gfml.data.interactions import Interactions
from gfml.distances import SquaredDistance
from gfml.encoders import LightGCN, Tables
from gfml.errors import UserError
from gfml.evaluation import evaluate
from gfml.graph import build_graph
from gfml.gravity import Gravity
from gfml.mirror import MirrorGradient
from gfml.runs import EXTENDABLE, Run, damaged, load_state, seed_everything
from gfml.sampling import TripleSampler
from gfml.train import Closure, FitResult, Step, Terms, WeightAverage, fit, load_best, plain_step
from recsys.model import MetricOptions, PairOptions, Recommender


def check_against_data(options: Options, data: Interactions) -> None:
    """Rules between flags and data, before any training. UserError names both."""
    largest = max(cut_offs(options))
    if largest > data.num_items:
        raise UserError(f"found a list length of {largest}, wanted at most the {data.num_items} items of {data.name}: mend --topks")
    if options.es_on == "val" and data.valid.nnz == 0:
        raise UserError(f"{data.name} has no validation part to select on: give --val_ratio 0.1, or --es_on test and say so")
    if data.test.nnz == 0:
        raise UserError(f"{data.name} has no test interactions, wanted at least one: give --split per-user to cut some off")


def require_earlier_run(options: Options, run: Run) -> None:
    """With ``--load 1`` a missing checkpoint is an error, not a fresh start."""
    if options.load and not run.file("last.pt").exists():
        raise UserError(f"--load 1 found no checkpoint in {run.path}: train first, or give --load 0")


def cut_offs(options: Options) -> tuple[int, ...]:
    """The list lengths to judge: ``--topks`` and the one that selects."""
    return tuple(sorted({*options.topks, int(options.es_metric.partition("@")[2])}))


def build_model(options: Options, data: Interactions, device: torch.device) -> Recommender:
    """Encoder, gravity and loss as the flags say, with fresh or given tables."""
    distance = SquaredDistance(
        options.dist_mode, emd_input=options.emd_input, emd_power=options.emd_power, kl_kind=options.kl_kind
    )
    gravity = Gravity(
        data.num_users, data.num_items, distance=distance, mass=options.mass_mode, combine=options.mass_combine,
        mass_param=options.mass_param, mass_init=options.mass_init, lamb=options.lamb, learn_lamb=options.learn_lamb,
        eps=options.eps, emb_norm=bool(options.emb_norm),
    )
    features = None if options.features is None else _read_features(options.features, data.num_items)
    projection = None if features is None else FeatureProjection(
        features.shape[1], options.embedding_dim, hidden_dim=options.hidden_layer_dim, dropout=options.dropout_rate,
        scale=options.feature_projection_scaling_factor, radius=options.clip_norm,
    )
    model = Recommender(
        _build_encoder(options, data), gravity, options.loss_mode,
        pair=PairOptions(options.mix_ratio, options.decay, options.weight_decay, bool(options.compat)),
        metric=MetricOptions(
            options.margin, options.use_rank_weight, options.cov_loss_weight if options.use_cov_loss else 0.0,
            options.feature_l2_reg, options.clip_norm if options.model == "cml" else None,
        ),
        features=projection, item_features=features,
    )
    if options.pretrain:
        _copy_tables(model.encoder, options.pretrain_file)
    return model.to(device)


def build_training(options: Options, model: Recommender) -> tuple[torch.optim.Optimizer, Any, Step, WeightAverage | None]:
    """Optimizer, learning-rate schedule, step and running averages."""
    groups = model.parameter_groups(options.lr_decay, bool(options.mass_adamw))
    optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
    step: Step = partial(plain_step, clip_norm=options.clip_grad)
    if options.mirror != "off":
        step = MirrorGradient(
            optimizer, options.mirror_alpha1, options.mirror_alpha2, options.mirror_every, options.mirror,
            clip=options.mirror_clip,
        )
    if options.model == "cml":
        step = ProjectedStep(step, model)
    ema = None
    if options.ema_on:
        averaged = model.gravity.mass.parameters() if options.ema_scope == "mass" else model.parameters()
        ema = WeightAverage(averaged, options.lam_d)
    return optimizer, _schedule(options, optimizer), step, ema


class ProjectedStep:
    """Another step, then the projection of the touched rows into the ball. Its state is the inner step's."""

    def __init__(self, inner: Step, model: Recommender) -> None:
        self.inner, self.model = inner, model

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms:
        terms = self.inner(closure, optimizer)
        self.model.project()
        return terms

    def state_dict(self) -> dict[str, Any]:
        """The inner step's state, empty if it has none."""
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""
        if state:
            self.inner.load_state_dict(state)


def build_sampler(options: Options, data: Interactions, device: torch.device) -> TripleSampler:
    """Triples of the train part."""
    return TripleSampler(
        data.train, batch_size=options.batch_size, seed=options.seed, scheme=options.sampler,
        num_negatives=options.num_neg, device=device,
    )


def metrics(options: Options, data: Interactions, model: Recommender, split: str) -> dict[str, float]:
    """Ranking metrics of one part, for selection."""
    return evaluate(scorer_of(options, model), data, split, cut_offs(options), device=model.encoder.nodes.device).means


def scorer_of(options: Options, model: Recommender) -> Any:
    """The model's all-item scores as ``--infer_mode`` and ``--mass-scale`` ask for them."""
    return model.scorer(options.infer_mode, options.mass_scale)


def refit(
    options: Options, data: Interactions, device: torch.device, fitted: FitResult, run: Run
) -> tuple[Recommender, Interactions]:
    """A model trained anew on train and validation for the selected number of epochs, and that data.

    It has a run directory of its own inside the run, so an interrupted refit continues too, and a run that is
    extended and selects another epoch has another refit.
    """
    whole, epochs = data.refit(), fitted.best_epoch or 0
    config = {key: value for key, value in run.config.items() if key not in EXTENDABLE} | {"epochs": epochs}
    seed_everything(options.seed)
    model = build_model(options, whole, device)
    optimizer, scheduler, step, ema = build_training(options, model)
    with Run.open(run.path, "recsys", config, name=f"refit-{epochs}") as inner:
        if inner.is_done:
            model.load_state_dict(inner.load_best()["model"])
            return model.eval(), whole
        fit(
            model, optimizer, batches=build_sampler(options, whole, device).epoch, loss_fn=model.loss, step=step,
            scheduler=scheduler, ema=ema, evaluate=None, select=None, run=inner, epochs=epochs,
            checkpoint_every=options.checkpoint_every, amp=options.amp, progress=options.progress,
        )
        inner.finish({"selection": {**fitted.selection(), "refit": "on train and validation, for the selected epochs"}})
    return model, whole


def trained_on(options: Options, data: Interactions) -> Interactions:
    """The data that the reported weights saw: with ``--refit`` validation is part of train."""
    return data.refit() if options.refit else data


def load_reported(
    options: Options, data: Interactions, device: torch.device, path: Path, *, done: bool = True
) -> tuple[Recommender, Interactions]:
    """The model that a run's result is about, in eval mode, and the data it was trained on.

    done False: the best weights so far of an unfinished run. UserError when the file is missing or damaged.
    """
    if not done:
        model = build_model(options, data, device)
        load_best(model, path)
        return model.eval(), data
    data = trained_on(options, data)
    model, saved = build_model(options, data, device), load_state(path / "final.pt")
    try:
        model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError) as error:
        raise damaged(path / "final.pt", f"of another model: {str(error).splitlines()[0]}") from error
    return model.eval(), data


def describe(options: Options, data: Interactions, model: Recommender, device: torch.device, run: Run) -> str:
    """What is about to run, in a few lines."""
    gravity = "" if options.loss_mode in ("dot", "bpr", "cml") else (
        f", {options.dist_mode} distance, {options.mass_mode} mass, lambda {options.lamb:g}"
    )
    notes = [f"note: {key}: {value}" for key, value in data.notes.items()]
    count = sum(p.numel() for p in model.parameters())
    return "\n".join([
        f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
        f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
        *notes,
        f"{options.model}, loss {options.loss_mode}{gravity}; {count:,} parameters on {device}; seed {options.seed}",
        f"selecting by {options.es_metric} on {'TEST, the original protocol: optimistic' if options.es_on == 'test' else 'validation'}",
        f"run directory {run.path}",
    ])


def _build_encoder(options: Options, data: Interactions) -> Tables:
    if options.model == "lgn":
        return LightGCN(
            build_graph(data.train), options.embedding_dim, options.num_layers, combine=options.combine,
            init=options.init, std=options.init_std, edge_keep=options.keepprob if options.dropout else 1.0,
            undirected_dropout=options.undirected_dropout,
        )
    return Tables(data.num_users, data.num_items, options.embedding_dim, init=options.init, std=options.init_std)


def _schedule(options: Options, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
    if options.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(options.epochs, 1))
    if options.lr_schedule == "step":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [options.epochs // 2, options.epochs * 3 // 4])
    return None


def _copy_tables(encoder: Tables, source: str) -> None:
    """Start values from a run directory (final.pt) or an .npz with ``user`` and ``item``."""
    path = Path(source)
    if path.is_dir():
        nodes = load_state(path / "final.pt")["model"]["encoder.nodes"]
    else:
        arrays = _load_arrays(path)
        if not {"user", "item"} <= arrays.keys():
            raise UserError(f"{path} holds {', '.join(sorted(arrays))}, wanted the arrays user and item: mend --pretrain-file")
        nodes = torch.from_numpy(np.concatenate([arrays["user"], arrays["item"]])).float()
    if nodes.shape != encoder.nodes.shape:
        raise UserError(f"{path} holds tables {tuple(nodes.shape)}, wanted {tuple(encoder.nodes.shape)} (users and items x width)")
    with torch.no_grad():
        encoder.nodes.copy_(nodes)


def _read_features(file: str, num_items: int) -> Tensor:
    """Item features float32 [I, F] from .npy, or from the first 2-D array of an .npz."""
    path = Path(file)
    arrays = _load_arrays(path)
    features = next((array for array in arrays.values() if array.ndim == 2), None)
    if features is None or features.shape[0] != num_items:
        found = "no table" if features is None else f"{features.shape[0]} rows"
        raise UserError(f"{path} holds {found}, wanted one row of features for each of {num_items} items: mend --features")
    features = torch.from_numpy(features.astype(np.float32))
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"{path} holds numbers that are not finite, wanted finite features: mend the file")
    return features


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the path") from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path} as .npy or .npz ({error}): wanted plain arrays") from None
    return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"array": loaded}
