"""What is known of items beside who took them: feature vectors, titles and genres, matched by the source's item ids.

Files, each plain, gzip or Zstandard:

    .npz            one id array (movie_id, item_id, item, id or ids) and tables [n, F]; ``has_NAME`` bool [n] says where
                    the table NAME is filled; without ids a single table [I, F] in the order of the data's items
    .npy            a table [I, F] in that order
    .csv, .tsv      a header; one id column; numeric columns are features, and so are lists of words called genres,
                    class, categories, tags or subjects (separated by ``|``, ``,`` or blanks), one 0/1 column a word
    .item           the same, RecBole's typed header (``class:token_seq``); plain tokens count only when asked for
    .dat            MovieLens' ``id::title::genres`` without a header, or the eleven columns of ``movies_extrainfos.dat``
"""

from __future__ import annotations

import io
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gfml.base.errors import UserError, suggest
from gfml.data import registry
from gfml.data.interactions import Interactions
from gfml.data.names import places, spelled
from gfml.data.tables import PACKED, as_strings, is_number, normal, open_table, read_bytes, suffix

logger = logging.getLogger("gfml.data")

ID_NAMES = ("movie_id", "item_id", "item", "iid", "id", "ids", "item_ids", "product_id", "parent_asin", "asin", "book_id",
            "artist_id")  # fmt: skip
# MovieLens-1M with what OMDb says of the movies, which writes N/A for what it does not know.
MOVIE_NAMES = ["id", "title", "year", "rated", "released", "genres", "director", "writers", "actors", "plot", "poster"]
TITLE_NAMES = ("title", "movie_title", "name")
GENRE_NAMES = ("genres", "genre", "class", "categories", "category", "tags", "subjects")
ABOUT_NAMES = ("plot", "description", "overview", "synopsis")
NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE).fullmatch


class FeatureTable(NamedTuple):
    """values float32 [I, F], zero where nothing is known; known bool [I]; blocks: name -> its columns."""

    values: np.ndarray
    known: np.ndarray
    blocks: Mapping[str, slice]


class ItemInfo(NamedTuple):
    """Titles, genres and descriptions of the data's items, in its order; empty where the file says nothing."""

    titles: list[str]
    genres: list[tuple[str, ...]]
    about: list[str]


def beside(dataset: str, data_root: str | os.PathLike[str] | None, names: Iterable[str]) -> Path | None:
    """The first of the files ``names`` (or NAME.gz) in the folder that holds a data set; None when there is none.

    ``*`` in a name is that of the data's atomic files: ``*.item`` is ``toy.item`` beside ``toy.inter`` or ``toy.train.inter``.
    """
    known = registry.known_by(dataset)
    path = Path(dataset).expanduser()
    if known is not None:
        folders = registry.folders_of(known, registry.data_roots(data_root))
    else:
        places = [path, *(root / dataset for root in registry.data_roots(data_root))]
        path = next((place for place in places if place.exists()), path)
        folders = [path if path.is_dir() else path.parent] if path.exists() else []
    single = known is None and path.is_file()
    files = [path] if single else [file for folder in folders for file in sorted(folder.glob("*"))]
    atomic = {file.name.split(".")[0]: None for file in files if suffix(file) == "inter"}
    names = [name.replace("*", stem) for name in names for stem in (atomic if "*" in name else [""])]
    found = (
        folder / f"{name}{end}"
        for folder in folders
        for name in names
        for end in ("", *(f".{packer}" for packer in PACKED))
    )
    return next((file for file in found if file.is_file()), None)


def read_item_features(
    file: str | os.PathLike[str], data: Interactions, columns: Sequence[str] | None = None
) -> FeatureTable:
    """Features of the data's items. columns: use only these tables or columns.

    Raises UserError for a missing or unreadable file, no or unknown columns, rows that do not fit, and values that
    are not finite.
    """
    path = _existing(file, "`features`")
    arrays = suffix(path) in ("npz", "npy")
    ids, blocks, filled = _arrays(path, columns) if arrays else _columns(path, columns)
    rows = _rows(path, ids, data, len(next(iter(blocks.values()))))
    place, parts, start = {}, [], 0
    known = np.zeros(data.num_items, dtype=bool)
    for name, block in blocks.items():
        values = np.zeros((data.num_items, block.shape[1]), dtype=np.float32)
        there = (rows >= 0) & filled.get(name, np.ones(len(rows), dtype=bool))
        values[rows[there]] = block[there]
        known[rows[there]] = True
        if not np.isfinite(values).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite, wanted finite features: mend the file")
        parts.append(values)
        place[name] = slice(start, start := start + block.shape[1])
    if not known.any():
        some = ", ".join(map(str, np.asarray(ids)[:3])) if ids is not None else ""
        raise UserError(
            f"{path} knows none of the {data.num_items} items of {data.name} (its ids begin {some}): check `features`"
        )
    gone, bare = int((rows < 0).sum()), int((~known).sum())
    if gone or bare:
        logger.warning(
            "note: %s: %s of %s rows are of items that %s does not have, ignored; %s of its %s items have no row, all zeros",
            path.name, f"{gone:,}", f"{len(rows):,}", data.name, f"{bare:,}", f"{data.num_items:,}",
        )  # fmt: skip
    return FeatureTable(np.concatenate(parts, 1), known, place)


def standardised(table: FeatureTable) -> FeatureTable:
    """Every column centred over the known items, every block divided by its own standard deviation; the rest stays 0."""
    values = table.values.copy()
    for columns in table.blocks.values():
        rows = table.known & (table.values[:, columns] != 0).any(1)
        block = values[:, columns][rows]
        block -= block.mean(0)
        values[np.ix_(rows, np.arange(columns.start, columns.stop))] = block / max(float(block.std()), 1e-12)
    return table._replace(values=values)


def read_item_info(file: str | os.PathLike[str], data: Interactions) -> ItemInfo:
    """Titles, genres and descriptions, as far as the file has such columns; UserError when it has neither title nor genres."""
    # Programs call the flag of this file --item-info, --titles, --item-text or --meta.
    path = _existing(file, "the path")
    table = _Table.read(path)
    title, genre, about = (table.find(names) for names in (TITLE_NAMES, GENRE_NAMES, ABOUT_NAMES))
    if title is None and genre is None:
        found = f"{path} has no title and no genres, found {', '.join(table.cells)}"
        raise UserError(f"{found}: give a table with a column of titles or genres")
    rows = _rows(path, table.ids(), data, table.num_rows)
    words = table.words(genre) if genre else [[]] * table.num_rows
    titles, genres, texts = [""] * data.num_items, [()] * data.num_items, [""] * data.num_items
    for row, item in enumerate(rows):
        if item >= 0:
            titles[item] = table.cells[title][row] if title else ""
            genres[item] = tuple(words[row])
            texts[item] = table.cells[about][row] if about else ""
    return ItemInfo(titles, genres, texts)


def info_beside(
    dataset: str, data_root: str | os.PathLike[str] | None, names: Iterable[str], data: Interactions
) -> ItemInfo | None:
    """Titles and genres of the first of the files ``names`` beside the data (:func:`beside`); None without any.

    Nobody asked for that file: where it cannot be used, a note says why.
    """
    file = beside(dataset, data_root, names)
    try:
        return None if file is None else read_item_info(file, data)
    except UserError as error:
        logger.warning("titles beside the data are left out: %s", error)
        return None


def by_title(title: str, titles: Sequence[str]) -> int:
    """The row of a title, in whatever case, with or without a year in parentheses behind it. UserError for none and for several."""

    def short(name: str) -> str:
        return re.sub(r"\s*\(\d{4}\)$", "", name.strip()).casefold()

    same = [row for row, name in enumerate(titles) if name == title]
    found = same or [row for row, name in enumerate(titles) if short(name) == short(title)]
    if not found:
        raise UserError(f"unknown title {title!r}, wanted one such as {titles[0]!r}{suggest(title, titles)}")
    if len(found) > 1:
        raise UserError(
            f"{len(found)} items bear the title {title!r} (rows {', '.join(map(str, found[:5]))}): give another one"
        )
    return found[0]


def _existing(file: str | os.PathLike[str], flag: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}: check {flag}")
    return path


def _rows(path: Path, ids: Sequence | np.ndarray | None, data: Interactions, count: int) -> np.ndarray:
    """The data's item of each row of the file, -1 where the data has no such item; ids are compared as text."""
    if ids is None:
        if count != data.num_items:
            raise UserError(
                f"{path} holds {count} rows without ids, wanted one for each of the {data.num_items} items of {data.name}: "
                f"add an array of ids ({ID_NAMES[0]} or {ID_NAMES[2]}) or mend `features`"
            )
        return np.arange(count)
    found = spelled(ids).dictionary_encode()
    if len(found.dictionary) != len(found):
        twice = int(np.argmax(np.bincount(found.indices.to_numpy()) > 1))
        raise UserError(
            f"{path} has the id {found.dictionary[twice]} more than once, wanted one row an item: mend the file"
        )
    return places(ids, np.arange(data.num_items) if data.item_ids is None else data.item_ids)


# -- arrays


def _arrays(
    path: Path, columns: Sequence[str] | None
) -> tuple[np.ndarray | None, dict[str, np.ndarray], dict[str, np.ndarray]]:
    try:
        loaded = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        arrays = (
            {name: loaded[name] for name in loaded.files}
            if isinstance(loaded, np.lib.npyio.NpzFile)
            else {"table": loaded}
        )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as .npy or .npz ({error}): wanted plain arrays") from None
    known = {normal(name) for name in ID_NAMES}
    ids = next((array for name, array in arrays.items() if normal(name) in known and array.ndim == 1), None)
    tables = {name: array for name, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "biuf"}
    tables = _chosen(path, tables, columns, "table [n, F] of numbers")
    length = len(next(iter(tables.values()))) if ids is None else len(ids)
    for name, table in tables.items():
        if len(table) != length:
            raise UserError(f"{path}: {name} has {len(table)} rows, wanted {length}, one for each id: mend the file")
    filled = {name: arrays[f"has_{name}"].astype(bool) for name in tables if f"has_{name}" in arrays}
    return ids, {name: table.astype(np.float32) for name, table in tables.items()}, filled


def _chosen(
    path: Path, found: Mapping[str, np.ndarray], columns: Sequence[str] | None, wanted: str
) -> dict[str, np.ndarray]:
    if not found:
        raise UserError(f"{path} holds no {wanted}: check `features`, or name columns with `feature_columns`")
    unknown = next((name for name in columns or () if name not in found), None)
    if unknown is not None:
        raise UserError(
            f"{path} has no {unknown!r}, found {', '.join(found)}{suggest(unknown, found)}: mend `feature_columns`"
        )
    return {name: found[name] for name in columns or found}


# -- tables of text


@dataclass(frozen=True)
class _Table:
    """Cells by column. kinds: the type of a RecBole header."""

    path: Path
    cells: Mapping[str, list[str]]
    kinds: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> _Table:
        table = open_table(path, wanted=(*ID_NAMES, *TITLE_NAMES, *GENRE_NAMES))
        names, movies = table.names, suffix(path) == "dat" and len(table.names) == len(MOVIE_NAMES)
        if suffix(path) == "dat" and names[0] == "1":
            names = MOVIE_NAMES if movies else ["id", "title", "genres", *names[3:]]
        columns = table.read(table.names)
        cells = {new: _texts(columns[old]) for new, old in zip(names, table.names, strict=False)}
        if movies:
            cells = {name: ["" if cell == "N/A" else cell for cell in column] for name, column in cells.items()}
        return cls(path, cells, table.kinds)

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.cells.values())))

    def find(self, names: Sequence[str]) -> str | None:
        """The first column called one of ``names``, whatever its case, blanks and underscores."""
        known = {normal(name): name for name in reversed(list(self.cells))}
        return next((known[normal(name)] for name in names if normal(name) in known), None)

    def ids(self) -> list[str]:
        name = self.find(ID_NAMES)
        if name is None:
            raise UserError(f"{self.path} has no id column, found {', '.join(self.cells)}: call one item_id")
        return self.cells[name]

    def words(self, name: str) -> list[list[str]]:
        """The cells of a column as lists of words."""
        cells = self.cells[name]
        split = next((mark for mark in ("|", ",") if any(mark in cell for cell in cells)), " ")
        return [[word.strip() for word in cell.split(split) if word.strip()] for cell in cells]

    def numbers(self, name: str) -> np.ndarray | None:
        """A column of numbers [n, F] (lists of equal length: F of them), or None; an empty cell is 0."""
        split = [cell.split() for cell in self.cells[name]]
        width = max(map(len, split), default=0)
        flat = [word for words in split for word in (words or ["0"] * width)]
        # "nan" and "inf" are numbers too: a table with them is refused, as arrays are, and not taken for text.
        if (
            not width
            or len(flat) != width * len(split)
            or not all(is_number(word) or NOT_FINITE(word) for word in flat)
        ):
            return None
        return np.array(flat, dtype=np.float32).reshape(len(split), width)

    def multi_hot(self, name: str) -> np.ndarray:
        words = self.words(name)
        place = {word: column for column, word in enumerate(sorted({word for row in words for word in row}))}
        table = np.zeros((len(words), len(place)), dtype=np.float32)
        for row, found in enumerate(words):
            table[row, [place[word] for word in found]] = 1
        return table


def _texts(column: pa.ChunkedArray) -> list[str]:
    """Cells as text, lists as words with ``|`` between."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return ["|".join(map(str, cell or ())) for cell in column.to_pylist()]
    return ["" if cell is None else cell for cell in as_strings(column).to_pylist()]


def _columns(
    path: Path, columns: Sequence[str] | None
) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    table = _Table.read(path)
    ids = table.ids()
    found = {}
    for name in table.cells:
        asked = columns is not None and name in columns
        if table.cells[name] is ids or (columns is not None and not asked):
            continue
        numbers = table.numbers(name) if asked or not table.kinds.get(name, "").startswith("token") else None
        if numbers is not None:
            found[name] = numbers
        elif asked or normal(name) in GENRE_NAMES:
            found[name] = table.multi_hot(name)
    known = dict.fromkeys(table.cells)
    if columns is None and (left := [name for name in known if name not in found and table.cells[name] is not ids]):
        logger.warning("note: %s: neither numbers nor genres, left out: %s", path.name, ", ".join(left))
    unknown = next((name for name in columns or () if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"{path} has no column {unknown!r}, found {', '.join(known)}{suggest(unknown, known)}: mend `feature_columns`"
        )
    return ids, _chosen(path, found, None, f"column of numbers or genres (found {', '.join(known)})"), {}
