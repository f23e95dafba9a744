"""Settings of the vision program and the rules between them. Imports nothing heavy: ``--help`` is quick.

Every flag of the published program is accepted under its name and with its default; the natural flags stand beside
them. The bare program trains the embedded digits with sizes of their own (:data:`DIGITS`), which ``--dataset`` ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from gfml.base import settings as kinds
from gfml.base.errors import UserError
from gfml.base.settings import Settings, changed, fill, inert, setting
from gfml.program.flags import MirrorSettings, RunSettings

# What the embedded digits use where a flag is not given: made for a minute on one core, long-tailed.
DIGITS = {
    "model_name": ["vit", "vit_gra"], "imb_type": "exp", "imb_factor": 0.1, "epochs": 30, "batch_size": 32,
    "warmup_epoch": 3, "patch": 4, "num_layers": 4, "hidden": 64, "mlp_hidden": 128, "head": 4, "num_split": 2,
    "lamb_gra": 1.0, "gra_scale": "none", "dot_scale": "sqrt_head",
}  # fmt: skip
IMBALANCED = ("cimb10", "cimb100")
LONG_TAIL = ("ce", "class-balanced", "focal", "balanced-softmax", "logit-adjustment", "ldam", "ldam-drw")


@dataclass(frozen=True)
class ImageSettings(Settings):
    """data"""

    dataset: str = setting(
        "digits",
        "c10, c100, svhn, cimb10, cimb100, digits, cifar10-full-lossy, fashion-mnist, grocery-store, or a folder of images by class",
    )
    num_classes: int | None = setting(None, "checked against the data; needed nowhere", kinds.count, unit="C")
    data_root: str | None = setting(
        None, "where data sets lie (default: $GFML_DATA, ./data, ~/.cache/gfml/data)", unit="DIR", beside=True
    )
    download: bool = setting(False, "fetch CIFAR and SVHN through torchvision if they are missing", beside=True)
    image_size: int | None = setting(
        None, "make every image S x S (default: as it is; 32 for folders and archives)", kinds.count, unit="S"
    )
    imb_type: str | None = setting(
        None,
        "shape of the imbalance (default: exp for cimb10, cimb100, digits and with --imb-factor, else balanced)",
        choices=("exp", "step", "balanced"),
    )
    imb_factor: float | None = setting(
        None,
        "smallest over largest class of the train part (default: 0.01 for cimb10, cimb100)",
        kinds.number(above=0, most=1),
        unit="F",
    )
    rand_number: int = setting(0, "seed of the choice of images that stay", kinds.whole, unit="N")
    val_fraction: float = setting(
        0.0,
        "share of each class of the (long-tailed) train part cut off for validation",
        kinds.number(least=0, most=0.9),
        unit="R",
    )
    test_fraction: float = setting(
        0.2, "test share of a folder without test images", kinds.number(above=0, most=0.9), unit="R"
    )
    split_seed: int = setting(2020, "seed of random cuts", kinds.whole, unit="N")
    unreadable: str = setting("error", "what an unreadable image does", choices=("error", "skip"))


@dataclass(frozen=True)
class ModelSettings(Settings):
    """model"""

    model_name: tuple[str, ...] = setting(
        ("vit_gra",),
        "one or more of vit, vit_gra, resnet18, densenet121, efficientnetb2, vgg19, a timm model, a timm vision transformer with _gra at the end; one run each",
        unit="NAME",
        nargs="+",
    )
    patch: int = setting(8, "patches per side", kinds.count, unit="P")
    num_layers: int = setting(7, "transformer blocks", kinds.count, unit="L")
    hidden: int = setting(384, "width of the tokens", kinds.count, unit="D")
    mlp_hidden: int = setting(384, "width inside the MLP", kinds.count, unit="D")
    head: int = setting(12, "attention heads", kinds.count, unit="H")
    dropout: float = setting(0.0, "dropout after attention and in the MLP", kinds.number(least=0, most=0.95), unit="P")
    off_cls_token: bool = setting(False, "classify the mean token instead of a class token")
    dot_scale: str = setting(
        "sqrt_hidden",
        "divisor of dot logits: root of the full width (published) or of a head's (usual)",
        choices=("sqrt_hidden", "sqrt_head"),
    )
    stem: str = setting(
        "imagenet", "first layers of the four CNNs; cifar keeps small images large", choices=("imagenet", "cifar")
    )


@dataclass(frozen=True)
class GravitySettings(Settings):
    """gravity attention (vit_gra); logit = (log-mass - lambda log(1 + D2)) / S"""

    lamb_gra: float = setting(1.0, "lambda, the weight of the distance", kinds.nonnegative, unit="L")
    learn_lamb: int = setting(0, "learn lambda, one per gravity head", choices=(0, 1))
    dist_mode: str = setting("l2", "distance of query and key", choices=("l2", "l1", "emd", "kl"))
    mass_pos: str = setting(
        "full",
        "gravity in every layer, in every layer with one shared mass table, in the first, in the last",
        choices=("full", "full_fix", "head", "tail"),
    )
    mix_on: int = setting(0, "0: gravity alone in all heads; 1: --mix_mode", choices=(0, 1))
    mix_mode: str = setting(
        "normal",
        "normal: every head blends dot and gravity; split: the first --num_split heads are gravity heads",
        choices=("normal", "split"),
    )
    lamb_mix: float = setting(0.5, "share of gravity in a blended head", kinds.share, unit="R")
    num_split: int = setting(6, "gravity heads of mix mode split", kinds.whole, unit="N")
    split_mix: int = setting(0, "1: these heads blend too", choices=(0, 1))
    gra_scale: str = setting(
        "sqrt_hidden", "divisor S; none: lambda is the exponent itself", choices=("sqrt_hidden", "sqrt_head", "none")
    )
    mass_from: str = setting(
        "position",
        "mass of a token from its position, its key vector, or no mass: distance alone, as the published code computes",
        choices=("position", "content", "none"),
    )
    mass_param: str = setting("raw", "map from parameter to log-mass", choices=("raw", "softplus"))
    mass_init: str = setting("uniform", "start of position masses: U(0, 1) or 0", choices=("uniform", "zeros"))
    mass_share: str = setting("heads", "one mass table for all heads, or one each", choices=("heads", "per_head"))
    query_mass: int = setting(
        0, "masses of queries too; the softmax cancels them under --mass_combine sum", choices=(0, 1)
    )
    mass_combine: str = setting("sum", "how query and key mass combine", choices=("sum", "product"))
    head_order: str = setting(
        "natural",
        "original: mix mode split weighs other heads' values, as the published code does",
        choices=("natural", "original"),
    )
    attn_kernel: str = setting("auto", "explicit: logits by the definition, slower", choices=("auto", "explicit"))


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """training"""

    epochs: int = setting(200, "passes over the train part", kinds.whole, unit="N", also="max-epochs")
    batch_size: int = setting(128, "images of one step, over all processes", kinds.count, unit="N")
    eval_batch_size: int = setting(1024, "images judged at once", kinds.count, unit="N", beside=True)
    optimizer: str = setting(
        "adam", "adam adds the decay to the gradient, adamw to the step", choices=("adam", "adamw")
    )
    lr: float = setting(0.001, "largest learning rate", kinds.positive, unit="LR")
    min_lr: float = setting(1e-05, "learning rate at the end of the cosine", kinds.nonnegative, unit="LR")
    beta1: float = setting(0.9, "Adam's decay of the first moment", kinds.number(least=0, most=0.9999999), unit="B")
    beta2: float = setting(0.999, "Adam's decay of the second moment", kinds.number(least=0, most=0.9999999), unit="B")
    weight_decay: float = setting(5e-05, "of everything but masses and lambdas", kinds.nonnegative, unit="W")
    warmup_epoch: int = setting(5, "epochs of linear warm-up", kinds.whole, unit="N")
    schedule: str = setting(
        "natural",
        "natural: per step, ends at --min-lr; original: per epoch, its first epoch has learning rate 0, the cosine 200 epochs",
        choices=("natural", "original"),
    )
    precision: int = setting(16, "16: bfloat16 autocast on CUDA (the CPU computes in 32 always)", choices=(16, 32))
    clip_grad: float | None = setting(None, "largest gradient norm, or none", kinds.norm, unit="NORM")
    ema: float | None = setting(
        None,
        "judge running averages of the weights with this decay",
        kinds.number(above=0, most=1, none=True),
        unit="D",
    )
    num_workers: int = setting(
        0, "processes that augment; results do not depend on it", kinds.whole, unit="N", beside=True
    )
    dry_run: bool = setting(False, "one step and one batch of the test part, to see that everything runs")
    off_benchmark: bool = setting(False, "no search for the fastest convolutions on CUDA", beside=True)
    project_name: str = setting("vit-gravity", "a word for the name of the run directory", unit="NAME", beside=True)


@dataclass(frozen=True)
class AugmentationSettings(Settings):
    """augmentation of train images"""

    crop: int = setting(1, "crop after padding by 4, and mirror where the data allows it", choices=(0, 1))
    autoaugment: bool = setting(False, "AutoAugment's policy for CIFAR-10, or SVHN")
    aa_skip_imbalanced: int = setting(
        0, "1: not for cimb10 and cimb100, as the published code does (whatever its run names say)", choices=(0, 1)
    )
    aa_impl: str = setting(
        "torchvision", "whose details of AutoAugment's operations", choices=("torchvision", "original")
    )
    rcpaste: bool = setting(False, "blend a box of the image into it elsewhere")
    cutmix: bool = setting(False, "a box of another image; wins over --mixup")
    mixup: bool = setting(False, "sum of two images, in 4 of 5 batches")


@dataclass(frozen=True)
class LossSettings(Settings):
    """loss and long tail"""

    criterion: str = setting("ce", "the published program's only loss; see --long-tail", choices=("ce",))
    label_smoothing: bool = setting(False, "smooth the targets")
    smoothing: float = setting(
        0.1, "weight that goes to the other classes together", kinds.number(least=0, most=0.999), unit="E"
    )
    long_tail: str = setting(
        "ce",
        "loss: plain, effective-number weights, focal, log-prior added to the logits (with --tau), margins, margins with deferred weights",
        choices=LONG_TAIL,
    )
    tau: float = setting(1.0, "strength of logit adjustment", kinds.nonnegative, unit="T")
    cb_beta: float = setting(0.9999, "beta of effective numbers", kinds.number(least=0, most=1), unit="B")
    gamma: float = setting(1.0, "exponent of the focal loss", kinds.nonnegative, unit="G")
    ldam_margin: float = setting(0.5, "largest margin of LDAM", kinds.positive, unit="M")
    ldam_scale: float = setting(30.0, "factor of LDAM's cosines", kinds.positive, unit="S")
    drw_start: float = setting(0.8, "share of the epochs before deferred weights begin", kinds.share, unit="R")
    sampler: str = setting(
        "none",
        "draw images with replacement, classes weighted by effective numbers or equally",
        choices=("none", "effective", "balanced"),
    )


@dataclass(frozen=True)
class OldSettings(Settings):
    """accepted from the original, without effect"""

    api_key: str | None = inert(None, "runs are recorded in run directories and TensorBoard, not at Comet", unit="KEY")
    score_norm: int = inert(1, "the published programs set it and never read it", kind=int, unit="N")


@dataclass(frozen=True)
class VisionSettings(
    OldSettings, RunSettings, MirrorSettings, LossSettings, AugmentationSettings, TrainingSettings, GravitySettings,
    ModelSettings, ImageSettings,
):  # fmt: skip
    """Everything that ``vision/main.py`` takes."""

    seed: int = changed(RunSettings, "seed", 42)
    compile: bool = changed(RunSettings, "compile", False, late=False)
    refit: bool = setting(
        False,
        "with --val_fraction: report a model trained anew on train and validation for the epochs that validation selected",
        late=True,
    )

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        if options.dataset == "digits":
            fill(options, DIGITS)
        _choose_imbalance(options)
        super().resolve(options)
        _check(options)
        if options.refit and not options.val_fraction:
            raise UserError("--refit needs a validation part: give --val_fraction, such as 0.1")

    @property
    def only_shown(self) -> bool:
        """The page is drawn again, of all models together."""
        return super().only_shown and not self.report

    def each(self) -> Sequence[Self]:
        """One run for each model."""
        return [replace(self, model_name=(name,)) for name in self.model_name]

    @property
    def model(self) -> str:
        """The name of the model of a run."""
        return self.model_name[0]

    @property
    def label(self) -> str:
        """A model's short name in tables: with its attention, where it has gravity."""
        if not self.model.endswith("_gra"):
            return self.model
        mix = f", {self.mix_mode} mix" if self.mix_on else ""
        mass = {"position": "", "content": ", content mass", "none": ", no mass"}[self.mass_from]
        return f"{self.model} ({self.dist_mode}, lambda {self.lamb_gra:g}{mass}{mix}, {self.mass_pos})"


def _choose_imbalance(options: argparse.Namespace) -> None:
    """Type and factor together, or balanced."""
    long_tailed = options.dataset in IMBALANCED
    if options.imb_type is None:
        options.imb_type = "exp" if long_tailed or options.imb_factor is not None else "balanced"
    if options.imb_type == "balanced":
        if "imb_factor" in options.explicit and options.imb_factor not in (None, 1.0):
            raise UserError("--imb-type balanced has no --imb-factor: drop one of them")
        options.imb_factor = None
    elif options.imb_factor is None:
        if not long_tailed:
            raise UserError(f"--imb-type {options.imb_type} needs --imb-factor, such as 0.01")
        options.imb_factor = 0.01


def _check(options: argparse.Namespace) -> None:
    names = options.model_name
    if len(set(names)) < len(names):
        raise UserError("--model-name names a model twice: each has one run")
    if len(names) > 1 and {"run_name", "resume"} & options.explicit:
        raise UserError("--run-name and --resume are for one run: give one --model-name")
    if not options.num_split and not (options.mix_on and options.mix_mode == "split"):
        raise UserError("--num_split 0, no gravity heads, belongs to --mix_on 1 --mix_mode split: add these or drop it")
    if "vit_gra" in names and options.mix_on and options.mix_mode == "split" and options.num_split > options.head:
        found = f"found --num_split {options.num_split} and --head {options.head}"
        raise UserError(f"{found}: num_split may be 0 to the number of heads")
    if options.hidden % options.head and {"vit", "vit_gra"} & set(names):
        raise UserError(f"found --hidden {options.hidden} and --head {options.head}: heads must divide the width")
    if options.min_lr > options.lr:
        raise UserError(f"found --min-lr {options.min_lr:g} above --lr {options.lr:g}")
    if options.long_tail == "focal" and options.label_smoothing:
        raise UserError("the focal loss has no smoothed labels: drop --label-smoothing")
    if options.learn_lamb and options.lamb_gra == 0:
        raise UserError("a learned lambda starts above 0: give --lamb_gra")
