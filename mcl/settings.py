"""Settings of the MCL program and the rules between them. Imports nothing heavy: ``--help`` is quick.

Flags of the authors' program and of the GFML fork are accepted under their names with their defaults; plain names
stand beside them. ``--lamb_p`` and ``--lamb_n`` mean different things in the two, see ``--spelling``.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass

from gfml.base import settings as kinds
from gfml.base.errors import UserError
from gfml.base.settings import Settings, changed, fill, inert, setting
from gfml.data.options import DataSettings, DemoSettings
from gfml.program.flags import JudgingSettings, MirrorSettings, RunSettings

# The published program's names for data that another program publishes under the same name.
DATASETS = {"amazon-book": "amazon-book-mcl", "yelp": "yelp-mcl"}
# The flag with two meanings -> (meaning in the fork, meaning in the original)
TWO_MEANINGS = {"lamb_p": ("grav_weight_pos", "mcl_lambda_p"), "lamb_n": ("grav_weight_neg", "mcl_lambda_n")}
NEVER_SPLIT = "the adjacency is never split: products need no extra memory"


@dataclass(frozen=True)
class ModelSettings(Settings):
    """model"""

    encoder: str = setting(
        "lightgcn",
        "lightgcn: tables propagated over the train graph; tables: free vectors",
        choices=("lightgcn", "tables"),
    )
    embedding_dim: int = setting(64, "width of the vectors", kinds.count, unit="D", also="dim")
    num_layers: int = setting(3, "propagation layers", kinds.whole, unit="K", also="layer")
    combine: str = setting(
        "sum",
        "output of the layers; under sum squared distances are (K + 1)^2 times those of mean",
        choices=("sum", "mean", "final"),
        also="comb_method",
    )
    dropout: int = setting(0, "drop edges of the graph while training", choices=(0, 1))
    keep_prob: float = setting(
        0.8, "probability that an edge is kept, with --dropout 1", kinds.number(above=0, most=1), unit="P"
    )


@dataclass(frozen=True)
class MixedCentricSettings(Settings):
    """mixed-centric loss (modes mcl and mix); E is a squared distance"""

    mode: str = setting("mcl", "mcl: mixed-centric loss; gfml: gravity loss; mix: both", choices=("mcl", "gfml", "mix"))
    gfml: bool = setting(False, "the fork's name of --mode gfml; wins over --mix")
    mix: bool = setting(False, "the fork's name of --mode mix")
    alpha: float = setting(1.25, "sharpness of positive pairs", kinds.positive, unit="A", symbol="alpha")
    beta: float = setting(5.0, "sharpness of negative pairs", kinds.positive, unit="B", symbol="beta")
    mcl_lambda_p: float = setting(6.5, "offset added to E of positive pairs", unit="L", symbol="lambda_p", also="lambp")
    mcl_lambda_n: float = setting(
        -0.5, "offset added to E of negative pairs", unit="L", symbol="lambda_n", also="lambn"
    )
    margin: float = setting(1.0, "slack of the mining, in squared-distance units", unit="E", symbol="epsilon")
    lamb_p: float | None = setting(
        None,
        "two meanings: --grav-weight-pos in the fork, --mcl-lambda-p in the original; see --spelling",
        float,
        unit="X",
    )
    lamb_n: float | None = setting(
        None,
        "two meanings: --grav-weight-neg in the fork, --mcl-lambda-n in the original; see --spelling",
        float,
        unit="X",
    )
    spelling: str = setting(
        "auto",
        "whose --lamb_p and --lamb_n; auto: the fork's in modes gfml and mix, an error in mode mcl",
        choices=("auto", "fork", "original"),
    )


@dataclass(frozen=True)
class GravitySettings(Settings):
    """gravity loss (modes gfml and mix): g = log-masses - lambda log(E + 1)"""

    grav_lambda: float = setting(1.0, "lambda, the weight of the distance", kinds.positive, unit="L", also="lambd")
    grav_weight_pos: float = setting(1.0, "weight of mean(-g) over positives", unit="W")
    grav_weight_neg: float = setting(1.0, "weight of mean(g) over hardest negatives", unit="W")
    gfml_opt: int = setting(0, "1: positives alone, unweighted; vectors collapse", choices=(0, 1))
    mix_ratio: float = setting(0.5, "share of gravity in mode mix", kinds.share, unit="R")
    mass_param: str = setting("relu", "map to log-mass; relu as published", choices=("relu", "softplus", "exp"))
    mass_init: str = setting(
        "xavier",
        "initial masses; xavier as published, under which half of the relu masses never move",
        choices=("xavier", "default"),
    )
    ema: bool = setting(False, "running averages of --ema-scope")
    ema_decay: float = setting(0.995, "decay of the running averages", kinds.share, unit="D")
    ema_scope: str = setting(
        "frozen",
        "frozen: masses are not trained, so their average is their start, as published; "
        "mass: trained masses are averaged; all: vectors too",
        choices=("frozen", "mass", "all"),
    )


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """training"""

    decay: float = setting(1e-4, "weight of the regulariser of the free tables", kinds.nonnegative)
    lr: float = setting(1e-3, "learning rate of Adam", kinds.positive)
    batch_size: int = setting(1000, "USERS per step, also the constant m of the loss", kinds.count, unit="M")
    epochs: int = setting(1000, "largest number of epochs", kinds.whole, unit="N")
    num_neg: int = setting(10, "negatives per positive", kinds.count, unit="W")
    drop_last: bool = setting(False, "leave out each epoch's incomplete last batch of users, as published")
    duplicate_batches: int = setting(
        1, "use every batch N times in a row; 5 is the published sampler's defect", kinds.count, unit="N"
    )
    clip_grad: float | None = setting(None, "largest gradient norm, or none", kinds.norm, unit="NORM")


@dataclass(frozen=True)
class MCLJudgingSettings(JudgingSettings):
    """evaluation and selection"""

    topks: tuple[int, ...] = changed(JudgingSettings, "topks", (5, 10, 20))
    select_on: str = changed(JudgingSettings, "select_on", "val", also="es_on")
    select_metric: str = changed(
        JudgingSettings,
        "select_metric",
        "sum",
        help="what selects the epoch; sum: recall and ndcg at every K, as published",
        also="es_metric",
    )
    patience: int | None = changed(JudgingSettings, "patience", 30)
    eval_every: int | None = changed(JudgingSettings, "eval_every", 10)
    score: str = setting(
        "distance",
        "what ranks and selects; distance as published, where masses play no part",
        choices=("distance", "gravity"),
    )

    @classmethod
    def other_metrics(cls) -> tuple[str, ...]:
        return ("sum",)


@dataclass(frozen=True)
class OldFlags(Settings):
    """accepted from the original, without effect"""

    adjacency_split: int = inert(0, f"{NEVER_SPLIT} (the original's --split 0 or 1)", unit="N")
    folds: int = inert(100, NEVER_SPLIT, unit="N")
    testbatch: int = inert(100, "evaluation chooses its blocks by memory; results do not depend on them", unit="N")
    multicore: int = inert(1, "metrics are vectorised", unit="N")
    pretrain: int = inert(0, "the original never reads it", unit="N")


@dataclass(frozen=True)
class MCLSettings(
    OldFlags, RunSettings, MirrorSettings, MCLJudgingSettings, TrainingSettings, GravitySettings,
    MixedCentricSettings, ModelSettings, DemoSettings, DataSettings,
):  # fmt: skip
    """all settings of mcl/main.py"""

    @classmethod
    def translate(cls, tokens: list[str]) -> list[str]:
        """The original's ``--split 0`` cuts the adjacency; here ``--split`` cuts the data and takes a word."""
        text = re.sub(r"(?:(?<=\0)|^)--split[\0=](?=[0-9]+(?:\0|$))", "--adjacency_split=", "\0".join(tokens))
        return text.split("\0") if tokens else []

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        _choose_mode(options)
        _choose_meaning(options)
        if options.dataset in DATASETS:
            print(
                f"note: {options.dataset} is {DATASETS[options.dataset]} here, the data of the MCL paper",
                file=sys.stderr,
            )
            options.dataset = DATASETS[options.dataset]
        if options.select_on == "test":
            fill(options, {"val_ratio": 0.0})
        if options.mode == "mcl" and options.score == "gravity":
            raise UserError("--score gravity needs masses, which --mode mcl has not: give --mode gfml or mix")
        if options.mode == "mcl" and options.ema and options.ema_scope != "all":
            raise UserError(
                "--ema averages masses, which --mode mcl has not: give --ema-scope all, or --mode gfml or mix"
            )
        options.unused = frozenset({"gfml", "mix", "lamb_p", "lamb_n", "spelling"})
        super().resolve(options)


def _choose_mode(options: argparse.Namespace) -> None:
    short = "gfml" if options.gfml else "mix" if options.mix else None
    if options.gfml and options.mix:
        print("note: --gfml and --mix together are --gfml, as in the fork", file=sys.stderr)
    if short and "mode" in options.explicit and options.mode != short:
        raise UserError(f"found --{short} and --mode {options.mode}: give one of them")
    options.mode = short or options.mode


def _choose_meaning(options: argparse.Namespace) -> None:
    """Move ``--lamb_p`` and ``--lamb_n`` to the plain flags they stand for."""
    whose = options.spelling
    if whose == "auto" and options.mode != "mcl":
        whose = "fork"
    for name, (fork, original) in TWO_MEANINGS.items():
        if getattr(options, name) is None:
            continue
        plain = f"--{fork.replace('_', '-')}", f"--{original.replace('_', '-')}"
        if whose == "auto":
            raise UserError(
                f"--{name} is {plain[1]} in the original program and {plain[0]} in its fork: give one of these, or --spelling"
            )
        target = fork if whose == "fork" else original
        if target in options.explicit:
            raise UserError(f"found --{name} and {plain[whose != 'fork']}, which mean the same here: give one of them")
        setattr(options, target, getattr(options, name))
