"""Ids are names: columns of them as codes into sorted distinct names, and joins by name.

A name is the text that stands in the source. Names are int64 numbers only where every one is the plain spelling of a
number from 0 to 2^63 - 1 (no sign, leading zero, point or exponent), so that printing gives the source's spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gfml.data.interning import Coded, Interning
from gfml.data.tables import Table, as_strings

_CANONICAL = r"^(0|[1-9][0-9]{0,18})$"


class Ids(NamedTuple):
    """codes int32 [n] into names; names sorted and distinct, int64 or str."""

    codes: np.ndarray
    names: np.ndarray


def encode(table: Table, column: str, cells: pa.ChunkedArray | Coded) -> Ids:
    """The ids of a column. UserError with the line of an empty cell; blanks kept or taken for the separator's are noted."""
    wanted = f"a name in column {column}, as in every other row"
    codes, names = cells if isinstance(cells, Coded) else _coded(table, column, cells, wanted)
    if pa.types.is_string(names.type):
        bad = np.flatnonzero(_any(pc.equal(pc.utf8_trim_whitespace(names), ""), pc.match_substring(names, "\0")))
        if len(bad):
            row = int(np.flatnonzero(np.isin(np.concatenate(codes), bad))[0])
            raise table.error(row, names[int(bad[0])].as_py(), wanted)
        codes, names = _without_shared_blank(table, column, codes, names)
    return _sorted(codes, names)


def _coded(table: Table, column: str, cells: pa.ChunkedArray, wanted: str) -> Coded:
    """Codes by first appearance, and the distinct cells: whole numbers or strings."""
    if cells.null_count:
        row = int(np.flatnonzero(np.asarray(pc.is_null(cells)))[0])
        raise table.error(row, "", wanted)
    if pa.types.is_floating(cells.type):
        cells = _whole(table, column, cells)
    if pa.types.is_integer(cells.type):
        encoded = cells.combine_chunks().dictionary_encode()
        return Coded([encoded.indices.to_numpy()], encoded.dictionary)
    try:
        cells = as_strings(cells)
    except pa.ArrowInvalid:
        raise table.error(0, str(cells.type), f"text or whole numbers in column {column}") from None
    texts = Interning()
    for chunk in cells.chunks:
        texts.add(chunk)
    return texts.result()


def _any(*masks: pa.Array) -> np.ndarray:
    return np.any([np.asarray(mask) for mask in masks], axis=0)


def _whole(table: Table, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats of a typed file, which stand for numbers with a missing value, as whole numbers."""
    values = np.asarray(cells)
    bad = np.flatnonzero(~((values == np.floor(values)) & (np.abs(values) < 2**53)))
    if len(bad):
        raise table.error(int(bad[0]), float(values[bad[0]]), f"a whole number or text in column {column}")
    table.notes[f"column {column}"] = "floating point, read as whole numbers"
    return pa.chunked_array([pa.array(values.astype(np.int64))])


def _without_shared_blank(table: Table, column: str, codes: list[np.ndarray], names: pa.Array) -> Coded:
    """A blank before every name belongs to the separator (``a, b``); other blanks belong to their names."""
    if pc.all(pc.starts_with(names, " ")).as_py():
        table.notes[f"column {column}"] = "the blank before every name is taken for the separator's"
        again = pc.utf8_ltrim_whitespace(names).dictionary_encode()
        return Coded([again.indices.to_numpy()[part] for part in codes], again.dictionary)
    around = int(pc.sum(pc.not_equal(pc.utf8_trim_whitespace(names), names)).as_py() or 0)
    if around:
        table.notes[f"column {column}"] = f"{around:,} names begin or end with a blank, kept as they are"
    return Coded(codes, names)


def _sorted(codes: list[np.ndarray], names: pa.Array) -> Ids:
    plain = _numbers(names)
    names = names.cast(pa.string()) if plain is None and not pa.types.is_string(names.type) else names
    order = np.argsort(plain) if plain is not None else np.asarray(pc.array_sort_indices(names)).astype(np.int64)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    ranked = np.concatenate([rank[part] for part in codes])
    return Ids(ranked, plain[order] if plain is not None else _as_numpy(names.take(pa.array(order))))


def _as_numpy(names: pa.Array) -> np.ndarray:
    """Strings as an array of numpy's; by way of equally long ones where all are ASCII, which is much faster."""
    width = int(pc.max(pc.binary_length(names)).as_py() or 1)
    if pc.all(pc.string_is_ascii(names)).as_py() and width <= 64:
        padded = pc.ascii_rpad(names, width=width, padding="\0")
        return np.frombuffer(padded.buffers()[2], dtype=f"S{width}", count=len(names)).astype(f"U{width}")
    return np.array(names.to_pylist(), dtype=np.str_)


def _numbers(names: pa.Array) -> np.ndarray | None:
    """The names as int64, or None where one is not the plain spelling of such a number."""
    if pa.types.is_string(names.type) and not pc.all(pc.match_substring_regex(names, _CANONICAL)).as_py():
        return None
    try:
        found = np.asarray(names.cast(pa.int64()))
    except pa.ArrowInvalid:
        return None
    return found if (found >= 0).all() else None


def from_values(values: Any) -> Ids:
    """Ids of an array or list of numbers or strings, under the same rules."""
    array = np.asarray(values)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    texts = pa.array(array.tolist() if array.dtype.kind in "iu" else [str(value) for value in array.tolist()])
    encoded = texts.cast(pa.string()).dictionary_encode()
    return _sorted([encoded.indices.to_numpy()], encoded.dictionary)


def merge(parts: Sequence[Ids]) -> tuple[list[np.ndarray], np.ndarray]:
    """Codes of several columns into their common names, and these."""
    texts = pa.concat_arrays([spelled(part.names) for part in parts])
    encoded = texts.dictionary_encode()
    joined = _sorted([encoded.indices.to_numpy()], encoded.dictionary)
    ends = np.cumsum([len(part.names) for part in parts])[:-1]
    return [place[part.codes] for place, part in zip(np.split(joined.codes, ends), parts, strict=True)], joined.names


def spelled(names: Any) -> pa.Array:
    """Names as text."""
    array = np.asarray(names)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind == "f" and (array == np.floor(array)).all():
        array = array.astype(np.int64)
    return (
        pa.array(array.tolist(), pa.string())
        if array.dtype.kind == "U"
        else pa.array([str(name) for name in array.tolist()], pa.string())
    )


def places(wanted: Any, names: Any) -> np.ndarray:
    """Where each of ``wanted`` stands among ``names``, compared as text: int64, -1 where it does not."""
    found = pc.index_in(spelled(wanted), value_set=spelled(names))
    return np.asarray(pc.fill_null(found, -1)).astype(np.int64)
