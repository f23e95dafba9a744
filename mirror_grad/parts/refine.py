"""LayerGCN's refinement of a layer by its likeness to the free vectors, with its gradient by formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Norms are at least this, so that a row of zeros gives zeros.
EPS = 1e-8
# Rows that are worth a thread of their own.
ROWS_PER_THREAD = 4096


def refined(layer: Tensor, free: Tensor) -> Tensor:
    """cos(z_n, e_n) z_n: each row of a layer as far as it is like the free vector. Shape: layer z, free e [N, D] -> [N, D].

    0 where either row is 0. On the CPU one compiled pass over the rows forward and one backward, ten times cheaper than
    the library's cosine; elsewhere, in half precision and for second derivatives tensor operations. Equal up to rounding.
    """
    return _Refined.apply(layer, free)


class _Refined(torch.autograd.Function):
    """The backward by tensors is made of the inputs alone, so that it can be differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, layer: Tensor, free: Tensor) -> Tensor:
        ctx.save_for_backward(layer, free)
        if _by_rows(layer, free):
            return _in_rows("refine", layer, free, results=1)[0]
        return layer * _cosines(layer, free)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        layer, free = ctx.saved_tensors
        if _by_rows(layer, free, grad) and not torch.is_grad_enabled():
            to_layer, to_free = _in_rows("refine_backward", layer, free, grad, results=2)
            return to_layer, to_free
        cos, of_layer, of_free = _cosines(layer, free)
        # With s = g . z: dcos/dz = e / (|z| |e|) - cos z / |z|^2, and the same for e.
        s = (grad * layer).sum(1, keepdim=True)
        both, s = s * of_layer * of_free, s * cos
        return grad * cos + free * both - layer * (s * of_layer**2), layer * both - free * (s * of_free**2)


def _cosines(layer: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos(z_n, e_n), 1 / |z_n| and 1 / |e_n|: [N, 1] each."""
    of_layer, of_free = (
        torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(EPS).reciprocal() for x in (layer, free)
    )
    return (layer * free).sum(1, keepdim=True) * of_layer * of_free, of_layer, of_free


def _by_rows(*tables: Tensor) -> bool:
    """Whether compiled loops can read these."""
    return not torch.compiler.is_compiling() and all(
        x.device.type == "cpu" and x.dtype == tables[0].dtype and x.dtype in (torch.float32, torch.float64)
        for x in tables
    )


def _in_rows(name: str, *tables: Tensor, results: int) -> list[Tensor]:
    """The results of a compiled loop over all rows, which are shared out among threads."""
    from gfml.base.compiled import in_threads
    from mirror_grad.parts import refine_rows

    tables = tuple(x.detach().contiguous() for x in tables)
    made, rows = [torch.empty_like(tables[0]) for _ in range(results)], len(tables[0])
    loop, arrays = getattr(refine_rows, name), [x.numpy() for x in (*tables, *made)]
    parts = max(1, min(torch.get_num_threads(), rows // ROWS_PER_THREAD))
    ends = [rows * part // parts for part in range(parts + 1)]
    if parts == 1:
        loop(0, rows, EPS, *arrays)
    else:
        in_threads(lambda part: loop(ends[part], ends[part + 1], EPS, *arrays), range(parts))
    return made
