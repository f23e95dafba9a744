"""Build docs/metrics.md: what each metric means here and in other frameworks, and what each gives for the same lists.

    python scripts/metrics_page.py            write docs/metrics.md
    python scripts/metrics_page.py --check    exit with 1 where the stored page is not what would be written

Numbers come from tests/golden/conventions/values.json, which real packages gave; ours are computed now from the same lists.
Definitions come from docs/metrics.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base.files import atomic_open
from gfml.program.cli import Parser, run_main

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
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    with atomic_open(PAGE) as stream:
        stream.write(text)
    return 0


def page() -> str:
    """The whole page."""
    facts = json.loads((ROOT / "docs" / "metrics.json").read_text(encoding="utf-8"))
    values = json.loads((STORED / "values.json").read_text(encoding="utf-8"))
    ours = our_values()
    parts = [_HEAD, _frameworks(facts["frameworks"], values)]
    parts += [_metric(name, entry, facts["frameworks"], values, ours) for name, entry in facts["metrics"].items()]
    return "\n\n".join([*parts, _TAIL]) + "\n"


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


_HEAD = """# What each metric means, here and elsewhere

The same name gives other numbers elsewhere. Below are our definitions, those of fourteen frameworks, and what each gives for one
and the same set of lists (`tests/golden/conventions`: 60 users, 40 items, with short, empty and missing lists, unknown ids and test
pairs that are in train). All numbers were given by the packages themselves; ours are computed when this page is built
(`python scripts/metrics_page.py`). T is the number of a user's held-out items, K the length of the list, "hits" the held-out
items among the first K, r the rating, I the number of items. All truth counts as relevant, ratings are not used, unless said.

`--metrics-as NAME` adds a framework's figures to a run and to the baselines beside it (`elliot:ndcg@10`), `gfml compare --metrics-as NAME` tests
them between finished runs, and `gfml judge` judges a framework's lists by ours and by its own definitions. A run reads ratings with `--graded`
alone: then graded_ndcg and the conventions that weigh ratings (Elliot, WarpRec, trec; Cornac's threshold) have those of the test part, and without
it every test pair counts 1. `gfml judge` reads the ratings of its truth file. An item that a list has twice counts once, at its better place, in
every convention; where scores are held in a table (trec, WarpRec, Cornac) the list closes up behind it.

The packages were run under Python 3.11, each by itself; LensKit, RecPack and torchmetrics a second time on the same lists, with the same numbers
to six digits. Three could not be installed as they are: Elliot 0.3.1 is on no package index, and its metric classes ran from source; WarpRec
2.2.8 needs Python 3.12, and its evaluator and metrics ran from the wheel with the rest of the package left out; LensKit 2026 needs Python 3.12.5
and was not run. MMRec and LightGCN-PyTorch are programs, whose own metric functions ran. The conventions behind `--metrics-as` were compared with
the packages on three more sets of random lists, by rank and by score, with and without ratings (`other_lists.json` there)."""

_TAIL = """## What surprises most

- RecTools' NDCG divides by K hits for everybody unless `divide_by_achievable=True`.
- implicit's precision pools all users and divides by min(T, K): nearer to a truncated recall.
- RecPack's HitK and ranx' `hits` count hits; a rate elsewhere.
- Elliot's MAP is the mean of precision@1 .. precision@K; Cornac's MAP and MRR and trec's recip_rank have no cut-off.
- Elliot and WarpRec grade NDCG by ratings without being asked: on data with stars it is lower than a binary one.
- LensKit's NDCG weighs ranks 1 and 2 the same; its precision divides by the length of the list, its recall by min(T, K).
- torchmetrics takes an item with a score of 0 or less for not relevant in precision, recall, MAP and MRR: all-negative scores give 0.
- Elliot's gini is 1 - gini: high is even.
- RecTools lets an item that a list has twice enlarge the user's truth: 5, 5, 6, 7 against 5 and 7 has a recall@2 of 2/3 (0.19.0).
- WarpRec's tail is what lies beyond more than 80 % of train, Elliot's beyond 80 %; which of equally popular items is tail is for WarpRec the order
  of torch's unstable sort, which differs between processors: aclt and aplt need not repeat on another machine.
- trec_eval and ir-measures order tied scores by the item's id as text, later ids first; ir-measures' RR@K takes earlier ids first.
- A user without a list counts 0 here, in RecBole, RecTools and ranx, and is left out in pytrec_eval, Elliot and LensKit."""


if __name__ == "__main__":
    sys.exit(run_main(main))
