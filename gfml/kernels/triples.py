"""Pair losses of tables and their gradients as Triton kernels: what :mod:`gfml.kernels.pairs` does, on a GPU.

One program takes one pair with its negatives, reads their rows once and writes the gradient of each occurrence; the
formulas are those of the module for CPUs, for dot products and l2. Occurrences are then sorted by row, and the program at the
first one of a row adds them up in the order of the batch: no atomics, so a run repeats itself bit for bit. All sizes are
those of the batch: nothing waits for the device.

Importing this module imports Triton: do it where it is used. Tables are float32 and contiguous; sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a pair, as in gfml.kernels.pairs: dot, gravity, emb_reg, mass_reg, log_lamb.
PARTS = 5


class Gradients(NamedTuple):
    """As :class:`gfml.kernels.pairs.Gradients`: rows [B, 2 + W, D], places and masses [B, 2 + W], values [B, 5]."""

    rows: Tensor
    places: Tensor
    masses: Tensor
    values: Tensor


@triton.jit
def _slope_and_softplus(z):
    """1 / (1 + e^-z) and log(1 + e^z), also where 1 + e^z is 1."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    tail = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(z >= 0, 1.0, e) / u, tl.maximum(z, 0.0) + tail


@triton.jit
def _log_mass(raw, PARAM: tl.constexpr):
    """M'(a) and M(a): softplus, relu or exp."""
    if PARAM == 0:
        slope, value = _slope_and_softplus(raw)
    elif PARAM == 1:
        clipped = tl.maximum(raw, 0.0)
        slope, value = tl.where(raw >= 0, 1.0 / (1.0 + clipped), 0.0), tl.log(1.0 + clipped)
    else:
        slope, value = raw * 0.0 + 1.0, raw
    return slope, value


@triton.jit
def _row(nodes, place, columns, d, NORM: tl.constexpr):
    """A row, its squared norm, and its scale."""
    row = tl.load(nodes + place * d + columns, mask=columns < d, other=0.0)
    square = tl.sum(row * row)
    scale = 1.0 / tl.sqrt(tl.maximum(square, 1e-24)) if NORM else square * 0.0 + 1.0
    return row, square, scale


@triton.jit
def _through_unit(slope, unit, square, scale, NORM: tl.constexpr):
    """The slope by a unit row becomes that by the row."""
    if NORM:
        along = tl.where(square >= 1e-24, tl.sum(slope * unit), 0.0)
        slope = scale * (slope - along * unit)
    return slope


@triton.jit
def _mass(table, place, zero, PARAM: tl.constexpr, HAS: tl.constexpr):
    """A raw mass, M'(a) and M(a); zeros where there are no masses."""
    raw, slope, value = zero, zero, zero
    if HAS:
        raw = tl.load(table + place)
        slope, value = _log_mass(raw, PARAM)
    return raw, slope, value


@triton.jit
def _loss(KIND: tl.constexpr, score, first, share, weight):
    """Loss of a negative, BPR (1), cross-entropy (2) or none (0), and its slope by the negative's score."""
    value, by_score = score * 0.0, score * 0.0
    if KIND:
        slope, value = _slope_and_softplus(score - first if KIND == 1 else score)
        share = share if KIND == 1 else 0.5 * share
        value, by_score = share * value, weight * share * slope
    return value, by_score


@triton.jit
def _loss_of_positive(KIND: tl.constexpr, first, by_negatives, weight):
    """What the positive adds to the loss, and the slope by its score."""
    value, by_first = first * 0.0, -by_negatives
    if KIND == 2:
        slope, value = _slope_and_softplus(-first)
        value, by_first = 0.5 * value, -0.5 * weight * slope
    return value, by_first


@triton.jit
def _item(
    nodes, masses, place, num_users, columns, d, x, unit_x, mass_x, power, eps,
    NORM: tl.constexpr, PRODUCT: tl.constexpr, PARAM: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """Row, squared norm, scale, raw mass, slope of mu by it and by the user's log-mass, dot product, gravity score, the
    score's slope by the unit row, lambda log(Q + eps)."""
    y, square, scale = _row(nodes, place, columns, d, NORM)
    raw, slope, mass = _mass(masses, place - num_users, square * 0.0, PARAM, ITEM)
    gap = unit_x - scale * y
    whole = tl.sum(gap * gap) + eps
    pull = power * tl.log(whole)
    score = (mass_x * mass if PRODUCT else mass_x + mass) - pull
    by_raw, by_mass_x = slope * (mass_x if PRODUCT else 1.0), mass if PRODUCT else square * 0.0 + 1.0
    return y, square, scale, raw, by_raw, by_mass_x, tl.sum(x * y), score, (2.0 * power / whole) * gap, pull


@triton.jit
def _write(
    row, mass, x, y, square, scale, raw, by_raw, toward, by_dot, by_score, decay, mass_decay, columns, d,
    NORM: tl.constexpr, GRAVITY: tl.constexpr,
):  # fmt: skip
    """Gradients of an item's row and raw mass."""
    own = decay * y + by_dot * x
    if GRAVITY:
        own += _through_unit(by_score * toward, scale * y, square, scale, NORM)
        tl.store(mass, by_score * by_raw + mass_decay * raw)
    tl.store(row + columns, own, mask=columns < d)


@triton.jit
def _pairs(
    nodes, user, item, lamb, places, rows, masses, values, num_users, width, d,
    dot_weight, gravity_weight, eps, decay, mass_decay,
    D: tl.constexpr, DOT: tl.constexpr, GRAVITY: tl.constexpr, NORM: tl.constexpr, PRODUCT: tl.constexpr,
    PARAM: tl.constexpr, USER: tl.constexpr, ITEM: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One pair: gradients of its rows and raw masses, and its share of the parts of the loss."""
    b, columns = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    power = lamb if FIXED else tl.load(lamb)
    places += b * (width + 2)
    rows += b * (width + 2) * d
    masses += b * (width + 2)
    x, square_x, scale_x = _row(nodes, tl.load(places), columns, d, NORM)
    unit_x, zero, share = scale_x * x, square_x * 0.0, 1.0 / width
    raw_x, slope_x, mass_x = _mass(user, tl.load(places), zero, PARAM, USER)
    y, square_y, scale_y, raw_y, by_raw_y, by_mass, first_dot, first_score, toward_y, pull_y = _item(
        nodes, item, tl.load(places + 1), num_users, columns, d, x, unit_x,
        mass_x, power, eps, NORM, PRODUCT, PARAM, ITEM,
    )  # fmt: skip
    to_x, force = decay * x, tl.zeros([D], tl.float32)
    dot_value, by_dots, value, by_scores, by_lamb, by_user = zero, zero, zero, zero, zero, zero
    squares, half = square_x + square_y, 0.5 * (raw_x * raw_x + raw_y * raw_y)
    for j in range(2, width + 2):
        z, square, scale, raw, by_raw, by_mass_x, dot, score, toward, pull = _item(
            nodes, item, tl.load(places + j), num_users, columns, d, x, unit_x,
            mass_x, power, eps, NORM, PRODUCT, PARAM, ITEM,
        )  # fmt: skip
        part, by_dot = _loss(DOT, dot, first_dot, share, dot_weight)
        other, by_score = _loss(GRAVITY, score, first_score, share, gravity_weight)
        _write(
            rows + j * d, masses + j, x, z, square, scale, raw, by_raw, toward, by_dot, by_score, share * decay,
            share * mass_decay, columns, d, NORM, GRAVITY,
        )  # fmt: skip
        dot_value, value, by_dots, by_scores = dot_value + part, value + other, by_dots + by_dot, by_scores + by_score
        squares, half = squares + share * square, half + 0.5 * share * raw * raw
        to_x += by_dot * z
        if GRAVITY:
            force -= by_score * toward
            by_lamb, by_user = by_lamb - by_score * pull, by_user + by_score * by_mass_x
    part, by_dot = _loss_of_positive(DOT, first_dot, by_dots, dot_weight)
    other, by_score = _loss_of_positive(GRAVITY, first_score, by_scores, gravity_weight)
    _write(
        rows + d, masses + 1, x, y, square_y, scale_y, raw_y, by_raw_y, toward_y, by_dot, by_score, decay, mass_decay, columns, d,
        NORM, GRAVITY,
    )  # fmt: skip
    to_x += by_dot * y
    if GRAVITY:
        to_x += _through_unit(force - by_score * toward_y, unit_x, square_x, scale_x, NORM)
        tl.store(masses, slope_x * (by_user + by_score * by_mass) + mass_decay * raw_x)
    tl.store(rows + columns, to_x, mask=columns < d)
    values += b * 5
    tl.store(values, dot_value + part)
    tl.store(values + 1, value + other)
    tl.store(values + 2, 0.5 * squares)
    tl.store(values + 3, half)
    tl.store(values + 4, by_lamb - by_score * pull_y)


@triton.jit
def _sum_rows(
    places, ends, order, rows, masses, scale, nodes, user, item, num_users, d,
    D: tl.constexpr, USER: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """At the first occurrence of a row, the sum of all."""
    i, columns = tl.program_id(0), tl.arange(0, D)
    place = tl.load(places + i)
    if tl.load(places + i - 1, mask=i > 0, other=-1) != place:
        total, mass = tl.zeros([D], tl.float32), tl.load(scale) * 0.0
        for j in range(i, tl.load(ends + i)):
            occurrence = tl.load(order + j)
            total += tl.load(rows + occurrence * d + columns, mask=columns < d, other=0.0)
            if USER or ITEM:
                mass += tl.load(masses + occurrence)
        factor = tl.load(scale)
        tl.store(nodes + place * d + columns, factor * total, mask=columns < d)
        if USER:
            tl.store(user + place, factor * mass, mask=place < num_users)
        if ITEM:
            tl.store(item + place - num_users, factor * mass, mask=place >= num_users)


@triton.jit
def _adamw(
    places, table, gradient, first, second, rate, root, low, high, d, keep, old1, new1, old2, new2, eps, D: tl.constexpr
):
    """AdamW at the first occurrence of a row, if its gradient is not 0."""
    i, columns = tl.program_id(0), tl.arange(0, D)
    place = tl.load(places + i)
    if (tl.load(places + i - 1, mask=i > 0, other=-1) != place) & (place >= low) & (place < high):
        at, inside = (place - low) * d + columns, columns < d
        g = tl.load(gradient + at, mask=inside, other=0.0)
        if tl.sum((g != 0).to(tl.int32)) > 0:
            m = old1 * tl.load(first + at, mask=inside, other=0.0) + new1 * g
            v = old2 * tl.load(second + at, mask=inside, other=0.0) + new2 * g * g
            tl.store(first + at, m, mask=inside)
            tl.store(second + at, v, mask=inside)
            move = tl.load(rate).to(tl.float32) * m / (tl.sqrt(v) * tl.load(root).to(tl.float32) + eps)
            row = tl.load(table + at, mask=inside, other=0.0)
            tl.store(table + at, keep * row - move, mask=inside)


def pair_gradients(tables: Sequence[Tensor | None], places: Tensor, num_users: int, recipe: Any) -> Gradients:
    """Gradients and parts of the loss of the pairs at ``places`` int64 [B, 2 + W]: user, positive and negatives as nodes.

    tables: nodes [U + I, D] and raw masses [U] and [I], None where there are none. recipe: a :class:`gfml.kernels.pairs.Recipe` with distance l2; ``lamb`` a number or a float32 tensor of one.
    """
    nodes, user, item = cast(tuple[Tensor, Tensor | None, Tensor | None], tables)
    size, count, d = *places.shape, nodes.shape[1]
    out = Gradients(nodes.new_empty(size, count, d), places, nodes.new_zeros(size, count), nodes.new_empty(size, PARTS))
    _pairs[(size,)](
        nodes, nodes if user is None else user, nodes if item is None else item, recipe.lamb, places, out.rows, out.masses,
        out.values, num_users, count - 2, d, recipe.dot_weight, recipe.gravity_weight, recipe.eps, recipe.decay,
        recipe.mass_decay, DOT=recipe.dot, GRAVITY=recipe.gravity, NORM=recipe.norm, PRODUCT=recipe.product,
        PARAM=recipe.param, USER=user is not None, ITEM=item is not None, FIXED=not isinstance(recipe.lamb, Tensor),
        **_width(d),
    )  # fmt: skip
    return out


def sum_rows(out: Gradients, scale: Tensor, num_users: int, tables: Sequence[Tensor | None]) -> Tensor:
    """Write ``scale`` (a 0-d tensor) times the sums of each row's occurrences into the tables' gradients, ``tables`` as
    above, at the rows of the batch; the nodes, sorted, with repeats."""
    nodes, user, item = cast(tuple[Tensor, Tensor | None, Tensor | None], tables)
    places, order = out.places.view(-1).sort(stable=True)
    ends, d = torch.searchsorted(places, places, right=True), nodes.shape[1]
    _sum_rows[(len(places),)](
        places, ends, order, out.rows, out.masses, scale, nodes, nodes if user is None else user,
        nodes if item is None else item, num_users, d, USER=user is not None, ITEM=item is not None, **_width(d),
    )  # fmt: skip
    return places


def adamw(places: Tensor, span: tuple[int, int], tensors: list[Tensor], numbers: tuple) -> None:
    """:func:`gfml.kernels.rows.adamw_rows` at the rows of a table that holds the nodes span[0] .. span[1] - 1.

    places: nodes, sorted, with repeats. tensors: table, gradient and both moments, [N, D] or [N]. numbers: as there, those
    that count steps as 0-d tensors of the device, which recorded steps go on reading.
    """
    keep, rate, beta1, beta2, root, eps = numbers
    rate, root = (torch.as_tensor(number, device=places.device) for number in (rate, root))
    d = tensors[0].numel() // len(tensors[0])
    _adamw[(len(places),)](
        places, *tensors, rate, root, *span, d, keep, beta1, 1 - beta1, beta2, 1 - beta2, eps, **_width(d)
    )


def _width(d: int) -> dict[str, int]:
    wide = triton.next_power_of_2(d)
    return {"D": wide, "num_warps": max(1, min(4, wide // 64))}
