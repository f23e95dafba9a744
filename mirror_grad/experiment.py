"""What a run is made of: data with item features, any of the models, the mirror step and its control arms."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from gfml.base.optim import light
from gfml.base.settings import as_tokens
from gfml.base.weights import read_weights
from gfml.data.interactions import Interactions
from gfml.engine.distributed import World
from gfml.engine.runs import Run
from gfml.engine.train import FitResult, Step, plain_step
from gfml.fused import FusedPairLoss, path_text
from gfml.mirror import MirrorGradient
from gfml.program.experiment import Judged, Training
from gfml.program.foreign import load_named
from gfml.program.recommender import Recommender
from gfml.program.steps import check_judgeable, usual_lengths
from gfml.program.sweep import keep_grid
from gfml.ranking.evaluation import Evaluation
from gfml.ranking.sampling import TripleBatches, TripleSampler
from gfml.ranking.topk import FactorScorer, Scorer
from gfml.report.recommenders import USUAL_METRICS, judged_text, other_conventions, table_columns, text_table
from mirror_grad import foreign
from mirror_grad.data import MultimodalData, load
from mirror_grad.models import MODELS, load_model
from mirror_grad.parts.features import halve_fixed
from mirror_grad.settings import PROGRAM_FILE, arm_of

LEARNERS = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
# What is reported without training.
UNTRAINED = {"epoch": 0, "metric": None, "protocol": "no training", "weights": "none", "epochs_trained": 0}
PUBLISHED_MASK = "validation items left in the test lists, as published"


class MirrorGrad(Recommender):
    """A multimodal recommender, trained with the mirror step or as one of its control arms."""

    @classmethod
    def load(cls, settings: Any) -> MultimodalData:
        data = load(settings, needs_features=MODELS[settings.model].needs_features)
        check_judgeable(data.interactions, settings.topks, settings.select_metric, settings.select_on)
        return data

    @property
    def interactions(self) -> Interactions:
        return self.data.interactions

    def whole(self) -> Self:
        data = replace(self.data, interactions=self.interactions.refit())
        return type(self)(self.settings, data, self.world)

    @property
    def name(self) -> str:
        return self.settings.model

    @property
    def label(self) -> str:
        return f"{self.interactions.name}-{self.settings.model}-{arm_of(self.settings)}"

    @property
    def patience(self) -> int | None:
        return None if self.settings.patience is None else self.settings.patience + 1

    # -- building and training

    def build(self, *, start: bool = True) -> nn.Module:
        s = self.settings
        build = load_model(s.model)
        model = build(self.data, s.settings, behaviour=s.behaviour, embedding_dim=s.embedding_dim, seed=s.seed)
        if s.feature_dtype == "bfloat16":
            halve_fixed(model)
        return model.to(self.device)

    def training(self, model: nn.Module) -> Training | None:
        """The learning rate is that of the arm, and falls by epoch."""
        s = self.settings
        if not MODELS[s.model].trains:
            return None
        groups = [p for p in model.parameters() if p.requires_grad]
        if hasattr(model, "optimizer_groups"):
            groups = model.optimizer_groups()
        fused = {"fused": True} if s.learner == "adam" else {}
        optimizer = light(LEARNERS[s.learner])(
            groups, lr=s.learning_rate * arm_factor(s), weight_decay=s.weight_decay, **fused
        )
        base, period = s.learning_rate_scheduler
        scheduler = None
        if base != 1.0:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: base ** (epoch / period))
        found = self.loss_by_formula(model)
        loss = self.shared(model.loss if isinstance(found, str) else found, model, reduction="mean")
        return Training(optimizer, self.batches(model), loss, step=build_step(s, optimizer), scheduler=scheduler)

    def loss_by_formula(self, model: nn.Module) -> FusedPairLoss | str:
        """A model's loss with gradients by formula, or why autograd makes them."""
        if not hasattr(model, "loss_by_formula"):
            return "a model of several parts"
        return self.why_autograd or model.loss_by_formula()

    def batches(self, model: nn.Module) -> Callable[[int], TripleBatches]:
        """batches(epoch): every train pair once, shuffled, each with one negative among the items of train.

        The model's ``new_epoch`` runs first, so that what it draws for an epoch is there after a resume too.
        """
        s = self.settings
        sampler = TripleSampler(
            self.interactions.train, batch_size=s.batch_size, seed=s.seed, scheme="interaction", negatives="train-items",
            num_negatives=int(MODELS[s.model].needs_negatives), device=self.device,
            constant=self.constant_batches and "." not in MODELS[s.model].module,  # models of others know no weights
        )  # fmt: skip

        def batches(epoch: int) -> TripleBatches:
            if hasattr(model, "new_epoch"):
                model.new_epoch(epoch)
            return sampler.epoch(epoch)

        return batches

    unshared = (
        "--behaviour published",
        *(f"--model {name}" for name, entry in MODELS.items() if entry.trains and not entry.rowwise),
    )

    def sharing_problem(self) -> str | None:
        s, entry = self.settings, MODELS[self.settings.model]
        if not entry.trains:
            return None
        if not entry.rowwise:
            return f"--model {s.model}, whose loss compares rows of a batch, draws random numbers or counts batches,"
        return "--behaviour published" if s.behaviour == "published" else None

    # -- judging

    def scorer(self, model: nn.Module, split: str = "test") -> Scorer:
        return model.scorer()

    def vectors(self, model: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Of models that rank by a dot product of users and items."""
        with torch.no_grad():
            scorer = model.scorer()
        return (scorer.user, scorer.item) if isinstance(scorer, FactorScorer) else None

    def evaluation(self, model: nn.Module, split: str, *, beyond: bool = False, **how: Any) -> Evaluation:
        return super().evaluation(model, split, beyond=beyond, mask_valid=self.settings.test_mask == "seen", **how)

    def evaluate(self, model: nn.Module, split: str) -> Mapping[str, float]:
        """For stopping and selection; rounded where the flags ask for it."""
        means, digits = super().evaluate(model, split), self.settings.round_metrics
        return means if digits is None else {name: round(value, digits) for name, value in means.items()}

    def selection(self, fitted: FitResult | None, run: Run) -> dict[str, Any]:
        selection = super().selection(fitted, run) if MODELS[self.settings.model].trains else dict(UNTRAINED)
        if self.settings.test_mask == "train":
            selection["protocol"] = f"{selection['protocol'].split('; ' + PUBLISHED_MASK)[0]}; {PUBLISHED_MASK}"
        return selection

    def facts(self, model: nn.Module, test: Evaluation) -> dict[str, Any]:
        """What was trained on what."""
        s, data = self.settings, self.data
        mirror: dict[str, Any] = {"mode": s.mirror}
        if s.mirror != "off":
            mirror |= {
                "alpha1": s.mirror_alpha1, "alpha2": s.mirror_alpha2, "every": s.mirror_every, "counter": s.mirror_counter,
                "phase": s.mirror_phase,
            }  # fmt: skip
        widths = {name: int(table.shape[1]) for name, table in data.features.items()}
        return {
            "behaviour": s.behaviour, "settings": dict(vars(s.settings)), "arm": arm_of(s), "mirror": mirror,
            "learning_rate": s.learning_rate * arm_factor(s),
            "features": {"source": data.feature_source, "widths": widths, "fingerprint": data.fingerprint},
            "test_mask": s.test_mask, "seconds": {"train": 0.0, "eval": 0.0} if not MODELS[s.model].trains else {},
        }  # fmt: skip

    def page(self, run: Run, judged: Judged) -> Path:
        from mirror_grad.report import draw

        return draw([run.path])

    # -- words

    def describe(self, model: nn.Module) -> list[str]:
        s, data = self.settings, self.data
        tables = [
            f"{name} {table.shape[1]} wide, {int(data.known[name].sum()):,} items"
            for name, table in data.features.items()
        ]
        noise = ["note: features are RANDOM NOISE as asked: only times mean anything"]
        arm, mirror = arm_of(s), f"alpha1 {s.mirror_alpha1:g}, alpha2 {s.mirror_alpha2:g}, every {s.mirror_every}"
        return [
            *(noise if data.feature_source == "random" else []),
            f"features: {', '.join(tables) or 'none'} ({data.feature_source})",
            f"{s.model}, {s.behaviour}: {', '.join(f'{key} {value}' for key, value in vars(s.settings).items())}",
            f"arm {arm}: mirror {s.mirror}{'' if s.mirror == 'off' else ', ' + mirror}; "
            f"learning rate {s.learning_rate * arm_factor(s):g}; masked in test lists: {s.test_mask}",
            *([path_text(self.loss_by_formula(model), 3 * s.batch_size)] if MODELS[s.model].trains else []),
        ]

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        text = judged_text(result, {f"{result['model']}, {result['arm']}": result["test"]})
        if result["features"]["source"] == "random":
            text += "\nfeatures were random noise, as asked: the figures say nothing about the model"
        return text

    @classmethod
    def text(cls, settings: Any, results: Sequence[tuple[Mapping[str, Any], Path]]) -> str:
        """Of a grid the table of a sweep, stored as one. Equal values go to the earlier point; only the winner's test figures
        are shown."""
        if not settings.space:
            return super().text(settings, results)
        from mirror_grad.main import PROGRAM

        part = "test" if settings.select_on == "test" else "val"
        given = {name: getattr(settings, name) for name in sorted(settings.explicit - {"grid", "config"})}
        usual = PROGRAM.parse(as_tokens({"model": settings.model, "dataset": settings.dataset}))
        flags = {
            key: value for key, value in given.items() if key in ("model", "dataset") or getattr(usual, key) != value
        }
        name = f"grid-{settings.model}-{Path(settings.dataset).name}"
        return keep_grid(
            name, PROGRAM_FILE, as_tokens(flags), settings.space, f"{part}/{settings.select_metric}", results
        )


def build_step(s: Any, optimizer: torch.optim.Optimizer) -> Step:
    """The ordinary step, or the mirror step of the flags."""
    clip = s.clip_grad_norm if s.mirror_clip is None else s.mirror_clip
    if s.mirror == "off":
        return partial(plain_step, clip_norm=clip)
    return MirrorGradient(
        optimizer, s.mirror_alpha1, s.mirror_alpha2, s.mirror_every, s.mirror, counter=s.mirror_counter,
        phase=s.mirror_phase, rng=s.mirror_rng, wd=s.mirror_wd, clip=clip, clip_halves=s.mirror_clip_halves,
        diagnostics=s.mirror_diagnostics,
    )  # fmt: skip


def arm_factor(options: Any) -> float:
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


def judge_weights(settings: Any, world: World) -> str:
    """The test figures of stored weights. Nothing is trained or written."""
    data = load(settings, needs_features=MODELS[settings.model].needs_features)
    model, notes = weights_model(MirrorGrad(settings, data, world), Path(settings.weights))
    settings = replace(settings, topks=usual_lengths(settings, data.interactions), select_metric="")
    check_judgeable(data.interactions, settings.topks, "", "test")
    this = MirrorGrad(settings, data, world)
    for note in notes:
        print(f"note: {settings.weights}: {note}", file=sys.stderr)
    rows = {settings.model: this.evaluation(model, "test", beyond=True).means}
    more = [f"{name}@{k}" for name in ("precision", "map") for k in settings.topks]
    masked = "train and validation" if settings.test_mask == "seen" else "train"
    return "\n".join([
        f"test of {this.interactions.name}, weights of {settings.weights}, {masked} items masked; {USUAL_METRICS}",
        text_table(rows, [*table_columns(rows, settings.topks), *more]),
        *other_conventions(rows),
    ])  # fmt: skip


def weights_model(this: MirrorGrad, path: Path) -> tuple[nn.Module, list[str]]:
    """The model with a file's weights, in eval mode, and notes: best.pt, last.pt, final.pt, a bare state of tensors, or a
    file of Mirror-Gradient's or MMRec's own program, whose names are translated.

    UserError when the file is damaged, or its names or shapes are another model's.
    """
    name, dim = this.settings.model, this.settings.embedding_dim
    state: dict[str, Tensor] = read_weights(path)
    notes: list[str] = []
    found = foreign.recognise(state)
    if found and name not in found:
        raise foreign.other_model(name, found, path)
    if not found or any(theirs not in state for theirs, *_ in foreign.WIDTHS[name]):
        foreign.check_whole(name, state, path)
    if found:
        options = argparse.Namespace(**vars(this.settings), settings=this.settings.settings)
        notes = foreign.adapt(options, state)
        own = vars(options.settings)
        changes = {key: getattr(options, key) for key in vars(this.settings) if key not in own}
        this = type(this)(replace(this.settings, **changes | own), this.data, this.world)
    model = type(this)(this.settings, this.data).build()
    if found:
        foreign.check_whole(name, state, path, model.state_dict().keys())
        state = foreign.rename(name, state)
        notes += foreign.complete(model, name, state, this.data, this.settings, dim)
    return load_named(model, state, path, name).to(this.device), notes
