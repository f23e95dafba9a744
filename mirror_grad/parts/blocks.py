"""Sums over rows whose terms need much memory, such as comparisons of a batch with all items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of one [rows, others] matrix at a time: on the CPU a block and what is made of it stay in the cache.
NUMBERS_PER_BLOCK = {"cpu": 1 << 20, "other": 1 << 25}


def sum_in_blocks(term: Callable[..., Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor], width: int) -> Tensor:
    """sum over blocks b of term(*rows[b], *shared): a scalar, with gradient to all floating inputs that want one.

    term: gives a scalar that is a sum over its rows; it may hold a matrix [rows, width], of which only one block stands
    in memory at a time, because the gradient is made along with the value. Shape: rows [n, ...] each; shared: any.
    Where second derivatives are asked for, the whole sum is built as one.
    """
    return _SumInBlocks.apply(term, len(rows), width, *rows, *shared)


def log_sum_exps(
    first: Tensor, second: Tensor, scale: float = 1.0, *, weight: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """sum_i w_i log sum_j c_j exp(s x_i . y_j), a scalar; weights and counts are 1 where none are given.

    Shape: first [n, D], second [m, D], weight [n], count [m] > 0. No overflow; memory O((n + m) D).
    """
    weight = first.new_ones(len(first)) if weight is None else weight
    more = second.new_zeros(len(second)) if count is None else count.log()

    def term(first: Tensor, weight: Tensor, second: Tensor, more: Tensor) -> Tensor:
        return (weight * torch.addmm(more, first, second.T, alpha=scale).logsumexp(1)).sum()

    return sum_in_blocks(term, (first, weight), (second, more), len(second))


def batch_cross_entropy(first: Tensor, second: Tensor, place: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
    """mean_b -log [exp(s x_b . y_b) / sum_c exp(s x_b . y_c)] over a batch whose rows may repeat, each stored once.

    Shape: first [n, D], second [m, D]; place and other int64 [B], the rows x_b = first[place_b], y_b = second[other_b]
    of a batch element. Each x_b has to find its own y among those of the batch; repeated rows are false negatives of
    each other, as they are when written out, but cost nothing.
    """
    weight, count = (
        rows.new_zeros(len(rows)).index_add(0, p, rows.new_ones(len(p)))
        for rows, p in ((first, place), (second, other))
    )
    own = (F.embedding(place, first) * F.embedding(other, second)).sum()
    return (log_sum_exps(first, second, scale, weight=weight, count=count) - scale * own) / len(place)


class _SumInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Callable[..., Tensor], num_rows: int, width: int, *inputs: Tensor) -> Tensor:
        wanted = [place for place, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        leaves = [tensor.detach() for tensor in inputs]
        rows, shared = leaves[:num_rows], leaves[num_rows:]
        grads: dict[int, Tensor] = {place: torch.zeros_like(leaves[place]) for place in wanted}
        device = inputs[0].device.type
        size = max(1, NUMBERS_PER_BLOCK.get(device, NUMBERS_PER_BLOCK["other"]) // max(1, width))
        total = 0.0
        for start in range(0, len(inputs[0]), size):
            block = [*(tensor[start : start + size] for tensor in rows), *shared]
            for place in wanted:
                block[place] = block[place].detach().requires_grad_()
            with torch.enable_grad():
                value = term(*block)
            total = total + value.detach()
            if wanted:
                found = torch.autograd.grad(value, [block[place] for place in wanted])
                for place, grad in zip(wanted, found):
                    if place < num_rows:
                        grads[place][start : start + size] = grad
                    else:
                        grads[place] += grad
        ctx.term, ctx.places, ctx.num_inputs = term, wanted, len(inputs)
        ctx.save_for_backward(*inputs, *grads.values())
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, grads = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
        if torch.is_grad_enabled():
            # Second derivatives are asked for: ordinary operations, which autograd follows. Of aliases, because one input
            # may be made of another.
            inputs = [tensor.view_as(tensor) for tensor in inputs]
            grads = torch.autograd.grad(ctx.term(*inputs), [inputs[place] for place in ctx.places], create_graph=True)
        found: list[Tensor | None] = [None] * ctx.num_inputs
        for place, grad in zip(ctx.places, grads):
            found[place] = upstream * grad
        return None, None, None, *found
