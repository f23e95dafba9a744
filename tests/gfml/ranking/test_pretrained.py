"""Start vectors from runs, checkpoints and arrays: equal to what was stored, or refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfml.base.checkpoints import save_state
from gfml.base.errors import UserError
from gfml.base.files import read_arrays
from gfml.base.weights import write_weights
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.ranking.pretrained import join_tables, read_nodes, read_table

SHAPE = (3, 4, 2)


@pytest.fixture
def nodes():
    return torch.arange(14, dtype=torch.float32).view(7, 2)


def test_a_run_directory_a_checkpoint_and_an_archive_give_the_same(tmp_path, nodes):
    save_state(tmp_path / "final.pt", {"model": {"encoder.nodes": nodes, "other": torch.zeros(1)}})
    np.savez(tmp_path / "start.npz", user=nodes[:3].double().numpy(), item=nodes[3:].numpy())
    write_weights(tmp_path / "imported.safetensors", {"encoder.nodes": nodes}, {"from": "lightgcn"})
    for source in (tmp_path, *(tmp_path / name for name in ("final.pt", "start.npz", "imported.safetensors"))):
        found = read_nodes(source, SHAPE)
        assert found.dtype == torch.float32 and torch.equal(found, nodes)
    np.save(tmp_path / "item.npy", nodes[3:].numpy())
    assert np.array_equal(read_table(tmp_path / "item.npy"), nodes[3:].numpy())


def test_what_does_not_fit(tmp_path, nodes):
    save_state(tmp_path / "final.pt", {"model": {"encoder.nodes": nodes}})
    save_state(tmp_path / "mass.pt", {"model": {"mass": nodes}})
    np.savez(tmp_path / "names.npz", users=nodes.numpy())
    cases = {
        "wanted (8, 2)": lambda: read_nodes(tmp_path, (4, 4, 2)),
        "wanted (7, 3)": lambda: read_nodes(tmp_path / "final.pt", (3, 4, 3)),
        "holds no encoder.nodes": lambda: read_nodes(tmp_path / "mass.pt", SHAPE),
        "wanted the arrays user and item": lambda: read_nodes(tmp_path / "names.npz", SHAPE),
        "there is no": lambda: read_nodes(tmp_path / "nowhere", SHAPE),
        "holds user vectors (2, 2)": lambda: join_tables(np.zeros((2, 2)), np.zeros((4, 2)), SHAPE, "a and b"),
        "not finite": lambda: join_tables(np.full((3, 2), np.inf), np.zeros((4, 2)), SHAPE, "a and b"),
        "holds 0 tables": lambda: read_table(_saved(tmp_path / "line.npy", np.zeros(3))),
    }
    for message, read in cases.items():
        with pytest.raises(UserError) as error:
            read()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_no_pickles(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="wanted plain arrays"):
        read_arrays(tmp_path / "object.npy")


def _saved(path, array):
    np.save(path, array)
    return path


def test_rows_are_matched_by_id(tmp_path):
    shape = (2, 3)
    train = csr_from_pairs(np.array([0, 1]), np.array([0, 2]), *shape)
    empty = csr_from_pairs(np.empty(0, np.int64), np.empty(0, np.int64), *shape)
    data = Interactions("toy", train, empty, empty, user_ids=np.array(["007", "7"]), item_ids=np.array([3, 5, 9]))
    user, item = np.arange(4.0).reshape(2, 2), np.arange(8.0).reshape(4, 2)
    file = tmp_path / "start.npz"
    np.savez(file, user=user, item=item, user_ids=np.array(["7", "007"]), item_ids=np.array([9, 8, 3, 5]))
    nodes = read_nodes(file, (2, 3, 2), data)
    assert nodes[:2].tolist() == user[[1, 0]].tolist() and nodes[2:].tolist() == item[[2, 3, 0]].tolist()
    np.savez(tmp_path / "item.npz", vectors=item, item_ids=np.array(["9", "8", "3", "5"]))
    assert read_table(tmp_path / "item.npz", "item", data).tolist() == item[[2, 3, 0]].tolist()
    np.savez(file, user=user, item=item, user_ids=np.array(["7", "07"]), item_ids=np.array([9, 8, 3, 5]))
    with pytest.raises(UserError, match="no vector of 1 of the 2 users of toy, such as 007"):
        read_nodes(file, (2, 3, 2), data)
