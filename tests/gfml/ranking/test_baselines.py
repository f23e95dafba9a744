from __future__ import annotations

import gzip
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.ranking import baselines
from gfml.ranking.baselines import ease, item_knn, popularity, select
from gfml.ranking.evaluation import evaluate
from gfml.ranking.ials import ials
from gfml.ranking.topk import Scorer, topk_items


def block_model(num_users: int = 40, num_items: int = 25, seed: int = 0) -> Interactions:
    """Two groups of users with a taste each, the last item never in train; one part each for valid and test."""
    rng = np.random.default_rng(seed)
    taste = (np.arange(num_users)[:, None] % 2) == (np.arange(num_items)[None, :] % 2)
    chosen = rng.random((num_users, num_items)) < np.where(taste, 0.5, 0.05)
    chosen[:, -1] = False
    users, items = np.nonzero(chosen)
    part = rng.permutation(len(users)) % 5
    parts = [csr_from_pairs(users[m], items[m], num_users, num_items) for m in (part < 3, part == 3, part == 4)]
    return Interactions("blocks", *parts)


def all_scores(scorer: Scorer) -> np.ndarray:
    return scorer.score(torch.arange(scorer.num_users)).numpy()


def knn_by_loops(train: np.ndarray, k: int, shrink: float, similarity: str) -> np.ndarray:
    num_users, num_items = train.shape
    s = np.zeros((num_items, num_items))
    for i in range(num_items):
        for j in range(num_items):
            common, n_i, n_j = (train[:, i] * train[:, j]).sum(), train[:, i].sum(), train[:, j].sum()
            if i != j and common > 0:
                below = np.sqrt(n_i * n_j) if similarity == "cosine" else n_i + n_j - common
                s[i, j] = common / (below + shrink)
    scores = np.zeros((num_users, num_items))
    for j in range(num_items):
        nearest = sorted(range(num_items), key=lambda i: (-s[i, j], i))[:k]
        for i in nearest:
            scores[:, j] += train[:, i] * s[i, j]
    return scores


def ease_by_ridge(train: np.ndarray, l2: float) -> np.ndarray:
    """Each item regressed on all the others."""
    num_items = train.shape[1]
    weights = np.zeros((num_items, num_items))
    for j in range(num_items):
        others = np.delete(np.arange(num_items), j)
        X = train[:, others]
        weights[others, j] = np.linalg.solve(X.T @ X + l2 * np.eye(num_items - 1), X.T @ train[:, j])
    return weights


# ---------------------------------------------------------------------- popularity


def test_popularity_scores_train_counts():
    data = block_model()
    expected = np.tile(data.train.toarray().sum(0), (data.num_users, 1))
    assert np.array_equal(all_scores(popularity(data)), expected)


def test_popularity_ranks_equal_counts_by_item():
    data = Interactions("ties", *[csr_from_pairs(u, i, 3, 5) for u, i in (([0, 1, 2], [3, 3, 1]), ([], []), ([], []))])
    assert topk_items(popularity(data), torch.tensor([0]), 5, seen=None).tolist() == [[3, 1, 0, 2, 4]]


# ---------------------------------------------------------------------- item neighbours


@pytest.mark.parametrize("similarity", ["cosine", "jaccard"])
@pytest.mark.parametrize("k, shrink", [(1, 0.0), (4, 0.0), (4, 7.5), (100, 2.0)])
def test_item_knn_equals_loops(similarity, k, shrink):
    data = block_model()
    scorer = item_knn(data, k=k, shrink=shrink, similarity=similarity)
    expected = knn_by_loops(data.train.toarray().astype(float), k, shrink, similarity)
    np.testing.assert_allclose(all_scores(scorer), expected, rtol=1e-5, atol=1e-6)
    assert np.diff(scorer.weights.T.tocsr().indptr).max() <= k


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 12), st.integers(1, 8))
def test_item_knn_equals_loops_on_tiny_data_with_ties(seed, k, num_users, num_items):
    chosen = np.random.default_rng(seed).random((num_users, num_items)) < 0.4
    train = csr_from_pairs(*np.nonzero(chosen), num_users, num_items)
    empty = csr_from_pairs(np.empty(0), np.empty(0), num_users, num_items)
    scorer = item_knn(Interactions("tiny", train, empty, empty), k=k)
    expected = knn_by_loops(chosen.astype(float), k, 0.0, "cosine")
    np.testing.assert_allclose(all_scores(scorer), expected, rtol=1e-5, atol=1e-6)


def test_item_knn_does_not_depend_on_blocks_or_threads(monkeypatch, threads):
    data = block_model(200, 60)
    whole = item_knn(data, k=5).weights
    monkeypatch.setattr(baselines, "ITEMS", 7)
    for number in (1, 2, 4):
        threads(number)
        parted = item_knn(data, k=5).weights
        assert (whole != parted).nnz == 0 and whole.nnz == parted.nnz


@pytest.mark.parametrize(
    "given, words",
    [
        ({"k": 0}, "found k=0"),
        ({"k": 2.5}, "found k=2.5"),
        ({"shrink": -1.0}, "found shrink=-1.0"),
        ({"shrink": float("nan")}, "found shrink=nan"),
        ({"similarity": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_item_knn_refuses_bad_settings(given, words):
    with pytest.raises(UserError, match=words):
        item_knn(block_model(), **given)


# ---------------------------------------------------------------------- EASE


@pytest.mark.parametrize("block", [512, 7])
@pytest.mark.parametrize("l2", [0.5, 20.0])
def test_ease_equals_a_ridge_regression_per_item(l2, block, monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK", block)
    data = block_model()
    expected = ease_by_ridge(data.train.toarray().astype(float), l2)
    scorer = ease(data, l2)
    assert scorer.weights.dtype == torch.float32
    np.testing.assert_allclose(scorer.weights.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert not scorer.weights.diagonal().any()
    np.testing.assert_allclose(all_scores(scorer), data.train.toarray() @ expected, rtol=1e-5, atol=1e-5)


def test_ease_in_float32_where_float64_does_not_fit():
    data = block_model()
    pairs = data.num_items**2
    single = ease(data, 5.0, memory_gib=5 * pairs / 2**30).weights
    double = ease(data, 5.0, memory_gib=12 * pairs / 2**30).weights
    assert not torch.equal(single, double)
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-5)


def test_ease_says_how_much_memory_it_needs():
    empty = sp.csr_array((3, 60_000), dtype=np.float32)
    with pytest.raises(UserError, match=r"60000 items needs 13\.41 GiB, the limit is 8 GiB"):
        ease(Interactions("wide", empty, empty, empty), 50.0)


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan"), float("inf")])
def test_ease_refuses_a_bad_l2(l2):
    with pytest.raises(UserError, match="wanted a finite number above 0"):
        ease(block_model(), l2)


# ---------------------------------------------------------------------- all of them

BUILDERS = {
    "popularity": popularity,
    "item_knn": lambda d: item_knn(d, k=8),
    "ease": lambda d: ease(d, 10.0),
    "ials": lambda d: ials(d, 0.05, 0.1, dim=8),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_scorer_protocol(name):
    data = block_model()
    scorer = BUILDERS[name](data)
    assert isinstance(scorer, Scorer)
    users = torch.tensor([7, 0, 7])
    scores = scorer.score(users)
    assert scores.shape == (3, data.num_items) and scores.is_floating_point()
    torch.testing.assert_close(scores, torch.from_numpy(all_scores(scorer))[users], rtol=1e-5, atol=1e-6)
    scores.fill_(-1)
    assert (scorer.score(users) > 0).any()  # the caller's scribbling reached nothing
    assert torch.equal(scorer.score(users), BUILDERS[name](data).score(users))


@pytest.mark.parametrize("name", BUILDERS)
def test_only_train_is_read(name):
    data = block_model()
    empty = csr_from_pairs(np.empty(0), np.empty(0), data.num_users, data.num_items)
    bare = Interactions("train only", data.train, empty, empty)
    assert np.array_equal(all_scores(BUILDERS[name](data)), all_scores(BUILDERS[name](bare)))


@pytest.mark.parametrize("name", ["item_knn", "ease", "ials"])
def test_planted_tastes_are_found(name):
    data = block_model(200, 40)
    found = evaluate(BUILDERS[name](data), data, "test", [10]).means["recall@10"]
    assert found > 1.3 * evaluate(popularity(data), data, "test", [10]).means["recall@10"]


def test_a_user_without_history_gets_zeros():
    train = csr_from_pairs(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2]), 3, 4)
    empty = csr_from_pairs(np.empty(0), np.empty(0), 3, 4)
    data = Interactions("cold", train, empty, empty)
    for scorer in (item_knn(data), ease(data, 1.0), ials(data, 0.1, 0.1, dim=4)):
        assert not scorer.score(torch.tensor([2])).any()
        assert scorer.score(torch.empty(0, dtype=torch.int64)).shape == (0, 4)


# ---------------------------------------------------------------------- choice on the validation part


@pytest.fixture
def landscape(monkeypatch):
    """landscape(values, calls): a builder of scorers whose ndcg@20 on valid is values[a, b]."""

    def build(values, calls):
        monkeypatch.setattr(
            baselines,
            "evaluate",
            lambda scorer, data, split, ks: SimpleNamespace(means={f"ndcg@{ks[0]}": scorer[split]}),
        )
        return lambda a, b: calls.append((a, b)) or {"valid": values[a, b]}

    return build


def test_selection_climbs_from_the_middle_to_the_best_point(landscape):
    calls: list[tuple[int, int]] = []
    a, b = np.meshgrid(np.arange(7), np.arange(5), indexing="ij")
    values = 1.0 - 0.02 * ((a - 6) ** 2 + (b - 1) ** 2)
    choice = select(landscape(values, calls), block_model(), {"a": range(7), "b": range(5)})
    assert choice.settings == {"a": 6, "b": 1} and choice.scorer == {"valid": 1.0}
    assert calls[0] == (3, 2) and len(calls) == len(set(calls)) < 15
    assert choice.scores == [({"a": a, "b": b}, values[a, b]) for a, b in calls]


def test_selection_of_one_point_and_of_equal_points(landscape):
    data, calls = block_model(), []
    assert select(landscape(np.ones((9, 9)), calls), data, {"a": [4], "b": [7]}).settings == {"a": 4, "b": 7}
    assert calls == [(4, 7)]
    assert select(landscape(np.ones((9, 9)), calls), data, {"a": [1, 2, 3], "b": [5]}).settings == {"a": 2, "b": 5}


def test_selection_never_reads_test():
    data = block_model(200, 40)
    empty = csr_from_pairs(np.empty(0), np.empty(0), data.num_users, data.num_items)
    grid = {"k": (1, 5, 15), "shrink": (0.0, 5.0)}
    choice = select(partial(item_knn, data), data, grid)
    without_test = Interactions("no test", data.train, data.valid, empty)
    assert select(partial(item_knn, without_test), without_test, grid).scores == choice.scores
    assert np.array_equal(all_scores(choice.scorer), all_scores(item_knn(data, **choice.settings)))


def test_selection_needs_a_validation_part():
    data = block_model()
    with pytest.raises(UserError, match="no validation part"):
        select(partial(ease, data), data.refit(), {"l2": [1.0]})
    with pytest.raises(ValueError, match="no values"):
        select(partial(ease, data), data, {"l2": []})


# ---------------------------------------------------------------------- known results on real data


def read_adjacency(path) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(path, "rt") as file:
        rows = [np.array(line.split(), dtype=np.int64) for line in file]
    return np.concatenate([np.full(len(r) - 1, r[0]) for r in rows]), np.concatenate([r[1:] for r in rows])


def amazon(root, name: str, num_users: int, num_items: int) -> Interactions:
    train, test = (
        csr_from_pairs(*read_adjacency(root / f"mcl-amazon-{name}" / f"{part}.txt.gz"), num_users, num_items)
        for part in ("train", "test")
    )
    return Interactions(name, train, csr_from_pairs(np.empty(0), np.empty(0), num_users, num_items), test)


def check_anchor(scorer: Scorer, data: Interactions, recall: list[float], ndcg: list[float]) -> None:
    found = evaluate(scorer, data, "test", [5, 10, 20]).means
    assert [found[f"recall@{k}"] for k in (5, 10, 20)] == pytest.approx(recall, abs=1e-4)
    assert [found[f"ndcg@{k}"] for k in (5, 10, 20)] == pytest.approx(ndcg, abs=1e-4)


def test_anchors_music(shared_data):
    data = amazon(shared_data, "digital-music", 5541, 3568)
    check_anchor(popularity(data), data, [0.0160, 0.0310, 0.0565], [0.0115, 0.0170, 0.0240])
    check_anchor(ease(data, 50.0), data, [0.1649, 0.2200, 0.2876], [0.1245, 0.1440, 0.1637])
    check_anchor(ease(data, 200.0), data, [0.1586, 0.2142, 0.2811], [0.1200, 0.1396, 0.1589])


def test_anchors_grocery_popularity(shared_data):
    data = amazon(shared_data, "grocery", 14681, 8713)
    check_anchor(popularity(data), data, [0.0141, 0.0269, 0.0476], [0.0114, 0.0160, 0.0218])


@pytest.mark.slow
def test_anchors_grocery_ease(shared_data):
    data = amazon(shared_data, "grocery", 14681, 8713)
    check_anchor(ease(data, 50.0), data, [0.0666, 0.0951, 0.1332], [0.0514, 0.0614, 0.0724])
    check_anchor(ease(data, 200.0), data, [0.0652, 0.0970, 0.1362], [0.0493, 0.0606, 0.0719])
