"""Vectors in other tools' hands give our top 20."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.base.errors import UserError
from gfml.data.options import load_dataset
from gfml.gravity import Gravity, GravityScorer
from gfml.program.vectors import for_tools
from gfml.ranking.topk import DenseScorer, topk_items

TOP = 20


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A gravity model with masses, the folder of its export, and our lists with and without seen items."""
    torch.manual_seed(0)
    data = load_dataset("demo", demo_users=80, demo_items=120, demo_interactions=2000, cache=False)
    gravity = Gravity(data.num_users, data.num_items, mass="item", lamb=2.0)
    torch.nn.init.normal_(gravity.mass.item)
    scorer = GravityScorer(gravity, torch.randn(data.num_users, 8), torch.randn(data.num_items, 8))
    out = tmp_path_factory.mktemp("export")
    for_tools(scorer, data, out)
    users = torch.arange(data.num_users)
    unseen = topk_items(scorer, users, TOP, seen=data.train_and_valid).numpy()
    return SimpleNamespace(out=out, data=data, all=topk_items(scorer, users, TOP, seen=None).numpy(), unseen=unseen)


def read(case, name):
    return np.load(case.out / f"{name}.npy")


def test_arrays_and_names(case):
    user, item = read(case, "user"), read(case, "item")
    assert user.dtype == item.dtype == np.float32 and item.flags.c_contiguous
    assert (np.argsort(-(user @ item.T), axis=1, kind="stable")[:, :TOP] == case.all).all()
    near, far = read(case, "user_l2").astype(float), read(case, "item_l2").astype(float)
    distance = ((near[:, None] - far[None]) ** 2).sum(-1)
    assert (np.argsort(distance, axis=1)[:, :TOP] == case.all).mean() > 0.999
    np.testing.assert_allclose(np.linalg.norm(far, axis=1), np.linalg.norm(far, axis=1).max(), rtol=1e-5)
    assert len((case.out / "items.txt").read_text().splitlines()) == case.data.num_items
    seen = sp.load_npz(case.out / "seen.npz")
    assert (seen != case.data.train_and_valid).nnz == 0


def test_scikit_learn(case):
    from sklearn.neighbors import NearestNeighbors

    for metric in ("euclidean", "cosine"):
        index = NearestNeighbors(n_neighbors=TOP, metric=metric, algorithm="brute").fit(read(case, "item_l2"))
        found = index.kneighbors(read(case, "user_l2"), return_distance=False)
        assert (found == case.all).mean() > 0.999


def test_faiss(case):
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed (extra ann)")
    _, found = faiss.read_index(str(case.out / "index.faiss")).search(read(case, "user"), TOP)
    assert (found == case.all).mean() > 0.999
    index = faiss.IndexFlatL2(read(case, "item_l2").shape[1])
    index.add(read(case, "item_l2"))
    assert (index.search(read(case, "user_l2"), TOP)[1] == case.all).mean() > 0.99


def test_implicit(case):
    als = pytest.importorskip("implicit.cpu.als", reason="implicit is not installed; a tool of others")
    model = als.AlternatingLeastSquares.load(str(case.out / "implicit.npz"))
    seen = sp.csr_matrix(sp.load_npz(case.out / "seen.npz"))
    found, _ = model.recommend(np.arange(case.data.num_users), seen, N=TOP)
    assert (found == case.unseen).mean() > 0.999


def test_rectools(case):
    rank = pytest.importorskip("rectools.models.rank", reason="rectools is not installed; a tool of others")
    ranker = rank.ImplicitRanker(rank.Distance.DOT, read(case, "user"), read(case, "item"))
    seen = sp.csr_matrix(sp.load_npz(case.out / "seen.npz"))
    users, items, _ = map(np.asarray, ranker.rank(np.arange(case.data.num_users), k=TOP, filter_pairs_csr=seen))
    found = np.array([items[users == user] for user in range(case.data.num_users)])
    assert (found == case.unseen).mean() > 0.999


def test_annoy(case):
    annoy = pytest.importorskip("annoy", reason="annoy is not installed; a tool of others")
    for metric, suffix in (("dot", ""), ("angular", "_l2"), ("euclidean", "_l2")):
        user, item = read(case, f"user{suffix}"), read(case, f"item{suffix}")
        index = annoy.AnnoyIndex(item.shape[1], metric)
        index.set_seed(1)
        for number, vector in enumerate(item):
            index.add_item(number, vector)
        index.build(20)
        found = [index.get_nns_by_vector(vector, TOP, search_k=100_000) for vector in user]
        assert np.mean([one == ours.tolist() for one, ours in zip(found, case.all, strict=True)]) > 0.98, metric


def test_scores_without_vectors(case, tmp_path):
    with pytest.raises(UserError, match="no inner product"):
        for_tools(DenseScorer(torch.zeros(3, 3)), case.data, tmp_path)
