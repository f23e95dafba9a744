"""Recommendation lists in the forms that frameworks write, as tables, and back.

    tsv, csv   user, item and score or rank, with a header; without one, user, item, score (Elliot's form)
    trec       query Q0 document rank score run, separated by blanks, no header
    recbole    the header carries types: user_id:token item_id:token score:float
    warprec    user_id, item_id, rating
    mmrec      one row a user: id, top_0, top_1, ... (MMRec's and Mirror-Gradient's saved recommendations)
    parquet    the columns of tsv

A rank counts before a score; of a TREC run the trec convention reads the scores alone. Ids stay text as written ("07" is not
"7"). Nothing is dropped here without a note.
Truth and train are read by :func:`read_pairs`: the same tables, .inter files, TREC qrels, adjacency lists.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.data import readers
from gfml.data.tables import normal

FORMS = ("tsv", "csv", "trec", "recbole", "elliot", "warprec", "parquet")
SCORE_NAMES = ("score", "scores", "prediction", "rating", "ratings", "relevance", "sim")
TRUTH_NAMES = (*readers.RATING_NAMES, "relevance", "rel")
RANK_NAMES = ("rank", "position", "pos")
_COLUMNS = {
    "tsv": ("user", "item", "rank", "score"),
    "csv": ("user", "item", "rank", "score"),
    "parquet": ("user", "item", "rank", "score"),
    "recbole": ("user_id:token", "item_id:token", "score:float"),
    "warprec": ("user_id", "item_id", "rating"),
    "elliot": None,
    "trec": None,
}


@dataclass(frozen=True)
class ListTable:
    """One row per recommended item, in the file's order.

    users, items: text ids. ranks, scores: float64 (NaN where a cell is empty), or None where there are none.
    by_score: ranks are only an order of ours, as in a TREC run, whose programs read the scores alone.
    notes: what reading found and how it was treated, {"rows without a score left out": 3}.
    """

    users: np.ndarray
    items: np.ndarray
    ranks: np.ndarray | None = None
    scores: np.ndarray | None = None
    notes: dict[str, int] = field(default_factory=dict)
    by_score: bool = False

    def __len__(self) -> int:
        return len(self.users)

    def take(self, chosen: np.ndarray) -> ListTable:
        """The rows that a mask or an index selects."""
        ranks, scores = (None if column is None else column[chosen] for column in (self.ranks, self.scores))
        return replace(self, users=self.users[chosen], items=self.items[chosen], ranks=ranks, scores=scores)


@dataclass(frozen=True)
class PairTable:
    """Users, items (text) and ratings (float64, ones where the file has none) of train or truth, each pair once."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    rated: bool
    notes: dict[str, int] = field(default_factory=dict)


def read_lists(path: str | os.PathLike[str]) -> ListTable:
    """The lists of a file in any of the forms, recognised by its columns; gzip or not.

    Rows with an empty or NaN score (and no rank) are left out; where some rows of a file with ranks have none, they
    follow the user's ranked ones. Errors: UserError with the columns found.
    """
    path = Path(path)
    frame, header = _frame(path)
    names = [normal(name) for name in frame.columns] if header else []
    if len(names) > 1 and names[1] == "top0":
        return _wide(frame)
    trec = not header and frame.shape[1] == 6 and frame.iloc[:, 1].nunique() == 1  # Q0, or another word of no meaning
    if trec:
        chosen = {"user": 0, "item": 2, "rank": 3, "score": 4}
    else:
        chosen = _columns(path, names, frame.shape[1], {"rank": RANK_NAMES, "score": SCORE_NAMES}, bare="score")
    column = {role: frame.iloc[:, place] for role, place in chosen.items()}
    ranks, scores = (_numbers(column[role], path, 1 + header) if role in column else None for role in ("rank", "score"))
    table = ListTable(_ids(column["user"], path), _ids(column["item"], path), ranks, scores, by_score=trec)
    table = replace(table, notes={} if trec else _unread(frame, header, chosen))
    if not header and not trec and scores is not None:
        counted = _counted(table)
        table.notes.update({"rows of a third column that counts 1, 2, 3 for each user, taken for a score as there is no header "
                            "(name it rank if it is one)": counted} if counted else {})  # fmt: skip
    return _noted(table)


def read_pairs(path: str | os.PathLike[str]) -> PairTable:
    """Train or truth: a table with user, item and maybe rating, TREC qrels, or adjacency lists ("user item item ...").

    A pair that is there twice counts once, with its first rating, and is noted.
    """
    path = Path(path)
    frame, header = _frame(path)
    names = [normal(name) for name in frame.columns] if header else []
    wide = frame.shape[1]
    qrels = not header and wide == 4 and frame.iloc[:, 1].isin(["0", "Q0"]).all()
    if qrels:
        chosen = {"user": 0, "item": 2, "rating": 3}
    elif not header and ((path.name.endswith(".txt") and frame.iloc[:, -1].eq("").any()) or wide > 5):
        return _adjacency(frame)
    else:
        chosen = _columns(path, names, wide, {"rating": TRUTH_NAMES}, bare="rating")
    users, items = (_ids(frame.iloc[:, chosen[role]], path) for role in ("user", "item"))
    rated = "rating" in chosen
    ratings = _numbers(frame.iloc[:, chosen["rating"]], path, 1 + header) if rated else np.ones(len(users))
    if np.isnan(ratings).any():
        row = int(np.flatnonzero(np.isnan(ratings))[0])
        raise UserError(
            f"{path}, line {row + 1 + header}: found no rating, wanted a number: write it or drop the column"
        )
    return _once(PairTable(users, items, ratings, rated, {} if qrels else _unread(frame, header, chosen)))


def _once(table: PairTable) -> PairTable:
    import pandas as pd

    again = pd.DataFrame({"user": table.users, "item": table.items}).duplicated().to_numpy()
    if not again.any():
        return table
    parts = {name: getattr(table, name)[~again] for name in ("users", "items", "ratings")}
    return replace(table, **parts, notes=table.notes | {"repeated pairs, counted once": int(again.sum())})


def _adjacency(frame: Any) -> PairTable:
    cells = frame.to_numpy()
    rows, columns = np.nonzero(cells[:, 1:] != "")
    users, items = cells[rows, 0].astype(str), cells[rows, columns + 1].astype(str)
    return _once(PairTable(users, items, np.ones(len(users)), rated=False))


def _frame(path: Path) -> tuple[Any, bool]:
    """The cells as text (Parquet: as text of its values), and whether the first line names the columns."""
    import pandas as pd

    if not path.is_file():
        raise UserError(f"there is no file {path}: check the path")
    if ".parquet" in path.suffixes:
        return _parquet(path), True
    raw = readers.read_bytes(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: write it as UTF-8, or as Parquet") from None
    head = text.split("\n", 1)[0].strip("\r")
    separator = next((mark for mark in ("\t", ",", ";") if mark in head), r"\s+")
    cells = [cell.strip().strip('"') for cell in (head.split(separator) if separator != r"\s+" else head.split())]
    named = {normal(cell.split(":")[0]) for cell in cells}
    # One long name is enough; "u" and "i" may be ids, unless they stand side by side.
    usual = {normal(name) for name in (*readers.USER_NAMES, *readers.ITEM_NAMES, "top_0") if len(name) > 1}
    header = bool(named & usual) or {"u", "i"} <= named
    width = max(len(line.split(separator if separator != r"\s+" else None)) for line in text.splitlines() or [""])
    names = [cell.split(":")[0] for cell in cells] if header else list(map(str, range(width)))
    try:
        with warnings.catch_warnings():  # a row longer than the header
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.StringIO(text), sep=separator, header=None, names=names, skiprows=int(header), dtype=str,
                                keep_default_na=False, index_col=False, engine="python" if separator == r"\s+" else "c")  # fmt: skip
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as error:
        raise UserError(f"{path} is no readable table ({' '.join(str(error).split())[:160]}): correct it") from error
    if not len(frame) or frame.shape[1] < 2:
        raise UserError(f"{path}: found {len(frame)} rows of {frame.shape[1]} columns, wanted at least user and item")
    return frame.fillna(""), header


def _parquet(path: Path) -> Any:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow's errors share no base with pandas'
        raise UserError(f"{path} is no readable Parquet file ({type(error).__name__}): write it again") from error
    return frame.astype(object).where(frame.notna(), "").map(lambda cell: cell if isinstance(cell, str) else f"{cell}")


def _columns(
    path: Path, names: list[str], width: int, optional: dict[str, tuple[str, ...]], *, bare: str
) -> dict[str, int]:
    """Where each role's column is: by usual names, or user, item and ``bare`` in this order where there is no header."""
    if not names:
        return {role: place for place, role in enumerate(("user", "item", bare)[:width])}
    wanted = {"user": readers.USER_NAMES, "item": readers.ITEM_NAMES, **optional}
    found = {
        role: next((names.index(normal(n)) for n in usual if normal(n) in names), None)
        for role, usual in wanted.items()
    }
    for role in ("user", "item"):
        if found[role] is None:
            raise UserError(f"{path} has no {role} column: found {', '.join(names)}; call it {role}")
    return {role: place for role, place in found.items() if place is not None}


def _wide(frame: Any) -> ListTable:
    """MMRec's file: a user's items side by side, best first."""
    cells = frame.to_numpy().astype(str)
    count = cells.shape[1] - 1
    ranks = np.tile(np.arange(1.0, count + 1), len(cells))
    table = ListTable(np.repeat(cells[:, 0], count), cells[:, 1:].reshape(-1), ranks)
    return table.take(table.items != "")


def _ids(column: Any, path: Path) -> np.ndarray:
    ids = column.str.strip().to_numpy().astype(str)
    if (ids == "").any():
        row = int(np.flatnonzero(ids == "")[0])
        raise UserError(f"{path}, row {row + 1}: found an empty id, wanted a user and an item: correct or remove it")
    return ids


def _numbers(column: Any, path: Path, first_line: int) -> np.ndarray:
    """float64, NaN for an empty cell; anything else that is no number is an error that names the line."""
    import pandas as pd

    value = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    empty = column.str.strip().str.lower().isin(["", "nan", "na", "none", "null"]).to_numpy()
    odd = np.flatnonzero(np.isnan(value) & ~empty)
    if len(odd):
        row = int(odd[0])
        raise UserError(f"{path}, line {first_line + row}: found {column.iloc[row]!r}, wanted a number: correct it")
    return value


def _noted(table: ListTable) -> ListTable:
    if table.ranks is not None:
        found = {"rows without a rank, put behind the user's ranked ones": int(np.isnan(table.ranks).sum())}
        if table.scores is not None:
            found["rows with an empty or NaN score, ordered by rank"] = int(np.isnan(table.scores).sum())
    elif table.scores is None:
        found = {"rows without a rank or a score, ordered as in the file": len(table)}
    else:
        keep = ~np.isnan(table.scores)
        table, found = table.take(keep), {"rows with an empty or NaN score, left out": int((~keep).sum())}
    return replace(table, notes=table.notes | {key: n for key, n in found.items() if n})


def _unread(frame: Any, header: bool, chosen: dict[str, int]) -> dict[str, int]:
    """A note of the columns that no role has."""
    rest = [str(name) if header else f"number {place + 1}" for place, name in enumerate(frame.columns)]
    rest = [name for place, name in enumerate(rest) if place not in chosen.values()]
    return {f"columns not read ({', '.join(rest[:5])})": len(rest)} if rest else {}


def _counted(table: ListTable) -> int:
    """How many rows there are if each user's scores are 1, 2, 3, ... in the file's order, else 0."""
    _, user = np.unique(table.users, return_inverse=True)
    order = np.argsort(user, kind="stable")
    starts = np.flatnonzero(np.diff(user[order], prepend=-1))
    place = np.arange(len(table)) - np.repeat(starts, np.diff(np.append(starts, len(table))))
    return len(table) if len(starts) < len(table) and np.array_equal(table.scores[order], place + 1.0) else 0


def ordered(table: ListTable) -> tuple[ListTable, np.ndarray]:
    """The rows by user (first appearance) and place, and each row's 0-based place in its list.

    By rank where there are ranks, then by score descending, then in the file's order. Notes count tied scores and
    repeated ranks.
    """
    _, first, user = np.unique(table.users, return_index=True, return_inverse=True)
    user = np.argsort(np.argsort(first))[user]
    score = np.zeros(len(table)) if table.scores is None else -np.nan_to_num(table.scores, nan=-np.inf)
    rank = np.zeros(len(table)) if table.ranks is None else np.nan_to_num(table.ranks, nan=np.inf)
    order = np.lexsort((np.arange(len(table)), score, rank, user))
    same = np.diff(user[order]) == 0
    rank, score = rank[order], score[order]
    tied, found = same & (score[1:] == score[:-1]), {}
    if table.ranks is not None:
        start = min(1.0, rank.min(initial=1.0)) - 1
        before = np.append(start, np.where(same, rank[:-1], start))[: len(rank)]
        found = {
            "ranks that a user has twice, ordered by score, then as in the file": same
            & (rank[1:] == rank[:-1])
            & np.isfinite(rank[1:]),
            "gaps in a user's ranks, closed up (rectools keeps them)": (rank > before + 1) & np.isfinite(rank),
            "scores above that of the rank before, ordered by rank": same & (score[1:] < score[:-1]),
        }
        found |= {"tied scores, ordered by rank (trec: by item)": tied} if table.by_score else {}
    elif table.scores is not None:
        found = {"tied scores, ordered as in the file": tied}
    notes = table.notes | {note: int(rows.sum()) for note, rows in found.items() if rows.any()}
    starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(table) else np.empty(0, np.int64)
    lengths = np.diff(np.append(starts, len(table)))
    return replace(table.take(order), notes=notes), np.arange(len(table)) - np.repeat(starts, lengths)


def write_table(path: str | os.PathLike[str], form: str, table: ListTable) -> None:
    """Lists in the form of another framework, each user's items best first.

    Where the form wants a score it descends by one from place to place, so that none are tied, and ends at 1: programs
    that give unlisted items the score 0 rank them below. Errors: UserError for an unknown form.
    """
    import pandas as pd

    if form not in FORMS:
        raise UserError(f"found the list form {form!r}, wanted one of {', '.join(FORMS)}")
    table, place = ordered(table)
    score = (place.max(initial=0) + 1 - place).astype(float)
    columns = _COLUMNS[form] or ("user", "item", "score")
    if form == "trec":
        cells = {"q": table.users, "q0": "Q0", "d": table.items, "rank": place + 1, "score": score, "run": "gfml"}
    elif len(columns) == 4:
        cells = dict(zip(columns, (table.users, table.items, place + 1, score), strict=True))
    else:
        cells = dict(zip(columns, (table.users, table.items, score), strict=True))
    frame = pd.DataFrame(cells)
    with atomic_open(path, "wb") as stream:
        if form == "parquet":
            frame.to_parquet(stream, index=False)
        else:
            separator = {"csv": ",", "trec": " "}.get(form, "\t")
            frame.to_csv(stream, sep=separator, index=False, header=form not in ("elliot", "trec"))
