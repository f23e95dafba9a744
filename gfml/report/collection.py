"""One page about many runs: what was tried, what mattered, and the best settings ready to use.

    python scripts/report.py runs/sweeps/recsys-lastfm-1a2b3c4d       a sweep of scripts/sweep.py
    python scripts/report.py runs/recsys-lastfm-* --out report        any runs of one program, or the folder that holds them

Writes a self-contained report.html (and report.md with its plots) and best.toml, a ``--config``: a table, parallel
coordinates, the importance of each flag, learning curves, and the settings and test figures of the run that is best on
validation. Reads run directories alone; trains nothing and shows test figures of the best run only.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.base.runs import read_config, read_trials
from gfml.base.toml import toml_text
from gfml.program.cli import Parser
from gfml.report.page import COLORS, TEXT, Cell, Curves, Page, best_rows, figure_of, panels, styled
from gfml.report.sections import colors_of, draw_learning, duration, headline, intervals_of, metric_cells, record
from gfml.report.stored import BESIDE, StoredRun, flag_value, read_runs, varied

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_CURVES = 8
LEAST_TRIALS = 6
TREES, FOLDS, REPEATS = 100, 5, 3


def build_parser() -> Parser:
    """The command line of ``scripts/report.py``."""
    parser = Parser(prog="gfml report", description="One page about a whole sweep or any runs of one program.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a sweep directory, run directories, or a folder of runs"
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="what ranks the runs, such as val/ndcg@20 (default: what selected their epochs)",
    )
    parser.add_argument(
        "--mode", choices=("max", "min"), help="whether more or less is better (default: the sweep's, else max)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: report in the sweep, or beside the runs)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    found = collect([Path(path) for path in options.runs], options.metric, options.mode)
    folder = found.folder or Path(os.path.commonpath([trial.run.path.absolute().parent for trial in found.trials]))
    print(write_report(found, Path(options.out) if options.out else folder / "report"))
    return 0


# -- what is reported


@dataclass(frozen=True)
class Trial:
    """A run with what the page shows of it. flags: those in which the runs differ; value: its best, None without any."""

    run: StoredRun
    label: str
    state: str
    flags: Mapping[str, Any]
    value: float | None
    epoch: int | None


@dataclass(frozen=True)
class Collection:
    """Everything on the page. folder: of the sweep, None for single runs. missing: trials that were never launched. log: flags drawn by logarithm."""

    name: str
    metric: str
    mode: str
    trials: list[Trial]
    folder: Path | None
    missing: int = 0
    log: Sequence[str] = ()

    @property
    def ranked(self) -> list[Trial]:
        """Finished trials, the best first, then others with a value."""
        sign = -1 if self.mode == "max" else 1
        valued = [trial for trial in self.trials if trial.value is not None]
        return sorted(valued, key=lambda trial: (trial.state != "done", sign * trial.value))

    @property
    def best(self) -> Trial | None:
        """The best of the finished ones."""
        return next((trial for trial in self.ranked if trial.state == "done"), None)

    @property
    def names(self) -> list[str]:
        """The varied flags."""
        return list(self.trials[0].flags)


def collect(paths: Sequence[Path], metric: str | None, mode: str | None) -> Collection:
    """Read a sweep or runs. UserError when there is nothing, or when the runs are of several programs or data sets."""

    sweep = read_trials(paths[0])
    if sweep and len(paths) > 1:
        raise UserError(
            f"found {len(paths)} directories, wanted one sweep or any number of runs: give {paths[0]} alone"
        )
    known = _runs_of(paths[0], sweep["trials"]) if sweep else {run: None for path in paths for run in _runs_in(path)}
    if not known:
        raise UserError(f"no trial of {paths[0]} was launched yet: run scripts/sweep.py")
    runs = read_runs(list(known))
    if len(families := {run.path.resolve().name.partition("-")[0] for run in runs}) > 1:
        raise UserError(f"found runs of {' and '.join(sorted(families))}, wanted those of one program")
    metric = metric or (sweep["metric"] if sweep else _selecting(runs))
    mode = mode or (sweep["mode"] if sweep else "max")
    names = varied([run.config for run in runs])
    trials = [_trial(run, entry, names, metric, mode) for run, entry in zip(runs, known.values(), strict=True)]
    if not any(trial.value is not None for trial in trials):
        raise UserError(f"no run has logged {metric}: mend --metric")
    title = paths[0].resolve().name if sweep else f"{len(runs)} runs of {families.pop()}"
    missing = len({entry["run"] for entry in sweep["trials"]}) - len(known) if sweep else 0
    return Collection(
        title, metric, mode, trials, paths[0] if sweep else None, missing, sweep.get("log", ()) if sweep else ()
    )


def _runs_of(folder: Path, entries: Sequence[Mapping[str, Any]]) -> dict[Path, Mapping[str, Any]]:
    """The run directories of a sweep's trials that were launched; trials with equal settings share one."""
    out = folder.resolve().parents[1]
    found = {path: entry for entry in entries for path in sorted(out.glob(entry["run"]))[:1]}
    return {path: entry for path, entry in found.items() if (path / "config.toml").exists()}


def _runs_in(path: Path) -> list[Path]:
    """The directory itself if it is a run, else the runs directly in it."""
    inside = sorted(file.parent for file in path.glob("*/config.toml")) if not (path / "config.toml").exists() else []
    return inside or [path]


def _selecting(runs: Sequence[StoredRun]) -> str:
    """What selected the epochs of finished runs, the same for all."""
    found = {
        f"{s['split']}/{s['metric']}"
        for run in runs
        if run.state == "done" and "metric" in (s := run.result["selection"])
    }
    if len(found) != 1:
        raise UserError(f"the runs selected their epochs by {', '.join(sorted(found)) or 'nothing yet'}: give --metric")
    return found.pop()


def _trial(run: StoredRun, entry: Mapping[str, Any] | None, names: Sequence[str], metric: str, mode: str) -> Trial:
    stopped = entry is not None and entry["state"] == "stopped"
    # What it logged after the decision to stop it counts as little here as in the table of the sweep.
    last = entry.get("epoch") if stopped else None
    rows = [row for row in run.metrics if last is None or row["epoch"] <= last]
    values = [(row[metric], row["epoch"]) for row in rows if isinstance(row.get(metric), (int, float))]
    sign = 1 if mode == "max" else -1
    value, epoch = max(values, key=lambda pair: (sign * pair[0], -pair[1]), default=(None, None))
    label = f"trial {entry['trial']}" if entry else run.label
    return Trial(
        run,
        label,
        "stopped early" if stopped else run.state,
        {name: run.config.get(name) for name in names},
        value,
        epoch,
    )


# -- the page


def write_report(found: Collection, out: Path) -> Path:
    """Write the page, its plots and best.toml; the path of the page."""

    best = found.best
    lead = f"{found.metric} ranks, {'more' if found.mode == 'max' else 'less'} is better."
    page = Page(
        f"Sweep report: {found.name}",
        f"{lead} Best: {best.label} with {best.value:.4f}." if best else f"{lead} No run is done yet.",
    )
    _overview(page, found)
    if best:
        _best(page, found, best, out)
    if found.names and len(found.ranked) > 1:
        page.section("Parallel coordinates")
        page.figure("parallel-coordinates", parallel_coordinates(found), "A line per run; the colour and the last axis are the best "
                    f"{found.metric} of the run. Thick: the best. Dashed: stopped early or unfinished.")  # fmt: skip
        _importance(page, found)
    _curves(page, found)
    return page.write(out)


def _overview(page: Page, found: Collection) -> None:

    page.section("Runs")
    states = Counter(trial.state for trial in found.trials)
    if found.missing:
        states["not launched"] = found.missing
    page.text(f"{sum(states.values())} runs: {', '.join(f'{count} {state}' for state, count in states.items())}.")
    if found.metric.startswith("test/"):
        page.note("warning", "Runs are ranked on the reported test part itself, so the best figure is optimistic.")
    rows = found.ranked + [trial for trial in found.trials if trial.value is None]
    top = best_rows([trial.value if trial.state == "done" else None for trial in rows], higher=found.mode == "max")
    seconds = [trial.run.result.get("seconds", {}).get("train") if trial.state == "done" else None for trial in rows]
    page.table(
        ["run", *found.names, found.metric, "epoch", "state", "train time"],
        [
            [trial.label, *map(flag_value, trial.flags.values()), Cell(figure_of(trial.value), best=number in top), str(trial.epoch or "–"),
             trial.state, duration(seconds[number])]
            for number, trial in enumerate(rows)
        ],
        "Best value over the epochs of each run and its epoch. Runs that were stopped early have had fewer epochs.",
    )  # fmt: skip


def _best(page: Page, found: Collection, best: Trial, out: Path) -> None:

    from gfml.report.recommenders import table_columns

    page.section("The best run")
    write_best(found, best, out / "best.toml")
    page.facts({**record(best.run), "settings": "best.toml, for --config"})
    test = {name: value for name, value in best.run.test.items() if isinstance(value, (int, float))}
    columns = table_columns({"": test}, best.run.result.get("topks", [0])) or list(headline(test))
    noted = {best.label: intervals_of(best.run, columns)} if (best.run.path / "analysis.npz").exists() else {}
    page.table(
        ["", *columns], metric_cells({best.label: test}, columns, colors_of([best.run]), intervals=noted),
        "Test part, shown for this run alone: it was chosen on validation.",
    )  # fmt: skip


def write_best(found: Collection, best: Trial, file: Path) -> None:
    """The best run's settings as a ``--config``."""

    config = {key: value for key, value in read_config(best.run.path).items() if key.replace("-", "_") not in BESIDE}
    with atomic_open(file) as stream:
        stream.write(
            f"# the best of {len(found.trials)} runs by {found.metric}, {best.value:.6g}: {best.run.path.name}\n{toml_text(config)}"
        )


# -- parallel coordinates


@dataclass(frozen=True)
class Scale:
    """Places of a flag's values on an axis from 0 to 1, the ticks to show, and whether it is logarithmic."""

    places: list[float]
    ticks: list[tuple[float, str]]
    log: bool = False


def scale_of(values: Sequence[Any], *, log: bool | None = None) -> Scale:
    """Numbers linearly, or by logarithm where ``log`` says so or, without its word, they span a factor of 20; anything else
    evenly spaced by name."""

    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    kinds = sorted({flag_value(value) for value in values})
    if not numbers or len(kinds) == 1:
        places = {kind: n / (len(kinds) - 1) if len(kinds) > 1 else 0.5 for n, kind in enumerate(kinds)}
        return Scale([places[flag_value(value)] for value in values], [(place, kind) for kind, place in places.items()])
    low, high, log_asked = min(values), max(values), log
    log = low > 0 and (high / low >= 20 if log is None else log)
    shape = math.log if log else float
    span = shape(high) - shape(low)
    marks = [low + (high - low) * share for share in (0, 0.5, 1)] if not log else [low, math.sqrt(low * high), high]
    # A few values that were chosen are their own marks.
    marks = sorted(set(values)) if len(kinds) <= 4 and log_asked is None else marks
    ticks = [((shape(mark) - shape(low)) / span, f"{mark:.3g}") for mark in marks]
    return Scale([(shape(value) - shape(low)) / span for value in values], ticks, log)


@styled
def parallel_coordinates(found: Collection) -> Figure:
    """A line per run through its flags to its value."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    trials = found.ranked[::-1]
    scales = {
        name: scale_of([trial.flags[name] for trial in trials], log=name in found.log or None) for name in found.names
    }
    scales[found.metric] = scale_of([trial.value for trial in trials], log=False)
    shades = (
        scales[found.metric].places if found.mode == "max" else [1 - place for place in scales[found.metric].places]
    )

    figure, axes = panels(1, 1, width=max(7.0, 1.9 * len(scales)), height=4.4)
    axis = axes[0, 0]
    for n, (trial, shade) in enumerate(zip(trials, shades, strict=True)):
        best = trial is found.best
        axis.plot(range(len(scales)), [scale.places[n] for scale in scales.values()], color=colormaps["viridis"](0.08 + 0.8 * shade),
                  linewidth=3.4 if best else 1.8, linestyle="-" if trial.state == "done" else (0, (4, 2)), alpha=1 if best else 0.85)  # fmt: skip
    for place, scale in enumerate(scales.values()):
        axis.axvline(place, color=TEXT, linewidth=0.9)
        for height, text in scale.ticks:
            axis.annotate(text, (place, height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color="#343942",
                          path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip
    axis.set_xticks(range(len(scales)), [f"{name} (log)" if one.log else name for name, one in scales.items()])
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_xlim(-0.1, len(scales) - 0.55)
    return figure


# -- importance


@dataclass(frozen=True)
class Importance:
    """Share of the variance of unseen runs that a forest loses without a flag, mean and deviation over repeats; its own R^2."""

    names: list[str]
    means: np.ndarray
    deviations: np.ndarray
    r_squared: float


def importance_of(found: Collection) -> Importance | None:
    """Permutation importance of a random forest, on runs it was not fitted to; None for fewer than LEAST_TRIALS runs.

    Each of REPEATS times the runs are cut into folds. A forest fitted to the others predicts a fold; the mean squared error
    it gains when one flag's values are shuffled among the fold's runs, over the variance of all values, is the importance.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    trials = found.ranked
    if len(trials) < LEAST_TRIALS:
        return None
    table = np.column_stack(
        [
            scale_of([trial.flags[name] for trial in trials], log=name in found.log or None).places
            for name in found.names
        ]
    )
    values = np.array([trial.value for trial in trials])
    if values.var() == 0:
        return None
    gains, errors = [], []
    for repeat in range(REPEATS):
        gain, error = np.zeros(len(found.names)), 0.0
        for rest, fold in KFold(min(FOLDS, len(trials) // 2), shuffle=True, random_state=repeat).split(table):
            forest = RandomForestRegressor(TREES, random_state=repeat).fit(table[rest], values[rest])
            error += float(((forest.predict(table[fold]) - values[fold]) ** 2).sum())
            shuffled = permutation_importance(
                forest, table[fold], values[fold], scoring="neg_mean_squared_error", n_repeats=10, random_state=repeat
            )
            gain += shuffled.importances_mean * len(fold)
        gains.append(gain / len(trials) / values.var())
        errors.append(error / len(trials) / values.var())
    return Importance(found.names, np.mean(gains, axis=0), np.std(gains, axis=0), 1 - float(np.mean(errors)))


def _importance(page: Page, found: Collection) -> None:
    page.section("Importance of the flags")
    result = importance_of(found)
    if result is None:
        page.text(f"Too little to tell: {len(found.ranked)} runs with a value, wanted {LEAST_TRIALS} that differ.")
        return
    page.figure("importance", draw_importance(result), f"Permutation importance of a random forest ({TREES} trees, scikit-learn) on runs it was not "
                f"fitted to, {len(found.ranked)} runs, {REPEATS} times cut into folds: how much of the variance of {found.metric} its error grows by "
                f"when a flag is shuffled. Bars: ± deviation over the repeats. R² on unseen runs: {result.r_squared:.2f}.")  # fmt: skip
    if result.r_squared <= 0:
        page.note(
            "warning",
            "The forest predicts unseen runs no better than their mean does: the bars mean nothing yet. Try more points.",
        )
    if any(trial.state != "done" for trial in found.ranked):
        page.text("Runs that were stopped early count with the best value they had reached.")


@styled
def draw_importance(result: Importance) -> Figure:
    """A bar per flag, the largest on top."""
    figure, axes = panels(1, 1, width=7.5, height=max(1.6, 0.42 * len(result.names) + 0.9))
    order = np.argsort(result.means)
    axes[0, 0].barh(
        range(len(order)),
        result.means[order],
        xerr=result.deviations[order],
        color=COLORS[0],
        height=0.6,
        ecolor="#7a7f88",
    )
    axes[0, 0].set_yticks(range(len(order)), [result.names[n] for n in order])
    axes[0, 0].set_xlabel("growth of the squared error / variance")
    axes[0, 0].axvline(0, color="#8d929b", linewidth=1)
    axes[0, 0].grid(False, axis="y")
    return figure


# -- learning curves


def _curves(page: Page, found: Collection) -> None:

    shown = found.ranked[:SHOWN_CURVES]
    curves = [
        Curves(trial.label, trial.run.metrics, found.metric, trial.epoch, COLORS[n % len(COLORS)])
        for n, trial in enumerate(shown)
    ]
    few = f" The {SHOWN_CURVES} best of {len(found.ranked)} runs." if len(found.ranked) > len(shown) else ""
    draw_learning(page, curves, few)
