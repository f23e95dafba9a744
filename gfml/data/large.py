"""Interactions of a Parquet file that would not fit as tables of names: whole-number ids, read batch by batch.

Beside the result memory holds the file's two columns in the smallest type, whatever the size of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_parts
from gfml.data.splits import _take, check_ratios

ROWS = 1 << 20  # rows of the file in memory at a time
USERS = 4096  # users whose rows are sorted and cut at a time


def read_pairs(
    path: str | os.PathLike[str], *, user: str = "user", item: str = "item", test_ratio: float = 0.2, seed: int = 2020
) -> Interactions:
    """The pairs of two columns of whole numbers, cut at random per user as ``split_per_user`` cuts.

    Ids are row numbers from 0 to the largest; repeated pairs count once and are noted. The valid part is empty.
    Memory: 4 bytes per row of the file for the items, 4 more while they are put in order, 8 per pair of the result.
    Errors: UserError for a missing column, ids that are no whole numbers, or negative ones.
    """
    degree, items = _grouped(Path(path), user, item)
    shape = len(degree), int(items.max()) + 1
    columns, starts = _cut(degree, items, test_ratio, seed)
    del items
    train, test = (csr_from_parts(part, start, shape) for part, start in zip(columns, starts, strict=True))
    valid = csr_from_parts(np.empty(0, np.int32), np.zeros(len(degree) + 1, np.int64), shape)
    repeated = int(degree.sum()) - train.nnz - test.nnz
    notes: dict[str, object] = {"duplicate pairs dropped": repeated} if repeated else {}
    return Interactions(Path(path).name.split(".")[0], train, valid, test, notes=notes)


def _cut(
    degree: np.ndarray, items: np.ndarray, test_ratio: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Columns of train and test, and where their rows start; ``items``, degree[u] of each user, are put in order."""
    from gfml.base.compiled import in_threads
    from gfml.data.draws import cut_users, sort_rows

    ends, kept = np.cumsum(degree), np.empty_like(degree)
    blocks = [slice(first, min(first + USERS, len(degree))) for first in range(0, len(degree), USERS)]
    own = {block.start: items[ends[block.start] - degree[block.start] : ends[block.stop - 1]] for block in blocks}
    in_threads(lambda block: sort_rows(degree[block], own[block.start], kept[block]), blocks)
    take = _take(kept, check_ratios((1 - test_ratio, 0.0, test_ratio))[2], spare=1)
    starts = [np.concatenate([[0], np.cumsum(count)]) for count in (kept - take, take)]
    parts = [np.empty(start[-1], dtype=np.int32) for start in starts]
    streams = np.random.default_rng(seed).integers(2**64, size=len(degree), dtype=np.uint64)

    def cut(block: slice) -> None:
        into = [part[start[block.start] : start[block.stop]] for part, start in zip(parts, starts, strict=True)]
        cut_users(streams[block], degree[block], kept[block], take[block], own[block.start], *into)

    in_threads(cut, blocks)
    return parts, starts


def _grouped(path: Path, user: str, item: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each user, int64 [U], and the items of all rows by user, int32 [N]: two passes over the file."""
    from gfml.data.draws import place_rows

    degree = np.zeros(0, dtype=np.int64)
    for users, _ in _batches(path, user, item):
        counts = np.bincount(users, minlength=len(degree))
        counts[: len(degree)] += degree
        degree = counts
    if not degree.sum():
        raise UserError(f"{path} has no interaction at all: check the file")
    items, place = np.empty(degree.sum(), dtype=np.int32), np.cumsum(degree) - degree
    for users, found in _batches(path, user, item):
        place_rows(users, found, place, items)
    return degree, items


def _batches(path: Path, user: str, item: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both columns, some rows at a time, int32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        missing = [name for name in (user, item) if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]}: it has {', '.join(file.schema_arrow.names)}")
        for name in (user, item):
            if not pa.types.is_integer(file.schema_arrow.field(name).type):
                raise UserError(f"column {name} of {path} holds no whole numbers: read it as a table of names")
        for batch in file.iter_batches(ROWS, columns=[user, item]):
            columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in (user, item)]
            for name, column in zip((user, item), columns, strict=True):
                if column.dtype.kind not in "iu" or (len(column) and (column.min() < 0 or column.max() >= 2**31)):
                    raise UserError(f"column {name} of {path} wants whole numbers from 0 to 2^31, in every row")
            yield columns[0].astype(np.int32), columns[1].astype(np.int32)
