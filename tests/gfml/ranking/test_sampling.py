from __future__ import annotations

import random
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from gfml.base.errors import UserError
from gfml.data.interactions import csr_from_pairs, pairs_from_csr
from gfml.ranking import sampling
from gfml.ranking.sampling import NEGATIVES, SCHEMES, FreeItems, PairSet, TripleSampler, TwoStageSampler

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "reference_sampler.py")))
# Fixed seeds: a correct sampler fails once in a hundred thousand choices of them.
P_VALUE = 1e-5
NUM_ITEMS = 12
# No item, one, some, all but one, all.
ROWS = [[], [3], [0, 2, 5, 11], list(range(NUM_ITEMS - 1)), list(range(NUM_ITEMS)), [1, 4], [2, 3, 5, 7, 9, 10]]
USABLE = [user for user, row in enumerate(ROWS) if 0 < len(row) < NUM_ITEMS]


def matrix_of(rows, num_items=NUM_ITEMS):
    users = [user for user, row in enumerate(rows) for _ in row]
    return csr_from_pairs(np.array(users), np.array(sum(rows, []), dtype=np.int64), len(rows), num_items)


def make_sampler(rows=ROWS, **options):
    return TripleSampler(matrix_of(rows), **{"batch_size": 16, "seed": 1} | options)


def draw(sampler, epochs):
    """All triples of some epochs as one array [n, 2 + W]."""
    batches = [batch for epoch in epochs for batch in sampler.epoch(epoch)]
    neg = [batch.neg.view(len(batch), -1) for batch in batches]
    return torch.cat([torch.cat([b.users[:, None], b.pos[:, None], n], 1) for b, n in zip(batches, neg)]).numpy()


# ---------------------------------------------------------------- the set of known pairs


pair_lists = st.integers(1, 9).flatmap(
    lambda num_users: st.integers(1, 40).flatmap(
        lambda num_items: st.tuples(
            st.just((num_users, num_items)),
            st.sets(st.tuples(st.integers(0, num_users - 1), st.integers(0, num_items - 1)), max_size=80),
        )
    )
)


@pytest.mark.parametrize("budget_mb", (0, 512))
@settings(max_examples=60, deadline=None)
@given(case=pair_lists, order=st.randoms())
def test_membership_equals_a_python_set(budget_mb, case, order):
    (num_users, num_items), pairs = case
    shuffled = sorted(pairs, key=lambda pair: (pair[0], order.random()))
    indptr = np.cumsum([0] + [sum(pair[0] == user for pair in pairs) for user in range(num_users)])
    columns = np.array([item for _, item in shuffled], dtype=np.int64)
    matrix = sp.csr_array((np.ones(len(pairs)), columns, indptr), shape=(num_users, num_items))
    known = PairSet(matrix, budget_mb=budget_mb)
    users, items = torch.arange(num_users)[:, None], torch.arange(num_items)
    expected = torch.tensor([[(u, i) in pairs for i in range(num_items)] for u in range(num_users)])
    assert torch.equal(known.contains(users, items), expected)
    flat = known.contains(users.expand(expected.shape).flatten(), items.repeat(num_users))
    assert torch.equal(flat, expected.flatten())


def test_a_bitmap_that_is_no_larger_than_the_keys_is_taken():
    rng = np.random.default_rng(0)
    users, items = rng.integers(3000, size=200_000), rng.integers(4000, size=200_000)
    known, searched = (
        PairSet(csr_from_pairs(users[:count], items[:count], 3000, 4000), budget_mb=1) for count in (200_000, 20_000)
    )
    assert not hasattr(known, "_keys") and len(known._map) == 3000 * 4000 // 8 + 1 and hasattr(searched, "_keys")
    for pairs, count in ((known, 200_000), (searched, 20_000)):
        there = set(zip(users[:count].tolist(), items[:count].tolist(), strict=True))
        others, more = rng.integers(3000, size=30_000), rng.integers(4000, size=30_000)
        expected = [pair in there for pair in zip(others.tolist(), more.tolist(), strict=True)]
        assert pairs.contains(torch.from_numpy(others), torch.from_numpy(more)).tolist() == expected


# The bitmap of 50,000 x 50,000 fits the default budget, the second matrix needs the search.
@pytest.mark.parametrize("num_users,num_items", ((50_000, 50_000), (3_000_000, 2_000_000)))
def test_more_cells_than_32_bits_count(num_users, num_items):
    rng = np.random.default_rng(0)
    users, items = rng.integers(num_users, size=20_000), rng.integers(num_items, size=20_000)
    users[:2], items[:2] = num_users - 1, (num_items - 1, 0)
    known = PairSet(csr_from_pairs(users, items, num_users, num_items))
    users, items = torch.from_numpy(users), torch.from_numpy(items)
    assert known.contains(users, items).all()
    pairs = set(zip(users.tolist(), items.tolist(), strict=True))
    # Cells whose key differs by a multiple of 2^31 or 2^32, by one, and cells at random.
    for step in (2**31, 2**32, -(2**32), 1, -1):
        keys = (users * num_items + items + step) % (num_users * num_items)
        other_users, other_items = keys // num_items, keys % num_items
        expected = [pair in pairs for pair in zip(other_users.tolist(), other_items.tolist(), strict=True)]
        assert known.contains(other_users, other_items).tolist() == expected
    elsewhere = torch.from_numpy(rng.integers(num_users, size=50_000))
    expected = [pair in pairs for pair in zip(elsewhere.tolist(), items.repeat(3)[:50_000].tolist(), strict=True)]
    assert known.contains(elsewhere, items.repeat(3)[:50_000]).tolist() == expected


# ---------------------------------------------------------------- what an epoch contains


@pytest.mark.parametrize("budget_mb", (0, 512))
@pytest.mark.parametrize("num_negatives", (1, 5))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_triples_are_train_pairs_with_unknown_items(scheme, num_negatives, budget_mb):
    sampler = make_sampler(scheme=scheme, num_negatives=num_negatives, budget_mb=budget_mb)
    batches = sampler.epoch(0)
    sizes = [len(batch) for batch in batches]
    assert len(batches) == len(sizes) and set(sizes[:-1]) <= {16} and 1 <= sizes[-1] <= 16
    for batch in batches:
        shape = (len(batch),) if num_negatives == 1 else (len(batch), num_negatives)
        assert batch.pos.shape == batch.users.shape == (len(batch),) and batch.neg.shape == shape
        assert {part.dtype for part in (batch.users, batch.pos, batch.neg)} == {torch.int64}
    for user, pos, *neg in draw(sampler, range(30)).tolist():
        assert user in USABLE and pos in ROWS[user] and not set(neg) & set(ROWS[user])


@pytest.mark.parametrize("count, kind", [(1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)])
def test_an_epoch_is_held_in_the_smallest_type_and_the_batches_are_not(count, kind):
    last = count - 1
    train = csr_from_pairs(np.array([0, last]), np.array([last, 0]), count, count)
    batches = TripleSampler(train, batch_size=1, seed=0, scheme="interaction").epoch(0)
    assert batches.users.dtype == batches.pos.dtype == kind
    found = sorted((int(b.users), int(b.pos)) for b in batches)
    assert found == [(0, last), (last, 0)]
    assert {part.dtype for b in batches for part in (b.users, b.pos, b.neg)} == {torch.int64}


@pytest.mark.parametrize("num_negatives", (0, 1, 3))
def test_blocks_change_no_triple(monkeypatch, num_negatives):
    whole = draw(make_sampler(num_negatives=num_negatives, batch_size=4), range(3))
    monkeypatch.setattr(sampling, "LOOKUPS_PER_BLOCK", 7)
    assert np.array_equal(draw(make_sampler(num_negatives=num_negatives, batch_size=4), range(3)), whole)


def test_epoch_lengths():
    total, expected_loss = sum(map(len, ROWS)), 2 / len(ROWS)
    assert make_sampler().num_saturated == 1
    lengths = np.array([len(make_sampler().epoch(epoch).users) for epoch in range(200)])
    assert lengths.max() <= total
    spread = (expected_loss * (1 - expected_loss) / (200 * total)) ** 0.5
    assert abs(1 - lengths.mean() / total - expected_loss) < 4 * spread
    assert len(make_sampler([[0], [1, 2], [5]]).epoch(0).users) == 4
    each = Counter(make_sampler(scheme="per_user").epoch(0).users.tolist())
    assert each == {user: total // len(ROWS) for user in USABLE}
    sparse = make_sampler([[0], [], [], [1]], scheme="per_user").epoch(3)
    assert sparse.users.tolist() == [0, 3]


@pytest.mark.parametrize("num_negatives", (0, 1, 3))
def test_batches_filled_up_have_one_shape_and_the_same_real_rows(num_negatives):
    """Epochs of different lengths, which without would be recorded anew again and again."""
    how = {"batch_size": 4, "num_negatives": num_negatives}
    lasts = set()
    for epoch in range(6):
        plain, filled = (list(make_sampler(constant=constant, **how).epoch(epoch)) for constant in (False, True))
        lasts.add(len(plain[-1]))
        for wanted, found in zip(plain, filled, strict=True):
            real = len(wanted)
            assert len(found) == 4 and found.neg.shape == (4, *wanted.neg.shape[1:]) and wanted.weight is None
            assert found.weight.tolist() == [1 / real] * real + [0.0] * (4 - real)
            for name in ("users", "pos", "neg"):
                ids = getattr(found, name)
                assert torch.equal(ids[:real], getattr(wanted, name)) and (ids[real:] == ids[0]).all()
    assert len(lasts) > 1
    assert [batch.weight for batch in make_sampler(constant=True, batch_size=100).epoch(0)] == [None]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_epoch_is_never_empty(scheme):
    sampler = make_sampler([[3]] + [[]] * 50, scheme=scheme)
    for epoch in range(5):
        batches = list(sampler.epoch(epoch))
        assert batches and all((batch.users == 0).all() and (batch.pos == 3).all() and len(batch) for batch in batches)


def test_interaction_epochs_hold_every_pair_once_in_random_order():
    sampler = make_sampler(scheme="interaction")
    expected = [(user, item) for user in USABLE for item in ROWS[user]]
    orders = []
    for epoch in range(3):
        batches = sampler.epoch(epoch)
        orders.append(list(zip(batches.users.tolist(), batches.pos.tolist(), strict=True)))
        assert sorted(orders[-1]) == expected != orders[-1]
    assert len({tuple(order) for order in orders}) == 3


def test_a_user_with_one_item_left_gets_it():
    triples = draw(make_sampler([list(range(NUM_ITEMS - 1))], num_negatives=3), range(5))
    assert (triples[:, 2:] == NUM_ITEMS - 1).all()


@pytest.mark.parametrize("rows", ([[], []], [list(range(NUM_ITEMS))], [[], list(range(NUM_ITEMS))]))
def test_nothing_to_learn_from_is_a_user_error(rows):
    with pytest.raises(UserError, match="nothing to learn from") as error:
        make_sampler(rows)
    assert "\n" not in str(error.value)


def test_pairs_without_negatives_keep_users_who_have_everything():
    sampler = make_sampler(num_negatives=0, scheme="interaction")
    batches = list(sampler.epoch(3))
    assert all(batch.neg.shape == (len(batch), 0) for batch in batches)
    pairs = sorted((user, item) for batch in batches for user, item in zip(batch.users.tolist(), batch.pos.tolist()))
    assert pairs == sorted((user, item) for user, row in enumerate(ROWS) for item in row)


def test_train_items_alone_are_drawn_and_alike():
    """Items 5 and 7 occur in no train row: they are never negatives; the others are alike."""
    rows = [[0, 1], [2, 3], [4, 6], [0, 6]]
    sampler = make_sampler(rows, negatives="train-items", scheme="interaction", batch_size=8)
    triples = draw(sampler, range(600))
    assert not set(triples[:, 2]) & {5, 7, 8, 9, 10, 11}
    free = {user: sorted({0, 1, 2, 3, 4, 6} - set(row)) for user, row in enumerate(rows)}
    for user, items in free.items():
        counts = Counter(triples[triples[:, 0] == user][:, 2].tolist())
        assert set(counts) == set(items) and chisquare([counts[item] for item in items]).pvalue > P_VALUE


def test_a_user_with_every_train_item_is_left_out():
    sampler = make_sampler([[0, 1, 2], [0], [1]], negatives="train-items")
    assert sampler.num_saturated == 1 and 0 not in draw(sampler, range(3))[:, 0]


def test_negatives_of_a_saturated_user_are_refused():
    sampler = make_sampler()
    with pytest.raises(ValueError, match="every item"):
        sampler.negatives(torch.tensor([1, 4]), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options", ({"scheme": "popular"}, {"batch_size": 0}, {"num_negatives": -1}, {"negatives": "hard"})
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="choose|wanted at least 1"):
        make_sampler(**options)


# ---------------------------------------------------------------- distributions


def assert_uniform(values, support):
    counts = Counter(values.tolist())
    assert set(counts) <= set(support)
    if len(support) > 1:
        assert chisquare([counts[value] for value in support]).pvalue > P_VALUE


@pytest.mark.parametrize("num_negatives", (1, 3))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_are_uniform(scheme, num_negatives):
    triples = draw(make_sampler(scheme=scheme, num_negatives=num_negatives, batch_size=64), range(400))
    if scheme == "user":
        assert_uniform(triples[:, 0], USABLE)
    for user in USABLE:
        mine = triples[triples[:, 0] == user]
        assert_uniform(mine[:, 1], ROWS[user])
        for column in mine[:, 2:].T:
            assert_uniform(column, sorted(set(range(NUM_ITEMS)) - set(ROWS[user])))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plain_sampler_agrees_in_distribution(scheme):
    ours = draw(make_sampler(scheme=scheme, num_negatives=2), range(300))
    positives, rng = reference.rows_as_lists(matrix_of(ROWS)), random.Random(7)
    theirs = np.array(
        [
            (user, pos, *neg)
            for _ in range(300)
            for user, pos, neg in reference.reference_epoch(positives, NUM_ITEMS, rng, scheme=scheme, num_negatives=2)
        ]
    )
    if scheme == "user":
        assert len(ours) == pytest.approx(len(theirs), rel=0.03)
    else:
        assert len(ours) == len(theirs)
    for columns in ((0, 1), (0, 2), (0, 3)):
        counts = [Counter(map(tuple, triples[:, columns].tolist())) for triples in (ours, theirs)]
        assert set(counts[0]) == set(counts[1])
        table = [[count[cell] for cell in sorted(counts[0])] for count in counts]
        assert chi2_contingency(table).pvalue > P_VALUE
    # Two negatives of one positive are independent draws.
    mine = ours[ours[:, 0] == 2]
    table = np.zeros((NUM_ITEMS, NUM_ITEMS))
    np.add.at(table, (mine[:, 2], mine[:, 3]), 1)
    free = sorted(set(range(NUM_ITEMS)) - set(ROWS[2]))
    assert chi2_contingency(table[np.ix_(free, free)]).pvalue > P_VALUE


# ---------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("num_negatives", (1, 4))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_epoch_is_a_function_of_seed_and_number(scheme, num_negatives, monkeypatch):
    options = {"scheme": scheme, "num_negatives": num_negatives}
    first = make_sampler(**options)
    forward = [draw(first, [epoch]) for epoch in range(4)]
    state = torch.get_rng_state()
    backward = [draw(make_sampler(**options), [epoch]) for epoch in (3, 2, 1, 0)][::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    batches = first.epoch(2)
    assert all(torch.equal(a.neg, b.neg) for a, b in zip(batches, batches, strict=True))
    assert np.array_equal(draw(make_sampler(batch_size=5, **options), [1]), forward[1])
    others = [draw(make_sampler(seed=2, **options), [epoch]) for epoch in range(4)]
    everything = [triples.tobytes() for triples in forward + others]
    assert len(set(everything)) == 8
    # Drawing negatives block by block changes nothing but memory.
    whole = make_sampler(batch_size=4, **options)
    monkeypatch.setattr(sampling, "NEGATIVES_PER_DRAW", 8)
    blocks = draw(whole, [0])
    assert np.array_equal(blocks[:, :2], forward[0][:, :2]) and len(blocks) == len(forward[0])
    assert all(not set(neg) & set(ROWS[user]) for user, _, *neg in blocks.tolist())


def test_neighbouring_seeds_and_epochs_share_nothing():
    rng = np.random.default_rng(0)
    train = csr_from_pairs(rng.integers(200, size=4000), rng.integers(300, size=4000), 200, 300)
    streams = [
        draw(TripleSampler(train, batch_size=512, seed=seed, scheme="interaction"), [epoch])
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    users, items = pairs_from_csr(train)
    for a in range(4):
        assert sorted(map(tuple, streams[a][:, :2].tolist())) == list(zip(users.tolist(), items.tolist(), strict=True))
        for b in range(a):
            assert (streams[a][:, 2] == streams[b][:, 2]).mean() < 0.02


# ---------------------------------------------------------------- popular and near negatives

POPULAR = [[0, 1], [0, 1, 2], [0, 2, 3], [0, 3], [0, 1, 4], [0], [0, 1, 2, 3, 4]]


def assert_shares(values, wanted):
    """The values occur in proportion to ``wanted`` (item -> weight)."""
    counts, total = Counter(values.tolist()), sum(wanted.values())
    assert set(counts) <= {item for item, weight in wanted.items() if weight}
    expected = [len(values) * weight / total for weight in wanted.values() if weight]
    assert chisquare([counts[item] for item, weight in wanted.items() if weight], expected).pvalue > P_VALUE


def test_popular_negatives_follow_the_counts():
    counts = Counter(item for row in POPULAR for item in row)
    triples = draw(make_sampler(POPULAR, negatives="popularity", num_negatives=3), range(500))
    for user, row in enumerate(POPULAR[:6]):
        mine = triples[triples[:, 0] == user][:, 2:].ravel()
        assert_shares(mine, {item: counts[item] for item in counts if item not in row})
    # The last user has everything that is ever drawn.
    assert not (triples[:, 0] == 6).any()
    assert make_sampler(POPULAR, negatives="popularity").num_saturated == 1


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_rejection_ends_where_hardly_anything_is_left(negatives):
    """A user with all but two rare items: the list of free items answers after so many rounds."""
    rows = [list(range(1500))] * 40 + [[1500], [1501, 1501]]
    sampler = TripleSampler(matrix_of(rows, 1502), batch_size=4096, seed=3, num_negatives=2, negatives=negatives)
    found = sampler.negatives(torch.zeros(2000, dtype=torch.int64), torch.Generator().manual_seed(1))
    assert_uniform(found.flatten().numpy(), [1500, 1501])


def two_stage(vectors, rows=POPULAR, num_items=NUM_ITEMS, **options):
    options = {
        "batch_size": 64,
        "seed": 1,
        "num_negatives": 3,
        "num_candidates": 400,
        "scheme": "interaction",
    } | options
    return TwoStageSampler(matrix_of(rows, num_items), item_vectors=lambda: vectors, **options)


def test_near_negatives_follow_popularity_and_density():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(NUM_ITEMS, 5, generator=generator) + 0.5
    counts = Counter(item for row in POPULAR for item in row)
    triples = draw(two_stage(vectors, num_candidates=4000), range(500))
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).double()
    for user, pos in ((0, 1), (1, 2), (5, 0)):
        mine = triples[(triples[:, 0] == user) & (triples[:, 1] == pos)][:, 2:].ravel()
        cosine = (unit @ unit[pos]).tolist()
        wanted = {
            item: counts[item] * (1 - cosine[item] ** 2) ** (1 - (5 - 1) / 2) * (cosine[item] > 0)
            for item in counts if item not in POPULAR[user]
        }  # fmt: skip
        # The candidates of a batch are themselves a sample: shares are near, not exact.
        found = Counter(mine.tolist())
        for item, weight in wanted.items():
            assert found[item] / len(mine) == pytest.approx(weight / sum(wanted.values()), abs=0.04), (user, item)


def test_near_negatives_are_never_known_whatever_the_vectors():
    for vectors in (torch.zeros(NUM_ITEMS, 4), torch.ones(NUM_ITEMS, 4), -torch.eye(NUM_ITEMS)):
        triples = draw(two_stage(vectors, num_candidates=8), range(20))
        assert len(triples) and all(not set(neg) & set(POPULAR[user]) for user, _, *neg in triples.tolist())


def test_near_negatives_repeat_for_equal_vectors_and_follow_new_ones():
    vectors = torch.randn(NUM_ITEMS, 4, generator=torch.Generator().manual_seed(0))
    first, again = (draw(two_stage(vectors), [2]) for _ in range(2))
    assert np.array_equal(first, again)
    assert draw(two_stage(vectors, num_negatives=1), [0]).shape[1] == 3
    asked = []

    def tell():
        asked.append(len(asked))
        return vectors

    sampler = two_stage(vectors, batch_size=4, refresh=2)
    sampler._item_vectors = tell
    num_batches = len(list(sampler.epoch(1)))
    assert len(asked) == -(-num_batches // 2)
    with pytest.raises(ValueError, match="at least 1"):
        two_stage(vectors, refresh=0)


@pytest.mark.parametrize("kind", ("uniform", "popularity", "gaps"))
def test_free_items_are_drawn_in_proportion(kind):
    """What devices draw instead of rejecting: never a known item, the others by weight."""
    rng = np.random.default_rng(0)
    matrix = sp.csr_array((rng.random((6, 12)) < 0.5).astype(np.float64))
    weights = {
        "uniform": np.ones(12),
        "popularity": np.bincount(matrix.indices, minlength=12),
        "gaps": rng.integers(0, 3, 12),
    }[kind]
    free, generator = FreeItems(matrix, weights, torch.device("cpu")), torch.Generator().manual_seed(1)
    for user, known in enumerate(matrix.toarray() > 0):
        share = np.where(known, 0, weights) / np.where(known, 0, weights).sum()
        drawn = free.draw(torch.full((20_000,), user), generator).numpy()
        counts = np.bincount(drawn, minlength=12)
        assert not counts[share == 0].any()
        assert np.abs(counts / 20_000 - share).max() < 0.015
