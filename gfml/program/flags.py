"""Settings that programs share: the machine and the run directory, the mirror step, judging and selection."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gfml.base import settings as kinds
from gfml.base.errors import UserError
from gfml.base.settings import Settings, TopksAction, fill, setting

# Simple recommenders judged beside a model, and the ranking metrics that may select.
BASELINES = ("popularity", "item-knn", "ease", "ials")
TUNED = {"item-knn": ("k", "shrink"), "ease": ("l2",), "ials": ("alpha0", "l2")}
METRICS = ("recall", "ndcg", "precision", "hit", "mrr", "map")
CONVENTIONS = ("recbole", "warprec", "elliot", "rectools", "cornac", "mmrec", "lightgcn", "trec")
GAINS = ("linear", "exp", "exp1")
GRADED = "add graded_ndcg with the gain r, 2^r - 1 or 2^(r+1) - 1 of the ratings r in the truth; --metrics-as then reads them too"
MIRROR_MODES = ("off", "two_step", "fused", "precond", "sgd_mirror", "backstitch", "repeat")


@dataclass(frozen=True)
class RunSettings(Settings):
    """run"""

    seed: int = setting(2020, "seed of every generator", kinds.number(int, least=0, most=2**32 - 1), unit="N")
    device: str = setting("auto", "where to compute", kinds.device, unit="{auto,cpu,cuda,cuda:N}", beside=True)
    gpu_id: int = setting(
        0,
        "old name of --device cuda:N; the CPU is used where there is no CUDA device",
        kinds.whole,
        unit="N",
        beside=True,
    )
    threads: int = setting(
        0,
        "most CPU threads, of which small work takes fewer; 0: as many as PyTorch finds",
        kinds.number(int, least=0, most=1024),
        unit="N",
        beside=True,
    )
    tf32: str = setting(
        "auto",
        "CUDA products of float32 numbers with 10 bits of mantissa; auto: convolutions alone, as torch has it",
        choices=("auto", "0", "1"),
        beside=True,
    )
    cuda_graph: str = setting(
        "auto", "record training steps on CUDA: faster, same numbers", choices=("auto", "0", "1"), beside=True
    )
    out: str = setting("runs", "directory that holds the run directories", unit="DIR", beside=True)
    run_name: str | None = setting(None, "name of the run directory instead of the automatic one", unit="NAME")
    config: tuple[str, ...] | None = setting(
        None, "TOML file of flags; a later file wins", unit="FILE", action="append"
    )
    resume: str | None = setting(None, "continue this run; its config.toml is the base of the flags", unit="RUN_DIR")
    load: int = setting(
        0, "1: insist on continuing the earlier run of these flags", choices=(0, 1), beside=True, late=True
    )
    overwrite: bool = setting(False, "start anew; an earlier run is kept as NAME~1, NAME~2, ...")
    eval_only: bool = setting(False, "evaluate the best weights of the run, train nothing")
    checkpoint_every: int = setting(
        10, "epochs between checkpoints; every evaluation writes one too", kinds.count, unit="N", beside=True
    )
    progress: bool | None = setting(None, "progress bar; without the flag, only on a terminal", bool, beside=True)
    tensorboard: int = setting(0, "write TensorBoard files", choices=(0, 1), beside=True)
    report: int = setting(1, "write the report with its plots", choices=(0, 1), beside=True, late=True)
    amp: bool = setting(False, "bfloat16 autocast; distances stay in float32", late=True)
    compile: bool = setting(False, "torch.compile the loss", late=True)

    @property
    def only_shown(self) -> bool:
        """Whether nothing is made of a finished run of these settings but what it prints."""
        anew = self.overwrite or self.eval_only
        return not anew and self.device in ("auto", "cpu") and "gpu_id" not in self.explicit


@dataclass(frozen=True)
class MirrorSettings(Settings):
    """mirror gradient"""

    mirror: str = setting("off", "kind of the mirror step", choices=MIRROR_MODES)
    mirror_alpha1: float = setting(1.0, "factor of the descending step", kinds.any_number, unit="A")
    mirror_alpha2: float = setting(0.2, "factor of the inverted, ascending step", kinds.any_number, unit="A")
    mirror_every: int = setting(3, "a mirror step every N batches", kinds.count, unit="N")
    mirror_clip: float | None = setting(None, "largest gradient norm, or none", kinds.norm, unit="NORM")

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        super().resolve(options)
        if options.mirror != "off" and getattr(options, "clip_grad", None) is not None:
            raise UserError("with --mirror give --mirror-clip instead of --clip-grad")


@dataclass(frozen=True)
class DefinitionSettings(Settings):
    """definitions of the metrics"""

    metrics_as: tuple[str, ...] | None = setting(
        None,
        f"add figures as another framework defines them: {', '.join(CONVENTIONS)}; see docs/metrics.md",
        nargs="+",
        choices=CONVENTIONS,
        beside=True,
    )
    map_denominator: str = setting(
        "min",
        "what map divides by: min(T, K), K, or T, the number of a user's held-out items",
        choices=("min", "k", "n"),
        beside=True,
    )
    graded: str | None = setting(None, GRADED, choices=GAINS, beside=True)


@dataclass(frozen=True)
class JudgingSettings(DefinitionSettings):
    """evaluation and selection"""

    topks: tuple[int, ...] = setting((20,), "list lengths, such as 10 20", nargs="+", action=TopksAction, unit="K")
    select_on: str = setting(
        "val",
        "test: the original's protocol, selection on the reported split; labelled in every result",
        choices=("val", "test"),
    )
    select_metric: str = setting("ndcg@20", "what selects the epoch", unit="NAME@K")
    patience: int | None = setting(
        None,
        "evaluations without a better one before stopping, or none",
        kinds.number(int, least=1, none=True),
        unit="N",
    )
    eval_every: int | None = setting(
        1,
        "epochs between evaluations; none: about as many steps as on the demo",
        kinds.number(int, least=1, none=True),
        unit="N",
    )
    refit: bool = setting(
        False, "report a model trained anew on train and validation for the selected number of epochs"
    )
    baselines: tuple[str, ...] = setting(
        BASELINES, "simple recommenders judged beside the model", nargs="+", choices=(*BASELINES, "none"), beside=True
    )
    baseline_grid: tuple[str, ...] | None = setting(
        None,
        "values of a baseline's setting to search on validation in place of the usual ones: item-knn.k=50,100 "
        "item-knn.shrink=10 ease.l2=200 ials.alpha0=0.05 ials.l2=0.02; a single value is taken as it is",
        nargs="+",
        unit="NAME.SETTING=V,...",
        beside=True,
    )

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        super().resolve(options)
        if is_own(options.dataset):
            fill(options, {"eval_every": None})
        if options.select_on == "test" and options.refit:
            raise UserError("--refit needs selection on validation; --select-on test trains on all train pairs already")
        check_metric(options.select_metric, cls.other_metrics())
        if "none" in options.baselines and len(options.baselines) > 1:
            raise UserError("--baselines none cannot stand beside others")
        baseline_grids(options.baseline_grid)

    @classmethod
    def other_metrics(cls) -> tuple[str, ...]:
        """What may select beside the ranking metrics, without a cut-off."""
        return ()


def is_own(dataset: str) -> bool:
    """Whether a data set is a file or folder of the user's, not one known by name."""
    if dataset in ("demo", "synthetic", "auto"):
        return False
    from gfml.data import registry

    return registry.known_by(dataset) is None


def check_metric(metric: str, others: tuple[str, ...] = ()) -> None:
    """UserError unless it is one of ``others``, or a ranking metric with a cut-off."""
    name, _, k = metric.partition("@")
    if metric not in others and (name not in METRICS or not re.fullmatch(r"[1-9][0-9]*", k)):
        wanted = f"{', '.join((*others, *METRICS))} with a cut-off, such as ndcg@20"
        raise UserError(f"found --select-metric {metric!r}, wanted one of {wanted}")


def baseline_grids(words: Sequence[str] | None) -> dict[str, dict[str, tuple[float, ...]]]:
    """{baseline: {setting: values in ascending order}} of ``--baseline-grid``."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for word in words or ():
        left, _, right = word.partition("=")
        name, _, own = left.partition(".")
        try:
            values = sorted({(int if own == "k" else float)(value) for value in right.split(",")})
        except ValueError:
            values = []
        if own not in TUNED.get(name, ()) or not values:
            known = ", ".join(f"{name}.{own}" for name, settings in TUNED.items() for own in settings)
            raise UserError(f"found --baseline-grid {word}, wanted NAME=NUMBER,... with a name of {known}")
        found.setdefault(name, {})[own] = tuple(values)
    return found
