from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.data.interactions import csr_from_pairs
from gfml.metrics.ranking import average_precision, find_hits, means, ndcg, ranking_metrics, recall

HERE = Path(__file__).resolve().parent
reference = SimpleNamespace(**runpy.run_path(str(HERE.parent / "ranking" / "reference_eval.py")))
NAMES = ("precision", "recall", "ndcg", "hit", "mrr", "map")


@pytest.fixture(scope="module")
def golden():
    return np.load(HERE.parents[1] / "golden" / "ranking_metrics.npz", allow_pickle=False)


def csr_from_lists(lists, num_items):
    users = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
    items = np.concatenate([np.asarray(items, dtype=np.int64) for items in lists])
    return csr_from_pairs(users, items, len(lists), num_items)


def golden_relevant(golden):
    indptr, items = golden["test_indptr"], golden["test_items"]
    return csr_from_pairs(np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), items, *golden["scores"].shape)


@pytest.mark.parametrize("source", ["natural", "orig"])
@pytest.mark.parametrize("name", ["precision", "recall", "ndcg"])
def test_published_metrics(golden, source, name):
    relevant, ks = golden_relevant(golden), golden["topks"]
    values = ranking_metrics(golden["natural_topk_items"], relevant, ks)
    for column, k in enumerate(ks):
        stored = golden[f"{source}_user_{name}"][:, column]
        np.testing.assert_allclose(values[f"{name}@{k}"], stored, rtol=1e-9, atol=1e-11)
        assert means(values)[f"{name}@{k}"] == pytest.approx(golden[f"{source}_{name}"][column], rel=1e-9)


@pytest.mark.parametrize("name", ["hit", "mrr", "map_min", "map_k", "map_n"])
def test_other_stored_metrics(golden, name):
    ours, _, denominator = name.partition("_")
    relevant, ks = golden_relevant(golden), golden["topks"]
    values = ranking_metrics(golden["natural_topk_items"], relevant, ks, map_denominator=denominator or "min")
    for column, k in enumerate(ks):
        stored = golden[f"natural_user_{name}"][:, column]
        np.testing.assert_allclose(values[f"{ours}@{k}"], stored, rtol=1e-9, atol=1e-11)
        assert means(values)[f"{ours}@{k}"] == pytest.approx(golden[f"natural_{name}"][column], rel=1e-9)


def test_judged_users_are_those_with_relevant_items(golden):
    values = ranking_metrics(golden["natural_topk_items"], golden_relevant(golden), [5])
    for value in values.values():
        np.testing.assert_array_equal(np.flatnonzero(~np.isnan(value)), golden["eval_users"])


def test_lists_longer_than_the_cutoff():
    """A second stored case: six users, lists of seven, judged at five."""
    top = np.array(
        [
            [5, 16, 13, 1, 3, 0, 18],
            [5, 14, 9, 19, 4, 1, 13],
            [17, 16, 0, 19, 7, 11, 2],
            [8, 7, 4, 3, 11, 19, 0],
            [5, 14, 16, 9, 6, 2, 7],
            [6, 19, 3, 17, 15, 8, 10],
        ]
    )
    relevant = csr_from_lists(
        [[2, 4], [0, 2, 3, 7, 8, 9, 16, 18], [3, 5, 6, 7, 8, 11, 16], [0, 3, 4, 12, 13], [11, 16], [11]], 20
    )
    found = means(ranking_metrics(top, relevant, [5]))
    wanted = [0.2, 0.21845238095238095, 0.1894989156243202, 2 / 3, 0.25, 0.09666666666666666]
    assert [found[f"{name}@5"] for name in NAMES] == pytest.approx(wanted, rel=1e-12)


def test_hand_example():
    found = means(ranking_metrics(np.array([[2, 9, 1, 8, 7]]), csr_from_lists([[1, 2, 3]], 10), [5]))
    ideal = 1 + 1 / np.log2(3) + 0.5
    wanted = {"precision": 0.4, "recall": 2 / 3, "ndcg": 1.5 / ideal, "hit": 1.0, "mrr": 1.0, "map": (1 + 2 / 3) / 3}
    assert found == pytest.approx({f"{name}@5": value for name, value in wanted.items()})
    assert found["ndcg@5"] == pytest.approx(0.7039, abs=5e-5)


@pytest.mark.parametrize(("k", "size"), [(1, 3), (3, 3), (5, 3), (5, 8)])
def test_perfect_ranking(k, size):
    top = np.arange(max(k, size))[None, :k]
    found = means(ranking_metrics(top, csr_from_lists([list(range(size))], 20), [k]))
    perfect = {"precision": min(1, size / k), "recall": min(1, k / size), "ndcg": 1, "hit": 1, "mrr": 1, "map": 1}
    assert found == pytest.approx({f"{name}@{k}": value for name, value in perfect.items()})


def test_the_last_item_of_the_row_before_is_no_hit_of_an_empty_place():
    relevant = csr_from_lists([[4], [1]], 5)
    assert not find_hits(np.array([[-1, -1], [-1, -1]]), relevant).any()
    assert find_hits(np.array([[4, -1], [4, 1]]), relevant).tolist() == [[True, False], [False, True]]


def test_hits_with_unsorted_rows_and_without_any():
    unsorted = sp.csr_array((np.ones(3), np.array([4, 0, 2]), np.array([0, 3])), shape=(1, 5))
    assert find_hits(np.array([[0, 1, 2, 4]]), unsorted).tolist() == [[True, False, True, True]]
    assert not find_hits(np.array([[0, 1]]), sp.csr_array((1, 5))).any()
    with pytest.raises(ValueError, match="2 lists but 1 rows"):
        find_hits(np.zeros((2, 1), dtype=np.int64), unsorted)


def test_keys_beyond_32_bits():
    rows, num_items = 70_000, 70_000
    relevant = csr_from_pairs(np.array([69_999]), np.array([69_998]), rows, num_items)
    top = np.full((rows, 1), 69_998)
    assert np.flatnonzero(find_hits(top, relevant)[:, 0]).tolist() == [69_999]


def test_repeated_relevant_items_count_once():
    once, twice = csr_from_lists([[1, 2, 3]], 9), csr_from_lists([[1, 2, 3, 2, 1, 1]], 9)
    top = np.array([[2, 5, 1]])
    assert means(ranking_metrics(top, once, [1, 3])) == means(ranking_metrics(top, twice, [1, 3]))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 25), st.integers(0, 8))
def test_metrics_equal_the_loops_and_keep_their_bounds(seed, num_users, num_items, most):
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(1, num_items + 1))
    top = np.array([rng.permutation(num_items)[:longest] for _ in range(num_users)])
    top[np.arange(longest)[None] >= rng.integers(0, longest + 1, num_users)[:, None]] = -1
    lists = [rng.permutation(num_items)[: rng.integers(0, most + 1)] for _ in range(num_users)]
    ks = sorted({1, longest, int(rng.integers(1, longest + 1))})
    relevant = csr_from_lists(lists, num_items)
    values = ranking_metrics(top, relevant, ks)
    variants = {d: ranking_metrics(top, relevant, ks, map_denominator=d) for d in ("k", "n")}
    for u, wanted in enumerate(lists):
        for k in ks:
            mine = {name: values[f"{name}@{k}"][u] for name in NAMES}
            if len(wanted) == 0:
                assert all(np.isnan(value) for value in mine.values())
                continue
            oracle = reference.reference_metrics(top[u].tolist(), set(wanted.tolist()), k)
            mine |= {f"map_{d}": value[f"map@{k}"][u] for d, value in variants.items()}
            assert mine == pytest.approx({name: oracle[f"{name}@{k}"] for name in mine}, abs=1e-12)
            assert all(-1e-12 <= value <= 1 + 1e-12 for value in mine.values())


def test_means_leave_out_users_without_a_value():
    values = {"a": np.array([1.0, np.nan, 0.0]), "none": np.array([np.nan, np.nan, np.nan])}
    found = means(values)
    assert found == {"a": 0.5} and type(found["a"]) is float
    assert means(values, ["a"]) == {"a": 0.5}


def test_wrong_requests():
    top, relevant = np.zeros((1, 3), dtype=np.int64), csr_from_lists([[1]], 4)
    with pytest.raises(ValueError, match="length 3 cannot be judged at 4"):
        ranking_metrics(top, relevant, [2, 4])
    with pytest.raises(ValueError, match="denominator 'max'"):
        average_precision(find_hits(top, relevant), np.array([1]), 3, "max")


def test_nothing_relevant_is_no_value():
    hits, sizes = np.zeros((1, 2), dtype=bool), np.array([0])
    assert np.isnan([recall(hits, sizes, 2)[0], ndcg(hits, sizes, 2)[0]]).all()
    assert np.isnan([average_precision(hits, sizes, 2, d)[0] for d in ("min", "k", "n")]).all()


def test_graded_ndcg_against_a_plain_loop():
    rng = np.random.default_rng(4)
    top = np.array([rng.permutation(12)[:6] for _ in range(5)])
    ratings = [{int(i): int(rng.integers(1, 6)) for i in rng.permutation(12)[:size]} for size in (1, 3, 7, 9, 0)]
    dense = np.zeros((5, 12))
    for row, rated in enumerate(ratings):
        for item, rating in rated.items():
            dense[row, item] = rating
    for name, gain in (("linear", lambda r: r), ("exp", lambda r: 2**r - 1), ("exp1", lambda r: 2 ** (r + 1) - 1)):
        found = ranking_metrics(top, sp.csr_array(dense), [4], graded=name)["graded_ndcg@4"]
        for row, rated in enumerate(ratings):
            gained = sum(gain(rated[i]) / np.log2(n + 2) for n, i in enumerate(top[row, :4].tolist()) if i in rated)
            best = sum(gain(r) / np.log2(n + 2) for n, r in enumerate(sorted(rated.values(), reverse=True)[:4]))
            assert found[row] == pytest.approx(gained / best) if rated else np.isnan(found[row])
    with pytest.raises(ValueError, match="unknown gain"):
        ranking_metrics(top, sp.csr_array(dense), [4], graded="stars")


def test_an_item_twice_in_a_list_counts_once():
    relevant = csr_from_lists([[3], [1, 2]], 5)
    found = ranking_metrics(np.array([[3, 3, 0], [1, 1, 2]]), relevant, [3])
    np.testing.assert_allclose(found["recall@3"], [1, 1])
    np.testing.assert_allclose(found["precision@3"], [1 / 3, 2 / 3])
    np.testing.assert_allclose(found["map@3"], [1, (1 + 2 / 3) / 2])
