"""Flags of the vision program and the rules between them. Imports nothing heavy: ``--help`` is quick.

Every flag of the published program is accepted under its name and with its default; the natural flags stand beside
them. The bare program trains the embedded digits with sizes of their own (:data:`DIGITS`), which ``--dataset`` ends.
"""

from __future__ import annotations

import sys

from gfml.program.cli import Options, Parser, add_mirror_flags, add_run_flags, number

# What the embedded digits use where a flag is not given: made for a minute on one core, long-tailed.
DIGITS = {
    "model_name": ["vit", "vit_gra"], "imb_type": "exp", "imb_factor": 0.1, "epochs": 30, "batch_size": 32,
    "warmup_epoch": 3, "patch": 4, "num_layers": 4, "hidden": 64, "mlp_hidden": 128, "head": 4, "num_split": 2,
    "lamb_gra": 1.0, "gra_scale": "none", "dot_scale": "sqrt_head",
}  # fmt: skip
IMBALANCED = ("cimb10", "cimb100")
LONG_TAIL = ("ce", "class-balanced", "focal", "balanced-softmax", "logit-adjustment", "ldam", "ldam-drw")
# Accepted so that old command lines run; each says so once when it is given.
WITHOUT_EFFECT = {
    "api_key": "runs are recorded in run directories and TensorBoard, not at Comet",
    "score_norm": "the published programs set it and never read it",
}
# No part of what a run computes.
NOT_IDENTITY = frozenset(
    {
        *WITHOUT_EFFECT,
        "data_root",
        "download",
        "num_workers",
        "eval_batch_size",
        "off_benchmark",
        "project_name",
        "report",
    }
)

_positive = number(above=0)
_nonnegative = number(least=0)
_count = number(int, least=1)
_share = number(least=0, most=1)


def build_parser() -> Parser:
    """The command line of ``vision/main.py``."""
    parser = Parser(
        prog="vision/main.py",
        description="Train vision transformers with and without gravity attention on balanced and long-tailed images. "
        "Without flags: the embedded digits, vit and vit_gra side by side.",
    )
    _add_data_flags(parser)
    _add_model_flags(parser)
    _add_gravity_flags(parser)
    _add_training_flags(parser)
    _add_augmentation_flags(parser)
    _add_long_tail_flags(parser)
    add_mirror_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(seed=42)
    _add_flags_without_effect(parser)
    return parser


def _add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="digits",
        help="c10, c100, svhn, cimb10, cimb100, digits, cifar10-full-lossy, fashion-mnist, "
        "grocery-store, or a folder of images by class",
    )
    group.add_argument(
        "--num-classes", type=_count, default=None, metavar="C", help="checked against the data; needed nowhere"
    )
    group.add_argument(
        "--data-root", metavar="DIR", help="where data sets lie (default: $GFML_DATA, ./data, ~/.cache/gfml/data)"
    )
    group.add_argument(
        "--download", action="store_true", help="fetch CIFAR and SVHN through torchvision if they are missing"
    )
    group.add_argument(
        "--image-size",
        type=_count,
        default=None,
        metavar="S",
        help="make every image S x S (default: as it is; 32 for folders and archives)",
    )
    group.add_argument(
        "--imb-type",
        choices=("exp", "step", "balanced"),
        default=None,
        help="shape of the imbalance (default: exp for cimb10, cimb100, digits and with --imb-factor, else balanced)",
    )
    group.add_argument(
        "--imb-factor",
        type=number(above=0, most=1),
        default=None,
        metavar="F",
        help="smallest over largest class of the train part (default: 0.01 for cimb10, cimb100)",
    )
    group.add_argument(
        "--rand_number",
        type=number(int, least=0),
        default=0,
        metavar="N",
        help="seed of the choice of images that stay",
    )
    group.add_argument(
        "--val_fraction",
        "--val-fraction",
        type=number(least=0, most=0.9),
        default=0.0,
        metavar="R",
        help="share of each class of the (long-tailed) train part cut off for validation",
    )
    group.add_argument(
        "--test-fraction",
        type=number(above=0, most=0.9),
        default=0.2,
        metavar="R",
        help="test share of a folder without test images",
    )
    group.add_argument("--split-seed", type=number(int, least=0), default=2020, metavar="N", help="seed of random cuts")
    group.add_argument("--unreadable", choices=("error", "skip"), default="error", help="what an unreadable image does")


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-name",
        nargs="+",
        default=["vit_gra"],
        metavar="NAME",
        help="one or more of vit, vit_gra, resnet18, densenet121, efficientnetb2, vgg19, a timm model, "
        "a timm vision transformer with _gra at the end; one run each",
    )
    group.add_argument("--patch", type=_count, default=8, metavar="P", help="patches per side")
    group.add_argument("--num-layers", type=_count, default=7, metavar="L", help="transformer blocks")
    group.add_argument("--hidden", type=_count, default=384, metavar="D", help="width of the tokens")
    group.add_argument("--mlp-hidden", type=_count, default=384, metavar="D", help="width inside the MLP")
    group.add_argument("--head", type=_count, default=12, metavar="H", help="attention heads")
    group.add_argument(
        "--dropout",
        type=number(least=0, most=0.95),
        default=0.0,
        metavar="P",
        help="dropout after attention and in the MLP",
    )
    group.add_argument("--off-cls-token", action="store_true", help="classify the mean token instead of a class token")
    group.add_argument(
        "--dot_scale",
        choices=("sqrt_hidden", "sqrt_head"),
        default="sqrt_hidden",
        help="divisor of dot logits: root of the full width (published) or of a head's (usual)",
    )
    group.add_argument(
        "--stem",
        choices=("imagenet", "cifar"),
        default="imagenet",
        help="first layers of the four CNNs; cifar keeps small images large",
    )


def _add_gravity_flags(parser: Parser) -> None:
    group = parser.add_argument_group("gravity attention (vit_gra); logit = (log-mass - lambda log(1 + D2)) / S")
    group.add_argument(
        "--lamb_gra", type=_nonnegative, default=1.0, metavar="L", help="lambda, the weight of the distance"
    )
    group.add_argument("--learn_lamb", type=int, choices=(0, 1), default=0, help="learn lambda, one per gravity head")
    group.add_argument("--dist_mode", choices=("l2", "l1", "emd", "kl"), default="l2", help="distance of query and key")
    group.add_argument(
        "--mass_pos",
        choices=("full", "full_fix", "head", "tail"),
        default="full",
        help="gravity in every layer, in every layer with one shared mass table, in the first, in the last",
    )
    group.add_argument(
        "--mix_on", type=int, choices=(0, 1), default=0, help="0: gravity alone in all heads; 1: --mix_mode"
    )
    group.add_argument(
        "--mix_mode",
        choices=("normal", "split"),
        default="normal",
        help="normal: every head blends dot and gravity; split: the first --num_split heads are gravity heads",
    )
    group.add_argument("--lamb_mix", type=_share, default=0.5, metavar="R", help="share of gravity in a blended head")
    group.add_argument(
        "--num_split", type=number(int, least=0), default=6, metavar="N", help="gravity heads of mix mode split"
    )
    group.add_argument("--split_mix", type=int, choices=(0, 1), default=0, help="1: these heads blend too")
    group.add_argument(
        "--gra_scale",
        choices=("sqrt_hidden", "sqrt_head", "none"),
        default="sqrt_hidden",
        help="divisor S; none: lambda is the exponent itself",
    )
    group.add_argument(
        "--mass_from",
        choices=("position", "content", "none"),
        default="position",
        help="mass of a token from its position, its key vector, or no mass: distance alone, as the "
        "published code computes",
    )
    group.add_argument(
        "--mass_param", choices=("raw", "softplus"), default="raw", help="map from parameter to log-mass"
    )
    group.add_argument(
        "--mass_init", choices=("uniform", "zeros"), default="uniform", help="start of position masses: U(0, 1) or 0"
    )
    group.add_argument(
        "--mass_share", choices=("heads", "per_head"), default="heads", help="one mass table for all heads, or one each"
    )
    group.add_argument(
        "--query_mass",
        type=int,
        choices=(0, 1),
        default=0,
        help="masses of queries too; the softmax cancels them under --mass_combine sum",
    )
    group.add_argument(
        "--mass_combine", choices=("sum", "product"), default="sum", help="how query and key mass combine"
    )
    group.add_argument(
        "--head_order",
        choices=("natural", "original"),
        default="natural",
        help="original: mix mode split weighs other heads' values, as the published code does",
    )
    group.add_argument(
        "--attn_kernel", choices=("auto", "explicit"), default="auto", help="explicit: logits by the definition, slower"
    )


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs",
        "--max-epochs",
        type=number(int, least=0),
        default=200,
        metavar="N",
        help="passes over the train part",
    )
    group.add_argument(
        "--batch-size", type=_count, default=128, metavar="N", help="images of one step, over all processes"
    )
    group.add_argument("--eval-batch-size", type=_count, default=1024, metavar="N", help="images judged at once")
    group.add_argument(
        "--optimizer",
        choices=("adam", "adamw"),
        default="adam",
        help="adam adds the decay to the gradient, adamw to the step",
    )
    group.add_argument("--lr", type=_positive, default=1e-3, metavar="LR", help="largest learning rate")
    group.add_argument(
        "--min-lr", type=_nonnegative, default=1e-5, metavar="LR", help="learning rate at the end of the cosine"
    )
    group.add_argument(
        "--beta1",
        type=number(least=0, most=0.9999999),
        default=0.9,
        metavar="B",
        help="Adam's decay of the first moment",
    )
    group.add_argument(
        "--beta2",
        type=number(least=0, most=0.9999999),
        default=0.999,
        metavar="B",
        help="Adam's decay of the second moment",
    )
    group.add_argument(
        "--weight-decay", type=_nonnegative, default=5e-5, metavar="W", help="of everything but masses and lambdas"
    )
    group.add_argument(
        "--warmup-epoch", type=number(int, least=0), default=5, metavar="N", help="epochs of linear warm-up"
    )
    group.add_argument(
        "--schedule",
        choices=("natural", "original"),
        default="natural",
        help="natural: per step, ends at --min-lr; original: per epoch, its first epoch has learning "
        "rate 0, the cosine 200 epochs",
    )
    group.add_argument(
        "--precision",
        type=int,
        choices=(16, 32),
        default=16,
        help="16: bfloat16 autocast on CUDA (the CPU computes in 32 always)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument(
        "--clip-grad",
        type=number(above=0, none=True),
        default=None,
        metavar="NORM",
        help="largest gradient norm, or none",
    )
    group.add_argument(
        "--ema",
        type=number(above=0, most=1, none=True),
        default=None,
        metavar="D",
        help="judge running averages of the weights with this decay",
    )
    group.add_argument(
        "--num-workers",
        type=number(int, least=0),
        default=0,
        metavar="N",
        help="processes that augment; results do not depend on it",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="one step and one batch of the test part, to see that everything runs"
    )
    group.add_argument("--off-benchmark", action="store_true", help="no search for the fastest convolutions on CUDA")
    group.add_argument(
        "--project-name", default="vit-gravity", metavar="NAME", help="a word for the name of the run directory"
    )
    group.add_argument(
        "--report", type=int, choices=(0, 1), default=1, help="write report.html with pictures beside each run"
    )


def _add_augmentation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation of train images")
    group.add_argument(
        "--crop",
        type=int,
        choices=(0, 1),
        default=1,
        help="crop after padding by 4, and mirror where the data allows it",
    )
    group.add_argument("--autoaugment", action="store_true", help="AutoAugment's policy for CIFAR-10, or SVHN")
    group.add_argument(
        "--aa_skip_imbalanced",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: not for cimb10 and cimb100, as the published code does (whatever its run names say)",
    )
    group.add_argument(
        "--aa_impl",
        choices=("torchvision", "original"),
        default="torchvision",
        help="whose details of AutoAugment's operations",
    )
    group.add_argument("--rcpaste", action="store_true", help="blend a box of the image into it elsewhere")
    group.add_argument("--cutmix", action="store_true", help="a box of another image; wins over --mixup")
    group.add_argument("--mixup", action="store_true", help="sum of two images, in 4 of 5 batches")


def _add_long_tail_flags(parser: Parser) -> None:
    group = parser.add_argument_group("loss and long tail")
    group.add_argument(
        "--criterion", choices=("ce",), default="ce", help="the published program's only loss; see --long-tail"
    )
    group.add_argument("--label-smoothing", action="store_true", help="smooth the targets")
    group.add_argument(
        "--smoothing",
        type=number(least=0, most=0.999),
        default=0.1,
        metavar="E",
        help="weight that goes to the other classes together",
    )
    group.add_argument(
        "--long-tail",
        choices=LONG_TAIL,
        default="ce",
        help="loss: plain, effective-number weights, focal, log-prior added to the logits (with "
        "--tau), margins, margins with deferred weights",
    )
    group.add_argument("--tau", type=_nonnegative, default=1.0, metavar="T", help="strength of logit adjustment")
    group.add_argument(
        "--cb-beta", type=number(least=0, most=1), default=0.9999, metavar="B", help="beta of effective numbers"
    )
    group.add_argument("--gamma", type=_nonnegative, default=1.0, metavar="G", help="exponent of the focal loss")
    group.add_argument("--ldam-margin", type=_positive, default=0.5, metavar="M", help="largest margin of LDAM")
    group.add_argument("--ldam-scale", type=_positive, default=30.0, metavar="S", help="factor of LDAM's cosines")
    group.add_argument(
        "--drw-start", type=_share, default=0.8, metavar="R", help="share of the epochs before deferred weights begin"
    )
    group.add_argument(
        "--sampler",
        choices=("none", "effective", "balanced"),
        default="none",
        help="draw images with replacement, classes weighted by effective numbers or equally",
    )


def _add_flags_without_effect(parser: Parser) -> None:
    group = parser.add_argument_group("accepted from the original, without effect")
    group.add_argument("--api-key", metavar="KEY", default=None, help=WITHOUT_EFFECT["api_key"])
    group.add_argument("--score_norm", type=int, default=1, metavar="N", help=WITHOUT_EFFECT["score_norm"])


def parse(argv: list[str] | None = None) -> Options:
    """Parsed and checked flags. ``resolved`` is the config of the run directory, for :func:`for_model`."""
    parser = build_parser()
    options = parser.parse_args(argv)
    given = options.explicit
    for name in sorted(given & WITHOUT_EFFECT.keys()):
        print(f"note: --{name.replace('_', '-')} has no effect: {WITHOUT_EFFECT[name]}", file=sys.stderr)
    if options.dataset == "digits":
        for name, value in DIGITS.items():
            if name not in given:
                setattr(options, name, value)
    _choose_imbalance(parser, options, given)
    _check(parser, options, given)
    config = parser.config_of(options)
    options.resolved = {key: value for key, value in config.items() if key.replace("-", "_") not in WITHOUT_EFFECT}
    return options


def runs_of(program: str, argv: list[str]) -> list[tuple[str, Options]]:
    """Family and flags of every run that a command makes (see ``gfml.program.commands``): one for each model."""
    if program != "main":
        return []
    options = parse(argv)
    return [("vision", for_model(options, name)) for name in options.model_name]


def for_model(options: Options, name: str) -> Options:
    """The flags of the one run that trains this model."""
    own = Options(**{**vars(options), "model_name": name})
    own.explicit = options.explicit
    own.resolved = {**options.resolved, "model-name": [name]}
    return own


def _choose_imbalance(parser: Parser, options: Options, given: frozenset[str]) -> None:
    """Type and factor together, or balanced."""
    long_tailed = options.dataset in IMBALANCED
    if options.imb_type is None:
        options.imb_type = "exp" if long_tailed or options.imb_factor is not None else "balanced"
    if options.imb_type == "balanced":
        if "imb_factor" in given and options.imb_factor not in (None, 1.0):
            parser.error("--imb-type balanced has no --imb-factor: drop one of them")
        options.imb_factor = None
    elif options.imb_factor is None:
        if not long_tailed:
            parser.error(f"--imb-type {options.imb_type} needs --imb-factor, such as 0.01")
        options.imb_factor = 0.01


def _check(parser: Parser, options: Options, given: frozenset[str]) -> None:
    names = options.model_name
    if len(set(names)) < len(names):
        parser.error("--model-name names a model twice: each has one run")
    if len(names) > 1 and {"run_name", "resume"} & given:
        parser.error("--run-name and --resume are for one run: give one --model-name")
    if "vit_gra" in names and options.mix_on and options.mix_mode == "split" and options.num_split > options.head:
        found = f"found --num_split {options.num_split} and --head {options.head}"
        parser.error(f"{found}: num_split may be 0 to the number of heads")
    if not options.num_split and not (options.mix_on and options.mix_mode == "split"):
        parser.error("--num_split 0, no gravity heads, belongs to --mix_on 1 --mix_mode split: add these or drop it")
    if options.hidden % options.head and {"vit", "vit_gra"} & set(names):
        parser.error(f"found --hidden {options.hidden} and --head {options.head}: heads must divide the width")
    if options.min_lr > options.lr:
        parser.error(f"found --min-lr {options.min_lr:g} above --lr {options.lr:g}")
    if options.long_tail == "focal" and options.label_smoothing:
        parser.error("the focal loss has no smoothed labels: drop --label-smoothing")
    if options.mirror != "off" and options.clip_grad is not None:
        parser.error("with --mirror give --mirror-clip instead of --clip-grad")
    if options.learn_lamb and options.lamb_gra == 0:
        parser.error("a learned lambda starts above 0: give --lamb_gra")
