"""Turn finished runs into a CSV and a table in a README.

    python scripts/results_table.py lastfm --folder recsys 'LightGCN, bpr=runs/A' 'LightGCN, bpr=runs/B' 'MF, gravity=runs/C'
    python scripts/results_table.py lastfm --folder recsys --check

Runs under one label are one row: mean and sample standard deviation over n runs. What a result reports beside its test
metrics under "also" (name -> metrics) follows as rows of its own, baselines stored in the results once at the end. Published numbers come from
``configs/tables/NAME.toml`` when it exists; its ``metrics`` names the figures kept and its ``columns`` those shown. The CSV
is ``FOLDER/results/NAME.csv``; the block of FOLDER/README.md between ``<!-- results:NAME -->`` and ``<!-- end:NAME -->`` is
made from the CSV alone (so is one named FOLDER/NAME in the first page), and ``--check`` fails if they disagree, or if a sentence
quotes a figure of three or more decimals that no CSV of the folder has; ``--check`` alone checks every table. The same
holds for the paired tests of ``scripts/reproduce.py --collect`` (``NAME-paired.csv``) and a block between
``<!-- paired:NAME -->`` and ``<!-- end-paired:NAME -->``, where a README has one.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gfml.base.errors import UserError
from gfml.base.files import atomic_open, write_csv
from gfml.base.home import configs, home
from gfml.metrics import HEADLINE

ROOT = home()
FACTS = ("method", "protocol", "n", "epoch", "train_seconds")
# User and system seconds of a run's own processes, mean over its row: in tables that ask for it, in place of the wall clock.
CPU = "cpu_seconds"
# Columns of NAME-paired.csv: of each pair and metric a row of level users for each seed, then one of level seeds.
# n: how many users or seeds; low, high: 95 % interval over users; std: over seeds.
PAIRED = (
    "row", "against", "metric", "level", "seed", "n", "mean", "mean_against", "difference", "std", "low", "high", "p", "p_holm",
)  # fmt: skip
LEVEL = 0.05
# First and last line of the blocks of a README.
BLOCKS = {
    "results": ("<!-- results:{} -->", "<!-- end:{} -->"),
    "paired": ("<!-- paired:{} -->", "<!-- end-paired:{} -->"),
}


def rows_of_runs(labelled: Iterable[tuple[str, Path]], metrics: Sequence[str] = HEADLINE) -> list[dict[str, str]]:
    """One row per label, then one per baseline, in order of appearance; the metrics of these names at every K.

    Baselines bear the name of their data where the runs have several.
    """
    from gfml.base.runs import read_result

    groups: dict[str, list[dict[str, Any]]] = {}
    baselines: dict[str, dict[str, Any]] = {}
    results = [(label, read_result(path)) for label, path in labelled]
    several = len({result["data"]["name"] for _, result in results}) > 1
    for label, result in results:
        groups.setdefault(label, []).append(result)
        for name, found in result.get("baselines", {}).items():
            if "test" in found:
                shown = f"{name}, {result['data']['name']}" if several else name
                # The same data under another protocol has other train pairs, so other baselines.
                kind = "test protocol" if "on test" in result["selection"]["protocol"] else "validation protocol"
                baselines.setdefault(f"{shown} ({kind})", found)
    rows = [row for label, results in groups.items() for row in _label_rows(label, results, metrics)]
    # A refit on train and validation has the train pairs of the test protocol, so its baselines are the same.
    by_name: dict[str, list[Mapping[str, float]]] = {}
    for name, found in baselines.items():
        by_name.setdefault(name.partition(" (")[0], []).append(found["test"])
    single = all(tests.count(tests[0]) == len(tests) for tests in by_name.values())
    if single:
        baselines = {name.partition(" (")[0]: found for name, found in baselines.items()}
    for name, found in baselines.items():
        rows.append({"method": name, "protocol": "no training", "n": "1"} | _cells([found["test"]], metrics))
    return rows


def _label_rows(label: str, results: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, str]]:
    """The row of a label, and one for each name that all its results have under "also"."""
    rows = [_mean_row(label, results, metrics)]
    for name in results[0].get("also", {}):
        if all(name in result.get("also", {}) for result in results):
            cells = _cells([result["also"][name] for result in results], metrics)
            rows.append(
                {
                    "method": f"{label}, {name}",
                    "protocol": rows[0]["protocol"],
                    "n": rows[0]["n"],
                    "epoch": rows[0]["epoch"],
                }
                | cells
            )
    return rows


def _mean_row(label: str, results: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, str]:
    protocols = {result["selection"]["protocol"] for result in results}
    names = {result["data"]["name"] for result in results}
    if len(protocols) > 1 or len(names) > 1:
        found = "; ".join(sorted(protocols | names))
        raise UserError(
            f"the runs labelled {label!r} differ in data or protocol ({found}): give each kind its own label"
        )
    epochs = sorted({str(result["selection"]["epoch"]) for result in results}, key=int)
    seconds = statistics.mean(result["seconds"].get("train", 0.0) for result in results)
    facts = {"method": label, "protocol": protocols.pop(), "n": str(len(results)), "epoch": "/".join(epochs)}
    return {**facts, "train_seconds": f"{seconds:.0f}"} | _cells([result["test"] for result in results], metrics)


def _cells(tests: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> dict[str, str]:
    names = [name for name in tests[0] if name.partition("@")[0] in metrics and all(name in test for test in tests)]
    cells = {}
    for name in names:
        values = [test[name] for test in tests]
        cells[name] = f"{statistics.mean(values):.6g}"
        if len(values) > 1:
            cells[f"{name} std"] = f"{statistics.stdev(values):.3g}"
    return cells


def declared(name: str) -> dict[str, Any]:
    """The content of ``configs/tables/NAME.toml``; empty without the file."""
    path = configs() / "tables" / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def published_rows(name: str) -> list[dict[str, str]]:
    """Rows of [[published]] with method, source and metrics."""
    entries = declared(name).get("published", [])
    return [
        {"method": entry["method"], "protocol": entry["source"]}
        | {metric: str(value) for metric, value in entry.items() if metric not in ("method", "source")}
        for entry in entries
    ]


def paired_name(name: str) -> str:
    """The name under which the paired tests of a table are stored."""
    return f"{name}-paired"


def store_rows(folder: Path, name: str, rows: Sequence[Mapping[str, str]], first: Sequence[str] = FACTS) -> None:
    """Write FOLDER/results/NAME.csv."""
    write_csv(folder / "results" / f"{name}.csv", rows, first)


def stored_rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of FOLDER/results/NAME.csv; none without it."""
    store = folder / "results" / f"{name}.csv"
    return list(csv.DictReader(io.StringIO(store.read_text(encoding="utf-8")))) if store.exists() else []


def to_markdown(rows: Sequence[Mapping[str, str]], columns: Sequence[str] = ()) -> str:
    """A Markdown table of such rows: figures with four digits, ± sample standard deviation where n > 1.

    columns: the metrics to show; all without them.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    known = [name for name in keys if name not in (*FACTS, CPU)]
    clock = (CPU, "CPU s") if CPU in keys else (FACTS[-1], "train s")
    metrics = list(columns) or [name for name in known if not name.endswith(" std")]
    if unknown := [name for name in metrics if name not in known]:
        raise UserError(f"found the column {unknown[0]!r}, wanted metrics of the results such as {known[0]}")
    shown = [name for name in metrics if any(row.get(name) for row in rows)]
    head = ["method", "protocol", "n", "epoch", *shown, clock[1]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [_shown(row, name) for name in shown]
        facts = [row.get(name, "") for name in FACTS[:-1]]
        lines.append("| " + " | ".join([*facts, *cells, row.get(clock[0], "")]) + " |")
    return "\n".join(lines)


def _shown(row: Mapping[str, str], name: str) -> str:
    if not row.get(name):
        return ""
    value = float(row[name])
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    spread = row.get(f"{name} std")
    return f"{text} ± {float(spread):.4f}" if spread else text


def paired_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of paired tests, a line for each pair of rows and metric, and how to read it."""
    pairs: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        pairs.setdefault((row["row"], row["against"], row["metric"]), []).append(row)
    if not pairs:
        return "No two rows to compare have finished runs with the same seed."
    head = ["row", "minus", "metric", "seeds", "difference", "over seeds", "over users, seed by seed"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join([*pair, *_paired_cells(found)]) + " |" for pair, found in pairs.items()]
    return "\n".join(lines) + (
        "\n\nDifference: mean over the seeds that both rows have, ± sample standard deviation. Over seeds: paired t-test. Over users:"
        " Wilcoxon signed-rank test between two trained models, and 95 % bootstrap interval of their difference; it does not say how"
        f" much another seed changes. Holm: p corrected over all tests of that level in this table; better and worse are p < {LEVEL} by it."
    )


def _paired_cells(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Number of seeds, difference, and what the tests of both levels say, of one pair of rows."""
    from gfml.report.page import p_value, signed

    def tested(row: Mapping[str, str]) -> str:
        return f"{p_value(float(row['p']))}, Holm {p_value(float(row['p_holm']))}"

    # The test over seeds is stored last.
    *users, total = rows
    difference = signed(float(total["difference"]))
    if len(users) == 1:
        interval = f"{signed(float(users[0]['low']))} to {signed(float(users[0]['high']))}"
        return ["1", difference, "no test: one seed", f"{interval}, {tested(users[0])}"]
    sure = [float(row["difference"]) > 0 for row in users if float(row["p_holm"]) < LEVEL]
    said = f"better in {sum(sure)}, worse in {len(sure) - sum(sure)} of {len(users)}"
    return [total["n"], f"{difference} ± {float(total['std']):.4f}", tested(total), said]


def replace_block(text: str, name: str, content: str, kind: str = "results") -> str | None:
    """The text with the block of that name replaced; None when it has no such block."""
    start, end = (line.format(name) for line in BLOCKS[kind])
    if start not in text or end not in text:
        return None
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def readmes_with(folder: Path, name: str, table: str) -> dict[Path, str]:
    """The new text of every README that shows the table, with its paired tests where they have a block. UserError when none does."""
    places = {folder / "README.md": name, ROOT / "README.md": f"{folder.relative_to(ROOT)}/{name}"}
    texts = {path: replace_block(path.read_text(encoding="utf-8"), block, table) for path, block in places.items()}
    found = {path: text for path, text in texts.items() if text is not None}
    if not found:
        raise UserError(
            f"{folder / 'README.md'} has no lines <!-- results:{name} --> and <!-- end:{name} -->: add both"
        )
    paired = paired_markdown(stored_rows(folder, paired_name(name)))
    return {path: replace_block(text, places[path], paired, "paired") or text for path, text in found.items()}


def unstored_figures(text: str, stored: Iterable[float]) -> list[str]:
    """Figures of three or more decimals in the sentences of a README (no table, no code) that no stored value rounds to.

    >>> unstored_figures("recall .1234 beside .5678; `--lr 0.0055`", [0.12338])
    ['.5678']
    """
    known = list(stored)
    prose = re.sub(r"```.*?```|`[^`\n]*`|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    figures = [found[1] for found in re.finditer(r"(?<![\w.@+-])(\d*\.\d{3,})(?![\w.]*\w)", prose)]
    return [figure for figure in figures if not any(_rounds_to(value, figure) for value in known)]


def _rounds_to(value: float, figure: str) -> bool:
    return abs(value - float(figure)) <= 0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-12


def figures_of(folders: Iterable[Path]) -> list[float]:
    """Every number in the CSV files of these folders' results."""
    cells = (
        cell for folder in folders for file in sorted((folder / "results").glob("*.csv")) for cell in _cells_of(file)
    )
    return [float(cell) for cell in cells if re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", cell)]


def _cells_of(file: Path) -> list[str]:
    with open(file, encoding="utf-8", newline="") as stream:
        return [cell for row in csv.reader(stream) for cell in row]


def check_sentences(readme: Path, folders: Iterable[Path]) -> None:
    """UserError when a sentence of the README quotes a figure that no result of these folders has."""
    if found := unstored_figures(readme.read_text(encoding="utf-8"), figures_of(folders)):
        raise UserError(
            f"{readme} quotes {', '.join(found)}, wanted figures that a file of results has: store the runs or mend the text"
        )


def check_all() -> None:
    """Every table and every sentence of every folder with results against its files. UserError at the first that differs."""
    folders = sorted(path.parent for path in ROOT.glob("*/results") if (path.parent / "README.md").exists())
    for folder in folders:
        for store in sorted((folder / "results").glob("*.csv")):
            if not store.stem.endswith(paired_name("")):
                show(folder, store.stem, check=True)
        check_sentences(folder / "README.md", [folder])
    check_sentences(ROOT / "README.md", folders)


def show(folder: Path, name: str, *, check: bool) -> None:
    """Write the table into the READMEs that show it, or only compare."""
    store = folder / "results" / f"{name}.csv"
    table = to_markdown(stored_rows(folder, name), declared(name).get("columns", ()))
    for readme, text in readmes_with(folder, name, table).items():
        if text == readme.read_text(encoding="utf-8"):
            continue
        if check:
            raise UserError(
                f"{readme} and {store} disagree: gfml results-table {name} --folder {folder.name} writes the table"
            )
        with atomic_open(readme) as stream:
            stream.write(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gfml results-table", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="name of the table; with --check, all without it")
    parser.add_argument(
        "runs", nargs="*", metavar="LABEL=RUN", help="finished run directories and the row they belong to"
    )
    parser.add_argument("--folder", help="paper folder that holds README.md and results/")
    parser.add_argument("--check", action="store_true", help="only compare the READMEs with the CSV")
    given = parser.parse_intermixed_args(argv)
    if given.check and not given.name:
        check_all()
        return 0
    if not given.name or not given.folder:
        raise UserError("found no table, wanted NAME --folder FOLDER; --check alone compares all of them")
    folder = ROOT / given.folder
    store = folder / "results" / f"{given.name}.csv"
    if given.runs and not given.check:
        if bad := next((run for run in given.runs if "=" not in run), None):
            raise UserError(f"found {bad!r}, wanted LABEL=RUN such as 'MF, gravity=runs/NAME'")
        labelled = [(run.rpartition("=")[0], Path(run.rpartition("=")[2])) for run in given.runs]
        rows = rows_of_runs(labelled, declared(given.name).get("metrics", HEADLINE))
        store_rows(folder, given.name, rows + published_rows(given.name))
    if not store.exists():
        raise UserError(f"there is no {store}: give the runs as LABEL=RUN")
    show(folder, given.name, check=given.check)
    if given.check:
        check_sentences(folder / "README.md", [folder])
    return 0
