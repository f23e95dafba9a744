"""The closed form on CPUs as machine code that visits only the neighbours there are. Arrays in, arrays out.

Compiled at the first call for each precision and kept on disk where that can be. Importing this module imports numba,
so ``contextual.fused``, whose notation this is, imports it late. Row buffers have the precision of S, sums are float64.
Sums over S run down its columns, side by side: along a row each addition would wait for the one before. Indices are
unsigned, which spares a check for negative ones at every access.

Shape: sim, grad [B, B], rows one after the other; labels [B], integers. The memory of a batch, uninitialised:

    rows    [8, B]    thresholds of neighbours, of half-neighbours, |N(i)|, |R(i)|; four for anything
    lists   [3 (B + 1) + 3 number + num_half], see :class:`Neighbours`
    beside  [3, number]    W~ at the neighbours; two for anything

where number and num_half are what :func:`count` returns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gfml.base.compiled import compiled


class Neighbours(NamedTuple):
    """Who is whose neighbour. half: thresholds of half-neighbours; size, num_mutual: |N(i)| and |R(i)|; all [B].

    column: N row by row, row i from start[i] up to start[i + 1]. row, place: N column by column, column j from above[j]
    on, the rows that hold j and where in ``column`` they do. mutual: R row by row, row i from first[i] on. weight: W~,
    beside ``column``.
    """

    half: NDArray[np.floating]
    size: NDArray[np.floating]
    num_mutual: NDArray[np.floating]
    start: NDArray[np.uint32]
    above: NDArray[np.uint32]
    first: NDArray[np.uint32]
    column: NDArray[np.uint32]
    row: NDArray[np.uint32]
    place: NDArray[np.uint32]
    mutual: NDArray[np.uint32]
    weight: NDArray[np.floating]


@compiled
def laid_out(rows, lists, beside):
    """:class:`Neighbours` in the memory of a batch: three arrays are handed over faster than eleven."""
    ends, number = rows.shape[1] + 1, beside.shape[1]
    first = 3 * ends
    last = first + 3 * number
    starts, columns = lists[:first].reshape(3, ends), lists[first:last].reshape(3, number)
    return Neighbours(
        rows[1], rows[2], rows[3], starts[0], starts[1], starts[2],
        columns[0], columns[1], columns[2], lists[last:], beside[0],
    )  # fmt: skip


@compiled
def count(sim, k, slack, rows):
    """rows[:3] = thresholds min(s^(k), 1) - slack, those of k // 2, and |N(i)|. Returns how many neighbours and
    half-neighbours there are."""
    batch, one = len(sim), sim.dtype.type(1)
    top = rows[-1, :k]  # the largest of a row, in falling order
    number = num_half = 0
    for i in range(batch):
        s = sim[i]
        top[:] = -np.inf
        least = top[k - 1]
        for j in range(batch):
            if s[j] > least:
                at = k - 1
                while at > 0 and top[at - 1] < s[j]:
                    top[at] = top[at - 1]
                    at -= 1
                top[at] = s[j]
                least = top[k - 1]
        far, near = min(top[k - 1], one) - slack, min(top[k // 2 - 1], one) - slack
        members = 0
        for j in range(batch):
            members += s[j] >= far
            num_half += s[j] >= near
        rows[0, i], rows[1, i], rows[2, i] = far, near, members
        number += members
    return number, num_half


@compiled
def forward(sim, labels, pos_margin, neg_margin, with_companions, rows, lists, beside, sums):
    """Fill the memory of a batch that :func:`count` began. Returns the sums of E^2 (E = W^ - Y off the diagonal), of S,
    of max(0, pos_margin - s) over positive pairs and of max(0, s - neg_margin) over negative ones, and how many terms
    of the last two are above 0; they are 0 unless ``with_companions``. sums: [4, B], for anything."""
    near = laid_out(rows, lists, beside)
    own, other, error = rows[4], rows[5], rows[6]
    list_neighbours(sim, rows[0], near, own)
    sums[:] = 0
    attracted = repelled = 0
    squares, total = sums[0], sums[1]
    for i in range(len(sim)):
        error_row(i, labels, near, own, other, error)
        for j in range(len(sim)):
            squares[j] += error[j] * error[j]
            total[j] += sim[i, j]
        if with_companions:
            more = add_hinges(i, sim, labels, pos_margin, neg_margin, sums[2], sums[3])
            attracted += more[0]
            repelled += more[1]
    return squares.sum(), total.sum(), sums[2].sum(), sums[3].sum(), attracted, repelled


@compiled
def list_neighbours(sim, nearest, near, met):
    """Fill in ``near``, but for half and size, which it has. met: [B], for anything."""
    batch, at = len(sim), 0
    for i in range(batch):
        near.start[i] = at
        for j in range(batch):
            if sim[i, j] >= nearest[i]:
                near.column[at] = j
                at += 1
    near.start[batch] = at
    near.above[:] = 0
    for place in range(at):
        near.above[near.column[place] + 1] += 1
    # Until column j is filled above[j + 1] is where it goes on.
    at = 0
    for j in range(batch):
        at, near.above[j + 1] = at + near.above[j + 1], at
    at = 0
    for i in range(batch):
        near.first[i] = at
        for place in range(near.start[i], near.start[i + 1]):
            j = near.column[place]
            up = near.above[j + 1]
            near.row[up], near.place[up], near.above[j + 1] = i, place, up + 1
            if sim[i, j] >= near.half[i] and sim[j, i] >= near.half[j]:
                near.mutual[at] = j
                at += 1
        near.num_mutual[i] = at - near.first[i]
    near.first[batch] = at
    for i in range(batch):
        overlap(i, near, met)
        size = near.size[i]
        inside, outside = max(size, 1), max(batch - size, 1)
        for place in range(near.start[i], near.start[i + 1]):
            common, other = met[near.column[place]], near.size[near.column[place]]
            near.weight[place] = 0.5 * (common / inside + (common - other + (batch - size)) / outside)


@compiled
def overlap(i, near, met):
    """met_j = |N(i) and N(j)|."""
    met[:] = 0
    for place in range(near.start[i], near.start[i + 1]):
        j = near.column[place]
        for up in range(near.above[j], near.above[j + 1]):
            met[near.row[up]] += 1


@compiled
def error_row(i, labels, near, own, other, error):
    """error = row i of E. own, other: [B], for row and column i of R W~, whose division by |R| comes last: where all
    agree W^ is then exactly 1."""
    own[:] = 0
    other[:] = 0
    for at in range(near.first[i], near.first[i + 1]):
        add_weights(near.mutual[at], near, own)
    for up in range(near.above[i], near.above[i + 1]):
        m, weight = near.row[up], near.weight[near.place[up]]
        for at in range(near.first[m], near.first[m + 1]):
            other[near.mutual[at]] += weight
    least, one = error.dtype.type(0.5), error.dtype.type(1)
    share, label = max(near.num_mutual[i], least), labels[i]
    for j in range(len(labels)):
        theirs = max(near.num_mutual[j], least)
        product = share * theirs
        mean = (own[j] * theirs + other[j] * share) / (product + product)
        error[j] = mean - one if labels[j] == label else mean
    error[i] = 0


@compiled
def add_weights(q, near, onto):
    """onto += row q of W~."""
    for place in range(near.start[q], near.start[q + 1]):
        onto[near.column[place]] += near.weight[place]


@compiled
def add_hinges(i, sim, labels, pos_margin, neg_margin, positive, negative):
    """Add row i's terms of the contrastive loss to sums down the columns. Returns the numbers of terms above 0."""
    attracted = repelled = 0
    for j in range(len(sim)):
        same, lacks, exceeds = labels[j] == labels[i], pos_margin - sim[i, j], sim[i, j] - neg_margin
        positive[j] += lacks if same and lacks > 0 else 0
        negative[j] += exceeds if not same and exceeds > 0 else 0
        attracted += same and lacks > 0
        repelled += not same and exceeds > 0
    lacks = pos_margin - sim[i, i]
    if lacks > 0:  # no pair of a picture with itself
        positive[i] -= lacks
        attracted -= 1
    return attracted, repelled


@compiled
def backward(sim, labels, pos_margin, neg_margin, weight, pull, push, constant, rows, lists, beside, grad):
    """grad = weight (K+ N - K- (1 - N) + (M+ + M-) / 2 o C + G_P), 0 where S > 1; minus ``pull`` at positive pairs
    below pos_margin, plus ``push`` at negative ones above neg_margin, plus ``constant``; with A = E in the formulas.
    rows, lists, beside: as :func:`forward` left them, and may be used again."""
    near = laid_out(rows, lists, beside)
    own, other, error, lost = rows[4], rows[5], rows[6], rows[7]
    expansion, common = beside[1], beside[2]
    batch, kind = len(sim), grad.dtype.type
    zero, one, factor = kind(0), kind(1), kind(weight)
    grad[:] = 0
    expansion[:] = 0
    for i in range(batch):
        error_row(i, labels, near, own, other, error)
        spread(i, sim, near, error, own, other, expansion, grad)
    # Now grad is C. common: (K+ + K-)_ij before it is made symmetric; lost: row sums of K-.
    lost[:] = 0
    for i in range(batch):
        inside, outside = halves(i, near)
        for place in range(near.start[i], near.start[i + 1]):
            j = near.column[place]
            lost[i] += outside * grad[i, j]
            lost[j] += outside * grad[i, j]
            common[place] = (inside + outside) * grad[i, j]
    for i in range(batch):
        overlap(i, near, own)
        inside, outside = halves(i, near)
        met, apart, strangers, gone = kind(inside + outside), kind(outside), kind(batch - near.size[i]), lost[i]
        row = grad[i]
        for j in range(batch):
            row[j] = row[j] * (own[j] * met + (strangers - near.size[j]) * apart) - gone
        for place in range(near.start[i], near.start[i + 1]):
            add_members(near.column[place], near, common[place], row)
        for up in range(near.above[i], near.above[i + 1]):
            p, place = near.row[up], near.place[up]
            add_members(p, near, common[place], row)
            if sim[p, i] >= near.half[p]:
                row[p] += expansion[place]
        for j in range(batch):
            row[j] = zero if sim[i, j] > one else factor * row[j]
        if pull != 0 or push != 0:
            add_slopes(i, sim, labels, pos_margin, neg_margin, kind(pull), kind(push), row)
        if constant != 0:
            row += kind(constant)


@compiled
def halves(i, near):
    """1 / (2 |N(i)|) and 1 / (2 (B - |N(i)|))."""
    return 0.5 / max(near.size[i], 1), 0.5 / max(len(near.size) - near.size[i], 1)


@compiled
def add_slopes(i, sim, labels, pos_margin, neg_margin, pull, push, row):
    """row -= pull at the terms of :func:`add_hinges` that attract, += push at those that repel."""
    diagonal, zero = row[i], row.dtype.type(0)
    for j in range(len(row)):
        same, lacks, exceeds = labels[j] == labels[i], pos_margin - sim[i, j], sim[i, j] - neg_margin
        row[j] -= pull if same and lacks > 0 else zero
        row[j] += push if not same and exceeds > 0 else zero
    row[i] = diagonal


@compiled
def spread(i, sim, near, error, share, met, expansion, onto):
    """Add row i's part of C to ``onto``, and row i of Q to ``expansion``: Q_iq at the places (i, q) of P, Q_ip at the
    places (p, i). share, met: [B], for E_i / r_i and its products with rows of W~."""
    inverse = 1 / max(near.num_mutual[i], 0.5)
    for j in range(len(error)):
        share[j] = error[j] * error.dtype.type(inverse)
    for at in range(near.first[i], near.first[i + 1]):
        row = onto[near.mutual[at]]
        for j in range(len(row)):
            row[j] += share[j]
    lean = 0.0
    for place in range(near.start[i], near.start[i + 1]):
        q = near.column[place]
        if sim[i, q] >= near.half[i]:
            met[q] = along(q, near, share)
            if sim[q, i] >= near.half[q]:
                lean += met[q]
    lean *= inverse
    for place in range(near.start[i], near.start[i + 1]):
        if sim[i, near.column[place]] >= near.half[i]:
            expansion[place] += met[near.column[place]] - lean
    for up in range(near.above[i], near.above[i + 1]):
        p = near.row[up]
        if sim[p, i] >= near.half[p]:
            product = met[p] if sim[i, p] >= near.half[i] else along(p, near, share)
            expansion[near.place[up]] += product - lean


@compiled
def along(q, near, row):
    """Sum of row_j W~_qj."""
    total = 0.0
    for place in range(near.start[q], near.start[q + 1]):
        total += row[near.column[place]] * near.weight[place]
    return total


@compiled
def add_members(q, near, amount, onto):
    """onto += amount times row q of N."""
    for place in range(near.start[q], near.start[q + 1]):
        onto[near.column[place]] += amount
