"""Flags of both programs and the rules between them. Imports nothing heavy: ``--help`` is quick.

The two published programs share one trainer here, so both take nearly all flags; they differ in names and defaults.
Each original flag is accepted under its name. A flag left out takes the value of the data set or of the pipeline.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from contextual.names import ABLATIONS, BACKENDS, HAS_PROXIES, LAM_CONVENTIONS, REGULARISE, canonical, known_names
from gfml.base.errors import UserError, suggest
from gfml.program.cli import Options, Parser, TopksAction, add_run_flags, number

PUBLISHED = ("cub", "cars", "sop", "inat", "inshop")
SMALL = ("digits", "cifar100", "grocery-store")
DATASETS = (*PUBLISHED, *SMALL)
METRICS = ("recall", "map@r", "r_precision")
# Where a run reads from and how fast, not what it computes.
NOT_IDENTITY = frozenset({"root", "workers", "memory_mib", "pictures", "baselines"})
BASELINES = ("pixels", "start")

_positive = number(above=0)
_nonnegative = number(least=0)
_count = number(int, least=1)
_share = number(above=0, most=1)

# What a data set changes in the defaults, by flag.
_FOR_ALL = {"backbone": "resnet50", "pretrained": 1, "embedding_size": 512, "batch_size": 128, "ipc": 4, "workers": min(8, os.cpu_count() or 1),
            "trainxform": "bigtrain", "testxform": "bigtest", "select_metric": "recall@1", "layer_norm": 0, "hierarchical": 0, "ks": (1, 2, 4, 8)}  # fmt: skip
_FROM_SCRATCH = {"backbone": "small", "pretrained": 0, "embedding_size": 128, "workers": 0, "testxform": "none", "lr": 1e-3,
                 "weight_decay": 1e-4, "xform_scale": 0.4, "pooling": "avg", "ks": (1, 2, 4, 8), "bottleneck": "identity"}  # fmt: skip
_OF_DATASET: dict[str, dict[str, Any]] = {
    "cub": {}, "cars": {},
    "sop": {"ks": (1, 10, 100, 1000)}, "inat": {"ks": (1, 4, 16, 32)}, "inshop": {"ks": (1, 10, 20, 30, 40, 50)},
    "digits": _FROM_SCRATCH | {"image_size": 32, "batch_size": 32, "ipc": 8, "epochs": 8, "eval_every": 2, "embedding_size": 64,
                               "batches_per_epoch": 25, "xform_scale": 0.7, "select_metric": "map@r"},
    "cifar100": _FROM_SCRATCH | {"image_size": 32},
    "grocery-store": _FROM_SCRATCH | {"image_size": 64, "batch_size": 64},
}  # fmt: skip
_OF_PIPELINE: dict[str, dict[str, Any]] = {
    "256": {"lr": 1e-5, "weight_decay": 1e-4, "epochs": 80, "eval_every": 5, "image_size": 256, "xform_scale": 0.16, "warm": 0,
            "pooling": "avg", "bottleneck": "identity", "regularise": "none", "judge_train": 0, "full_map": 0},
    "224": {"lr": 1e-4, "weight_decay": 1e-4, "epochs": 80, "eval_every": 10, "image_size": 224, "xform_scale": 0.08, "warm": 0,
            "pooling": "gem", "bottleneck": "linear", "regularise": "additive", "judge_train": 1, "full_map": 1},
}  # fmt: skip
# Exceptions of the published pipelines.
_OF_BOTH: dict[tuple[str, str], dict[str, Any]] = {
    ("256", "cub"): {"pooling": "max", "layer_norm": 1},
    ("256", "cars"): {"pooling": "max", "layer_norm": 1},
    ("256", "sop"): {"hierarchical": 1, "ks": (1, 10, 100)},
    ("256", "inat"): {"hierarchical": 1, "image_size": 224, "batch_size": 256},
    ("224", "cub"): {"ks": (1, 2, 4, 8, 16, 32)},
    ("224", "cars"): {"ks": (1, 2, 4, 8, 16, 32)},
    ("224", "sop"): {"full_map": 0},
}


def build_parser(pipeline: str) -> Parser:
    """The command line of ``contextual/main.py`` (pipeline 256) or ``contextual/train.py`` (pipeline 224)."""
    parser = Parser(
        prog="contextual/main.py" if pipeline == "256" else "contextual/train.py",
        description=f"Train and judge image retrieval, the {pipeline} x {pipeline} pipeline. Without flags: embedded digits.",
    )
    _add_data_flags(parser)
    _add_batch_flags(parser)
    _add_network_flags(parser)
    _add_loss_flags(parser, pipeline)
    _add_training_flags(parser, pipeline)
    _add_evaluation_flags(parser)
    add_run_flags(parser)
    return parser


def _add_data_flags(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="digits",
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)}, in any capitals, or a folder of images by class",
    )
    add(
        "--root",
        "--data_root",
        default=None,
        metavar="DIR",
        help="folder of the data set, with the official annotation files in it",
    )
    add(
        "--val-share",
        type=_share,
        default=0.2,
        metavar="S",
        help="share of the training classes that validation takes; none of them is trained on",
    )
    add(
        "--split-seed",
        type=number(int, least=0),
        default=2020,
        metavar="N",
        help="draws the validation classes, and the split of iNat",
    )
    add(
        "--split-lists",
        nargs=2,
        default=None,
        metavar=("TRAIN", "TEST"),
        help="iNat: the authors' two lists, path,super,label",
    )
    add(
        "--check-counts",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: numbers of images and classes must be the published ones",
    )
    add(
        "--skip-bad-images",
        action="store_true",
        help="read every image first, name those that cannot be read and leave them out",
    )
    add(
        "--single-images",
        choices=("error", "drop", "repeat"),
        default=None,
        help="training classes with one image: stop, leave the class out, or repeat the image (default: repeat for inshop, else error)",
    )
    add(
        "--image-size",
        type=_count,
        default=None,
        metavar="PX",
        help="side of the pictures the network sees; default by data set and pipeline",
    )
    add(
        "--trainxform", choices=("bigtrain", "none"), default=None, help="none: resized to the square, no crop, no flip"
    )
    add(
        "--testxform",
        choices=("bigtest", "none"),
        default=None,
        help="bigtest: resized by 288 / 256 (or 256 / 224), centre cut; none: resized",
    )
    add(
        "--xform_scale",
        type=_share,
        default=None,
        metavar="S",
        help="least share of a picture that the random crop keeps",
    )
    add(
        "--workers",
        type=number(int, least=0),
        default=None,
        metavar="N",
        help="processes that read pictures; results do not depend on it",
    )


def _add_batch_flags(parser: Parser) -> None:
    add = parser.add_argument_group("batches").add_argument
    add("--batch-size", type=_count, default=None, metavar="B", help="pictures per step, over all processes")
    add(
        "--IPC",
        "--ipc",
        dest="ipc",
        type=number(int, least=0),
        default=None,
        metavar="M",
        help="pictures per class in a batch; 0: plain shuffling",
    )
    add(
        "--hierarchical",
        type=int,
        choices=(0, 1),
        default=None,
        help="1: a batch is two halves, of two super-classes (sop, inat)",
    )
    add(
        "--batches-per-epoch",
        type=_count,
        default=None,
        metavar="N",
        help="steps an epoch; default as published, else the images over the batch",
    )


def _add_network_flags(parser: Parser) -> None:
    add = parser.add_argument_group("network").add_argument
    add(
        "--backbone",
        default=None,
        metavar="NAME",
        help="small, or any model name of timm; resnet50 is torchvision's ImageNet weights",
    )
    add("--pretrained", type=int, choices=(0, 1), default=None, help="1: start from published weights")
    add("--width", type=_count, default=32, metavar="C", help="channels of the first stage of --backbone small")
    add("--embedding-size", type=_count, default=None, metavar="D", help="width of the embedding")
    add(
        "--pooling",
        choices=("max", "avg", "maxavg", "gem", "backbone"),
        default=None,
        help="over positions; maxavg is the sum of both, backbone the network's own",
    )
    add("--gem", type=int, choices=(0, 1), default=None, help="old name: 1 is --pooling gem, 0 is --pooling maxavg")
    add("--layer-norm", type=int, choices=(0, 1), default=None, help="1: LayerNorm without parameters before the head")
    add(
        "--batch-norm",
        choices=("train", "stats", "frozen"),
        default=None,
        help="train: ordinary; stats: running statistics stay; frozen: scale and shift too (default: train from scratch, else "
        "stats in main.py and frozen in train.py)",
    )
    add(
        "--bn-freeze",
        type=int,
        choices=(0, 1),
        default=None,
        help="old name: 1 is --batch-norm frozen, 0 is --batch-norm train",
    )
    add(
        "--bottleneck",
        choices=("linear", "identity"),
        default=None,
        help="linear: a layer behind the embedding that only training sees; the loss works on its output",
    )
    add("--train_embedding", type=_count, default=2048, metavar="E", help="width of that layer")
    add("--checkpoint", default=None, metavar="FILE", help="start from the weights in this best.pt or final.pt")


def _add_loss_flags(parser: Parser, pipeline: str) -> None:
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=known_names(), default="hybrid", metavar="NAME", help=f"one of {', '.join(known_names())}")
    add(
        "--lam",
        type=number(least=0, most=1),
        default=None,
        metavar="L",
        help="hybrid: weight of the contextual term (main.py, 0.4) or of the CONTRASTIVE term (train.py, 0.5); see --lam-convention",
    )
    add(
        "--lam-convention",
        choices=LAM_CONVENTIONS,
        default="context" if pipeline == "256" else "contrast",
        help="what --lam weighs: context: lam contextual + (1 - lam - gamma) contrastive + gamma regulariser; "
        "contrast: (1 - lam) contextual + lam contrastive + gamma regulariser",
    )
    add("--gamma", type=_nonnegative, default=0.1, metavar="G", help="weight of the similarity regulariser")
    add(
        "--regularise",
        choices=REGULARISE,
        default=None,
        help="how losses other than hybrid take it: not, loss + gamma reg, (1 - gamma) loss + gamma reg",
    )
    add(
        "--k",
        type=number(int, least=2),
        default=None,
        metavar="K",
        help="size of a neighbourhood; default 4, in train.py --IPC",
    )
    add(
        "--eps",
        type=_nonnegative,
        default=0.05,
        metavar="E",
        help="slack of a neighbourhood, in squared-distance units",
    )
    add(
        "--slope",
        type=_positive,
        default=10.0,
        metavar="A",
        help="slope of the step in the backward pass (paper: alpha)",
    )
    add(
        "--pos-margin",
        "--pos_margins",
        type=number(),
        default=None,
        metavar="M",
        help="positives above this cosine do not count; 0.75 in hybrid, else 0.9",
    )
    add(
        "--neg-margin",
        "--neg_margins",
        type=number(),
        default=0.6,
        metavar="M",
        help="negatives below this cosine do not count",
    )
    add(
        "--reg-sim",
        "--regsim",
        type=number(),
        default=None,
        metavar="S",
        help="mean cosine the regulariser wants; 0.25 in main.py, 0.3 in train.py",
    )
    add("--alpha", type=_positive, default=32.0, metavar="A", help="sharpness of proxy-anchor")
    add("--mrg", type=number(), default=0.1, metavar="M", help="margin of proxy-anchor")
    add(
        "--loss-backend", choices=BACKENDS, default="fused", help="fused: gradient in closed form; reference: automatic"
    )
    add(
        "--ablation",
        choices=tuple(ABLATIONS),
        default="none",
        metavar="NAME",
        help=f"variant of the contextual similarity: {', '.join(ABLATIONS)}",
    )


def _add_training_flags(parser: Parser, pipeline: str) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--lr",
        type=_positive,
        default=None,
        metavar="LR",
        help="learning rate: of the head in main.py (backbone: half), of the backbone in train.py",
    )
    add(
        "--loss-lr",
        type=_positive,
        default=None,
        metavar="LR",
        help="learning rate of proxies; 1e-3 in main.py, 100 times --lr in train.py",
    )
    add(
        "--optimizer",
        choices=("adam", "adamw"),
        default="adam" if pipeline == "256" else "adamw",
        help="adamw decouples the weight decay",
    )
    add("--weight-decay", type=_nonnegative, default=None, metavar="W", help="weight decay")
    add("--epochs", "--n_epochs", type=number(int, least=0), default=None, metavar="N", help="epochs")
    add(
        "--milestones",
        nargs="+",
        action=TopksAction,
        default=(15, 30, 45),
        metavar="EPOCH",
        help="epochs after which the learning rate falls, unless --lr-decay-step is given",
    )
    add(
        "--lr-decay-step",
        type=number(int, least=1, none=True),
        default=None if pipeline == "256" else 5,
        metavar="N",
        help="the learning rate falls every N epochs; none: at --milestones",
    )
    add(
        "--lr-decay-gamma",
        type=_share,
        default=0.3 if pipeline == "256" else 0.5,
        metavar="F",
        help="factor of every fall",
    )
    add(
        "--start_epoch",
        type=number(int, least=0),
        default=0,
        metavar="N",
        help="the learning rate starts where it would be after N epochs",
    )
    add(
        "--projector_lr_multi",
        type=_positive,
        default=2.0,
        metavar="F",
        help="factor of the bottleneck's learning rate",
    )
    add(
        "--embedding_lr_multi",
        type=_positive,
        default=2.0 if pipeline == "256" else 1.0,
        metavar="F",
        help="factor of the head's learning rate over the backbone's",
    )
    add(
        "--warm",
        type=number(int, least=0),
        default=None,
        metavar="N",
        help="first epochs in which the backbone does not train",
    )
    add(
        "--amp",
        type=int,
        choices=(0, 1),
        default=None,
        help="bfloat16 in the network; the loss is float32 always (default: 1 on CUDA)",
    )


def _add_evaluation_flags(parser: Parser) -> None:
    add = parser.add_argument_group("evaluation and selection").add_argument
    add(
        "--eval-every",
        "--test_freq",
        "--testfreq",
        type=_count,
        default=None,
        metavar="N",
        help="epochs between evaluations",
    )
    add("--ks", nargs="+", action=TopksAction, default=None, metavar="K", help="list lengths of recall")
    add(
        "--select-on",
        choices=("val", "test"),
        default="val",
        help="val: classes kept out of training; test: the originals' protocol, all training classes, selection on the "
        "reported classes; labelled in every result",
    )
    add(
        "--select-metric",
        default=None,
        metavar="NAME",
        help="recall@K, map@r or r_precision (default: recall@1; digits: map@r)",
    )
    add(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="report a model trained anew on all training classes for the selected number of epochs",
    )
    add(
        "--patience",
        type=number(int, least=1, none=True),
        default=None,
        metavar="N",
        help="evaluations without a better one before stopping, or none",
    )
    add(
        "--full-map",
        type=int,
        choices=(0, 1),
        default=None,
        help="1: mean average precision over the whole ranking too",
    )
    add(
        "--nmi",
        type=int,
        choices=(0, 1),
        default=None,
        help="1: k-means and NMI of the test part (default: up to 20,000 images)",
    )
    add("--judge-train", type=int, choices=(0, 1), default=None, help="1: the training part is judged too, at the end")
    add(
        "--baselines",
        nargs="+",
        choices=(*BASELINES, "none"),
        default=list(BASELINES),
        help="judged beside the model on test: small centred pictures, and the pooled features of the network before training",
    )
    add(
        "--pictures",
        type=number(int, least=0),
        default=8,
        metavar="N",
        help="queries on the page of neighbours; 0: no page",
    )
    add(
        "--memory-mib",
        type=_count,
        default=256,
        metavar="MIB",
        help="working memory of the ranking; results do not depend on it",
    )


def parse(pipeline: str, argv: list[str] | None = None) -> Options:
    """Parsed and checked flags with every default filled in; ``options.pipeline`` names the program."""
    parser = build_parser(pipeline)
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        options.dataset = dataset_name(options.dataset)
        options.loss = canonical(options.loss)
    except UserError as error:
        parser.error(str(error))
    _take_old_names(parser, options)
    _fill(options, pipeline)
    _check(parser, options)
    options.resolved = parser.config_of(options)
    options.pipeline = pipeline
    return options


def runs_of(program: str, argv: list[str]) -> list[tuple[str, Options]]:
    """Family and flags of every run that a command makes (see ``gfml.program.commands``): main.py and train.py make one."""
    pipeline = {"main": "256", "train": "224"}.get(program)
    return [(f"contextual-{pipeline}", parse(pipeline, argv))] if pipeline else []


def dataset_name(text: str) -> str:
    """A known name in its plain spelling, or the path of an existing folder. UserError for anything else."""
    plain = {"grocery": "grocery-store", "in-shop": "inshop", "cub-200-2011": "cub", "cars196": "cars"}
    name = text.lower().replace("_", "-")
    name = plain.get(name, name)
    if name in DATASETS:
        return name
    if Path(text).is_dir():
        return text
    raise UserError(
        f"unknown data set {text!r}: choose one of {', '.join(DATASETS)} or give a folder of images by class{suggest(name, DATASETS)}"
    )


def _take_old_names(parser: Parser, options: Options) -> None:
    """--gem and --bn-freeze say what --pooling and --batch-norm say."""
    for old, new, meaning in (("gem", "pooling", ("maxavg", "gem")), ("bn_freeze", "batch_norm", ("train", "frozen"))):
        value = getattr(options, old)
        if value is not None:
            if getattr(options, new) not in (None, meaning[value]):
                flags = f"--{old.replace('_', '-')} {value} and --{new.replace('_', '-')} {getattr(options, new)}"
                parser.error(f"found {flags}, which contradict each other: give one of them")
            setattr(options, new, meaning[value])
        delattr(options, old)


def _fill(options: Options, pipeline: str) -> None:
    """Values of flags that were left out, the most particular first: pipeline and data set, data set, pipeline, all."""
    name = options.dataset
    of_dataset = _OF_DATASET.get(name, {})
    for source in (_OF_BOTH.get((pipeline, name), {}), of_dataset, _OF_PIPELINE[pipeline], _FOR_ALL):
        for flag, value in source.items():
            if getattr(options, flag) is None:
                setattr(options, flag, value)
    if options.batch_norm is None:
        pretrained = "stats" if pipeline == "256" else "frozen"
        options.batch_norm = pretrained if options.pretrained else "train"
    if options.k is None:
        options.k = max(2, options.ipc) if pipeline == "224" and options.ipc else 4
    if options.single_images is None:
        options.single_images = "repeat" if name == "inshop" else "error"


def _check(parser: Parser, options: Options) -> None:
    if options.ipc and options.batch_size % options.ipc:
        parser.error(
            f"found --batch-size {options.batch_size} and --IPC {options.ipc}, wanted a batch of whole classes: mend one of them"
        )
    if options.hierarchical and (options.ipc == 0 or options.batch_size % (2 * options.ipc)):
        parser.error(
            f"found --hierarchical 1, --batch-size {options.batch_size} and --IPC {options.ipc}, wanted two halves of whole classes each"
        )
    if options.hierarchical and options.dataset not in ("sop", "inat"):
        parser.error(
            f"found --hierarchical 1 with {options.dataset}, which has no super-classes: give --hierarchical 0"
        )
    if options.k > options.batch_size:
        parser.error(
            f"found --k {options.k} and --batch-size {options.batch_size}, wanted a batch of at least k pictures"
        )
    metric, _, cut = options.select_metric.partition("@")
    if not (options.select_metric in METRICS[1:] or (metric == "recall" and cut.isdigit() and int(cut) > 0)):
        parser.error(f"found --select-metric {options.select_metric!r}, wanted recall@K, map@r or r_precision")
    if "none" in options.baselines and len(options.baselines) > 1:
        parser.error("--baselines none cannot stand beside others")
    if options.select_on == "test" and options.refit:
        parser.error("--refit needs selection on validation; --select-on test trains on all training classes already")
    if options.split_lists is not None and options.dataset != "inat":
        parser.error(f"found --split-lists with {options.dataset}, wanted it with inat only")
    if options.ablation != "none" and options.loss not in ("hybrid", "contextual"):
        parser.error(
            f"found --ablation {options.ablation} with --loss {options.loss}: ablations are of hybrid and contextual"
        )
    if (
        options.loss == "hybrid"
        and options.lam_convention == "context"
        and (options.lam if options.lam is not None else 0.4) + options.gamma > 1
    ):
        parser.error(
            f"found --lam {options.lam} and --gamma {options.gamma}, wanted lam + gamma <= 1: the contrastive weight is 1 - lam - gamma"
        )
    if options.loss_lr is not None and options.loss not in HAS_PROXIES:
        parser.error(f"found --loss-lr with --loss {options.loss}, which has no parameters of its own: leave it out")
