"""Flags of the Collaborative Metric Learning program and the rules between them. Imports nothing heavy."""

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
)

ANN = ("off", "auto", "faiss", "sklearn")
# What --dataset auto means, and the cut of the paper.
USUAL_DATA = "ml1m"
USUAL_SPLIT, USUAL_RATIOS = "per-user", [0.6, 0.2, 0.2]
# As in the published programs.
LEARNING_RATES = {"adagrad": 0.1, "adam": 1e-3}
FEATURE_FLAGS = (
    "feature_columns",
    "feature_norm",
    "feature_weight",
    "feature_scale",
    "hidden_dim",
    "dropout",
    "feature_lr",
    "cold_offset",
)
# No part of what a run computes.
NOT_IDENTITY = frozenset({"report", "baselines", "ann", "item_info", "data_root", "cache_dir", "cache", "download"})


def build_parser() -> Parser:
    """The command line of ``cml_baseline/main.py``."""
    parser = Parser(
        prog="cml_baseline/main.py",
        description="Train and judge Collaborative Metric Learning. Without flags: MovieLens-1M where its files are "
        "found, else the embedded demo data.",
    )
    add_data_flags(parser, dataset="auto")
    _add_model_flags(parser)
    _add_feature_flags(parser)
    _add_training_flags(parser)
    _add_evaluation_flags(parser)
    add_mirror_flags(parser)
    add_run_flags(parser)
    return parser


def _add_model_flags(parser: Parser) -> None:
    switch = argparse.BooleanOptionalAction
    group = parser.add_argument_group("model and loss; distances are squared")
    group.add_argument(
        "--embedding-dim", "--dim", type=count, default=100, metavar="D", help="width of the vectors (paper: r)"
    )
    group.add_argument(
        "--margin",
        type=nonnegative,
        default=0.5,
        metavar="M",
        help="safety margin (paper: m), in squared-distance units",
    )
    group.add_argument("--clip-norm", type=positive, default=1.0, metavar="R", help="radius of the ball")
    group.add_argument(
        "--init-std",
        type=number(above=0, none=True),
        default=None,
        metavar="S",
        help="deviation of the initial vectors; none: 1 / sqrt(D)",
    )
    group.add_argument("--rank-weight", action=switch, default=True, help="weight pairs by log(1 + rank)")
    group.add_argument(
        "--rank-floor", action=switch, default=True, help="round the estimated rank down, as in the paper"
    )
    group.add_argument("--reduction", choices=("sum", "mean"), default="sum", help="of the hinge over a batch")
    group.add_argument(
        "--cov-weight",
        type=nonnegative,
        default=0.0,
        metavar="L",
        help="weight of the covariance penalty (paper: lambda_c)",
    )
    group.add_argument(
        "--cov-form",
        choices=("squared", "paper", "signed"),
        default="squared",
        help="squared: sum of squared off-diagonal entries; paper: as printed; signed: as released by the authors",
    )


def _add_feature_flags(parser: Parser) -> None:
    group = parser.add_argument_group("item features")
    group.add_argument(
        "--features",
        "--feature-file",
        metavar="FILE",
        help=".npz, .npy, .csv, .tsv, .item or .dat with ids; also a file name in the data set's own folder",
    )
    group.add_argument(
        "--feature-columns", nargs="+", metavar="NAME", help="use only these tables or columns of the file"
    )
    group.add_argument(
        "--feature-norm",
        choices=("standard", "none"),
        default="standard",
        help="standard: columns centred, every table scaled to deviation 1",
    )
    group.add_argument(
        "--feature-weight",
        type=nonnegative,
        default=1.0,
        metavar="L",
        help="weight of the feature loss (paper: lambda_f)",
    )
    group.add_argument(
        "--feature-scale", type=positive, default=0.5, metavar="S", help="factor on the network's output"
    )
    group.add_argument(
        "--hidden-dim", "--hidden", type=count, default=256, metavar="H", help="hidden width of the network"
    )
    group.add_argument(
        "--dropout",
        type=number(least=0, most=0.99),
        default=0.5,
        metavar="P",
        help="probability that a hidden unit is dropped",
    )
    group.add_argument(
        "--feature-lr",
        type=positive,
        default=1e-3,
        metavar="X",
        help="learning rate of the network, which takes Adam always",
    )
    group.add_argument(
        "--cold-offset",
        type=nonnegative,
        default=0.5,
        metavar="C",
        help="cold items rank by the squared distance to their projection plus C mean squared errors of the network; paper: 0",
    )
    group.add_argument(
        "--hide-items",
        type=number(least=0, most=0.9),
        default=0.0,
        metavar="R",
        help="take this share of the items out of train and validation, to see how features place cold items",
    )
    group.add_argument(
        "--item-info",
        metavar="FILE",
        help="titles and genres for the report (default: those of MovieLens where they are found)",
    )


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--optimizer", choices=tuple(LEARNING_RATES), default="adagrad", help="how the vectors are moved"
    )
    group.add_argument(
        "--lr", type=positive, default=None, help="learning rate of the vectors (default: 0.1 adagrad, 0.001 adam)"
    )
    group.add_argument(
        "--accumulator",
        type=nonnegative,
        default=0.0,
        metavar="A",
        help="AdaGrad's initial sum of squares; 0.1 in TensorFlow",
    )
    group.add_argument("--batch-size", type=count, default=10_000, metavar="B", help="pairs per step (paper: N)")
    group.add_argument(
        "--epochs",
        type=number(int, least=0),
        default=50,
        metavar="N",
        help="largest number of epochs; each meets every train pair once",
    )
    group.add_argument(
        "--num-neg", type=count, default=10, metavar="U", help="negatives per pair; the nearest one counts"
    )
    group.add_argument(
        "--sampler", choices=("uniform", "popularity", "two-stage"), default="uniform", help="how negatives are drawn"
    )
    group.add_argument(
        "--candidates", type=count, default=2000, metavar="C", help="candidates per batch of --sampler two-stage"
    )
    group.add_argument(
        "--refresh",
        type=count,
        default=100,
        metavar="N",
        help="batches between looks at the vectors, --sampler two-stage",
    )
    group.add_argument(
        "--clip-grad",
        type=number(above=0, none=True),
        default=None,
        metavar="NORM",
        help="largest gradient norm, or none",
    )


def _add_evaluation_flags(parser: Parser) -> None:
    group = add_judging_flags(parser, topks=(50, 100), metric="recall@50", patience=5, eval_every=1)
    group.add_argument(
        "--ann",
        nargs="?",
        const="auto",
        choices=ANN,
        default="off",
        help="export item vectors with a nearest-neighbour index and its recall; auto: faiss if installed, else scikit-learn",
    )
    group.add_argument("--report", type=int, choices=(0, 1), default=1, help="write the report with its plots")


def parse(argv: list[str] | None = None) -> Options:
    """Parsed and checked flags. Defaults that depend on other flags or on which data is there are filled in, so that
    the resolved config says what ran."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.lr is None:
        options.lr = LEARNING_RATES[options.optimizer]
    _check(parser, options)
    _choose_data(options)
    options.resolved = parser.config_of(options)
    return options


def _choose_data(options: Options) -> None:
    """MovieLens-1M where it lies, else the demo; the paper's cut for data that is published uncut."""
    from gfml.data import registry

    if options.dataset == "auto":
        here = registry.locate(registry.KNOWN[USUAL_DATA], registry.data_roots(options.data_root)) is not None
        options.dataset = USUAL_DATA if here else "demo"
        why = (
            "its files are here"
            if here
            else "MovieLens-1M is not in " + ", ".join(map(str, registry.data_roots(options.data_root)))
        )
        print(f"data: {'MovieLens-1M' if here else 'the embedded demo'} ({why})", file=sys.stderr)
    known = registry.KNOWN.get(registry.ALIASES.get(options.dataset, options.dataset))
    uncut = options.dataset not in registry.GENERATED and (known.split is not None if known else True)
    if uncut and options.split is None and options.split_ratios is None and not _has_parts(options.dataset):
        options.split, options.split_ratios = USUAL_SPLIT, list(USUAL_RATIOS)


def _has_parts(dataset: str) -> bool:
    from pathlib import Path

    return Path(dataset).is_dir()


def _check(parser: Parser, options: Options) -> None:
    check_judging(parser, options)
    if options.mirror != "off" and options.features and options.optimizer != "adam":
        parser.error("--mirror with --features needs one optimizer for points and network: give --optimizer adam")
    # A stored config names every flag: only a value other than the default contradicts.
    changed = {
        name for name in options.explicit if getattr(options, name, None) not in (None, parser.get_default(name))
    }
    belongs = dict.fromkeys(FEATURE_FLAGS, ("--features FILE", bool(options.features)))
    belongs |= dict.fromkeys(("candidates", "refresh"), ("--sampler two-stage", options.sampler == "two-stage"))
    belongs |= {"accumulator": ("--optimizer adagrad", options.optimizer == "adagrad")}
    for name, (owner, present) in belongs.items():
        if name in changed and not present:
            parser.error(f"--{name.replace('_', '-')} belongs to {owner}")
