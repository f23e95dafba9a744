"""Inner loops of ranking and of the closed-form recommenders as machine code. Arrays in, arrays out.

Importing this module imports numba, so those who use it import it late. Every function works on rows that nobody else
writes: shared out among threads (:func:`gfml.base.compiled.in_threads`), the result is the same whatever their number.
"""

from __future__ import annotations

import numpy as np

from gfml.base.compiled import compiled

Array = np.ndarray
Pattern = tuple[np.ndarray, np.ndarray]  # where each row of a sparse matrix starts, and the columns it stores

# Columns that are compared with the threshold in one go.
GROUP = 128
# Squared length of a residual at which conjugate gradients stop.
SMALL = 1e-20


@compiled
def put(values: Array, ids: Array, value: float, number: int) -> None:
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
def best_first(values: Array, ids: Array) -> None:
    """Put a heap in order: value descending, then id ascending."""
    for last in range(len(values) - 1, 0, -1):
        value, number = values[last], ids[last]
        values[last], ids[last] = values[0], ids[0]
        put(values[:last], ids[:last], value, number)


@compiled
def keep_best(
    scores: Array, first: int, seen: Array, place: Array, end: Array, values: Array, ids: Array, broken: Array
) -> None:
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
            part, above = row[start : start + GROUP], 0
            for column in range(len(part)):
                above += not (part[column] <= value[0])  # NaN is not <= either
            if not above:
                continue
            for column in range(len(part)):
                score = part[column]
                if score > value[0]:
                    put(value, number, score, first + start + column)
                elif score != score:
                    broken[r] = True


@compiled
def sort_lists(values: Array, ids: Array) -> None:
    """:func:`best_first` for every row."""
    for r in range(len(values)):
        best_first(values[r], ids[r])


@compiled
def nearest_items(
    first: int, by_item: Pattern, by_user: Pattern, size: Array, shrink: float, jaccard: bool, room: Pattern,
    values: Array, ids: Array,
) -> None:  # fmt: skip
    """The k most similar items of items first, first + 1, ..., by users in common.

    Shape: by_item: starts [I + 1] and who has each item; by_user: starts [U + 1] and what each user has;
    size [I]: users of each item; room: [I] of zeros, which they are again at the end, and [I + 1] of anything;
    values, ids [n, k]: at first 0 and -1, in the end heaps as for :func:`put`, with the similarities.
    """
    (item_starts, users_of), (user_starts, items_of), (common, touched) = by_item, by_user, room
    for row in range(len(values)):
        item, value, number, found = first + row, values[row], ids[row], 0
        for user in users_of[item_starts[item] : item_starts[item + 1]]:
            for other in items_of[user_starts[user] : user_starts[user + 1]]:
                touched[found] = other
                found += common[other] == 0
                common[other] += 1
        common[item] = 0  # then its similarity is 0, and it does not enter
        for other in touched[:found]:
            if jaccard:
                below = size[item] + size[other] - common[other]
            else:
                below = np.sqrt(size[item] * size[other])
            similarity = common[other] / (below + shrink)
            common[other] = 0
            if similarity > value[0] or (similarity == value[0] and other < number[0]):
                put(value, number, similarity, other)


@compiled
def common_users(first: int, by_item: Pattern, by_user: Pattern, counts: Array) -> None:
    """counts[r, j] += users that item first + r and item j have in common; counts [n, I], patterns as above."""
    (item_starts, users_of), (user_starts, items_of) = by_item, by_user
    for row in range(len(counts)):
        own = counts[row]
        for user in users_of[item_starts[first + row] : item_starts[first + row + 1]]:
            for other in items_of[user_starts[user] : user_starts[user + 1]]:
                own[other] += 1


@compiled(any_order=True)
def solve_rows(
    first: int, by_row: Pattern, own: Array, other: Array, gram: Array, weight: float, ridge: Array, steps: int,
    room: Array,
) -> None:  # fmt: skip
    """Conjugate gradients for rows first, first + 1, ... of one side of iALS, the other side fixed.

        row w moves to the minimum of  sum_p (1 - w . h_p)^2 + weight w' gram w + ridge |w|^2,  h_p the rows it has

    from where it is, in at most ``steps`` steps, or until half the squared length of the gradient is next to nothing.
    Shape: own [n, D], written to; other [m, D]; gram [D, D] = other' other; ridge [n]; by_row: starts and which rows of
    the other side each has; room [3, D] of anything.
    """
    (starts, others_of), residual, direction, image = by_row, room[0], room[1], room[2]
    width, one = other.shape[1], other.dtype.type(1)
    for row in range(len(own)):
        has, w = others_of[starts[first + row] : starts[first + row + 1]], own[row]
        if not len(has):
            w[:] = 0
            continue
        # Written out, not as functions of their own: half as fast again.
        for c in range(width):
            residual[c] = -ridge[row] * w[c]
        for a in range(width):
            factor, column = weight * w[a], gram[a]
            for c in range(width):
                residual[c] -= factor * column[c]
        for p in range(len(has)):
            h, factor = other[has[p]], one
            for c in range(width):
                factor -= h[c] * w[c]
            for c in range(width):
                residual[c] += factor * h[c]
        norm = one - one
        for c in range(width):
            direction[c] = residual[c]
            norm += residual[c] * residual[c]
        for _ in range(steps):
            if norm < SMALL:
                break
            for c in range(width):
                image[c] = ridge[row] * direction[c]
            for a in range(width):
                factor, column = weight * direction[a], gram[a]
                for c in range(width):
                    image[c] += factor * column[c]
            for p in range(len(has)):
                h, factor = other[has[p]], one - one
                for c in range(width):
                    factor += h[c] * direction[c]
                for c in range(width):
                    image[c] += factor * h[c]
            bend, before = one - one, norm
            for c in range(width):
                bend += direction[c] * image[c]
            length, norm = norm / bend, one - one
            for c in range(width):
                w[c] += length * direction[c]
                residual[c] -= length * image[c]
                norm += residual[c] * residual[c]
            ratio = norm / before
            for c in range(width):
                direction[c] = residual[c] + ratio * direction[c]


@compiled(any_order=True)
def squared_gaps(pattern: Pattern, table: Array, fixed: Array) -> float:
    """Sum over the stored pairs (r, c) of (1 - table_r . fixed_c)^2."""
    starts, columns = pattern
    total = 0.0
    for r in range(len(table)):
        for place in range(starts[r], starts[r + 1]):
            score = table.dtype.type(0)
            for d in range(table.shape[1]):
                score += table[r, d] * fixed[columns[place], d]
            total += (1.0 - score) ** 2
    return total
