"""Figures of other conventions from a model's own scores, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.ranking.evaluation import Definitions, evaluate


class Table:
    """Scores from a table."""

    def __init__(self, scores):
        self.table = torch.from_numpy(scores)
        self.num_users, self.num_items = scores.shape

    def factors(self):
        return None

    def score(self, users):
        return self.table[users]


@pytest.fixture
def judged():
    rng = np.random.default_rng(3)
    users, items = np.divmod(rng.permutation(30 * 25)[:400], 25)
    train, test = slice(0, 250), slice(250, 400)
    keep = items[test] != 7  # so that some item is in test alone
    parts = [csr_from_pairs(users[train][items[train] != 24], items[train][items[train] != 24], 30, 25),
             csr_from_pairs(np.empty(0, int), np.empty(0, int), 30, 25),
             csr_from_pairs(users[test][keep], items[test][keep], 30, 25)]  # fmt: skip
    data = Interactions("toy", *parts)
    scores = rng.normal(size=(30, 25))
    names = ("recbole", "warprec", "elliot", "rectools", "cornac", "mmrec", "lightgcn", "trec")
    return data, scores, evaluate(Table(scores), data, "test", [3, 5], definitions=Definitions(names, "k"))


def test_the_whole_ranking_of_cornac(judged):
    data, scores, found = judged
    values = []
    for user in range(30):
        own = {int(i) for i in data.train[[user]].indices}
        truth = [int(i) for i in data.test[[user]].indices if data.item_popularity[i]]
        candidates = [i for i in range(25) if data.item_popularity[i] and (i not in own or i in truth)]
        if truth and own:
            ranks = dict(zip(candidates, rankdata(-scores[user, candidates], "max"), strict=True))
            among = rankdata(-scores[user, truth], "max")
            values.append(np.mean([a / ranks[i] for a, i in zip(among, truth, strict=True)]))
    assert found.means["cornac:map"] == pytest.approx(np.mean(values), abs=1e-12)


def test_columns_of_every_convention(judged):
    data, _, found = judged
    for name in ("recbole", "elliot", "rectools", "lightgcn", "trec"):
        assert found.means[f"{name}:precision@5"] == pytest.approx(found.means["precision@5"]), name
    assert found.means["rectools:ndcg@5"] < found.means["ndcg@5"]
    assert found.means["trec:map@5"] != found.means["recbole:map@5"]
    assert found.per_user["elliot:ndcg@3"].shape == found.users.shape
    usual = evaluate(Table(judged[1]), data, "test", [3, 5])
    assert usual.means["map@5"] == pytest.approx(found.means["recbole:map@5"])
    assert found.means["map@5"] < usual.means["map@5"]  # divided by K
