"""Settings of the HLRM programs and the rules between them. Imports nothing heavy: ``--help`` is quick.

Every flag of the published port is accepted under its name with its default, except that the port's one epoch at
rate 2e-5 is 100 at 2e-4 here; plain names stand beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfml.base import settings as kinds
from gfml.base.errors import UserError
from gfml.base.settings import Settings, changed, setting
from gfml.data.options import DataSettings, DemoSettings
from gfml.program.cli import Options, Parser, add_settings
from gfml.program.flags import JudgingSettings, MirrorSettings, RunSettings

MODELS = ("hlr", "lrml", "cml", "transcf", "attcml")
# Nothing of them but the vectors is trained.
WITHOUT_MEMORY = ("cml", "transcf", "attcml")
TYPES = ("base", "plus")
FORMS = ("memory", "diagonal")
# Flags of the printed synopsis, which shows them without values.
SYNOPSIS = frozenset({
    "--train_batch_size", "--eval_batch_size", "--num_inter", "--hlrm_type", "--epochs", "--lr", "--lr_scheduler_gamma",
    "--clip", "--patience", "--emb_size", "--num_relations", "--is_pretrained_embs", "--freeze_embs", "--save_model",
    "--save_dir", "--loss_margin", "--eval_size", "--topk",
})  # fmt: skip
SYNOPSIS_SWITCHES = frozenset({"--is_pretrained_embs", "--freeze_embs", "--save_model"})
# split_method of the port's config.json -> --split
SPLIT_METHODS = {"fo": "global", "tfo": "time"}


def yes_or_no(default: bool, help: str, **more: Any) -> Any:
    """A switch as the port spells it: the bare flag, or a word such as yes, true or 0 after it."""
    return setting(default, help, kinds.yes_or_no, nargs="?", const=True, unit="BOOL", **more)


@dataclass(frozen=True)
class ModelSettings(Settings):
    """model"""

    model: str = setting(
        "hlr",
        "hlr: latent relations; lrml, cml, transcf, attcml: compared models under the same protocol",
        choices=MODELS,
    )
    hlrm_type: str = setting("base", "base: HLR; plus: HLR++", choices=TYPES)
    relation_form: str = setting(
        "memory", "memory: the paper's attention over memory slots; diagonal: the arithmetic of the port", choices=FORMS
    )
    include_user_slot: bool | None = setting(
        None, "the user among the references (default: yes for memory base, else no)", bool
    )
    beta: float = setting(
        1.0, "smoothing exponent of the user's attention; 1 is a softmax", kinds.nonnegative, unit="B"
    )
    diff_memory: bool = setting(False, "a second memory for the user slot")
    copy_relations: bool = setting(False, "the negative takes the positive's relation")
    squared: bool | None = setting(
        None, "squared distances (default: yes for memory, no for diagonal, as published)", bool
    )
    embedding_dim: int = setting(100, "width of the vectors", kinds.count, unit="D", also="emb_size", key="emb_size")
    num_relations: int = setting(20, "memory slots", kinds.count, unit="N")
    num_inter: int = setting(50, "largest number of history items of a user", kinds.whole, unit="P")
    judge_inter: int | None = setting(
        None, "the same when judging (default: --num_inter, as published; more judges better)", kinds.whole, unit="P"
    )
    history_sampling: str = setting(
        "random", "how they are chosen when there are more", choices=("random", "unpop", "last")
    )
    clip_norm: float = setting(1.0, "radius of the ball of all vectors", kinds.positive, unit="R")
    clip_memory: bool = setting(False, "keep memory rows within length 1 too")
    compat: int = setting(
        0,
        "1: clip by min(1, R / (norm + 1e-7)) and sort the whole list in local NDCG, as the port does",
        choices=(0, 1),
    )
    neighbour_weight: float = setting(0.1, "transcf: weight of its neighbourhood regulariser", kinds.nonnegative)
    distance_weight: float = setting(0.1, "transcf: weight of its distance regulariser", kinds.nonnegative)


@dataclass(frozen=True)
class StartSettings(Settings):
    """start values"""

    is_pretrained_embs: bool = yes_or_no(
        False, "start from the vectors of --pretrained, or of --user-emb and --item-emb"
    )
    pretrained: str | None = setting(
        None, "run directory (its final.pt), checkpoint, or .npz with user [U, D] and item [I, D]", unit="FILE"
    )
    user_emb: str | None = setting(
        None, "user vectors [U, D] in the order of the data, or an .npz with user_ids beside them", unit="FILE"
    )
    item_emb: str | None = setting(
        None, "item vectors [I, D] in the order of the data, or an .npz with item_ids beside them", unit="FILE"
    )
    freeze_embs: bool = yes_or_no(False, "train the relations alone")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """training"""

    batch_size: int = setting(
        5000, "pairs per step", kinds.count, unit="B", also="train_batch_size", key="train_batch_size"
    )
    epochs: int = setting(100, "largest number of epochs", kinds.whole, unit="N")
    lr: float = setting(2e-4, "learning rate", kinds.positive)
    lr_scheduler_gamma: float = setting(
        0.98, "factor on the rate after every epoch", kinds.number(above=0, most=1), unit="G"
    )
    clip: float = setting(3.0, "largest gradient norm; 0 or less: none", unit="NORM")
    margin: float = setting(
        0.2, "margin, in units of the distance", kinds.nonnegative, unit="M", also="loss_margin", key="loss_margin"
    )
    reduction: str = setting("mean", "of the hinge over a batch; the paper sums", choices=("mean", "sum"))
    optimizer: str = setting("adam", "optimizer", choices=("adam", "adagrad", "sgd"))
    save_model: bool = yes_or_no(
        True, "write the selected weights to --save_dir; the run directory holds them in any case", beside=True
    )
    save_dir: str = setting(
        "hlrm_base.pt", "the FILE that eval.py reads (the port's name for it)", unit="FILE", beside=True
    )


@dataclass(frozen=True)
class HLRMJudgingSettings(JudgingSettings):
    """evaluation and selection"""

    eval_batch_size: int = setting(
        10000, "most validation pairs and most items at a time", kinds.count, unit="N", beside=True
    )
    topks: tuple[int, ...] = changed(JudgingSettings, "topks", (10,), also="topk", key="topk")
    eval_size: int = setting(1000, "test users in a cohort of the sampled protocol", kinds.count, unit="N")
    num_cohorts: int = setting(5, "cohorts of the sampled protocol", kinds.count, unit="N")
    mask_seen: bool = setting(True, "never recommend known items; the port does")
    baselines: tuple[str, ...] = changed(JudgingSettings, "baselines", ("popularity",))
    select_metric: str = changed(
        JudgingSettings,
        "select_metric",
        "loss",
        help="what selects the epoch on validation: loss (as published), or a metric such as ndcg@10",
    )
    select_on: str = changed(JudgingSettings, "select_on", "val", late=True)
    select_users: int = setting(1000, "validation users ranked for --select-metric NAME@K", kinds.count, unit="N")
    refit: bool = changed(JudgingSettings, "refit", False, late=True)
    patience: int | None = changed(JudgingSettings, "patience", 10)

    @classmethod
    def other_metrics(cls) -> tuple[str, ...]:
        return ("loss",)


@dataclass(frozen=True)
class HLRMSettings(
    RunSettings, MirrorSettings, HLRMJudgingSettings, TrainingSettings, StartSettings, ModelSettings, DemoSettings,
    DataSettings,
):  # fmt: skip
    """all settings of hlrm/train.py"""

    data_config: str | None = setting(None, "the port's config.json; flags given beside it win", unit="FILE")

    @classmethod
    def translate(cls, tokens: list[str]) -> list[str]:
        return from_synopsis(tokens)

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        if options.data_config is not None:
            _apply_data_config(options)
        unused = _as_compared(options) if options.model != "hlr" else set()
        if options.squared is None:
            options.squared = options.relation_form == "memory" or options.model != "hlr"
        if options.judge_inter is None:
            options.judge_inter = options.num_inter
        if options.include_user_slot is None:
            options.include_user_slot = options.relation_form == "memory" and options.hlrm_type == "base"
        _check(options)
        super().resolve(options)
        # Flags that mean nothing here stay out of the config, which is read back as if its flags had been given.
        options.unused = frozenset(unused | ({"clip"} if options.mirror != "off" else set()))


def build_eval_parser() -> Parser:
    """The command line of ``hlrm/eval.py``: what is not given is taken from the saved model."""
    parser = Parser(
        prog="hlrm/eval.py",
        description="Judge a saved model, print and store the six metrics. Flags not given are those of its training.",
        argument_default=argparse.SUPPRESS,
    )
    model = parser.add_argument_group("the saved model")
    model.add_argument(
        "--save_dir", "--save-dir", default="hlrm_base.pt", metavar="FILE", help="saved model, or a run directory"
    )
    model.add_argument("--eval-split", choices=("valid", "test"), default="test", help="the part that is judged")
    model.add_argument(
        "--num_inter", "--judge-inter", dest="judge_inter", type=kinds.whole, metavar="P", help="history items per user"
    )
    model.add_argument(
        "--result", metavar="FILE", help="where the numbers go (default: FILE.eval.json beside the model)"
    )
    add_settings(
        parser, HLRMSettings, only={*CHECKED, *OVERRIDES, "is_pretrained_embs"} - {"judge_inter"}, without_defaults=True
    )
    explain = parser.add_argument_group("explanations")
    explain.add_argument(
        "--attention", type=kinds.whole, default=0, metavar="N",
        help="write and plot the attention of the first recommendation of N judged users",
    )  # fmt: skip
    explain.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("USER", "ITEM"),
        help="the same for a user's id and an item's id or title; may repeat",
    )
    explain.add_argument(
        "--analyse", type=kinds.whole, default=0, metavar="N",
        help="how often N pairs of the judged part share a genre with the pair whose relation is nearest (20000: paper)",
    )  # fmt: skip
    explain.add_argument(
        "--attention-dir", metavar="DIR", help="folder for them (default: FILE.attention beside the model)"
    )
    explain.add_argument(
        "--item-info", metavar="FILE", help="titles and genres of items (default: a known file beside the data)"
    )
    return parser


# What eval.py accepts of the training's settings: to be compared with the saved model's, and to take their place.
CHECKED = ("hlrm_type", "embedding_dim", "num_relations")
OVERRIDES = (
    "topks", "eval_size", "num_cohorts", "mask_seen", "eval_batch_size", "judge_inter", "history_sampling", "baselines",
    "data_root", "dataset", "device", "threads",
)  # fmt: skip


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


def _apply_data_config(options: argparse.Namespace) -> None:
    """Take the data set of the port's config.json, as far as no flag says otherwise."""
    try:
        config = json.loads(Path(options.data_config).read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {options.data_config} ({type(error).__name__} {error}): wanted JSON with an object dataset"
        ) from None
    known = {
        "name", "path", "interactions", "binary", "pos_threshold", "n_core", "split_method", "random_state", "file_format",
    }  # fmt: skip
    if unknown := sorted(config.keys() - known):
        raise UserError(f"{options.data_config} sets dataset.{unknown[0]}, wanted only {', '.join(sorted(known))}")
    if not config.get("binary", True) or config.get("file_format", "csv") != "csv":
        raise UserError(
            f"{options.data_config} asks for data that is not binary or not csv: only binary feedback from csv is read"
        )
    method = config.get("split_method", "fo")
    if method not in SPLIT_METHODS:
        raise UserError(
            f"{options.data_config} sets split_method {method!r}: choose {' or '.join(SPLIT_METHODS)}, or give --split"
        )
    values = {
        "dataset": _file_of(config),
        "threshold": config.get("pos_threshold"), "kcore": config.get("n_core", 0), "split": SPLIT_METHODS[method],
        "split_seed": config.get("random_state", 2021),
    }  # fmt: skip
    if values["dataset"] is None:
        raise UserError(f"{options.data_config} names no data: set dataset.path and dataset.interactions")
    for name, value in values.items():
        if name not in options.explicit:
            setattr(options, name, value)


def _file_of(config: dict[str, object]) -> str | None:
    """The path of the interactions, else the name of the data."""
    if "interactions" not in config:
        return config.get("name")
    return str(Path(config.get("path", ".")) / config["interactions"])


def _as_compared(options: argparse.Namespace) -> set[str]:
    """The flags that do not concern a compared model, which must not be given."""
    foreign = {"hlrm_type", "relation_form", "include_user_slot", "copy_relations"}
    foreign |= {"beta", "diff_memory"} if options.model != "lrml" else set()
    foreign |= {"num_relations", "clip_memory"} if options.model in WITHOUT_MEMORY else set()
    foreign |= {"num_inter", "judge_inter"} if options.model in ("cml", "lrml") else set()
    foreign |= {"judge_inter"} if options.model == "transcf" else set()
    if wrong := sorted(foreign & options.explicit):
        raise UserError(
            f"--{wrong[0].replace('_', '-')} belongs to --model hlr, found --model {options.model}: drop it"
        )
    if options.model in ("cml", "lrml"):
        options.num_inter = options.judge_inter = 0
    return foreign


def _check(options: argparse.Namespace) -> None:
    sources = options.pretrained is not None, options.user_emb is not None or options.item_emb is not None
    if options.is_pretrained_embs and sum(sources) != 1:
        raise UserError("--is_pretrained_embs true needs --pretrained, or --user-emb and --item-emb")
    if any(sources) and not options.is_pretrained_embs:
        raise UserError("found start vectors without --is_pretrained_embs true: give it, or drop them")
    if (options.user_emb is None) != (options.item_emb is None):
        raise UserError("--user-emb and --item-emb go together: give both files")
    if options.freeze_embs and options.model in WITHOUT_MEMORY:
        raise UserError(f"--freeze_embs leaves nothing to train in --model {options.model}: drop it")
    memory_base = options.relation_form == "memory" and options.hlrm_type == "base"
    if options.diff_memory and not (memory_base and options.include_user_slot):
        raise UserError("--diff-memory serves the user slot of --hlrm_type base with --relation-form memory")
    if options.relation_form == "diagonal" and options.beta != 1:
        raise UserError("--beta belongs to --relation-form memory")
    if options.mirror != "off" and "clip" in options.explicit:
        raise UserError("with --mirror give --mirror-clip instead of --clip")
    if options.select_on == "test" and options.select_metric == "loss":
        raise UserError(
            "--select-metric loss is of validation pairs: give --select-on val, or a metric such as ndcg@10"
        )
