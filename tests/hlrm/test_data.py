"""Histories and batches: what is left out, who may appear, distributions, epochs that depend on their number alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.ranking.sampling import seeded_generator
from hlrm.data import HISTORY_KINDS, Histories, PairSampler, fixed_histories


def matrix_of(seed=0, users=20, items=30, density=0.3):
    dense = np.random.default_rng(seed).random((users, items)) < density
    dense[0], dense[1] = False, True  # nobody's row, and everybody's
    return sp.csr_array(dense.astype(np.float32))


def histories_of(matrix, width, kind="random"):
    return Histories(matrix, width, kind=kind, popularity=np.bincount(matrix.indices, minlength=matrix.shape[1]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 12), st.sampled_from(HISTORY_KINDS))
def test_histories_of_pairs(seed, width, kind):
    """Items of the user, never the pair's own, without repetition (but for unpop), all of them where they fit."""
    matrix = matrix_of(seed, density=0.25)
    rows = np.repeat(np.arange(20), np.diff(matrix.indptr))
    users, pos = torch.from_numpy(rows), torch.from_numpy(matrix.indices.astype(np.int64))
    drawer, generator = histories_of(matrix, width, kind), torch.Generator().manual_seed(seed)
    history = drawer.of_pairs(users, pos, generator, drawer.shuffled(generator))
    assert history.ids.shape == (len(rows), width)
    assert not history.ids[~history.mask].any()
    for row in range(len(rows)):
        found = history.ids[row, : int(history.counts[row])].tolist()
        known = set(matrix[[rows[row]]].indices.tolist()) - {int(pos[row])}
        assert set(found) <= known and len(found) == min(width, len(known))
        if kind != "unpop" or len(known) <= width:
            assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", HISTORY_KINDS)
def test_histories_of_rows(kind):
    matrix = matrix_of()
    drawer, generator = histories_of(matrix, 8, kind), torch.Generator().manual_seed(1)
    history = drawer.of_rows(torch.arange(20), generator, drawer.shuffled(generator))
    assert int(history.counts[0]) == 0 and int(history.counts[1]) == 8
    for user in range(20):
        known = matrix[[user]].indices
        found = history.ids[user, : int(history.counts[user])].numpy()
        assert np.isin(found, known).all() and len(found) == min(8, len(known))
        if kind == "last":
            assert set(found) == set(np.sort(known)[-8:])


def test_random_histories_are_uniform_subsets():
    """Every other item of a user is equally likely, and so is every pair of them."""
    matrix = sp.csr_array(np.ones((1, 6), dtype=np.float32))
    drawer, counts, pairs = histories_of(matrix, 2), np.zeros(6), np.zeros((6, 6))
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        users, left_out = torch.zeros(25, dtype=torch.int64), torch.full((25,), 3)
        for first, second in drawer.of_pairs(users, left_out, generator, drawer.shuffled(generator)).ids.tolist():
            counts[[first, second]] += 1
            pairs[min(first, second), max(first, second)] += 1
    others = [0, 1, 2, 4, 5]
    assert counts[3] == 0
    np.testing.assert_allclose(counts[others] / counts.sum(), 0.2, atol=0.02)
    share = [pairs[a, b] / pairs.sum() for a in others for b in others if a < b]
    np.testing.assert_allclose(share, 0.1, atol=0.02)


def test_unpop_prefers_rare_items():
    """Row 0 has 4 items that 1, 2, 4 and 8 users took; one is left out."""
    popularity = np.array([1, 2, 4, 8])
    drawer = Histories(sp.csr_array(np.ones((1, 4), dtype=np.float32)), 2, kind="unpop", popularity=popularity)
    users, left_out = torch.zeros(20_000, dtype=torch.int64), torch.full((20_000,), 1)
    generator = torch.Generator().manual_seed(0)
    ids = drawer.of_pairs(users, left_out, generator, drawer.shuffled(generator)).ids
    found = np.bincount(ids.numpy().ravel(), minlength=4) / ids.numel()
    rarity = 1 / popularity * np.array([1, 0, 1, 1])
    np.testing.assert_allclose(found, rarity / rarity.sum(), atol=0.01)
    ids = drawer.of_rows(users, generator, drawer.shuffled(generator)).ids
    found = np.bincount(ids.numpy().ravel(), minlength=4) / ids.numel()
    np.testing.assert_allclose(found, 1 / popularity / (1 / popularity).sum(), atol=0.01)


def test_an_epoch_holds_every_pair_once_and_depends_on_its_number_alone():
    matrix = matrix_of()
    sampler = PairSampler(matrix, batch_size=16, width=5, seed=4, with_audience=True)
    first, again = (
        list(sampler.epoch(3)),
        list(PairSampler(matrix, batch_size=16, width=5, seed=4, with_audience=True).epoch(3)),
    )
    assert len(first) == len(sampler.epoch(3))
    other = list(sampler.epoch(4))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.users, two.users) and torch.equal(one.neg, two.neg)
        assert torch.equal(one.history.ids, two.history.ids) and torch.equal(one.audience.ids, two.audience.ids)
    assert not torch.equal(first[0].users, other[0].users)
    pairs = {(u, i) for batch in first for u, i in zip(batch.users.tolist(), batch.pos.tolist(), strict=True)}
    rows = np.repeat(np.arange(20), np.diff(matrix.indptr))
    full = {(u, int(i)) for u, i in zip(rows.tolist(), matrix.indices, strict=True) if u != 1}  # user 1 has no negative
    assert pairs == full and sum(map(len, first)) == len(full)
    dense = matrix.toarray() > 0
    for batch in first:
        assert not dense[batch.users, batch.neg].any()
        assert not ((batch.history.ids == batch.pos[:, None]) & batch.history.mask).any()
        half = len(batch)
        assert not ((batch.audience.ids[:half] == batch.users[:, None]) & batch.audience.mask[:half]).any()


def test_judging_histories_are_fixed():
    matrix = matrix_of()
    draw = lambda seed: fixed_histories(matrix, 4, seed, kind="random", popularity=np.ones(30), device="cpu")  # noqa: E731
    assert torch.equal(draw(1).ids, draw(1).ids) and not torch.equal(draw(1).ids, draw(2).ids)


def test_no_training_pairs_no_histories():
    empty = sp.csr_array((3, 5), dtype=np.float32)
    drawer = histories_of(empty, 4)
    history = drawer.of_rows(torch.arange(3), seeded_generator("cpu", 1), drawer.shuffled(seeded_generator("cpu", 1)))
    assert history.ids.shape == (3, 4) and not history.counts.any()


@pytest.mark.parametrize("settings", [{"width": -1}, {"width": 3, "kind": "newest"}, {"width": 3, "kind": "unpop"}])
def test_bad_settings(settings):
    with pytest.raises(ValueError):
        Histories(matrix_of(), **settings)
