"""Reproduce the tables of the papers: what each needs, what is done, what is missing, and our figures beside theirs.

    python scripts/reproduce.py --list                    every table with its state
    python scripts/reproduce.py lastfm                    its commands and their states; runs nothing
    python scripts/reproduce.py lastfm --launch           runs what is missing, continues what is incomplete
    python scripts/reproduce.py lastfm --collect          finished runs -> CSV, README (scripts/results_table.py), figure
    python scripts/reproduce.py lastfm --check            README and CSV agree; prints the paper's numbers and ours

A table is ``configs/tables/NAME.toml``:

    folder, title, metrics, columns, seeds     where the results go, what is kept and shown, default seeds
    main = ["recall@5"]                        metrics that are tested and drawn (scripts/table_pairs.py, table_figure.py)
    cpu = true                                 CPU seconds of the runs are stored and shown in place of the wall clock
    needs = ["data:lastfm", "files:DIR", "gpu"]    without one of these a cell cannot run here, and says so (DIR: below the data
                                               root or this project)
    [[cell]] label, command, seeds, needs, paper    a row; "paper" names the published row beside it
    against = ["FREEDOM"]                      rows that a cell's row is compared with, by paired tests
    over = { lamb = [1, 3], ... }              one cell per combination; {lamb} in the texts of a cell is replaced
    over = { arm = { "" = "--not_mg", ... } }  a table: its keys go to label, against and paper, its values to the command
    over, outside cells                        repeats the cells whose label names it, together; the other cells follow
    {data} in a command                        the data root, for programs that want a data set's own folder
    {run:LABEL} in a command                   the run of that cell with the same seed, which then comes first
    [[published]] method, source, figures      rows of the paper

A study searches: [search] has trials, seed (of the points), metric and, for recommenders, gammas, and a cell has a ``space`` as in
``gfml/program/search.py``. Such a row is its trials, run with the first seed, then the best one's flags with every seed; it is
run to its end before the next, and what was found is a page, ``FOLDER/NAME.md`` (``gfml/report/study.py``).

A run is found by its settings, wherever it was started (``gfml/program/commands.py``), so a table never repeats one. Of a command
that makes several runs (``--grid``) the best on its selecting split counts.
"""

from __future__ import annotations

import argparse
import itertools
import os
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

from gfml.base.errors import UserError, choice_error
from gfml.base.home import configs, home
from gfml.metrics import HEADLINE
from gfml.program.cli import number
from gfml.program.commands import read_command
from gfml.report.results_table import CPU, PAIRED, paired_name, published_rows, rows_of_runs, store_rows, stored_rows
from gfml.report.results_table import main as write_table
from gfml.report.table_figure import Drawn, write_figure
from gfml.report.table_pairs import paired_rows

ROOT = home()
# Where the folders of the tables lie.
TABLE_ROOT = ROOT
KEYS = {
    "folder", "title", "metrics", "columns", "main", "needs", "seeds", "tolerance", "over", "cell", "published", "search", "cpu",
}  # fmt: skip
CELL_KEYS = {"label", "command", "seeds", "needs", "paper", "against", "over", "space"}
# The texts for labels and for commands that stand for a name of ``over``.
Chosen = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """One run of a table: ``words`` is the command without the interpreter. waits: the label of the run it starts from.

    against: labels of the rows that its row is compared with. trials: the cells whose best one it repeats; point: a trial's flags.
    """

    label: str
    words: tuple[str, ...]
    seed: int
    needs: tuple[str, ...] = ()
    paper: str | None = None
    waits: str | None = None
    against: tuple[str, ...] = ()
    trials: tuple[str, ...] = ()
    point: tuple[str, ...] = ()

    @property
    def row(self) -> str:
        """The label of the row it belongs to: a trial's is that of its search."""
        return self.label.rpartition(": trial ")[0] if self.point else self.label

    @property
    def command(self) -> str:
        """The line a reader can paste."""
        return shlex.join(["python", *self.words])


def table_names() -> list[str]:
    """Every table that has cells to run."""
    return [
        path.stem
        for path in sorted((configs() / "tables").glob("*.toml"))
        if "cell" in tomllib.loads(path.read_text(encoding="utf-8"))
    ]


def load_table(name: str) -> dict[str, Any]:
    """The content of a table's file. UserError for an unknown table, a wrong key or a wrong reference."""
    path = configs() / "tables" / f"{name}.toml"
    if name not in table_names():
        raise choice_error("table", name, table_names())
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    wrong = [key for key in table if key not in KEYS]
    wrong += [key for cell in table["cell"] for key in cell if key not in CELL_KEYS]
    if wrong:
        raise UserError(f"{path} sets the unknown key {wrong[0]!r}, wanted {', '.join(sorted(KEYS | CELL_KEYS))}")
    if any("data" in over for over in (table.get("over", {}), *(cell.get("over", {}) for cell in table["cell"]))):
        raise UserError(f"{path}: over sets data, which stands for the data root in every command: choose another name")
    _check_references(path, table)
    return table


def _check_references(path: Path, table: Mapping[str, Any]) -> None:
    """UserError for a metric, published row or other row that the table names and has not, and for two rows of one name."""
    main, columns = table.get("main", []), table.get("columns")
    if columns and (unknown := [metric for metric in main if metric not in columns]):
        raise choice_error(f"metric in main of {path}", unknown[0], columns)
    cells = expand(table)
    labels = {cell.label for cell in cells}
    published = [row["method"] for row in table.get("published", [])]
    if repeated := [where for where, count in Counter((cell.label, cell.seed) for cell in cells).items() if count > 1]:
        raise UserError(
            f"{path}: two cells make the row {repeated[0][0]!r} with seed {repeated[0][1]}: give each its own label"
        )
    for cell in cells:
        if cell.paper not in (None, *published):
            raise UserError(
                f"{path}: the cell {cell.label!r} names the published row {cell.paper!r}, wanted one of {published}"
            )
        if wrong := [other for other in cell.against if other not in labels - {cell.label}]:
            raise choice_error(
                f"row in {path}, against which {cell.label!r} is compared,", wrong[0], labels - {cell.label}
            )
        if cell.against and not main:
            raise UserError(
                f"{path}: the cell {cell.label!r} is compared with {cell.against[0]!r}, but no metric is: set main"
            )


def expand(table: Mapping[str, Any], out: str = "runs", data_root: str | None = None) -> list[Cell]:
    """Every run of the table, with its runs in ``out``."""
    shared = table.get("over", {})
    repeated = [entry for entry in table["cell"] if any(f"{{{name}}}" in entry["label"] for name in shared)]
    entries = [(entry, chosen) for chosen in _combinations(shared) for entry in repeated]
    entries += [(entry, {}) for entry in table["cell"] if entry not in repeated]
    return [cell for entry, chosen in entries for cell in _of_entry(entry, chosen, table, out, data_root)]


def _combinations(over: Mapping[str, Any]) -> Iterator[Chosen]:
    """Every choice of one value per name."""
    lists = [
        list(values.items()) if isinstance(values, Mapping) else [(str(v), str(v)) for v in values]
        for values in over.values()
    ]
    for values in itertools.product(*lists):
        yield dict(zip(over, values, strict=True))


def _of_entry(
    entry: Mapping[str, Any], outer: Chosen, table: Mapping[str, Any], out: str, data_root: str | None
) -> Iterator[Cell]:
    more = ["--out", out, *(["--data-root", data_root] if data_root and "{data}" not in entry["command"] else [])]
    against = entry.get("against", [])
    for inner in _combinations(entry.get("over", {})):
        names = {name: label for name, (label, _) in (outer | inner).items()}
        pieces = {name: piece for name, (_, piece) in (outer | inner).items()} | {"data": data_root or "data"}
        words = shlex.split(_filled(entry["command"], pieces))
        waits = next((found[1] for word in words if (found := re.fullmatch(r"\{run:(.*)\}", word))), None)
        label, seeds = _filled(entry["label"], names), entry.get("seeds", table.get("seeds", [2020]))
        others = [_filled(other, names) for other in ([against] if isinstance(against, str) else against)]
        # The rows that one entry of a study makes may all name one of them.
        others = [other for other in others if other != label or "search" not in table]
        needs = tuple(_filled(need, names) for need in (*table.get("needs", ()), *entry.get("needs", ())))
        paper = _filled(entry["paper"], names) if "paper" in entry else None
        points = _points(entry["space"], table["search"], words) if "space" in entry else []
        trials = tuple(f"{label}: trial {number}" for number in range(1, len(points) + 1))
        for trial, point in zip(trials, points, strict=True):
            yield Cell(trial, (*words, *point, *more, "--seed", str(seeds[0])), seeds[0], needs, point=point)
        for seed in seeds:
            yield Cell(label, (*words, *more, "--seed", str(seed)), seed, needs, paper, waits, tuple(others), trials)


def _points(space: Mapping[str, Any], search: Mapping[str, Any], words: Sequence[str]) -> list[tuple[str, ...]]:
    """The flags of each trial of a cell's search."""
    from gfml.program.search import planned_points, spec_of

    facts = {key: search[key] for key in ("metric", "trials", "seed") if key in search}
    spec = spec_of("study", {"program": words[0], "search": "random", "space": space, **facts})
    return [tuple(spec.words(point)[2:]) for point in planned_points(spec)]


def _filled(text: str, values: Mapping[str, str]) -> str:
    """The text with each {name} that has a value replaced."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)


def lacking(needs: Sequence[str], data_root: str | None) -> str | None:
    """Why something that is needed is not here; None when all is."""
    from gfml.data import registry

    roots = registry.data_roots(data_root)
    for need in needs:
        kind, _, what = need.partition(":")
        if kind == "data" and (known := registry.known_by(what)) is None:
            raise choice_error("data set", what, registry.known_names())
        if kind == "data" and registry.locate(known, roots) is None:
            return f"the data of {what} are not below {', '.join(map(str, roots))}"
        # What is made beforehand, such as features, lies where the runs do, below the folder that commands run in.
        if kind == "files" and not any((root / what).exists() for root in (*roots, ROOT)):
            return f"{what} is not below {', '.join(map(str, (*roots, ROOT)))}"
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
    """A cell with what is known of it. path: its run, once that is done; reason: why it cannot run here."""

    cell: Cell
    state: str
    path: Path | None
    reason: str | None = None


def survey(cells: Sequence[Cell], data_root: str | None) -> list[Known]:
    """The state of every cell; commands are checked on the way. UserError for a command that is not understood."""
    found: dict[tuple[str, int], Known] = {}
    reasons = {needs: lacking(needs, data_root) for needs in {cell.needs for cell in cells}}
    # What others start from comes first.
    for cell in sorted(cells, key=lambda cell: (cell.waits is not None, bool(cell.trials))):
        cell = _with_best(_with_start(cell, found), found)
        state, path = (f"waits for {cell.waits}", None) if cell.waits else _state_of(cell)
        found[cell.label, cell.seed] = Known(cell, state, path, reasons[cell.needs] if state != "done" else None)
    return [found[cell.label, cell.seed] for cell in cells]


def _state_of(cell: Cell) -> tuple[str, Path | None]:
    """The state of a cell's command and, once that is done, its run: of several the best by what selects, the first of equal ones."""
    from gfml.base.runs import read_result

    command = read_command(["python", *cell.words], ROOT)
    state = command.state()
    if state != "done":
        return state, None
    paths = [run.path() for run in command.runs]
    return state, paths[0] if len(paths) == 1 else max(paths, key=lambda path: read_result(path)["selection"]["value"])


def _with_start(cell: Cell, found: Mapping[tuple[str, int], Known]) -> Cell:
    """The cell with the path of the run it starts from in its command, once that run is done."""
    if cell.waits is None:
        return cell
    start = found.get((cell.waits, cell.seed))
    if start is None:
        raise UserError(
            f"the cell {cell.label!r} starts from {cell.waits!r}, which this table has not for seed {cell.seed}"
        )
    if start.state != "done":
        return cell
    return replace(
        cell, words=tuple(str(start.path) if word.startswith("{run:") else word for word in cell.words), waits=None
    )


def _with_best(cell: Cell, found: Mapping[tuple[str, int], Known]) -> Cell:
    """The cell with the flags of its search's best trial, once every trial has ended; the first of equal ones."""
    from gfml.base.runs import read_result

    trials = [one for (label, _), one in found.items() if label in cell.trials]
    if not cell.trials or len(trials) < len(cell.trials) or any(one.state not in ("done", "failed") for one in trials):
        return replace(cell, waits="its search") if cell.trials else cell
    done = [one for one in trials if one.path]
    if not done:
        raise UserError(f"every trial of {cell.label!r} failed: mend its space, or look into the runs' log.txt")
    best = max(done, key=lambda one: read_result(one.path)["selection"]["value"])
    return replace(cell, words=(*cell.words, *best.cell.point), point=(), trials=cell.trials)


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
    """Run or continue what is missing and can run here, by ``gfml run-commands``; its exit code."""
    lines = [
        one.cell.command
        for one in known
        if not one.reason and one.state not in ("done", "running") and not one.cell.waits
    ]
    for one in known:
        if one.reason and one.state != "done":
            print(f"skipped: {one.cell.label}, seed {one.cell.seed}: {one.reason}")
    if not lines:
        return 0
    command = [sys.executable, "-m", "gfml.program.console", "run-commands", "--workers", str(workers)]
    return subprocess.run(command, input="\n".join(lines), text=True, cwd=ROOT).returncode


def collect(name: str, table: Mapping[str, Any], known: Sequence[Known]) -> None:
    """Write CSV, README and, for a table with main metrics, paired tests and figure.

    A row whose runs are not here keeps its stored figures; one that never ran says why.
    """
    from gfml.base.runs import cpu_seconds, read_result

    folder, main = TABLE_ROOT / table["folder"], table.get("main", [])
    done = {(one.cell.label, one.cell.seed): one.path for one in known if one.state == "done"}
    for path in done.values():
        read_result(path)
    fresh = {
        row["method"]: row
        for row in rows_of_runs([(label, path) for (label, _), path in done.items()], table.get("metrics", HEADLINE))
    }
    if table.get("cpu"):
        for row in fresh.values():
            spent = [cpu_seconds(path) for (label, _), path in done.items() if label == row["method"]]
            # Runs from before these seconds were kept have none.
            row |= {CPU: f"{statistics.fmean(spent):.0f}"} if spent and all(spent) else {}
    stored = {row["method"]: row for row in stored_rows(folder, name)}
    labels = list(dict.fromkeys(one.cell.label for one in known))
    rows = [_best_row(label, fresh.get(label), stored.get(label), known) for label in labels]
    # Rows made by hand stay too.
    theirs = {row["method"] for row in published_rows(name)}
    other = [
        row for row in stored.values() if row["method"] not in {*labels, *theirs} and row["protocol"] != "no training"
    ]
    simple = [row for row in fresh.values() if row["method"] not in labels]
    simple = simple or [
        row for row in stored.values() if row["protocol"] == "no training" and row["method"] not in labels
    ]
    pairs = list(dict.fromkeys((one.cell.label, other) for one in known for other in one.cell.against))
    tests = paired_rows(pairs, done, main, stored_rows(folder, paired_name(name)))
    store_rows(folder, name, [*rows, *other, *simple, *published_rows(name)])
    if pairs:
        store_rows(folder, paired_name(name), tests, PAIRED)
    if main:
        papers = {one.cell.label: one.cell.paper for one in known if one.cell.paper}
        by_label = {row["method"]: row for row in stored_rows(folder, name)}
        write_figure(
            folder / "results" / f"{name}.png", Drawn(by_label, labels, dict(reversed(pairs)), papers, tests), main
        )
    write_table([name, "--folder", table["folder"]])


def _best_row(label: str, fresh: dict | None, stored: dict | None, known: Sequence[Known]) -> dict[str, str]:
    """The row made of more runs; a stored one of as many is made anew."""
    if fresh and int(fresh["n"]) >= int((stored or {}).get("n") or 0):
        # Only the clock went otherwise: the file stays as it is.
        same = stored and all(
            stored.get(key) if key in ("train_seconds", CPU) else stored.get(key) == value
            for key, value in fresh.items()
        )
        return {key: value for key, value in stored.items() if value} if same else fresh
    if stored and stored.get("n"):
        return {key: value for key, value in stored.items() if value}
    needs = next((one.cell.needs for one in known if one.cell.label == label and one.reason), ())
    # What is wanted, not where it was looked for: tables are the same on every machine.
    return {
        "method": label,
        "protocol": f"not run: needs {', '.join(map(_in_words, needs))}" if needs else "not run yet",
    }


def _in_words(need: str) -> str:
    kind, _, what = need.partition(":")
    return {"data": f"the data of {what}", "files": what, "gpu": "a CUDA device"}[kind]


def compare(name: str, table: Mapping[str, Any]) -> list[str]:
    """Lines that put the stored figures beside the published ones: difference, seeds, selection rule, time."""
    rows = {row["method"]: row for row in stored_rows(TABLE_ROOT / table["folder"], name)}
    lines = []
    for label, beside in {cell.label: cell.paper for cell in expand(table)}.items():
        ours, paper = rows.get(label), rows.get(beside or "")
        if not ours or not paper or not ours.get("n"):
            continue
        facts = f"n {ours['n']}, {ours['protocol']}, {ours['train_seconds'] or '?'} s"
        lines.append(f"{label} beside {beside} [{facts}]")
        for metric in (
            key for key in paper if "@" in key and not key.endswith(" std") and paper[key] and ours.get(key)
        ):
            mine, theirs = float(ours[metric]), float(paper[metric])
            lines.append(
                f"    {metric:16} paper {theirs:.4f}  ours {mine:.4f}  difference {mine - theirs:+.4f} ({mine / theirs - 1:+.1%})"
            )
    return lines


def list_tables(out: str, data_root: str | None) -> None:
    """One line per table: how many runs are done, and what is missing here."""
    for name in table_names():
        table = load_table(name)
        cells = expand(table, out, data_root)
        searched = "search" in table
        # Of a study, whose runs are hundreds, the first trial of each row: how many rows have been begun.
        known = survey([cell for cell in cells if not searched or cell.label.endswith(": trial 1")], data_root)
        reasons = list(dict.fromkeys(one.reason for one in known if one.reason))
        rows = [
            row
            for row in stored_rows(TABLE_ROOT / table["folder"], name)
            if row["n"] and row["protocol"] != "no training"
        ]
        runs = sum(int(row["n"]) for row in rows)
        stored = f"{runs} runs in {len(rows)} rows stored" if rows else "nothing stored"
        here = f"here: {'first trials of rows ' if searched else ''}{summary(known)}"
        print(f"{name:22} {table.get('title', '')}\n{'':22} {stored}; {here}")
        for reason in reasons:
            print(f"{'':22} {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gfml reproduce", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("table", nargs="?", help="name of a file in configs/tables")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="every table with its state")
    what.add_argument("--launch", action="store_true", help="run what is missing, continue what is incomplete")
    what.add_argument("--collect", action="store_true", help="write CSV, README and figure from the finished runs")
    what.add_argument(
        "--check", action="store_true", help="fail if README and CSV disagree; print the paper's figures and ours"
    )
    parser.add_argument("--only", metavar="TEXT", help="only rows whose label contains this")
    parser.add_argument("--data-root", metavar="DIR", help="where the data sets lie; goes to every run")
    parser.add_argument("--out", metavar="DIR", default="runs", help="where the runs are")
    parser.add_argument(
        "--nice", type=number(int, least=0), default=0, metavar="N", help="priority of the runs: 0 usual, 19 last"
    )
    parser.add_argument("--workers", type=number(int, least=1), default=1, metavar="N", help="runs at a time")
    given = parser.parse_args(argv)
    if given.list == bool(given.table):
        parser.error("give the name of one table, or --list")
    if given.list:
        list_tables(given.out, given.data_root)
        return 0
    table = load_table(given.table)
    if given.check and "search" in table:
        from gfml.report.study import write_page

        write_page(TABLE_ROOT / table["folder"], given.table, table, check=True)
        return 0
    if given.check and given.only:
        raise UserError("--check compares the whole table: give it without --only")
    if given.check:
        write_table([given.table, "--folder", table["folder"], "--check"])
        print("\n".join(compare(given.table, table)) or "no row has a published one beside it")
        return 0
    return _run(given, table)


def _run(given: argparse.Namespace, table: Mapping[str, Any]) -> int:
    cells = [cell for cell in expand(table, given.out, given.data_root) if not given.only or given.only in cell.label]
    if not cells:
        raise UserError(f"found no row of {given.table} whose label contains {given.only!r}")
    if given.collect and given.only:
        raise UserError("--collect writes the whole table: give it without --only")
    if given.launch:
        return _launch_all(given, table, cells)
    known = survey(cells, given.data_root)
    if not given.collect:
        show(given.table, table, known)
    elif "search" in table:
        from gfml.report import study

        study.collect(given.table, table, known, Path(given.out), given.data_root)
    else:
        collect(given.table, table, known)
    if given.collect:
        done = sum(one.state == "done" for one in known)
        print(
            f"{given.table}: {done} of {len(known)} runs are here, collected into {table['folder']}; other rows keep their figures"
        )
    return 0


def _launch_all(given: argparse.Namespace, table: Mapping[str, Any], cells: Sequence[Cell]) -> int:
    """Run what is missing; a study row by row, so that rows are whole as early as can be. The worst exit code."""
    os.nice(given.nice)
    rows = [list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell.row)]
    worst = 0
    for group in rows if "search" in table else [cells]:
        known = survey(group, given.data_root)
        code = launch(known, given.workers)
        if code == 0 or (code == 1 and "search" in table):
            known = survey(group, given.data_root)
            if any(one.state == "not launched" and not one.reason for one in known):
                # Those that waited for another run.
                code = max(code, launch(known, given.workers))
        worst = max(worst, code)
        if code >= 128:
            break
    print(summary(survey(cells, given.data_root)))
    return worst
