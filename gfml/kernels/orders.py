"""Rows put in order within groups as machine code: counting for the groups, small sorts within. Importing this module imports numba.

Group g, or user g, owns the places starts[g]:starts[g + 1] of what is ordered.
"""

from __future__ import annotations

import numpy as np

from gfml.base.compiled import compiled

Array = np.ndarray
FEW = 32  # up to so many rows of a group are counted against each other


@compiled
def order_pairs(users: Array, items: Array, starts: Array, rows: Array, by_user: Array, by_item: Array) -> None:
    """The rows by user, then item, then row, and their users and items, int32 [n]; starts int64 [U + 1] is used up."""
    pairs = np.empty(len(users), np.int64)
    for row in range(len(users)):
        pairs[starts[users[row]]] = (np.int64(items[row]) << 32) | row
        starts[users[row]] += 1
    first = 0
    for user in range(len(starts) - 1):
        pairs[first : starts[user]].sort()
        for place in range(first, starts[user]):
            rows[place], by_user[place], by_item[place] = pairs[place] & 0xFFFFFFFF, user, pairs[place] >> 32
        first = starts[user]


@compiled
def rank_rows(key: Array, starts: Array, places: Array) -> None:
    """places int32 [n]: how many rows of its group come before each row by key, equal keys by row."""
    for group in range(len(starts) - 1):
        own, found = key[starts[group] : starts[group + 1]], places[starts[group] : starts[group + 1]]
        if len(own) > FEW:
            order = np.argsort(own, kind="mergesort")
            for place in range(len(own)):
                found[order[place]] = place
            continue
        for row in range(len(own)):
            before = 0
            for other in range(row):
                before += own[other] <= own[row]
            for other in range(row + 1, len(own)):
                before += own[other] < own[row]
            found[row] = before
