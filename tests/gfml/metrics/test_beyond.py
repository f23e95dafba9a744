from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gfml.data.interactions import csr_from_pairs, pairs_from_csr
from gfml.metrics import beyond
from gfml.metrics.ranking import find_hits


def csr_from_lists(lists, num_items):
    users = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
    items = np.concatenate([np.asarray(items, dtype=np.int64) for items in lists])
    return csr_from_pairs(users, items, len(lists), num_items)


def test_head_is_the_first_fifth_ties_by_id():
    assert np.flatnonzero(beyond.head_items(np.array([1, 5, 5, 5, 0, 0, 0, 0, 0, 0]))).tolist() == [1, 2]
    assert beyond.head_items(np.arange(11)).sum() == 3  # 2.2, rounded up
    assert beyond.head_items(np.ones(5)).tolist() == [True] + [False] * 4


@given(st.integers(0, 60), st.integers(1, 7))
def test_quantile_groups_have_equal_counts_and_descend(num_items, groups):
    popularity = np.random.default_rng(num_items).integers(0, 9, num_items)
    labels = beyond.quantile_groups(popularity, groups)
    sizes = np.bincount(labels, minlength=groups)
    assert len(sizes) == groups and sizes.sum() == num_items and np.ptp(sizes) <= 1
    for g in range(groups - 1):
        if sizes[g] and sizes[g + 1]:
            assert popularity[labels == g].min() >= popularity[labels == g + 1].max()


def test_short_head_is_the_smallest_set_that_holds_the_share():
    popularity = np.array([10, 40, 30, 20, 0])
    assert np.flatnonzero(beyond.mass_head(popularity)).tolist() == [1, 2, 3]  # 40 + 30 = 70 < 80
    assert np.flatnonzero(beyond.mass_head(popularity, 0.7)).tolist() == [1, 2]  # exactly 70
    assert not beyond.mass_head(np.zeros(3)).any()


def test_item_groups_are_partitions():
    popularity = np.random.default_rng(0).integers(0, 20, 53)
    groups = beyond.item_groups(popularity)
    assert list(groups) == ["head", "tail", "q1", "q2", "q3", "q4", "q5", "shorthead", "longtail", "cold"]
    for names in (["head", "tail"], ["q1", "q2", "q3", "q4", "q5"], ["shorthead", "longtail"]):
        assert (sum(groups[name].astype(int) for name in names) == 1).all()
    np.testing.assert_array_equal(groups["cold"], popularity == 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_group_accuracy_equals_the_loops_and_adds_up(seed):
    rng = np.random.default_rng(seed)
    top = np.array([rng.permutation(25)[:6] for _ in range(9)])
    top[0, 3:] = -1
    lists = [rng.permutation(25)[: rng.integers(0, 9)] for _ in range(9)]
    relevant, labels, k = csr_from_lists(lists, 25), rng.integers(0, 3, 25), 5
    hits, hit_count, judged_count = find_hits(top, relevant), 0.0, 0
    for g in range(3):
        group = labels == g
        recalls = beyond.group_recall(top, hits, relevant, group, k)
        ndcgs = beyond.group_ndcg(top, hits, relevant, group, k)
        for u, wanted in enumerate(lists):
            inside = {int(i) for i in wanted if group[i]}
            if not inside:
                assert np.isnan(recalls[u]) and np.isnan(ndcgs[u])
                continue
            found = [rank for rank, i in enumerate(top[u, :k], start=1) if i in inside]
            ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(inside)) + 1))
            assert recalls[u] == pytest.approx(len(found) / len(inside))
            assert ndcgs[u] == pytest.approx(sum(1 / math.log2(rank + 1) for rank in found) / ideal)
        counts = beyond.count_in_group(relevant, group)
        hit_count += np.nansum(recalls * counts)
        judged_count += counts.sum()
    assert judged_count == relevant.nnz
    assert hit_count == pytest.approx(find_hits(top[:, :k], relevant).sum())  # so the ratio is the micro recall


def test_gini_and_entropy_extremes():
    even, single = np.full(8, 3), np.array([0, 0, 12, 0, 0, 0, 0, 0])
    assert beyond.gini(even) == pytest.approx(0) and beyond.gini(single) == pytest.approx(7 / 8)
    assert beyond.effective_coverage(even) == pytest.approx(1)
    assert beyond.effective_coverage(single) == pytest.approx(1 / 8)
    assert math.isnan(beyond.gini(np.zeros(4))) and math.isnan(beyond.effective_coverage(np.zeros(4)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(sum))
def test_gini_is_the_mean_absolute_difference(counts):
    c = np.array(counts, dtype=np.float64)
    assert beyond.gini(c) == pytest.approx(np.abs(c[:, None] - c).sum() / (2 * len(c) * c.sum()), abs=1e-12)


def test_hand_example_of_lists():
    """Four items with popularity 4, 2, 1, 0; the head is item 0 alone."""
    popularity, tail = np.array([4, 2, 1, 0]), np.array([False, True, True, True])
    top = np.array([[0, 1], [3, -1], [-1, -1]])
    np.testing.assert_allclose(beyond.mean_popularity(top, popularity), [3, 0, np.nan])
    np.testing.assert_allclose(beyond.tail_share(top, tail), [0.5, 1, np.nan])
    np.testing.assert_allclose(beyond.tail_count(top, tail), [1, 1, 0])
    np.testing.assert_allclose(beyond.novelty(top, popularity, 8), [(1 + 2) / 2, 3, np.nan])
    exposure = beyond.exposure_counts(top, 4)
    assert exposure.tolist() == [1, 1, 0, 1]
    assert beyond.coverage(exposure) == 0.75
    assert beyond.share(exposure, tail) == pytest.approx(2 / 3)


def test_popularity_lift_compares_with_the_own_profile():
    train = csr_from_lists([[0, 1], [0], []], 3)  # popularity 2, 1, 0
    popularity = np.array([2, 1, 0])
    lift = beyond.popularity_lift(np.array([[0], [1], [0]]), train, np.array([0, 1, 2]), popularity)
    np.testing.assert_allclose(lift, [2 / 1.5 - 1, -0.5, np.nan])


def test_all_figures_of_a_small_case():
    train = csr_from_lists([[0, 1], [0, 2], [0], [0, 1]], 5)  # popularity 4, 2, 1, 0, 0
    relevant = csr_from_lists([[2, 3], [1]], 5)
    per_user, totals = beyond.beyond_accuracy(np.array([[3, 4], [1, 3]]), relevant, train, np.array([0, 1]), (1, 2))
    np.testing.assert_allclose(per_user["tail_recall@2"], [0.5, 1])
    np.testing.assert_allclose(per_user["cold_recall@1"], [1, np.nan])
    assert np.isnan(per_user["head_recall@2"]).all()
    np.testing.assert_allclose(per_user["arp@2"], [0, 1])
    np.testing.assert_allclose(per_user["aclt@1"], [1, 1])
    np.testing.assert_allclose(per_user["users_q1_recall@2"], [0.5, np.nan])
    assert totals["coverage@2"] == pytest.approx(3 / 5) and totals["coverage@1"] == pytest.approx(2 / 5)
    assert totals["cold_exposure@2"] == pytest.approx(3 / 4)
    assert totals["head_train_share"] == pytest.approx(4 / 7) and totals["head_judged_share"] == 0
    assert totals["q4_judged_share"] == pytest.approx(1 / 3)
    assert all(type(value) is float for value in totals.values())


def test_lists_are_measured_over_train_popularity_only():
    train = csr_from_lists([[0, 1], [1, 2]], 4)
    _users, items = pairs_from_csr(train)
    per_user, _ = beyond.beyond_accuracy(np.array([[3]]), csr_from_lists([[3]], 4), train, np.array([0]), (1,))
    assert per_user["arp@1"].tolist() == [np.count_nonzero(items == 3)] == [0]
    assert per_user["novelty@1"].tolist() == [1.0]  # two users, popularity 0 counted as 1


def test_correlations():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 6, 40), rng.normal(size=40)
    assert beyond.spearman(first, first**3) == pytest.approx(1) and beyond.kendall(first, -first) == pytest.approx(-1)
    ranks = stats.rankdata(first), stats.rankdata(second)
    assert beyond.spearman(first, second) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    signs = np.sign(np.subtract.outer(first, first)) * np.sign(np.subtract.outer(second, second))
    pairs = 40 * 39
    tied = sum(c * (c - 1) for c in np.bincount(first))
    assert beyond.kendall(first, second) == pytest.approx(signs.sum() / math.sqrt(pairs * (pairs - tied)))
    assert math.isnan(beyond.spearman(np.ones(5), np.arange(5)))
    assert math.isnan(beyond.kendall(np.arange(1), np.arange(1)))
