"""Batches of users: grouping, coverage, negatives, the stream and the published defects as options."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.base.errors import UserError
from mcl.sampler import UserBatchSampler

NUM_USERS, NUM_ITEMS = 23, 12


@pytest.fixture(scope="module")
def train():
    dense = np.random.default_rng(0).random((NUM_USERS, NUM_ITEMS)) < 0.3
    dense[:, 3] = True
    dense[[4, 17]] = False
    dense[9] = True
    return sp.csr_array(dense.astype(np.float32))


def make(train, **options):
    return UserBatchSampler(train, **{"batch_size": 5, "num_negatives": 3, "seed": 1, **options})


def same(one, two):
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    return all(a is b if a is None else torch.equal(a, b) for a, b in pairs)


def test_a_batch_groups_all_positives_of_its_users(train):
    dense = train.toarray() > 0
    for batch in make(train).epoch(1):
        assert torch.equal(batch.counts, torch.bincount(batch.segment)) and (batch.segment.diff() >= 0).all()
        for place, user in enumerate(batch.users.tolist()):
            own = batch.segment == place
            assert batch.pos[own].tolist() == np.flatnonzero(dense[user]).tolist()
            assert not dense[user][batch.neg[own]].any()
        assert batch.neg.shape == (len(batch.pos), 3)


def test_an_epoch_sees_each_usable_user_once(train):
    sampler = make(train)
    assert len(sampler.epoch(1)) == sampler.num_batches == 5
    seen = torch.cat([batch.users for batch in sampler.epoch(1)])
    # Users 4 and 17 have no positive, user 9 has every item.
    assert sorted(seen.tolist()) == sorted({*range(NUM_USERS)} - {4, 9, 17})


def test_the_incomplete_batch_can_be_left_out(train):
    sampler = make(train, drop_last=True)
    assert len(list(sampler.epoch(1))) == sampler.num_batches == 4
    assert sum(len(batch.users) for batch in sampler.epoch(1)) < 20 + 1


def test_one_negative_keeps_its_axis(train):
    assert all(batch.neg.shape == (len(batch.pos), 1) for batch in make(train, num_negatives=1).epoch(1))


def test_an_epoch_is_a_function_of_seed_and_number(train):
    one, two = make(train), make(train)
    list(two.epoch(5))
    assert all(same(a, b) for a, b in zip(one.epoch(3), two.epoch(3), strict=True))
    firsts = [next(iter(make(train, seed=seed).epoch(epoch))) for seed, epoch in ((1, 1), (1, 2), (2, 1))]
    assert not torch.equal(firsts[0].users, firsts[1].users) and not torch.equal(firsts[0].users, firsts[2].users)
    assert not torch.equal(firsts[0].neg, next(iter(make(train).epoch(2))).neg)


def test_the_published_repetition(train):
    """Five times the same batch, negatives included; the stream then goes on where the single one would."""
    once, five = make(train), make(train, duplicate_batches=5)
    stream = [batch for epoch in (1, 2, 3) for batch in five.epoch(epoch)]
    distinct = list(once.epoch(1))[:3]
    assert len(stream) == 15
    assert all(same(batch, distinct[number // 5]) for number, batch in enumerate(stream))
    # Repeats may cross an epoch's end.
    three = make(train, duplicate_batches=3)
    assert same(list(three.epoch(1))[-1], next(iter(three.epoch(2))))


def test_nothing_to_train_on_is_said(train):
    with pytest.raises(UserError, match="fewer than one batch of 100"):
        make(train, batch_size=100, drop_last=True)
    with pytest.raises(UserError, match="nothing to learn from"):
        make(sp.csr_array((3, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="duplicate_batches"):
        make(train, duplicate_batches=0)


def test_edges_of_a_batch_are_a_batch(train):
    """Consecutive parts, wherever they cut, hold every edge once with its own user and negatives."""
    batch = next(iter(make(train).epoch(1)))
    edges = batch.users[batch.segment]
    for ends in ((0, 7, 8, len(batch)), (0, 0, int(batch.counts[0]), len(batch))):
        parts = [batch.rows(slice(*cut)) for cut in zip(ends[:-1], ends[1:], strict=True)]
        assert [len(part) for part in parts] == [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)]
        assert torch.equal(torch.cat([part.users[part.segment] for part in parts]), edges)
        assert torch.equal(torch.cat([part.pos for part in parts]), batch.pos)
        assert torch.equal(torch.cat([part.neg for part in parts]), batch.neg)
        for part in parts:
            assert torch.equal(part.counts, torch.bincount(part.segment, minlength=len(part.users)))
            assert (part.counts > 0).all()
    assert same(batch.rows(slice(None)), batch)
