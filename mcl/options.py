"""Flags of the MCL program and the rules between them. Imports nothing heavy: ``--help`` is quick.

Flags of the authors' program and of the GFML fork are accepted under their names with their defaults; plain names
stand beside them. ``--lamb_p`` and ``--lamb_n`` mean different things in the two, see ``--spelling``.
"""

from __future__ import annotations

import argparse
import re
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

# The published program's names for data that another program publishes under the same name.
DATASETS = {"amazon-book": "amazon-book-mcl", "yelp": "yelp-mcl"}
# Accepted so that old command lines run; each says so once when it is given.
WITHOUT_EFFECT = {
    "adjacency_split": "the adjacency is never split: products need no extra memory",
    "folds": "the adjacency is never split: products need no extra memory",
    "testbatch": "evaluation chooses its blocks by memory; results do not depend on them",
    "multicore": "metrics are vectorised",
    "pretrain": "the original never reads it",
}
# No part of what a run computes.
NOT_IDENTITY = frozenset({*WITHOUT_EFFECT, "load", "baselines", "data_root", "cache_dir", "cache", "download"})
# dest of the flag with two meanings -> (meaning in the fork, meaning in the original)
TWO_MEANINGS = {"lamb_p": ("grav_weight_pos", "mcl_lambda_p"), "lamb_n": ("grav_weight_neg", "mcl_lambda_n")}


def build_parser() -> Parser:
    """The command line of ``mcl/main.py``."""
    parser = Parser(
        prog="mcl/main.py",
        description="Train and judge a recommender with the mixed-centric loss, a gravity loss, or both. "
        "Without flags: the embedded demo data.",
    )
    add_data_flags(parser)
    _add_model_flags(parser)
    _add_mixed_centric_flags(parser)
    _add_gravity_flags(parser)
    _add_training_flags(parser)
    _add_evaluation_flags(parser)
    add_mirror_flags(parser)
    add_run_flags(parser)
    _add_flags_without_effect(parser)
    return parser


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--encoder",
        choices=("lightgcn", "tables"),
        default="lightgcn",
        help="lightgcn: tables propagated over the train graph; tables: free vectors",
    )
    group.add_argument("--embedding-dim", "--dim", type=count, default=64, metavar="D", help="width of the vectors")
    group.add_argument(
        "--num-layers", "--layer", type=number(int, least=0), default=3, metavar="K", help="propagation layers"
    )
    group.add_argument(
        "--combine",
        "--comb_method",
        choices=("sum", "mean", "final"),
        default="sum",
        help="output of the layers; under sum squared distances are (K + 1)^2 times those of mean",
    )
    group.add_argument("--dropout", type=int, choices=(0, 1), default=0, help="drop edges of the graph while training")
    group.add_argument(
        "--keep_prob",
        type=number(above=0, most=1),
        default=0.8,
        metavar="P",
        help="probability that an edge is kept, with --dropout 1",
    )


def _add_mixed_centric_flags(parser: Parser) -> None:
    group = parser.add_argument_group("mixed-centric loss (modes mcl and mix); E is a squared distance")
    group.add_argument(
        "--mode",
        choices=("mcl", "gfml", "mix"),
        default="mcl",
        help="mcl: mixed-centric loss; gfml: gravity loss; mix: both",
    )
    group.add_argument("--gfml", action="store_true", help="the fork's name of --mode gfml; wins over --mix")
    group.add_argument("--mix", action="store_true", help="the fork's name of --mode mix")
    group.add_argument(
        "--alpha", type=positive, default=1.25, metavar="A", help="sharpness of positive pairs (paper: alpha)"
    )
    group.add_argument(
        "--beta", type=positive, default=5.0, metavar="B", help="sharpness of negative pairs (paper: beta)"
    )
    group.add_argument(
        "--mcl-lambda-p",
        "--lambp",
        type=number(),
        default=6.5,
        metavar="L",
        help="offset added to E of positive pairs (paper: lambda_p)",
    )
    group.add_argument(
        "--mcl-lambda-n",
        "--lambn",
        type=number(),
        default=-0.5,
        metavar="L",
        help="offset added to E of negative pairs (paper: lambda_n)",
    )
    group.add_argument(
        "--margin",
        type=number(),
        default=1.0,
        metavar="E",
        help="slack of the mining, in squared-distance units (paper: epsilon)",
    )
    group.add_argument(
        "--lamb_p",
        type=number(),
        default=None,
        metavar="X",
        help="two meanings: --grav-weight-pos in the fork, --mcl-lambda-p in the original; see --spelling",
    )
    group.add_argument(
        "--lamb_n",
        type=number(),
        default=None,
        metavar="X",
        help="two meanings: --grav-weight-neg in the fork, --mcl-lambda-n in the original; see --spelling",
    )
    group.add_argument(
        "--spelling",
        choices=("auto", "fork", "original"),
        default="auto",
        help="whose --lamb_p and --lamb_n; auto: the fork's in modes gfml and mix, an error in mode mcl",
    )


def _add_gravity_flags(parser: Parser) -> None:
    group = parser.add_argument_group("gravity loss (modes gfml and mix): g = log-masses - lambda log(E + 1)")
    group.add_argument(
        "--grav-lambda", "--lambd", type=positive, default=1.0, metavar="L", help="lambda, the weight of the distance"
    )
    group.add_argument(
        "--grav-weight-pos", type=number(), default=1.0, metavar="W", help="weight of mean(-g) over positives"
    )
    group.add_argument(
        "--grav-weight-neg", type=number(), default=1.0, metavar="W", help="weight of mean(g) over hardest negatives"
    )
    group.add_argument(
        "--gfml_opt", type=int, choices=(0, 1), default=0, help="1: positives alone, unweighted; vectors collapse"
    )
    group.add_argument("--mix_ratio", type=share, default=0.5, metavar="R", help="share of gravity in mode mix")
    group.add_argument(
        "--mass-param", choices=("relu", "softplus", "exp"), default="relu", help="map to log-mass; relu as published"
    )
    group.add_argument(
        "--mass-init",
        choices=("xavier", "default"),
        default="xavier",
        help="initial masses; xavier as published, under which half of the relu masses never move",
    )
    group.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=False, help="running averages of --ema-scope"
    )
    group.add_argument("--ema_decay", type=share, default=0.995, metavar="D", help="decay of the running averages")
    group.add_argument(
        "--ema-scope",
        choices=("frozen", "mass", "all"),
        default="frozen",
        help="frozen: masses are not trained, so their average is their start, as published; "
        "mass: trained masses are averaged; all: vectors too",
    )


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--decay", type=nonnegative, default=1e-4, help="weight of the regulariser of the free tables")
    group.add_argument("--lr", type=positive, default=1e-3, help="learning rate of Adam")
    group.add_argument(
        "--batch-size", type=count, default=1000, metavar="M", help="USERS per step, also the constant m of the loss"
    )
    group.add_argument(
        "--epochs", type=number(int, least=0), default=1000, metavar="N", help="largest number of epochs"
    )
    group.add_argument("--num-neg", type=count, default=10, metavar="W", help="negatives per positive")
    group.add_argument(
        "--drop-last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out each epoch's incomplete last batch of users, as published",
    )
    group.add_argument(
        "--duplicate-batches",
        type=count,
        default=1,
        metavar="N",
        help="use every batch N times in a row; 5 is the published sampler's defect",
    )
    group.add_argument(
        "--clip-grad",
        type=number(above=0, none=True),
        default=None,
        metavar="NORM",
        help="largest gradient norm, or none",
    )
    group.add_argument(
        "--load", type=int, choices=(0, 1), default=0, help="1: insist on continuing the earlier run of these flags"
    )


def _add_evaluation_flags(parser: Parser) -> None:
    group = add_judging_flags(
        parser, topks=(5, 10, 20), metric="sum", patience=30, eval_every=10, metric_flags=("--select-metric", "--es_metric"),
        on_flags=("--select-on", "--es_on"), metric_help="what selects the epoch; sum: recall and ndcg at every K, as published",
    )  # fmt: skip
    group.add_argument(
        "--score",
        choices=("distance", "gravity"),
        default="distance",
        help="what ranks and selects; distance as published, where masses play no part",
    )


def _add_flags_without_effect(parser: Parser) -> None:
    group = parser.add_argument_group("accepted from the original, without effect")
    for name, default in (
        ("adjacency_split", 0),
        ("folds", 100),
        ("testbatch", 100),
        ("multicore", 1),
        ("pretrain", 0),
    ):
        other = " (the original's --split 0 or 1)" if name == "adjacency_split" else ""
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=WITHOUT_EFFECT[name] + other)


def parse(argv: list[str] | None = None) -> Options:
    """Parsed and checked flags; the resolved config holds the plain names alone."""
    parser = build_parser()
    options = parser.parse_args(_without_adjacency_split(list(sys.argv[1:] if argv is None else argv)))
    given = options.explicit
    for name in sorted(given & WITHOUT_EFFECT.keys()):
        print(f"note: --{name} has no effect: {WITHOUT_EFFECT[name]}", file=sys.stderr)
    _choose_mode(parser, options, given)
    _choose_meaning(parser, options, given)
    if options.dataset in DATASETS:
        print(
            f"note: {options.dataset} is {DATASETS[options.dataset]} here, the data of the MCL paper", file=sys.stderr
        )
        options.dataset = DATASETS[options.dataset]
    if options.select_on == "test" and "val_ratio" not in given:
        options.val_ratio = 0.0
    _check(parser, options)
    options.resolved = parser.config_of(options)
    return options


def _without_adjacency_split(argv: list[str]) -> list[str]:
    """The original's ``--split 0`` cuts the adjacency; here ``--split`` cuts the data and takes a word."""
    text = re.sub(r"(?:(?<=\0)|^)--split[\0=](?=[0-9]+(?:\0|$))", "--adjacency_split=", "\0".join(argv))
    return text.split("\0") if argv else []


def _choose_mode(parser: Parser, options: Options, given: frozenset[str]) -> None:
    short = "gfml" if options.gfml else "mix" if options.mix else None
    if options.gfml and options.mix:
        print("note: --gfml and --mix together are --gfml, as in the fork", file=sys.stderr)
    if short and "mode" in given and options.mode != short:
        parser.error(f"found --{short} and --mode {options.mode}: give one of them")
    options.mode = short or options.mode
    del options.gfml, options.mix


def _choose_meaning(parser: Parser, options: Options, given: frozenset[str]) -> None:
    """Move ``--lamb_p`` and ``--lamb_n`` to the plain flags they stand for."""
    whose = options.spelling
    if whose == "auto" and options.mode != "mcl":
        whose = "fork"
    for name, (fork, original) in TWO_MEANINGS.items():
        if getattr(options, name) is not None:
            plain = f"--{fork.replace('_', '-')}", f"--{original.replace('_', '-')}"
            if whose == "auto":
                parser.error(
                    f"--{name} is {plain[1]} in the original program and {plain[0]} in its fork: give one of these, or --spelling"
                )
            target = fork if whose == "fork" else original
            if target in given:
                parser.error(f"found --{name} and {plain[whose != 'fork']}, which mean the same here: give one of them")
            setattr(options, target, getattr(options, name))
        delattr(options, name)
    del options.spelling


def _check(parser: Parser, options: Options) -> None:
    if options.mode == "mcl" and options.score == "gravity":
        parser.error("--score gravity needs masses, which --mode mcl has not: give --mode gfml or mix")
    if options.mode == "mcl" and options.ema and options.ema_scope != "all":
        parser.error("--ema averages masses, which --mode mcl has not: give --ema-scope all, or --mode gfml or mix")
    check_judging(parser, options, other_metrics=("sum",))
