"""Readers: files in the formats of the recommender literature become :class:`Records`.

Nothing is renumbered, split or filtered here (see :mod:`gfml.data.splits`). Every reader names
the file and the line of what it cannot accept in a one-line :class:`UserError`.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gfml.base.errors import UserError, suggest

PARTS = ("train", "valid", "test")

USER_NAMES = ("user_id", "userid", "user", "uid", "u", "reviewerid", "reviewer_id", "customer_id", "session_id")
ITEM_NAMES = ("item_id", "itemid", "item", "iid", "i", "movieid", "movie_id", "movie", "product_id", "productid",
              "asin", "parent_asin", "book_id", "business_id", "artist_id", "artistid", "track_id")  # fmt: skip
RATING_NAMES = ("rating", "ratings", "score", "stars", "overall", "weight", "count", "label")
TIME_NAMES = ("timestamp", "time", "unixreviewtime", "datetime", "date", "ts")
PART_NAMES = ("x_label",)


@dataclass(frozen=True)
class Records:
    """Interactions as a source lists them, one array entry per row.

    users, items: int64 (never negative) or strings.
    ratings, times: float64, or None where the source has none.
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

    labels = [np.full(len(parts[name]), PARTS.index(name), dtype=np.int8) for name in names]
    sizes = np.max([one.min_size for one in several], axis=0)
    return replace(
        several[0],
        users=stack("users"),
        items=stack("items"),
        ratings=stack("ratings"),
        times=stack("times"),
        parts=np.concatenate(labels),
        min_size=(int(sizes[0]), int(sizes[1])),
        notes={key: value for one in several for key, value in one.notes.items()},
    )


# Bytes ------------------------------------------------------------------------------------------


def _short(error: Exception) -> str:
    """The text of an error on one line."""
    return " ".join(str(error).split())[:160]


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of ``path``, unpacked if it is gzip (told by its first bytes, not its name)."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path given with --dataset or --data-root") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is truncated or damaged gzip ({error}): fetch the file again") from error
    if not raw.strip():
        raise UserError(f"{path} is empty: wanted interactions, fetch or write the file again")
    return raw.removeprefix(b"\xef\xbb\xbf")


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


def _integers(tokens: _Tokens, what: str = "an id (an integer >= 0)") -> np.ndarray:
    """int64 value of each token; a token that is not a whole number from 0 to 2^63 - 1 is an error."""
    length = tokens.end - tokens.start
    value = np.zeros(len(length), dtype=np.uint64)
    bad = length > 19
    for position in range(int(np.minimum(length, 19).max(initial=0))):
        inside = np.flatnonzero(length > position)
        digit = tokens.data[tokens.start[inside] + position] - np.uint8(48)
        bad[inside[digit > 9]] = True
        value[inside] = value[inside] * np.uint64(10) + digit
    bad |= value > np.uint64(2**63 - 1)
    if bad.any():
        raise _explain_integer(tokens, int(np.flatnonzero(bad)[0]), what)
    return value.astype(np.int64)


def _explain_integer(tokens: _Tokens, index: int, what: str) -> UserError:
    text = tokens.data[tokens.start[index] : tokens.end[index]].tobytes()
    if re.fullmatch(rb"-\d+", text):
        return tokens.error(index, f"{what}, ids are never negative")
    if re.fullmatch(rb"\d+", text):
        return tokens.error(index, f"{what} that fits in 64 bits (at most {2**63 - 1})")
    return tokens.error(index, what)


def _floats(tokens: _Tokens, what: str) -> np.ndarray:
    """float64 value of each token; scientific notation is read, nan and inf are errors."""
    length = tokens.end - tokens.start
    too_long = np.flatnonzero(length > 64)
    if len(too_long):
        raise tokens.error(int(too_long[0]), what)
    width = int(length.max(initial=1))
    column = np.arange(width)
    inside = column < length[:, None]
    padded = np.where(inside, tokens.data[np.where(inside, tokens.start[:, None] + column, 0)], 0).astype(np.uint8)
    texts = padded.view(f"S{width}").ravel()
    try:
        value = texts.astype(np.float64)
    except ValueError:
        value = np.array([_float_or_nan(text) for text in texts.tolist()])
    bad = np.flatnonzero(~np.isfinite(value))
    if len(bad):
        raise tokens.error(int(bad[0]), what)
    return value


def _float_or_nan(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


# Formats ----------------------------------------------------------------------------------------


def read_adjacency(path: str | os.PathLike[str]) -> Records:
    """LightGCN text: one user per line, ``user item item ...``, 0-based ids.

    Any blanks, trailing blanks, CRLF, blank lines, users without items and users on several
    lines are accepted. A user without items still counts for the size.
    """
    path = Path(path)
    tokens = _tokens(read_bytes(path), path)
    value = _integers(tokens)
    first = np.ones(len(value), dtype=bool)
    first[1:] = tokens.line[1:] != tokens.line[:-1]
    owner = value[first][np.cumsum(first) - 1]
    listed = int(owner.max()) + 1
    empty = int(first.sum()) - len(np.unique(tokens.line[~first]))
    notes = {f"lines without items in {path.name}": empty} if empty else {}
    least = listed if listed <= largest_table(len(value)) else 0
    return Records(owner[~first], value[~first], numbered=True, min_size=(least, 0), notes=notes)


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
    value = _integers(tokens)
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


def _read_numbers(
    path: str | os.PathLike[str], columns: Sequence[str], *, separator: bytes = b"\t"
) -> list[np.ndarray]:
    """Columns of a headerless numeric table: ``user`` and ``item`` int64, the others float64.

    ``columns`` names all columns; a line with another number of fields is an error.
    """
    path = Path(path)
    raw = read_bytes(path)
    tokens = _tokens(raw if separator.isspace() else raw.replace(separator, b"\t"), path)
    count = np.bincount(tokens.line)
    wrong = np.flatnonzero((count != len(columns)) & (count > 0))
    if len(wrong):
        wanted = f"{len(columns)} fields ({', '.join(columns)})"
        line = int(wrong[0])
        raise UserError(f"{path}, line {line + 1}: found {count[line]} fields, wanted {wanted}: correct or remove it")
    read = []
    for index, name in enumerate(columns):
        column = tokens.at(slice(index, None, len(columns)))
        read.append(_integers(column) if name in ("user", "item") else _floats(column, f"a number for the {name}"))
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
    raw = read_bytes(path)
    separator = b"::" if b"::" in raw[:200] else b"\t"
    users, items, ratings, times = _read_numbers(path, ("user", "item", "rating", "time"), separator=separator)
    return Records(users, items, ratings, times)


def read_pairs_npz(path: str | os.PathLike[str]) -> Records:
    """``.npz`` with integer arrays ``user`` and ``movie`` (or ``item``), row by row; no pickles."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no file {path}: check the path given with --dataset or --data-root")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name in ("user", "movie", "item")}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable .npz ({_short(error)}): fetch the file again") from error
    item = arrays.get("item", arrays.get("movie"))
    if "user" not in arrays or item is None:
        raise UserError(f"{path}: found arrays {sorted(arrays)}, wanted user and item: fetch the file again")
    return Records(_array_ids(arrays["user"], path, "user"), _array_ids(item, path, "item"))


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
            f"{path} was refused ({_short(error)}): wanted a pickle with {wanted}; convert it to text"
        ) from error
    except Exception as error:  # a damaged pickle fails in any way at all
        reason = f"{type(error).__name__}: {_short(error)}"
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


def read_table(
    path: str | os.PathLike[str],
    *,
    user_col: str | None = None,
    item_col: str | None = None,
    rating_col: str | None = None,
    time_col: str | None = None,
) -> Records:
    """CSV, TSV, RecBole/MMRec ``.inter`` or Parquet, gzip or not, with string or integer ids.

    Columns not named are looked for under usual names (``user_id``, ``movieId``, ...), any case;
    ``name:token`` headers lose what follows the colon. A CSV whose first line is all numbers has
    no header: its columns are user, item, rating, time in this order. A column ``x_label``
    (0 train, 1 valid, 2 test) is the published split. Raises UserError with the columns found.
    """
    path = Path(path)
    frame = _parquet_frame(path) if ".parquet" in path.suffixes else _text_frame(path)
    names = [str(name) for name in frame.columns]
    pick = {
        "user": _find_column(path, names, user_col, USER_NAMES, "user", required=True),
        "item": _find_column(path, names, item_col, ITEM_NAMES, "item", required=True),
        "rating": _find_column(path, names, rating_col, RATING_NAMES, "rating"),
        "time": _find_column(path, names, time_col, TIME_NAMES, "time"),
        "part": _find_column(path, names, None, PART_NAMES, "part"),
    }
    column = {role: None if name is None else frame[name] for role, name in pick.items()}
    first_line = frame.attrs.get("first_line", 0)
    return Records(
        _column_ids(column["user"], path, first_line),
        _column_ids(column["item"], path, first_line),
        _column_numbers(column["rating"], path, first_line),
        _column_times(column["time"], path, first_line),
        _column_parts(column["part"], path, first_line),
        numbered=column["part"] is not None and column["user"].dtype.kind == column["item"].dtype.kind == "i",
    )


def _parquet_frame(path: Path) -> Any:
    import pandas as pd

    if not path.exists():
        raise UserError(f"no file {path}: check the path given with --dataset or --data-root")
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow, or write the data as CSV") from error
    except Exception as error:
        raise UserError(f"{path} is no readable Parquet file ({type(error).__name__}): write it again") from error


def _text_frame(path: Path) -> Any:
    import pandas as pd

    raw = read_bytes(path).replace(b"::", b"\t") if ".dat" in path.suffixes else read_bytes(path)
    raw = _utf8(raw)
    head = raw.split(b"\n", 1)[0].decode("utf-8").strip("\r")
    separator = _separator(path, head)
    bare = all(_is_number(cell) for cell in head.split(separator))
    options = {"header": None} if bare else {}
    try:
        frame = pd.read_csv(io.BytesIO(raw), sep=separator, low_memory=False, keep_default_na=False, na_values=[""],
                            skipinitialspace=True, **options)  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        hint = "correct it, or give the folder if it is an adjacency list"
        raise UserError(f"{path} is no readable table ({_short(error)}): {hint}") from error
    if bare:
        frame.columns = [*("user", "item", "rating", "time")[: frame.shape[1]], *map(str, range(4, frame.shape[1]))]
    else:
        frame.columns = [str(name).split(":")[0].strip() for name in frame.columns]
    if not len(frame):
        raise UserError(f"{path} has a header and no rows: wanted interactions, write the file again")
    frame.attrs["first_line"] = 1 if bare else 2
    return frame


def _utf8(raw: bytes) -> bytes:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1").encode("utf-8")
    return raw


def _separator(path: Path, head: str) -> str:
    if {".inter", ".tsv", ".dat"} & set(path.suffixes):
        return "\t"
    counts = {separator: head.count(separator) for separator in ("\t", ",", ";", "|", " ")}
    best = max(counts, key=lambda separator: counts[separator])
    if counts[best] == 0:
        wanted = "at least user and item, separated by commas or tabs"
        raise UserError(f"{path}, line 1: found one column {head[:40]!r}, wanted {wanted}")
    return best


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r'\s*"?[-+]?\d+(\.\d+)?([eE][-+]?\d+)?"?\s*', cell))


def _find_column(
    path: Path, names: list[str], asked: str | None, usual: Sequence[str], role: str, *, required: bool = False
) -> str | None:
    """The column for ``role``: the one asked for, else the first usual name present, else None."""
    listed = ", ".join(names)
    if asked is not None:
        if asked not in names:
            raise UserError(f"{path} has no column {asked!r} for --{role}-col: found {listed}{suggest(asked, names)}")
        return asked
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None and required:
        raise UserError(f"{path} has no {role} column that is recognised: found {listed}; name it with --{role}-col")
    return found


def _row_error(path: Path, first_line: int, row: int, found: object, wanted: str) -> UserError:
    place = f"line {first_line + row}" if first_line else f"row {row + 1}"
    return UserError(f"{path}, {place}: found {found!r}, wanted {wanted}: correct or remove it")


def _column_ids(column: Any, path: Path, first_line: int) -> np.ndarray:
    """A pandas column as int64 ids, or as strings where some id is not a number."""
    wanted = f"a {column.name} id (an integer from 0 to 2^63 - 1, or a name)"
    missing = np.flatnonzero(column.isna().to_numpy())
    if len(missing):
        raise _row_error(path, first_line, int(missing[0]), "", wanted)
    if column.dtype.kind in "iuf":
        value = column.to_numpy()
        bad = np.flatnonzero(_is_no_id(value))
        if len(bad):
            row = int(bad[0])
            raise _row_error(path, first_line, row, value[row].item(), wanted)
        return value.astype(np.int64)
    text = column.astype(str).to_numpy().astype(np.str_)
    # Text files give numbers as numbers, so that only those beyond 64 bits arrive here as strings.
    if first_line and np.char.isdecimal(text).all():
        row = int(np.argmax(np.char.str_len(text)))
        raise _row_error(path, first_line, row, text[row].item(), wanted)
    return text


def _column_numbers(column: Any, path: Path, first_line: int) -> np.ndarray | None:
    import pandas as pd

    if column is None:
        return None
    value = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(value))
    if len(bad):
        row = int(bad[0])
        raise _row_error(path, first_line, row, str(column.iloc[row]), f"a number in column {column.name}")
    return value


def _column_times(column: Any, path: Path, first_line: int) -> np.ndarray | None:
    """Seconds or any other number as they are; dates become seconds since 1970."""
    import pandas as pd

    if column is None or column.dtype.kind in "iuf":
        return _column_numbers(column, path, first_line)
    dates = pd.to_datetime(column, errors="coerce", utc=True, format="mixed")
    bad = np.flatnonzero(dates.isna().to_numpy())
    if len(bad):
        row = int(bad[0])
        raise _row_error(path, first_line, row, str(column.iloc[row]), f"a number or a date in column {column.name}")
    return (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy(dtype=np.float64)


def _column_parts(column: Any, path: Path, first_line: int) -> np.ndarray | None:
    value = _column_numbers(column, path, first_line)
    if value is None:
        return None
    bad = np.flatnonzero(~np.isin(value, (0, 1, 2)))
    if len(bad):
        row = int(bad[0])
        raise _row_error(path, first_line, row, value[row].item(), "0 (train), 1 (valid) or 2 (test) in column x_label")
    return value.astype(np.int8)
