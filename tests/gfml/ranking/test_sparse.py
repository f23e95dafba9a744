"""Sparse times dense against dense products, with gradients of every order."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.ranking import sparse
from gfml.ranking.sparse import SparseMatrix, entry_dots


def example(dtype=torch.float64):
    """5 x 4 with an empty row, an empty column, unordered entries and one place given twice."""
    rows, columns = torch.tensor([3, 0, 4, 0, 1, 3, 3]), torch.tensor([1, 3, 0, 1, 1, 0, 1])
    values = torch.tensor([0.5, -1.0, 2.0, 0.25, 3.0, 1.5, 4.0], dtype=dtype)
    dense = torch.zeros(5, 4, dtype=dtype).index_put_((rows, columns), values, accumulate=True)
    return SparseMatrix(rows, columns, values, (5, 4)), dense, values


@pytest.fixture
def right():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_products_equal_dense_ones(right):
    matrix, dense, _ = example()
    torch.testing.assert_close(matrix(right), dense @ right)
    left = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(matrix.transpose_times(left), dense.T @ left)


def test_order_says_where_the_given_entries_went(right):
    matrix, dense, values = example()
    assert torch.equal(matrix.values, values[matrix.order])
    torch.testing.assert_close(matrix(right, 2 * values[matrix.order]), 2 * dense @ right)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_to_both_factors_of_first_and_second_order(right, transposed):
    matrix, _, _ = example()
    other = torch.randn(5 if transposed else 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    product = matrix.transpose_times if transposed else matrix
    inputs = (other.requires_grad_(), matrix.values.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda d, v: product(d, v), inputs)
    assert torch.autograd.gradgradcheck(lambda d, v: product(d, v).square(), inputs)


@pytest.mark.parametrize("rows", [[3, 0, 3, 2], []])
def test_chosen_rows_of_a_product_and_their_gradients(right, rows):
    matrix, dense, _ = example()
    chosen = torch.tensor(rows, dtype=torch.int64)
    torch.testing.assert_close(matrix.at(chosen, right), (dense @ right)[chosen])
    assert torch.autograd.gradcheck(lambda d: matrix.at(chosen, d), right.requires_grad_())
    assert not rows or torch.autograd.gradgradcheck(lambda d: matrix.at(chosen, d).square(), right)


def test_dots_at_the_stored_places_with_gradients():
    matrix, _, _ = example()
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in matrix.shape)
    wanted = (left @ right.T)[matrix.row_of.long(), matrix.indices.long()]
    torch.testing.assert_close(matrix.dots(left, right), wanted)
    assert torch.autograd.gradcheck(matrix.dots, (left, right))
    assert torch.autograd.gradgradcheck(lambda a, b: matrix.dots(a, b).square(), (left, right))


def test_softmax_within_each_row():
    matrix, _, _ = example()
    values = torch.tensor([700.0, 3.0, -1.0, 0.5, 2.0, 2.0, 9.0], dtype=torch.float64)
    found, rows = matrix.row_softmax(values), matrix.row_of.tolist()
    for row in set(rows):
        places = [n for n, r in enumerate(rows) if r == row]
        torch.testing.assert_close(found[places], values[places].softmax(0))
    assert torch.autograd.gradcheck(matrix.row_softmax, (values / 100).requires_grad_())


def test_entry_gradients_in_blocks_equal_the_whole(monkeypatch):
    left, right = torch.randn(6, 3), torch.randn(7, 3)
    rows, columns = torch.randint(6, (50,)), torch.randint(7, (50,))
    whole = entry_dots(left, right, rows, columns)
    monkeypatch.setitem(sparse.ENTRIES_PER_BLOCK, "cpu", 8)
    assert torch.equal(entry_dots(left, right, rows, columns), whole)
    torch.testing.assert_close(whole, (left @ right.T)[rows, columns])


def test_scipy_and_back():
    found = sp.random_array((9, 6), density=0.3, rng=np.random.default_rng(0), format="csr")
    matrix = SparseMatrix.from_scipy(found, torch.float64)
    assert (abs(matrix.to_scipy() - found)).sum() == 0 and matrix.num_entries == found.nnz
    assert SparseMatrix.from_scipy(found).values.dtype == torch.get_default_dtype()


def test_it_moves_with_its_module_and_stays_out_of_checkpoints():
    module = torch.nn.Module()
    module.graph = example(torch.float32)[0]
    assert module.state_dict() == {}
    assert module.double().graph.values.dtype == torch.float64 and module.graph.indices.dtype == torch.int32
