"""Settings of the Mirror Gradient program and the files behind them. Imports nothing heavy: ``--help`` is quick.

Later wins: default, ``configs/mirror_grad/overall.toml``, ``dataset/NAME.toml``, ``model/NAME.toml``, ``mirror.toml``
(with mirror gradient on), the files of ``--config``, the command line. A continued run reads its own config alone. The
chosen model's hyper-parameters are flags of their own; another model's are refused. Flags of the published programs are
accepted under their names.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gfml.base import settings as kinds
from gfml.base.errors import UserError, suggest
from gfml.base.home import configs
from gfml.base.settings import Settings, about, changed, flags_of, inert, setting
from gfml.data.options import DataSettings, DemoSettings
from gfml.program.cli import Parser
from gfml.program.flags import JudgingSettings, MirrorSettings, RunSettings
from gfml.program.search import Dimension, grid_points
from mirror_grad.models import MODELS

PROGRAM_FILE = "mirror_grad/main.py"
# The published programs' names for data that this one knows by a longer one.
DATASETS = {"baby": "amazon-baby", "sports": "amazon-sports", "clothing": "amazon-clothing"}
FEATURES = ("auto", "none", "tfidf-svd", "hashing", "random")
# What a control arm does instead of the mirror step; "mg" leaves --mirror as it is.
ARMS = {"mg": None, "equal-steps": "repeat", "equal-lr": "off", "equal-grid": "off", "true-ascent": "precond"}
# Learning rates of the arm equal-grid, as factors: as many tries as the published search of alpha2.
EQUAL_GRID = (0.5, 1.0, 2.0)
MIRROR_GRID = {"mirror-alpha2": (0.1, 0.2, 0.3)}


@dataclass(frozen=True)
class ModelSettings(Settings):
    """model"""

    model: str = setting("SELFCFED_LGN", "recommender", choices=MODELS, also="-m")
    behaviour: str = setting(
        "fixed",
        "published: also what the published code gets wrong; recorded in the run",
        choices=("fixed", "published"),
    )
    embedding_dim: int = setting(64, "width of the vectors", kinds.count, unit="D", also="embedding_size")


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """item features"""

    features: str = setting(
        "auto",
        "auto: image_feat.npy, text_feat.npy or features.npz in the data's folder; none; tfidf-svd or hashing: from the "
        "items' titles; random: noise, only for timing; or a file or folder",
        unit="WHAT",
    )
    item_text: str | None = setting(
        None, "titles for tfidf-svd and hashing (default: the folder's own file)", unit="FILE"
    )
    modalities: tuple[str, ...] = setting(("image", "text"), "features to use", nargs="+", choices=("image", "text"))
    text_width: int = setting(384, "width of tfidf-svd and hashing features", kinds.count, unit="F")
    random_widths: tuple[int, int] = setting(
        (4096, 384),
        "widths of random features; the default is that of the published ones",
        kinds.count,
        nargs=2,
        unit=("IMAGE", "TEXT"),
    )
    fill_missing: str = setting(
        "mean",
        "row of an item without features; mean of the others as published, which is near to every item where features are not "
        "centred, as those of networks are not; zero is near to none",
        choices=("mean", "zero"),
    )
    feature_dtype: str = setting(
        "float32",
        "bfloat16 holds and multiplies features that are not trained in 16 bits: half the memory; see the README for what it costs",
        choices=("float32", "bfloat16"),
        late=True,
    )
    keep_cold_users: bool = setting(False, "also judge users without train interactions")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """training"""

    learning_rate: float = setting(1e-3, "learning rate of the first epoch", kinds.positive, also="lr")
    learning_rate_scheduler: tuple[float, float] = setting(
        (1.0, 50.0),
        "the learning rate of epoch e = 0, 1, ... is multiplied by BASE^(e / PERIOD)",
        kinds.positive,
        nargs=2,
        unit=("BASE", "PERIOD"),
    )
    weight_decay: float = setting(0.0, "L2 decay inside the optimizer", kinds.nonnegative, unit="W")
    learner: str = setting("adam", "optimizer", choices=("adam", "sgd", "adagrad", "rmsprop"))
    batch_size: int = setting(2048, "train pairs a step", kinds.count, unit="B", also="train_batch_size")
    epochs: int = setting(1000, "largest number of epochs", kinds.whole, unit="N")
    clip_grad_norm: float | None = setting(None, "largest gradient norm, or none", kinds.norm, unit="NORM")
    grid: tuple[str, ...] | None = setting(
        None,
        "try every combination of these values, each a run of its own, and select on --select-on; published: the lists of "
        "the published search",
        nargs="+",
        unit="NAME=V,V",
    )


@dataclass(frozen=True)
class MirrorGradientSettings(MirrorSettings):
    """mirror gradient"""

    not_mg: bool = setting(False, "ordinary training; the same as --mirror off")
    mirror: str = changed(MirrorSettings, "mirror", "two_step", help="kind of the mirror step; two_step as published")
    mirror_arm: str = setting(
        "mg",
        "control arm: equal-steps takes the extra step without inverting it; equal-lr trains plainly with the learning rate "
        "that moves Adam as far; equal-grid trains plainly with as many tries; true-ascent inverts with Adam's second "
        "moments alone",
        choices=ARMS,
    )
    mirror_alpha1: float = changed(MirrorSettings, "mirror_alpha1", 1.0, kind=kinds.positive, also="alpha1")
    mirror_alpha2: float = changed(MirrorSettings, "mirror_alpha2", 0.2, kind=kinds.nonnegative, also="alpha2")
    mirror_every: int = changed(MirrorSettings, "mirror_every", 3, also="beta")
    mirror_clip: float | None = changed(
        MirrorSettings, "mirror_clip", None, help="the same as --clip-grad-norm, or none", late=True
    )
    mirror_counter: str = setting(
        "epoch",
        "epoch: counting starts again with every epoch, as published; global: as printed in the paper",
        choices=("epoch", "global"),
    )
    mirror_phase: int = setting(0, "mirror batch i when i mod every = N", kinds.whole, unit="N")
    mirror_rng: str = setting(
        "fresh", "replay: dropout and sampled edges are the same in both steps", choices=("fresh", "replay")
    )
    mirror_wd: str = setting("both", "which step decays the weights", choices=("both", "first", "once"))
    mirror_clip_halves: str = setting(
        "both", "which step is clipped; second as published, for two_step", choices=("both", "second")
    )
    mirror_diagnostics: bool = setting(False, "log gradient norms and cosines of mirrored batches")


@dataclass(frozen=True)
class MirrorJudgingSettings(JudgingSettings):
    """evaluation and selection"""

    topks: tuple[int, ...] = changed(JudgingSettings, "topks", (5, 10, 20, 50), also="topk")
    select_on: str = changed(
        JudgingSettings,
        "select_on",
        "val",
        help="what chooses the epoch and the grid's winner; test: optimistic, labelled in every result",
    )
    select_metric: str = changed(
        JudgingSettings,
        "select_metric",
        "recall@5",
        help="what is highest at the chosen epoch",
        kind=str.lower,
        also="valid_metric",
    )
    test_mask: str = setting(
        "seen",
        "what the test lists leave out: train and validation items, or train items alone as published",
        choices=("seen", "train"),
    )
    published_protocol: bool = setting(
        False, "judge as published: --test-mask train (validation items stay in the test lists) and --round-metrics 4"
    )
    round_metrics: int | None = setting(
        None,
        "round metrics before stopping and selecting; published: 4",
        kinds.number(int, least=1, none=True),
        unit="DIGITS",
    )
    patience: int | None = changed(
        JudgingSettings,
        "patience",
        20,
        help="stop at the evaluation after N in a row without a better one, or none",
        also="stopping_step",
    )
    eval_every: int | None = changed(JudgingSettings, "eval_every", 1, also="eval_step")
    refit: bool = changed(JudgingSettings, "refit", False, late=True)
    baselines: tuple[str, ...] = changed(JudgingSettings, "baselines", ("popularity",))
    eval_batch_size: int | None = inert(
        None, "evaluation chooses its blocks by memory; results do not depend on them", kind=int, unit="N"
    )


@dataclass(frozen=True)
class MirrorGradSettings(
    RunSettings, MirrorJudgingSettings, MirrorGradientSettings, TrainingSettings, FeatureSettings, DemoSettings,
    DataSettings, ModelSettings,
):  # fmt: skip
    """all settings of mirror_grad/main.py that every model has"""

    dataset: str = changed(DataSettings, "dataset", "baby", also="-d")
    seed: int = changed(RunSettings, "seed", 999)
    weights: str | None = setting(
        None, "judge these stored weights and train nothing; --resume FILE says the same", unit="FILE", beside=True
    )

    @property
    def settings(self) -> Any:
        """The hyper-parameters of the chosen model."""
        kind = MODELS[self.model].settings
        return kind(**{one.name: getattr(self, one.name) for one in dataclasses.fields(kind)})

    @classmethod
    def translate(cls, tokens: list[str]) -> list[str]:
        """``--resume FILE`` names weights to judge; a config beside them is the base of the flags."""
        for place, token in enumerate(tokens):
            name, equals, value = token.partition("=")
            if name == "--resume" and (equals or place + 1 < len(tokens)):
                value = value if equals else tokens[place + 1]
                if not Path(value).exists():
                    found = f"there is no {value}"
                    raise UserError(
                        f"{found}: give --resume a run directory to continue, or a file of weights to judge"
                    )
                if not Path(value).is_file():
                    return tokens
                rest = tokens[:place] + tokens[place + (1 if equals else 2) :]
                beside = Path(value).resolve().parent / "config.toml"
                return [*([f"--config={beside}"] if beside.is_file() else []), *rest, f"--weights={value}"]
        return tokens

    @classmethod
    def choose(cls, tokens: Sequence[str]) -> type:
        model = _scan(tokens).model
        found = settings_of(model)
        _refuse_flags_of_others(found, model, tokens)
        return found

    @classmethod
    def layers(cls, tokens: Sequence[str]) -> list[str]:
        return [f"--config={path}" for path in layers(_scan(tokens))]

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        options.dataset = DATASETS.get(options.dataset, options.dataset)
        if options.behaviour == "published" and not MODELS[options.model].has_published:
            print(f"note: published and fixed {options.model} are the same", file=sys.stderr)
        if options.published_protocol:
            options.test_mask, options.round_metrics = "train", 4
        _choose_mirror(options)
        super().resolve(options)
        _check(options)
        grid_space(cls, options)
        options.unused = frozenset({"not_mg", "grid", "weights", "published_protocol"})

    @property
    def space(self) -> tuple[Dimension, ...]:
        """What ``--grid`` (or the arm equal-grid) tries, as a sweep's space; empty without one."""
        return grid_space(type(self), self)

    def each(self) -> Sequence[Any]:
        from mirror_grad.main import PROGRAM

        points = grid_points(self.space)
        if points and (self.run_name or self.resume or self.eval_only):
            raise UserError("--grid makes runs with names of their own: drop --run-name, --resume and --eval-only")
        same = self.resolved | {"overwrite": self.overwrite, "progress": self.progress}
        return [
            PROGRAM.of(same, grid=["none"], **{name.replace("-", "_"): value for name, value in point.items()})
            for point in points
        ] or [self]


@cache
def settings_of(model: str) -> type[MirrorGradSettings]:
    """The settings of one model's command line. The published names alpha1, alpha2 and beta are the mirror's where the
    model has no hyper-parameter of that name."""
    if model not in MODELS:
        return MirrorGradSettings
    own = MODELS[model].settings
    fields: dict[str, Any] = {"__annotations__": {"model": "str"}, "__doc__": MirrorGradSettings.__doc__}
    # Models may be added while the program runs.
    fields["model"] = changed(MirrorGradSettings, "model", "SELFCFED_LGN", choices=MODELS)
    for name, old in (("mirror_alpha1", "alpha1"), ("mirror_alpha2", "alpha2"), ("mirror_every", "beta")):
        if old in about(own):
            default = MirrorGradSettings.__dataclass_fields__[name].default
            fields[name] = changed(MirrorGradSettings, name, default, also="")
            fields["__annotations__"][name] = "Any"
    return dataclass(frozen=True)(type(f"{model}Settings", (MirrorGradSettings, own), fields))


class _Chosen(NamedTuple):
    """What decides the layers: found before the real parse, unchecked."""

    model: str
    dataset: str
    mirrored: bool
    resume: str | None


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


def arm_of(options: Any) -> str:
    """What a run is in a table of arms: plain, mg, or the name of its control arm."""
    if options.mirror_arm == "mg":
        return "plain" if options.mirror == "off" else "mg"
    return options.mirror_arm


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


def _refuse_flags_of_others(settings: type, model: str, tokens: Sequence[str]) -> None:
    """A hyper-parameter that only other models have is an error that names them."""
    known = {flag.replace("_", "-") for name, told in about(settings).items() for flag in flags_of(name, told)}
    known |= {f"--no-{flag[2:]}" for flag in known}
    for token in tokens:
        flag = token.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            owners = [name for name, entry in MODELS.items() if flag[2:].replace("-", "_") in about(entry.settings)]
            if owners:
                _refuse(
                    f"{flag} is a hyper-parameter of {', '.join(owners)}, not of {model}: drop it or choose another --model"
                )


def _refuse(message: str) -> NoReturn:
    Parser(prog=PROGRAM_FILE).error(message)


def _choose_mirror(options: argparse.Namespace) -> None:
    """Fold ``--not_mg`` and ``--mirror-arm`` into ``--mirror``."""
    if options.not_mg:
        if options.mirror_arm != "mg":
            raise UserError(f"found --not_mg and --mirror-arm {options.mirror_arm}: give one of them")
        options.mirror = "off"
    wanted = ARMS[options.mirror_arm]
    if wanted == "precond" and options.learner != "adam":
        wanted = "sgd_mirror"
    if wanted is not None:
        if "mirror" in options.explicit and options.mirror not in (wanted, "two_step"):
            raise UserError(
                f"found --mirror {options.mirror} and --mirror-arm {options.mirror_arm}, which is --mirror {wanted}: give one of them"
            )
        options.mirror = wanted
    if not MODELS[options.model].trains and options.mirror != "off":
        if options.mirror_arm != "mg" or {"mirror", "not_mg"} & options.explicit:
            print(f"note: {options.model} is not trained: mirror gradient changes nothing", file=sys.stderr)
        options.mirror, options.mirror_arm = "off", "mg"


def _check(options: argparse.Namespace) -> None:
    if options.mirror != "off" and options.mirror_alpha1 <= options.mirror_alpha2:
        raise UserError(
            f"found --mirror-alpha1 {options.mirror_alpha1} and --mirror-alpha2 {options.mirror_alpha2}, wanted alpha1 > alpha2"
        )
    if options.mirror != "off" and options.mirror_phase >= options.mirror_every:
        raise UserError(
            f"found --mirror-phase {options.mirror_phase}, wanted less than --mirror-every {options.mirror_every}"
        )
    if options.mirror_clip_halves == "second" and options.mirror not in ("off", "two_step"):
        raise UserError(f"--mirror-clip-halves second is defined for --mirror two_step, not {options.mirror}")
    if options.feature_dtype != "float32":
        mapping = [name for name, entry in MODELS.items() if entry.maps_features]
        if options.model not in mapping:
            raise UserError(
                f"found --feature-dtype {options.feature_dtype} with {options.model}, which has no linear map of features, "
                f"wanted float32 or one of {', '.join(mapping)}"
            )
        if getattr(options, "train_features", False):
            raise UserError(
                f"found --feature-dtype {options.feature_dtype} with {options.model}, which trains its features, "
                "wanted --no-train-features beside it, or float32"
            )


def grid_space(settings: type, options: Any) -> tuple[Dimension, ...]:
    """The dimensions of ``--grid`` and of the arm equal-grid."""
    words = [] if options.grid is None or tuple(options.grid) == ("none",) else list(options.grid)
    known = {
        flag.replace("_", "-"): flags_of(name, told)[0]
        for name, told in about(settings).items()
        for flag in flags_of(name, told)
    }
    lists: dict[str, Sequence[object]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if word == "published":
            own = about(MODELS[options.model].settings).items()
            lists |= {flags_of(one, told)[0]: told.grid for one, told in own if told.grid}
            lists |= {f"--{key}": values for key, values in MIRROR_GRID.items()} if options.mirror != "off" else {}
            continue
        flag = f"--{name.lstrip('-').replace('_', '-')}"
        if not equals or not values:
            raise UserError(f"found --grid {word!r}, wanted published or NAME=V,V such as learning-rate=0.001,0.0005")
        if flag not in known:
            raise UserError(f"unknown flag {flag}{suggest(flag, known) or '; see --help'}")
        lists[known[flag]] = values.split(",")
    alone = options.resume or options.eval_only
    if options.mirror_arm == "equal-grid" and options.grid is None and not alone:
        lists = {"--learning-rate": [options.learning_rate * factor for factor in EQUAL_GRID]}
    return tuple(Dimension(flag[2:], "choice", tuple(map(str, values))) for flag, values in lists.items())
