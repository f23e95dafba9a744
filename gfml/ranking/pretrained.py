"""Start values of user and item tables: from a run directory, a checkpoint, or arrays in files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gfml.base.checkpoints import load_state
from gfml.base.errors import UserError
from gfml.base.files import read_arrays

NODES = "encoder.nodes"


def read_nodes(source: str | os.PathLike[str], shape: tuple[int, int, int]) -> Tensor:
    """Tables of all users and items as one float32 tensor [U + I, D]; shape is (U, I, D).

    source: a run directory (its ``final.pt``), a checkpoint with ``encoder.nodes``, or an .npz with the arrays
    ``user`` [U, D] and ``item`` [I, D]. UserError for anything missing, of another shape or not finite.
    """
    path = Path(source)
    if path.suffix == ".npz":
        arrays = read_arrays(path)
        if not {"user", "item"} <= arrays.keys():
            raise UserError(f"{path} holds {', '.join(sorted(arrays))}, wanted the arrays user and item: mend the file")
        return join_tables(arrays["user"], arrays["item"], shape, path)
    path = path / "final.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no {path} to start from: give a finished run directory, its final.pt or an .npz")
    nodes = load_state(path).get("model", {}).get(NODES)
    if nodes is None:
        raise UserError(f"{path} holds no {NODES}, wanted a model with user and item tables: choose another run")
    num_users, num_items, dim = shape
    if nodes.shape != (num_users + num_items, dim):
        raise UserError(
            f"{path} holds tables {tuple(nodes.shape)}, wanted {(num_users + num_items, dim)} "
            f"({num_users} users and {num_items} items x width): use the same data and width"
        )
    return _finite(nodes.float(), path)


def read_table(source: str | os.PathLike[str]) -> np.ndarray:
    """The one two-dimensional array of an .npy or .npz file. UserError otherwise."""
    tables = [array for array in read_arrays(source).values() if array.ndim == 2]
    if len(tables) != 1:
        raise UserError(f"{source} holds {len(tables)} tables, wanted exactly one [rows, width]: mend the file")
    return tables[0]


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
