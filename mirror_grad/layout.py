"""The directory layout of MMRec, read and written without pickles.

    NAME.inter           TAB separated with header: userID itemID [rating timestamp] x_label (0 train, 1 valid, 2 test)
    image_feat.npy       numbers [I, F], row = itemID; text_feat.npy the same
    u_id_mapping.csv     TAB separated: user_id, userID; i_id_mapping.csv: asin, itemID
    item_text.csv        item_id (as in i_id_mapping), title: the text behind text_feat.npy
    user_graph.npz       CSR arrays indptr, indices, counts: users who share train items, most shared first
    manifest.json        where it all came from, with hashes

The published user_graph_dict.npy is a pickle and is not read: the graph is computed from train where none is stored.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from gfml.base.errors import UserError
from gfml.base.files import atomic_open, read_arrays, write_json
from gfml.data.tables import open_table

MODALITIES = ("image", "text")
INTER_HEAD = ("userID", "itemID", "rating", "timestamp", "x_label")
# Neighbours that the published script keeps of each user.
NEIGHBOURS = 200
# id map of a folder: file -> (column of the row number, column of the source's id)
ITEM_MAPS = {"i_id_mapping.csv": ("itemID", "asin"), "ge3_item_map.csv": ("split_item", "movieID")}


def find_inter(dataset: str, roots: Sequence[Path]) -> Path | None:
    """The .inter file that a path, a folder or a name below one of the roots means; None when there is none."""
    given = Path(dataset).expanduser()
    if given.is_file():
        return given if ".inter" in given.suffixes else None
    folders = [given] if given.is_dir() else [root / dataset for root in roots]
    names = [f"{folder.resolve().name}.inter{end}" for folder in folders for end in ("", ".gz")]
    found = (folder / name for folder in folders for name in names if (folder / name).is_file())
    alone = (path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.inter*")))
    return next(found, next(alone, None))


def require_labels(path: Path) -> None:
    """UserError unless the table has the column of its published split."""
    names = open_table(path).names
    if "x_label" not in names:
        found = ", ".join(names[:6])
        raise UserError(
            f"{path} has no column x_label (0 train, 1 validation, 2 test), found {found}: add it, or give --split per-user"
        )


def read_feature_file(path: Path, num_items: int) -> np.ndarray:
    """float32 [I, F] of one .npy file; UserError for pickles, other shapes, other row counts and numbers not finite.

    The rows after the last item are left out where the folder's map says that they are other items.
    """
    table = read_arrays(path).get("array", np.zeros(0))
    if table.ndim != 2 or table.dtype.kind not in "biuf":
        raise UserError(f"{path} holds no table of numbers, wanted {num_items} rows of features: mend the file")
    if len(table) > num_items and rows_in_map(path.parent) == len(table):
        table = table[:num_items]
    return checked_features(table, num_items, str(path))


def checked_features(table: np.ndarray, num_items: int, name: str) -> np.ndarray:
    """float32 copy of features [I, F]; UserError where rows do not match the items or numbers are not finite."""
    if len(table) != num_items:
        raise UserError(
            f"{name} has {len(table)} rows, wanted {num_items}, one for each item: are interactions and features of the same data?"
        )
    values = np.ascontiguousarray(table, dtype=np.float32)
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise UserError(
            f"{name} has numbers that are not finite in {int(bad.sum())} rows, the first is item {int(bad.argmax())}: mend the features"
        )
    return values


def read_item_map(folder: Path, num_items: int) -> np.ndarray | None:
    """The source's id of every item, str [I] ("unmapped-7" where the map has none); None without a map."""
    found = _map_rows(folder)
    if found is None:
        return None
    names = [f"unmapped-{row}" for row in range(num_items)]
    for row, name in zip(*found, strict=True):
        if row < num_items:
            names[row] = name or names[row]
    return np.array(names)


def _map_rows(folder: Path) -> tuple[list[int], list[str]] | None:
    """Row numbers of the folder's map and the source's ids; None without a map."""
    there = (
        (path, *columns)
        for name, columns in ITEM_MAPS.items()
        for path in (folder / name, folder / f"{name}.gz")
        if path.is_file()
    )
    path, number, source = next(there, (None, "", ""))
    if path is None:
        return None
    table = open_table(path, wanted=(number, source))
    if not {number, source} <= set(table.names):
        raise UserError(f"{path} lacks the columns {number} and {source}, found {', '.join(table.names)}: mend the map")
    places, ids = table.texts(number), table.texts(source)
    wrong = next((row for row, place in enumerate(places) if not place.isdecimal()), None)
    if wrong is not None:
        raise UserError(f"{path} maps {ids[wrong]!r} to {places[wrong]!r}, wanted a number of an item: mend the map")
    return [int(place) for place in places], ids


def rows_in_map(folder: Path) -> int | None:
    """How many items the folder's map numbers; None without a map."""
    found = _map_rows(folder)
    return None if found is None else max(found[0], default=-1) + 1


def shared_items(train: sp.csr_array, limit: int = NEIGHBOURS, block: int = 1024) -> sp.csr_array:
    """Users who share train items: counts |items(u) & items(v)|, int64 CSR [U, U], zero diagonal.

    Of each user the ``limit`` largest counts are kept, equal ones by the smaller id, stored most shared first (so the
    column indices are not sorted). Never builds U x U.
    """
    binary = sp.csr_array((np.ones(train.nnz, np.int32), train.indices, train.indptr), shape=train.shape)
    across, rows, columns, counts = binary.T.tocsr(), [], [], []
    for start in range(0, train.shape[0], block):
        part = (binary[start : start + block] @ across).tocoo()
        row, column, count = part.row.astype(np.int64) + start, part.col.astype(np.int64), part.data.astype(np.int64)
        keep = row != column
        row, column, count = row[keep], column[keep], count[keep]
        order = np.lexsort((column, -count, row))
        row, column, count = row[order], column[order], count[order]
        first = np.searchsorted(row, np.arange(start, start + block))
        keep = np.arange(len(row)) - first[row - start] < limit
        rows, columns, counts = [*rows, row[keep]], [*columns, column[keep]], [*counts, count[keep]]
    indptr = np.concatenate([[0], np.bincount(np.concatenate(rows), minlength=train.shape[0]).cumsum()])
    return sp.csr_array((np.concatenate(counts), np.concatenate(columns), indptr), shape=(train.shape[0],) * 2)


def write_user_graph(path: Path, graph: sp.csr_array) -> None:
    """Store :func:`shared_items`."""
    with atomic_open(path, "wb") as stream:
        np.savez_compressed(stream, indptr=graph.indptr, indices=graph.indices, counts=graph.data)


def read_user_graph(path: Path, num_users: int) -> sp.csr_array:
    """What :func:`write_user_graph` wrote; UserError when it is of other users."""
    found = read_arrays(path, advice := "delete it, it is computed again from train")
    if not {"indptr", "indices", "counts"} <= found.keys():
        raise UserError(f"{path} holds {', '.join(sorted(found))}, wanted indptr, indices and counts: {advice}")
    indptr, indices, counts = (found[name] for name in ("indptr", "indices", "counts"))
    if len(indptr) != num_users + 1 or (len(indices) and indices.max() >= num_users):
        raise UserError(
            f"{path} is of {len(indptr) - 1} users, the data has {num_users}: delete it, it is computed again"
        )
    return sp.csr_array((counts, indices, indptr), shape=(num_users, num_users))


def write_rows(path: Path, head: Sequence[str], *columns: Sequence[object] | np.ndarray) -> None:
    """A table with a header, TAB separated, of columns of one length."""
    with atomic_open(path, newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(head)
        writer.writerows(zip(*(c.tolist() if isinstance(c, np.ndarray) else c for c in columns), strict=True))


def write_feature_file(path: Path, table: np.ndarray) -> None:
    """A feature table as float32."""
    with atomic_open(path, "wb") as stream:
        np.save(stream, np.ascontiguousarray(table, dtype=np.float32), allow_pickle=False)


def write_feature_archive(
    path: Path, names: Sequence[str], tables: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Feature tables (values, known) by modality with the items' source ids, as ``--features`` reads them; zeros where not known."""
    arrays = {name: np.where(known[:, None], values, 0).astype(np.float32) for name, (values, known) in tables.items()}
    flags = {f"has_{name}": known for name, (_, known) in tables.items()}
    with atomic_open(path, "wb") as stream:
        np.savez_compressed(stream, item_id=np.array(names), **arrays, **flags)


def write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """manifest.json: the facts and the sha256 of every file beside it."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "manifest.json" and not path.name.startswith("."):
            with open(path, "rb") as stream:
                hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    write_json(os.path.join(folder, "manifest.json"), {**facts, "sha256": hashes})
