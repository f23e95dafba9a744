"""Item features as part of a model: a table, trained or not, and a linear map to the width of the item vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectedFeatures(nn.Module):
    """x_i = W f_i + b. features [I, width] -> [n, out_dim].

    trained: the features themselves are parameters that start at the given values (as published for several models);
    else they are a buffer that enters no checkpoint.
    """

    def __init__(self, features: Tensor, out_dim: int, *, trained: bool) -> None:
        super().__init__()
        features = features.to(torch.get_default_dtype())
        if trained:
            self.table = nn.Parameter(features.clone())
        else:
            self.register_buffer("table", features, persistent=False)
        self.linear = nn.Linear(features.shape[1], out_dim)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Projections of these items, by default of all: only what is asked for is computed."""
        return self.linear(self.table if rows is None else F.embedding(rows, self.table))


def projected(features: dict[str, Tensor], out_dim: int, *, trained: bool) -> nn.ModuleDict:
    """One :class:`ProjectedFeatures` for each modality."""
    return nn.ModuleDict({name: ProjectedFeatures(f, out_dim, trained=trained) for name, f in features.items()})


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, place) with rows[place] == ids. Shape: ids int64 [n].

    On the CPU ``rows`` holds each id once, in ascending order, so that expensive rows are computed once; elsewhere it
    is ``ids`` itself, because learning the number of different ids would stall the device.
    """
    if ids.device.type == "cpu":
        return ids.unique(return_inverse=True)
    return ids, torch.arange(len(ids), device=ids.device)
