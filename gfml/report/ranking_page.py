"""One report of one or several finished runs of recommenders: a self-contained HTML page with plots, and Markdown.

Reads what the runs stored (config.toml, run.json, metrics.jsonl, result.json, analysis.npz); trains and evaluates
nothing. The first run of a data set is the one that the others are compared with.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from gfml.report.page import Cell, Page

# The rank correlation from which the masses of generated data count as recovered.
RECOVERED = 0.8
RESAMPLES = 1000
ACCURACY = ("recall", "ndcg", "precision", "hit", "mrr", "map", "head_recall", "tail_recall")
FIFTHS = ("q1", "q2", "q3", "q4", "q5")
FIFTH_NAMES = ("most popular\nfifth", "2nd", "3rd", "4th", "least popular\nfifth")


def write_report(
    run_paths: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    formats: Sequence[str] = ("html", "md"),
) -> Path:
    """Write report.html, report.md and the plots into ``out_dir``; the path of the first page.

    Raises UserError for a path that holds no finished run of the recommender, and for one given twice.
    """
    from gfml.report.page import Page

    runs = _read_runs(run_paths)
    names = list(dict.fromkeys(run.data["name"] for run in runs))
    page = Page(f"Recommender report: {', '.join(names)}", _lead(runs))
    _what_ran(page, runs)
    for name in names:
        _metrics(
            page,
            [run for run in runs if run.data["name"] == name],
            "Metrics" if len(names) == 1 else f"Metrics on {name}",
        )
    _learning(page, runs)
    for name in names:
        group = [run for run in runs if run.data["name"] == name]
        _popularity_groups(page, group, "" if len(names) == 1 else name)
    _masses(page, runs)
    _mass_curve(page, runs)
    _glossary(page, runs)
    return page.write(out_dir, formats)


# -- what a report reads


@dataclass(frozen=True)
class StoredRun:
    """A finished run as its files tell it. label and color are its own within one report."""

    path: Path
    label: str
    color: str
    config: dict[str, Any]
    facts: dict[str, Any]
    result: dict[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        return self.result["data"]

    @property
    def selection(self) -> dict[str, Any]:
        return self.result["selection"]

    @property
    def test(self) -> dict[str, float]:
        return self.result["test"]

    @property
    def k(self) -> int:
        """The longest list of ``--topks``: that of the plots."""
        return max(self.result["topks"])

    @property
    def on_test(self) -> bool:
        return self.selection.get("split") == "test"

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The content of analysis.npz."""
        from gfml.report.stored import read_arrays

        return read_arrays(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        from gfml.engine.runs import read_metrics

        return read_metrics(self.path)


def _read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[StoredRun]:
    from gfml.report.page import COLORS
    from gfml.report.stored import each_once

    folders = each_once(paths)
    read = [_read_run(path) for path in folders]
    labels = _labels([result["model"] for _, _, result in read], [config for config, _, _ in read])
    return [
        StoredRun(path, label, COLORS[number % len(COLORS)], *parts)
        for number, (path, label, parts) in enumerate(zip(folders, labels, read, strict=True))
    ]


def _read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    from gfml.engine.runs import identity, read_config, read_result, run_state

    config = identity(read_config(path), ())
    if (state := run_state(path)) != "done":
        raise UserError(f"the run {path} is not finished ({state}): continue it with --resume {path}")
    result = read_result(path)
    if not {"model", "topks", "test", "baselines", "data"} <= result.keys():
        raise UserError(f"{path} is no run of a recommender: give the directory of one")
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}  # who moved a run without it still has all the numbers
    return config, facts, result


def _labels(models: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Model and loss; where those repeat, also the flags in which the runs differ."""
    from gfml.engine.runs import identity
    from gfml.report.stored import BESIDE, labels

    return labels(models, [identity(config, BESIDE) for config in configs])


def beside(paths: Sequence[str]) -> Path:
    """Where the report of these runs goes."""
    if len(paths) == 1:
        return Path(paths[0]) / "report"
    return Path(os.path.commonpath([Path(path).absolute().parent for path in paths])) / "report"


# -- the sections


def _lead(runs: Sequence[StoredRun]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs; differences are to the first, {runs[0].label}."
    run = runs[0]
    head = f"recall@{run.k}"
    return f"{run.label}: {head} {run.test[head]:.4f} and ndcg@{run.k} {run.test[f'ndcg@{run.k}']:.4f} on test, {run.selection['protocol']}."


def _what_ran(page: Page, runs: Sequence[StoredRun]) -> None:
    page.section("What ran")
    for run in runs:
        if run.on_test:
            page.note("warning", f"{run.label}: the epoch was selected on the reported test part itself, as in the original "
                                 "code. Its test figures are optimistic and not comparable with runs selected on validation.")  # fmt: skip
    if len(runs) == 1:
        page.facts(_facts(runs[0]))
        return
    columns = ["run", "data", "selected by", "epoch", "seed", "train time", "flags"]
    page.table(columns, [_run_row(run) for run in runs], words=True)
    page.facts({run.label: f"{_command(run)} → {run.path}" for run in runs})


def _facts(run: StoredRun) -> dict[str, str]:
    data, selection, config = run.data, run.selection, run.config
    pairs = {
        "data": f"{data['name']}: {data['num_users']:,} users × {data['num_items']:,} items; train {data['train']:,}, "
                f"validation {data['valid']:,}, test {data['test']:,} interactions; density {_density(data):.2%}",
        **data.get("notes", {}),
        "model": f"{run.label}, {config.get('embedding_dim')} dimensions{_gravity_settings(run)}",
        "command": _command(run),
        "seed": str(config.get("seed")),
        "selection": f"{selection['metric']} on {_split_name(selection)}: {selection.get('rule', 'highest value')}",
        "selected": f"epoch {selection['epoch']} of {selection.get('epochs_trained', '?')} trained"
                    f"{', stopped early' if selection.get('stopped_early') else ''}; {selection.get('weights', 'live')} weights",
        "protocol": selection["protocol"],
        "time": _times(run),
        "version": _version(run),
        "run directory": str(run.path),
    }  # fmt: skip
    if run.result.get("cold_users"):
        pairs["users without train interactions"] = f"{run.result['cold_users']:,} of the judged users; they count"
    return pairs


def _run_row(run: StoredRun) -> list[Cell | str]:
    from gfml.report.page import Cell

    data, selection = run.data, run.selection
    sizes = f"{data['num_users']:,} × {data['num_items']:,}; train {data['train']:,}, val {data['valid']:,}, test {data['test']:,}"
    rule = f"{_split_name(selection)} {selection['metric']}"
    seconds = run.result.get("seconds", {}).get("train")
    return [
        Cell(run.label, color=run.color), Cell(data["name"], sizes), Cell(rule, selection["protocol"]), f"{selection['epoch']}",
        str(run.config.get("seed")), "–" if seconds is None else _duration(seconds), _settings(run),
    ]  # fmt: skip


def _settings(run: StoredRun) -> str:
    keys = ("lr", "decay", "weight_decay", "lr_decay", "batch_size") + ("mix_ratio",) * (
        "mix" in run.config.get("loss_mode", "")
    )
    known = [f"{key} {run.config[key]:g}" for key in keys if key in run.config]
    return ", ".join([f"D {run.config.get('embedding_dim')}", *known]) + _gravity_settings(run)


def _metrics(page: Page, runs: Sequence[StoredRun], title: str) -> None:
    """Rows: runs with intervals, then the baselines of the first run."""
    from gfml.report.recommenders import table_columns

    page.section(title)
    _warn_about_parts(page, runs)
    rows = {run.label: run.test for run in runs} | _baselines(runs[0])
    columns = table_columns(rows, sorted({k for run in runs for k in run.result["topks"]}))
    intervals = {run.label: _intervals(run, columns) for run in runs}
    colors = _colors(runs)
    page.table(
        ["method", *columns], _metric_cells(rows, columns, intervals, colors),
        "Test part. Small print: 95 % bootstrap interval of the mean over users. Bold: best of the column, where more is better.",
    )  # fmt: skip
    for name, found in runs[0].result["baselines"].items():
        if "skipped" in found:
            page.text(f"{name} was left out: {found['skipped']}")
    if len(runs) > 1:
        _differences(page, runs, [name for name in columns if name.partition("@")[0] in ("recall", "ndcg")])


def _metric_cells(
    rows: Mapping[str, Mapping[str, float]],
    columns: Sequence[str],
    intervals: Mapping[str, Mapping[str, str]],
    colors: Mapping[str, str],
) -> list[list[Cell]]:
    from gfml.report.page import Cell, best_rows, figure_of

    best = {
        name: best_rows([row.get(name) for row in rows.values()]) if name.partition("@")[0] in ACCURACY else set()
        for name in columns
    }
    return [
        [Cell(label, color=colors.get(label, ""))]
        + [
            Cell(figure_of(row.get(name)), intervals.get(label, {}).get(name, ""), number in best[name])
            for name in columns
        ]
        for number, (label, row) in enumerate(rows.items())
    ]


def _intervals(run: StoredRun, columns: Iterable[str]) -> dict[str, str]:
    """95 % intervals of the columns whose values per user were stored."""
    from gfml.metrics.compare import bootstrap_mean
    from gfml.report.page import figure_of

    found = {}
    for name in columns:
        values = run.arrays.get(f"per_user/{name}")
        if values is not None and (values == values).any():
            interval = bootstrap_mean(values, resamples=RESAMPLES)
            found[name] = f"{figure_of(interval.low)}–{figure_of(interval.high)}"
    return found


def _differences(page: Page, runs: Sequence[StoredRun], columns: Sequence[str]) -> None:
    """Each run minus the first, over the same users."""
    from gfml.report.page import Cell

    first, rows = runs[0], []
    for run in runs[1:]:
        reason = _why_unpaired(first, run)
        cells = [Cell("–", reason)] * len(columns) if reason else [_difference(first, run, name) for name in columns]
        rows.append([Cell(run.label, color=run.color), *cells])
    page.table(
        [f"minus {first.label}", *columns], rows,
        "Paired differences over the users that both judged: mean, 95 % bootstrap interval, two-sided Wilcoxon signed-rank test. "
        "They say how sure a difference is for these users and these two trained models, not how much it varies with the seed.",
    )  # fmt: skip


def _why_unpaired(first: StoredRun, run: StoredRun) -> str:
    import numpy as np

    here, there = first.arrays["test_users"], run.arrays["test_users"]
    if not np.array_equal(here, there):
        return f"other users judged ({len(there):,}, not {len(here):,})"
    return "" if first.data["test_fingerprint"] == run.data["test_fingerprint"] else "another test part"


def _difference(first: StoredRun, run: StoredRun, name: str) -> Cell:
    from gfml.metrics.compare import bootstrap_difference, paired_tests
    from gfml.report.page import Cell, p_value, signed

    key = f"per_user/{name}"
    if key not in first.arrays or key not in run.arrays or len(first.arrays[key]) < 2:
        return Cell("–")
    interval = bootstrap_difference(run.arrays[key], first.arrays[key], resamples=RESAMPLES)
    tests = paired_tests(run.arrays[key], first.arrays[key])
    sure = f"{signed(interval.low)} to {signed(interval.high)}; {p_value(tests.wilcoxon_pvalue)}"
    return Cell(signed(interval.mean), sure)


def _warn_about_parts(page: Page, runs: Sequence[StoredRun]) -> None:
    if len({run.data["fingerprint"] for run in runs}) > 1:
        page.note("plain", "The runs did not all see the same train, validation and test parts; the popularity groups follow each "
                           "run's own train part, and the baselines are those of the first run.")  # fmt: skip


def _learning(page: Page, runs: Sequence[StoredRun]) -> None:
    from gfml.report.page import Curves, learning_curves

    page.section("Learning curves")
    curves = [
        Curves(
            run.label,
            run.metrics,
            f"{run.selection.get('split', 'val')}/{run.selection['metric']}",
            run.selection["epoch"],
            run.color,
        )
        for run in runs
    ]
    caption = "Left: the train loss, mean over an epoch. Right: the metric that selects the epoch; the star marks the selected one."
    if len({run.config.get("loss_mode") for run in runs}) > 1:
        caption += " Different losses are on different scales."
    if len({run.on_test for run in runs}) > 1:
        caption += " Values on validation and on test do not compare."
    page.figure("learning", learning_curves(curves), caption)


def _popularity_groups(page: Page, runs: Sequence[StoredRun], name: str) -> None:
    page.section(f"Popularity groups{f' on {name}' if name else ''}")
    k = runs[0].k
    page.text("Items sorted by train interactions and cut into five groups of equal item count.")
    page.figure(
        f"groups-{_slug(name)}" if name else "groups", _draw_groups(runs, k),
        f"Left: recall@{k} counting only the items of a group. Right: share of all recommended slots that the group fills; "
        "the level line is its share of train interactions.",
    )  # fmt: skip
    page.table(["", *(text.replace("\n", " ") for text in FIFTH_NAMES)], _group_rows(runs, k))


def _group_rows(runs: Sequence[StoredRun], k: int) -> list[list[Cell | str]]:
    from gfml.report.page import Cell

    def percent(row: Mapping[str, float], key: str) -> list[str]:
        return [f"{row[f'{g}_{key}']:.1%}" if f"{g}_{key}" in row else "–" for g in FIFTHS]

    train = [
        ["train interactions", *percent(runs[0].test, "train_share")],
        ["test interactions", *percent(runs[0].test, "judged_share")],
    ]
    for what, key in (("recall", f"recall@{k}"), ("slots", f"exposure@{k}")):
        train += [[Cell(f"{what}, {run.label}", color=run.color), *percent(run.test, key)] for run in runs]
    return train


def _draw_groups(runs: Sequence[StoredRun], k: int) -> Figure:
    from gfml.report.page import grouped_bars, legend_below, mark_level, panels, styled

    rows, colors = {run.label: run.test for run in runs} | _baselines(runs[0]), _colors(runs)

    @styled
    def draw() -> Figure:
        figure, axes = panels(1, 2, height=3.8)
        for axis, key, title in zip(
            axes[0], (f"recall@{k}", f"exposure@{k}"), (f"Recall@{k}", "Share of slots"), strict=True
        ):
            series = {name: [row.get(f"{g}_{key}", float("nan")) for g in FIFTHS] for name, row in rows.items()}
            grouped_bars(axis, FIFTH_NAMES, series, colors)
            axis.set(title=title, ylabel="mean over users" if key.startswith("recall") else "share of all slots")
        mark_level(axes[0, 1], [runs[0].test.get(f"{g}_train_share", float("nan")) for g in FIFTHS], "share of train")
        legend_below(figure, axes[0, 1])
        return figure

    return draw()


def _masses(page: Page, runs: Sequence[StoredRun]) -> None:
    page.section("Mass and popularity")
    heavy = [run for run in runs if "item_log_mass" in run.arrays]
    measured = [run for run in runs if run.result.get("mass")]
    if heavy:
        _show_item_masses(page, heavy, alone=len(runs) == 1)
    else:
        page.text("No item mass takes part in these rankings: the loss or --mass_mode leaves it out.")
    if measured:
        page.table(*_mass_table(measured))


def _show_item_masses(page: Page, runs: Sequence[StoredRun], *, alone: bool) -> None:
    for run in runs:
        _say_recovery(page, run, alone=alone)
    page.figure(
        "mass", _draw_masses(runs),
        "Each dot is an item with at least one train interaction; the line is the median in bins of equal item count. "
        "Log-mass is what the gravity score adds for an item.",
    )  # fmt: skip


def _say_recovery(page: Page, run: StoredRun, *, alone: bool) -> None:
    """Whether the masses that generated the data were found again."""
    found = run.result.get("mass", {}).get("item_spearman_true")
    if found is None:
        if "true_item_mass" in run.arrays:
            page.note(
                "warning", f"{run.label}: the learned item masses are constant, so the true item mass is not recovered."
            )
        return
    whose = "The" if alone else f"{run.label}: the"
    if found > RECOVERED:
        page.note(
            "good",
            f"{whose} true item mass is recovered: Spearman {found:.3f} between learned and true mass, above {RECOVERED}.",
        )
    else:
        page.note("warning", f"{whose} true item mass is not recovered: Spearman {found:.3f} between learned and true mass, "
                             f"wanted above {RECOVERED}.")  # fmt: skip


def _draw_masses(runs: Sequence[StoredRun]) -> Figure:
    import numpy as np

    from gfml.report.page import panels, scatter_with_trend, styled

    generated = any("true_item_mass" in run.arrays for run in runs)

    @styled
    def draw() -> Figure:
        # Without true masses two runs share a row.
        columns = 2 if generated else min(2, len(runs))
        rows = len(runs) if generated else -(-len(runs) // 2)
        figure, axes = panels(rows, columns, width=10 if columns == 2 else 6)
        places = axes if generated else axes.reshape(-1, 1)
        for unused in places[len(runs) :].flat:
            unused.set_axis_off()
        for run, row in zip(runs, places, strict=False):
            popularity, mass = run.arrays["item_popularity"], run.arrays["item_log_mass"].astype(float)
            seen = popularity > 0
            scatter_with_trend(row[0], np.log10(popularity[seen]), mass[seen], run.color)
            _count_ticks(row[0], int(popularity.max()))
            row[0].set(
                xlabel="train interactions of the item (log scale)",
                ylabel="learned log-mass",
                title=_mass_title(run, "popularity"),
            )
            if "true_item_mass" in run.arrays:
                scatter_with_trend(row[1], run.arrays["true_item_mass"][seen], mass[seen], run.color)
                row[1].set(
                    xlabel="true log-mass of the generator", ylabel="learned log-mass", title=_mass_title(run, "true")
                )
            elif generated:
                row[1].set_axis_off()
        return figure

    return draw()


def _count_ticks(axis: Any, largest: int) -> None:
    """Counts 1, 3, 10, ... on an axis of their decimal logarithms: plain numbers instead of powers."""
    import numpy as np

    counts = [count for power in range(9) for count in (10**power, 3 * 10**power) if count <= max(largest, 3)]
    axis.set_xticks(np.log10(counts), [f"{count:,}" for count in counts])


def _mass_title(run: StoredRun, what: str) -> str:
    """Label and correlation; in lines, as a panel is narrow."""
    value = run.result.get("mass", {}).get(f"item_spearman_{what}")
    if value is None:
        return textwrap.fill(run.label, 44)
    end = f"Spearman {value:.3f}"
    return f"{run.label}: {end}" if len(run.label) < 26 else f"{textwrap.fill(run.label, 44)}\n{end}"


def _mass_table(runs: Sequence[StoredRun]) -> tuple[list[str], list[list[Cell | str]], str]:
    from gfml.report.page import Cell, figure_of

    columns = {
        "item_spearman_popularity": "item mass ~ popularity", "item_kendall_popularity": "(Kendall)",
        "item_spearman_true": "item mass ~ true mass", "user_spearman_popularity": "user mass ~ activity",
        "user_spearman_true": "user mass ~ true mass", "item_norm_spearman_popularity": "item norm ~ popularity",
        "item_log_mass_mean": "item log-mass mean", "item_log_mass_std": "std", "item_dead": "dead item masses",
    }  # fmt: skip
    shown = [key for key in columns if any(key in run.result["mass"] for run in runs)]
    rows: list[list[Cell | str]] = [
        [Cell(run.label, color=run.color), *(figure_of(run.result["mass"].get(key), 3) for key in shown)]
        for run in runs
    ]
    return (["run", *(columns[key] for key in shown)], rows,
            "a ~ b: Spearman's rank correlation; dead: share of relu masses that get no gradient.")  # fmt: skip


def _mass_curve(page: Page, runs: Sequence[StoredRun]) -> None:
    curves = [run for run in runs if run.result.get("mass_curve")]
    if not curves:
        return
    page.section("Mass as a knob against popularity bias")
    k = curves[0].k
    splits = {run.result["mass_curve"]["split"] for run in curves}
    page.text(f"The trained model ranks with its log-masses multiplied by t, without retraining: t = 1 is the model as trained, "
              f"t = 0 ranks by distance alone. Judged on {' and '.join(sorted({'valid': 'validation', 'test': 'test'}[s] for s in splits))}.")  # fmt: skip
    for run in curves:
        if not any(point.get(f"tail_recall@{run.k}") for point in run.result["mass_curve"]["points"]):
            page.note("plain", f"{run.label} finds no tail item at any mass scale in lists of {run.k}.")
    page.figure("mass-curve", _draw_mass_curve(curves, k),
                f"Left: overall against tail recall@{k}, one dot for each t. Middle: overall, head and tail "
                f"recall relative to t = 1. Right: average popularity of the recommended items.")  # fmt: skip


def _draw_mass_curve(runs: Sequence[StoredRun], k: int) -> Figure:
    from gfml.report.page import TEXT, label_points, panels, styled

    @styled
    def draw() -> Figure:
        figure, axes = panels(1, 3, width=12, height=3.9)
        left, middle, right = axes[0]
        drawn = [_one_mass_curve(run, axes[0]) for run in runs]
        left.legend(loc="upper left", bbox_to_anchor=(-0.04, -0.17), ncols=1)
        left.set(xlabel=f"tail recall@{k}", ylabel=f"recall@{k}", title="Overall against tail")
        middle.set(
            xlabel="t, factor on the log-masses", ylabel="value / value at t = 1", title="Recall relative to t = 1"
        )
        right.set(
            xlabel="t, factor on the log-masses", ylabel="train interactions, mean", title="Popularity of the lists"
        )
        for name, line in (("overall", "-"), ("head", "--"), ("tail", ":")):
            middle.plot([], [], color=TEXT, linestyle=line, label=name)
        middle.legend(loc="upper left", bbox_to_anchor=(-0.04, -0.17), ncols=3)
        left.margins(0.2)
        if max(tail.max() for _, tail, _ in drawn) == 0:
            left.set_xlim(-0.001, 0.01)
        marks = [(tail[n], overall[n], f"t = {scales[n]:g}", run.color) for n in (-1, 0, 2)
                 for run, (scales, tail, overall) in zip(runs, drawn, strict=True)]  # fmt: skip
        label_points(left, *zip(*marks, strict=True))
        return figure

    return draw()


def _one_mass_curve(run: StoredRun, axes: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import numpy as np

    points, k = sorted(run.result["mass_curve"]["points"], key=lambda point: point["mass_scale"]), run.k

    def column(name: str) -> np.ndarray:
        return np.array([point.get(name, np.nan) for point in points], dtype=float)

    scales, overall, tail = column("mass_scale"), column(f"recall@{k}"), column(f"tail_recall@{k}")
    axes[0].plot(tail, overall, color=run.color, marker="o", markersize=5, linewidth=1.2, label=run.label)
    for values, line in ((overall, "-"), (column(f"head_recall@{k}"), "--"), (tail, ":")):
        if values[-1] > 0:
            axes[1].plot(scales, values / values[-1], color=run.color, linestyle=line, marker="o", markersize=4)
    axes[2].plot(scales, column(f"arp@{k}"), color=run.color, marker="o", markersize=4)
    return scales, tail, overall


def _glossary(page: Page, runs: Sequence[StoredRun]) -> None:
    from gfml.report.recommenders import GLOSSARY, table_columns

    page.section("What the columns mean")
    shown = table_columns({run.label: run.test for run in runs}, runs[0].result["topks"])
    names = dict.fromkeys(name.partition("@")[0] for name in shown)
    lines = {f"{name}@K": GLOSSARY[name] for name in names}
    page.facts(lines | {
        "popularity, item-knn, ease, ials": "baselines without training by gradient: train counts, item neighbours, a closed-form item-item "
                                            "model, alternating least squares; settings chosen on validation",
        "slots": "all places of all recommended lists; a group's share of them is its exposure",
        "log-mass": "what the gravity score adds for an item or user: score = log-mass − λ log(squared distance + ε)",
        "Spearman, Kendall": "rank correlations from −1 to 1",
    })  # fmt: skip


# -- words


def _baselines(run: StoredRun) -> dict[str, dict[str, float]]:
    return {name: found["test"] for name, found in run.result["baselines"].items() if "test" in found}


def _colors(runs: Sequence[StoredRun]) -> dict[str, str]:
    """Of the runs their own, of the baselines greys."""
    from gfml.report.page import GREYS

    greys = {name: GREYS[number % len(GREYS)] for number, name in enumerate(_baselines(runs[0]))}
    return greys | {run.label: run.color for run in runs}


def _density(data: Mapping[str, Any]) -> float:
    cells = data["num_users"] * data["num_items"]
    return (data["train"] + data["valid"] + data["test"]) / cells if cells else 0.0


def _gravity_settings(run: StoredRun) -> str:
    config = run.config
    if "dist_mode" not in config or config.get("loss_mode") in ("dot", "bpr", "cml"):
        return ""
    return f", {config.get('dist_mode')} distance, {config.get('mass_mode')} mass, λ {config.get('lamb'):g}, ε {config.get('eps'):g}"


def _split_name(selection: Mapping[str, Any]) -> str:
    return {"val": "validation", "test": "TEST"}.get(selection.get("split", ""), selection.get("split", "?"))


def _command(run: StoredRun) -> str:
    sessions = run.facts.get("sessions", [])
    commands = list(dict.fromkeys(session["command"] for session in sessions))
    return "; then ".join(commands) if commands else "unknown (run.json is missing)"


def _times(run: StoredRun) -> str:
    seconds = run.result.get("seconds", {})
    parts = [
        f"{what} {_duration(seconds[key])}"
        for key, what in (("train", "training"), ("eval", "evaluation"))
        if key in seconds
    ]
    return ", ".join(parts) or "–"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _version(run: StoredRun) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run.facts.get("versions", {}).items())
    commit = str(run.facts.get("commit") or "")[:12]
    changed = " with local changes" if run.facts.get("dirty") else ""
    return "; ".join(filter(None, [versions, f"commit {commit}{changed}" if commit else ""])) or "–"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-").lower() or "data"
