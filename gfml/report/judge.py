"""Judge recommendation lists, whoever made them, and test whether they differ.

    gfml judge LISTS --train TRAIN --test TEST                     all metrics, head and tail, intervals
    gfml judge theirs.tsv runs/RUN --train TRAIN --test TEST       a framework's lists against a run of ours
    gfml judge runs/RUN --train TRAIN --test TEST --write trec=run.txt

LISTS: a file (TSV or CSV with user, item and score or rank; a TREC run; RecBole's, Elliot's, WarpRec's or MMRec's lists;
Parquet) or the directory of a finished run. TRAIN and TEST: tables of user, item and maybe rating, .inter files, TREC
qrels, adjacency lists or Parquet. With several LISTS every other one is compared with the first over the same users.
Nothing is masked or filled up: what a list holds is what is judged. docs/metrics.md says what each figure means here and elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gfml.base.errors import UserError
from gfml.base.files import atomic_open, write_json
from gfml.program.cli import Parser, TopksAction, add_settings, number, run_main
from gfml.program.flags import DefinitionSettings

if TYPE_CHECKING:
    from gfml.data.lists import ListTable
    from gfml.metrics.conventions import Figures
    from gfml.ranking.judged import Ground

ACCURACY = ("recall", "ndcg", "precision", "hit", "mrr", "map", "graded_ndcg")
GROUPS = ("head_recall", "head_ndcg", "tail_recall", "tail_ndcg", "arp", "aplt", "novelty")
TOTALS = ("coverage", "gini", "entropy", "head_exposure", "tail_exposure")


@dataclass(frozen=True)
class Judged:
    """One source: its figures, those of other conventions by name, notes; arrays as the comparison of runs reads them."""

    label: str
    figures: Figures
    others: Mapping[str, Figures]
    notes: Mapping[str, int]
    arrays: dict[str, np.ndarray] = field(repr=False)
    unit: str = "user"

    @property
    def per_unit(self) -> dict[str, np.ndarray]:
        """The figures of every user, by metric."""
        return {key.removeprefix("per_user/"): values for key, values in self.arrays.items() if "/" in key}


def build_parser() -> Parser:
    """The command line of ``gfml judge``."""
    parser = Parser(prog="gfml judge", description="Judge recommendation lists that anyone made.")
    parser.add_argument("lists", nargs="+", metavar="LISTS", help="file of lists, or directory of a finished run")
    parser.add_argument("--train", required=True, metavar="FILE", help="what the users had before: popularity, groups")
    parser.add_argument(
        "--test", required=True, metavar="FILE", help="the truth; its ratings count only where asked for"
    )
    parser.add_argument("--topks", nargs="+", action=TopksAction, default=(5, 10, 20), metavar="K", help="list lengths")
    add_settings(parser, DefinitionSettings)
    parser.add_argument("--metrics", nargs="+", metavar="NAME@K", help="what to compare (default: recall and ndcg)")
    parser.add_argument(
        "--resamples", type=number(int, least=100), default=2000, metavar="N", help="draws of the bootstrap"
    )
    parser.add_argument("--write", nargs="+", metavar="FORM=FILE", help="write the first lists in another form too")
    parser.add_argument("--out", metavar="DIR", help="write judged.json and per-user figures there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from gfml.data.interactions import check_gains
    from gfml.data.lists import read_pairs
    from gfml.ranking.judged import ground_of

    tables = [read_source(path) for path in options.lists]
    truth, train = read_pairs(options.test), read_pairs(options.train)
    if options.graded and not truth.rated:
        raise UserError(f"{options.test} has no ratings, wanted them for --graded: give a file with a rating column")
    if options.graded:
        check_gains(truth.ratings)
    ground = ground_of(truth, train, tables)
    found = [judge(label, table, ground, options) for label, table in zip(_labels(options.lists), tables, strict=True)]
    print(text_of(found, ground, options))
    rows = _compare(found, options) if len(found) > 1 else []
    for form_and_file in options.write or ():
        _write(form_and_file, tables[0])
    if options.out:
        _store(Path(options.out), found, rows, options)
    return 0


def read_source(path: str) -> ListTable:
    """The lists of a file, or those that a finished run stored."""
    from gfml.data.lists import read_lists

    return run_lists(Path(path)) if Path(path).is_dir() else read_lists(path)


def run_lists(path: Path) -> ListTable:
    """The test lists of a run under the names that its data gave users and items (their numbers where it gave none)."""

    from gfml.data.lists import ListTable
    from gfml.report.stored import read_arrays

    if not any((path / name).is_file() for name in ("analysis.npz", "config.toml")):
        raise UserError(f"found the directory {path}, which is no run: give that of a finished run, or a file of lists")
    arrays = read_arrays(path)
    if "top" not in arrays or "test_users" not in arrays:
        raise UserError(f"{path} stored no lists: give the directory of a recommender's finished run")
    top, users = arrays["top"].astype(np.int64), arrays.get("user_names", arrays["test_users"]).astype(str)
    names = arrays.get("item_names", np.arange(max(1, int(top.max(initial=0)) + 1))).astype(str)
    rows, ranks = np.nonzero(top >= 0)
    return ListTable(users[rows], names[top[rows, ranks]], ranks + 1.0)


def judge(label: str, table: ListTable, ground: Ground, options: Any) -> Judged:
    """Everything about one source."""

    from gfml.metrics.conventions import judge_as
    from gfml.ranking.judged import case_of, ours

    case, notes = case_of(table, ground)
    figures, users = ours(case, options.topks, map_denominator=options.map_denominator, graded=options.graded)
    short = int((case.listed & (case.lengths < max(options.topks))).sum())
    if short:
        notes[f"lists of fewer than {max(options.topks)} items, judged as they are"] = short
    others = {name: judge_as(name, case, options.topks) for name in options.metrics_as or ()}
    arrays = {"test_users": users} | {f"per_user/{name}": value for name, value in figures.per_user.items()}
    for name, other in others.items():
        arrays |= {f"per_user/{name}:{metric}": value[users] for metric, value in other.per_user.items()}
    return Judged(label, figures, others, {**ground.notes, **notes}, {k: np.asarray(v) for k, v in arrays.items()})


def text_of(found: Sequence[Judged], ground: Ground, options: Any) -> str:
    """Notes and tables; every table names its convention."""
    users = int(np.count_nonzero(np.diff(ground.truth.indptr)))
    lines = [f"{users:,} users judged, {ground.truth.nnz:,} pairs of truth, {ground.train.nnz:,} of train"]
    for one in found:
        lines += [f"note: {one.label}: {what}: {count:,}" for what, count in one.notes.items()]
    if ground.rated and not (options.graded or options.metrics_as):
        lines.append("note: the truth has ratings; every row of it counts as relevant, give --graded to weigh them")
    divided = {"min": "min(T, K)", "k": "K", "n": "T"}[options.map_denominator]
    lines.append(f"\nmetrics of this project (docs/metrics.md), map over {divided}; 95 % intervals over users")
    lines += _table(found, _rows(found, options), options.resamples)
    for name in options.metrics_as or ():
        from gfml.metrics.conventions import CONVENTIONS

        about = (CONVENTIONS[name].__doc__ or "").split("\n")[0].rstrip(".")
        lines.append(f"\nas {name}: {about}")
        values = [one.others[name].means for one in found]
        for metric in values[0]:
            lines.append("  ".join([f"{metric:<22}", *(_figure(value.get(metric)) for value in values)]))
    return "\n".join(lines)


def _rows(found: Sequence[Judged], options: Any) -> list[str]:
    known = found[0].figures.means
    every = [f"{name}@{k}" for name in (*ACCURACY, *GROUPS, *TOTALS) for k in options.topks]
    return [name for name in every if name in known]


def _table(found: Sequence[Judged], names: Sequence[str], resamples: int) -> list[str]:
    from gfml.metrics.compare import bootstrap_mean

    width = max(24, *(len(one.label) for one in found))
    lines = ["  ".join([f"{'metric':<22}", *(f"{one.label:<{width}}" for one in found)]).rstrip()]
    for name in names:
        cells = []
        for one in found:
            values = one.figures.per_user.get(name)
            text = _figure(one.figures.means.get(name))
            if values is not None and (values == values).any():
                interval = bootstrap_mean(values, resamples=resamples)
                text += f" [{interval.low:.4f}, {interval.high:.4f}]"
            cells.append(f"{text:<{width}}")
        lines.append("  ".join([f"{name:<22}", *cells]).rstrip())
    return lines


def _figure(value: float | None) -> str:
    return "     -" if value is None else f"{value:.4f}"


def _compare(found: Sequence[Judged], options: Any) -> list[dict[str, Any]]:
    from gfml.base.errors import choice_error
    from gfml.report.compare import compare, text_of

    known = list(found[0].per_unit)
    if wrong := next((name for name in options.metrics or () if name not in known), None):
        raise choice_error("metric", wrong, known)
    metrics = options.metrics or [f"{name}@{k}" for name in ("recall", "ndcg") for k in options.topks]
    rows = compare([(found[0], other) for other in found[1:]], metrics, options.resamples)
    print("\npaired tests over the same users\n" + text_of(rows))
    return rows


def _labels(paths: Sequence[str]) -> list[str]:
    """The last part of each path; the whole path where two end alike."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _write(form_and_file: str, table: ListTable) -> None:
    """The lists of the first source in another form."""
    from gfml.data.lists import FORMS, write_table

    form, equals, file = form_and_file.partition("=")
    if form not in FORMS or not equals or not file:
        raise UserError(f"found --write {form_and_file!r}, wanted FORM=FILE with a form of {', '.join(FORMS)}")
    write_table(file, form, table)
    print(f"lists as {form}  {file}")


def _store(out: Path, found: Sequence[Judged], rows: Sequence[Mapping[str, Any]], options: Any) -> None:
    sources = {
        one.label: {
            "figures": one.figures.means,
            "as": {name: figures.means for name, figures in one.others.items()},
            "notes": dict(one.notes),
        }
        for one in found
    }
    settings = {"map_denominator": options.map_denominator, "graded": options.graded, "topks": list(options.topks)}
    write_json(out / "judged.json", {"definitions": settings, "lists": sources, "comparison": list(rows)})
    for number_of, one in enumerate(found):
        with atomic_open(out / f"per_user_{number_of}.npz", "wb") as stream:
            np.savez_compressed(stream, **one.arrays)
    print(f"files  {out}")


if __name__ == "__main__":
    sys.exit(run_main(main))
