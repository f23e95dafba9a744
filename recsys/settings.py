"""Settings of the recommender program and the rules between them. Imports nothing heavy: ``--help`` is quick.

Every flag of the published recommender is accepted under its name with its default; where the meaning was
unclear a plain name stands beside it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from gfml.base import settings as kinds
from gfml.base.errors import UserError
from gfml.base.settings import Settings, changed, fill, inert, setting
from gfml.data.options import DataSettings, DemoSettings
from gfml.program.flags import JudgingSettings, MirrorSettings, RunSettings, is_own

MODELS = ("mf", "lgn", "cml")
LOSSES = ("dot", "bpr", "gravity", "mix", "bpr_gra", "mix_bpr", "cml")
INITS = {"mf": "xavier_uniform", "lgn": "normal", "cml": "ball", "ials": "normal"}
# iALS solves for its tables: a few epochs do, nothing is drawn, and these flags have nothing to act on.
IALS_DEFAULTS = {"loss_mode": "dot", "epochs": 16, "eval_every": 1, "patience": 3, "mass_mode": "none", "ema_on": 0}
IALS_IGNORES = ("lr", "adamw_decay", "lr_schedule", "sampler", "num_neg", "clip_grad", "optimizer", "decay",
                "mass_reg", "mirror", "infer_mode")  # fmt: skip
# The demo is small: larger steps and earlier evaluations take it to the same place in seconds. A flag given wins.
DEMO_DEFAULTS = {"lr": 5e-3, "epochs": 200, "eval_every": 5, "patience": 6}
# What a command of tables takes that gives none of these flags: points among the best of the searches of study-tail on all its data
# (docs/studies/study-tail.md), by validation, and the optimizer that was not below the others on any data (results/optimizers.csv). A
# command that gives one of them keeps the published defaults of the others.
SEARCHED: dict[str, dict[str, Any]] = {
    "bpr": {"optimizer": "lazy_adamw", "lr": 2.5e-3, "decay": 1.25e-2},
    "gravity": {"optimizer": "lazy_adamw", "lr": 2.5e-3, "lamb": 4.0, "decay": 3e-4},
}
SEARCHED_FLAGS = frozenset(("optimizer", "lr", "lamb", "decay"))
# The published formulas with their mistakes.
COMPAT = {
    "mass_combine": "product",
    "mass_param": "relu",
    "mass_init": "xavier",
    "emd_power": 2,
    "infer_mode": "original",
}
RUNS_ARE_NAMED = "runs are named by dataset, model and loss"


@dataclass(frozen=True)
class ModelSettings(Settings):
    """model"""

    model: str = setting(
        "mf",
        "mf: tables; lgn: LightGCN; cml: tables in a ball; ials: alternating least squares",
        choices=(*MODELS, "ials"),
    )
    embedding_dim: int = setting(64, "width of the vectors", kinds.count, unit="D", also="recdim")
    num_layers: int = setting(3, "propagation layers of lgn", kinds.whole, unit="K", also="layer")
    combine: str = setting("mean", "output of lgn's layers", choices=("mean", "sum", "final"))
    dropout: int = setting(0, "drop edges of lgn while training", choices=(0, 1))
    keepprob: float = setting(
        0.6, "probability that an edge is kept, with --dropout 1", kinds.number(above=0, most=1), unit="P"
    )
    undirected_dropout: bool = setting(False, "drop both directions of an edge together")
    init: str = setting(
        "auto",
        "initial tables; auto: xavier_uniform for mf, normal for lgn, ball for cml",
        choices=("auto", "xavier_uniform", "normal", "ball"),
    )
    init_std: float = setting(0.1, "deviation of --init normal", kinds.positive, unit="S")
    pretrain: int = setting(0, "start from the tables of --pretrain-file", choices=(0, 1))
    pretrain_file: str | None = setting(
        None,
        "run directory, or .npz with user and item tables, matched by user_ids and item_ids; without them in the order of the data",
        unit="FILE",
    )


@dataclass(frozen=True)
class GravitySettings(Settings):
    """gravity score: mass - lambda log(squared distance + eps)"""

    lamb: float = setting(1.0, "lambda, the weight of the distance", kinds.positive, unit="L")
    learn_lamb: bool = setting(False, "learn lambda too")
    eps: float = setting(0.01, "softening of the logarithm", kinds.positive, unit="E")
    dist_mode: str = setting(
        "l2",
        "kind of squared distance; the others want a lambda of their own, kl --mass_param exp; emd ranks by one or two directions",
        choices=("l1", "l2", "kl", "emd"),
    )
    emd_input: str = setting("raw", "rows of emd as they are or as distributions", choices=("raw", "softmax"))
    emd_power: int = setting(1, "2 squares emd once more, as published", choices=(1, 2))
    kl_kind: str = setting(
        "bernoulli",
        "distributions that kl compares; compat: the published formula, which is no divergence",
        choices=("bernoulli", "softmax", "compat"),
    )
    mass_mode: str = setting("both", "who has a mass", choices=("user", "item", "both", "none"))
    mass_combine: str = setting("sum", "how two log-masses combine", choices=("sum", "product"))
    mass_param: str = setting("softplus", "map to log-mass", choices=("softplus", "relu", "exp"))
    mass_init: str = setting("default", "initial masses; xavier as published", choices=("default", "xavier"))
    emb_norm: int = setting(1, "normalise vectors before the distance; kl takes 0 unless this is given", choices=(0, 1))
    compat: int = setting(
        0,
        "1: the published formulas with their mistakes, for comparison; implies --mass_combine product, "
        "--mass_param relu, --mass_init xavier, --emd-power 2 and --infer_mode original",
        choices=(0, 1),
    )


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """loss and training"""

    loss_mode: str = setting("gravity", "loss", choices=LOSSES)
    mix_ratio: float = setting(0.5, "share of gravity in mix and mix_bpr", kinds.share, unit="R")
    decay: float = setting(1e-4, "weight of the embedding regulariser", kinds.nonnegative)
    mass_reg: float = setting(
        1e-2,
        "weight of the MASS regulariser (the original calls it weight_decay)",
        kinds.nonnegative,
        also="weight_decay",
        key="weight_decay",
        exact=True,
    )
    lr: float = setting(
        1e-3,
        "learning rate; mf with l2 distance and bpr or gravity loss takes a searched point if none of --lr, --decay, --lamb and --optimizer is given",
        kinds.positive,
    )
    adamw_decay: float = setting(
        1e-2,
        "AdamW's decoupled weight decay (the original calls it lr_decay); 0 is plain Adam",
        kinds.nonnegative,
        also="lr_decay",
        key="lr_decay",
    )
    mass_adamw: int = setting(0, "1: AdamW decays the masses too", choices=(0, 1))
    lr_schedule: str = setting(
        "none",
        "cosine: to zero over --epochs; step: a tenth after half and three quarters of them",
        choices=("none", "cosine", "step"),
    )
    batch_size: int = setting(2048, "triples per step", kinds.count, unit="B", also="bpr_batch")
    epochs: int = setting(1000, "largest number of epochs", kinds.whole, unit="N")
    sampler: str = setting(
        "user",
        "how positives are drawn: a uniform user first, every pair once, or equally many per user",
        choices=("user", "interaction", "per_user"),
    )
    num_neg: int | None = setting(None, "negatives per positive; 10 for the cml loss, else 1", kinds.count, unit="W")
    ema_on: int = setting(1, "evaluate running averages of --ema-scope", choices=(0, 1))
    lam_d: float = setting(0.995, "decay of the running averages", kinds.share)
    ema_scope: str = setting("mass", "what is averaged", choices=("mass", "all"))
    clip_grad: float | None = setting(None, "largest gradient norm, or none", kinds.norm, unit="NORM")
    optimizer: str = setting(
        "adamw",
        "adamw moves every row at every step, the others only the rows that a batch touches",
        choices=("adamw", "lazy_adamw", "adagrad"),
        late=True,
    )
    kernel: str = setting(
        "auto",
        "gradients; auto: by formula for losses of tables on a CPU, else by autograd; fused: by formula on CUDA too",
        choices=("auto", "autograd", "fused"),
        late=True,
    )


@dataclass(frozen=True)
class MetricLearningSettings(Settings):
    """collaborative metric learning (loss cml, model cml)"""

    margin: float = setting(1.9, "margin in squared-distance units", kinds.nonnegative)
    clip_norm: float = setting(1.0, "radius of the ball of model cml", kinds.positive, unit="R")
    use_rank_weight: bool = setting(False, "weight pairs by log(1 + rank)")
    use_cov_loss: bool = setting(False, "penalise correlated dimensions")
    cov_loss_weight: float = setting(1.0, "weight of that penalty", kinds.nonnegative)
    features: str | None = setting(
        None,
        "item features, matched by the ids in the file (item_id); without ids in the order of the data's items; None: none",
        unit="FILE",
    )
    hidden_layer_dim: int = setting(64, "hidden width of the feature projection", kinds.count)
    dropout_rate: float = setting(0.2, "dropout of the feature projection", kinds.number(least=0, most=0.99))
    feature_l2_reg: float = setting(0.1, "weight of the feature loss", kinds.nonnegative)
    feature_projection_scaling_factor: float = setting(0.5, "factor on the projection", kinds.positive)


@dataclass(frozen=True)
class IALSSettings(Settings):
    """alternating least squares (model ials)"""

    ials_alpha0: float = setting(0.05, "weight of the pairs that are not in train", kinds.positive, late=True)
    ials_l2: float = setting(0.02, "weight of the regulariser", kinds.positive, late=True)
    ials_nu: float = setting(1.0, "exponent of a row's frequency in it", kinds.nonnegative, late=True)


@dataclass(frozen=True)
class RecsysJudgingSettings(JudgingSettings):
    """evaluation and selection"""

    topks: tuple[int, ...] = changed(JudgingSettings, "topks", (10, 20))
    select_on: str = changed(JudgingSettings, "select_on", "val", also="es_on", key="es_on")
    select_metric: str = changed(JudgingSettings, "select_metric", "ndcg@20", also="es_metric", key="es_metric")
    patience: int | None = changed(JudgingSettings, "patience", 30)
    eval_every: int | None = changed(JudgingSettings, "eval_every", 10)
    infer_mode: str = setting(
        "mat", "score to rank by; mat: the one the loss trained", choices=("mat", "dot", "gravity", "original")
    )
    mass_scale: float = setting(1.0, "factor on the log-masses when ranking", kinds.nonnegative, unit="T")
    early_stopping: int = setting(1, "stop early", choices=(0, 1), also="ES", key="ES")


@dataclass(frozen=True)
class OldFlags(Settings):
    """accepted from the original, without effect"""

    a_fold: int = inert(100, "the adjacency is never split: products need no extra memory")
    testbatch: int = inert(100, "evaluation chooses its blocks by memory; results do not depend on them")
    multicore: int = inert(0, "metrics are vectorised")
    path: str = inert("./checkpoints", "results go to the run directory below --out")
    comment: str = inert("lgn", RUNS_ARE_NAMED)
    exp_name: str = inert("Apple", f"{RUNS_ARE_NAMED}; see --run-name")
    master_learning_rate: float = inert(0.1, "the original never reads it; see --lr")


@dataclass(frozen=True)
class RecsysSettings(
    OldFlags, RunSettings, MirrorSettings, RecsysJudgingSettings, IALSSettings, MetricLearningSettings, TrainingSettings,
    GravitySettings, ModelSettings, DemoSettings, DataSettings,
):  # fmt: skip
    """all settings of recsys/main.py"""

    amp: bool = changed(RunSettings, "amp", False, late=False)
    compile: bool = changed(RunSettings, "compile", False, late=False)

    @staticmethod
    def is_searched(options: Any) -> bool:
        """Whether parsed options or settings take the point of :data:`SEARCHED`."""
        plain = (
            options.model == "mf" and options.loss_mode in SEARCHED and options.dist_mode == "l2" and not options.compat
        )
        return plain and options.dataset != "demo" and not options.explicit & SEARCHED_FLAGS

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        """Defaults that depend on other flags are filled in, so that the resolved config says what ran."""
        if cls.is_searched(options):
            fill(options, SEARCHED[options.loss_mode])
        if options.dataset == "demo":
            fill(options, DEMO_DEFAULTS)
        elif is_own(options.dataset):
            # As long a way as the demo's patience covers: steps are as long as the learning rate.
            slower = DEMO_DEFAULTS["lr"] / options.lr
            fill(options, {"patience": round(DEMO_DEFAULTS["patience"] * max(1.0, slower))})
        if options.compat:
            fill(options, COMPAT | ({"kl_kind": "compat"} if options.dist_mode == "kl" else {}))
        if options.dist_mode == "kl":
            fill(options, {"emb_norm": 0})
        if options.num_neg is None:
            options.num_neg = 10 if options.loss_mode == "cml" else 1
        if options.model == "ials":
            fill(options, {name: getattr(cls, name) for name in IALS_IGNORES if name != "num_neg"} | IALS_DEFAULTS)
        if options.init == "auto":
            options.init = INITS[options.model]
        if options.select_on == "test":
            fill(options, {"val_ratio": 0.0})
        if options.features == "None":
            options.features = None
        _check(options)
        super().resolve(options)


def _check(options: argparse.Namespace) -> None:
    if options.model == "ials":
        _check_ials(options)
    if options.pretrain and not options.pretrain_file:
        raise UserError("--pretrain 1 needs --pretrain-file RUN_DIR or FILE.npz")
    if options.pretrain_file and not options.pretrain:
        raise UserError("found --pretrain-file without --pretrain 1: give it, or drop the file")
    if options.compat and options.loss_mode == "cml":
        raise UserError("--compat 1 covers the six pair losses; the published cml cannot run as published")
    published_kl = options.compat and options.dist_mode == "kl" and options.infer_mode == "original"
    if published_kl and options.loss_mode == "gravity":
        raise UserError(
            "the published kl ranking is undefined (it takes logarithms of raw vectors): give --infer_mode gravity or dot"
        )
    if options.features and options.loss_mode != "cml":
        raise UserError("--features belongs to --loss_mode cml")


def _check_ials(options: argparse.Namespace) -> None:
    if options.loss_mode != "dot":
        raise UserError(
            f"found --loss_mode {options.loss_mode} with --model ials, which has a loss of its own: drop it"
        )
    standard = {name: getattr(RecsysSettings, name) for name in IALS_IGNORES} | {"num_neg": 1}
    idle = [name for name, value in standard.items() if getattr(options, name) != value]
    if idle:
        flags = ", ".join(f"--{name}" for name in idle)
        raise UserError(f"found {flags} with --model ials, which has no gradient steps and no samples: drop them")
