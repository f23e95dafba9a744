"""Reproduce the tables of the papers: what each needs, what is done, what is missing, and our figures beside theirs.

    python scripts/reproduce.py --list                    every table with its state
    python scripts/reproduce.py lastfm                    its commands and their states; runs nothing
    python scripts/reproduce.py lastfm --launch           runs what is missing, continues what is incomplete
    python scripts/reproduce.py lastfm --collect          finished runs -> CSV and README (scripts/results_table.py)
    python scripts/reproduce.py lastfm --check            README and CSV agree; prints the paper's numbers and ours

A table is ``configs/tables/NAME.toml``:

    folder, title, metrics, columns, seeds     where the results go, what is kept and shown, default seeds
    needs = ["data:lastfm", "files:DIR", "gpu"]    without one of these a cell cannot run here, and says so
    [[cell]] label, command, seeds, needs, paper    a row; "paper" names the published row beside it
    over = { lamb = [1, 3], ... }              one cell per combination; {lamb} in label and command is replaced
    {data} in a command                        the data root, for programs that want a data set's own folder
    {run:LABEL} in a command                   the run of that cell with the same seed, which then comes first
    [[published]] method, source, figures      rows of the paper

A run is found by its settings, wherever it was started (``scripts/run_commands.py``), so a table never repeats one.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from results_table import METRICS, published_rows, rows_of_runs, store_rows, stored_rows
from results_table import main as write_table
from run_commands import find_run

from gfml.cli import number, run_main
from gfml.errors import UserError, choice_error

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "configs" / "tables"
# Where the folders of the tables lie.
TABLE_ROOT = ROOT
KEYS = {"folder", "title", "metrics", "columns", "needs", "seeds", "tolerance", "cell", "published"}
CELL_KEYS = {"label", "command", "seeds", "needs", "paper", "over"}


@dataclass(frozen=True)
class Cell:
    """One run of a table: ``words`` is the command without the interpreter. waits: the label of the run it starts from."""

    label: str
    words: tuple[str, ...]
    seed: int
    needs: tuple[str, ...] = ()
    paper: str | None = None
    waits: str | None = None

    @property
    def command(self) -> str:
        """The line a reader can paste."""
        return shlex.join(["python", *self.words])


def table_names() -> list[str]:
    """Every table that has cells to run."""
    return [path.stem for path in sorted(TABLES.glob("*.toml")) if "cell" in tomllib.loads(path.read_text(encoding="utf-8"))]


def load_table(name: str) -> dict[str, Any]:
    """The content of a table's file. UserError for an unknown table, a wrong key or a wrong reference."""
    path = TABLES / f"{name}.toml"
    if name not in table_names():
        raise choice_error("table", name, table_names())
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    wrong = [key for key in table if key not in KEYS]
    wrong += [key for cell in table["cell"] for key in cell if key not in CELL_KEYS]
    if wrong:
        raise UserError(f"{path} sets the unknown key {wrong[0]!r}, wanted {', '.join(sorted(KEYS | CELL_KEYS))}")
    published = [row["method"] for row in table.get("published", [])]
    for cell in table["cell"]:
        if cell.get("paper") not in (None, *published):
            raise UserError(f"{path}: the cell {cell['label']!r} names the published row {cell['paper']!r}, wanted one of {published}")
    return table


def expand(table: Mapping[str, Any], out: str = "runs", data_root: str | None = None) -> list[Cell]:
    """Every run of the table, with its runs in ``out``."""
    return [cell for entry in table["cell"] for cell in _of_entry(entry, table, out, data_root)]


def _of_entry(entry: Mapping[str, Any], table: Mapping[str, Any], out: str, data_root: str | None) -> Iterator[Cell]:
    over = entry.get("over", {})
    own_folder = "{data}" in entry["command"]
    more = ["--out", out, *(["--data-root", data_root] if data_root and not own_folder else [])]
    needs = (*table.get("needs", ()), *entry.get("needs", ()))
    for values in itertools.product(*over.values()):
        chosen = dict(zip(over, map(str, values), strict=True)) | {"data": data_root or "data"}
        fill = lambda text: re.sub(r"\{(\w+)\}", lambda found: chosen.get(found[1], found[0]), text)  # noqa: B023, E731
        words = shlex.split(fill(entry["command"]))
        waits = next((found[1] for word in words if (found := re.fullmatch(r"\{run:(.*)\}", word))), None)
        for seed in entry.get("seeds", table.get("seeds", [2020])):
            yield Cell(fill(entry["label"]), (*words, *more, "--seed", str(seed)), seed, needs, entry.get("paper"), waits)


def lacking(needs: Sequence[str], data_root: str | None) -> str | None:
    """Why something that is needed is not here; None when all is."""
    from gfml.data import registry

    roots = registry.data_roots(data_root)
    for need in needs:
        kind, _, what = need.partition(":")
        if kind == "data" and registry.ALIASES.get(what, what) not in registry.KNOWN:
            raise choice_error("data set", what, registry.known_names())
        if kind == "data" and registry.locate(registry.KNOWN[registry.ALIASES.get(what, what)], roots) is None:
            return f"the data of {what} are not below {', '.join(map(str, roots))}"
        if kind == "files" and not any((root / what).exists() for root in roots):
            return f"{what} is not below {', '.join(map(str, roots))}"
        if kind == "gpu" and not _has_gpu():
            return "it needs a CUDA device"
        if kind not in ("data", "files", "gpu"):
            raise UserError(f"found the need {need!r}, wanted data:NAME, files:PATH or gpu")
    return None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class Known:
    """A cell with what is known of it. reason: why it cannot run here."""

    cell: Cell
    state: str
    path: Path | None
    reason: str | None = None


def survey(cells: Sequence[Cell], data_root: str | None) -> list[Known]:
    """The state of every cell; commands are checked on the way. UserError for a command that is not understood."""
    from gfml.runs import run_state

    found: dict[tuple[str, int], Known] = {}
    reasons = {needs: lacking(needs, data_root) for needs in {cell.needs for cell in cells}}
    # What others start from comes first.
    for cell in sorted(cells, key=lambda cell: cell.waits is not None):
        cell = _with_start(cell, found)
        path = None if cell.waits else find_run(cell.words)
        state = f"waits for {cell.waits}" if cell.waits else run_state(path) if path else "not launched"
        found[cell.label, cell.seed] = Known(cell, state, path, reasons[cell.needs] if state != "done" else None)
    return [found[cell.label, cell.seed] for cell in cells]


def _with_start(cell: Cell, found: Mapping[tuple[str, int], Known]) -> Cell:
    """The cell with the path of the run it starts from in its command, once that run is done."""
    if cell.waits is None:
        return cell
    start = found.get((cell.waits, cell.seed))
    if start is None:
        raise UserError(f"the cell {cell.label!r} starts from {cell.waits!r}, which this table has not for seed {cell.seed}")
    if start.state != "done":
        return cell
    return replace(cell, words=tuple(str(start.path) if word.startswith("{run:") else word for word in cell.words), waits=None)


def show(name: str, table: Mapping[str, Any], known: Sequence[Known]) -> None:
    """Print commands and states."""
    print(f"{name}: {table.get('title', '')} ({table['folder']}/README.md)")
    for one in known:
        state = f"cannot run here: {one.reason}" if one.reason else one.state
        print(f"\n{one.cell.label}, seed {one.cell.seed}: {state}\n    {one.cell.command}")
    print(f"\n{summary(known)}")


def summary(known: Sequence[Known]) -> str:
    """How many runs are in which state."""
    states = Counter("cannot run here" if one.reason else one.state for one in known)
    return ", ".join(f"{count} {state}" for state, count in states.items())


def launch(known: Sequence[Known], workers: int) -> int:
    """Run or continue what is missing and can run here, through scripts/run_commands.py; its exit code."""
    lines = [one.cell.command for one in known if not one.reason and one.state not in ("done", "running") and not one.cell.waits]
    for one in known:
        if one.reason and one.state != "done":
            print(f"skipped: {one.cell.label}, seed {one.cell.seed}: {one.reason}")
    if not lines:
        return 0
    command = [sys.executable, str(ROOT / "scripts" / "run_commands.py"), "--workers", str(workers)]
    return subprocess.run(command, input="\n".join(lines), text=True, cwd=ROOT).returncode


def collect(name: str, table: Mapping[str, Any], known: Sequence[Known]) -> None:
    """Write CSV and README. A row whose runs are not here keeps its stored figures; one that never ran says why."""
    from gfml.runs import read_result

    done = [(one.cell.label, one.path) for one in known if one.state == "done" and one.path]
    for _, path in done:
        read_result(path)
    fresh = {row["method"]: row for row in rows_of_runs(done, table.get("metrics", METRICS))}
    stored = {row["method"]: row for row in stored_rows(TABLE_ROOT / table["folder"], name)}
    labels = list(dict.fromkeys(one.cell.label for one in known))
    rows = [_best_row(label, fresh.get(label), stored.get(label), known) for label in labels]
    # Rows made by hand stay too.
    theirs = {row["method"] for row in published_rows(name)}
    other = [row for row in stored.values() if row["method"] not in {*labels, *theirs} and row["protocol"] != "no training"]
    simple = [row for row in fresh.values() if row["method"] not in labels]
    simple = simple or [row for row in stored.values() if row["protocol"] == "no training"]
    store_rows(TABLE_ROOT / table["folder"], name, [*rows, *other, *simple, *published_rows(name)])
    write_table([name, "--folder", table["folder"]])


def _best_row(label: str, fresh: dict | None, stored: dict | None, known: Sequence[Known]) -> dict[str, str]:
    """The row made of more runs; a stored one of as many is made anew."""
    if fresh and int(fresh["n"]) >= int((stored or {}).get("n") or 0):
        return fresh
    if stored and stored.get("n"):
        return {key: value for key, value in stored.items() if value}
    reason = next((one.reason for one in known if one.cell.label == label and one.reason), None)
    return {"method": label, "protocol": f"not run: {reason}" if reason else "not run yet"}


def compare(name: str, table: Mapping[str, Any]) -> list[str]:
    """Lines that put the stored figures beside the published ones: difference, seeds, selection rule, time."""
    rows = {row["method"]: row for row in stored_rows(TABLE_ROOT / table["folder"], name)}
    lines = []
    for cell in expand(table):
        ours, paper = rows.get(cell.label), rows.get(cell.paper or "")
        if not ours or not paper or not ours.get("n") or any(cell.label in line for line in lines):
            continue
        facts = f"n {ours['n']}, {ours['protocol']}, {ours['train_seconds'] or '?'} s"
        lines.append(f"{cell.label} beside {cell.paper} [{facts}]")
        for metric in (key for key in paper if "@" in key and not key.endswith(" std") and paper[key] and ours.get(key)):
            mine, theirs = float(ours[metric]), float(paper[metric])
            lines.append(f"    {metric:16} paper {theirs:.4f}  ours {mine:.4f}  difference {mine - theirs:+.4f} ({mine / theirs - 1:+.1%})")
    return lines


def list_tables(out: str, data_root: str | None) -> None:
    """One line per table: how many runs are done, and what is missing here."""
    for name in table_names():
        table = load_table(name)
        known = survey(expand(table, out, data_root), data_root)
        reasons = list(dict.fromkeys(one.reason for one in known if one.reason))
        rows = [row for row in stored_rows(TABLE_ROOT / table["folder"], name) if row["n"] and row["protocol"] != "no training"]
        seeds = statistics.fmean(int(row["n"]) for row in rows) if rows else 0
        stored = f"{len(rows)} rows stored, {seeds:.3g} runs each" if rows else "nothing stored"
        print(f"{name:22} {table.get('title', '')}\n{'':22} {stored}; here: {summary(known)}")
        for reason in reasons:
            print(f"{'':22} {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("table", nargs="?", help="name of a file in configs/tables")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="every table with its state")
    what.add_argument("--launch", action="store_true", help="run what is missing, continue what is incomplete")
    what.add_argument("--collect", action="store_true", help="write CSV and README from the finished runs")
    what.add_argument("--check", action="store_true", help="fail if README and CSV disagree; print the paper's figures and ours")
    parser.add_argument("--only", metavar="TEXT", help="only rows whose label contains this")
    parser.add_argument("--data-root", metavar="DIR", help="where the data sets lie; goes to every run")
    parser.add_argument("--out", metavar="DIR", default="runs", help="where the runs are")
    parser.add_argument("--workers", type=number(int, least=1), default=1, metavar="N", help="runs at a time")
    given = parser.parse_args(argv)
    if given.list == bool(given.table):
        parser.error("give the name of one table, or --list")
    if given.list:
        list_tables(given.out, given.data_root)
        return 0
    table = load_table(given.table)
    if given.check:
        write_table([given.table, "--folder", table["folder"], "--check"])
        print("\n".join(compare(given.table, table)) or "no row has a published one beside it")
        return 0
    return _run(given, table)


def _run(given: argparse.Namespace, table: Mapping[str, Any]) -> int:
    cells = [cell for cell in expand(table, given.out, given.data_root) if not given.only or given.only in cell.label]
    if not cells:
        raise UserError(f"found no row of {given.table} whose label contains {given.only!r}")
    known = survey(cells, given.data_root)
    if given.collect and given.only:
        raise UserError("--collect writes the whole table: give it without --only")
    if given.collect:
        collect(given.table, table, known)
        return 0
    if not given.launch:
        show(given.table, table, known)
        return 0
    code = launch(known, given.workers)
    known = survey(cells, given.data_root)
    if code == 0 and any(one.cell.words and one.state == "not launched" and not one.reason for one in known):
        # Those that waited for another run.
        code = launch(known, given.workers)
    print(summary(survey(cells, given.data_root)))
    return code


if __name__ == "__main__":
    sys.exit(run_main(main))
