"""Settings of the Collaborative Metric Learning program and the rules between them. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from gfml.base import settings as kinds
from gfml.base.errors import UserError
from gfml.base.settings import Settings, about, changed, setting
from gfml.data.options import DataSettings, DemoSettings
from gfml.program.flags import JudgingSettings, MirrorSettings, RunSettings

ANN = ("off", "auto", "faiss", "sklearn")
# What --dataset auto means, and the cut of the paper.
USUAL_DATA = "ml1m"
USUAL_SPLIT, USUAL_RATIOS = "per-user", (0.6, 0.2, 0.2)
# As in the published programs.
LEARNING_RATES = {"adagrad": 0.1, "adam": 1e-3}


@dataclass(frozen=True)
class ModelSettings(Settings):
    """model and loss; distances are squared"""

    embedding_dim: int = setting(100, "width of the vectors", kinds.count, unit="D", also="dim", symbol="r")
    margin: float = setting(0.5, "safety margin, in squared-distance units", kinds.nonnegative, unit="M", symbol="m")
    clip_norm: float = setting(1.0, "radius of the ball", kinds.positive, unit="R")
    init_std: float | None = setting(None, "deviation of the initial vectors; none: 1 / sqrt(D)", kinds.norm, unit="S")
    rank_weight: bool = setting(True, "weight pairs by log(1 + rank)")
    rank_floor: bool = setting(True, "round the estimated rank down, as in the paper")
    reduction: str = setting("sum", "of the hinge over a batch", choices=("sum", "mean"))
    cov_weight: float = setting(0.0, "weight of the covariance penalty", kinds.nonnegative, unit="L", symbol="lambda_c")
    cov_form: str = setting(
        "squared",
        "squared: sum of squared off-diagonal entries; paper: as printed; signed: as released by the authors",
        choices=("squared", "paper", "signed"),
    )


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """item features"""

    features: str | None = setting(
        None,
        ".npz, .npy, .csv, .tsv, .item or .dat with ids; also a file name in the data set's own folder",
        unit="FILE",
        also="feature-file",
    )
    feature_columns: tuple[str, ...] | None = setting(
        None, "use only these tables or columns of the file", nargs="+", unit="NAME"
    )
    feature_norm: str = setting(
        "standard", "standard: columns centred, every table scaled to deviation 1", choices=("standard", "none")
    )
    feature_weight: float = setting(1.0, "weight of the feature loss", kinds.nonnegative, unit="L", symbol="lambda_f")
    feature_scale: float = setting(0.5, "factor on the network's output", kinds.positive, unit="S")
    hidden_dim: int = setting(256, "hidden width of the network", kinds.count, unit="H", also="hidden")
    dropout: float = setting(
        0.5, "probability that a hidden unit is dropped", kinds.number(least=0, most=0.99), unit="P"
    )
    feature_lr: float = setting(1e-3, "learning rate of the network, which takes Adam always", kinds.positive, unit="X")
    cold_offset: float = setting(
        0.5,
        "cold items rank by the squared distance to their projection plus C mean squared errors of the network; paper: 0",
        kinds.nonnegative,
        unit="C",
    )
    hide_items: float = setting(
        0.0,
        "take this share of the items out of train and validation, to see how features place cold items",
        kinds.number(least=0, most=0.9),
        unit="R",
    )
    item_info: str | None = setting(
        None,
        "titles and genres for the report (default: those of MovieLens where they are found)",
        unit="FILE",
        beside=True,
    )


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """training"""

    optimizer: str = setting("adagrad", "how the vectors are moved", choices=LEARNING_RATES)
    lr: float | None = setting(None, "learning rate of the vectors (default: 0.1 adagrad, 0.001 adam)", kinds.positive)
    accumulator: float = setting(
        0.0, "AdaGrad's initial sum of squares; 0.1 in TensorFlow", kinds.nonnegative, unit="A"
    )
    batch_size: int = setting(10_000, "pairs per step", kinds.count, unit="B", symbol="N")
    epochs: int = setting(50, "largest number of epochs; each meets every train pair once", kinds.whole, unit="N")
    num_neg: int = setting(10, "negatives per pair; the nearest one counts", kinds.count, unit="U")
    sampler: str = setting("uniform", "how negatives are drawn", choices=("uniform", "popularity", "two-stage"))
    candidates: int = setting(2000, "candidates per batch of --sampler two-stage", kinds.count, unit="C")
    refresh: int = setting(100, "batches between looks at the vectors, --sampler two-stage", kinds.count, unit="N")
    clip_grad: float | None = setting(None, "largest gradient norm, or none", kinds.norm, unit="NORM")


@dataclass(frozen=True)
class CMLJudgingSettings(JudgingSettings):
    """evaluation and selection"""

    topks: tuple[int, ...] = changed(JudgingSettings, "topks", (50, 100))
    select_metric: str = changed(JudgingSettings, "select_metric", "recall@50")
    patience: int | None = changed(JudgingSettings, "patience", 5)
    ann: str = setting(
        "off",
        "export item vectors with a nearest-neighbour index and its recall; auto: faiss if installed, else scikit-learn",
        nargs="?",
        const="auto",
        choices=ANN,
        beside=True,
    )


@dataclass(frozen=True)
class CMLSettings(
    RunSettings, MirrorSettings, CMLJudgingSettings, TrainingSettings, FeatureSettings, ModelSettings, DemoSettings,
    DataSettings,
):  # fmt: skip
    """all settings of cml_baseline/main.py"""

    dataset: str = changed(DataSettings, "dataset", "auto")

    @property
    def only_shown(self) -> bool:
        """An index can be asked for later."""
        return super().only_shown and self.ann == "off"

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        """Defaults that depend on other flags or on which data is there are filled in."""
        super().resolve(options)
        if options.lr is None:
            options.lr = LEARNING_RATES[options.optimizer]
        if options.mirror != "off" and options.features and options.optimizer != "adam":
            raise UserError(
                "--mirror with --features needs one optimizer for points and network: give --optimizer adam"
            )
        _check_owners(cls, options)
        _choose_data(options)


def _check_owners(settings: type, options: argparse.Namespace) -> None:
    """A setting other than its default belongs to the one it serves."""
    of_features = [name for name in about(FeatureSettings) if name not in ("features", "hide_items", "item_info")]
    belongs = dict.fromkeys(of_features, ("--features FILE", bool(options.features)))
    belongs |= dict.fromkeys(("candidates", "refresh"), ("--sampler two-stage", options.sampler == "two-stage"))
    belongs |= {"accumulator": ("--optimizer adagrad", options.optimizer == "adagrad")}
    for name, (owner, present) in belongs.items():
        # A stored config names every flag: only a value other than the default contradicts.
        default = settings.__dataclass_fields__[name].default
        if name in options.explicit and getattr(options, name) not in (None, default) and not present:
            raise UserError(f"--{name.replace('_', '-')} belongs to {owner}")


def _choose_data(options: argparse.Namespace) -> None:
    """MovieLens-1M where it lies, else the demo; the paper's cut for data that is published uncut."""
    from gfml.data import registry

    if options.dataset == "auto":
        roots = registry.data_roots(options.data_root)
        here = registry.locate(registry.known_sets()[USUAL_DATA], roots) is not None
        options.dataset = USUAL_DATA if here else "demo"
        why = "its files are here" if here else "MovieLens-1M is not in " + ", ".join(map(str, roots))
        print(f"data: {'MovieLens-1M' if here else 'the embedded demo'} ({why})", file=sys.stderr)
    known = registry.known_by(options.dataset)
    uncut = options.dataset not in registry.GENERATED and (known.split is not None if known else True)
    if uncut and options.split is None and options.split_ratios is None and not Path(options.dataset).is_dir():
        options.split, options.split_ratios = USUAL_SPLIT, USUAL_RATIOS
