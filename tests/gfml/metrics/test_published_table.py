"""The ItemKNN row of a published table in which three frameworks judge one list: the definitions explain its columns.

Source: the cross-framework table of WarpRec's benchmark of 2026 (ItemKNN trained as RecBole does, MovieLens-1M, the last 10 % by
time as test). Its NDCG is .0884 for RecBole and .0724 for Elliot and WarpRec, its MAP .0406 and Elliot's .0767.
"""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.metrics.conventions import Case, judge_as
from gfml.metrics.ranking import ranking_metrics
from gfml.ranking.baselines import item_knn
from gfml.ranking.topk import topk_items

PUBLISHED = {
    "recbole": {"precision@10": 0.0692, "recall@10": 0.0695, "mrr@10": 0.1760, "ndcg@10": 0.0884, "map@10": 0.0406},
    "elliot": {"precision@10": 0.0692, "recall@10": 0.0695, "mrr@10": 0.1760, "ndcg@10": 0.0724, "map@10": 0.0767},
    "warprec": {"precision@10": 0.0692, "recall@10": 0.0695, "mrr@10": 0.1760, "ndcg@10": 0.0724, "map@10": 0.0406},
}


@pytest.fixture(scope="module")
def case(shared_data) -> Case:
    folder = shared_data / "ml-1m"
    if not (folder / "warprec_test.tsv.gz").is_file():
        pytest.skip("the published test part of MovieLens-1M is not at hand")
    with np.load(folder / "interactions.npz", allow_pickle=False) as stored:
        users, items = stored["user"].astype(np.int64), stored["movie"].astype(np.int64)
    with gzip.open(folder / "warprec_test.tsv.gz") as stream:
        test = np.loadtxt(stream, dtype=np.int64)
    names, movies = np.unique(users), np.unique(items)
    shape = (len(names), len(movies))
    every = np.searchsorted(names, users) * shape[1] + np.searchsorted(movies, items)
    held = np.searchsorted(names, test[:, 0]) * shape[1] + np.searchsorted(movies, test[:, 1])
    train = csr_from_pairs(*np.divmod(every[~np.isin(every, held)], shape[1]), *shape)
    assert train.nnz == 897_477
    truth = sp.coo_array((test[:, 2].astype(float), np.divmod(held, shape[1])), shape=shape).tocsr()
    truth.sort_indices()
    nothing = csr_from_pairs(np.empty(0, int), np.empty(0, int), *shape)
    data = Interactions("ml-1m", train, nothing, csr_from_pairs(*np.divmod(held, shape[1]), *shape))
    judged = np.flatnonzero(np.diff(truth.indptr))
    top = np.full((shape[0], 10), -1, dtype=np.int64)
    top[judged] = topk_items(item_knn(data, k=10), torch.from_numpy(judged), 10, seen=train).numpy()
    return Case(top, truth, train)


@pytest.mark.parametrize("framework", PUBLISHED)
def test_columns(framework: str, case: Case) -> None:
    means = judge_as(framework, case, [10]).means
    for name, value in PUBLISHED[framework].items():
        # Four digits were printed; which of equally similar items is a neighbour moves the fourth by one.
        assert means[name] == pytest.approx(value, abs=1.5e-4), name


def test_it_is_the_gain_and_not_the_logarithm(case: Case) -> None:
    judged = np.flatnonzero(case.num_relevant)
    found = {}
    for graded in ("linear", "exp", "exp1"):
        values = ranking_metrics(case.top[judged], case.truth[judged], [10], graded=graded)
        found[graded] = float(values["graded_ndcg@10"].mean())
    assert found == pytest.approx({"linear": 0.0802, "exp": 0.0720, "exp1": 0.0724}, abs=1.5e-4)
