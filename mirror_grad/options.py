"""Flags of the Mirror Gradient programs and the files behind them. Imports nothing heavy: ``--help`` is quick.

Later wins: parser default, ``configs/mirror_grad/overall.toml``, ``dataset/NAME.toml``, ``model/NAME.toml``,
``mirror.toml`` (with mirror gradient on), the files of ``--config``, the command line. A continued run reads its own
config alone. The chosen model's hyper-parameters are flags of their own; another model's are refused.
Flags of the published programs are accepted under their names.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gfml.base.errors import UserError
from gfml.base.home import configs
from gfml.data.options import add_data_flags
from gfml.program.cli import MIRROR_MODES, Options, Parser, TopksAction, add_definition_flags, add_run_flags, number
from mirror_grad.models import MODELS

# The published programs' names for data that this one knows by a longer one.
DATASETS = {"baby": "amazon-baby", "sports": "amazon-sports", "clothing": "amazon-clothing"}
FEATURES = ("auto", "none", "tfidf-svd", "hashing", "random")
BASELINES = ("popularity", "item-knn", "ease", "ials")
METRICS = ("recall", "ndcg", "precision", "map", "hit", "mrr")
# What a control arm does instead of the mirror step; "mg" leaves --mirror as it is.
ARMS = {"mg": None, "equal-steps": "repeat", "equal-lr": "off", "equal-grid": "off", "true-ascent": "precond"}
# Learning rates of the arm equal-grid, as factors: as many tries as the published search of alpha2.
EQUAL_GRID = (0.5, 1.0, 2.0)
MIRROR_GRID = {"mirror-alpha2": (0.1, 0.2, 0.3)}
# Accepted so that old command lines run; each says so once when it is given.
WITHOUT_EFFECT = {"eval_batch_size": "evaluation chooses its blocks by memory; results do not depend on them"}
NOT_IDENTITY = frozenset({*WITHOUT_EFFECT, "baselines", "data_root", "cache_dir", "cache", "download"})

_count = number(int, least=1)
_positive = number(above=0)
_nonnegative = number(least=0)


class _Chosen(NamedTuple):
    """What decides the layers: found before the real parse, unchecked."""

    model: str
    dataset: str
    mirrored: bool
    resume: str | None


def build_parser(model: str = "SELFCFED_LGN") -> Parser:
    """The command line of ``mirror_grad/main.py`` for one model."""
    parser = Parser(
        prog="mirror_grad/main.py",
        description="Train and judge a multimodal recommender with mirror gradient (on unless --not_mg).",
        epilog=f"Hyper-parameters shown are those of --model {model}. Others: {', '.join(MODELS)}.",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", "-m", choices=tuple(MODELS), default="SELFCFED_LGN", help="recommender")
    group.add_argument(
        "--behaviour",
        choices=("fixed", "published"),
        default="fixed",
        help="published: also what the published code gets wrong; recorded in the run",
    )
    group.add_argument(
        "--embedding-dim", "--embedding_size", type=_count, default=64, metavar="D", help="width of the vectors"
    )
    _add_settings(parser, model)
    add_data_flags(parser, dataset="baby", short=("-d",))
    _add_feature_flags(parser)
    _add_training_flags(parser)
    _add_mirror_flags(parser, model)
    _add_evaluation_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(seed=999)
    for name, why in WITHOUT_EFFECT.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"accepted, without effect: {why}")
    return parser


def _add_settings(parser: Parser, model: str) -> None:
    """One flag for every hyper-parameter of the model."""
    if model not in MODELS:
        return
    group = parser.add_argument_group(f"hyper-parameters of {model}")
    for field in dataclasses.fields(MODELS[model].settings):
        grid = field.metadata["grid"]
        text = field.metadata["help"] + (f"; published search: {', '.join(map(str, grid))}" if len(grid) > 1 else "")
        flag, kind = _flag(field.name), type(field.default)
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif kind is str:
            group.add_argument(flag, choices=field.metadata["choices"] or None, default=field.default, help=text)
        else:
            group.add_argument(
                flag, type=number(kind), default=field.default, metavar="N" if kind is int else "X", help=text
            )


def _add_feature_flags(parser: Parser) -> None:
    group = parser.add_argument_group("item features")
    group.add_argument(
        "--features",
        default="auto",
        metavar="WHAT",
        help="auto: image_feat.npy, text_feat.npy or features.npz in the data's folder; none; tfidf-svd or "
        "hashing: from the items' titles; random: noise, only for timing; or a file or folder",
    )
    group.add_argument(
        "--item-text", metavar="FILE", help="titles for tfidf-svd and hashing (default: the folder's own file)"
    )
    group.add_argument(
        "--modalities", nargs="+", choices=("image", "text"), default=["image", "text"], help="features to use"
    )
    group.add_argument(
        "--text-width", type=_count, default=384, metavar="F", help="width of tfidf-svd and hashing features"
    )
    group.add_argument(
        "--random-widths",
        nargs=2,
        type=_count,
        default=[4096, 384],
        metavar=("IMAGE", "TEXT"),
        help="widths of random features; the default is that of the published ones",
    )
    group.add_argument(
        "--fill-missing",
        choices=("mean", "zero"),
        default="mean",
        help="row of an item without features; mean of the others as published",
    )
    group.add_argument(
        "--keep-cold-users",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also judge users without train interactions",
    )


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--learning-rate", "--lr", type=_positive, default=1e-3, help="learning rate of the first epoch")
    group.add_argument(
        "--learning-rate-scheduler",
        nargs=2,
        type=_positive,
        default=[1.0, 50.0],
        metavar=("BASE", "PERIOD"),
        help="the learning rate of epoch e = 0, 1, ... is multiplied by BASE^(e / PERIOD)",
    )
    group.add_argument(
        "--weight-decay", type=_nonnegative, default=0.0, metavar="W", help="L2 decay inside the optimizer"
    )
    group.add_argument("--learner", choices=("adam", "sgd", "adagrad", "rmsprop"), default="adam", help="optimizer")
    group.add_argument(
        "--batch-size", "--train_batch_size", type=_count, default=2048, metavar="B", help="train pairs a step"
    )
    group.add_argument(
        "--epochs", type=number(int, least=0), default=1000, metavar="N", help="largest number of epochs"
    )
    group.add_argument(
        "--clip-grad-norm",
        type=number(above=0, none=True),
        default=None,
        metavar="NORM",
        help="largest gradient norm, or none",
    )
    group.add_argument(
        "--grid",
        nargs="+",
        metavar="NAME=V,V",
        help="try every combination of these values, each a run of its own, and select on --select-on; "
        "published: the lists of the published search",
    )


def _add_mirror_flags(parser: Parser, model: str) -> None:
    """The mirror step; the published program's alpha1, alpha2 and beta are accepted where no model uses the name."""
    own = {field.name for field in dataclasses.fields(MODELS[model].settings)} if model in MODELS else set()
    old = {name: () if name in own else (f"--{name}",) for name in ("alpha1", "alpha2", "beta")}
    group = parser.add_argument_group("mirror gradient")
    group.add_argument("--not_mg", "--not-mg", action="store_true", help="ordinary training; the same as --mirror off")
    group.add_argument(
        "--mirror", choices=MIRROR_MODES, default="two_step", help="kind of the mirror step; two_step as published"
    )
    group.add_argument(
        "--mirror-arm",
        choices=tuple(ARMS),
        default="mg",
        help="control arm: equal-steps takes the extra step without inverting it; equal-lr trains plainly with the "
        "learning rate that moves Adam as far; equal-grid trains plainly with as many tries; true-ascent "
        "inverts with Adam's second moments alone",
    )
    group.add_argument(
        "--mirror-alpha1",
        *old["alpha1"],
        type=_positive,
        default=1.0,
        metavar="A",
        help="factor of the descending step",
    )
    group.add_argument(
        "--mirror-alpha2",
        *old["alpha2"],
        type=_nonnegative,
        default=0.2,
        metavar="A",
        help="factor of the inverted step",
    )
    group.add_argument(
        "--mirror-every", *old["beta"], type=_count, default=3, metavar="N", help="a mirror step every N batches"
    )
    group.add_argument(
        "--mirror-counter",
        choices=("epoch", "global"),
        default="epoch",
        help="epoch: counting starts again with every epoch, as published; global: as printed in the paper",
    )
    group.add_argument(
        "--mirror-phase", type=number(int, least=0), default=0, metavar="N", help="mirror batch i when i mod every = N"
    )
    group.add_argument(
        "--mirror-rng",
        choices=("fresh", "replay"),
        default="fresh",
        help="replay: dropout and sampled edges are the same in both steps",
    )
    group.add_argument(
        "--mirror-wd", choices=("both", "first", "once"), default="both", help="which step decays the weights"
    )
    group.add_argument(
        "--mirror-clip-halves",
        choices=("both", "second"),
        default="both",
        help="which step is clipped; second as published, for two_step",
    )
    group.add_argument(
        "--mirror-diagnostics", action="store_true", help="log gradient norms and cosines of mirrored batches"
    )


def _add_evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation and selection")
    group.add_argument(
        "--topks", "--topk", nargs="+", action=TopksAction, default=(5, 10, 20, 50), metavar="K", help="list lengths"
    )
    group.add_argument(
        "--select-on",
        choices=("val", "test"),
        default="val",
        help="what chooses the epoch and the grid's winner; test: optimistic, labelled in every result",
    )
    group.add_argument(
        "--select-metric",
        "--valid_metric",
        type=str.lower,
        default="recall@5",
        metavar="NAME@K",
        help="what is highest at the chosen epoch",
    )
    group.add_argument(
        "--test-mask",
        choices=("seen", "train"),
        default="seen",
        help="what the test lists leave out: train and validation items, or train items alone as published",
    )
    add_definition_flags(group)
    group.add_argument(
        "--published-protocol",
        action="store_true",
        help="judge as published: --test-mask train (validation items stay in the test lists) and --round-metrics 4",
    )
    group.add_argument(
        "--round-metrics",
        type=number(int, least=1, none=True),
        default=None,
        metavar="DIGITS",
        help="round metrics before stopping and selecting; published: 4",
    )
    group.add_argument(
        "--patience",
        "--stopping_step",
        type=number(int, least=1, none=True),
        default=20,
        metavar="N",
        help="stop at the evaluation after N in a row without a better one, or none",
    )
    group.add_argument(
        "--eval-every", "--eval_step", type=_count, default=1, metavar="N", help="epochs between evaluations"
    )
    group.add_argument(
        "--baselines",
        nargs="+",
        choices=(*BASELINES, "none"),
        default=["popularity"],
        help="simple recommenders judged beside the model",
    )


def parse(argv: Sequence[str] | None = None) -> Options:
    """Parsed and checked flags. ``options.settings``: the model's hyper-parameters; ``resolved``: for the run's config.

    ``options.weights``: the file of ``--resume FILE``, which is judged and not trained.
    """
    tokens, weights = _weights_file(list(sys.argv[1:] if argv is None else argv))
    chosen = _scan(tokens)
    parser = build_parser(chosen.model)
    _refuse_flags_of_others(parser, chosen.model, tokens)
    options = parser.parse_args([f"--config={path}" for path in layers(chosen)] + tokens)
    for name in sorted(options.explicit & WITHOUT_EFFECT.keys()):
        print(f"note: --{name} has no effect: {WITHOUT_EFFECT[name]}", file=sys.stderr)
    if options.dataset in DATASETS:
        options.dataset = DATASETS[options.dataset]
    if options.behaviour == "published" and not MODELS[options.model].has_published:
        print(f"note: published and fixed {options.model} are the same", file=sys.stderr)
    if options.published_protocol:
        options.test_mask, options.round_metrics = "train", 4
    del options.published_protocol
    _choose_mirror(parser, options)
    _check(parser, options)
    points = _grid(parser, options)
    for name in (*WITHOUT_EFFECT, "grid"):
        delattr(options, name)
    options.resolved = parser.config_of(options)
    options.points, options.weights, options.tokens = points, weights, tokens
    entry = MODELS[options.model]
    options.settings = entry.settings(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(entry.settings)}
    )
    return options


def runs_of(program: str, argv: Sequence[str]) -> list[tuple[str, Options]]:
    """Family and flags of every run that a command makes (see ``gfml.program.commands``): each point of ``--grid``, else one."""
    if program != "main":
        return []
    options = parse(argv)
    every = [parse(point_tokens(options.tokens, point)) for point in options.points] or [options]
    return [("mirror", one) for one in every if one.weights is None]


def point_tokens(tokens: Sequence[str], point: Mapping[str, str]) -> list[str]:
    """The command line of one point of a grid."""
    return [*tokens, "--grid=none", *(f"{flag}={value}" for flag, value in point.items())]


def layers(chosen: _Chosen) -> list[Path]:
    """The stored settings below the user's own, lowest first; none for a continued run, whose config is complete."""
    if chosen.resume is not None:
        return []
    short = next((name for name, long in DATASETS.items() if long == chosen.dataset), chosen.dataset)
    names = {"overall": True, f"dataset/{short}": False, f"model/{chosen.model}": False}
    # Not every data set and model has settings of its own; the others decide what selects an epoch.
    names |= {"mirror": True} if chosen.mirrored else {}
    paths = {configs() / "mirror_grad" / f"{name}.toml": needed for name, needed in names.items()}
    for path, needed in paths.items():
        if needed and not path.is_file():
            raise UserError(f"the stored settings {path} are missing: install the package anew")
    return [path for path in paths if path.is_file()]


def arm_of(options: Options) -> str:
    """What a run is in a table of arms: plain, mg, or the name of its control arm."""
    if options.mirror_arm == "mg":
        return "plain" if options.mirror == "off" else "mg"
    return options.mirror_arm


def _weights_file(tokens: list[str]) -> tuple[list[str], str | None]:
    """``--resume FILE`` names weights to judge; a config beside them is the base of the flags."""
    for place, token in enumerate(tokens):
        name, equals, value = token.partition("=")
        if name == "--resume" and (equals or place + 1 < len(tokens)):
            value = value if equals else tokens[place + 1]
            if not Path(value).exists():
                raise UserError(
                    f"there is no {value}: give --resume a run directory to continue, or a file of weights to judge"
                )
            if not Path(value).is_file():
                return tokens, None
            rest = tokens[:place] + tokens[place + (1 if equals else 2) :]
            beside = Path(value).resolve().parent / "config.toml"
            return ([f"--config={beside}"] if beside.is_file() else []) + rest, value
    return tokens, None


def _scan(tokens: Sequence[str]) -> _Chosen:
    """Model, data and mirror of a command line and its config files, before anything is checked."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--model", "-m")
    first.add_argument("--dataset", "-d")
    first.add_argument("--mirror")
    first.add_argument("--mirror-arm", "--mirror_arm")
    first.add_argument("--not_mg", "--not-mg", action="store_true")
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--resume")
    try:
        found, _ = first.parse_known_args([token for token in tokens if token != "--"])
    except argparse.ArgumentError:  # a flag without its value: the real parser says so in one line
        return _Chosen("SELFCFED_LGN", "baby", True, None)
    files = ([str(Path(found.resume) / "config.toml")] if found.resume else []) + found.config
    stored = {key.replace("-", "_"): value for path in files for key, value in _read_flat(path).items()}
    pick = {name: getattr(found, name) or stored.get(name) for name in ("model", "dataset", "mirror", "mirror_arm")}
    arm = pick["mirror_arm"] or "mg"
    # equal-lr trains plainly, but its learning rate follows from the mirror's settings.
    mirrored = arm == "equal-lr" or (not found.not_mg and pick["mirror"] != "off" and ARMS.get(arm) != "off")
    return _Chosen(pick["model"] or "SELFCFED_LGN", pick["dataset"] or "baby", mirrored, found.resume)


def _read_flat(path: str) -> Mapping[str, Any]:
    """A config file as it is; nothing where it cannot be read, which the real parser then says."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _refuse_flags_of_others(parser: Parser, model: str, tokens: Sequence[str]) -> None:
    """A hyper-parameter that only other models have is an error that names them."""
    known = {flag.replace("_", "-") for flag in parser._option_string_actions}
    for token in tokens:
        flag = token.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            owners = [
                name
                for name, entry in MODELS.items()
                if flag in {_flag(f.name) for f in dataclasses.fields(entry.settings)}
            ]
            if owners:
                parser.error(
                    f"{flag} is a hyper-parameter of {', '.join(owners)}, not of {model}: drop it or choose another --model"
                )


def _choose_mirror(parser: Parser, options: Options) -> None:
    """Fold ``--not_mg`` and ``--mirror-arm`` into ``--mirror``."""
    if options.not_mg:
        if options.mirror_arm != "mg":
            parser.error(f"found --not_mg and --mirror-arm {options.mirror_arm}: give one of them")
        options.mirror = "off"
    wanted = ARMS[options.mirror_arm]
    if wanted == "precond" and options.learner != "adam":
        wanted = "sgd_mirror"
    if wanted is not None:
        if "mirror" in options.explicit and options.mirror not in (wanted, "two_step"):
            parser.error(
                f"found --mirror {options.mirror} and --mirror-arm {options.mirror_arm}, which is --mirror {wanted}: give one of them"
            )
        options.mirror = wanted
    if not MODELS[options.model].trains and options.mirror != "off":
        if options.mirror_arm != "mg" or {"mirror", "not_mg"} & options.explicit:
            print(f"note: {options.model} is not trained: mirror gradient changes nothing", file=sys.stderr)
        options.mirror, options.mirror_arm = "off", "mg"
    del options.not_mg


def _check(parser: Parser, options: Options) -> None:
    name, _, k = options.select_metric.partition("@")
    if name not in METRICS or not re.fullmatch(r"[1-9][0-9]*", k):
        parser.error(
            f"found --select-metric {options.select_metric!r}, wanted one of {', '.join(METRICS)} with a cut-off, such as recall@20"
        )
    if "none" in options.baselines and len(options.baselines) > 1:
        parser.error("--baselines none cannot stand beside others")
    if options.mirror != "off" and options.mirror_alpha1 <= options.mirror_alpha2:
        parser.error(
            f"found --mirror-alpha1 {options.mirror_alpha1} and --mirror-alpha2 {options.mirror_alpha2}, wanted alpha1 > alpha2"
        )
    if options.mirror != "off" and options.mirror_phase >= options.mirror_every:
        parser.error(
            f"found --mirror-phase {options.mirror_phase}, wanted less than --mirror-every {options.mirror_every}"
        )
    if options.mirror_clip_halves == "second" and options.mirror not in ("off", "two_step"):
        parser.error(f"--mirror-clip-halves second is defined for --mirror two_step, not {options.mirror}")


def _grid(parser: Parser, options: Options) -> list[dict[str, str]]:
    """The points of ``--grid`` (and of the arm equal-grid) as {flag: value}; empty without one."""
    words = [] if options.grid in (None, ["none"]) else list(options.grid)
    lists: dict[str, Sequence[object]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if word == "published":
            lists |= {
                _flag(f.name): f.metadata["grid"]
                for f in dataclasses.fields(MODELS[options.model].settings)
                if f.metadata["grid"]
            }
            lists |= {f"--{key}": values for key, values in MIRROR_GRID.items()} if options.mirror != "off" else {}
            continue
        flag = parser._known_spelling(f"--{name.lstrip('-')}")
        if not equals or not values:
            parser.error(f"found --grid {word!r}, wanted published or NAME=V,V such as learning-rate=0.001,0.0005")
        if flag not in parser._option_string_actions:
            parser._unknown([flag])
        lists[flag] = values.split(",")
    alone = options.resume or options.eval_only
    if options.mirror_arm == "equal-grid" and options.grid is None and not alone:
        lists = {"--learning-rate": [options.learning_rate * factor for factor in EQUAL_GRID]}
    names = list(lists)
    return (
        [dict(zip(names, map(str, values), strict=True)) for values in itertools.product(*lists.values())]
        if lists
        else []
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
