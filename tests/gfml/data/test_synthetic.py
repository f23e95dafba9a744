"""The generator: what it promises about sizes, tails, masses, and the distribution it draws from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from gfml.base.errors import UserError
from gfml.data import synthetic


@pytest.fixture(scope="module")
def demo():
    return synthetic.generate()


def test_sizes_and_disjoint_parts(demo):
    assert demo.train.shape == (1500, 1000)
    assert demo.train.nnz + demo.test.nnz == 45_000 and demo.valid.nnz == 0
    assert (demo.train.multiply(demo.test)).nnz == 0
    whole = demo.user_activity + np.diff(demo.test.indptr)
    assert whole.min() >= 3 and whole.max() <= 500
    assert 0.19 < demo.test.nnz / 45_000 < 0.21


def test_same_arguments_same_data(demo):
    again = synthetic.generate()
    assert again.fingerprint == demo.fingerprint
    assert np.array_equal(again.true_item_mass, demo.true_item_mass)
    assert synthetic.generate(seed=2021).fingerprint != demo.fingerprint


def test_popularity_has_a_tail_and_follows_mass_but_not_only(demo):
    popularity = np.sort(demo.item_popularity)[::-1]
    assert popularity[:200].sum() > 0.5 * popularity.sum()
    seen = demo.item_popularity > 0
    rho = spearmanr(demo.true_item_mass[seen], demo.item_popularity[seen])[0]
    assert 0.85 < rho < 0.97
    activity = spearmanr(demo.true_user_mass, demo.user_activity)[0]
    assert activity > 0.97


def test_tail_exponent_shapes_popularity():
    share = {}
    for exponent in (0.0, 0.7, 1.4):
        data = synthetic.generate(400, 300, 6000, tail_exponent=exponent)
        popularity = np.sort(data.item_popularity)[::-1]
        share[exponent] = popularity[:60].sum() / popularity.sum()
        wanted = -exponent * np.log(1 + np.arange(300))
        assert np.allclose(np.sort(data.true_item_mass)[::-1], wanted)
    assert share[0.0] < share[0.7] < share[1.4]


def world_of(num_users: int, num_items: int, eps: float = 0.1) -> synthetic._World:
    rng = np.random.default_rng(3)
    return synthetic._make_world(num_users, num_items, 1.0, 0.0, 3, 4, 0.5, 1.5, eps, rng)


def true_shares(world: synthetic._World) -> np.ndarray:
    """P(i | u) by loops over users and items, float64."""
    force = np.empty((len(world.user), len(world.item)))
    for u, x in enumerate(world.user.astype(np.float64)):
        for i, y in enumerate(world.item.astype(np.float64)):
            force[u, i] = np.exp(world.item_mass[i]) * (((x - y) ** 2).sum() + world.eps) ** -world.lamb
    return force / force.sum(axis=1, keepdims=True)


def test_proposals_have_the_exact_distribution():
    world = world_of(4, 60)
    cells = synthetic._group(world, np.random.default_rng(0))
    users = np.arange(4)
    bound, table = synthetic._cell_table(world, cells, users)
    keys = synthetic._propose(world, cells, users, bound, table, np.full(4, 60_000), np.random.default_rng(1))
    counts = np.bincount(keys, minlength=240).reshape(4, 60)
    expected = true_shares(world) * counts.sum(axis=1, keepdims=True)
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert counts.sum(axis=1).min() > 20_000
    assert (chi_square < 110).all()  # 59 degrees of freedom: P < 1e-4


def test_bounds_are_never_exceeded():
    world = world_of(200, 500, eps=0.01)
    cells = synthetic._group(world, np.random.default_rng(0))
    bound, _ = synthetic._cell_table(world, cells, np.arange(200))
    cell = np.repeat(np.arange(len(cells.centre)), np.diff(cells.start))
    difference = world.user[:, None, :].astype(np.float64) - world.item[cells.items][None]
    assert (world.log_pull((difference**2).sum(axis=-1)) <= bound[:, cell]).all()


@pytest.mark.parametrize("wanted", [2, 20])  # 2 of 60 by proposals, 20 of 60 by Gumbel keys
def test_draws_without_repetition_match_sequential_drawing(wanted):
    world, repeats = world_of(1, 60), 3000
    cells = synthetic._group(world, np.random.default_rng(0))
    users = np.zeros(repeats, dtype=np.int64)  # many copies of one user
    drawn = synthetic._draw_block(world, cells, users, np.full(repeats, wanted), 0.0, np.random.default_rng(5))
    drawn = drawn.reshape(repeats, wanted)
    assert all(len(set(row)) == wanted for row in drawn.tolist())
    shares, reference = true_shares(world)[0], np.zeros(60)
    loop = np.random.default_rng(6)
    for _ in range(repeats):
        reference[loop.choice(60, size=wanted, replace=False, p=shares)] += 1
    found = np.bincount(drawn.ravel(), minlength=60)
    spread = np.sqrt(np.maximum(reference + found, 10))
    assert (np.abs(found - reference) / spread).max() < 4.5


def test_noise_is_even():
    data = synthetic.generate(3000, 200, 30_000, noise=1.0, test_ratio=0.0)
    expected = 30_000 / 200
    assert abs(data.item_popularity - expected).max() < 6 * np.sqrt(expected)


def test_crowded_catalogue_is_filled_exactly():
    data = synthetic.generate(20, 10, 100, activity_spread=0.0)  # everyone takes half of all items
    assert (data.user_activity + np.diff(data.test.indptr) == 5).all()


def test_activities_sum_to_the_total():
    mass = 2 * np.random.default_rng(0).standard_normal(500)
    for total in (1500, 1501, 9999, 24_999, 25_000):
        counts = synthetic._activity(mass, total, 100)
        assert counts.sum() == total and counts.min() >= 3 and counts.max() <= 50


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_users": 0},
        {"num_items": 5},
        {"num_interactions": 100},
        {"num_interactions": 10**9},
        {"tail_exponent": -1},
        {"lamb": 0},
        {"eps": 0},
        {"noise": 1.5},
        {"test_ratio": 1},
        {"cluster_spread": 1},
        {"latent_dim": 1},
    ],
)
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(UserError, match=f"the generator wants .*{next(iter(wrong))}"):
        synthetic.generate(**wrong)
