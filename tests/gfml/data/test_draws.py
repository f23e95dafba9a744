"""Draws of large data: distribution, cut and determinism."""

from __future__ import annotations

import numpy as np
import pytest

from gfml.data import draws, synthetic
from gfml.data.interactions import Interactions
from gfml.data.synthetic import generate


def in_first_three(weight: np.ndarray) -> np.ndarray:
    """P(item among three drawn one after the other without replacement in proportion to weight), by enumeration."""
    p = weight / weight.sum()
    found = p.copy()
    for a in range(len(p)):
        second = p / (1 - p[a])
        second[a] = 0
        found += p[a] * second
        for b in range(len(p)):
            third = p / (1 - p[a] - p[b])
            third[[a, b]] = 0
            found += p[a] * second[b] * third * (b != a)
    return found


@pytest.mark.parametrize("num_items, num_heavy", [(60, 0), (60, 5), (60, 60), (20, 4)])
def test_items_come_as_one_after_the_other_in_proportion_to_mass_and_pull(num_items: int, num_heavy: int) -> None:
    """60 items: by clocks, all light, some heavy, all heavy; 20 items: too few, drawn over the whole catalogue."""
    users = 40_000
    world = synthetic._make_world(1, num_items, 1.0, 0.6, 3, 4, 0.6, 1.5, 0.05, np.random.default_rng(0))
    cells = synthetic._group(world, np.random.default_rng(1))
    mass = np.exp(world.item_mass)
    heavy = np.argsort(-mass)[:num_heavy]
    light = mass.copy()
    light[heavy] = 0
    cumulative = np.r_[0.0, np.cumsum(light[cells.items])]
    items = np.empty(3 * users, np.int32)
    draws.draw_users(
        np.random.default_rng(2).integers(2**64, size=users, dtype=np.uint64), np.full(users, 3),
        (np.repeat(world.user, users, axis=0), world.item),
        (cells.centre, cells.radius, cells.items, cumulative, cells.start), heavy, mass, (1.5, 0.05, 0.0), items,
    )  # fmt: skip
    rows = items.reshape(users, 3)
    assert (np.diff(rows, axis=1) > 0).all()
    sq = ((world.item.astype(float) - world.user.astype(float)) ** 2).sum(1)
    expected = in_first_three(mass * (sq + 0.05) ** -1.5)
    found = np.bincount(items, minlength=num_items) / users
    deviation = np.sqrt(expected * (1 - expected) / users)
    assert (np.abs(found - expected) < 4.5 * deviation + 1e-4).all()


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> tuple[Interactions, Interactions]:
    """The same call by either kind of draws."""
    small = generate(4000, 400, 100_000, noise=0.1)
    monkeypatch.setattr(synthetic, "LARGE", 0)
    return small, generate(4000, 400, 100_000, noise=0.1)


def test_large_data_are_like_small_data(both: tuple[Interactions, Interactions]) -> None:
    small, large = both
    assert np.array_equal(small.true_item_mass, large.true_item_mass)
    for part in ("train", "test"):
        first, second = small.split(part), large.split(part)
        assert np.array_equal(np.diff(first.indptr), np.diff(second.indptr)), part  # the same number for every user
        a, b = (np.bincount(matrix.indices, minlength=400) for matrix in (first, second))
        assert (((a - b) ** 2) / np.maximum(a + b, 1)).mean() < 1.1  # as two draws of one distribution differ
        assert second.has_canonical_format and second.indices.dtype == np.int32 and (second.data == 1).all()
    assert large.train.multiply(large.test).nnz == 0 and large.valid.nnz == 0
    near = [((data.train @ data.train.T).nnz) for data in both]
    assert near[0] == pytest.approx(near[1], rel=0.01)


def test_large_data_do_not_depend_on_threads(threads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "LARGE", 0)
    monkeypatch.setattr(synthetic, "_LARGE_BLOCK", 37)
    found = []
    for number in (1, 2, 4):
        threads(number)
        found.append(generate(300, 200, 6000).fingerprint)
    assert len(set(found)) == 1 and generate(300, 200, 6000, seed=1).fingerprint != found[0]
