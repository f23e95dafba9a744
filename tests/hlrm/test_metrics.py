"""The published formulas on hand-counted lists, and the cohorts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from hlrm.metrics import NAMES, cohort_metrics, cohorts, median_popularity, paper_metrics


def case(hits, size):
    """One list of len(hits) items; ``size`` relevant ones, of which those with a 1 are in the list."""
    top = np.arange(len(hits))[None]
    extra = len(hits) + np.arange(size - sum(hits))
    columns = np.concatenate([np.flatnonzero(hits), extra])
    relevant = sp.csr_array((np.ones(size, np.float32), columns, [0, size]), shape=(1, len(hits) + size))
    return top, relevant


@pytest.mark.parametrize(
    ("hits", "size", "wanted"),
    [
        # hitrate, map, mrr, ndcg, prec, rec, ndcg_local
        ([0, 1, 0, 0, 1], 3, [2 / 3, 0.18, 0.7, 0.477624, 0.4, 2 / 3, 0.624051]),
        ([1, 0, 0, 0, 0], 8, [0.125, 0.2, 1.0, 0.339160, 0.2, 0.125, 1.0]),
        ([1, 1, 1, 0, 0], 3, [1.0, 0.6, 11 / 6, 1.0, 0.6, 1.0, 1.0]),
    ],
)  # fmt: skip
def test_hand_counted(hits, size, wanted):
    found = paper_metrics(*case(hits, size), 5)
    assert {name: float(value[0]) for name, value in found.items()} == pytest.approx(
        dict(zip(NAMES, wanted, strict=True)), abs=1e-6
    )


def test_users_without_hits_or_without_relevant_items():
    found = paper_metrics(*case([0, 0, 0], 2), 3)
    assert np.isnan(found["ndcg_local"][0]) and found["map"][0] == found["mrr"][0] == found["ndcg"][0] == 0
    empty = sp.csr_array((1, 5), dtype=np.float32)
    assert all(np.isnan(value[0]) for value in paper_metrics(np.array([[0, 1]]), empty, 2).values())


def test_the_port_sorts_hits_beyond_the_cut_off():
    top, relevant = case([0, 1, 0, 1], 2)
    assert paper_metrics(top, relevant, 2)["ndcg_local"][0] == pytest.approx(1 / np.log2(3))
    assert paper_metrics(top, relevant, 2, whole_list=True)["ndcg_local"][0] == pytest.approx(
        1 / np.log2(3) / (1 + 1 / np.log2(3))
    )


@pytest.mark.parametrize(
    ("users", "size", "number", "wanted"),
    [(100, 10, 5, [10] * 5), (23, 10, 5, [4] * 5), (3, 10, 5, [1] * 3), (60, 10, 1, [10])],
)
def test_cohorts_are_disjoint_and_repeatable(users, size, number, wanted):
    groups = cohorts(users, size, number, seed=1)
    assert list(map(len, groups)) == wanted
    members = np.concatenate(groups)
    assert len(set(members.tolist())) == len(members) and members.max() < users
    assert all(np.array_equal(a, b) for a, b in zip(groups, cohorts(users, size, number, seed=1), strict=True))


def test_cohort_means_and_deviations():
    top, relevant = np.array([[0, 1], [1, 0], [2, 3], [0, 2]]), sp.csr_array(np.eye(4, dtype=np.float32))
    popularity = np.array([9, 5, 2, 1])
    found = cohort_metrics(top, relevant, popularity, 2, [np.array([0, 1]), np.array([2, 3])])
    assert found["rec@2"] == pytest.approx({"mean": 0.75, "std": np.std([1.0, 0.5], ddof=1)})  # users 0, 1, 2 hit
    assert found["mmr@2"]["mean"] == pytest.approx((7 + 2) / 2)
    assert median_popularity(np.array([[0, 0], [1, -1]]), popularity) == 7
