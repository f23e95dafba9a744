"""One report of finished runs: what ran, test figures, paired differences to the first run, curves and robustness.

    python mirror_grad/report.py runs/PLAIN runs/WITH-MG runs/EQUAL-STEPS --out comparison

Reads what the runs stored and trains nothing. Runs of the same model and arm with other seeds also appear as one row of
means and standard deviations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gfml.base.errors import UserError
from gfml.base.runs import read_json
from gfml.program.cli import run_main
from gfml.report.page import Cell, Page, figure_of
from gfml.report.ranking_page import HOLDS, build_parser, write_report
from gfml.report.stored import StoredRun


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser("mirror_grad/report.py").parse_args(argv)
    print(draw(options.runs, options.out, options.format and (options.format,)))
    return 0


def draw(paths: Sequence[str | Path], out: str | Path | None = None, formats: Sequence[str] | None = None) -> Path:
    """Write the page; its path."""
    holds, what = [*HOLDS, "arm", "behaviour", "features"], "mirror_grad/main.py"
    return write_report(paths, out, formats, holds=holds, what=what, more=[features])


def features(page: Page, runs: Sequence[StoredRun]) -> None:
    """Where features came from, and what ``mirror_grad/robustness.py`` measured when they change."""
    if len(names := sorted({run.data["name"] for run in runs})) > 1:
        raise UserError(f"found runs on {', '.join(names)}, wanted one data set a report: give the runs of one")
    if not any(run.result["features"]["widths"] for run in runs):
        return
    page.section("Features")
    for run in runs:
        source = run.result["features"]["source"]
        if source == "random":
            page.note(
                "warning", f"{run.label}: features are random noise, as asked; its figures say nothing about the model."
            )
    tables = {run.label: run.result["features"]["widths"].items() for run in runs}
    said = {label: ", ".join(f"{name} {width} wide" for name, width in known) for label, known in tables.items()}
    page.facts({run.label: f"{said[run.label] or 'none'} ({run.result['features']['source']})" for run in runs})
    known = ((run, read_json(run.path / "robustness.json", "clean", "noise", "swap")) for run in runs)
    found = [(run, one) for run, one in known if one is not None]
    if not found:
        return
    ks = runs[0].result["topks"]
    name = f"recall@{ks[-2 if len(ks) > 1 else -1]}"
    kinds = dict.fromkeys((kind, value) for _, one in found for kind in ("noise", "swap") for value in one[kind])
    shown = ("grad_norm", "cosine", "top_eigenvalue")
    rows: list[list[Cell | str]] = []
    for run, one in found:
        clean, curved = one["clean"][name], one.get("curvature", {})
        levels = [one[kind].get(value, {}).get(name) for kind, value in kinds]
        cells = [
            Cell(figure_of(value), f"{value / clean:.0%}" if value is not None and clean else "") for value in levels
        ]
        rows.append(
            [Cell(run.label, color=run.color), figure_of(clean), *cells, *(figure_of(curved.get(key)) for key in shown)]
        )
    head = [
        "run",
        f"clean {name}",
        *(f"{kind} {value}" for kind, value in kinds),
        "gradient norm",
        "cosine of the half-steps",
        "top eigenvalue",
    ]
    page.table(
        head, rows,
        f"{name} on test with changed features, nothing retrained; small print: share of the clean figure. noise LEVEL: every feature "
        "plus normal noise of LEVEL times its table's root mean square; swap SHARE: so many items pass their features round. Gradient "
        "norm of the loss, its cosine with the gradient after a descent step (1: no change of direction), and the Hessian's largest "
        "eigenvalue, over some train batches.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
