from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.ranking.evaluation import evaluate
from gfml.ranking.topk import DenseScorer, FactorScorer

HERE = Path(__file__).resolve().parent
reference = SimpleNamespace(**runpy.run_path(str(HERE / "reference_eval.py")))


def random_data(seed, num_users, num_items, density=0.3):
    """Each cell is train, valid, test or nothing; user 0 has no train item."""
    rng = np.random.default_rng(seed)
    part = rng.choice(4, size=(num_users, num_items), p=[density / 2, density / 4, density / 4, 1 - density])
    part[0][part[0] == 0] = 3
    return Interactions("random", *(csr_from_pairs(*np.nonzero(part == p), num_users, num_items) for p in range(3)))


@pytest.mark.parametrize("split", ["valid", "test"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(0, 9), memory_mb=st.sampled_from([0.001, 256]))
def test_evaluation_equals_the_loops(split, seed, levels, memory_mb):
    data = random_data(seed, 10, 23)
    scores = np.random.default_rng(seed).integers(0, levels + 1, (10, 23)).astype(np.float64)
    if data.split(split).nnz == 0:
        return
    found = evaluate(DenseScorer(torch.from_numpy(scores)), data, split, (7, 1, 3), memory_mb=memory_mb)
    top, values = reference.reference_evaluate(scores, data, split, (1, 3, 7))
    assert found.ks == (1, 3, 7) and found.split == split
    np.testing.assert_array_equal(found.top, top)
    np.testing.assert_array_equal(found.users, np.flatnonzero(np.diff(data.split(split).indptr)))
    for name, value in found.per_user.items():
        np.testing.assert_allclose(value, values[name], atol=1e-12)
        assert found.means[name] == pytest.approx(values[name].mean())


def test_stored_means():
    g = np.load(HERE.parents[1] / "golden" / "ranking_metrics.npz", allow_pickle=False)
    shape = g["scores"].shape
    test_users = np.repeat(np.arange(shape[0]), np.diff(g["test_indptr"]))
    empty = csr_from_pairs(np.empty(0), np.empty(0), *shape)
    train = csr_from_pairs(*np.nonzero(g["train_mask"]), *shape)
    data = Interactions("stored", train, empty, csr_from_pairs(test_users, g["test_items"], *shape))
    found = evaluate(DenseScorer(torch.from_numpy(g["scores"])), data, "test", g["topks"])
    np.testing.assert_array_equal(found.users, g["eval_users"])
    for source in ("natural", "orig"):
        for name in ("precision", "recall", "ndcg"):
            ours = [found.means[f"{name}@{k}"] for k in g["topks"]]
            np.testing.assert_allclose(ours, g[f"{source}_{name}"], rtol=1e-9)


def test_beyond_adds_figures_and_changes_none():
    data = random_data(5, 40, 30)
    scorer = DenseScorer(torch.randn(40, 30, generator=torch.Generator().manual_seed(0)))
    plain, more = evaluate(scorer, data, "test", (5, 10)), evaluate(scorer, data, "test", (5, 10), beyond=True)
    assert plain.means.items() < more.means.items()
    for name in (
        "head_recall@5 tail_recall@10 q5_ndcg@5 head_exposure@10 coverage@5 gini@5 entropy@5 arp@10 aplt@5 aclt@5 "
        "novelty@5 popularity_lift@5 users_q1_recall@10 tail_train_share tail_judged_share"
    ).split():
        assert isinstance(more.means[name], float), name
    assert all(type(value) is float and value == value for value in more.means.values())
    json.dumps(more.means, allow_nan=False)
    assert set(more.per_user) <= set(more.means) | {f"cold_{m}@{k}" for m in ("recall", "ndcg") for k in (5, 10)}
    assert all(value.shape == more.users.shape for value in more.per_user.values())


def test_group_recalls_weighted_by_their_counts_are_the_micro_recall():
    data = random_data(6, 50, 40)
    scorer = DenseScorer(torch.randn(50, 40, generator=torch.Generator().manual_seed(1)))
    found = evaluate(scorer, data, "test", (8,), beyond=True)
    judged = data.test[found.users].toarray() > 0
    listed = np.zeros_like(judged)
    np.put_along_axis(listed, found.top, True, axis=1)
    order = np.argsort(-data.item_popularity, kind="stable")
    total = 0.0
    for g, group in enumerate(np.array_split(order, 5)):
        total += np.nansum(found.per_user[f"q{g + 1}_recall@8"] * judged[:, group].sum(axis=1))
    assert total / judged.sum() == pytest.approx((judged & listed).sum() / judged.sum())


def test_users_without_history_are_judged_and_counted():
    train = csr_from_pairs([1, 1], [0, 1], 3, 6)
    test = csr_from_pairs([0, 1], [4, 5], 3, 6)
    data = Interactions("cold", train, csr_from_pairs([], [], 3, 6), test)
    found = evaluate(DenseScorer(torch.arange(6.0).expand(3, 6)), data, "test", (2,), beyond=True)
    assert found.cold_users == 1 and found.users.tolist() == [0, 1]
    assert found.top.tolist() == [[5, 4], [5, 4]]
    assert found.means["recall@2"] == 1 and found.means["mrr@2"] == 0.75
    assert found.means["popularity_lift@2"] == -1  # of user 1 alone


def test_a_user_who_has_seen_everything_else():
    train = csr_from_pairs([0, 0, 0], [0, 1, 2], 1, 4)
    data = Interactions("full", train, csr_from_pairs([], [], 1, 4), csr_from_pairs([0], [3], 1, 4))
    found = evaluate(DenseScorer(torch.zeros(1, 4)), data, "test", (2,), beyond=True)
    assert found.top.tolist() == [[3, -1]] and found.means["ndcg@2"] == 1 and found.means["precision@2"] == 0.5


def test_valid_items_are_masked_only_when_test_is_judged():
    parts = [csr_from_pairs([0], [i], 1, 5) for i in range(3)]
    data, scorer = Interactions("tiny", *parts), DenseScorer(torch.arange(5.0, 0, -1)[None])
    assert evaluate(scorer, data, "valid", (4,)).top.tolist() == [[1, 2, 3, 4]]
    assert evaluate(scorer, data, "test", (4,)).top.tolist() == [[2, 3, 4, -1]]
    assert evaluate(scorer, data, "train", (4,)).top.tolist() == [[0, 1, 2, 3]]


def test_published_masking_leaves_validation_items_in_the_test_lists():
    data = random_data(3, 8, 15)
    scores = np.random.default_rng(0).random((8, 15))
    found = evaluate(DenseScorer(torch.from_numpy(scores)), data, "test", (5,), mask_valid=False)
    for row, user in enumerate(found.users):
        left = np.where(data.train.toarray()[user] > 0, -np.inf, scores[user])
        np.testing.assert_array_equal(found.top[row], np.argsort(-left)[:5])
    usual = evaluate(DenseScorer(torch.from_numpy(scores)), data, "test", (5,))
    assert not np.array_equal(found.top, usual.top)


def test_monotone_images_give_the_same_metrics():
    data, rng = random_data(8, 30, 50), torch.Generator().manual_seed(2)
    user, item = torch.randn(30, 8, generator=rng).double(), torch.randn(50, 8, generator=rng).double()
    scores = user @ item.T
    plain = evaluate(FactorScorer(user, item), data, "test", (5, 20)).means
    for image in (scores, torch.sigmoid(scores), scores - 7, scores + user.sum(1, keepdim=True)):
        assert evaluate(DenseScorer(image), data, "test", (5, 20)).means == plain


def test_requests_that_cannot_be_served():
    data, scorer = random_data(9, 5, 10), DenseScorer(torch.zeros(5, 10))
    with pytest.raises(UserError, match="length of 11"):
        evaluate(scorer, data, "test", (11,))
    with pytest.raises(ValueError, match="cut-offs"):
        evaluate(scorer, data, "test", (0, 5))
    with pytest.raises(ValueError, match="cut-offs"):
        evaluate(scorer, data, "test", ())
    with pytest.raises(UserError, match="no valid interactions in random"):
        evaluate(scorer, data.refit(), "valid", (5,))
    with pytest.raises(ValueError, match="unknown split"):
        evaluate(scorer, data, "tests", (5,))


def test_known_items_may_be_left_in():
    """Without the mask the lists are those of the bare scores, so known items take places of new ones."""
    data, scores = random_data(4, 12, 30), torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    seen = torch.from_numpy(data.seen("test").toarray())
    open_lists = evaluate(DenseScorer(scores + 5 * seen), data, "test", (5,), mask_seen=False)
    rows = torch.from_numpy(open_lists.users)
    assert np.array_equal(open_lists.top, (scores + 5 * seen)[rows].topk(5, dim=1).indices.numpy())
    masked = evaluate(DenseScorer(scores + 5 * seen), data, "test", (5,))
    assert open_lists.means["recall@5"] <= masked.means["recall@5"]
