"""Search over lists of flag values: every combination is a run of its own; the best on the selecting split is named."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gfml.base.errors import UserError
from gfml.base.files import write_json
from gfml.program.cli import Options
from gfml.report.recommenders import table_columns, text_table
from mirror_grad.options import parse, point_tokens

Train = Callable[[Options], tuple[dict[str, Any], Path]]


def search(options: Options, train: Train) -> int:
    """Run every point of the grid, finished ones being read, and print and store the comparison.

    The same command after an interruption does what is missing. The winner has the highest selected value on
    ``--select-on``; equal values go to the earlier point. Only the winner's test figures are printed.
    """
    if options.run_name or options.resume or options.eval_only:
        raise UserError("--grid makes runs with names of their own: drop --run-name, --resume and --eval-only")
    rows = []
    for number, point in enumerate(options.points, start=1):
        said = ", ".join(f"{flag[2:]} {value}" for flag, value in point.items())
        print(f"grid {number} of {len(options.points)}: {said}", file=sys.stderr)
        result, path = train(parse(point_tokens(options.tokens, point)))
        rows.append(
            {
                "flags": point,
                "run": path.name,
                "value": selected_value(result, options),
                "test": result["test"],
                "result": result,
            }
        )
    best = winner(rows)
    file = Path(options.out) / f"{_name(options)}.json"
    stored = [{key: value for key, value in row.items() if key != "result"} for row in rows]
    protocol = best["result"]["selection"]["protocol"]
    write_json(
        file,
        {
            "metric": options.select_metric,
            "split": options.select_on,
            "protocol": protocol,
            "best": best["run"],
            "points": stored,
        },
    )
    _print(options, rows, best, file)
    return 0


def selected_value(result: dict[str, Any], options: Options) -> float:
    """What a run is compared by: its metric at the selected epoch on ``--select-on``."""
    part = result["test"] if options.select_on == "test" else result["val"]
    return part[options.select_metric]


def winner(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the highest value, the first of equal ones."""
    return max(rows, key=lambda row: row["value"])


def _name(options: Options) -> str:
    """The same for the same points on the same settings."""
    text = json.dumps([options.resolved, options.points], sort_keys=True, default=str)
    return f"grid-{options.model}-{Path(options.dataset).name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _print(options: Options, rows: Sequence[dict[str, Any]], best: dict[str, Any], file: Path) -> None:
    column = f"{options.select_on} {options.select_metric}"
    print(text_table({row["run"]: {column: row["value"]} for row in rows}, [column]))
    means = {best["run"]: best["test"]}
    print(f"\nbest by {column}: {', '.join(f'{flag[2:]} {value}' for flag, value in best['flags'].items())}; its test:")
    print(text_table(means, table_columns(means, options.topks)))
    if options.select_on == "test":
        print("selected on test: optimistic")
    print(f"grid            {file}")
