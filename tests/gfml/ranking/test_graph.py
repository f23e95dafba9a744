from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml import losses
from gfml.data.interactions import csr_from_pairs
from gfml.ranking.encoders import LightGCN
from gfml.ranking.graph import COMBINES, Graph, build_graph, propagate, propagate_rows

LAYERS = (1, 2, 3, 4)


@pytest.fixture
def golden(stored):
    return stored("lightgcn")


def graph_of_pairs(users, items, shape, dtype=torch.float64):
    pairs = sp.csr_array((np.ones(len(users)), (users, items)), shape=shape)
    return build_graph(pairs, dtype=dtype)


def golden_graph(golden, dtype=torch.float64):
    users, items = golden["train_edges"].T.numpy()
    return graph_of_pairs(users, items, (int(golden["num_users"]), int(golden["num_items"])), dtype)


def random_graph(num_users=6, num_items=8, density=0.35, seed=0, dtype=torch.float64):
    """A graph whose first user and last item have no edge."""
    rng = np.random.default_rng(seed)
    train = rng.random((num_users, num_items)) < density
    train[0], train[:, -1] = False, False
    return build_graph(sp.csr_array(train.astype(np.float32)), dtype=dtype), train


def dense_adjacency(train):
    """D^-1/2 A D^-1/2 by loops."""
    num_users, num_items = train.shape
    full = np.zeros((num_users + num_items,) * 2)
    for u, i in zip(*train.nonzero(), strict=True):
        full[u, num_users + i] = full[num_users + i, u] = 1 / np.sqrt(train[u].sum() * train[:, i].sum())
    return torch.from_numpy(full)


def dense_propagate(matrix, nodes, num_layers, combine):
    layers = [nodes]
    for _ in range(num_layers):
        layers.append(matrix @ layers[-1])
    if combine == "final":
        return layers[-1]
    return sum(layers) / (len(layers) if combine == "mean" else 1)


def to_dense(graph: Graph, values=None):
    return graph.multiply(torch.eye(graph.num_nodes, dtype=graph.values.dtype), values)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- stored values


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_adjacency_and_layers_equal_the_stored_ones(golden, close, dtype):
    graph = golden_graph(golden, dtype)
    close(to_dense(graph), golden["natural_adj"])
    torch.testing.assert_close(to_dense(graph).float(), golden["orig_adj"], rtol=2e-6, atol=1e-7)
    nodes = torch.cat([golden["user_emb"], golden["item_emb"]]).to(dtype)
    for k, layer in enumerate(golden["natural_layers"]):
        close(propagate(graph, nodes, k, combine="final"), layer)
    for k in LAYERS:
        for combine in COMBINES:
            close(propagate(graph, nodes, k, combine=combine), golden[f"natural_final__{combine}__K{k}"])


def test_a_pair_listed_twice_counts_once(golden, close):
    users, items = (np.append(ids, extra) for ids, extra in zip(golden["train_edges"].T, golden["duplicate_edge"]))
    train = csr_from_pairs(users, items, int(golden["num_users"]), int(golden["num_items"]))
    close(to_dense(build_graph(train, dtype=torch.float64)), golden["natural_adj"])
    assert not torch.allclose(golden["orig_adj_duplicate_first_edge"].double(), golden["natural_adj"], atol=1e-3)


@pytest.mark.parametrize(
    "dtype,prefix", ((torch.float64, "natural"), (torch.float32, "orig"), (torch.float32, "natural"))
)
@pytest.mark.parametrize("k", LAYERS)
def test_losses_and_gradients_equal_the_stored_ones(golden, close, k, dtype, prefix):
    num_users = int(golden["num_users"])
    encoder = LightGCN(golden_graph(golden), 4, k).to(dtype)
    encoder.nodes.data.copy_(torch.cat([golden["user_emb"], golden["item_emb"]]))
    user, item = encoder.vectors()
    if prefix == "orig":
        close(user, golden[f"orig_final_user__K{k}"])
        close(item, golden[f"orig_final_item__K{k}"])
        close((user @ item.T).sigmoid(), golden[f"orig_rating__K{k}"])
    else:
        close(user @ item.T, golden[f"natural_dot_scores__K{k}"])
    batch = encoder(golden["users"], torch.stack([golden["pos"], golden["neg"]], 1))
    pos, neg = (batch.user[:, None] * batch.items).sum(-1).unbind(1)
    bpr = losses.bpr(pos, neg)
    reg = losses.embedding_reg(batch.ego_user, *batch.ego_items.unbind(1))
    loss = bpr + float(golden["decay"]) * reg
    loss.backward()
    for name, value in (("bpr", bpr), ("reg", reg), ("loss", loss)):
        close(value.detach(), golden[f"{prefix}_{name}__K{k}"])
    close(encoder.nodes.grad[:num_users], golden[f"{prefix}_grad_user__K{k}"], grad=True)
    close(encoder.nodes.grad[num_users:], golden[f"{prefix}_grad_item__K{k}"], grad=True)


# ---------------------------------------------------------------- against the dense computation


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", (0, *LAYERS))
def test_output_and_gradient_equal_the_dense_ones(close, k, combine):
    graph, train = random_graph()
    matrix, weights = dense_adjacency(train), randn(14, 3, seed=1)
    ours, theirs = (randn(14, 3).requires_grad_() for _ in range(2))
    output, expected = propagate(graph, ours, k, combine=combine), dense_propagate(matrix, theirs, k, combine)
    close(output.detach(), expected.detach())
    for value in (output, expected):
        (weights * value.square()).sum().backward()
    close(ours.grad, theirs.grad, grad=True)


@pytest.mark.parametrize("dropped", (False, True))
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", (0, 1, 3))
@pytest.mark.parametrize("rows", ([13, 0, 5, 2], [7, 7, 1], [0], []))
def test_chosen_rows_equal_the_full_output(close, rows, k, combine, dropped):
    graph, _ = random_graph()
    torch.manual_seed(3)
    values = graph.drop_edges(0.5) if dropped else None
    rows, weights = torch.tensor(rows, dtype=torch.int64), randn(len(rows), 3, seed=1)
    some, full = (randn(14, 3).requires_grad_() for _ in range(2))
    output = propagate(graph, some, k, combine=combine, rows=rows, values=values)
    expected = propagate(graph, full, k, combine=combine, values=values)[rows]
    close(output.detach(), expected.detach())
    for value in (output, expected):
        (weights * value).sum().backward()
    close(some.grad, full.grad, grad=True)
    final, start = propagate_rows(graph, some, k, rows, combine=combine, values=values)
    close(final.detach(), expected.detach())
    assert torch.equal(start, some[rows])
    some.grad = None
    (weights * (final + start.square())).sum().backward()
    (weights * full[rows].square()).sum().backward()
    close(some.grad, full.grad, grad=True)


@pytest.mark.parametrize("undirected", (False, True))
@pytest.mark.parametrize("rows", (None, [13, 4, 4, 0]))
@pytest.mark.parametrize("combine", COMBINES)
def test_backward_uses_the_transpose(combine, rows, undirected):
    graph, _ = random_graph()
    torch.manual_seed(5)
    values = graph.drop_edges(0.6, undirected=undirected)
    matrix = to_dense(graph, values)
    assert torch.equal(matrix, matrix.T) == undirected
    rows = None if rows is None else torch.tensor(rows)

    def output(nodes):
        return propagate(graph, nodes, 3, combine=combine, rows=rows, values=values)

    assert torch.autograd.gradcheck(output, randn(14, 2).requires_grad_())
    expected = dense_propagate(matrix, randn(14, 2), 3, combine)
    torch.testing.assert_close(output(randn(14, 2)), expected if rows is None else expected[rows])


@pytest.mark.parametrize("share", (0.0, 1.0), ids=("the whole product", "picked out"))
def test_rows_of_a_product(share, monkeypatch):
    """Either way the same bits: a row's entries are summed in their order."""
    monkeypatch.setattr("gfml.ranking.graph.WORTH_PICKING", share)
    graph, _ = random_graph()
    dense, rows = randn(14, 3), torch.tensor([13, 2, 2, 0, 9])
    assert torch.equal(graph.multiply_rows(rows, dense), graph.multiply(dense)[rows])


# ---------------------------------------------------------------- properties of the adjacency


def test_adjacency_is_symmetric_with_spectral_radius_one(close):
    graph, train = random_graph(20, 30, 0.1)
    matrix = to_dense(graph)
    close(matrix, dense_adjacency(train))
    assert torch.equal(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).abs().max() <= 1 + 1e-12
    assert graph.num_entries == 2 * train.sum() and graph.num_nodes == 50


def test_root_of_the_degrees_is_an_eigenvector(close):
    train = np.random.default_rng(1).random((6, 8)) < 0.3
    train[:, 0] = train[0] = True
    graph = build_graph(sp.csr_array(train.astype(np.float32)), dtype=torch.float64)
    root = torch.from_numpy(np.concatenate([train.sum(1), train.sum(0)])).double().sqrt()[:, None]
    close(graph.multiply(root), root)
    close(propagate(graph, root, 4), root)


@pytest.mark.parametrize("k", (0, 1, 3))
def test_nodes_without_edges(close, golden, k):
    graph = golden_graph(golden)
    nodes = torch.cat([golden["user_emb"], golden["item_emb"]])
    isolated = torch.cat([golden["isolated_users"], golden["isolated_items"] + graph.num_users])
    for combine, factor in (("mean", 1 / (k + 1)), ("sum", 1), ("final", 0 if k else 1)):
        close(propagate(graph, nodes, k, combine=combine)[isolated], nodes[isolated] * factor)
    close(propagate(graph, nodes, k, rows=isolated), nodes[isolated] / (k + 1))


def test_a_graph_without_edges(close):
    graph = build_graph(sp.csr_array((3, 4), dtype=np.float32), dtype=torch.float64)
    nodes = randn(7, 2).requires_grad_()
    output = propagate(graph, nodes, 3)
    output.sum().backward()
    close(output.detach(), nodes.detach() / 4)
    close(nodes.grad, torch.full((7, 2), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("combine", COMBINES)
def test_renaming_users_and_items_renames_the_output(close, combine):
    _, train = random_graph()
    rng = np.random.default_rng(2)
    users, items = rng.permutation(6), rng.permutation(8)
    order = torch.from_numpy(np.concatenate([users, items + 6]))
    before, after = (
        build_graph(sp.csr_array(matrix.astype(np.float32)), dtype=torch.float64)
        for matrix in (train, train[users][:, items])
    )
    nodes = randn(14, 3)
    close(propagate(after, nodes[order], 3, combine=combine), propagate(before, nodes, 3, combine=combine)[order])


def test_unsorted_rows_give_the_same_graph():
    sorted_graph = graph_of_pairs([0, 0, 0, 1, 1, 2], [1, 3, 4, 0, 3, 3], (3, 5))
    train = sp.csr_array((np.ones(6), np.array([4, 1, 3, 3, 0, 3]), np.array([0, 3, 5, 6])), shape=(3, 5))
    graph = build_graph(train, dtype=torch.float64)
    assert torch.equal(to_dense(graph), to_dense(sorted_graph))
    values = torch.arange(12, dtype=torch.float64)
    assert torch.equal(to_dense(graph, values[graph.transposed]), to_dense(graph, values).T)


# ---------------------------------------------------------------- dropped edges


@pytest.mark.parametrize("undirected", (False, True))
def test_dropped_edges_keep_the_expectation(undirected):
    graph, _ = random_graph()
    torch.manual_seed(0)
    keep, draws = 0.6, 4000
    masks = torch.stack([graph.drop_edges(keep, undirected=undirected) for _ in range(draws)])
    scaled = masks / graph.values
    assert set(scaled.unique().tolist()) <= {0.0, *(graph.values / keep / graph.values).unique().tolist()}
    # Five standard deviations of the mean of Bernoulli(keep) / keep.
    assert (scaled.mean(0) - 1).abs().max() < 5 * ((1 - keep) / keep / draws) ** 0.5
    kept = masks > 0
    together = (kept == kept[:, graph.transposed]).double().mean()
    assert together == 1 if undirected else abs(together - (keep**2 + (1 - keep) ** 2)) < 0.02


def test_keeping_all_edges_is_the_identity():
    graph, _ = random_graph()
    assert torch.equal(graph.drop_edges(1.0), graph.values)
    for keep in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="0 < keep <= 1"):
            graph.drop_edges(keep)


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("options", ({"num_layers": -1}, {"combine": "max"}, {"nodes": torch.zeros(13, 2)}))
def test_wrong_arguments_are_refused(options):
    graph, _ = random_graph()
    with pytest.raises(ValueError, match="wanted|choose"):
        propagate(graph, **{"nodes": torch.zeros(14, 2), "num_layers": 2} | options)


def test_single_precision_nodes_on_a_double_graph():
    graph, _ = random_graph(dtype=torch.float32)
    assert propagate(graph, randn(14, 2), 2).dtype == torch.float64
    assert propagate(graph.to("cpu", torch.float64), randn(14, 2).float(), 2).dtype == torch.float32
