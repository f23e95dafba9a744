"""Start values of user and item tables: from a run directory, a checkpoint, or arrays in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gfml.base.checkpoints import load_state
from gfml.base.errors import UserError
from gfml.base.files import read_arrays
from gfml.base.weights import read_weights
from gfml.data.interactions import Interactions
from gfml.data.names import places

NODES = "encoder.nodes"


# Arrays that say whose vectors the rows of a table are.
OWNER_NAMES = {"user": ("user_ids", "user_id"), "item": ("item_ids", "item_id")}


def read_nodes(source: str | os.PathLike[str], shape: tuple[int, int, int], data: Interactions | None = None) -> Tensor:
    """Tables of all users and items as one float32 tensor [U + I, D]; shape is (U, I, D).

    source: a run directory (its ``final.pt``), a checkpoint or what ``gfml import`` wrote with ``encoder.nodes``, or an .npz
    with the arrays ``user`` [n, D] and ``item`` [m, D], matched to the users and items of ``data`` by the arrays ``user_ids`` and
    ``item_ids``, or in the order of the data where there are none. UserError for anything missing, of another shape
    or not finite.
    """
    path = Path(source)
    if path.suffix == ".npz":
        arrays = read_arrays(path)
        if not {"user", "item"} <= arrays.keys():
            raise UserError(f"{path} holds {', '.join(sorted(arrays))}, wanted the arrays user and item: mend the file")
        tables = (by_id(arrays, side, arrays[side], data, path) for side in ("user", "item"))
        return join_tables(*tables, shape, path)
    path = path / "final.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no {path} to start from: give a finished run directory, its final.pt or an .npz")
    state = read_weights(path) if path.suffix == ".safetensors" else load_state(path).get("model", {})
    nodes = state.get(NODES)
    if nodes is None:
        raise UserError(f"{path} holds no {NODES}, wanted a model with user and item tables: choose another run")
    num_users, num_items, dim = shape
    if nodes.shape != (num_users + num_items, dim):
        raise UserError(
            f"{path} holds tables {tuple(nodes.shape)}, wanted {(num_users + num_items, dim)} "
            f"({num_users} users and {num_items} items x width): use the same data and width"
        )
    return _finite(nodes.float(), path)


def read_table(source: str | os.PathLike[str], side: str = "item", data: Interactions | None = None) -> np.ndarray:
    """The one two-dimensional array of an .npy or .npz file; rows by the ids beside it, see :func:`read_nodes`."""
    arrays = read_arrays(source)
    tables = [array for array in arrays.values() if array.ndim == 2]
    if len(tables) != 1:
        raise UserError(f"{source} holds {len(tables)} tables, wanted exactly one [rows, width]: mend the file")
    return by_id(arrays, side, tables[0], data, source)


def by_id(
    arrays: Mapping[str, np.ndarray], side: str, table: np.ndarray, data: Interactions | None, source: object
) -> np.ndarray:
    """The rows of ``table`` in the order of the data's users or items, as the array of their ids says.

    As they are without such an array. UserError where somebody of the data has no row.
    """
    ids = next(
        (arrays[name] for name in (*OWNER_NAMES[side], "ids", "id") if name in arrays and arrays[name].ndim == 1), None
    )
    if ids is None or data is None:
        return table
    if len(ids) != len(table):
        raise UserError(f"{source} has {len(ids)} ids for {len(table)} rows of {side} vectors: mend the file")
    count, names = (data.num_users, data.user_ids) if side == "user" else (data.num_items, data.item_ids)
    own = np.arange(count) if names is None else names
    rows = places(own, ids)
    if (rows < 0).any():
        missing = own[rows < 0]
        raise UserError(
            f"{source} has no vector of {len(missing)} of the {count} {side}s of {data.name}, such as {missing[0]}: add them"
        )
    return table[rows]


def join_tables(user: np.ndarray, item: np.ndarray, shape: tuple[int, int, int], source: object) -> Tensor:
    """user [U, D] over item [I, D] as float32 [U + I, D]; UserError names ``source`` when a shape is another."""
    num_users, num_items, dim = shape
    for name, table, rows in (("user", user, num_users), ("item", item, num_items)):
        if table.dtype.kind not in "fiub":
            raise UserError(f"{source} holds {name} vectors of {table.dtype}, wanted numbers: mend the file")
        if table.shape != (rows, dim):
            raise UserError(
                f"{source} holds {name} vectors {table.shape}, wanted {(rows, dim)}: use the same data and width"
            )
    return _finite(torch.from_numpy(np.concatenate([user, item]).astype(np.float32)), source)


def _finite(nodes: Tensor, source: object) -> Tensor:
    if not bool(torch.isfinite(nodes).all()):
        raise UserError(f"{source} holds numbers that are not finite, wanted finite vectors: mend the file")
    return nodes
