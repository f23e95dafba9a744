"""Operators against the stored ones of the published programs and against dense formulas."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import csr_from_pairs
from gfml.ranking.baselines import NeighbourScorer
from gfml.ranking.graph import build_graph
from gfml.ranking.neighbours import nearest_ids, nearest_rows
from gfml.ranking.sampling import seeded_generator
from mirror_grad.parts import graphs
from mirror_grad.parts.user_graph import UserGraph, filled_positions

EXACT = {"rtol": 1e-9, "atol": 1e-11}
GUARDED = {"rtol": 1e-7, "atol": 1e-7}


@pytest.fixture
def stored_graphs(stored):
    return stored("mm_graphs")


@pytest.fixture
def counted(stored_graphs):
    """The train matrix with repeated pairs counted."""
    users, items = stored_graphs["train_user"].numpy(), stored_graphs["train_item"].numpy()
    shape = int(stored_graphs["n_users"]), int(stored_graphs["n_items"])
    return sp.csr_array((np.ones(len(users)), (users, items)), shape=shape)


@pytest.fixture
def binary(counted):
    return csr_from_pairs(*counted.nonzero(), *counted.shape)


def same(found, wanted, **tolerance):
    dense = found.todense() if sp.issparse(found) else found
    np.testing.assert_allclose(dense, wanted.numpy(), **(tolerance or EXACT))


def test_normalised_user_item_graphs(stored_graphs, counted, binary):
    adjacency, simple = graphs.bipartite(counted), graphs.bipartite(binary)
    same(graphs.symmetric(simple), stored_graphs["p1a_1e-7"], **GUARDED)
    same(graphs.symmetric(simple), stored_graphs["slmrec_pre"], **GUARDED)
    same(graphs.symmetric(adjacency), stored_graphs["p1b_mgcn"])
    same(graphs.symmetric(adjacency)[: counted.shape[0], counted.shape[0] :], stored_graphs["r_hat_mgcn"])
    same(graphs.symmetric(adjacency), stored_graphs["p1e_dualgnn"])
    same(graphs.row_mean(graphs.with_itself(adjacency)), stored_graphs["p1c_lattice"])
    same(graphs.row_mean(adjacency), stored_graphs["mean_mmgcn"])
    same(graphs.row_mean(graphs.with_itself(adjacency)), stored_graphs["mean_self_mvgae"])
    same(simple, stored_graphs["slmrec_plain"])
    same(graphs.row_mean(graphs.with_itself(simple)), stored_graphs["slmrec_norm"])
    same(graphs.row_mean(simple), stored_graphs["slmrec_gcmc"], **GUARDED)
    same(graphs.with_itself(graphs.row_mean(simple)), stored_graphs["slmrec_mean"], **GUARDED)


def test_symmetric_graph_has_spectral_radius_one_and_the_root_of_the_degrees_as_eigenvector(binary):
    operator = graphs.symmetric(graphs.bipartite(binary)).todense()
    values = np.linalg.eigvalsh(operator)
    assert values.max() == pytest.approx(1, abs=1e-12) and values.min() >= -1 - 1e-12
    root = np.sqrt(graphs.bipartite(binary).sum(1))
    np.testing.assert_allclose(operator @ root, root, atol=1e-12)


def test_light_propagation_is_the_mean_of_matrix_powers(binary):
    light = graphs.LightPropagation(binary).double()
    nodes = torch.randn(light.graph.num_nodes, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = torch.from_numpy(np.asarray(graphs.symmetric(graphs.bipartite(binary)).todense()))
    wanted = (nodes + dense @ nodes + dense @ dense @ nodes) / 3
    torch.testing.assert_close(light(nodes, 2), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(light(nodes, 0), nodes)
    ids = torch.tensor([3, 12, 3, 0])
    torch.testing.assert_close(light.at(ids, nodes, 2), light(nodes, 2)[ids])
    user, item = light.split(nodes)
    assert len(user) == light.num_users and len(item) == light.num_items and not light.state_dict()


@pytest.mark.parametrize("name", ["image", "text"])
def test_item_graphs(stored_graphs, name):
    features = stored_graphs[f"feat_{name}"]
    same(graphs.binary_item_graph(features, 3), stored_graphs[f"p3a_{name}_k3"], **GUARDED)
    same(graphs.weighted_item_graph(features, 3), stored_graphs[f"p3b_{name}_k3"])
    found = graphs.binary_item_graph(features, 3).todense()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert (np.diag(found) > 0).all() and np.allclose(found[found > 0], 1 / 3)


def test_mixed_item_graph(stored_graphs):
    features = {name: stored_graphs[f"feat_{name}"] for name in ("image", "text")}
    same(graphs.mixed_item_graph(features, 3, 0.1), stored_graphs["p3a_mix_k3_w0.1"], **GUARDED)
    same(graphs.mixed_item_graph(features, 3, 1.0), stored_graphs["p3a_image_k3"], **GUARDED)
    same(graphs.mixed_item_graph(features, 3, 0.0), stored_graphs["p3a_text_k3"], **GUARDED)
    same(graphs.mixed_item_graph({"text": features["text"]}, 3, 0.1), stored_graphs["p3a_text_k3"], **GUARDED)


def test_shrunk_neighbours_and_their_scores(stored_graphs, counted):
    features = torch.cat([stored_graphs["feat_image"], stored_graphs["feat_text"]], 1)
    nearest = nearest_rows(features, 3, shrink=10.0)
    same(nearest, stored_graphs["p3c_item_k3_shrink10"])
    scores = NeighbourScorer(counted, nearest).score(torch.arange(counted.shape[0]))
    torch.testing.assert_close(scores.double(), stored_graphs["itemknn_scores"])


def test_blocks_do_not_change_neighbours_and_zero_rows_are_alone():
    features = torch.randn(70, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    features[[5, 40]] = 0.0
    whole = nearest_rows(features, 4)
    blocks = nearest_rows(features, 4, memory_mb=0.05)
    assert (whole != blocks).nnz == 0
    for row in (5, 40):
        assert whole[[row]].indices.tolist() == [row] and whole[[row]].data.tolist() == [1.0]
    assert np.isfinite(graphs.weighted_item_graph(features, 4).data).all()
    assert np.isfinite(graphs.binary_item_graph(features, 4).data).all()
    unit = torch.nn.functional.normalize(features, dim=1)
    expected = (unit @ unit.T)[7].topk(4).indices
    assert nearest_ids(features, 4)[7].tolist() == expected.tolist()


def test_neighbours_are_kept_by_content(tmp_path, caplog):
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    first = nearest_rows(features, 3, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    (path,) = tmp_path.iterdir()
    again = nearest_rows(features.clone(), 3, cache_dir=tmp_path)
    assert (first != again).nnz == 0 and len(list(tmp_path.iterdir())) == 1
    for other in ((features + 1e-3, 3, 0.0), (features, 4, 0.0), (features, 3, 1.0)):
        nearest_rows(other[0], other[1], shrink=other[2], cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    path.write_bytes(b"not an archive")
    with caplog.at_level(logging.WARNING, "gfml.ranking.neighbours"):
        assert (nearest_rows(features, 3, cache_dir=tmp_path) != first).nnz == 0
    assert "damaged" in caplog.text and "damaged" not in repr(nearest_rows(features, 3, cache_dir=tmp_path))


def test_bad_requests_for_neighbours():
    with pytest.raises(UserError, match="found 9 neighbours an item, wanted 1 to the 4"):
        nearest_rows(torch.randn(4, 2), 9)
    with pytest.raises(ValueError, match="NaN"):
        nearest_rows(torch.full((4, 2), torch.nan), 2)


def test_edge_weights_and_the_graph_of_kept_edges(stored_graphs, counted):
    users, items = stored_graphs["freedom_edge_order"].numpy()
    degree = counted.sum(1)[users] * counted.sum(0)[items]
    np.testing.assert_allclose(stored_graphs["freedom_edge_weight"], 1 / np.sqrt(degree), rtol=1e-6)
    kept = stored_graphs["freedom_kept_rows"].numpy()
    train = sp.csr_array((np.ones(len(kept)), (users[kept], items[kept])), shape=counted.shape)
    if train.max() == 1:
        part = csr_from_pairs(users[kept], items[kept], *counted.shape)
        same(graphs.symmetric(graphs.bipartite(part)), stored_graphs["freedom_pruned"], **GUARDED)
    same(graphs.symmetric(graphs.bipartite(train)), stored_graphs["freedom_pruned"], **GUARDED)


def test_edge_weights_of_the_toy_data(stored):
    golden, toy = stored("mm_layergcn"), stored("mm_toy")
    train = csr_from_pairs(toy["train_user"].numpy(), toy["train_item"].numpy(), 30, 24)
    order = np.lexsort((toy["train_item"].numpy(), toy["train_user"].numpy()))
    torch.testing.assert_close(graphs.edge_weights(train), golden["graph_edge_weight"][order], **GUARDED)


def test_thinned_graph(stored):
    toy = stored("mm_toy")
    train = csr_from_pairs(toy["train_user"].numpy(), toy["train_item"].numpy(), 30, 24)
    generator = torch.Generator().manual_seed(0)
    exact, published = (graphs.thinned(train, 0.8, generator, truncate=truncate) for truncate in (False, True))
    # The truncated float product 195 * (1 - 0.8) is 38.999...
    assert (exact.nnz, published.nnz) == (39, 38)
    assert (exact > train).nnz == 0
    operator = graphs.symmetric(graphs.bipartite(exact)).todense()
    np.testing.assert_array_equal(operator, operator.T)
    assert np.abs(np.linalg.eigvalsh(operator)).max() <= 1 + 1e-12
    assert graphs.thinned(train, 0.2, generator).nnz == 156
    assert (graphs.thinned(train, 0.0, generator) != train).nnz == 0


@pytest.mark.parametrize("by_degree", [True, False])
def test_inclusion_follows_the_weights(by_degree):
    rng = np.random.default_rng(0)
    popular = 1 / np.arange(1, 13)
    users, items = np.repeat(np.arange(40), 6), rng.choice(12, 240, p=popular / popular.sum())
    train = csr_from_pairs(users, items, 40, 12)
    weights, generator = graphs.edge_weights(train).numpy(), torch.Generator().manual_seed(1)
    count = np.zeros(train.nnz)
    for _ in range(400):
        part = graphs.thinned(train, 0.7, generator, by_degree=by_degree)
        position = {pair: n for n, pair in enumerate(zip(*train.nonzero()))}
        count[[position[pair] for pair in zip(*part.nonzero())]] += 1
    rare, common = weights > np.quantile(weights, 0.75), weights < np.quantile(weights, 0.25)
    if by_degree:
        assert count[rare].mean() > 1.3 * count[common].mean()
    else:
        assert count[rare].mean() == pytest.approx(count[common].mean(), rel=0.05)


def test_thinned_graph_is_a_function_of_seed_and_epoch_and_alternates(monkeypatch):
    train = csr_from_pairs(np.repeat(np.arange(30), 4), np.tile(np.arange(24), 5), 30, 24)
    kinds = []
    original = graphs.thinned
    monkeypatch.setattr(graphs, "thinned", lambda *a, **k: kinds.append(k["by_degree"]) or original(*a, **k))
    one, two = (graphs.ThinnedGraph(train, 0.5, seed=3, alternate=True) for _ in range(2))
    for epoch in (1, 2, 3):
        one.new_epoch(epoch)
    two.new_epoch(3)
    assert kinds == [True, False, True, True]
    assert torch.equal(one.part.indices, two.part.indices) and torch.equal(one.part.values, two.part.values)
    assert one.train()() is one.part and one.eval()() is one.whole
    assert one.part.graph.num_entries == one.whole.graph.num_entries // 2
    assert one.double().whole.values.dtype == torch.float64
    assert graphs.ThinnedGraph(train, 0.0, seed=3).train()().graph.num_entries == build_graph(train).num_entries


@pytest.mark.parametrize("padded", [True, False])
def test_user_graph_against_the_published_weights(stored, padded):
    toy, golden = stored("mm_toy"), stored("mm_dualgnn")
    counts, k = sp.csr_array(toy["user_count"].numpy()), 6
    graph = UserGraph(counts, k, seed=0, padded=padded)
    # Users with k neighbours or more have the stored weights whatever the order of ties; k6 is the published draw.
    for user in (np.diff(counts.indptr) >= k).nonzero()[0]:
        row = graph.operator.to_scipy()[[user]].data
        np.testing.assert_allclose(np.sort(row), golden["in_k6_user_weight"][user].sort().values, rtol=1e-6)


def test_user_graph_by_loop(stored):
    counts = stored("mm_toy")["user_count"].numpy()
    found = UserGraph(sp.csr_array(counts), 4, seed=0, padded=False)(torch.eye(30))
    for user, row in enumerate(counts):
        best = sorted(np.flatnonzero(row), key=lambda other: (-row[other], other))[:4]
        wanted = np.zeros(30)
        wanted[best] = np.exp(row[best]) / np.exp(row[best]).sum() if best else 0
        np.testing.assert_allclose(found[user], wanted, rtol=1e-6)


def test_user_graph_rows_sum_to_one_or_zero_and_short_lists_are_filled_anew(stored):
    toy = stored("mm_toy")
    graph = UserGraph(sp.csr_array(toy["user_count"].numpy()), 40, seed=5, padded=True).train()
    graph.new_epoch(1)
    first = graph(torch.eye(30))
    sums = first.sum(1).numpy()
    lonely = int(toy["lonely_user"])
    assert sums[lonely] == 0 and np.allclose(np.delete(sums, lonely), 1)
    graph.new_epoch(2)
    assert abs(graph(torch.eye(30)) - first).max() > 1e-3
    before = graph.eval()(torch.eye(30))
    graph.train().new_epoch(1)
    assert torch.equal(graph(torch.eye(30)), first) and torch.equal(graph.eval()(torch.eye(30)), before)
    assert not first[toy["user_count"] == 0].any()
    plain = UserGraph(sp.csr_array(toy["user_count"].numpy()), 40, seed=5, padded=False).train()
    before = plain(torch.eye(30))
    plain.new_epoch(1)
    assert torch.equal(plain(torch.eye(30)), before)


def test_filling_copies_elements_of_the_growing_list():
    position = filled_positions(torch.tensor([0, 1, 3, 8]), 8, seeded_generator("cpu", 1))
    assert position[1].tolist() == [0] * 8 and position[3].tolist() == list(range(8))
    assert position[2, :3].tolist() == [0, 1, 2] and int(position[2].max()) == 2
    # The first copy is uniform over the list; the urn makes the final shares vary more than independent draws.
    many = filled_positions(torch.full((4000,), 2), 40, seeded_generator("cpu", 2))
    share = (many == 0).double().mean(1)
    assert share.mean().item() == pytest.approx(0.5, abs=0.02) and share.std() > 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shrink", [0.0, 5.0])
def test_neighbours_of_rows_in_half_precision(dtype, shrink):
    """Unit rows rounded to bfloat16 rank otherwise, and norms above 256 have no square in float16."""
    features = (300 * torch.randn(40, 6, generator=torch.Generator().manual_seed(3))).to(dtype)
    wanted = nearest_rows(features.double(), 4, shrink=shrink).toarray()
    assert np.abs(nearest_rows(features, 4, shrink=shrink).toarray() - wanted).max() < 1e-6
    assert nearest_ids(features, 4).tolist() == nearest_ids(features.double(), 4).tolist()
