"""Rows put in order within groups as machine code: counting for the groups, small sorts within. Importing this module imports numba.

Group g owns the places starts[g]:starts[g + 1] of what is ordered.
"""

from __future__ import annotations

import numpy as np

from gfml.base.compiled import compiled

Array = np.ndarray
FEW = 32  # up to so many rows of a group are counted against each other


@compiled
def order_pairs(users: Array, items: Array, starts: Array, pairs: Array) -> None:
    """pairs int64 [n]: item * 2^32 + row of all rows, by user, ascending; starts int64 [U + 1] is used up."""
    for row in range(len(users)):
        pairs[starts[users[row]]] = (np.int64(items[row]) << 32) | row
        starts[users[row]] += 1
    first = 0
    for user in range(len(starts) - 1):
        pairs[first : starts[user]].sort()
        first = starts[user]


@compiled
def rank_rows(groups: Array, key: Array, starts: Array, places: Array) -> None:
    """places [n]: how many rows of its group come before each row by key, equal keys by row; starts is used up."""
    rows = np.empty(len(groups), places.dtype)
    for row in range(len(groups)):
        rows[starts[groups[row]]] = row
        starts[groups[row]] += 1
    first = 0
    for group in range(len(starts) - 1):
        own = rows[first : starts[group]]
        first = starts[group]
        if len(own) > FEW:
            order = np.argsort(key[own], kind="mergesort")
            for place in range(len(own)):
                places[own[order[place]]] = place
            continue
        for row in own:
            before = 0
            for other in own:
                before += key[other] < key[row] or (key[other] == key[row] and other < row)
            places[row] = before
