"""Rows of tables that a batch touches: their gradients, and optimizer steps that leave all other rows alone.

Threads share the rows of a table: each row belongs to one part, and what is added to a row is
added in the order of the batch. So nobody waits for anybody, and any number of parts gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gfml.base.compiled import compiled, prefetch

scalar = njit(error_model="numpy", nogil=True, forceinline=True)
# Rows are asked for so many occurrences before they are used, and rows of several tables so many rows before.
AHEAD, SOON = 12, 4


class Tables(NamedTuple):
    """Gradients of node vectors [U + I, D], users first, and of raw masses [U] and [I], empty where there are none."""

    nodes: NDArray[np.floating]
    user: NDArray[np.floating]
    item: NDArray[np.floating]


class Touched(NamedTuple):
    """Which rows a table's gradient has. stamps int32 [U + I]: the number of the last batch that touched a row;
    rows int64 [parts, M]: those of the last batch, of part p in rows[p, : counts[p]]; counts int64 [parts]."""

    stamps: NDArray[np.int32]
    rows: NDArray[np.int64]
    counts: NDArray[np.int64]


class Chains(NamedTuple):
    """The occurrences of a node in a batch, numbered row after row, as a list in their order. nodes int32 [U + I, 2]: the
    number of the last batch that touched a node, and the first occurrence; following int32 [M]: the next, or -1."""

    nodes: NDArray[np.int32]
    following: NDArray[np.int32]


@scalar
def fetch(table, row):
    """Bring a row into the cache while other work goes on."""
    for d in range(0, table.shape[1], 64 // table.itemsize):
        prefetch(table, row, d)


@scalar
def fetch_soon(tables, rows, n):
    """Bring the rows that come soon after rows[n] into the cache."""
    if n + SOON < len(rows):
        for table in tables:
            fetch(table, rows[n + SOON])


@scalar
def owner(r, parts):
    """The part that row r belongs to: a hash, since a division costs as much as the rest."""
    return ((r * 40503 & 0xFFFF) * parts) >> 16


@scalar
def set_part(part, parts, num_users, tables, places, rows, masses, scale, touched, now):
    """The rows of one part, see :func:`set_rows`."""
    nodes, stamps = tables.nodes, touched.stamps
    factor, number, ahead = nodes.dtype.type(scale), 0, AHEAD // places.shape[1]
    for b in range(len(places)):
        for k in range(places.shape[1]):
            if b + ahead < len(places) and owner(places[b + ahead, k], parts) == part:
                fetch(nodes, places[b + ahead, k])
            r = places[b, k]
            if parts > 1 and owner(r, parts) != part:
                continue
            if stamps[r] != now:
                stamps[r] = now
                touched.rows[part, number] = r
                number += 1
                clear_masses(r, num_users, tables)
                for d in range(nodes.shape[1]):
                    nodes[r, d] = factor * rows[b, k, d]
            else:
                for d in range(nodes.shape[1]):
                    nodes[r, d] += factor * rows[b, k, d]
            add_mass(r, num_users, tables, factor * masses[b, k])
    touched.counts[part] = number


@scalar
def add_mass(r, num_users, tables, mass):
    """Add to the mass's gradient at node r."""
    if r < num_users:
        if len(tables.user):
            tables.user[r] += mass
    elif len(tables.item):
        tables.item[r - num_users] += mass


@scalar
def clear_masses(r, num_users, tables):
    """The masses' gradients at node r become 0."""
    if r < num_users:
        if len(tables.user):
            tables.user[r] = 0
    elif len(tables.item):
        tables.item[r - num_users] = 0


@scalar
def clear_part(part, num_users, tables, old, now):
    """The rows that the last batch touched and this one did not become 0."""
    for i in range(old.counts[part]):
        r = old.rows[part, i]
        if old.stamps[r] != now:
            for d in range(tables.nodes.shape[1]):
                tables.nodes[r, d] = 0
            clear_masses(r, num_users, tables)


@compiled
def set_rows(part, num_users, tables, places, rows, masses, scale, old, touched, now):
    """The gradients become ``scale`` times the sums of rows [B, K, D] and masses [B, K] at places [B, K], 0 elsewhere:
    the rows of one part, of as many as ``touched`` has.

    They were 0 outside the rows of ``old``, the last batch's, which has as many parts and the same stamps, none of them
    ``now``. ``touched`` then tells the rows of this batch.
    """
    set_part(part, len(touched.counts), num_users, tables, places, rows, masses, scale, touched, now)
    clear_part(part, num_users, tables, old, now)


@compiled
def chain_rows(part, num_users, tables, places, masses, scale, old, touched, chains, now):
    """As :func:`set_rows` for places [M] and masses [M], without nodes: what they get is told by ``chains``."""
    parts, number = len(touched.counts), 0
    factor = masses.dtype.type(scale)
    for i in range(len(places) - 1, -1, -1):  # backwards, so that every list begins with the first
        if parts > 1 and owner(places[i], parts) != part:
            continue
        r = places[i]
        fetch(chains.nodes, places[max(i - AHEAD, 0)])
        known = chains.nodes[r, 0] == now
        chains.following[i] = chains.nodes[r, 1] if known else -1
        chains.nodes[r, 0], chains.nodes[r, 1] = now, i
        touched.rows[part, number] = r
        number += 0 if known else 1
    touched.counts[part] = number
    if len(tables.user) or len(tables.item):
        for n in range(old.counts[part]):
            clear_masses(old.rows[part, n], num_users, tables)
        for n in range(number):
            r = touched.rows[part, n]
            clear_masses(r, num_users, tables)
            i = chains.nodes[r, 1]
            while i >= 0:
                add_mass(r, num_users, tables, factor * masses[i])
                i = chains.following[i]


@compiled
def add_rows(num_users, tables, places, rows, masses, scale):
    """Add to gradients of any kind what :func:`set_rows` would set."""
    nodes, factor = tables.nodes, tables.nodes.dtype.type(scale)
    for b in range(len(places)):
        for k in range(places.shape[1]):
            r = places[b, k]
            for d in range(nodes.shape[1]):
                nodes[r, d] += factor * rows[b, k, d]
            add_mass(r, num_users, tables, factor * masses[b, k])


@scalar
def is_zero(table, r):
    """Whether row r is 0."""
    d = 0
    while d < table.shape[1] and table[r, d] == 0:
        d += 1
    return d == table.shape[1]


@scalar
def adamw_row(table, first, second, r, gradient, n, numbers):
    """AdamW at row r, whose gradient is row n of ``gradient``; see :func:`adamw_rows`."""
    keep, rate, old1, new1, old2, new2, root, eps = numbers
    for d in range(table.shape[1]):
        g = gradient[n, d]
        m = old1 * first[r, d] + new1 * g
        v = old2 * second[r, d] + new2 * g * g
        first[r, d], second[r, d] = m, v
        table[r, d] = keep * table[r, d] - rate * m / (np.sqrt(v) * root + eps)


@scalar
def adamw_numbers(table, keep, rate, beta1, beta2, root, eps):
    """What :func:`adamw_row` multiplies by, in the table's own precision."""
    kind = table.dtype.type
    return (kind(keep), kind(rate), kind(beta1), kind(1 - beta1), kind(beta2), kind(1 - beta2), kind(root), kind(eps))


@compiled
def adamw_chains(
    begin, end, dense, now, rows, chains, values, scale, table, first, second, keep, rate, beta1, beta2, root, eps
):  # fmt: skip
    """:func:`adamw_rows` with gradients that are summed here: ``scale`` times the rows of ``values`` [M, D] in a chain.

    At rows[begin:end], or at all rows begin .. end - 1 of the table, those without a chain too, if ``dense``.
    """
    numbers = adamw_numbers(table, keep, rate, beta1, beta2, root, eps)
    factor, total = table.dtype.type(scale), np.zeros((2, table.shape[1]), table.dtype)
    for n in range(begin, end):
        r, soon = (n, n + SOON) if dense else (rows[n], rows[min(n + SOON, end - 1)])
        if not dense:
            for one in (table, first, second):
                fetch(one, soon)
        if not dense or (soon < end and chains.nodes[soon, 0] == now):
            fetch(values, chains.nodes[soon, 1])
        if dense and chains.nodes[r, 0] != now:
            adamw_row(table, first, second, r, total, 1, numbers)
            continue
        sum_chain(chains, r, values, factor, total)
        if dense or not is_zero(total, 0):
            adamw_row(table, first, second, r, total, 0, numbers)


@scalar
def sum_chain(chains, r, values, factor, total):
    """total[0] becomes ``factor`` times the sum of the rows in the chain of r."""
    i = chains.nodes[r, 1]
    for d in range(values.shape[1]):
        total[0, d] = factor * values[i, d]
    i = chains.following[i]
    while i >= 0:
        for d in range(values.shape[1]):
            total[0, d] += factor * values[i, d]
        i = chains.following[i]


@compiled
def adamw_rows(rows, table, gradient, first, second, keep, rate, beta1, beta2, root, eps):
    """AdamW at ``rows`` of a table [N, D] and its moments; rows whose gradient is 0 are left out.

        row *= keep;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  row -= rate m / (sqrt(v) root + eps)

    keep = 1 - lr decay; rate = lr / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t).
    """
    numbers = adamw_numbers(table, keep, rate, beta1, beta2, root, eps)
    for n in range(len(rows)):
        fetch_soon((table, gradient, first, second), rows, n)
        if not is_zero(gradient, rows[n]):
            adamw_row(table, first, second, rows[n], gradient, rows[n], numbers)


@compiled
def adagrad_rows(rows, table, gradient, total, keep, rate, eps):
    """Adagrad at ``rows`` of a table [N, D] and its sums of squares; rows whose gradient is 0 are left out.

    row *= keep;  s += g^2;  row -= rate g / (sqrt(s) + eps)
    """
    kind = table.dtype.type
    keep, rate, eps = kind(keep), kind(rate), kind(eps)
    for n in range(len(rows)):
        fetch_soon((table, gradient, total), rows, n)
        r = rows[n]
        if is_zero(gradient, r):
            continue
        for d in range(table.shape[1]):
            g = gradient[r, d]
            s = total[r, d] + g * g
            total[r, d] = s
            table[r, d] = keep * table[r, d] - rate * g / (np.sqrt(s) + eps)
