"""Readers: files in the formats of the recommender literature become :class:`Records`.

Nothing is renumbered, split or filtered here (see :mod:`gfml.data.splits`). Every reader names
the file and the line of what it cannot accept in a one-line :class:`UserError`.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gfml.base.errors import UserError
from gfml.data.names import Ids, encode, from_values, merge, spelled
from gfml.data.tables import (
    Table,
    TextTable,
    cast,
    is_number,
    normal,
    open_table,
    read_bytes,
    short,
    suffix,
    utf8_bytes,
    without_comments,
)
from gfml.data.times import read_times

PARTS = ("train", "valid", "test")

# Usual names, whatever their case, blanks, underscores and hyphens; the first that a table has counts.
USER_NAMES = (
    "user_id",
    "user",
    "uid",
    "u",
    "reviewer_id",
    "customer_id",
    "customer",
    "visitor_id",
    "member_id",
    "session_id",
)
ITEM_NAMES = ("item_id", "item", "iid", "i", "movie_id", "movie", "product_id", "parent_asin", "asin", "book_id",
              "business_id", "artist_id", "track_id", "song_id", "video_id", "game_id", "article_id")  # fmt: skip
RATING_NAMES = ("rating", "ratings", "score", "stars", "overall", "weight", "count", "label")
TIME_NAMES = ("timestamp", "time", "unix_review_time", "datetime", "date_time", "date", "ts", "order_date", "created_at",
              "event_time")  # fmt: skip
DATE_NAMES = ("date", "day", "order_date", "event_date", "review_date")
CLOCK_NAMES = ("time", "clock", "order_time", "event_time", "review_time")
_USUAL = {"user": USER_NAMES, "item": ITEM_NAMES, "rating": RATING_NAMES, "time": TIME_NAMES}
PART_NAMES = ("x_label",)


@dataclass(frozen=True)
class Records:
    """Interactions as a source lists them, one array entry per row.

    users, items: whole numbers, never negative: the ids themselves, or rows of the names where there are any.
    user_names, item_names: sorted distinct ids, int64 or str (see :mod:`gfml.data.names`); None for plain numbers.
    ratings: float64, or None where the source has none or nobody asked. times: int64 or float64, the smaller the
        earlier; per_second: how many of them make a second, None where they are no times.
    parts: int8 index into :data:`PARTS` when the source ships its own split, else None.
    numbered: ids are row numbers that start at ``first_id``; nobody is renamed and the size is
        ``max id - first_id + 1``, or ``min_size`` (users, items) when that is larger.
    notes: what reading found.
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray | None = None
    times: np.ndarray | None = None
    parts: np.ndarray | None = None
    user_names: np.ndarray | None = None
    item_names: np.ndarray | None = None
    per_second: int | None = None
    numbered: bool = False
    first_id: int = 0
    min_size: tuple[int, int] = (0, 0)
    notes: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    def take(self, keep: np.ndarray) -> Records:
        """The rows that ``keep`` (a mask or an index) selects."""
        columns = ("users", "items", "ratings", "times", "parts")
        chosen = {name: getattr(self, name) for name in columns}
        return replace(self, **{name: None if column is None else column[keep] for name, column in chosen.items()})

    def ids(self, side: str) -> np.ndarray:
        """The source's id of every row of ``users`` or ``items``."""
        rows, names = getattr(self, side), getattr(self, f"{side[:-1]}_names")
        return rows if names is None else names[rows]

    def in_order(self) -> Records:
        """The same with the order of the rows for times: within each part where the source has parts, train first."""
        order = np.arange(len(self))
        if self.parts is not None:
            order[np.argsort(self.parts, kind="stable")] = np.arange(len(self))
        notes = self.notes | {"time": "the order of the rows (--time-col order)"}
        return replace(self, times=order, per_second=None, notes=notes)


def largest_table(count: int) -> int:
    """With ``count`` rows, ids above this are labels: a table up to the largest id would be mostly empty."""
    return 10 * count + 1_000_000


def join_parts(parts: Mapping[str, Records]) -> Records:
    """Stack the records of ``train`` (and ``valid``, ``test``) and label each row with its part."""
    names = [name for name in PARTS if name in parts]
    several = [parts[name] for name in names]

    def stack(column: str) -> np.ndarray | None:
        arrays = [getattr(one, column) for one in several]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    if len({one.per_second for one in several if one.times is not None}) > 1:
        several = [one if one.times is None else _in_seconds(one) for one in several]
    labels = [np.full(len(parts[name]), PARTS.index(name), dtype=np.int8) for name in names]
    sizes = np.max([one.min_size for one in several], axis=0)
    joined = replace(
        several[0],
        users=stack("users"),
        items=stack("items"),
        ratings=stack("ratings"),
        times=stack("times"),
        parts=np.concatenate(labels),
        min_size=(int(sizes[0]), int(sizes[1])),
        notes=_joined_notes(dict(zip(names, several, strict=True))),
    )
    for side in ("user", "item"):
        if any(getattr(one, f"{side}_names") is not None for one in several):
            codes, common = merge([_as_ids(one, side) for one in several])
            joined = replace(joined, **{f"{side}s": np.concatenate(codes), f"{side}_names": common, "numbered": False})
    return joined


def _joined_notes(parts: Mapping[str, Records]) -> dict[str, object]:
    """The notes of all parts; one that differs between them names its part."""
    every: dict[str, dict[str, object]] = {}
    for part, records in parts.items():
        for key, value in records.notes.items():
            every.setdefault(key, {})[part] = value
    joined: dict[str, object] = {}
    for key, found in every.items():
        alike = len({str(value) for value in found.values()}) == 1
        joined |= (
            {key: next(iter(found.values()))} if alike else {f"{key} ({part})": note for part, note in found.items()}
        )
    return joined


def _as_ids(records: Records, side: str) -> Ids:
    rows, names = getattr(records, f"{side}s"), getattr(records, f"{side}_names")
    return from_values(rows) if names is None else Ids(rows, names)


def _in_seconds(records: Records) -> Records:
    if records.per_second is None:
        raise UserError("one part of the data has plain numbers for times and another has dates: write them alike")
    return replace(records, times=records.times / records.per_second, per_second=1)


# Runs of non-blank bytes ------------------------------------------------------------------------


class _Tokens(NamedTuple):
    """Runs of non-blank bytes: ``data[start:end]`` on 0-based ``line``."""

    path: Path
    data: np.ndarray
    start: np.ndarray
    end: np.ndarray
    line: np.ndarray

    def at(self, chosen: Any) -> _Tokens:
        return self._replace(start=self.start[chosen], end=self.end[chosen], line=self.line[chosen])

    def text(self, index: int) -> str:
        found = self.data[self.start[index] : self.end[index]].tobytes().decode("utf-8", "replace")
        return found if len(found) <= 40 else found[:37] + "..."

    def error(self, index: int, wanted: str) -> UserError:
        line = int(self.line[index]) + 1
        return UserError(f"{self.path}, line {line}: found {self.text(index)!r}, wanted {wanted}: correct or remove it")


def _tokens(raw: bytes, path: Path) -> _Tokens:
    data = np.frombuffer(raw, dtype=np.uint8)
    filled = np.empty(len(data) + 2, dtype=bool)
    filled[0] = filled[-1] = False
    # Blank, tab, LF, VT, FF and CR separate; everything else belongs to a token.
    filled[1:-1] = (data != 32) & ((data < 9) | (data > 13))
    edges = np.flatnonzero(filled[1:] != filled[:-1])
    start, end = edges[::2], edges[1::2]
    line = np.searchsorted(np.flatnonzero(data == 10), start)
    return _Tokens(path, data, start, end, line)


def _integers(tokens: _Tokens) -> tuple[np.ndarray, np.ndarray]:
    """int64 value of each token, and where one is not the plain spelling of a number from 0 to 2^63 - 1."""
    length = tokens.end - tokens.start
    value = np.zeros(len(length), dtype=np.uint64)
    bad = (length > 19) | ((length > 1) & (tokens.data[tokens.start] == 48))
    for position in range(int(np.minimum(length, 19).max(initial=0))):
        inside = np.flatnonzero(length > position)
        digit = tokens.data[tokens.start[inside] + position] - np.uint8(48)
        bad[inside[digit > 9]] = True
        value[inside] = value[inside] * np.uint64(10) + digit
    bad |= value > np.uint64(2**63 - 1)
    return value.astype(np.int64), bad


# Formats ----------------------------------------------------------------------------------------


def read_adjacency(path: str | os.PathLike[str]) -> Records:
    """LightGCN text: one user per line, ``user item item ...``, 0-based ids, or names without blanks.

    Any blanks, trailing blanks, CRLF, blank lines, users without items and users on several
    lines are accepted. A user without items still counts for the size. Ids of which one is not a
    plain number (``007``, ``-5``, ``B00X``) are names; that is noted.
    """
    path = Path(path)
    notes: dict[str, object] = {}
    tokens = _tokens(without_comments(utf8_bytes(read_bytes(path), path, notes), path, notes), path)
    first = np.ones(len(tokens.line), dtype=bool)
    first[1:] = tokens.line[1:] != tokens.line[:-1]
    owner = np.cumsum(first) - 1
    empty = int(first.sum()) - len(np.unique(tokens.line[~first]))
    if empty:
        notes[f"lines without items in {path.name}"] = empty
    value, bad = _integers(tokens)
    if bad.any():
        return _named_lists(tokens, first, owner, int(np.flatnonzero(bad)[0]), notes)
    owner = value[first][owner]
    listed = int(owner.max()) + 1
    least = listed if listed <= largest_table(len(value)) else 0
    return Records(owner[~first], value[~first], numbered=True, min_size=(least, 0), notes=notes)


def _named_lists(tokens: _Tokens, first: np.ndarray, owner: np.ndarray, odd: int, notes: dict[str, object]) -> Records:
    texts = [
        tokens.data[start:end].tobytes().decode() for start, end in zip(tokens.start.tolist(), tokens.end.tolist())
    ]
    comma = next((index for index, text in enumerate(texts) if "," in text), None)
    if comma is not None:
        raise tokens.error(comma, "ids separated by blanks (a table with commas is one pair a line, and a .csv)")
    names = np.array(texts, dtype=np.str_)
    users, items = from_values(names[first]), from_values(names[~first])
    notes[f"ids of {tokens.path.name}"] = (
        f"names, not numbers, as {texts[odd]!r} in line {tokens.line[odd] + 1} is none"
    )
    return Records(users.codes[owner][~first], items.codes, user_names=users.names, item_names=items.names, notes=notes)


def is_adjacency(*paths: Path) -> bool:
    """Whether text files are lists of ids, not tables: lines of blanks and words, of several lengths or more than four.

    Lengths are compared over all the files: parts of one table would have the same number of columns.
    """
    widths: set[int] = set()
    for path in paths:
        if suffix(path) != "txt":
            return False
        text = without_comments(read_bytes(path)[: 1 << 20], path, {})
        lines = [line for line in text.splitlines()[:2000] if line.strip()]
        if any(mark in line for line in lines[:4] for mark in (b",", b";", b"|", b"::")):
            return False
        widths |= {len(line.split()) for line in lines}
        header = {normal(word) for line in lines[:1] for word in line.decode("utf-8", "replace").split()}
        if header & {normal(name) for name in USER_NAMES}:
            return False
    return len(widths) > 1 or max(widths, default=0) > 4


def read_adjacency_parts(paths: Mapping[str, str | os.PathLike[str]]) -> Records:
    """Adjacency lists of ``train``, ``test`` and maybe ``valid`` as one labelled table."""
    return join_parts({name: read_adjacency(path) for name, path in paths.items()})


def read_counted_lists(path: str | os.PathLike[str], *, counts_as_items: bool = False) -> Records:
    """CiteULike's ``users.dat``: line u is ``n item item ...``, the first number being how many items follow.

    counts_as_items: take that number for one more item, as the experiments of the CML paper did.
    Raises UserError for a line whose number of items is not the one it announces.
    """
    path = Path(path)
    tokens = _tokens(read_bytes(path), path)
    value, bad = _integers(tokens)
    if bad.any():
        raise tokens.error(int(np.flatnonzero(bad)[0]), "a number of items or an item (an integer >= 0)")
    first = np.ones(len(value), dtype=bool)
    first[1:] = tokens.line[1:] != tokens.line[:-1]
    listed = np.bincount(tokens.line)
    wrong = np.flatnonzero(value[first] != listed[tokens.line[first]] - 1)
    if len(wrong):
        line = int(tokens.line[first][wrong[0]])
        found = f"found {listed[line] - 1} items after the count {int(value[first][wrong[0]])}"
        raise UserError(f"{path}, line {line + 1}: {found}, wanted as many: is each line a count and its items?")
    keep = np.ones_like(first) if counts_as_items else ~first
    return Records(tokens.line[keep].astype(np.int64), value[keep])


def _read_numbers(path: str | os.PathLike[str], columns: Sequence[str], separator: str = "\t") -> list[np.ndarray]:
    """Columns of a headerless numeric table, in the order of ``columns``: ``user`` and ``item`` int64, others float64."""
    table = open_table(path, separator=separator, header=False)
    if len(table.names) != len(columns):
        wanted = f"{len(columns)} fields ({', '.join(columns)})"
        raise UserError(
            f"{path}, line 1: found {len(table.names)} fields, wanted {wanted}: is this the published file?"
        )
    cells, read = table.read(table.names), []
    for own, name in zip(table.names, columns, strict=True):
        if name in ("user", "item"):
            ids = encode(table, own, cells[own])
            if ids.names.dtype.kind != "i":
                texts = cells[own].to_pylist()
                row = next(row for row, text in enumerate(texts) if from_values([text]).names.dtype.kind != "i")
                raise table.error(row, texts[row], "an id (an integer from 0 to 2^63 - 1)")
            read.append(ids.names[ids.codes])
        else:
            read.append(read_ratings(table, own, cells[own]))
    return read


def read_lastfm(paths: Mapping[str, str | os.PathLike[str]]) -> Records:
    """LastFM as LightGCN-PyTorch ships it: TSV ``user item count``, 1-based ids, 1,892 x 4,489.

    The listening count may be in scientific notation; it is kept as the rating.
    """
    parts = {}
    for name, path in paths.items():
        users, items, counts = _read_numbers(path, ("user", "item", "count"))
        for ids, what in ((users, "user"), (items, "item")):
            if len(ids) and ids.min() < 1:
                line = int(np.argmin(ids)) + 1
                raise UserError(f"{path}, row {line}: found {what} 0, wanted ids from 1: is this the LastFM file?")
        parts[name] = Records(users, items, counts, numbered=True, first_id=1, min_size=(1892, 4489))
    return join_parts(parts)


def read_movielens(path: str | os.PathLike[str]) -> Records:
    """MovieLens ``ratings.dat`` (``user::item::rating::time``) or ``u.data`` (the same, tabs)."""
    separator = "::" if b"::" in read_bytes(path)[:200] else "\t"
    return Records(*_read_numbers(path, ("user", "item", "rating", "time"), separator), per_second=1)


def read_pairs_npz(path: str | os.PathLike[str]) -> Records:
    """``.npz`` with integer arrays ``user`` and ``movie`` (or ``item``), row by row; no pickles."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no file {path}: check the path given with `dataset` or `data_root`")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name in ("user", "movie", "item")}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable .npz ({short(error)}): fetch the file again") from error
    item = arrays.get("item", arrays.get("movie"))
    if "user" not in arrays or item is None:
        raise UserError(f"{path}: found arrays {sorted(arrays)}, wanted user and item: fetch the file again")
    if len(arrays["user"]) != len(item) or arrays["user"].ndim != 1 or item.ndim != 1:
        raise UserError(
            f"{path}: found {arrays['user'].shape} users and {item.shape} items, wanted two lists of one length"
        )
    users, items = from_values(arrays["user"]), from_values(item)
    return Records(users.codes, items.codes, user_names=users.names, item_names=items.names)


def _is_no_id(array: np.ndarray) -> np.ndarray:
    """Mask of the numbers that are negative, broken or, as floats, too large to be exact."""
    if array.dtype.kind == "f":
        return ~((array >= 0) & (array < 2**53) & (array == np.floor(array)))
    return (array < 0) | (array > np.uint64(2**63 - 1)) if array.dtype.kind == "u" else array < 0


def _array_ids(ids: Any, path: Path, what: str) -> np.ndarray:
    """``ids`` as int64; floats with a fraction, negatives and numbers beyond int64 are errors."""
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        raise UserError(f"{path}: found {what} ids of type {array.dtype}, wanted a list of integers: check the file")
    bad = np.flatnonzero(_is_no_id(array))
    if len(bad):
        found = f"row {int(bad[0]) + 1}: found {what} id {array[bad[0]]}"
        raise UserError(f"{path}, {found}, wanted an integer >= 0 within 64 bits: correct the file")
    return array.astype(np.int64)


# Pickles of the MCL release ---------------------------------------------------------------------


class _Dtype:
    """What a pickled ``numpy.dtype`` says, for plain numbers, strings and objects only."""

    def __init__(self, code: str = "", *_: object) -> None:
        if not re.fullmatch(r"(?:[iufb][1248]|[US]\d{1,4}|O8?)", str(code)):
            raise pickle.UnpicklingError(f"array type {code!r}")
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code) if self.order != "|" else np.dtype(self.code)


class _Array:
    """What a pickled ``numpy.ndarray`` holds; ``value`` is the array."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if kind.dtype.kind == "O":
            self.value = np.array(list(content)).reshape(shape)
        else:
            self.value = np.frombuffer(content, dtype=kind.dtype).reshape(shape, order="F" if fortran else "C")


def _empty_array(*_: object) -> _Array:
    return _Array()


def _buffer_array(content: bytes, kind: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def _scalar(kind: _Dtype, content: bytes) -> object:
    return np.frombuffer(content, dtype=kind.dtype)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin-1")


_PLAIN = (list, tuple, dict, set, frozenset, int, float, bool, str, complex)
_HARMLESS: dict[tuple[str, str], Any] = {("builtins", kind.__name__): kind for kind in _PLAIN}
_HARMLESS |= {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _latin1}
_HARMLESS |= {
    (f"{package}.{module}", name): shell
    for package in ("numpy.core", "numpy._core")
    for module, name, shell in (
        ("multiarray", "_reconstruct", _empty_array),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _buffer_array),
    )
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and arrays of them; any other class is refused.

    A pickle can name any function to call. Here the names lead only to the harmless
    constructors above, none of which runs code of the file or of numpy's own unpickling.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("__builtin__", "builtins")
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _HARMLESS[module, name]


def load_pickled(path: str | os.PathLike[str]) -> object:
    """Content of a pickle that holds only containers, numbers, strings and numpy arrays."""
    raw = read_bytes(path)
    try:
        return _RestrictedUnpickler(io.BytesIO(raw)).load()
    except pickle.UnpicklingError as error:
        wanted = "only lists, dicts, numbers, strings and numpy arrays"
        raise UserError(
            f"{path} was refused ({short(error)}): wanted a pickle with {wanted}; convert it to text"
        ) from error
    except Exception as error:  # a damaged pickle fails in any way at all
        reason = f"{type(error).__name__}: {short(error)}"
        raise UserError(f"{path} is no readable pickle ({reason}): fetch the file again") from error


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def read_mcl_pickle(path: str | os.PathLike[str]) -> Records:
    """MCL's ``train.pkl``/``test.pkl``: a triple (users, items, ratings) or a dict user -> items."""
    path = Path(path)
    loaded = _plain(load_pickled(path))
    if isinstance(loaded, dict):
        lists = [_plain(items) for items in loaded.values()]
        counts = [len(items) for items in lists]
        users = np.repeat(_array_ids(list(loaded), path, "user"), counts)
        items = _array_ids([item for one in lists for item in one], path, "item")
        return Records(users, items, numbered=True)
    if not isinstance(loaded, (tuple, list, np.ndarray)) or len(loaded) != 3:
        found, wanted = type(loaded).__name__, "(users, items, ratings) or a dict user -> items"
        raise UserError(f"{path}: found a {found}, wanted {wanted}: fetch the file again")
    users, items, ratings = (_plain(column) for column in loaded)
    users, items = _array_ids(users, path, "user"), _array_ids(items, path, "item")
    ratings = np.asarray(ratings, dtype=np.float64)
    if not len(users) == len(items) == len(ratings):
        lengths = f"{len(users)} users, {len(items)} items, {len(ratings)} ratings"
        raise UserError(f"{path}: found {lengths}, wanted equal numbers: fetch the file again")
    return Records(users, items, ratings, numbered=True)


def read_mcl_parts(paths: Mapping[str, str | os.PathLike[str]]) -> Records:
    """MCL pickles of ``train`` and ``test`` as one labelled table."""
    return join_parts({name: read_mcl_pickle(path) for name, path in paths.items()})


# Tables with named columns ----------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what, and how it is spelled; None: by the usual names, by what stands there.

    ``rating`` and ``time`` may be ``none`` (the table has none that counts), ``time`` also ``order`` (the order of the
    rows is time) or ``DATE,CLOCK`` (two columns of one moment).
    """

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None
    sep: str | None = None
    header: bool | None = None
    time_format: str | None = None


def read_table(
    path: str | os.PathLike[str], columns: Columns = Columns(), *, uses: Collection[str] = ("rating", "time")
) -> Records:
    """CSV, TSV, atomic files, Parquet or JSON lines, packed or not; ids are names (:mod:`gfml.data.names`).

    Columns not named are looked for under usual names (``user_id``, ``movieId``, ``Item ID``, ...). A text file whose
    first line is all numbers has no header: its columns are user, item, rating, time in this order. A column
    ``x_label`` (0 train, 1 valid, 2 test) is the published split.
    uses: ``rating`` and ``time`` where the run needs them; the cells of columns that nobody uses are not looked at.
    Raises UserError with the columns found, or with the line of a cell that cannot be what its column is.

    Examples:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     for line in ("user,item,rating", "ann,007,4", "ann,7,5"):
        ...         print(line, file=file)
        ...     file.flush()
        ...     records = read_table(file.name)
        >>> len(records.users), records.ratings.tolist()
        (2, [4.0, 5.0])
    """
    usual = (*USER_NAMES, *ITEM_NAMES, *RATING_NAMES, *TIME_NAMES, *filter(None, (columns.user, columns.item)))
    table = open_table(path, separator=columns.sep, header=columns.header, wanted=usual)
    pick = roles(table, columns)
    if "time" in uses and columns.time is None and not pick["bare"]:
        _find_clock(table, pick)
    if not pick["bare"]:
        _note_others(table, pick, columns, uses)
    used = ("user", "item", "rating", "part", *(("time", "clock") if "time" in uses else ()))
    needed = list(dict.fromkeys(pick[role] for role in used if pick[role] is not None))
    cells = table.read(
        needed, whole=[pick["time"]] if pick["time"] in needed else [], coded=[pick["user"], pick["item"]]
    )
    users = encode(table, pick["user"], cells.pop(pick["user"]))
    items = encode(table, pick["item"], cells.pop(pick["item"]))
    if pick["bare"] and columns.user is None and columns.item is None and is_item_first(users, items):
        users, items = items, users
        table.notes["columns by position"] = "item, user, rating, time: the first holds Amazon's item numbers"
    times = None
    if "time" in uses and pick["time"]:
        clock = None if pick["clock"] is None else cells[pick["clock"]]
        times = read_times(table, pick["time"], cells.pop(pick["time"]), columns.time_format, clock=clock)
    ratings = None
    if pick["rating"]:
        found = cells.pop(pick["rating"])
        if "rating" in uses:
            ratings = read_ratings(table, pick["rating"], found)
        else:
            table.notes[f"rating {pick['rating']}"] = f"recognised, not thresholded (--threshold): {_stars(found)}"
    pa.default_memory_pool().release_unused()
    parts = None if pick["part"] is None else _parts(table, pick["part"], cells[pick["part"]])
    numbered = parts is not None and users.names.dtype.kind == items.names.dtype.kind == "i"
    records = Records(
        users.names[users.codes] if numbered else users.codes,
        items.names[items.codes] if numbered else items.codes,
        ratings,
        None if times is None else times.values,
        parts,
        None if numbered else users.names,
        None if numbered else items.names,
        None if times is None else times.per_second,
        numbered,
        notes=table.notes,
    )
    return records.in_order() if columns.time == "order" else records


def roles(table: Table, columns: Columns) -> dict[str, Any]:
    """The column of each role, None where there is none; ``bare``: whether there is no header."""
    bare = isinstance(table, TextTable) and not table.header
    asked = {"user": columns.user, "item": columns.item, "rating": columns.rating, "time": columns.time}
    pick: dict[str, Any] = dict.fromkeys(("user", "item", "rating", "time", "clock", "part"))
    for place, (role, usual) in enumerate(_USUAL.items()):
        given = asked[role]
        if given in ("none", "order") and role in ("rating", "time"):
            continue
        if given is not None and role == "time" and "," in given and given not in table.names:
            pick["time"], pick["clock"] = (table.column(name.strip(), "`time_col`") for name in given.split(",", 1))
        elif given is not None:
            pick[role] = table.column(given, f"`{role}_col`")
        elif bare:
            free = table.names[place] if place < len(table.names) else None
            pick[role] = None if free in [value for key, value in asked.items() if key != role] else free
        else:
            pick[role] = table.find(usual)
        if pick[role] is None and role in ("user", "item"):
            quoted = " (quotation marks are characters in this table)" if '"' in "".join(table.names) else ""
            raise UserError(
                f"{table.path} has no {role} column that is recognised: found {', '.join(table.names)}{quoted}; name it with "
                f"`{role}_col`, or give `header False` if the first line is data"
            )
    twice = [name for name, count in Counter(name for name in pick.values() if name).items() if count > 1]
    if twice:
        raise UserError(
            f"{table.path}: column {twice[0]} stands for two things: name other columns with `user_col`, `item_col`, ..."
        )
    pick["part"], pick["bare"] = None if bare else table.find(PART_NAMES), bare
    if bare:
        listed = ", ".join(f"{role} {name}" for role, name in pick.items() if isinstance(name, str))
        table.notes["columns by position"] = f"{listed} (no header)"
    return pick


def _find_clock(table: Table, pick: dict[str, Any]) -> None:
    """A date and a clock in two columns are one moment."""
    date, clock = table.find(DATE_NAMES), table.find(CLOCK_NAMES)
    if date is None or clock is None or pick["time"] not in (date, clock):
        return
    first = table.read([clock])[clock]
    if len(first) and pa.types.is_string(first.type) and ":" in first[0].as_py() and len(first[0].as_py()) < 16:
        pick["time"], pick["clock"] = date, clock


def _note_others(table: Table, pick: dict[str, Any], columns: Columns, uses: Collection[str]) -> None:
    """Say which columns were passed over: others of a usual name, and lists of items beside the item (sessions)."""
    taken = {name for name in pick.values() if isinstance(name, str)}
    for role, usual in _USUAL.items():
        alike = {normal(name) for name in usual}
        others = [name for name in table.names if normal(name) in alike and name not in taken]
        if others and getattr(columns, role) is None and (role != "time" or "time" in uses):
            table.notes[f"{role} column"] = f"{pick[role]}; not read: {', '.join(others)}"
    lists = [name for name, kind in table.kinds.items() if kind == "token_seq" and name.startswith(pick["item"])]
    for name in lists:
        table.notes[f"lists {name}"] = f"not read: a row counts for its {pick['item']} alone"


def is_item_first(users: Ids, items: Ids) -> bool:
    """Whether columns taken for user and item are Amazon's item and user, as in the 2018 rating files."""
    if users.names.dtype.kind != "U" or items.names.dtype.kind != "U":
        return False
    is_item = pc.match_substring_regex(spelled(users.names), "^(B[0-9A-Z]{9}|[0-9]{9}[0-9X])$")
    is_user = pc.match_substring_regex(spelled(items.names), "^A[0-9A-Z]{9,}$")
    return bool(pc.all(is_item).as_py() and pc.all(is_user).as_py())


def read_ratings(table: Table, column: str, cells: pa.ChunkedArray) -> np.ndarray:
    """float64, finite."""
    wanted = f"a number in column {column}"
    if cells.null_count:
        raise table.error(int(np.flatnonzero(np.asarray(pc.is_null(cells)))[0]), "", wanted)
    try:
        text = pa.types.is_string(cells.type)
        values = np.asarray(cast(pc.utf8_trim_whitespace(cells) if text else cells, pa.float64()))
    except pa.ArrowInvalid:
        texts = [str(cell) for cell in cells.to_pylist()]
        row = next((row for row, text in enumerate(texts) if not is_number(text)), 0)
        raise table.error(row, texts[row], wanted) from None
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise table.error(int(bad[0]), str(values[bad[0]]), wanted)
    return values


def _stars(cells: pa.ChunkedArray, most: int = 12) -> str:
    """How often each value stands in a column; of many values, how many there are."""
    counts = pc.value_counts(cells)
    if len(counts) > most:
        return f"{len(counts):,} different values"
    found = [
        (str(one["values"].as_py() if one["values"].as_py() not in (None, "") else "empty"), one["counts"].as_py())
        for one in counts
    ]
    return ", ".join(
        f"{value}: {count:,}" for value, count in sorted(found, key=lambda one: (not is_number(one[0]), one[0]))
    )


def _parts(table: Table, column: str, cells: pa.ChunkedArray) -> np.ndarray:
    value = read_ratings(table, column, cells)
    bad = np.flatnonzero(~np.isin(value, (0, 1, 2)))
    if len(bad):
        raise table.error(int(bad[0]), value[bad[0]].item(), f"0 (train), 1 (valid) or 2 (test) in column {column}")
    return value.astype(np.int8)


def read_table_parts(
    paths: Mapping[str, str | os.PathLike[str]],
    columns: Columns = Columns(),
    *,
    uses: Collection[str] = ("rating", "time"),
) -> Records:
    """Tables of ``train``, ``test`` and maybe ``valid``, all with the same columns, as one labelled table."""
    order = columns.time == "order"
    plain = replace(columns, time="none") if order else columns
    joined = join_parts({name: read_table(path, plain, uses=uses) for name, path in paths.items()})
    return joined.in_order() if order else joined
