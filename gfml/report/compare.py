"""Whether finished runs differ on the same users: paired bootstrap, Wilcoxon tests with Holm's correction, effect sizes.

    python scripts/compare.py runs/BASELINE runs/OTHER runs/ANOTHER
    python scripts/compare.py runs/A runs/B runs/C --all-pairs --metrics ndcg@20 recall@20 --out comparison

Every run is compared with the first (--all-pairs: with every other), over the users, queries or images that both judged
on the test part (``per_user``, ``per_query`` and ``per_image`` arrays of analysis.npz). Prints a table and writes
comparison.csv, comparison.json, comparison.png and a page. The tests say how sure a difference is for these users and these
trained models, not how much it varies with the seed.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gfml.base.errors import UserError, choice_error
from gfml.base.files import write_csv, write_json
from gfml.program.cli import Parser, number
from gfml.program.flags import CONVENTIONS
from gfml.report.page import COLORS, TEXT, Page, legend_below, p_value, panels, styled
from gfml.report.sections import what_ran

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gfml.report.stored import StoredRun

LEVEL = 0.05
TWO_QUESTIONS = (
    "The interval is of the mean difference; Wilcoxon's test asks whether more gain than lose, by rank. They ask different "
    "things, so one may be sure where the other is not."
)


def build_parser() -> Parser:
    """The command line of ``scripts/compare.py``."""
    parser = Parser(prog="gfml compare", description="Paired comparison of finished runs over the users they judged.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory; the first is what the others are compared with"
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME@K", help="what to compare (default: recall and ndcg at every K, else all)"
    )
    parser.add_argument(
        "--metrics-as",
        nargs="+",
        choices=CONVENTIONS,
        default=[],
        metavar="NAME",
        help="also compare recall and ndcg as these frameworks define them; runs made without the flag are judged again",
    )
    parser.add_argument("--all-pairs", action="store_true", help="compare every run with every other")
    parser.add_argument(
        "--resamples", type=number(int, least=100), default=2000, metavar="N", help="draws of the bootstrap"
    )
    parser.add_argument("--out", metavar="DIR", help="where files go (default: beside the runs, under their digests)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from gfml.report.stored import beside, read_runs

    if len(options.runs) < 2:
        raise UserError("found one run, wanted two or more to compare")
    runs = read_runs(options.runs)
    for run in runs:
        judge_again(run, options.metrics_as)
    pairs = list(itertools.combinations(runs, 2)) if options.all_pairs else [(runs[0], run) for run in runs[1:]]
    for first, second in pairs:
        check_comparable(first, second)
    metrics = metrics_of(runs, options.metrics, options.metrics_as)
    rows = compare(pairs, metrics, options.resamples)
    out = Path(options.out) if options.out else beside(options.runs, "comparison")
    notes = notes_of(runs)
    print(
        "\n".join([*notes, "metrics of this project; NAME: before one, as that framework defines it (docs/metrics.md)"])
    )
    print(text_of(rows))
    store(out, runs, rows, notes, options.resamples)
    print(f"{'files':<15} {out}\n{'report':<15} {out / 'report.html'}")
    return 0


# -- what can be compared


def check_comparable(first: StoredRun, second: StoredRun) -> None:
    """UserError, in one line, unless both runs judged the same users, queries or images on the same test part."""
    here, there = first.data, second.data
    why = (
        f"other data, {here['name']} and {there['name']}"
        if here["name"] != there["name"]
        else first.why_unpaired(second)
    )
    if not why:
        return
    how = "give runs with the same data and split flags"
    if first.unit is None or second.unit is None:
        how = "train them anew with --overwrite, which stores them"
    raise UserError(f"cannot compare {first.path} and {second.path}: {why}; {how}")


def notes_of(runs: Sequence[StoredRun]) -> list[str]:
    """What a reader must know about the runs themselves."""
    notes = []
    if len({run.data["fingerprint"] for run in runs}) > 1:
        notes.append("note: the runs did not all see the same train part (--val-ratio, --refit or selection on test)")
    protocols = {run.result["selection"]["protocol"] for run in runs}
    if len(protocols) > 1:
        notes.append(f"note: the runs selected their epochs differently: {'; '.join(sorted(protocols))}")
    return notes


def judge_again(run: StoredRun, conventions: Sequence[str]) -> None:
    """Add to the run's arrays what it did not store of these conventions, from its model and data."""
    missing = [name for name in conventions if not any(key.startswith(f"per_user/{name}:") for key in run.arrays)]
    if not missing:
        return
    if run.unit != "user":
        raise UserError(f"{run.path} has no lists of users, wanted them for --metrics-as: drop the flag")
    from gfml.program.loading import load
    from gfml.ranking.evaluation import Definitions

    loaded = load(run.path)
    seen = {"mask_seen": loaded.settings.mask_seen} if hasattr(loaded.settings, "mask_seen") else {}
    found = loaded.experiment.evaluation(
        loaded.model, "test", beyond=True, definitions=Definitions(tuple(missing)), **seen
    )
    run.arrays.update({f"per_user/{name}": values for name, values in found.per_user.items() if ":" in name})
    print(f"note: {run.path} was judged again as {', '.join(missing)}")


def metrics_of(runs: Sequence[StoredRun], wanted: Sequence[str] | None, conventions: Sequence[str] = ()) -> list[str]:
    """The metrics to compare: those asked for, else recall and ndcg at every K, else all that every run has; and recall and
    ndcg of other conventions (``elliot:ndcg@20``), which the runs must have stored.
    """
    common = [name for name in runs[0].per_unit if all(name in run.per_unit for run in runs)]
    if not common:
        raise UserError("the runs have no metric per user in common: give --topks with the same values")
    if wrong := next((name for name in wanted or () if name not in common), None):
        raise choice_error("metric", wrong, common)
    chosen = list(wanted or [name for name in common if name.partition("@")[0] in ("recall", "ndcg")] or common)
    for convention in conventions:
        theirs = [name for name in common if name.partition("@")[0] in (f"{convention}:recall", f"{convention}:ndcg")]
        if not theirs:
            raise UserError(
                f"the runs have no recall and no ndcg as {convention} in common: give --topks with the same values"
            )
        chosen += [name for name in theirs if name not in chosen]
    return chosen


# -- comparing


def compare(
    pairs: Sequence[tuple[StoredRun, StoredRun]], metrics: Sequence[str], resamples: int
) -> list[dict[str, Any]]:
    """One row per metric and pair: second - first. ``p_holm`` is corrected over all rows."""
    from gfml.metrics.compare import holm

    rows = [_row(first, second, metric, resamples) for metric in metrics for first, second in pairs]
    for row, adjusted in zip(rows, holm([row["p_wilcoxon"] for row in rows]).tolist(), strict=True):
        row["p_holm"] = adjusted
    return rows


def _row(first: StoredRun, second: StoredRun, metric: str, resamples: int) -> dict[str, Any]:

    from gfml.metrics.compare import bootstrap_difference, effect_sizes, paired_tests

    ours, theirs = second.per_unit[metric], first.per_unit[metric]
    if np.isnan(ours - theirs).sum() > len(ours) - 2:
        raise UserError(f"found fewer than two {first.unit}s with {metric} in both runs: choose another of --metrics")
    interval, tests = bootstrap_difference(ours, theirs, resamples=resamples), paired_tests(ours, theirs)
    effect = effect_sizes(ours, theirs)
    return {
        "metric": metric, "run": second.label, "against": first.label, "users": tests.n,
        "mean": float(np.nanmean(ours)), "mean_against": float(np.nanmean(theirs)), "difference": interval.mean,
        "low": interval.low, "high": interval.high, "p_wilcoxon": tests.wilcoxon_pvalue, "p_t": tests.t_pvalue,
        "dz": effect.dz if math.isfinite(effect.dz) else None, "rank_biserial": effect.rank_biserial,
        "better": effect.wins, "same": effect.ties, "worse": effect.losses,
    }  # fmt: skip


# -- showing


HEAD = (
    "metric", "run", "against", "mean", "difference", "95 % interval", "Wilcoxon", "Holm", "dz", "rank-biserial",
    "higher/same/lower",
)  # fmt: skip


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, in the columns of HEAD."""
    dz = "–" if row["dz"] is None else f"{row['dz']:+.3f}"
    return [
        row["metric"], row["run"], row["against"], f"{row['mean']:.4f}", f"{row['difference']:+.4f}", f"{row['low']:+.4f} {row['high']:+.4f}",
        p_value(row["p_wilcoxon"]), p_value(row["p_holm"]), dz, f"{row['rank_biserial']:+.3f}", f"{row['better']}/{row['same']}/{row['worse']}",
    ]  # fmt: skip


def text_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in aligned text."""
    lines = [list(HEAD), *map(cells_of, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEAD))]
    said = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*said, f"Holm: corrected over all {len(rows)} tests of this table. {TWO_QUESTIONS}"])


def store(
    out: Path, runs: Sequence[StoredRun], rows: Sequence[dict[str, Any]], notes: Sequence[str], resamples: int
) -> None:
    """Write the CSV, the JSON, the plot and the page."""
    write_csv(out / "comparison.csv", rows)
    how = {"interval": f"95 % percentile bootstrap of the mean over {runs[0].unit}s", "resamples": resamples, "test": "two-sided Wilcoxon signed-rank",
           "correction": f"Holm over {len(rows)} tests"}  # fmt: skip
    write_json(
        out / "comparison.json",
        {"runs": {run.label: str(run.path) for run in runs}, "method": how, "notes": list(notes), "rows": list(rows)},
    )
    page = Page(
        f"Comparison: {', '.join(run.label for run in runs)}", f"{how['interval']}; {how['test']}; {how['correction']}."
    )
    for note in notes:
        page.note("plain", note.removeprefix("note: "))
    what_ran(page, runs, lambda run: {"data": run.data["name"]})
    page.section("Differences")
    # One pair is named above.
    lines = [list(HEAD), *map(cells_of, rows)]
    shown = [
        n for n, name in enumerate(HEAD) if name not in ("run", "against") or len({line[n] for line in lines[1:]}) > 1
    ]
    head, *body = ([line[n] for n in shown] for line in lines)
    page.table(head, body, TWO_QUESTIONS)
    page.figure(
        "comparison",
        plot(rows),
        "Bars: 95 % interval of the mean difference. Full dots: Wilcoxon's p below .05 after Holm's correction.",
    )
    page.write(out)


@styled
def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per metric: differences with their intervals; full dots where Holm's p is below .05."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    pairs = list(dict.fromkeys((row["run"], row["against"]) for row in rows))
    several = len({against for _, against in pairs}) > 1
    names = [_wrapped(f"{run} minus {against}" if several else run) for run, against in pairs]
    columns = min(len(metrics), 2)
    figure, axes = panels(math.ceil(len(metrics) / columns), columns, height=max(2.2, 0.45 * len(pairs) + 1.4))
    for axis, metric in itertools.zip_longest(axes.flat, metrics):
        if metric is None:
            axis.set_visible(False)
            continue
        for row in (row for row in rows if row["metric"] == metric):
            place = pairs.index((row["run"], row["against"]))
            color, sure = COLORS[place % len(COLORS)], row["p_holm"] < LEVEL
            axis.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2.2)
            axis.plot(
                row["difference"], place, "o", color=color, markerfacecolor=color if sure else "none", markersize=8
            )
        axis.axvline(0, color="#8d929b", linewidth=1)
        axis.set_yticks(range(len(pairs)), names if axis in axes[:, 0] else [""] * len(pairs))
        axis.locator_params(axis="x", nbins=6)
        axis.set(title=metric, xlabel="difference" if several else f"difference to\n{_wrapped(pairs[0][1])}")
        axis.set_ylim(len(pairs) - 0.5, -0.5)
    axes[0, 0].plot([], [], color=TEXT, linewidth=2.2, label="95 % interval of the mean")
    axes[0, 0].plot([], [], "o", color=TEXT, label="Wilcoxon p < .05 after Holm's correction")
    axes[0, 0].plot([], [], "o", color=TEXT, markerfacecolor="none", label="not")
    legend_below(figure, axes[0, 0])
    return figure


def _wrapped(text: str, width: int = 38) -> str:
    return "\n".join(textwrap.wrap(text, width))
