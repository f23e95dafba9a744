"""Flags of the recommender programs and the rules between them. Imports nothing heavy: ``--help`` is quick.

Every flag of the published recommender is accepted under its name with its default; where the meaning was
unclear a plain name stands beside it.
"""

from __future__ import annotations

import argparse
import sys

from gfml.data.options import add_data_flags
from gfml.program.cli import (
    Options,
    Parser,
    add_judging_flags,
    add_mirror_flags,
    add_run_flags,
    check_judging,
    count,
    nonnegative,
    number,
    positive,
    share,
)

MODELS = ("mf", "lgn", "cml")
LOSSES = ("dot", "bpr", "gravity", "mix", "bpr_gra", "mix_bpr", "cml")
# Accepted so that old command lines run; each says so when it is changed.
WITHOUT_EFFECT = {
    "a_fold": "the adjacency is never split: products need no extra memory",
    "testbatch": "evaluation chooses its blocks by memory; results do not depend on them",
    "multicore": "metrics are vectorised",
    "path": "results go to the run directory below --out",
    "comment": "runs are named by dataset, model and loss",
    "exp_name": "runs are named by dataset, model and loss; see --run-name",
    "master_learning_rate": "the original never reads it; see --lr",
}
# The demo is small: larger steps and earlier evaluations take it to the same place in seconds. A flag given wins.
DEMO_DEFAULTS = {"lr": 5e-3, "epochs": 200, "eval_every": 5, "patience": 6}
# No part of what a run computes.
NOT_IDENTITY = frozenset(
    {*WITHOUT_EFFECT, "load", "report", "baselines", "data_root", "cache_dir", "cache", "download"}
)


def build_parser() -> Parser:
    """The command line of ``recsys/main.py``."""
    parser = Parser(
        prog="recsys/main.py",
        description="Train and judge a recommender with a gravity score. Without flags: the embedded demo data, "
        f"with {', '.join(f'--{name} {value:g}' for name, value in DEMO_DEFAULTS.items())}.",
    )
    add_data_flags(parser)
    _add_model_flags(parser)
    _add_gravity_flags(parser)
    _add_training_flags(parser)
    _add_metric_learning_flags(parser)
    _add_evaluation_flags(parser)
    add_mirror_flags(parser)
    add_run_flags(parser)
    _add_flags_without_effect(parser)
    return parser


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=MODELS, default="mf", help="mf: tables; lgn: LightGCN; cml: tables in a ball")
    group.add_argument("--embedding-dim", "--recdim", type=count, default=64, metavar="D", help="width of the vectors")
    group.add_argument(
        "--num-layers", "--layer", type=number(int, least=0), default=3, metavar="K", help="propagation layers of lgn"
    )
    group.add_argument("--combine", choices=("mean", "sum", "final"), default="mean", help="output of lgn's layers")
    group.add_argument("--dropout", type=int, choices=(0, 1), default=0, help="drop edges of lgn while training")
    group.add_argument(
        "--keepprob",
        type=number(above=0, most=1),
        default=0.6,
        metavar="P",
        help="probability that an edge is kept, with --dropout 1",
    )
    group.add_argument(
        "--undirected-dropout",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="drop both directions of an edge together",
    )
    group.add_argument(
        "--init",
        choices=("auto", "xavier_uniform", "normal", "ball"),
        default="auto",
        help="initial tables; auto: xavier_uniform for mf, normal for lgn, ball for cml",
    )
    group.add_argument("--init-std", type=positive, default=0.1, metavar="S", help="deviation of --init normal")
    group.add_argument(
        "--pretrain", type=int, choices=(0, 1), default=0, help="start from the tables of --pretrain-file"
    )
    group.add_argument(
        "--pretrain-file", metavar="FILE", help="run directory, or .npz with user [U, D] and item [I, D] tables"
    )


def _add_gravity_flags(parser: Parser) -> None:
    group = parser.add_argument_group("gravity score: mass - lambda log(squared distance + eps)")
    group.add_argument("--lamb", type=positive, default=1.0, metavar="L", help="lambda, the weight of the distance")
    group.add_argument("--learn-lamb", action=argparse.BooleanOptionalAction, default=False, help="learn lambda too")
    group.add_argument("--eps", type=positive, default=0.01, metavar="E", help="softening of the logarithm")
    group.add_argument("--dist_mode", choices=("l1", "l2", "kl", "emd"), default="l2", help="kind of squared distance")
    group.add_argument(
        "--emd-input", choices=("raw", "softmax"), default="raw", help="rows of emd as they are or as distributions"
    )
    group.add_argument("--emd-power", type=int, choices=(1, 2), default=1, help="2 squares emd once more, as published")
    group.add_argument(
        "--kl-kind",
        choices=("bernoulli", "softmax", "compat"),
        default="bernoulli",
        help="distributions that kl compares; compat: the published formula, which is no divergence",
    )
    group.add_argument("--mass_mode", choices=("user", "item", "both", "none"), default="both", help="who has a mass")
    group.add_argument("--mass_combine", choices=("sum", "product"), default="sum", help="how two log-masses combine")
    group.add_argument("--mass_param", choices=("softplus", "relu", "exp"), default="softplus", help="map to log-mass")
    group.add_argument(
        "--mass_init", choices=("default", "xavier"), default="default", help="initial masses; xavier as published"
    )
    group.add_argument(
        "--emb_norm",
        type=int,
        choices=(0, 1),
        default=1,
        help="normalise vectors before the distance; kl takes 0 unless this is given",
    )
    group.add_argument(
        "--compat",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: the published formulas with their mistakes, for comparison; implies --mass_combine product, "
        "--mass_param relu, --mass_init xavier, --emd-power 2 and --infer_mode original",
    )


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("loss and training")
    group.add_argument("--loss_mode", choices=LOSSES, default="gravity", help="loss")
    group.add_argument("--mix_ratio", type=share, default=0.5, metavar="R", help="share of gravity in mix and mix_bpr")
    group.add_argument("--decay", type=nonnegative, default=1e-4, help="weight of the embedding regulariser")
    group.add_argument(
        "--weight_decay",
        "--mass-reg",
        dest="weight_decay",
        type=nonnegative,
        default=1e-2,
        help="weight of the MASS regulariser (the original's name; plainly: --mass-reg)",
    )
    group.add_argument("--lr", type=positive, default=1e-3, help="learning rate")
    group.add_argument(
        "--lr_decay",
        "--adamw-decay",
        dest="lr_decay",
        type=nonnegative,
        default=1e-2,
        help="AdamW's decoupled weight decay (the original's name); 0 is plain Adam",
    )
    group.add_argument("--mass_adamw", type=int, choices=(0, 1), default=0, help="1: AdamW decays the masses too")
    group.add_argument(
        "--lr-schedule",
        choices=("none", "cosine", "step"),
        default="none",
        help="cosine: to zero over --epochs; step: a tenth after half and three quarters of them",
    )
    group.add_argument("--batch-size", "--bpr_batch", type=count, default=2048, metavar="B", help="triples per step")
    group.add_argument(
        "--epochs", type=number(int, least=0), default=1000, metavar="N", help="largest number of epochs"
    )
    group.add_argument(
        "--sampler",
        choices=("user", "interaction", "per_user"),
        default="user",
        help="how positives are drawn: a uniform user first, every pair once, or equally many per user",
    )
    group.add_argument(
        "--num-neg", type=count, default=None, metavar="W", help="negatives per positive; 10 for the cml loss, else 1"
    )
    group.add_argument("--ema_on", type=int, choices=(0, 1), default=1, help="evaluate running averages of --ema-scope")
    group.add_argument("--lam_d", type=share, default=0.995, help="decay of the running averages")
    group.add_argument("--ema-scope", choices=("mass", "all"), default="mass", help="what is averaged")
    group.add_argument(
        "--clip-grad",
        type=number(above=0, none=True),
        default=None,
        metavar="NORM",
        help="largest gradient norm, or none",
    )
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="bfloat16 autocast; distances stay in float32",
    )
    group.add_argument(
        "--kernel",
        choices=("auto", "autograd"),
        default="auto",
        help="gradients; auto: by formula for the pair losses of tables on a CPU, else by autograd",
    )
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the loss")
    group.add_argument(
        "--load", type=int, choices=(0, 1), default=0, help="1: insist on continuing the earlier run of these flags"
    )
    parser.one_spelling("--weight_decay")


def _add_metric_learning_flags(parser: Parser) -> None:
    group = parser.add_argument_group("collaborative metric learning (loss cml, model cml)")
    group.add_argument("--margin", type=nonnegative, default=1.9, help="margin in squared-distance units")
    group.add_argument("--clip_norm", type=positive, default=1.0, metavar="R", help="radius of the ball of model cml")
    group.add_argument(
        "--use_rank_weight", action=argparse.BooleanOptionalAction, default=False, help="weight pairs by log(1 + rank)"
    )
    group.add_argument(
        "--use_cov_loss", action=argparse.BooleanOptionalAction, default=False, help="penalise correlated dimensions"
    )
    group.add_argument("--cov_loss_weight", type=nonnegative, default=1.0, help="weight of that penalty")
    group.add_argument("--features", metavar="FILE", help=".npy or .npz of item features [I, F]; None: no features")
    group.add_argument("--hidden_layer_dim", type=count, default=64, help="hidden width of the feature projection")
    group.add_argument(
        "--dropout_rate", type=number(least=0, most=0.99), default=0.2, help="dropout of the feature projection"
    )
    group.add_argument("--feature_l2_reg", type=nonnegative, default=0.1, help="weight of the feature loss")
    group.add_argument(
        "--feature_projection_scaling_factor", type=positive, default=0.5, help="factor on the projection"
    )


def _add_evaluation_flags(parser: Parser) -> None:
    group = add_judging_flags(
        parser, topks=(10, 20), metric="ndcg@20", patience=30, eval_every=10, metric_flags=("--es_metric", "--select-metric"),
        on_flags=("--es_on", "--select-on"),
    )  # fmt: skip
    group.add_argument(
        "--infer_mode",
        choices=("mat", "dot", "gravity", "original"),
        default="mat",
        help="score to rank by; mat: the one the loss trained",
    )
    group.add_argument(
        "--mass-scale", type=nonnegative, default=1.0, metavar="T", help="factor on the log-masses when ranking"
    )
    group.add_argument("--ES", type=int, choices=(0, 1), default=1, help="stop early")
    group.add_argument("--report", type=int, choices=(0, 1), default=1, help="write the report with its plots")


def _add_flags_without_effect(parser: Parser) -> None:
    group = parser.add_argument_group("accepted from the original, without effect")
    for name, kind, default in (
        ("a_fold", int, 100),
        ("testbatch", int, 100),
        ("multicore", int, 0),
        ("path", str, "./checkpoints"),
        ("comment", str, "lgn"),
        ("exp_name", str, "Apple"),
        ("master_learning_rate", float, 0.1),
    ):
        group.add_argument(f"--{name}", type=kind, default=default, help=WITHOUT_EFFECT[name])


def parse(argv: list[str] | None = None) -> Options:
    """Parsed and checked flags. Defaults that depend on other flags are filled in here, so that the resolved
    config says what ran."""
    parser = build_parser()
    options = parser.parse_args(argv)
    given = options.explicit
    # The config of a run names every flag: a default is not worth a note.
    for name in sorted(
        name for name in given & WITHOUT_EFFECT.keys() if getattr(options, name) != parser.get_default(name)
    ):
        print(f"note: --{name} has no effect: {WITHOUT_EFFECT[name]}", file=sys.stderr)
    if options.dataset == "demo":
        _fill(options, DEMO_DEFAULTS)
    if options.compat:
        _apply_compat(options)
    if options.dist_mode == "kl" and "emb_norm" not in given:
        options.emb_norm = 0
    if options.num_neg is None:
        options.num_neg = 10 if options.loss_mode == "cml" else 1
    if options.init == "auto":
        options.init = {"mf": "xavier_uniform", "lgn": "normal", "cml": "ball"}[options.model]
    if options.es_on == "test" and "val_ratio" not in given:
        options.val_ratio = 0.0
    if options.features == "None":
        options.features = None
    _check(parser, options, given)
    options.resolved = parser.config_of(options)
    return options


def _fill(options: Options, values: dict[str, object]) -> None:
    """Set what was not given."""
    for name, value in values.items():
        if name not in options.explicit:
            setattr(options, name, value)


def _apply_compat(options: Options) -> None:
    published = {"mass_combine": "product", "mass_param": "relu", "mass_init": "xavier", "emd_power": 2}
    _fill(options, {**published, "infer_mode": "original"})
    if options.dist_mode == "kl":
        _fill(options, {"kl_kind": "compat"})


def _check(parser: Parser, options: Options, given: frozenset[str]) -> None:
    if options.pretrain and not options.pretrain_file:
        parser.error("--pretrain 1 needs --pretrain-file RUN_DIR or FILE.npz")
    if options.compat and options.loss_mode == "cml":
        parser.error("--compat 1 covers the six pair losses; the published cml cannot run as published")
    if (
        options.compat
        and options.dist_mode == "kl"
        and options.loss_mode == "gravity"
        and options.infer_mode == "original"
    ):
        parser.error(
            "the published kl ranking is undefined (it takes logarithms of raw vectors): give --infer_mode gravity or dot"
        )
    if options.features and options.loss_mode != "cml":
        parser.error("--features belongs to --loss_mode cml")
    check_judging(parser, options, on="es_on", metric="es_metric")
