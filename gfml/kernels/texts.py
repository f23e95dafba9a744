"""Texts told apart as machine code: a code for each cell of a column, by first appearance. Importing this module imports numba.

Cells are bytes: cell r is data[edges[r]:edges[r + 1]]. A table of places, probed one after the other, holds for each
text its hash and its code; that two texts of one hash are the same is always checked by their bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gfml.base.compiled import compiled, prefetch

Array = np.ndarray
MIX, SHIFT, WORD = np.uint64(0x9E3779B97F4A7C15), np.uint64(29), 8
AHEAD = 16  # places asked for before they are needed


@intrinsic
def word(typing_context: Any, data: types.Array, place: types.Integer) -> Any:
    """The eight bytes data[place:place + 8] as a number; wherever they lie. The caller sees to the bounds."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        index = context.cast(builder, arguments[1], signature.args[1], types.intp)
        pointer = cgutils.get_item_pointer(context, builder, signature.args[0], array, [index], wraparound=False)
        wide = ir.IntType(64)
        return builder.load(builder.bitcast(pointer, wide.as_pointer()), align=1)

    return types.uint64(data, place), build


@compiled
def tail(data: Array, start: int, end: int) -> np.uint64:
    """Up to eight bytes before ``end`` as a number."""
    if end - start >= WORD:
        return word(data, end - WORD)
    found = np.uint64(0)
    for place in range(start, end):
        found = (found << np.uint64(8)) | np.uint64(data[place])
    return found


@compiled
def hashes(edges: Array, data: Array, found: Array) -> None:
    """found uint64 [n]: a number for each cell, from its length and all its bytes."""
    for row in range(len(found)):
        start, end = edges[row], edges[row + 1]
        mixed = np.uint64(end - start) * MIX
        last = tail(data, start, end)
        while end - start > WORD:
            mixed = (mixed ^ word(data, start)) * MIX
            mixed ^= mixed >> SHIFT
            start += WORD
        mixed = (mixed ^ last) * MIX
        mixed ^= mixed >> SHIFT
        mixed *= MIX
        found[row] = mixed ^ (mixed >> np.uint64(32))


@compiled
def same(data: Array, start: int, end: int, other: Array, at: int) -> bool:
    """Whether data[start:end], of more than two words, stands in ``other`` from ``at`` on but for its first and last."""
    alike = True
    for place in range(start + WORD, end - WORD, WORD):
        alike &= word(data, place) == word(other, at + place - start)
    return alike


@compiled
def look_up(edges: Array, data: Array, found: Array, codes: Array, table: Array, ends: Array, content: Array,
            known: int) -> tuple[int, int]:  # fmt: skip
    """(rows done, texts known): codes of as many rows as there is room for.

    found: :func:`hashes` of the rows; codes int32 [n]: written. table uint64 [power of two, 4]: hash, length, first
    and last bytes of a text, and its code + 1 in the upper half of the length's word, 0 where a place is free; ends
    int64 [m + 1], content uint8: text c is content[ends[c]:ends[c + 1]].
    """
    last, half = np.uint64(len(table) - 1), np.uint64(32)
    for row in range(len(codes)):
        if row + AHEAD < len(codes):
            prefetch(table, found[row + AHEAD] & last, 0)
        start, end, place = edges[row], edges[row + 1], found[row] & last
        length, after = np.uint64(end - start), tail(data, start, end)
        before = word(data, start) if length >= WORD else after
        while True:
            entry = table[place]
            if entry[1] == 0:
                if 2 * (known + 1) > len(table) or known + 1 >= len(ends) or ends[known] + end - start > len(content):
                    return row, known
                content[ends[known] : ends[known] + end - start] = data[start:end]
                ends[known + 1] = ends[known] + end - start
                codes[row] = known
                known += 1
                entry[0], entry[1], entry[2], entry[3] = found[row], np.uint64(known) << half | length, before, after
                break
            code = np.int64(entry[1] >> half) - 1
            ends_alike = entry[0] == found[row] and entry[2] == before and entry[3] == after
            if (
                ends_alike
                and entry[1] & np.uint64(0xFFFFFFFF) == length
                and (length <= 2 * WORD or same(data, start, end, content, ends[code]))
            ):
                codes[row] = code
                break
            place = (place + np.uint64(1)) & last
    return len(codes), known


@compiled
def grow(table: Array, larger: Array) -> None:
    """Move all texts to a larger table."""
    last = np.uint64(len(larger) - 1)
    for old in range(len(table)):
        if table[old, 1] != 0:
            place = table[old, 0] & last
            while larger[place, 1] != 0:
                place = (place + np.uint64(1)) & last
            larger[place] = table[old]
