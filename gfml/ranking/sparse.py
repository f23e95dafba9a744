"""Sparse matrices of a fixed pattern, multiplied with dense ones, with gradient to both factors.

The product runs as in :mod:`gfml.ranking.graph`: a weighted embedding bag on the CPU, a CSR product elsewhere. The backward
pass is the product with the stored transpose; it is differentiable itself, so Hessian products work.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.ranking.graph import csr_rows_times_dense, csr_times_dense

# Entries whose rows are gathered at a time for their dot products: on the CPU a block stays in the cache.
ENTRIES_PER_BLOCK = {"cpu": 1 << 11, "other": 1 << 18}


class SparseMatrix(nn.Module):
    """A sparse [R, C] matrix whose entries may be replaced, e.g. by learned weights; called with a dense one.

    Made of non-persistent buffers: it follows the module it belongs to from device to device and enters no checkpoint.
    rows, columns: int64 [nnz], in any order; entries of one place add up. values: [nnz], in the given order.
    ``order`` [nnz] says which given entry stands where: ``values = given[order]``.
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        # A stable sort keeps the columns of a row in the order given, so sums are reproducible.
        order = rows.argsort(stable=True)
        rows, columns = rows[order], columns[order]
        to_transpose = columns.argsort(stable=True)
        small = max(len(rows), *shape) < 2**31
        index = torch.int32 if small else torch.int64
        self.order: Tensor
        self._keep("order", order)
        self._keep("row_of", rows.to(index))
        self._keep("indices", columns.to(index))
        self._keep("indptr", _starts(rows, shape[0]).to(index))
        self._keep("to_transpose", to_transpose)
        self._keep("transposed_indices", rows[to_transpose].to(index))
        self._keep("transposed_indptr", _starts(columns, shape[1]).to(index))
        self._keep("values", values[order])

    @classmethod
    def from_scipy(cls, matrix: sp.sparray, dtype: torch.dtype | None = None) -> SparseMatrix:
        """The same matrix with values in ``dtype``, by default torch's default type."""
        entries = sp.coo_array(matrix)
        rows, columns = (torch.from_numpy(part.astype(np.int64)) for part in entries.coords)
        values = torch.from_numpy(entries.data.astype(np.float64)).to(dtype or torch.get_default_dtype())
        return cls(rows, columns, values, entries.shape)

    @property
    def num_entries(self) -> int:
        return self.indices.shape[0]

    def forward(self, dense: Tensor, values: Tensor | None = None) -> Tensor:
        """self @ dense: [C, D] -> [R, D]; ``values`` [nnz], in the stored order, take the place of its own."""
        return _Product.apply(self.values if values is None else values, dense, self, False)

    def at(self, rows: Tensor, dense: Tensor) -> Tensor:
        """Rows int64 [n] of self @ dense, which may repeat: [n, D]. On the CPU only they are computed; elsewhere the whole
        product costs less than learning how many entries they have."""
        return _Rows.apply(dense, rows, self) if dense.device.type == "cpu" else F.embedding(rows, self(dense))

    def transpose_times(self, dense: Tensor, values: Tensor | None = None) -> Tensor:
        """self^T @ dense: [R, D] -> [C, D]."""
        return _Product.apply(self.values if values is None else values, dense, self, True)

    def dots(self, left: Tensor, right: Tensor) -> Tensor:
        """left [R, D] . right [C, D] at the stored places only: [nnz] in the stored order; gradient to both."""
        return _Dots.apply(left, right, self)

    def row_softmax(self, values: Tensor) -> Tensor:
        """exp(values) over their sum within each row. Shape: [nnz] -> [nnz], in the stored order."""
        rows = self.row_of
        top = values.new_full((self.shape[0],), -torch.inf).scatter_reduce(0, rows.long(), values.detach(), "amax")
        exps = (values - top.index_select(0, rows)).exp()
        return exps / values.new_zeros(self.shape[0]).index_add(0, rows, exps).index_select(0, rows)

    def to_scipy(self) -> sp.csr_array:
        """The same entries on the CPU, float64."""
        parts = (part.detach().cpu().numpy() for part in (self.values.double(), self.indices, self.indptr))
        return sp.csr_array(tuple(parts), shape=self.shape)

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)


def _starts(sorted_or_not: Tensor, count: int) -> Tensor:
    """Where each of 0..count-1 would begin in the sorted list, and its end: int64 [count + 1]."""
    # Not bincount, which would wait on CUDA for the largest number.
    sizes = sorted_or_not.new_zeros(count + 1).index_add_(0, sorted_or_not + 1, torch.ones_like(sorted_or_not))
    return sizes.cumsum(0)


class _Product(torch.autograd.Function):
    """A(values) @ dense, or its transpose; linear in both factors."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, matrix: SparseMatrix, transposed: bool) -> Tensor:
        ctx.save_for_backward(values, dense)
        ctx.matrix, ctx.transposed = matrix, transposed
        if transposed:
            return csr_times_dense(
                matrix.transposed_indptr, matrix.transposed_indices, values.index_select(0, matrix.to_transpose), dense
            )
        return csr_times_dense(matrix.indptr, matrix.indices, values, dense)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, dense = ctx.saved_tensors
        matrix: SparseMatrix = ctx.matrix
        to_values = to_dense = None
        if ctx.needs_input_grad[0]:
            to_values = _Dots.apply(*((dense, grad) if ctx.transposed else (grad, dense)), matrix)
        if ctx.needs_input_grad[1]:
            to_dense = _Product.apply(values, grad, matrix, not ctx.transposed)
        return to_values, to_dense, None, None


class _Rows(torch.autograd.Function):
    """Rows of A @ dense."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, rows: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.matrix = matrix
        return csr_rows_times_dense(matrix.indptr, matrix.indices, matrix.values, rows, dense)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        everywhere = grad.new_zeros(ctx.matrix.shape[0], grad.shape[1]).index_add(0, rows, grad)
        return ctx.matrix.transpose_times(everywhere), None, None


class _Dots(torch.autograd.Function):
    """Its gradient to the left is A(grad) @ right, to the right A(grad)^T @ left: two products, no scatter."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.matrix = matrix
        if left.device.type != "cpu" or left.dtype not in (torch.float32, torch.float64):
            return entry_dots(left, right, matrix.row_of, matrix.indices)
        # The library's own product at the places of a pattern: on the CPU several times faster than gathering.
        return torch.sparse.sampled_addmm(_pattern(matrix, left), left, right.T, beta=0.0).values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        to_left = ctx.matrix(right, grad) if ctx.needs_input_grad[0] else None
        return to_left, ctx.matrix.transpose_times(left, grad) if ctx.needs_input_grad[1] else None, None


def _pattern(matrix: SparseMatrix, like: Tensor) -> Tensor:
    """The matrix with zeros for entries, as the library's own kind of tensor."""
    with warnings.catch_warnings():
        # It says once that such tensors are in beta state, which a reader of a training's output need not know.
        warnings.simplefilter("ignore")
        zeros = like.new_zeros(matrix.num_entries)
        return torch.sparse_csr_tensor(matrix.indptr, matrix.indices, zeros, matrix.shape, check_invariants=False)


def entry_dots(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """left[rows] . right[columns], one number per pair: [nnz]; in blocks of pairs. No gradient."""
    size = ENTRIES_PER_BLOCK.get(left.device.type, ENTRIES_PER_BLOCK["other"])
    found = left.new_empty(len(rows))
    for out, row, column in zip(found.split(size), rows.split(size), columns.split(size)):
        torch.sum(left.index_select(0, row).mul_(right.index_select(0, column)), 1, out=out)
    return found
