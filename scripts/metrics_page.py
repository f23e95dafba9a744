"""Fill docs/metrics.md: what each metric means here and in other frameworks, and what each gives for the same lists.

    python scripts/metrics_page.py            write docs/metrics.md
    python scripts/metrics_page.py --check    exit with 1 where the stored page is not what would be written

Numbers come from tests/golden/conventions/values.json, which real packages gave; ours are computed now from the same lists.
Definitions come from docs/metrics.json. What stands around the lines ``<!-- results:metrics -->`` and ``<!-- end:metrics -->`` is
written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.program.cli import Parser, run_main
from gfml.report.results_table import replace_block

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tests" / "golden" / "conventions"
PAGE = ROOT / "docs" / "metrics.md"
TITLES = {"hit": "hit rate", "map": "average precision", "mrr": "reciprocal rank", "arp": "popularity"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="scripts/metrics_page.py", description="Build docs/metrics.md from stored values.")
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 where the page is another")
    options = parser.parse_args(argv)
    text = page()
    if options.check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    with atomic_open(PAGE) as stream:
        stream.write(text)
    return 0


def page() -> str:
    """The whole page: what is stored, with its tables made anew."""
    facts = json.loads((ROOT / "docs" / "metrics.json").read_text(encoding="utf-8"))
    values = json.loads((STORED / "values.json").read_text(encoding="utf-8"))
    ours = our_values()
    parts = [_frameworks(facts["frameworks"], values)]
    parts += [_metric(name, entry, facts["frameworks"], values, ours) for name, entry in facts["metrics"].items()]
    found = replace_block(PAGE.read_text(encoding="utf-8"), "metrics", "\n" + "\n\n".join(parts) + "\n")
    if found is None:
        raise UserError(f"{PAGE} has no lines <!-- results:metrics --> and <!-- end:metrics -->: add both")
    return found


def our_values() -> dict[str, float]:
    """Our figures on the stored lists, now."""
    from dataclasses import replace

    from gfml.data.lists import read_lists, read_pairs
    from gfml.ranking.judged import case_of, ground_of, ours

    table = read_lists(STORED / "lists.tsv")
    truth, train = read_pairs(STORED / "truth.tsv"), read_pairs(STORED / "train.tsv")
    ground = ground_of(replace(truth, ratings=np.ones(len(truth.users))), train, [table])
    return ours(case_of(table, ground)[0], (5, 10, 20))[0].means


def _frameworks(frameworks: dict[str, Any], values: dict[str, Any]) -> str:
    lines = ["## Who is counted, ties, short lists, unknown ids", ""]
    lines += [
        "| framework | version | users counted | ties | short lists | unknown users and items | here |",
        "|---" * 7 + "|",
    ]
    own = "all with truth; a missing list counts 0"
    lines.append(
        f"| **ours** | | {own} | by rank, else score, else the file's order | as they are | items stay and take places | |"
    )
    for key, entry in frameworks.items():
        flag = "" if entry["as_"] is None else f"`--metrics-as {entry['as_']}`"
        version = _version(values[key]["version"])
        cells = [entry["name"], version, entry["users"], entry["ties"], entry["short"], entry["unknown"], flag]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _version(text: str) -> str:
    word = text.split()[0]
    return word[:8] if len(word) == 40 else word


def _metric(
    name: str, entry: dict[str, Any], frameworks: dict[str, Any], values: dict[str, Any], ours: dict[str, float]
) -> str:
    """One table. A framework without the metric is in the last line."""
    ideal = any(row["ideal"] for row in entry["rows"].values())
    head = ["framework", "definition", *(["ideal list"] if ideal else []), "@5", "@10", "@20"]
    lines = [f"## {name}" + (f" ({TITLES[name]})" if name in TITLES else ""), ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    own = [f"{ours[f'{name}@{k}']:.4f}" for k in (5, 10, 20)]
    lines.append("| " + " | ".join(["**ours**", entry["ours"], *(["min(T, K) hits"] if ideal else []), *own]) + " |")
    without = []
    for key, row in entry["rows"].items():
        if row["definition"] is None:
            without.append(frameworks[key]["name"])
            continue
        cells = [frameworks[key]["name"], row["definition"], *([row["ideal"] or ""] if ideal else [])]
        lines.append("| " + " | ".join([*cells, *_numbers(values[key], row["value"])]) + " |")
    if without:
        lines += ["", f"Without it: {', '.join(without)}."]
    return "\n".join(lines)


def _numbers(values: dict[str, Any], key: str | None) -> list[str]:
    """The stored numbers at 5, 10 and 20; one number where there is no cut-off."""
    if key is None:
        return ["–"] * 3
    if "@" not in key:
        return [f"{values[key]:.4f} (no K)"] * 3
    return [f"{values[key.replace('@10', f'@{k}')]:.4f}" for k in (5, 10, 20)]


if __name__ == "__main__":
    sys.exit(run_main(main))
