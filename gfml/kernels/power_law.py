"""Attention by a power law of squared distances as Triton kernels: no [n, n] tensor is kept, forward or backward.

    weight_ij = softmax_j( scale column_j - beta log z_ij + 2 alpha q_i . k_j ),  z_ij = max(1, 1 + |q_i - k_j|^2)
    out_i = sum_j weight_ij v_j

z comes from the dot product and both norms, as does everything in the backward pass, which computes the weights anew from
the logarithm of their sums. With ds = weight (dout . v - dout . out) and w = ds beta / z:

    dq_i = 2 sum_j (w + alpha ds)_ij k_j - 2 q_i sum_j w_ij        dcolumn_j = scale sum_i ds_ij
    dk_j = 2 sum_i (w + alpha ds)_ij q_i - 2 k_j sum_i w_ij        dbeta = -sum_ij ds_ij log z_ij
    dv_j = sum_i weight_ij dout_i

Importing this module imports Triton: do it where it is used. Shape: q, k, v, out [B, H, n, d] and column [B, H, n], float32,
with any strides, also 0; beta a number, or float32 [H]. Sums are float32; half precisions are multiplied as they are, float32 in three TF32 parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Above so many tokens the backward pass is two kernels, one over keys and one over queries.
ONE_BLOCK = 128
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(base, stride_n, stride_d, rows, columns, n, d):
    mask = (rows[:, None] < n) & (columns[None, :] < d)
    return tl.load(base + rows[:, None] * stride_n + columns[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _norms(tile):
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def _forward(
    q, k, v, column, beta, out, lse, heads, n, d, scale, alpha,
    cb, ch, cn, qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, od,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. lse: log2 of the sums of weights, then means of log2 z, [2, B, H, n]."""
    pair = tl.program_id(1)
    b, h = pair // heads, pair % heads
    rows, columns = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    power = beta if FIXED else tl.load(beta + h)
    query = _tile(q + b * qb + h * qh, qn, qd, rows, columns, n, d)
    query_norm = _norms(query) + 1.0
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed, middle = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    for start in range(0, n, N):
        keys = start + tl.arange(0, N)
        key = _tile(k + b * kb + h * kh, kn, kd, keys, columns, n, d)
        value = _tile(v + b * vb + h * vh, vn, vd, keys, columns, n, d)
        dot = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        z = tl.maximum(query_norm[:, None] + _norms(key)[None, :] - 2.0 * dot, 1.0)
        bias = scale * tl.load(column + b * cb + h * ch + keys * cn, mask=keys < n, other=-float("inf"))
        logz = tl.log2(z)
        logit = bias[None, :] * LOG2E - power * logz + (2.0 * alpha * LOG2E) * dot
        larger = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp2(logit - larger[:, None])
        shrink = tl.exp2(top - larger)
        total = total * shrink + tl.sum(weight, 1)
        if not FIXED:
            middle = middle * shrink + tl.sum(weight * logz, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        top = larger
    mixed = mixed / total[:, None]
    mask = (rows[:, None] < n) & (columns[None, :] < d)
    tl.store(
        out + b * ob + h * oh + rows[:, None] * on + columns[None, :] * od, mixed.to(out.dtype.element_ty), mask=mask
    )
    tl.store(lse + pair * n + rows, top + tl.log2(total), mask=rows < n)
    if not FIXED:
        tl.store(lse + (tl.num_programs(1) + pair) * n + rows, middle / total, mask=rows < n)


@triton.jit
def _weights(query, key, query_norm, key_norm, bias, sums, power, alpha, PRECISION: tl.constexpr):
    """Weights of a tile and 1 + squared distances, as the forward pass had them."""
    dot = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    z = tl.maximum(query_norm[:, None] + key_norm[None, :] - 2.0 * dot, 1.0)
    logz = tl.log2(z)
    logit = bias[None, :] * LOG2E - power * logz + (2.0 * alpha * LOG2E) * dot
    return tl.exp2(logit - sums[:, None]), z, logz


@triton.jit
def _backward_keys(
    q, k, v, column, beta, out, lse, dout, dq, dk, dv, dcolumn, dbeta, heads, n, d, scale, alpha,
    cb, ch, cn, qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, od, gb, gh, gn, gd,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of one head: dk, dv, dcolumn, its share of dbeta, and dq where the block holds all keys.

    dq, dk, dv: [B, H, n, d], contiguous. dbeta: [B, H, blocks].
    """
    pair, block = tl.program_id(1), tl.program_id(0)
    b, h = pair // heads, pair % heads
    keys, columns = block * N + tl.arange(0, N), tl.arange(0, D)
    power = beta if FIXED else tl.load(beta + h)
    key = _tile(k + b * kb + h * kh, kn, kd, keys, columns, n, d)
    value = _tile(v + b * vb + h * vh, vn, vd, keys, columns, n, d)
    key_norm = _norms(key)
    bias = scale * tl.load(column + b * cb + h * ch + keys * cn, mask=keys < n, other=-float("inf"))
    to_key, to_value = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    to_column, pull, to_power = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for start in range(0, n, M):
        rows = start + tl.arange(0, M)
        query = _tile(q + b * qb + h * qh, qn, qd, rows, columns, n, d)
        above = _tile(dout + b * gb + h * gh, gn, gd, rows, columns, n, d)
        found = _tile(out + b * ob + h * oh, on, od, rows, columns, n, d)
        lean = tl.sum(above.to(tl.float32) * found.to(tl.float32), 1)
        sums = tl.load(lse + pair * n + rows, mask=rows < n, other=float("inf"))
        weight, z, logz = _weights(query, key, _norms(query) + 1.0, key_norm, bias, sums, power, alpha, PRECISION)
        to_value += tl.dot(tl.trans(weight.to(above.dtype)), above, input_precision=PRECISION)
        logit = weight * (tl.dot(above, tl.trans(value), input_precision=PRECISION) - lean[:, None])
        to_column += tl.sum(logit, 0)
        if not FIXED:
            # The rows of ds sum to 0 up to the rounding of out; taking the mean out leaves that without effect.
            middle = tl.load(lse + (tl.num_programs(1) + pair) * n + rows, mask=rows < n, other=0.0)
            to_power -= tl.sum(logit * (logz - middle[:, None]), 0)
        force = logit * (power / z)
        pull += tl.sum(force, 0)
        both = (2.0 * (force + alpha * logit)).to(query.dtype)
        to_key += tl.dot(tl.trans(both), query, input_precision=PRECISION)
        if WHOLE:
            to_query = tl.dot(both, key, input_precision=PRECISION) - 2.0 * tl.sum(force, 1)[:, None] * query.to(
                tl.float32
            )
            mask = (rows[:, None] < n) & (columns[None, :] < d)
            place = pair * n * d + rows[:, None] * d + columns[None, :]
            tl.store(dq + place, to_query.to(dq.dtype.element_ty), mask=mask)
    to_key -= 2.0 * pull[:, None] * key.to(tl.float32)
    mask = (keys[:, None] < n) & (columns[None, :] < d)
    place = pair * n * d + keys[:, None] * d + columns[None, :]
    tl.store(dk + place, to_key.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + place, to_value.to(dv.dtype.element_ty), mask=mask)
    tl.store(dcolumn + pair * n + keys, scale * to_column, mask=keys < n)
    if not FIXED:
        tl.store(dbeta + pair * tl.num_programs(0) + block, tl.sum(to_power, 0) * LN2)


@triton.jit
def _backward_queries(
    q, k, v, column, beta, out, lse, dout, dq, heads, n, d, scale, alpha,
    cb, ch, cn, qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, od, gb, gh, gn, gd,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    pair = tl.program_id(1)
    b, h = pair // heads, pair % heads
    rows, columns = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    power = beta if FIXED else tl.load(beta + h)
    query = _tile(q + b * qb + h * qh, qn, qd, rows, columns, n, d)
    above = _tile(dout + b * gb + h * gh, gn, gd, rows, columns, n, d)
    found = _tile(out + b * ob + h * oh, on, od, rows, columns, n, d)
    lean = tl.sum(above.to(tl.float32) * found.to(tl.float32), 1)
    sums = tl.load(lse + pair * n + rows, mask=rows < n, other=float("inf"))
    query_norm = _norms(query) + 1.0
    to_query, pull = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    for start in range(0, n, N):
        keys = start + tl.arange(0, N)
        key = _tile(k + b * kb + h * kh, kn, kd, keys, columns, n, d)
        value = _tile(v + b * vb + h * vh, vn, vd, keys, columns, n, d)
        bias = scale * tl.load(column + b * cb + h * ch + keys * cn, mask=keys < n, other=-float("inf"))
        weight, z, _ = _weights(query, key, query_norm, _norms(key), bias, sums, power, alpha, PRECISION)
        logit = weight * (tl.dot(above, tl.trans(value), input_precision=PRECISION) - lean[:, None])
        force = logit * (power / z)
        pull += tl.sum(force, 1)
        both = (2.0 * (force + alpha * logit)).to(query.dtype)
        to_query += tl.dot(both, key, input_precision=PRECISION)
    to_query -= 2.0 * pull[:, None] * query.to(tl.float32)
    mask = (rows[:, None] < n) & (columns[None, :] < d)
    tl.store(dq + pair * n * d + rows[:, None] * d + columns[None, :], to_query.to(dq.dtype.element_ty), mask=mask)


class Options(NamedTuple):
    """Numbers of a call: factor of the column, factor of the dot product."""

    scale: float = 1.0
    alpha: float = 0.0


def forward(
    q: Tensor, k: Tensor, v: Tensor, column: Tensor, beta: Tensor | float, options: Options
) -> tuple[Tensor, Tensor]:
    """(out [B, H, n, d], lying in memory as [B, n, H, d]; log2 of the sums of weights, and for a learned beta the means
    of log2 z: [1 or 2, B, H, n])."""
    batch, heads, n, d = q.shape
    out = torch.empty(batch, n, heads, d, dtype=v.dtype, device=v.device).transpose(1, 2)
    lse = torch.empty(1 + isinstance(beta, Tensor), batch, heads, n, dtype=torch.float32, device=q.device)
    tile = _tiles(n, q.dtype == torch.float32)[0]
    grid = (triton.cdiv(n, tile.queries), batch * heads)
    strides = tuple(step for part in (column, q, k, v, out) for step in part.stride())
    _forward[grid](q, k, v, column, beta, out, lse, heads, n, d, *options, *strides, **_settings(tile, q, beta))
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    column: Tensor,
    beta: Tensor | float,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dcolumn [B, H, n], dbeta [H], None for a number)."""
    batch, heads, n, d = q.shape
    dq, dk, dv = (torch.empty(batch, heads, n, d, dtype=part.dtype, device=part.device) for part in (q, k, v))
    _, over_keys, over_queries = _tiles(n, q.dtype == torch.float32)
    whole, fixed, blocks = n <= ONE_BLOCK, not isinstance(beta, Tensor), triton.cdiv(n, over_keys.keys)
    dcolumn = torch.empty_like(lse[0])
    dbeta = dcolumn if fixed else torch.empty(batch, heads, blocks, dtype=torch.float32, device=q.device)
    strides = tuple(step for part in (column, q, k, v, out, dout) for step in part.stride())
    inputs, numbers = (q, k, v, column, beta, out, lse, dout, dq), (heads, n, d, *options, *strides)
    settings = _settings(over_keys, q, beta)
    _backward_keys[(blocks, batch * heads)](*inputs, dk, dv, dcolumn, dbeta, *numbers, **settings, WHOLE=whole)
    if not whole:
        grid = (triton.cdiv(n, over_queries.queries), batch * heads)
        _backward_queries[grid](*inputs, *numbers, **_settings(over_queries, q, beta))
    return dq, dk, dv, dcolumn, None if fixed else dbeta.sum((0, 2))


class _Tile(NamedTuple):
    """Queries and keys of a tile, and warps: chosen so that float32 tiles of 32 coordinates stay in the registers."""

    queries: int
    keys: int
    warps: int


def _tiles(n: int, wide: bool) -> tuple[_Tile, _Tile, _Tile]:
    """Of the forward pass, of the backward pass over keys, and of that over queries."""
    if n > ONE_BLOCK:
        return _Tile(64, 64, 4), _Tile(32, 64, 4), _Tile(64, 32, 4)
    keys = max(16, triton.next_power_of_2(n))
    return _Tile(16, keys, 4), _Tile(16, keys, 8 if keys == ONE_BLOCK and wide else 4), _Tile(16, keys, 4)


def _settings(tile: _Tile, q: Tensor, beta: Tensor | float) -> dict[str, Any]:
    precise = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return {
        "M": tile.queries, "N": tile.keys, "D": max(16, triton.next_power_of_2(q.shape[-1])),
        "FIXED": not isinstance(beta, Tensor), "PRECISION": precise if q.dtype == torch.float32 else "tf32", "num_warps": tile.warps,
    }  # fmt: skip
