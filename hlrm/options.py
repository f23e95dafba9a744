"""Flags of the HLRM programs and the rules between them. Imports nothing heavy: ``--help`` is quick.

Every flag of the published port is accepted under its name with its default, except that the port's one epoch at
rate 2e-5 is 100 at 2e-4 here; plain names stand beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gfml.data.options import add_data_flags
from gfml.program.cli import (
    BASELINES,
    METRICS,
    Options,
    Parser,
    TopksAction,
    add_mirror_flags,
    add_run_flags,
    count,
    nonnegative,
    number,
    positive,
)

MODELS = ("hlr", "lrml", "cml", "transcf")
TYPES = ("base", "plus")
FORMS = ("memory", "diagonal")
# Where results go and what is judged after training: no part of what a run computes.
NOT_IDENTITY = frozenset(
    {"save_model", "save_dir", "eval_batch_size", "baselines", "data_root", "cache_dir", "cache", "download"}
)
# Flags of the printed synopsis, which shows them without values.
SYNOPSIS = frozenset({
    "--train_batch_size", "--eval_batch_size", "--num_inter", "--hlrm_type", "--epochs", "--lr", "--lr_scheduler_gamma",
    "--clip", "--patience", "--emb_size", "--num_relations", "--is_pretrained_embs", "--freeze_embs", "--save_model",
    "--save_dir", "--loss_margin", "--eval_size", "--topk",
})  # fmt: skip
SYNOPSIS_SWITCHES = frozenset({"--is_pretrained_embs", "--freeze_embs", "--save_model"})
# split_method of the port's config.json -> --split
SPLIT_METHODS = {"fo": "global", "tfo": "time"}


def yes_or_no(text: str) -> bool:
    """yes, true, t, y, 1 and no, false, f, n, 0 in any case, as the port reads them."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, wanted true or false")


def build_train_parser() -> Parser:
    """The command line of ``hlrm/train.py``."""
    parser = Parser(
        prog="hlrm/train.py",
        description="Train and judge a recommender with latent relations. Without flags: the embedded demo data.",
    )
    add_data_flags(parser)
    parser.add_argument("--data-config", metavar="FILE", help="the port's config.json; flags given beside it win")
    _add_model_flags(parser)
    _add_start_flags(parser)
    _add_training_flags(parser)
    _add_judging_flags(parser)
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--select-metric",
        default="loss",
        metavar="NAME@K",
        help="what selects the epoch on validation: loss (as published), or a metric such as ndcg@10",
    )
    group.add_argument(
        "--select-users",
        type=count,
        default=1000,
        metavar="N",
        help="validation users ranked for --select-metric NAME@K",
    )
    group.add_argument("--eval-every", type=count, default=1, metavar="N", help="epochs between evaluations")
    add_mirror_flags(parser)
    add_run_flags(parser)
    return parser


def build_eval_parser() -> Parser:
    """The command line of ``hlrm/eval.py``: what is not given is taken from the saved model."""
    parser = Parser(
        prog="hlrm/eval.py",
        description="Judge a saved model, print and store the six metrics. Flags not given are those of its training.",
        argument_default=argparse.SUPPRESS,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--save_dir", "--save-dir", default="hlrm_base.pt", metavar="FILE", help="saved model, or a run directory"
    )
    model.add_argument("--hlrm_type", choices=TYPES, help="must be the saved model's")
    model.add_argument("--emb_size", type=count, metavar="D", help="must be the saved model's")
    model.add_argument("--num_relations", type=count, metavar="N", help="must be the saved model's")
    model.add_argument(
        "--is_pretrained_embs",
        type=yes_or_no,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="accepted; the saved vectors are used either way",
    )
    judging = parser.add_argument_group("judging")
    judging.add_argument("--eval-split", choices=("valid", "test"), default="test", help="the part that is judged")
    _add_protocol_flags(judging)
    judging.add_argument(
        "--num_inter",
        "--judge-inter",
        dest="judge_inter",
        type=number(int, least=0),
        metavar="P",
        help="history items per user",
    )
    judging.add_argument(
        "--history-sampling", choices=("random", "unpop", "last"), help="how they are chosen when there are more"
    )
    judging.add_argument(
        "--baselines", nargs="+", choices=(*BASELINES, "none"), help="simple recommenders judged beside the model"
    )
    judging.add_argument(
        "--result", metavar="FILE", help="where the numbers go (default: FILE.eval.json beside the model)"
    )
    explain = parser.add_argument_group("explanations")
    explain.add_argument(
        "--attention",
        type=number(int, least=0),
        default=0,
        metavar="N",
        help="write and plot the attention of the first recommendation of N judged users",
    )
    explain.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("USER", "ITEM"),
        help="the same for a pair of ids of the data; may repeat",
    )
    explain.add_argument(
        "--attention-dir", metavar="DIR", help="folder for them (default: FILE.attention beside the model)"
    )
    explain.add_argument("--item-info", metavar="FILE", help="titles of items (default: a known file beside the data)")
    data = parser.add_argument_group("data and machine")
    data.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    data.add_argument("--dataset", help="the data of the training at another place")
    data.add_argument("--device", metavar="{auto,cpu,cuda,cuda:N}", help="where to compute")
    data.add_argument(
        "--threads", type=number(int, least=0), metavar="N", help="CPU threads; 0 leaves the choice to PyTorch"
    )
    return parser


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=MODELS,
        default="hlr",
        help="hlr: latent relations; lrml, cml, transcf: compared models under the same protocol",
    )
    group.add_argument("--hlrm_type", choices=TYPES, default="base", help="base: HLR; plus: HLR++")
    group.add_argument(
        "--relation-form",
        choices=FORMS,
        default="memory",
        help="memory: the paper's attention over memory slots; diagonal: the arithmetic of the port",
    )
    group.add_argument(
        "--include-user-slot",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the user among the references (default: yes for memory base, else no)",
    )
    group.add_argument(
        "--beta",
        type=nonnegative,
        default=1.0,
        metavar="B",
        help="smoothing exponent of the user's attention; 1 is a softmax",
    )
    group.add_argument(
        "--diff-memory", action=argparse.BooleanOptionalAction, default=False, help="a second memory for the user slot"
    )
    group.add_argument(
        "--copy-relations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the negative takes the positive's relation",
    )
    group.add_argument(
        "--squared",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="squared distances (default: yes for memory, no for diagonal, as published)",
    )
    group.add_argument(
        "--emb_size",
        "--embedding-dim",
        dest="emb_size",
        type=count,
        default=100,
        metavar="D",
        help="width of the vectors",
    )
    group.add_argument("--num_relations", type=count, default=20, metavar="N", help="memory slots")
    group.add_argument(
        "--num_inter",
        type=number(int, least=0),
        default=50,
        metavar="P",
        help="largest number of history items of a user",
    )
    group.add_argument(
        "--judge-inter",
        type=number(int, least=0),
        default=None,
        metavar="P",
        help="the same when judging (default: --num_inter, as published; more judges better)",
    )
    group.add_argument(
        "--history-sampling",
        choices=("random", "unpop", "last"),
        default="random",
        help="how they are chosen when there are more",
    )
    group.add_argument("--clip_norm", type=positive, default=1.0, metavar="R", help="radius of the ball of all vectors")
    group.add_argument(
        "--clip-memory",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep memory rows within length 1 too",
    )
    group.add_argument(
        "--compat",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: clip by min(1, R / (norm + 1e-7)) and sort the whole list in local NDCG, as the port does",
    )
    group.add_argument(
        "--neighbour-weight", type=nonnegative, default=0.1, help="transcf: weight of its neighbourhood regulariser"
    )
    group.add_argument(
        "--distance-weight", type=nonnegative, default=0.1, help="transcf: weight of its distance regulariser"
    )


def _add_start_flags(parser: Parser) -> None:
    group = parser.add_argument_group("start values")
    group.add_argument(
        "--is_pretrained_embs",
        type=yes_or_no,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="start from the vectors of --pretrained, or of --user-emb and --item-emb",
    )
    group.add_argument(
        "--pretrained",
        metavar="FILE",
        help="run directory (its final.pt), checkpoint, or .npz with user [U, D] and item [I, D]",
    )
    group.add_argument("--user-emb", metavar="FILE", help=".npy of user vectors [U, D]")
    group.add_argument("--item-emb", metavar="FILE", help=".npy of item vectors [I, D]")
    group.add_argument(
        "--freeze_embs",
        type=yes_or_no,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="train the relations alone",
    )


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train_batch_size",
        "--batch-size",
        dest="train_batch_size",
        type=count,
        default=5000,
        metavar="B",
        help="pairs per step",
    )
    group.add_argument("--epochs", type=number(int, least=0), default=100, metavar="N", help="largest number of epochs")
    group.add_argument("--lr", type=positive, default=2e-4, help="learning rate")
    group.add_argument(
        "--lr_scheduler_gamma",
        type=number(above=0, most=1),
        default=0.98,
        metavar="G",
        help="factor on the rate after every epoch",
    )
    group.add_argument(
        "--clip", type=number(), default=3.0, metavar="NORM", help="largest gradient norm; 0 or less: none"
    )
    group.add_argument(
        "--patience", type=count, default=10, metavar="N", help="evaluations without a better one before stopping"
    )
    group.add_argument(
        "--loss_margin",
        "--margin",
        dest="loss_margin",
        type=nonnegative,
        default=0.2,
        metavar="M",
        help="margin, in units of the distance",
    )
    group.add_argument(
        "--reduction", choices=("mean", "sum"), default="mean", help="of the hinge over a batch; the paper sums"
    )
    group.add_argument("--optimizer", choices=("adam", "adagrad", "sgd"), default="adam", help="optimizer")
    group.add_argument(
        "--save_model",
        type=yes_or_no,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="write the selected weights to --save_dir; the run directory holds them in any case",
    )
    group.add_argument(
        "--save_dir",
        default="hlrm_base.pt",
        metavar="FILE",
        help="the FILE that eval.py reads (the port's name for it)",
    )


def _add_judging_flags(parser: Parser) -> None:
    group = parser.add_argument_group("judging")
    group.add_argument(
        "--eval_batch_size",
        type=count,
        default=10000,
        metavar="N",
        help="most validation pairs and most items at a time",
    )
    _add_protocol_flags(group, train=True)
    group.add_argument(
        "--baselines",
        nargs="+",
        choices=(*BASELINES, "none"),
        default=["popularity"],
        help="simple recommenders judged beside the model",
    )


def _add_protocol_flags(group: argparse._ArgumentGroup, *, train: bool = False) -> None:
    """The same in both programs; in eval.py a flag that is not given has no value."""
    given = {"default": argparse.SUPPRESS} if not train else {}
    if not train:
        group.add_argument("--eval_batch_size", type=count, metavar="N", help="most items at a time")
    group.add_argument(
        "--topk",
        "--topks",
        dest="topk",
        nargs="+",
        action=TopksAction,
        metavar="K",
        help="list lengths, such as 10",
        **given or {"default": (10,)},
    )
    group.add_argument(
        "--eval_size",
        type=count,
        metavar="N",
        help="test users in a cohort of the sampled protocol",
        **given or {"default": 1000},
    )
    group.add_argument(
        "--num-cohorts", type=count, metavar="N", help="cohorts of the sampled protocol", **given or {"default": 5}
    )
    group.add_argument(
        "--mask-seen",
        action=argparse.BooleanOptionalAction,
        help="never recommend known items; the port does",
        **given or {"default": True},
    )


def parse_train(argv: list[str] | None = None) -> Options:
    """Parsed and checked flags of train.py."""
    parser = build_train_parser()
    options = parser.parse_args(from_synopsis(list(sys.argv[1:] if argv is None else argv)))
    if options.data_config is not None:
        _apply_data_config(parser, options)
    unused = _as_compared(parser, options) if options.model != "hlr" else set()
    if options.squared is None:
        options.squared = options.relation_form == "memory" or options.model != "hlr"
    if options.judge_inter is None:
        options.judge_inter = options.num_inter
    if options.include_user_slot is None:
        options.include_user_slot = options.relation_form == "memory" and options.hlrm_type == "base"
    _check(parser, options)
    if options.epochs == 1:
        print("warning: one epoch, the port's default, leaves the model untrained: give --epochs 100", file=sys.stderr)
    unused |= {"clip"} if options.mirror != "off" else set()
    # Flags that mean nothing here stay out of the config, which is read back as if its flags had been given.
    config = parser.config_of(options)
    options.resolved = {name: value for name, value in config.items() if name.replace("-", "_") not in unused}
    return options


def runs_of(program: str, argv: list[str]) -> list[tuple[str, Options]]:
    """Family and flags of every run that a command makes (see ``gfml.program.commands``): one of train.py."""
    return [("hlrm", parse_train(argv))] if program == "train" else []


def parse_eval(argv: list[str] | None = None) -> Options:
    """Parsed flags of eval.py; ``explicit`` names those given."""
    parser = build_eval_parser()
    options = parser.parse_args(from_synopsis(list(sys.argv[1:] if argv is None else argv)))
    if hasattr(options, "is_pretrained_embs"):
        print("note: --is_pretrained_embs has no effect here: the saved vectors are used", file=sys.stderr)
    if "none" in getattr(options, "baselines", ()) and len(options.baselines) > 1:
        parser.error("--baselines none cannot stand beside others")
    return options


def from_synopsis(argv: list[str]) -> list[str]:
    """The command line, its bare flags dropped if it is the published synopsis, which shows flags without values.

    The synopsis is told by a bare flag that is no switch; ``-- save_dir`` in it is ``--save_dir``.
    """
    if "--" in argv and argv[argv.index("--") + 1 :][:1] == ["save_dir"]:
        place = argv.index("--")
        argv = [*argv[:place], "--save_dir", *argv[place + 2 :]]
    bare = {
        place for place, word in enumerate(argv)
        if word in SYNOPSIS and (place + 1 == len(argv) or argv[place + 1].startswith("--"))
    }  # fmt: skip
    if all(argv[place] in SYNOPSIS_SWITCHES for place in bare):
        return argv
    names = ", ".join(argv[place] for place in sorted(bare))
    print(f"note: flags without a value keep their defaults: {names}", file=sys.stderr)
    return [word for place, word in enumerate(argv) if place not in bare]


def _apply_data_config(parser: Parser, options: Options) -> None:
    """Take the data set of the port's config.json, as far as no flag says otherwise."""
    try:
        config = json.loads(Path(options.data_config).read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(
            f"cannot read {options.data_config} ({type(error).__name__} {error}): wanted JSON with an object dataset"
        )
    known = {
        "name",
        "path",
        "interactions",
        "binary",
        "pos_threshold",
        "n_core",
        "split_method",
        "random_state",
        "file_format",
    }
    if unknown := sorted(config.keys() - known):
        parser.error(f"{options.data_config} sets dataset.{unknown[0]}, wanted only {', '.join(sorted(known))}")
    if not config.get("binary", True) or config.get("file_format", "csv") != "csv":
        parser.error(
            f"{options.data_config} asks for data that is not binary or not csv: only binary feedback from csv is read"
        )
    method = config.get("split_method", "fo")
    if method not in SPLIT_METHODS:
        parser.error(
            f"{options.data_config} sets split_method {method!r}: choose {' or '.join(SPLIT_METHODS)}, or give --split"
        )
    values = {
        "dataset": _file_of(config),
        "threshold": config.get("pos_threshold"), "kcore": config.get("n_core", 0), "split": SPLIT_METHODS[method],
        "split_seed": config.get("random_state", 2021),
    }  # fmt: skip
    if values["dataset"] is None:
        parser.error(f"{options.data_config} names no data: set dataset.path and dataset.interactions")
    for name, value in values.items():
        if name not in options.explicit:
            setattr(options, name, value)


def _file_of(config: dict[str, object]) -> str | None:
    """The path of the interactions, else the name of the data."""
    if "interactions" not in config:
        return config.get("name")
    return str(Path(config.get("path", ".")) / config["interactions"])


def _as_compared(parser: Parser, options: Options) -> set[str]:
    """The flags that do not concern a compared model, which must not be given."""
    foreign = {"hlrm_type", "relation_form", "include_user_slot", "copy_relations"}
    foreign |= {"beta", "diff_memory"} if options.model != "lrml" else set()
    foreign |= {"num_relations", "clip_memory"} if options.model in ("cml", "transcf") else set()
    foreign |= {"num_inter", "judge_inter"} if options.model in ("cml", "lrml") else set()
    foreign |= {"judge_inter"} if options.model == "transcf" else set()
    if wrong := sorted(foreign & options.explicit):
        parser.error(f"--{wrong[0].replace('_', '-')} belongs to --model hlr, found --model {options.model}: drop it")
    if options.model in ("cml", "lrml"):
        options.num_inter = options.judge_inter = 0
    return foreign


def _check(parser: Parser, options: Options) -> None:
    sources = options.pretrained is not None, options.user_emb is not None or options.item_emb is not None
    if options.is_pretrained_embs and sum(sources) != 1:
        parser.error("--is_pretrained_embs true needs --pretrained, or --user-emb and --item-emb")
    if any(sources) and not options.is_pretrained_embs:
        parser.error("found start vectors without --is_pretrained_embs true: give it, or drop them")
    if (options.user_emb is None) != (options.item_emb is None):
        parser.error("--user-emb and --item-emb go together: give both files")
    if options.freeze_embs and options.model in ("cml", "transcf"):
        parser.error(f"--freeze_embs leaves nothing to train in --model {options.model}: drop it")
    memory_base = options.relation_form == "memory" and options.hlrm_type == "base"
    if options.diff_memory and not (memory_base and options.include_user_slot):
        parser.error("--diff-memory serves the user slot of --hlrm_type base with --relation-form memory")
    if options.relation_form == "diagonal" and options.beta != 1:
        parser.error("--beta belongs to --relation-form memory")
    if options.mirror != "off" and "clip" in options.explicit:
        parser.error("with --mirror give --mirror-clip instead of --clip")
    name, _, k = options.select_metric.partition("@")
    if options.select_metric != "loss" and (name not in METRICS or not k.isdigit() or int(k) < 1):
        parser.error(
            f"found --select-metric {options.select_metric!r}, wanted loss or one of {', '.join(METRICS)} with a "
            "cut-off, such as ndcg@10"
        )
    if "none" in options.baselines and len(options.baselines) > 1:
        parser.error("--baselines none cannot stand beside others")
