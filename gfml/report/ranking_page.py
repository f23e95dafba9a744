"""One page of one or several finished runs of recommenders: a self-contained HTML page with plots, and Markdown.

Reads what the runs stored (config.toml, run.json, metrics.jsonl, result.json, analysis.npz); trains and evaluates
nothing. The first run of a data set is the one that the others are compared with.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gfml.program.cli import Parser
from gfml.report.page import (
    FORMATS,
    TEXT,
    Cell,
    Page,
    figure_of,
    grouped_bars,
    label_points,
    legend_below,
    mark_level,
    panels,
    scatter_with_trend,
    styled,
)
from gfml.report.recommenders import GLOSSARY, TABLE_METRICS, equal_rows, table_columns
from gfml.report.sections import (
    colors_of,
    differences,
    intervals_of,
    learning,
    metric_cells,
    seeds_together,
    slug,
    what_ran,
)
from gfml.report.stored import StoredRun, beside, finished_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The rank correlation from which the masses of generated data count as recovered.
RECOVERED = 0.8
HOLDS = ("model", "topks", "test", "baselines", "data")
# Columns of which more is neither better nor worse.
UNRANKED = ("coverage", "gini", "arp")
FIFTHS = ("q1", "q2", "q3", "q4", "q5")
FIFTH_NAMES = ("most popular\nfifth", "2nd", "3rd", "4th", "least popular\nfifth")

# A further section that a paper has.
Section = Callable[[Page, Sequence[StoredRun]], None]


def build_parser(prog: str) -> Parser:
    """The command line of a paper's ``report.py``."""
    parser = Parser(prog=prog, description="A page with tables and plots of one or several finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory; differences are to the first")
    where = "where to write (default: RUN/report; of several runs, beside them under the runs' digests)"
    parser.add_argument("--out", metavar="DIR", help=where)
    parser.add_argument("--format", choices=FORMATS, help="write only this form of the page (default: both)")
    return parser


def write_report(
    run_paths: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str] | None = None,
    formats: Sequence[str] | None = None,
    *,
    holds: Sequence[str] = HOLDS,
    what: str = "a recommender",
    more: Sequence[Section] = (),
) -> Path:
    """Write report.html, report.md and the plots into ``out_dir`` (None: beside the runs); the path of the first page.

    more: sections of a paper, before the glossary. holds, what: the entries that a result must have, and whose it then is.
    Raises UserError for a path that holds no finished run of that kind, and for one given twice.
    """
    runs = finished_runs(run_paths, holds, what)
    groups: dict[str, list[StoredRun]] = {}
    for run in runs:
        groups.setdefault(run.data["name"], []).append(run)
    page = Page(f"Recommender report: {', '.join(groups)}", _lead(runs))
    what_ran(page, runs, _facts)
    for name, group in groups.items():
        _metrics(page, group, "Metrics" if len(groups) == 1 else f"Metrics on {name}")
    for name, group in groups.items():
        learning(page, group, "" if len(groups) == 1 else name)
    for name, group in groups.items():
        _popularity_groups(page, group, "" if len(groups) == 1 else name)
    _masses(page, runs)
    _mass_curve(page, runs)
    for section in more:
        section(page, runs)
    _glossary(page, runs)
    return page.write(out_dir or beside(run_paths, "report"), formats or FORMATS)


# -- the sections


def _lead(runs: Sequence[StoredRun]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs; differences are to the first, {runs[0].label}."
    run = runs[0]
    head = f"recall@{run.k}"
    return f"{run.label}: {head} {run.test[head]:.4f} and ndcg@{run.k} {run.test[f'ndcg@{run.k}']:.4f} on test, {run.selection['protocol']}."


def _facts(run: StoredRun) -> dict[str, str]:
    """Data and model of a run."""
    data, config = run.data, run.config
    cells = data["num_users"] * data["num_items"]
    total = data["train"] + data["valid"] + data["test"]
    settings = {
        "learning_rate": run.result.get("learning_rate"),
        **run.result.get("settings", {}),
        **run.result.get("mirror", {}),
    }
    told = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
        if value is not None
    ]
    facts = {
        "data": f"{data['name']}: {data['num_users']:,} users × {data['num_items']:,} items; train {data['train']:,}, validation "
                f"{data['valid']:,}, test {data['test']:,} interactions; density {total / cells if cells else 0:.2%}",
        **data.get("notes", {}),
        "model": ", ".join([f"{run.label}, {config.get('embedding_dim', config.get('emb_size'))} dimensions{_gravity_settings(run)}", *told]),
    }  # fmt: skip
    for side in ("user", "item"):
        count = run.result.get(f"cold_{side}s")
        if count and f"{count:,}" not in [
            text for name, text in data.get("notes", {}).items() if "without train pairs" in name
        ]:
            whose = " of the judged users; they count" if side == "user" else ""
            facts[f"{side}s without train interactions"] = f"{count:,}{whose}"
    return facts


def _metrics(page: Page, runs: Sequence[StoredRun], title: str) -> None:
    """Rows: runs with intervals, then the baselines of the first run."""
    page.section(title)
    if len({run.data["fingerprint"] for run in runs}) > 1:
        page.note("plain", "The runs did not all see the same train, validation and test parts; the popularity groups follow each "
                           "run's own train part, and the baselines are those of the first run.")  # fmt: skip
    rows = {run.label: run.test for run in runs} | runs[0].baselines
    columns = columns_of(runs)
    page.table(
        ["method", *columns],
        metric_cells(
            rows, columns, colors_of(runs, runs[0].baselines), intervals={run.label: intervals_of(run, columns) for run in runs},
            unranked=[name for name in columns if name.partition("@")[0] in UNRANKED],
        ),
        "Test part. Small print: 95 % bootstrap interval of the mean over users. Bold: best of the column, where more is better.",
    )  # fmt: skip
    for line in equal_rows(runs[0].result):
        page.note("plain", line)
    for name, found in runs[0].result["baselines"].items():
        if "skipped" in found:
            page.text(f"{name} was left out: {found['skipped']}")
    accuracies = [name for name in columns if name.partition("@")[0] in ("recall", "ndcg")]
    differences(page, runs, accuracies)
    seeds_together(page, runs, accuracies)


def columns_of(runs: Sequence[StoredRun]) -> list[str]:
    """The metrics that a table shows: the usual ones, and those of a program that tells more."""
    rows = {run.label: run.test for run in runs} | runs[0].baselines
    more = ["precision", "map"] if all("arm" in run.result for run in runs) else []
    more += ["cold_recall"] if any(row.get(f"cold_recall@{runs[0].k}") for row in rows.values()) else []
    return table_columns(rows, sorted({k for run in runs for k in run.result["topks"]}), (*TABLE_METRICS, *more))


def _popularity_groups(page: Page, runs: Sequence[StoredRun], name: str) -> None:
    k = runs[0].k
    if f"q1_recall@{k}" not in runs[0].test:
        return
    page.section(f"Popularity groups{f' on {name}' if name else ''}")
    page.text("Items sorted by train interactions and cut into five groups of equal item count.")
    page.figure(
        f"groups-{slug(name)}" if name else "groups", _draw_groups(runs, k),
        f"Left: recall@{k} counting only the items of a group. Right: share of all recommended slots that the group fills; "
        "the level line is its share of train interactions.",
    )  # fmt: skip
    page.table(["", *(text.replace("\n", " ") for text in FIFTH_NAMES)], _group_rows(runs, k))


def _group_rows(runs: Sequence[StoredRun], k: int) -> list[list[Cell | str]]:
    def percent(row: Mapping[str, float], key: str) -> list[str]:
        return [f"{row[f'{g}_{key}']:.1%}" if f"{g}_{key}" in row else "–" for g in FIFTHS]

    train: list[list[Cell | str]] = [
        ["train interactions", *percent(runs[0].test, "train_share")],
        ["test interactions", *percent(runs[0].test, "judged_share")],
    ]
    for what, key in (("recall", f"recall@{k}"), ("slots", f"exposure@{k}")):
        train += [[Cell(f"{what}, {run.label}", color=run.color), *percent(run.test, key)] for run in runs]
    return train


@styled
def _draw_groups(runs: Sequence[StoredRun], k: int) -> Figure:
    rows, colors = {run.label: run.test for run in runs} | runs[0].baselines, colors_of(runs, runs[0].baselines)
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


def _masses(page: Page, runs: Sequence[StoredRun]) -> None:
    heavy = [run for run in runs if "item_log_mass" in run.arrays]
    measured = [run for run in runs if run.result.get("mass")]
    if not heavy and not measured and not any("mass_mode" in run.config for run in runs):
        return
    page.section("Mass and popularity")
    for run in heavy:
        _say_recovery(page, run, alone=len(runs) == 1)
    if heavy:
        page.figure(
            "mass", _draw_masses(heavy),
            "Each dot is an item with at least one train interaction; the line is the median in bins of equal item count. "
            "Log-mass is what the gravity score adds for an item.",
        )  # fmt: skip
    else:
        page.text("No item mass takes part in these rankings: the loss or --mass_mode leaves it out.")
    if measured:
        page.table(*_mass_table(measured))


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
    kind, said, limit = (
        ("good", "recovered", "above") if found > RECOVERED else ("warning", "not recovered", "wanted above")
    )
    page.note(
        kind,
        f"{whose} true item mass is {said}: Spearman {found:.3f} between learned and true mass, {limit} {RECOVERED}.",
    )


@styled
def _draw_masses(runs: Sequence[StoredRun]) -> Figure:
    """Masses by popularity and, of generated data, by true mass: a row for each run, which share rows without true masses."""
    generated = any("true_item_mass" in run.arrays for run in runs)
    # As few holes in the last row as can be.
    columns = 2 if generated else min((2, 3), key=lambda number: (-len(runs) % number, number)) if len(runs) > 1 else 1
    rows = len(runs) if generated else -(-len(runs) // columns)
    figure, axes = panels(rows, columns)
    places = axes if generated else axes.reshape(-1, 1)
    for unused in places[len(runs) :].flat:
        unused.set_axis_off()
    for run, row in zip(runs, places, strict=False):
        popularity, mass = run.arrays["item_popularity"], run.arrays["item_log_mass"].astype(float)
        seen = popularity > 0
        scatter_with_trend(row[0], np.log10(popularity[seen]), mass[seen], run.color)
        counts = [
            count for power in range(9) for count in (10**power, 3 * 10**power) if count <= max(popularity.max(), 3)
        ]
        row[0].set_xticks(np.log10(counts), [f"{count:,}" for count in counts])
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


def _mass_title(run: StoredRun, what: str) -> str:
    """Label and correlation; in lines, as a panel is narrow."""
    value = run.result.get("mass", {}).get(f"item_spearman_{what}")
    if value is None:
        return textwrap.fill(run.label, 44)
    end = f"Spearman {value:.3f}"
    return f"{run.label}: {end}" if len(run.label) < 26 else f"{textwrap.fill(run.label, 44)}\n{end}"


def _mass_table(runs: Sequence[StoredRun]) -> tuple[list[str], list[list[Cell | str]], str]:
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
    tails = [any(point.get(f"tail_recall@{run.k}") for point in run.result["mass_curve"]["points"]) for run in curves]
    for run, has_tail in zip(curves, tails, strict=True):
        if not has_tail:
            page.note("plain", f"{run.label} finds no tail item at any mass scale in lists of {run.k}.")
    first = f"Overall against tail recall@{k}, one dot for each t. " if any(tails) else ""
    page.figure("mass-curve", _draw_mass_curve(curves, k, tail=any(tails)),
                f"From the left: {first}Overall, head and tail recall relative to t = 1. Average popularity of the recommended items.")  # fmt: skip


@styled
def _draw_mass_curve(runs: Sequence[StoredRun], k: int, *, tail: bool) -> Figure:
    figure, axes = panels(1, 2 + tail, width=12 if tail else 10, height=3.9)
    middle, right = axes[0, -2:]
    for run in runs:
        points = sorted(run.result["mass_curve"]["points"], key=lambda point: point["mass_scale"])
        found = {name: np.array([point.get(name, np.nan) for point in points], dtype=float) for name in points[0]}
        scales = found["mass_scale"]
        for name, line in (("recall", "-"), ("head_recall", "--"), ("tail_recall", ":")):
            values = found.get(f"{name}@{run.k}", np.zeros(1))
            if values[-1] > 0:
                middle.plot(scales, values / values[-1], color=run.color, linestyle=line, marker="o", markersize=4)
        right.plot(scales, found[f"arp@{run.k}"], color=run.color, marker="o", markersize=4, label=run.label)
        if tail:
            xy = (found[f"tail_recall@{run.k}"], found[f"recall@{run.k}"])
            axes[0, 0].plot(*xy, color=run.color, marker="o", markersize=5, linewidth=1.2)
    for name, line in (("overall", "-"), ("head", "--"), ("tail", ":")):
        middle.plot([], [], color=TEXT, linestyle=line, label=name)
    for axis, columns in ((middle, 3), (right, 1)):
        axis.legend(loc="upper left", bbox_to_anchor=(-0.04, -0.17), ncols=columns)
    middle.set(xlabel="t, factor on the log-masses", ylabel="value / value at t = 1", title="Recall relative to t = 1")
    right.set(xlabel="t, factor on the log-masses", ylabel="train interactions, mean", title="Popularity of the lists")
    if tail:
        axes[0, 0].set(xlabel=f"tail recall@{k}", ylabel=f"recall@{k}", title="Overall against tail")
        axes[0, 0].margins(0.2)
        lines = [(line.get_xdata(), line.get_ydata(), run) for line, run in zip(axes[0, 0].lines, runs, strict=True)]
        scales = [point["mass_scale"] for point in points]
        marks = [(x[n], y[n], f"t = {scales[n]:g}", run.color) for n in (-1, 0, 2) for x, y, run in lines]
        label_points(axes[0, 0], *zip(*marks, strict=True))
    return figure


def _glossary(page: Page, runs: Sequence[StoredRun]) -> None:
    page.section("What the columns mean")
    names = dict.fromkeys(name.partition("@")[0] for name in columns_of(runs))
    lines = {f"{name}@K": GLOSSARY[name] for name in names}
    lines |= {
        "popularity, item-knn, ease, ials": "baselines without training by gradient: train counts, item neighbours, a closed-form item-item "
                                            "model, alternating least squares; settings chosen on validation",
        "slots": "all places of all recommended lists; a group's share of them is its exposure",
        "Spearman, Kendall": "rank correlations from −1 to 1",
    }  # fmt: skip
    if any(run.result.get("mass") for run in runs):
        lines["log-mass"] = (
            "what the gravity score adds for an item or user: score = log-mass − λ log(squared distance + ε)"
        )
    page.facts(lines)


def _gravity_settings(run: StoredRun) -> str:
    config = run.config
    if "dist_mode" not in config or config.get("loss_mode") in ("dot", "bpr", "cml"):
        return ""
    return f", {config.get('dist_mode')} distance, {config.get('mass_mode')} mass, λ {config.get('lamb'):g}, ε {config.get('eps'):g}"
