"""One report of finished runs: what ran, test figures, paired differences to the first run, curves and robustness.

    python mirror_grad/report.py runs/PLAIN runs/WITH-MG runs/EQUAL-STEPS --out comparison

Reads what the runs stored and trains nothing. Runs of the same model and arm with other seeds also appear as one row of
means and standard deviations.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.program.cli import Parser, run_main

if TYPE_CHECKING:
    import numpy as np

    from gfml.report.page import Page

METRICS = ("recall", "precision", "map", "ndcg")
RESAMPLES = 1000


def build_parser() -> Parser:
    """The command line of ``mirror_grad/report.py``."""
    parser = Parser(
        prog="mirror_grad/report.py",
        description="Compare finished runs; the first is what the others are compared with.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: report in the first run)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(None if argv is None else list(argv))
    print(write_report([Path(path) for path in options.runs], options.out))
    return 0


@dataclass(frozen=True)
class Stored:
    """A finished run: its files, read."""

    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    @property
    def kind(self) -> str:
        """Model, arm, and behaviour where it is not the usual one."""
        behaviour = "" if self.result["behaviour"] == "fixed" else f", {self.result['behaviour']}"
        return f"{self.result['model']}, {self.result['arm']}{behaviour}"

    @property
    def label(self) -> str:
        return f"{self.kind}, seed {self.config['seed']}"


def read_run(path: Path) -> Stored:
    """UserError unless the path holds a finished run of ``mirror_grad/main.py``."""
    from gfml.base.checkpoints import train_anew
    from gfml.base.files import read_arrays
    from gfml.engine.runs import read_config, read_result

    config, result = read_config(path), read_result(path)
    if not {"arm", "behaviour", "features"} <= result.keys():
        raise UserError(f"{path} is no run of mirror_grad/main.py: give the directory of one")
    return Stored(path, config, result, read_arrays(path / "analysis.npz", train_anew(path)))


def write_report(paths: Sequence[Path], out: str | None = None) -> Path:
    """Write report.html, report.md and the plots; the path of the first."""
    from gfml.report.page import Page

    runs = [read_run(path) for path in paths]
    names = sorted({run.result["data"]["name"] for run in runs})
    if len(names) > 1:
        raise UserError(f"found runs on {', '.join(names)}, wanted one data set a report: give the runs of one")
    page = Page(f"Mirror gradient on {names[0]}", f"{len(runs)} runs; differences are to the first, {runs[0].label}.")
    what_ran(page, runs)
    figures(page, runs)
    differences(page, runs)
    curves(page, runs)
    robust(page, runs)
    return page.write(Path(out) if out else paths[0] / "report")


def what_ran(page: Page, runs: Sequence[Stored]) -> None:
    """Settings, with a warning for every optimistic or meaningless protocol."""
    page.section("What ran")
    for run in runs:
        if "on test" in run.result["selection"]["protocol"]:
            page.note("warning", f"{run.label}: selected on the reported test part itself; its figures are optimistic.")
        if run.result["features"]["source"] == "random":
            page.note(
                "warning", f"{run.label}: features are random noise, as asked; its figures say nothing about the model."
            )
    rows = []
    for run in runs:
        result, selection = run.result, run.result["selection"]
        mirror = ", ".join(f"{key} {value}" for key, value in result["mirror"].items())
        settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
        rate = f"learning rate {result['learning_rate']:g}, batch {run.config['batch-size']}"
        rows.append(
            [
                run.label,
                str(selection["epoch"]),
                selection["protocol"],
                mirror,
                f"{settings}; {rate}",
                result["features"]["source"],
                str(run.path),
            ]
        )
    page.table(["run", "epoch", "protocol", "mirror", "settings", "features", "directory"], rows, words=True)


def figures(page: Page, runs: Sequence[Stored]) -> None:
    """Test figures of every run, of its baselines, and of runs that differ in the seed together."""
    from gfml.report.page import Cell, best_rows, figure_of

    page.section("Test figures")
    ks = runs[0].result["topks"]
    columns = [f"{name}@{k}" for name in METRICS for k in ks]
    rows = {run.label: run.result["test"] for run in runs}
    rows |= {name: found["test"] for name, found in runs[0].result["baselines"].items() if "test" in found}
    best = {name: best_rows([row.get(name) for row in rows.values()]) for name in columns}
    page.table(["method", *columns], [
        [Cell(label), *(Cell(figure_of(row.get(name)), "", number in best[name]) for name in columns)]
        for number, (label, row) in enumerate(rows.items())
    ])  # fmt: skip
    groups: dict[str, list[Stored]] = {}
    for run in runs:
        groups.setdefault(run.kind, []).append(run)
    if any(len(group) > 1 for group in groups.values()):
        cells = [[kind, str(len(group)), *(_mean(group, name) for name in columns)] for kind, group in groups.items()]
        page.table(["method", "n", *columns], cells, "Mean ± sample standard deviation over seeds.")


def _mean(group: Sequence[Stored], name: str) -> str:
    values = [run.result["test"][name] for run in group]
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def differences(page: Page, runs: Sequence[Stored]) -> None:
    """Paired over users: each run minus the first."""
    import numpy as np

    from gfml.metrics.compare import bootstrap_difference, paired_tests
    from gfml.report.page import Cell, p_value, signed

    if len(runs) == 1:
        return
    page.section("Differences to the first run")
    first, columns = (
        runs[0],
        [f"{name}@{runs[0].result['topks'][-2 if len(runs[0].result['topks']) > 1 else -1]}" for name in METRICS],
    )
    rows = []
    for run in runs[1:]:
        same = run.result["data"]["test_fingerprint"] == first.result["data"]["test_fingerprint"]
        cells = [Cell("–", "another test part")] * len(columns)
        if same and np.array_equal(run.arrays["test_users"], first.arrays["test_users"]):
            cells = []
            for name in columns:
                here, there = run.arrays[f"per_user/{name}"], first.arrays[f"per_user/{name}"]
                interval, tests = bootstrap_difference(here, there, resamples=RESAMPLES), paired_tests(here, there)
                cells.append(
                    Cell(
                        signed(interval.mean),
                        f"{signed(interval.low)} to {signed(interval.high)}; {p_value(tests.wilcoxon_pvalue)}",
                    )
                )
        rows.append([Cell(run.label), *cells])
    page.table([f"minus {first.label}", *columns], rows,
               "Mean over users, 95 % bootstrap interval, Wilcoxon signed-rank test. They say how sure a difference between these "
               "two trained models is, not how much it varies with the seed.")  # fmt: skip


def curves(page: Page, runs: Sequence[Stored]) -> None:
    """Losses and the selecting metric."""
    from gfml.engine.runs import read_metrics
    from gfml.report.page import COLORS, Curves, learning_curves

    drawn = []
    for number, run in enumerate(runs):
        rows = read_metrics(run.path) if (run.path / "metrics.jsonl").exists() else []
        if rows:
            select = f"{run.config['select-on']}/{run.config['select-metric']}"
            drawn.append(
                Curves(run.label, rows, select, run.result["selection"]["epoch"], COLORS[number % len(COLORS)])
            )
    if drawn:
        page.section("Training")
        page.figure("training", learning_curves(drawn), "Train loss, and the metric that selects the epoch.")


def robust(page: Page, runs: Sequence[Stored]) -> None:
    """What ``mirror_grad/robustness.py`` measured, where it did."""
    found = [
        (run.label, json.loads((run.path / "robustness.json").read_text(encoding="utf-8")))
        for run in runs
        if (run.path / "robustness.json").exists()
    ]
    if not found:
        return
    page.section("Changed features")
    name = f"recall@{runs[0].result['topks'][-2 if len(runs[0].result['topks']) > 1 else -1]}"
    columns = list(
        dict.fromkeys(f"{kind} {value}" for _, one in found for kind in ("noise", "swap") for value in one[kind])
    )
    rows = []
    for label, one in found:
        levels = {f"{kind} {value}": means[name] for kind in ("noise", "swap") for value, means in one[kind].items()}
        curved = one.get("curvature", {})
        numbers = [f"{curved[key]:.4g}" if key in curved else "–" for key in ("grad_norm", "cosine", "top_eigenvalue")]
        clean = one["clean"][name]
        cells = [
            f"{levels[key]:.4f} ({levels[key] / clean:.0%})" if key in levels and clean else "–" for key in columns
        ]
        rows.append([label, f"{clean:.4f}", *cells, *numbers])
    page.table(["run", f"clean {name}", *columns, "gradient norm", "cosine of the half-steps", "top eigenvalue"], rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
