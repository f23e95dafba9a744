"""Inner loops of :mod:`mirror_grad.parts.refine` as machine code. Importing this module imports numba: import it late."""

from __future__ import annotations

import numpy as np

from gfml.base.compiled import compiled

Array = np.ndarray


@compiled(any_order=True)
def refine(first: int, end: int, smallest: float, layer: Array, free: Array, out: Array) -> None:
    """out_n = cos(z_n, e_n) z_n for rows first, ..., end - 1; norms are at least ``smallest``. Shape: [N, D] each."""
    width, zero = layer.shape[1], layer.dtype.type(0)
    least = layer.dtype.type(smallest)
    for n in range(first, end):
        z, e, row = layer[n], free[n], out[n]
        zz, ee, ze = zero, zero, zero
        for c in range(width):
            zz += z[c] * z[c]
            ee += e[c] * e[c]
            ze += z[c] * e[c]
        cos = ze / (max(np.sqrt(zz), least) * max(np.sqrt(ee), least))
        for c in range(width):
            row[c] = cos * z[c]


@compiled(any_order=True)
def refine_backward(
    first: int, end: int, smallest: float, layer: Array, free: Array, grad: Array, to_layer: Array, to_free: Array
) -> None:
    """Gradients of :func:`refine` for the gradient g of its output.

    With s = g . z:  g cos + s (e / (|z| |e|) - cos z / |z|^2)  and  s (z / (|z| |e|) - cos e / |e|^2).
    """
    width, zero = layer.shape[1], layer.dtype.type(0)
    least = layer.dtype.type(smallest)
    for n in range(first, end):
        z, e, g = layer[n], free[n], grad[n]
        to_z, to_e = to_layer[n], to_free[n]
        zz, ee, ze, s = zero, zero, zero, zero
        for c in range(width):
            zz += z[c] * z[c]
            ee += e[c] * e[c]
            ze += z[c] * e[c]
            s += g[c] * z[c]
        of_z, of_e = max(np.sqrt(zz), least), max(np.sqrt(ee), least)
        cos = ze / (of_z * of_e)
        both, own, other = s / (of_z * of_e), s * cos / (of_z * of_z), s * cos / (of_e * of_e)
        for c in range(width):
            to_z[c] = cos * g[c] + both * e[c] - own * z[c]
            to_e[c] = both * z[c] - other * e[c]
