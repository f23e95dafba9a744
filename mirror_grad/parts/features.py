"""Item features as part of a model: a table, trained or not, and a linear map to the width of the item vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.base.optim import zeros_like

# Rows gathered at a time: a block of wide rows stays in the cache between gathering and multiplying.
ROWS_PER_BLOCK = 128


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
        weight = self.linear.weight
        if rows is None:
            return F.linear(self.table, weight.to(self.table.dtype)).to(weight.dtype) + self.linear.bias
        return project_rows(self.table, weight, rows) + self.linear.bias


def projected(features: dict[str, Tensor], out_dim: int, *, trained: bool) -> nn.ModuleDict:
    """One :class:`ProjectedFeatures` for each modality."""
    return nn.ModuleDict({name: ProjectedFeatures(f, out_dim, trained=trained) for name, f in features.items()})


def halve_fixed(model: nn.Module) -> None:
    """Hold the features that a model maps and does not train in bfloat16, which has 8 significant bits.

    Their products are of bfloat16 too; the map's weights and gradients stay as they are.
    """
    for module in model.modules():
        if isinstance(module, ProjectedFeatures) and not module.table.requires_grad:
            module.table = module.table.bfloat16()


def project_rows(table: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """table[rows] @ weight.T with gradient to both factors. Shape: [I, width], [D, width], int64 [n] -> [n, D].

    On the CPU the gathered rows never stand in memory together: for wide tables that halves the cost. A table of
    another type than the weights is multiplied in its own.
    """
    if table.device.type != "cpu":
        return (F.embedding(rows, table) @ weight.to(table.dtype).T).to(weight.dtype)
    return _ProjectRows.apply(table, weight, rows)


class _ProjectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(table, weight, rows)
        output = weight.new_empty(len(rows), len(weight))
        # oneDNN uses the widest vector units of any CPU; the library behind torch.mm does not on all. Its tensors cannot be compiled.
        plain = torch.compiler.is_compiling() or table.dtype != torch.float32
        one_dnn = not plain and torch.backends.mkldnn.is_available()
        factor = weight.to_mkldnn() if one_dnn else weight.to(table.dtype)
        for part, block in _blocks(table, rows):
            output[part] = F.linear(block.to_mkldnn(), factor).to_dense() if one_dnn else F.linear(block, factor)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        table, weight, rows = ctx.saved_tensors
        to_table, to_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # Second derivatives are asked for: ordinary operations, which autograd follows.
            everywhere = torch.zeros_like(table).index_add(0, rows, grad @ weight) if to_table else None
            return everywhere, grad.T @ F.embedding(rows, table).to(grad.dtype) if to_weight else None, None
        table_grad, weight_grad = (
            zeros_like(x) if wanted else None for x, wanted in ((table, to_table), (weight, to_weight))
        )
        for part, block in _blocks(table, rows) if to_weight else ():
            if block.dtype == grad.dtype:
                weight_grad.addmm_(grad[part].T, block)
            else:
                weight_grad += grad[part].T.to(block.dtype) @ block
        spread = weight.new_empty(min(ROWS_PER_BLOCK, len(rows)), weight.shape[1])
        for start in range(0, len(rows), ROWS_PER_BLOCK) if to_table else ():
            part = slice(start, start + ROWS_PER_BLOCK)
            table_grad.index_add_(0, rows[part], torch.mm(grad[part], weight, out=spread[: len(rows[part])]))
        return table_grad, weight_grad, None


def _blocks(table: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive parts of ``rows`` and their rows of the table, in one reused buffer."""
    buffer = table.new_empty(min(ROWS_PER_BLOCK, len(rows)), table.shape[1])
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        part = slice(start, min(start + ROWS_PER_BLOCK, len(rows)))
        block = buffer[: part.stop - start]
        yield part, torch.index_select(table, 0, rows[part], out=block)


def keep(module: nn.Module, name: str, start: Tensor, *, frozen: bool) -> None:
    """A table of the module: a parameter, or a constant that checkpoints hold."""
    if frozen:
        module.register_buffer(name, start)
    else:
        module.register_parameter(name, nn.Parameter(start))


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, place) with rows[place] == ids. Shape: ids int64 [n].

    On the CPU ``rows`` holds each id once, in ascending order, so that expensive rows are computed once; elsewhere it
    is ``ids`` itself, because learning the number of different ids would stall the device.
    """
    if ids.device.type == "cpu":
        return ids.unique(return_inverse=True)
    return ids, torch.arange(len(ids), device=ids.device)
