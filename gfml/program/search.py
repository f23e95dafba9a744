"""Search over flags: spaces from TOML, the points to try, the commands they make, and following a trial's run.

    program = "recsys/main.py"
    flags = "--dataset lastfm --epochs 30"         # the same in every trial
    metric = "val/ndcg@20"                         # of validation; must be what selects the epoch of a run
    mode = "max"                                   # or "min"
    search = "random"                              # grid, random or optuna
    trials = 12                                    # not for grid, which tries every combination
    seed = 1                                       # of the points; a run's own seed is a flag

    [space]
    lr = { loguniform = [1e-3, 1e-1] }             # --lr 0.0123: four digits
    lamb = { uniform = [1, 5] }
    num-layers = { randint = [1, 4] }              # both ends included
    embedding-dim = { choice = [32, 64] }
    loss = { flags = ["--loss_mode bpr", "--loss_mode gravity --lamb 3"] }      # pieces of a command line

    [asha]                                         # stop the worse trials early
    grace = 4                                      # epochs that every trial gets
    reduction = 3                                  # at each rung one of so many goes on

    [resources]
    cpus = 1                                       # of each trial
    gpus = 0.25                                    # four trials share a device

Nothing here knows what carries the trials out; ``scripts/sweep.py`` does that with Ray Tune.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shlex
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gfml.base.errors import UserError, choice_error, suggest
from gfml.program.commands import Command, Launched, last_line, launch, read_command, stop

Value = str | int | float
Point = dict[str, Value]
SEARCHES = ("grid", "random", "optuna")
MODES = ("max", "min")
KINDS = ("choice", "flags", "uniform", "loguniform", "randint")
FOLLOW_SECONDS = 0.2


@dataclass(frozen=True)
class Dimension:
    """One varied flag. values: the choices, or the two ends of a range."""

    name: str
    kind: str
    values: tuple[Value, ...]

    @property
    def is_list(self) -> bool:
        return self.kind in ("choice", "flags")

    def at(self, share: float) -> Value:
        """The value at a share in [0, 1) of the dimension; numbers of ranges have four digits."""
        if self.is_list:
            return self.values[int(share * len(self.values))]
        low, high = self.values
        if self.kind == "randint":
            return int(low + share * (high - low + 1))
        if self.kind == "uniform":
            return self.rounded(low + share * (high - low))
        return self.rounded(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))

    def rounded(self, value: float) -> float:
        """Four significant digits, so that the command of a trial can be read and typed; within the range."""
        return min(max(float(f"{value:.4g}"), float(self.values[0])), float(self.values[1]))

    def words(self, value: Value) -> list[str]:
        """The value as words of a command line."""
        if self.kind == "flags":
            return shlex.split(str(value))
        text = str(value)
        # Written in two words it would be read as a flag.
        return (
            [f"--{self.name}={text}"] if text.startswith("-") and isinstance(value, str) else [f"--{self.name}", text]
        )


@dataclass(frozen=True)
class Asha:
    """Early stopping. grace: epochs before a trial may be stopped; reduction: one of so many passes each rung."""

    grace: int
    reduction: int


@dataclass(frozen=True)
class Spec:
    """A checked search; see the module's docstring. flags: those of every trial, further ones of the command line last."""

    name: str
    program: str
    flags: tuple[str, ...]
    space: tuple[Dimension, ...]
    metric: str
    mode: str
    search: str
    trials: int
    seed: int
    asha: Asha | None
    cpus: float
    gpus: float

    def words(self, point: Mapping[str, Value]) -> list[str]:
        """The command of one point."""
        varied = [word for dimension in self.space for word in dimension.words(point[dimension.name])]
        return ["python", self.program, *self.flags, *varied]

    def better(self, value: float, than: float | None) -> bool:
        """Whether one value of the metric is strictly better than another."""
        return than is None or (value > than if self.mode == "max" else value < than)

    def identity(self, root: Path) -> str:
        """Eight characters: the same as long as the same trials would be made in the same order.

        More trials, other resources and other places of data and runs do not count.
        """
        first = read_command(self.words(random_point(self.space, self.seed, 0)), root).runs[0]
        space = [[one.name, one.kind, one.values] for one in self.space]
        asha = self.asha and [self.asha.grace, self.asha.reduction]
        facts = [first.family, first.digest, space, self.metric, self.mode, self.search, self.seed, asha]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


# -- reading


def load_spec(path: Path, more: Sequence[str] = ()) -> Spec:
    """The search that a TOML file describes. more: words added to the flags. UserError names file, key and what was wanted."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the TOML file of a sweep") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    try:
        return spec_of(path.stem, content, more)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def spec_of(name: str, content: dict[str, Any], more: Sequence[str] = ()) -> Spec:
    """The search that the content of such a file describes; see :func:`load_spec`."""
    known = ("program", "flags", "metric", "mode", "search", "trials", "seed", "space", "asha", "resources")
    _only(content, known, "the file")
    for key in ("program", "metric", "search", "space"):
        if key not in content:
            raise UserError(f"it has no {key!r}, wanted it beside {', '.join(known)}")
    search, metric = _one_of("search", content["search"], SEARCHES), content["metric"]
    if not isinstance(metric, str) or not metric.startswith("val/"):
        raise UserError(
            f"found the metric {metric!r}, wanted one of validation such as 'val/ndcg@20': test is read once, by the winner"
        )
    space = tuple(_dimension(key, value) for key, value in _table(content, "space").items())
    if not space:
        raise UserError("[space] is empty, wanted at least one flag to vary")
    resources = _table(content, "resources")
    _only(resources, ("cpus", "gpus"), "[resources]")
    return Spec(
        name=name, program=str(content["program"]), flags=(*_words(content.get("flags", [])), *more), space=space, metric=metric,
        mode=_one_of("mode", content.get("mode", "max"), MODES), search=search, trials=_trials(content, search, space),
        seed=_number("seed", content.get("seed", 0), least=0, whole=True), asha=_asha(content),
        cpus=_number("cpus", resources.get("cpus", 1), least=0), gpus=_number("gpus", resources.get("gpus", 0), least=0),
    )  # fmt: skip


def _trials(content: Mapping[str, Any], search: str, space: Sequence[Dimension]) -> int:
    if search != "grid":
        return _number("trials", content.get("trials"), least=1, whole=True)
    if "trials" in content:
        raise UserError("a grid tries every combination: drop trials, or take search = 'random'")
    if wrong := next((one for one in space if not one.is_list), None):
        raise UserError(f"a grid needs lists, found {wrong.name} = {{ {wrong.kind} = ... }}: give choice or flags")
    return math.prod(len(one.values) for one in space)


def _asha(content: Mapping[str, Any]) -> Asha | None:
    if "asha" not in content:
        return None
    table = _table(content, "asha")
    _only(table, ("grace", "reduction"), "[asha]")
    return Asha(
        _number("grace", table.get("grace"), least=1, whole=True),
        _number("reduction", table.get("reduction", 3), least=2, whole=True),
    )


def _dimension(name: str, value: Any) -> Dimension:
    if not isinstance(value, dict) or len(value) != 1:
        raise UserError(f"found {name} = {value!r}, wanted one kind such as {name} = {{ choice = [1, 2] }}")
    [(kind, values)] = value.items()
    if kind not in KINDS:
        raise choice_error(f"kind of {name}", kind, KINDS)
    if not isinstance(values, list) or not values:
        raise UserError(f"found {name} = {{ {kind} = {values!r} }}, wanted a list")
    dimension = Dimension(name, kind, tuple(values))
    (_check_list if dimension.is_list else _check_range)(dimension)
    return dimension


def _check_list(one: Dimension) -> None:
    if any(isinstance(value, bool) for value in one.values):
        raise UserError(
            f"{one.name} has true or false among its choices: write switches as flags = ['', '--{one.name}']"
        )
    wanted = (str,) if one.kind == "flags" else (str, int, float)
    if not all(isinstance(value, wanted) for value in one.values) or len(set(one.values)) < len(one.values):
        raise UserError(
            f"found {one.name} = {list(one.values)!r}, wanted different {'texts' if one.kind == 'flags' else 'numbers or texts'}"
        )


def _check_range(one: Dimension) -> None:
    whole = one.kind == "randint"
    good = len(one.values) == 2 and all(
        isinstance(v, int if whole else (int, float)) and not isinstance(v, bool) for v in one.values
    )
    if not good or not one.values[0] < one.values[1] or (one.kind == "loguniform" and one.values[0] <= 0):
        numbers = "two whole numbers" if whole else "two numbers"
        above = " above 0" if one.kind == "loguniform" else ""
        raise UserError(
            f"found {one.name} = {{ {one.kind} = {list(one.values)!r} }}, wanted {numbers}{above}, the smaller first"
        )


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return shlex.split(value)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(f"found flags = {value!r}, wanted a text such as '--dataset lastfm --epochs 30'")
    return value


def _table(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = content.get(key, {})
    if not isinstance(table, dict):
        raise UserError(f"found {key} = {table!r}, wanted a table [{key}]")
    return table


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if wrong := next((key for key in table if key not in known), None):
        raise UserError(f"{where} sets the unknown key {wrong!r}, wanted {', '.join(known)}{suggest(wrong, known)}")


def _one_of(what: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise choice_error(what, value, known)
    return value


def _number(what: str, value: Any, *, least: float, whole: bool = False) -> Any:
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not value >= least:
        raise UserError(f"found {what} = {value!r}, wanted a {'whole ' if whole else ''}number >= {least:g}")
    return value


# -- points


def random_point(space: Sequence[Dimension], seed: int, index: int) -> Point:
    """A point as a function of seed and index, so that a longer search starts as a shorter one."""
    import numpy as np

    shares = np.random.default_rng([seed, index]).random(len(space))
    return {one.name: one.at(float(share)) for one, share in zip(space, shares, strict=True)}


def grid_points(space: Sequence[Dimension]) -> list[Point]:
    """Every combination of the choices, the last dimension fastest; none without a dimension."""
    names = [one.name for one in space]
    every = itertools.product(*(one.values for one in space)) if names else ()
    return [dict(zip(names, values, strict=True)) for values in every]


def planned_points(spec: Spec) -> list[Point]:
    """Every point of a grid or random search in order, each once. UserError when a random search has too few to find."""
    if spec.search == "grid":
        return grid_points(spec.space)
    found: dict[tuple[Value, ...], Point] = {}
    for index in range(100 * spec.trials):
        point = random_point(spec.space, spec.seed, index)
        found.setdefault(tuple(point.values()), point)
        if len(found) == spec.trials:
            return list(found.values())
    raise UserError(
        f"found only {len(found)} different points, wanted {spec.trials} trials: lower trials, or take search = 'grid'"
    )


def check_points(spec: Spec, root: Path) -> None:
    """UserError unless the program takes every point, makes one run of it and selects that run's epoch by the metric.

    For a search that invents its points on the way, the ends and choices of every dimension are checked around one point.
    """
    if spec.search == "optuna":
        middle = random_point(spec.space, spec.seed, 0)
        points = [{**middle, one.name: value} for one in spec.space for value in one.values]
    else:
        points = planned_points(spec)
    for point in points:
        _check_command(spec, read_command(spec.words(point), root))


def _check_command(spec: Spec, command: Command) -> None:
    if len(command.runs) > 1:
        raise UserError(f"found a command that makes {len(command.runs)} runs, wanted one for each trial: {command}")
    options = command.runs[0].options
    part = next((getattr(options, name) for name in ("es_on", "select_on") if hasattr(options, name)), "val")
    metric = next((getattr(options, name) for name in ("es_metric", "select_metric") if hasattr(options, name)), None)
    if part != "val":
        raise UserError(f"found runs that select on {part}, wanted selection on validation (in: {command})")
    if metric is not None and spec.metric != f"val/{metric}":
        raise UserError(
            f"found the metric {spec.metric!r}, but the runs select their epoch by {metric!r}: make them one (in: {command})"
        )
    epochs = getattr(options, "epochs", None)
    if spec.asha and epochs is not None and spec.asha.grace >= epochs:
        raise UserError(
            f"found grace = {spec.asha.grace} in [asha] and {epochs} epochs, wanted fewer: nothing could be stopped"
        )


# -- trials


def evaluations(path: Path | None, metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of every evaluation that a run has logged so far."""
    from gfml.base.runs import read_metrics

    rows = read_metrics(path) if path else []
    return [(row["epoch"], float(row[metric])) for row in rows if isinstance(row.get(metric), (int, float))]


@dataclass(frozen=True)
class Report:
    """One evaluation of a trial, or its end. value: the best so far. finished: the run is done. stored: known before this
    session. last: every epoch is trained."""

    epoch: int
    value: float | None
    finished: bool = False
    stored: bool = False
    last: bool = False


class Follower:
    """One trial: starts or continues its run if need be and reports every evaluation once, those of earlier sessions first.

    A run that another launcher has is only watched, and taken over should that launcher vanish. until: nothing is started, as
    for a trial that was stopped early after this epoch; then the reports end with it.
    """

    def __init__(self, spec: Spec, command: Command, root: Path, *, until: int | None = None) -> None:
        self.spec, self.command, self.root = spec, command, root
        self._until = until
        self._stored = max((epoch for epoch, _ in evaluations(command.runs[0].path(), spec.metric)), default=-1)
        self._work: Launched | None = None
        self._last = Report(-1, None)

    def next(self) -> Report | None:
        """Wait for the next report; None when there is none to come. UserError when the program fails."""
        while True:
            [run] = self.command.runs
            # In this order: what is done has logged everything.
            state = run.state()
            for epoch, value in evaluations(run.path(), self.spec.metric):
                if epoch > self._last.epoch and (self._until is None or epoch <= self._until):
                    best = value if self.spec.better(value, self._last.value) else self._last.value
                    last = epoch >= getattr(run.options, "epochs", math.inf)
                    self._last = Report(epoch, best, stored=epoch <= self._stored, last=last)
                    return self._last
            if self._until is not None:
                return None
            if state == "done":
                return self._end()
            self._attend(state)
            time.sleep(FOLLOW_SECONDS)

    def _end(self) -> Report | None:
        if self._last.value is None:
            raise UserError(f"the run {self.command.runs[0].path()} has no {self.spec.metric}: mend metric")
        if self._last.finished:
            return None
        self._last = replace(self._last, finished=True)
        return self._last

    def _attend(self, state: str) -> None:
        """Start the program when nobody runs it; notice its end."""
        if self._work is None:
            if state != "running":
                self._work = launch(self.command, self.root)
            return
        code = self._work.poll()
        if code is None:
            return
        self._work, after = None, self.command.state()
        if after not in ("done", "running"):
            raise UserError(f"exit code {code}: {last_line(self.command.log)} ({self.command.log})")

    def stop(self) -> None:
        """End the program as Ctrl-C does; the run stays incomplete."""
        if self._work is not None:
            stop([self._work])
            self._work = None
