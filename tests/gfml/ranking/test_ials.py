from __future__ import annotations

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.data.synthetic import generate
from gfml.ranking import ials as module
from gfml.ranking.ials import IALS, ials


@pytest.fixture(scope="module")
def data() -> Interactions:
    return generate(80, 50, 900, seed=3)


def objective_by_loops(train: np.ndarray, user: np.ndarray, item: np.ndarray, l2: float, alpha0: float, nu: float):
    total = 0.0
    for u in range(len(user)):
        for i in range(len(item)):
            score = user[u] @ item[i]
            total += alpha0 * score**2 + (train[u, i] * (1 - score) ** 2)
        total += l2 * (train[u].sum() + alpha0 * len(item)) ** nu * (user[u] @ user[u])
    for i in range(len(item)):
        total += l2 * (train[:, i].sum() + alpha0 * len(user)) ** nu * (item[i] @ item[i])
    return total


def solve_by_loops(train: np.ndarray, item: np.ndarray, l2: float, alpha0: float, nu: float) -> np.ndarray:
    """The minimum over every user's vector, the items fixed."""
    found = []
    for row in train:
        matrix = alpha0 * sum(np.outer(h, h) for h in item)
        matrix = matrix + l2 * (row.sum() + alpha0 * len(item)) ** nu * np.eye(item.shape[1])
        right = np.zeros(item.shape[1])
        for i in np.flatnonzero(row):
            matrix = matrix + np.outer(item[i], item[i])
            right = right + item[i]
        found.append(np.linalg.solve(matrix, right))
    return np.array(found)


@pytest.mark.parametrize("l2, alpha0, nu", [(0.02, 0.05, 1.0), (1.5, 0.3, 0.0), (0.4, 0.01, 0.5)])
def test_objective_and_new_users_equal_the_loops(data, l2, alpha0, nu):
    model = IALS(data.train, 7, l2=l2, alpha0=alpha0, nu=nu)
    for _ in range(3):
        model.epoch()
    train, item = data.train.toarray().astype(float), model.item.double().numpy()
    expected = objective_by_loops(train, model.user.double().numpy(), item, l2, alpha0, nu)
    assert model.objective() == pytest.approx(expected, rel=1e-6)
    solved = solve_by_loops(train, item, l2, alpha0, nu)
    np.testing.assert_allclose(model.fold_in(data.train).numpy(), solved, rtol=1e-4, atol=1e-6)
    assert objective_by_loops(train, solved, item, l2, alpha0, nu) <= expected


def test_every_half_of_an_epoch_lowers_the_objective_to_where_both_sides_are_solved(data):
    model = IALS(data.train, 6, l2=0.05, alpha0=0.1)
    values = [model.objective()]
    for _ in range(150):
        model.epoch()
        values.append(model.objective())
    assert all(b <= a * (1 + 1e-6) for a, b in zip(values[:-1], values[1:], strict=True))
    assert values[-1] < 0.9 * values[1]
    solved = solve_by_loops(data.train.toarray().astype(float), model.item.double().numpy(), 0.05, 0.1, 1.0)
    np.testing.assert_allclose(model.user.numpy(), solved, atol=5e-3)


def test_the_same_tables_for_any_number_of_threads(data, threads, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "GRAM_ROWS", 16)
    found = []
    for number in (1, 2, 4):
        threads(number)
        found.append(ials(data, 0.03, 0.05, dim=8, epochs=3))
    for other in found[1:]:
        assert torch.equal(found[0].user, other.user) and torch.equal(found[0].item, other.item)
    assert not torch.equal(found[0].item, ials(data, 0.03, 0.05, dim=8, epochs=3, seed=1).item)


def test_rows_without_a_pair_are_zero():
    train = csr_from_pairs(np.array([0, 0, 2]), np.array([0, 1, 1]), 4, 5)
    model = IALS(train, 3, l2=0.1, alpha0=0.1)
    model.epoch()
    assert not model.user[[1, 3]].any() and not model.item[[2, 3, 4]].any()
    assert model.user[[0, 2]].any(1).all() and model.item[[0, 1]].any(1).all()
    assert not model.fold_in(train[[1]]).any()


def test_trained_users_and_folded_ones_rank_alike(data):
    """After many epochs a user's own vector is the one a stranger with the same history gets."""
    model = IALS(data.train, 8, l2=0.02, alpha0=0.1)
    for _ in range(60):
        model.epoch()
    folded = model.fold_in(data.train[[4, 9]])
    torch.testing.assert_close(folded, model.user[[4, 9]], rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("wrong", [{"l2": 0.0}, {"alpha0": -1.0}, {"alpha0": float("nan")}, {"nu": float("inf")}])
def test_settings_that_make_no_sense(data, wrong):
    with pytest.raises(UserError, match=f"found {next(iter(wrong))}="):
        IALS(data.train, **{"l2": 0.1, "alpha0": 0.1, **wrong})
    with pytest.raises(ValueError, match="histories of 3 items"):
        IALS(data.train, l2=0.1, alpha0=0.1).fold_in(csr_from_pairs(np.array([0]), np.array([0]), 1, 3))
