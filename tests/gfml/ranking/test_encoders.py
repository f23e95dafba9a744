from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.graph import build_graph, propagate

NUM_USERS, NUM_ITEMS, DIM = 6, 8, 4
USERS, ITEMS = torch.tensor([5, 0, 5]), torch.tensor([[7, 1], [2, 2], [0, 7]])


def make(kind, **options):
    torch.manual_seed(0)
    if kind == "tables":
        return Tables(NUM_USERS, NUM_ITEMS, DIM).double()
    train = np.random.default_rng(0).random((NUM_USERS, NUM_ITEMS)) < 0.4
    return LightGCN(build_graph(sp.csr_array(train.astype(np.float32))), DIM, 2, **options).double()


@pytest.mark.parametrize("kind", ("tables", "lightgcn"))
def test_a_batch_equals_the_rows_of_all_vectors(close, kind):
    encoder = make(kind)
    user, item = (part.detach() for part in encoder.vectors())
    assert user.shape == (NUM_USERS, DIM) and item.shape == (NUM_ITEMS, DIM)
    for items in (ITEMS, ITEMS[:, :1], torch.arange(9).view(3, 3) % NUM_ITEMS):
        batch = encoder(USERS, items)
        close(batch.user.detach(), user[USERS])
        close(batch.items.detach(), item[items])
        assert torch.equal(batch.ego_user, encoder.nodes[USERS])
        assert torch.equal(batch.ego_items, encoder.nodes[items + NUM_USERS])
    same = torch.equal(batch.user, batch.ego_user)
    assert same == (kind == "tables")


@pytest.mark.parametrize("kind", ("tables", "lightgcn"))
def test_gradients_of_repeated_rows_add_up(close, kind):
    encoder = make(kind)
    batch = encoder(USERS, ITEMS)
    (batch.user[:, None] * batch.items).sum().backward()
    nodes = encoder.nodes.detach().clone().requires_grad_()
    final = nodes if kind == "tables" else propagate(encoder.graph, nodes, 2)
    (final[USERS][:, None] * final[ITEMS + NUM_USERS]).sum().backward()
    close(encoder.nodes.grad, nodes.grad, grad=True)


@pytest.mark.parametrize("undirected", (False, True))
def test_edges_drop_in_training_only_and_anew_for_every_batch(undirected):
    encoder = make("lightgcn", edge_keep=0.5, undirected_dropout=undirected)
    full = encoder.vectors()[0][USERS]
    first, second = (encoder(USERS, ITEMS).user for _ in range(2))
    assert not torch.allclose(first, second) and not torch.allclose(first, full)
    assert torch.equal(encoder.vectors()[0][USERS], full)
    encoder.eval()
    torch.testing.assert_close(encoder(USERS, ITEMS).user, full)


def test_the_graph_follows_the_module_and_stays_out_of_the_checkpoint():
    encoder = make("lightgcn")
    assert set(encoder.state_dict()) == {"nodes"}
    assert encoder.graph.values.dtype == torch.float64
    assert encoder.float().graph.values.dtype == torch.float32
    other = make("lightgcn").float()
    other.nodes.data.zero_()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.vectors()[1], encoder.vectors()[1])


def test_no_layers_is_matrix_factorisation():
    graph = make("lightgcn").graph
    encoder = LightGCN(graph, DIM, 0)
    user, item = encoder.vectors()
    assert torch.equal(torch.cat([user, item]), encoder.nodes)


def test_initial_vectors():
    torch.manual_seed(0)
    uniform = Tables(4000, 2000, 64)
    for table, count in zip(uniform.vectors(), (4000, 2000), strict=True):
        bound = math.sqrt(6 / (count + 64))
        assert 0.999 * bound < table.abs().max() <= bound
        assert table.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    for table, count in zip(Tables(4000, 2000, 64, init="xavier_normal").vectors(), (4000, 2000), strict=True):
        assert table.std().item() == pytest.approx(math.sqrt(2 / (count + 64)), rel=0.01)
    assert Tables(4000, 2000, 64, init="normal", std=0.3).nodes.std().item() == pytest.approx(0.3, rel=0.01)
    norm = Tables(4000, 2000, 64, init="ball").nodes.norm(dim=1)
    assert norm.max() <= 1 + 1e-6 and 0.3 < (norm < 0.999).float().mean() < 0.7


@pytest.mark.parametrize("options", ({"embedding_dim": 0}, {"init": "ones"}))
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="wanted|choose"):
        Tables(3, 4, **{"embedding_dim": 2} | options)


@pytest.mark.parametrize("combine", ["mean", "sum", "final"])
def test_outputs_are_the_vectors_with_gradient(combine):
    graph = build_graph(sp.csr_array(np.array([[1, 1, 0], [0, 1, 0]], dtype=np.float32)), dtype=torch.float64)
    encoder = LightGCN(graph, 4, 2, combine=combine).double().eval()
    outputs = encoder.outputs()
    torch.testing.assert_close(outputs, torch.cat(encoder.vectors()))
    torch.testing.assert_close(encoder.outputs(torch.tensor([3, 0])), outputs[[3, 0]])
    outputs.square().sum().backward()
    assert encoder.nodes.grad.abs().sum() > 0
