"""The pair losses of free vectors and their gradients in closed form, pair by pair.

A pair b has a user vector x and 1 + W item vectors y_j, the positive first. With the scores s_j (dot products or
gravity scores) and the loss l of the pair, everything follows from a few scalars and, for distances other than l2, the
two slopes of Q by its arguments:

    dl/dx   = sum_j (dl/ddot_j) y_j + sum_j (dl/dQ_j) dQ/dx(x, y_j)       dl/dQ_j = -lambda / (Q_j + eps) dl/dg_j
    dl/dy_j =       (dl/ddot_j) x   +       (dl/dQ_j) dQ/dy(x, y_j)       dl/da   = M'(a) dl/dmu

    loss    slopes by the scores, s = logistic sigmoid
    bpr     negative j: s(s_j - s_0) / W;  positive: minus their sum
    bce     negative j: s(s_j) / 2 W;      positive: -s(-s_0) / 2

    Q           dQ/dx                                       dQ/dy
    l2          2 (x - y)                                   2 (y - x)
    l1          2 sum|x - y| sign(x - y)                    the opposite
    emd         2 / D sum over e >= d of C_e, C = cumsum    the opposite
    kl          s'(x) (x - y)                               s(y) - s(x)
    softmax     p (h - p.h) for h the slope by p, of emd; p (log p - log q - Q) and q - p, of kl
    unit rows   (h - (v.h) v) / |row| for h the slope by the unit row v, of any Q

A pair's numbers depend on nothing but the pair, so that any number of threads gives the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gfml.base.compiled import compiled
from gfml.kernels.rows import fetch

# Sums may be taken in any order, so that they use wide registers; infinities and NaN stay what they are.
OPTIONS = {"error_model": "numpy", "nogil": True}
ANY_ORDER = {"reassoc", "contract", "nsz"}
fast = njit(fastmath=ANY_ORDER, forceinline=True, **OPTIONS)
apart = njit(fastmath=ANY_ORDER, **OPTIONS)
scalar = njit(forceinline=True, **OPTIONS)

DISTANCES = ("l2", "l1", "emd", "emd-softmax", "kl", "kl-softmax")
L2, L1, EMD, EMD_SOFTMAX, KL, KL_SOFTMAX = range(6)
MASS_PARAMS = ("softplus", "relu", "exp")
BPR, BCE = 1, 2
# Rows are asked for so many pairs before they are used.
AHEAD = 4
# Columns of the values of a pair.
PARTS = ("dot", "gravity", "emb_reg", "mass_reg", "log_lamb")


class Recipe(NamedTuple):
    """What is computed. dot, gravity: the loss of these scores (BPR, BCE or 0 for none) with its weight in the total;
    distance, param: places in DISTANCES and MASS_PARAMS; decay and mass_decay: weights of the regularisers. Weights are
    those of one pair, 1 / B of the batch's."""

    dot: int
    gravity: int
    dot_weight: float
    gravity_weight: float
    distance: int
    squared: bool
    norm: bool
    lamb: float
    eps: float
    product: bool
    param: int
    decay: float
    mass_decay: float


class Parameters(NamedTuple):
    """nodes [U + I, D], users first; user and item: raw masses [U] and [I], empty where there are none."""

    nodes: NDArray[np.floating]
    user: NDArray[np.floating]
    item: NDArray[np.floating]


class Pairs(NamedTuple):
    """users, pos [B], neg [B, W], integers."""

    users: NDArray[np.integer]
    pos: NDArray[np.integer]
    neg: NDArray[np.integer]


class Gradients(NamedTuple):
    """What is computed of a batch; row 0 of a pair is its user, row 1 the positive, the others the negatives.

    rows [B, 2 + W, D]: gradients of the vectors; places [B, 2 + W]: the node each belongs to; masses [B, 2 + W]: those
    of the raw masses; values [B, 5]: a pair's share of PARTS, the last the gradient by log lambda.
    """

    rows: NDArray[np.floating]
    places: NDArray[np.int64]
    masses: NDArray[np.floating]
    values: NDArray[np.float64]


@scalar
def sigmoid_and_softplus(z):
    """1 / (1 + e^-z) and log(1 + e^z) without overflow, to 1e-16: log1p would cost twice as much."""
    z = np.float64(z)
    e = math.exp(-abs(z))
    return (1 if z >= 0 else e) / (1 + e), max(z, 0.0) + math.log(1 + e)


@scalar
def log_mass(raw, param):
    """M'(a) and M(a); see :func:`gfml.gravity.log_mass`."""
    if param == 0:
        return sigmoid_and_softplus(raw)
    if param == 1:
        return (1 / (1 + raw), math.log1p(raw)) if raw >= 0 else (0.0, 0.0)
    return 1.0, raw


@scalar
def loss_of(kind, work, scores, slopes, count, weight):
    """The loss of one pair by its scores work[scores, :count], positive first; work[slopes] becomes its derivatives
    times ``weight``."""
    share = 1 / (count - 1)
    value, by_pos = 0.0, 0.0
    for j in range(1, count):
        slope, one = sigmoid_and_softplus(work[scores, j] - (work[scores, 0] if kind == BPR else 0))
        value += share * one
        work[slopes, j] = weight * share * slope
        by_pos -= work[slopes, j]
    if kind == BCE:
        by_pos, one = sigmoid_and_softplus(-work[scores, 0])
        value = 0.5 * (value + one)
        by_pos *= -0.5 * weight
        for j in range(1, count):
            work[slopes, j] *= 0.5
    work[slopes, 0] = by_pos
    return value


# ------------------------------------------------------------------ distances
# Arrays come whole, with the index of a row: a view of a row costs more than the row.


@fast
def product(a, i, b, k):
    """a_i . b_k"""
    total = a.dtype.type(0)
    for d in range(a.shape[1]):
        total += a[i, d] * b[k, d]
    return total


@fast
def sq_difference(nodes, i, k, scale_i, scale_k):
    """|scale_i row_i - scale_k row_k|^2"""
    total = nodes.dtype.type(0)
    for d in range(nodes.shape[1]):
        gap = scale_i * nodes[i, d] - scale_k * nodes[k, d]
        total += gap * gap
    return total


@apart
def prepare(distance, nodes, r, scale, out, k):
    """out[k, 0] = scale row_r; for kl out[k, 1:] = its sigmoid and softplus, with softmax its softmax and logarithm."""
    width = nodes.shape[1]
    for d in range(width):
        out[k, 0, d] = scale * nodes[r, d]
    if distance == KL:
        for d in range(width):
            out[k, 1, d], out[k, 2, d] = sigmoid_and_softplus(out[k, 0, d])
    elif distance in (KL_SOFTMAX, EMD_SOFTMAX):
        top = out[k, 0, 0]
        for d in range(width):
            top = max(top, out[k, 0, d])
        total = nodes.dtype.type(0)
        for d in range(width):
            out[k, 1, d] = math.exp(out[k, 0, d] - top)
            total += out[k, 1, d]
        log_total = math.log(total)
        for d in range(width):
            out[k, 1, d] /= total
            out[k, 2, d] = out[k, 0, d] - top - log_total


@apart
def sq_distance(distance, rows, k):
    """Q of the prepared rows 0 and k, before it is squared once more."""
    width = rows.shape[2]
    total = rows.dtype.type(0)
    if distance == L1:
        for d in range(width):
            total += abs(rows[0, 0, d] - rows[k, 0, d])
        return total * total
    if distance in (EMD, EMD_SOFTMAX):
        part = 0 if distance == EMD else 1
        run = total
        for d in range(width):
            run += rows[0, part, d] - rows[k, part, d]
            total += run * run
        return total / width
    if distance == KL:
        for d in range(width):
            total += rows[k, 2, d] - rows[0, 2, d] - rows[0, 1, d] * (rows[k, 0, d] - rows[0, 0, d])
    else:
        for d in range(width):
            total += rows[0, 1, d] * (rows[0, 2, d] - rows[k, 2, d])
    return max(total, rows.dtype.type(0))


@apart
def slopes_of(distance, rows, k, by):
    """by[0] and by[1] become dQ/dx and dQ/dy of the prepared rows 0 and k, before Q is squared once more."""
    width = rows.shape[2]
    zero = rows.dtype.type(0)
    if distance == L1:
        total = zero
        for d in range(width):
            total += abs(rows[0, 0, d] - rows[k, 0, d])
        for d in range(width):
            gap = rows[0, 0, d] - rows[k, 0, d]
            by[0, d] = 2 * total if gap > 0 else (-2 * total if gap < 0 else zero)
            by[1, d] = -by[0, d]
    elif distance in (EMD, EMD_SOFTMAX):
        part = 0 if distance == EMD else 1
        run = zero
        for d in range(width):
            run += rows[0, part, d] - rows[k, part, d]
            by[0, d] = run
        run = zero
        for back in range(width):
            d = width - 1 - back
            run += by[0, d]
            by[0, d] = run * 2 / width
            by[1, d] = -by[0, d]
        if distance == EMD_SOFTMAX:
            through_softmax(rows, 0, by, 0)
            through_softmax(rows, k, by, 1)
    elif distance == KL:
        for d in range(width):
            p = rows[0, 1, d]
            by[0, d] = p * (1 - p) * (rows[0, 0, d] - rows[k, 0, d])
            by[1, d] = rows[k, 1, d] - p
    else:
        for d in range(width):
            by[0, d] = rows[0, 2, d] - rows[k, 2, d]
            by[1, d] = rows[k, 1, d] - rows[0, 1, d]
        through_softmax(rows, 0, by, 0)


@apart
def through_softmax(rows, k, by, side):
    """The slope by p = softmax(v), p = rows[k, 1], becomes that by v."""
    mean = rows.dtype.type(0)
    for d in range(rows.shape[2]):
        mean += rows[k, 1, d] * by[side, d]
    for d in range(rows.shape[2]):
        by[side, d] = rows[k, 1, d] * (by[side, d] - mean)


@apart
def add_through_unit(weight, by, side, rows, k, shrinks, out, b, place):
    """out[b, place] += weight times the slope by the raw row, from that by the scaled one, rows[k, 0]; ``weight`` holds
    the scale; not ``shrinks``: the scale is fixed."""
    along = rows.dtype.type(0)
    if shrinks:
        for d in range(rows.shape[2]):
            along += rows[k, 0, d] * by[side, d]
    for d in range(rows.shape[2]):
        out[b, place, d] += weight * (by[side, d] - along * rows[k, 0, d])


# ------------------------------------------------------------------ pairs
# Rows of the numbers of a pair, one column for each item and the last for the user.
DOT, SCORE, BY_DOT, BY_SCORE, BY_SQ, SQ, SCALE, SQUARE, MASS, MASS_SLOPE, CROSS, OWN = range(12)


@fast
def write_scaled(nodes, user, factor, out, b):
    """out[b, 0] = factor x"""
    for d in range(nodes.shape[1]):
        out[b, 0, d] = factor * nodes[user, d]


@fast
def write_linear(nodes, user, item, cross, own, out, b, place):
    """out[b, place] = cross x + own y, out[b, 0] += cross y: all that dot products and l2 need."""
    for d in range(nodes.shape[1]):
        out[b, place, d] = cross * nodes[user, d] + own * nodes[item, d]
        out[b, 0, d] += cross * nodes[item, d]


@scalar
def shrinks(square, norm):
    """Whether the scale of a row of this squared norm depends on the row."""
    return norm and square >= 1e-24


@scalar
def linear_pair(nodes, places, recipe, work, rows, b):
    """Gradients of the vectors for dot products and l2, from the numbers of the pair."""
    kind, count = nodes.dtype.type, work.shape[1] - 1
    scale_x, square_x = work[SCALE, count], work[SQUARE, count]
    own_x = recipe.decay
    for j in range(count):
        cross, own = work[BY_DOT, j], recipe.decay / (1 if j == 0 else count - 1)
        if recipe.gravity:
            scale, square, twice = work[SCALE, j], work[SQUARE, j], 2 * work[BY_SQ, j]
            cosine = 0.5 * (square_x * scale_x * scale_x + square * scale * scale - work[SQ, j])
            cross -= twice * scale_x * scale
            own += twice * scale * scale * (cosine if shrinks(square, recipe.norm) else 1.0)
            own_x += twice * scale_x * scale_x * (cosine if shrinks(square_x, recipe.norm) else 1.0)
        work[CROSS, j], work[OWN, j] = cross, own
    write_scaled(nodes, places[b, 0], kind(own_x), rows, b)
    for j in range(count):
        write_linear(nodes, places[b, 0], places[b, 1 + j], kind(work[CROSS, j]), kind(work[OWN, j]), rows, b, 1 + j)


@apart
def general_pair(nodes, places, recipe, work, prepared, by, rows, b):
    """As :func:`linear_pair` for any distance, from prepared rows. by: room for two slopes."""
    kind, count = nodes.dtype.type, work.shape[1] - 1
    moves = shrinks(work[SQUARE, count], recipe.norm)
    write_scaled(nodes, places[b, 0], kind(recipe.decay), rows, b)
    for j in range(count):
        own = recipe.decay / (1 if j == 0 else count - 1)
        write_linear(nodes, places[b, 0], places[b, 1 + j], kind(work[BY_DOT, j]), kind(own), rows, b, 1 + j)
        slopes_of(recipe.distance, prepared, 1 + j, by)
        weight = work[BY_SQ, j] * (2 * work[SQ, j] if recipe.squared else 1.0)
        add_through_unit(kind(weight * work[SCALE, count]), by, 0, prepared, 0, moves, rows, b, 0)
        own_moves = shrinks(work[SQUARE, j], recipe.norm)
        add_through_unit(kind(weight * work[SCALE, j]), by, 1, prepared, 1 + j, own_moves, rows, b, 1 + j)


@scalar
def measure(nodes, places, b, recipe, work):
    """Dot products, squared norms and scales of the rows of pair b into ``work``, and Q if it is l2."""
    kind, count, user = nodes.dtype.type, work.shape[1] - 1, places[b, 0]
    for j in range(count, -1, -1):
        row = user if j == count else places[b, 1 + j]
        square = product(nodes, row, nodes, row)
        work[SQUARE, j] = square
        work[SCALE, j] = 1 / math.sqrt(max(square, 1e-24)) if recipe.norm else 1.0
        if j < count and recipe.dot:
            work[DOT, j] = product(nodes, user, nodes, row)
        if j < count and recipe.gravity and recipe.distance == L2:
            work[SQ, j] = sq_difference(nodes, user, row, kind(work[SCALE, count]), kind(work[SCALE, j]))


@apart
def measure_general(nodes, places, b, recipe, work, prepared):
    """As :func:`measure` for any distance: Q, before it is squared once more, from prepared rows."""
    kind, count = nodes.dtype.type, work.shape[1] - 1
    measure(nodes, places, b, recipe, work)
    for k in range(count + 1):
        prepare(recipe.distance, nodes, places[b, k], kind(work[SCALE, count if k == 0 else k - 1]), prepared, k)
    for j in range(count):
        work[SQ, j] = sq_distance(recipe.distance, prepared, 1 + j)


@scalar
def gravity_pair(recipe, work, masses, values, b):
    """Loss, slopes by Q and gradients by the masses of pair b; the log-masses are in ``work``."""
    count = work.shape[1] - 1
    user, user_slope = work[MASS, count], work[MASS_SLOPE, count]
    for j in range(count):
        whole = work[SQ, j] * work[SQ, j] if recipe.squared else work[SQ, j]
        work[CROSS, j], work[OWN, j] = recipe.lamb / (whole + recipe.eps), recipe.lamb * math.log(whole + recipe.eps)
        mu = user * work[MASS, j] if recipe.product else user + work[MASS, j]
        work[SCORE, j] = mu - work[OWN, j]
    values[b, 1] = loss_of(recipe.gravity, work, SCORE, BY_SCORE, count, recipe.gravity_weight)
    by_user, by_log_lamb = 0.0, 0.0
    for j in range(count):
        slope = work[BY_SCORE, j]
        work[BY_SQ, j] = -slope * work[CROSS, j]
        by_log_lamb -= slope * work[OWN, j]
        by_user += slope * user_slope * (work[MASS, j] if recipe.product else 1.0)
        masses[b, 1 + j] = slope * work[MASS_SLOPE, j] * (user if recipe.product else 1.0)
    masses[b, 0] = by_user
    values[b, 4] = by_log_lamb


@scalar
def read_masses(parameters, num_users, places, b, recipe, work):
    """Log-masses and their slopes into ``work``; returns sum a^2 / 2 of the raw masses, negatives averaged."""
    count, half = work.shape[1] - 1, 0.0
    if len(parameters.user):
        raw = parameters.user[places[b, 0]]
        work[MASS_SLOPE, count], work[MASS, count] = log_mass(raw, recipe.param)
        half += 0.5 * raw * raw
    if len(parameters.item):
        for j in range(count):
            raw = parameters.item[places[b, 1 + j] - num_users]
            work[MASS_SLOPE, j], work[MASS, j] = log_mass(raw, recipe.param)
            half += 0.5 * raw * raw / (1 if j == 0 else count - 1)
    return half


@scalar
def add_mass_decay(parameters, num_users, places, b, decay, masses):
    """Add the gradient of the masses' regulariser to masses[b]."""
    if len(parameters.user):
        masses[b, 0] += decay * parameters.user[places[b, 0]]
    if len(parameters.item):
        for k in range(1, places.shape[1]):
            share = 1 if k == 1 else places.shape[1] - 2
            masses[b, k] += decay / share * parameters.item[places[b, k] - num_users]


@scalar
def open_pair(b, last, num_users, nodes, batch, places):
    """The nodes of pair b, while rows of later pairs are asked for."""
    ahead = min(b + AHEAD, last - 1)
    fetch(nodes, batch.users[ahead])
    fetch(nodes, batch.pos[ahead] + num_users)
    places[b, 0], places[b, 1] = batch.users[b], batch.pos[b] + num_users
    for j in range(batch.neg.shape[1]):
        fetch(nodes, batch.neg[ahead, j] + num_users)
        places[b, 2 + j] = batch.neg[b, j] + num_users


@scalar
def judge_pair(b, num_users, parameters, recipe, work, places, masses, values):
    """Losses of pair b, regularisers, slopes by dot products and Q, and gradients of the masses."""
    count = work.shape[1] - 1
    squares = work[SQUARE, count] + work[SQUARE, 0]
    for j in range(1, count):
        squares += work[SQUARE, j] / (count - 1)
    values[b, 0], values[b, 1], values[b, 2], values[b, 3], values[b, 4] = 0, 0, 0.5 * squares, 0, 0
    if recipe.dot:
        values[b, 0] = loss_of(recipe.dot, work, DOT, BY_DOT, count, recipe.dot_weight)
    if recipe.gravity:
        values[b, 3] = read_masses(parameters, num_users, places, b, recipe, work)
        gravity_pair(recipe, work, masses, values, b)
        add_mass_decay(parameters, num_users, places, b, recipe.mass_decay, masses)


@compiled
def linear_pairs(first, last, num_users, parameters, batch, recipe, out):
    """Fill ``out`` at the pairs first .. last - 1 of a batch, for dot products and l2."""
    nodes = parameters.nodes
    work = np.zeros((12, out.places.shape[1]))
    for b in range(first, last):
        open_pair(b, last, num_users, nodes, batch, out.places)
        measure(nodes, out.places, b, recipe, work)
        judge_pair(b, num_users, parameters, recipe, work, out.places, out.masses, out.values)
        linear_pair(nodes, out.places, recipe, work, out.rows, b)


@compiled
def general_pairs(first, last, num_users, parameters, batch, recipe, out):
    """As :func:`linear_pairs` for all distances."""
    nodes, count = parameters.nodes, out.places.shape[1]
    work, by = np.zeros((12, count)), np.empty((2, nodes.shape[1]), nodes.dtype)
    prepared = np.empty((count, 3, nodes.shape[1]), nodes.dtype)
    for b in range(first, last):
        open_pair(b, last, num_users, nodes, batch, out.places)
        measure_general(nodes, out.places, b, recipe, work, prepared)
        judge_pair(b, num_users, parameters, recipe, work, out.places, out.masses, out.values)
        general_pair(nodes, out.places, recipe, work, prepared, by, out.rows, b)


@compiled
def totals(values):
    """Sums of the columns, row after row: NumPy takes four times as long over rows this short."""
    sums = np.zeros(values.shape[1])
    for row in range(len(values)):
        for column in range(len(sums)):
            sums[column] += values[row, column]
    return sums


# ------------------------------------------------------------------ the hinge of metric learning


class HingeRecipe(NamedTuple):
    """Of :func:`gfml.losses.warp_hinge`; weight: that of one pair."""

    margin: float
    num_items: int
    use_rank_weight: bool
    rank_floor: bool
    weight: float


@fast
def write_hinge(nodes, places, b, slope, rows):
    """Gradients of slope / 2 (|u - p|^2 - |u - n|^2) by u, p and n."""
    user, pos, neg = places[b, 0], places[b, 1], places[b, 2]
    for d in range(nodes.shape[1]):
        u, p, n = nodes[user, d], nodes[pos, d], nodes[neg, d]
        rows[b, 0, d] = slope * (n - p)
        rows[b, 1, d] = slope * (p - u)
        rows[b, 2, d] = slope * (u - n)


@compiled
def hinge_pairs(first, last, num_users, parameters, batch, recipe, out):
    """As :func:`linear_pairs` for the hinge of the hardest negative, which alone has a row: ``out`` is of [B, 3]."""
    nodes, number = parameters.nodes, batch.neg.shape[1]
    kind = nodes.dtype.type
    for b in range(first, last):
        ahead = min(b + 1, last - 1)
        fetch(nodes, batch.users[ahead])
        fetch(nodes, batch.pos[ahead] + num_users)
        user, pos = batch.users[b], batch.pos[b] + num_users
        sq_pos = sq_difference(nodes, user, pos, kind(1), kind(1))
        least, hardest, imposters = kind(np.inf), batch.neg[b, 0] + num_users, 0
        for j in range(number):
            fetch(nodes, batch.neg[ahead, j] + num_users)
            sq_neg = sq_difference(nodes, user, batch.neg[b, j] + num_users, kind(1), kind(1))
            imposters += kind(recipe.margin) + sq_pos - sq_neg > 0
            if sq_neg < least:
                least, hardest = sq_neg, batch.neg[b, j] + num_users
        gap, weight = recipe.margin + sq_pos - least, recipe.weight
        if recipe.use_rank_weight:
            rank = imposters * recipe.num_items / number
            weight *= math.log1p(math.floor(rank) if recipe.rank_floor else rank)
        out.places[b, 0], out.places[b, 1], out.places[b, 2] = user, pos, hardest
        out.values[b, 0] = weight * max(gap, 0.0)
        write_hinge(nodes, out.places, b, kind(2 * weight if gap >= 0 else 0), out.rows)
