"""Inner loops of ranking and of the closed-form recommenders as machine code. Arrays in, arrays out.

Importing this module imports numba, so those who use it import it late. Every function works on rows that nobody else
writes: shared out among threads (:func:`gfml.base.compiled.in_threads`), the result is the same whatever their number.
"""

from __future__ import annotations

import numpy as np

from gfml.base.compiled import compiled

# Columns that are compared with the threshold in one go.
GROUP = 64


@compiled
def put(values, ids, value, number):
    """Replace the worst of a list by something that is better.

    values, ids [k] are a heap: places 2 p + 1 and 2 p + 2 are no worse than place p. Worse is the smaller value, of
    equal values the higher id.
    """
    k, hole = len(values), 0
    while True:
        child = 2 * hole + 1
        if child >= k:
            break
        right = child + 1
        if right < k and (
            values[right] < values[child] or (values[right] == values[child] and ids[right] > ids[child])
        ):
            child = right
        if values[child] > value or (values[child] == value and ids[child] < number):
            break
        values[hole], ids[hole] = values[child], ids[child]
        hole = child
    values[hole], ids[hole] = value, number


@compiled
def best_first(values, ids):
    """Put a heap in order: value descending, then id ascending."""
    for last in range(len(values) - 1, 0, -1):
        value, number = values[last], ids[last]
        values[last], ids[last] = values[0], ids[0]
        put(values[:last], ids[:last], value, number)


@compiled
def keep_best(scores, first, seen, place, end, values, ids, broken):
    """Merge a tile of scores into the lists of its rows; columns are ids first, first + 1, ... of the catalogue.

    Tiles of a row come in ascending order of ids, so an equal score later is no better. Seen items become -inf, and
    -inf never enters a list. Most groups of columns have nothing above the threshold and cost one pass.
    Shape: scores [n, width], written to; seen: ascending ids, those of row r from place[r] (moved on) up to end[r];
    values, ids [n, k]: heaps as for :func:`put`, at first -inf and -1; broken bool [n]: set where a score is NaN.
    """
    width = scores.shape[1]
    for r in range(len(scores)):
        row, value, number = scores[r], values[r], ids[r]
        while place[r] < end[r] and seen[place[r]] < first + width:
            row[seen[place[r]] - first] = -np.inf
            place[r] += 1
        for start in range(0, width, GROUP):
            stop = min(start + GROUP, width)
            above = 0
            for score in row[start:stop]:
                above += not (score <= value[0])  # NaN is not <= either
            if not above:
                continue
            for column in range(start, stop):
                score = row[column]
                if score > value[0]:
                    put(value, number, score, first + column)
                elif score != score:
                    broken[r] = True


@compiled
def sort_lists(values, ids):
    """:func:`best_first` for every row."""
    for r in range(len(values)):
        best_first(values[r], ids[r])
