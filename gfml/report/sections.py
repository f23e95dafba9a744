"""Sections that the pages of all programs are made of: what ran, figures with intervals, paired differences, curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from gfml.metrics import HEADLINE
from gfml.report.page import GREYS, Cell, Curves, Page, best_rows, figure_of, learning_curves, p_value, signed
from gfml.report.stored import StoredRun, flag_value, kind_of, varied

RESAMPLES = 1000
PARTS = {"val": "validation", "valid": "validation", "test": "TEST"}
PAIRED = (
    "Paired differences over the {}s that both judged: mean, 95 % bootstrap interval, two-sided Wilcoxon signed-rank test. They say how "
    "sure a difference is for these {}s and these trained models, not how much it varies with the seed."
)


def what_ran(page: Page, runs: Sequence[StoredRun], facts: Callable[[StoredRun], Mapping[str, str]]) -> None:
    """Settings, protocol and versions; of several runs a row each, with the flags in which they differ. facts: data and model."""
    page.section("What ran")
    for run in runs:
        if run.on_test:
            page.note("warning", f"{run.label}: the epoch was selected on the reported test part itself, as in the original "
                                 "code. Its test figures are optimistic and not comparable with runs selected on validation.")  # fmt: skip
    if len(runs) == 1:
        [run] = runs
        page.facts({**facts(run), **record(run)})
        return
    names = varied([run.config for run in runs])
    rows = []
    for run in runs:
        told = dict(facts(run))
        data, model = told.pop("data", run.data["name"]), told.pop("model", None)
        differs = ", ".join(f"{name} {flag_value(run.config.get(name))}" for name in names) or "–"
        rows.append([
            Cell(run.label, color=run.color), Cell(data, "; ".join(f"{name}: {value}" for name, value in told.items())), *([model] if model else []),
            Cell(rule_of(run), run.selection["protocol"]), str(run.selection["epoch"]),
            duration(run.result.get("seconds", {}).get("train")), differs,
        ])  # fmt: skip
    columns = [
        "run",
        "data",
        *(["model"] if len(rows[0]) > 6 else []),
        "selected by",
        "epoch",
        "train time",
        "differs in",
    ]
    page.table(columns, rows, words=True)
    page.facts({run.label: f"{command_of(run)} → {run.path}" for run in runs})


def record(run: StoredRun) -> dict[str, str]:
    """Command, selection, protocol, time and versions of one run."""
    selection, seconds = run.selection, run.result.get("seconds", {})
    epoch = f"epoch {selection['epoch']} of {selection.get('epochs_trained', '?')} trained"
    stopped = ", stopped early" if selection.get("stopped_early") else ""
    times = [
        f"{what} {duration(seconds[key])}"
        for key, what in (("train", "training"), ("eval", "evaluation"))
        if key in seconds
    ]
    return {
        "command": command_of(run), "seed": str(run.config.get("seed")), "selection": rule_of(run),
        "selected": f"{epoch}{stopped}; {selection.get('weights', 'live')} weights", "protocol": selection["protocol"],
        "time": ", ".join(times) or "–", "version": version_of(run), "run directory": str(run.path),
    }  # fmt: skip


def rule_of(run: StoredRun) -> str:
    """What chose the epoch, such as "ndcg@20 on validation: highest value"."""
    selection = run.selection
    rule = selection.get("rule", "highest value")
    if not selection.get("metric"):
        return rule
    return f"{selection['metric']} on {PARTS.get(selection.get('split', ''), selection.get('split', '?'))}: {rule}"


def command_of(run: StoredRun) -> str:
    """The commands that made a run."""
    commands = dict.fromkeys(session["command"] for session in run.facts.get("sessions", []))
    return "; then ".join(commands) if commands else "unknown (run.json is missing)"


def version_of(run: StoredRun) -> str:
    """Versions of libraries, and the commit."""
    versions = ", ".join(f"{name} {value}" for name, value in run.facts.get("versions", {}).items())
    commit = str(run.facts.get("commit") or "")[:12]
    changed = " with local changes" if run.facts.get("dirty") else ""
    return "; ".join(filter(None, [versions, f"commit {commit}{changed}" if commit else ""])) or "–"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours for reading."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# -- figures


def colors_of(runs: Sequence[StoredRun], others: Collection[str] = ()) -> dict[str, str]:
    """Of the runs their own, of others greys."""
    greys = {name: GREYS[number % len(GREYS)] for number, name in enumerate(others)}
    return greys | {run.label: run.color for run in runs}


def headline(test: Mapping[str, float]) -> dict[str, float]:
    """The usual figures of a recommender; of another program all it has."""
    return {
        name: value for name, value in test.items() if name.partition("@")[0] in HEADLINE and "_share" not in name
    } or dict(test)


def metric_cells(
    rows: Mapping[str, Mapping[str, float]],
    columns: Sequence[str],
    colors: Mapping[str, str],
    *,
    intervals: Mapping[str, Mapping[str, str]] | None = None,
    lower: Collection[str] = (),
    unranked: Collection[str] = (),
) -> list[list[Cell]]:
    """A row for each method, the best of a column bold; lower: where less is better; unranked: where nothing is better."""
    best = {
        name: best_rows([row.get(name) for row in rows.values()], higher=name not in lower)
        if name not in unranked
        else set()
        for name in columns
    }
    notes = intervals or {}
    return [
        [
            Cell(label, color=colors.get(label, "")),
            *(
                Cell(figure_of(row.get(name)), notes.get(label, {}).get(name, ""), number in best[name])
                for name in columns
            ),
        ]
        for number, (label, row) in enumerate(rows.items())
    ]


def intervals_of(run: StoredRun, columns: Sequence[str]) -> dict[str, str]:
    """95 % bootstrap intervals of the columns whose values per user, query or image were stored."""
    from gfml.metrics.compare import bootstrap_mean

    found = {}
    for name in columns:
        values = run.per_unit.get(name)
        if values is not None and (values == values).any():
            interval = bootstrap_mean(values, resamples=RESAMPLES)
            found[name] = f"{figure_of(interval.low)}–{figure_of(interval.high)}"
    return found


def differences(page: Page, runs: Sequence[StoredRun], columns: Sequence[str]) -> None:
    """Each run minus the first, over the same users, queries or images; nothing for one run."""
    first = runs[0]
    if len(runs) == 1 or first.unit is None:
        return
    rows = []
    for run in runs[1:]:
        reason = first.why_unpaired(run)
        cells = [Cell("–", reason)] * len(columns) if reason else [_difference(first, run, name) for name in columns]
        rows.append([Cell(run.label, color=run.color), *cells])
    page.table([f"minus {first.label}", *columns], rows, PAIRED.format(first.unit, first.unit))


def _difference(first: StoredRun, run: StoredRun, name: str) -> Cell:
    from gfml.metrics.compare import bootstrap_difference, paired_tests

    ours, theirs = run.per_unit.get(name), first.per_unit.get(name)
    if ours is None or theirs is None or len(theirs) < 2:
        return Cell("–")
    interval, tests = bootstrap_difference(ours, theirs, resamples=RESAMPLES), paired_tests(ours, theirs)
    sure = f"{signed(interval.low)} to {signed(interval.high)}; {p_value(tests.wilcoxon_pvalue)}"
    return Cell(signed(interval.mean), sure)


def seeds_together(page: Page, runs: Sequence[StoredRun], columns: Sequence[str]) -> None:
    """Means and deviations of runs that differ in nothing but the seed; nothing where there are none."""
    groups: dict[str, list[StoredRun]] = {}
    for run in runs:
        others = {key: value for key, value in run.config.items() if key not in ("seed", "run_name")}
        groups.setdefault(repr(others), []).append(run)
    if len(groups) == len(runs):
        return
    names = [group[0].label if len(group) == 1 else kind_of(group[0]) for group in groups.values()]
    cells = [
        [name, str(len(group)), *(_mean([run.test.get(column) for run in group]) for column in columns)]
        for name, group in zip(names, groups.values(), strict=True)
    ]
    page.table(["over seeds", "n", *columns], cells, "Mean ± sample standard deviation over seeds.")


def _mean(values: Sequence[Any]) -> str:
    if None in values:
        return "–"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return figure_of(statistics.mean(values)) + spread


# -- training


def learning(page: Page, runs: Sequence[StoredRun], name: str = "", select: str | None = None) -> None:
    """Loss, its terms, and what selects the epoch (``select`` where nothing did); name: of the data, if there are several."""
    if not any(run.metrics for run in runs):
        return
    curves = [
        Curves(run.label, run.metrics, select_of(run) or select or "", run.selection["epoch"], run.color)
        for run in runs
    ]
    caption = ""
    if len({run.config.get("loss_mode") for run in runs}) > 1:
        caption += " Different losses are on different scales."
    if len({run.on_test for run in runs}) > 1:
        caption += " Values on validation and on test do not compare."
    draw_learning(page, curves, caption, name)


def draw_learning(page: Page, curves: Sequence[Curves], caption: str = "", name: str = "") -> None:
    """The section of learning curves, whoever chose the best epochs; caption: what else is to be said."""
    page.section(f"Learning curves{f' on {name}' if name else ''}")
    usual = (
        "Train loss: mean over an epoch. Selection: the metric that selects the epoch; the star marks the reported one."
    )
    page.figure(f"learning-{slug(name)}" if name else "learning", learning_curves(curves), usual + caption)


def select_of(run: StoredRun) -> str | None:
    """The key in metrics.jsonl of what chose the epoch; None where nothing did."""
    selection = run.selection
    return f"{selection.get('split', 'val')}/{selection['metric']}" if selection.get("metric") else None


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-").lower() or "data"
