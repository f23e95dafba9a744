"""Training by several processes (``torchrun --nproc-per-node N program.py ...``), one copy of the model in each.

    with distributed.session(device) as world:              # world.size is 1 without torchrun, and nothing is started
        run = distributed.open_run(out, family, config)      # the first process writes, the others follow
        net = distributed.wrap(model)                        # gradients are averaged over processes in backward
        ...

Everything here is also right for one process, where it costs nothing, so a program is written once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gfml.base.errors import UserError
from gfml.engine.runs import Run

# Long enough for the first process to read data or compile while the others wait.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among all: 0 <= rank < size; ``device`` is its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's rows of ``count``: consecutive, parts differ by at most one, the first ones are larger."""
        small, extra = divmod(count, self.size)
        start = self.rank * small + min(self.rank, extra)
        return slice(start, start + small + (self.rank < extra))


@contextlib.contextmanager
def session(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started; alone without it. gloo on the CPU, NCCL on CUDA.

    device: what ``gfml.program.cli.resolve_device`` found; a CUDA device without index becomes that of LOCAL_RANK.
    UserError when there are fewer CUDA devices than processes on this machine.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ or dist.is_initialized():
        yield World(rank(), world_size(), device)
        return
    if device.type == "cuda":
        device = _own_device(device)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(rank(), world_size(), device)
    finally:
        dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    if several and device.index is not None:
        raise UserError(f"found {device} for every process, wanted one each: give `device cuda`")
    if several and local >= count:
        raise UserError(
            f"found {count} CUDA devices, wanted one for each process: lower `nproc_per_node` or give `device cpu`"
        )
    return torch.device("cuda", local) if several else device


def rank() -> int:
    """The number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the block alone, then the others do: for downloads and caches on a shared disk."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


# -- values


@torch.no_grad()
def sum_over(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in each of them; without gradient."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in each of them; without gradient."""
    return sum_over(value) / world_size()


def mean_of(values: Mapping[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """The mean of every named number over all processes. All give the same names; NCCL needs a CUDA ``device``."""
    if world_size() == 1 or not values:
        return dict(values)
    total = mean_over(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
    return dict(zip(values, total.tolist(), strict=True))


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks, in each of them; gradients flow to every process's rows.

    Shape: rows [B, ...], B may differ between processes and may be 0; returns [sum of B, ...].
    Gradient: the gradients that all processes give to the gathered rows are added up. With the same loss of all rows in
    each process, or with each process's share of it, and gradients of parameters averaged by :func:`wrap`, the update is
    that of one process with the whole batch.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    """All-gather of padded rows forward; all-reduce of the gradient and this process's slice backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        counts = _counts(rows)
        ctx.start, ctx.count = sum(counts[: rank()]), len(rows)
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("found create_graph: gathered rows have no second derivative")
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count]


def _counts(rows: Tensor) -> list[int]:
    """The number of rows of every process."""
    mine = torch.tensor([len(rows)], device=rows.device)
    found = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(found, mine)
    return torch.cat(found).tolist()


# -- models and runs


def wrap(model: nn.Module, *, sync_batchnorm: bool = False) -> nn.Module:
    """The module to call in training: DistributedDataParallel around ``model``, or ``model`` itself when alone.

    The parameters of the first process go to all. Give ``fit`` the bare model, so that files hold plain names, and call
    the wrapped one in ``loss_fn``. ``sync_batchnorm`` is for CUDA and must come before the optimizer is made.
    """
    if world_size() == 1:
        return model
    if sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    devices = [parameter.device for parameter in model.parameters()][:1]
    ids = [devices[0].index] if devices and devices[0].type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def average_gradients(model: nn.Module) -> None:
    """From now on ``backward`` leaves the mean over processes in every gradient: :func:`wrap` for losses that are no
    ``forward`` call, such as those of recommenders.

    Start from equal parameters (equal seeds); every process must reach the same parameters in every backward pass.
    """
    if world_size() > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_average_gradient)


def _average_gradient(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


def from_main(make: Callable[[], Any]) -> Any:
    """What ``make`` returns in the first process, in all of them; its UserError is raised in all."""
    if world_size() == 1:
        return make()
    answer = [None, None]
    if is_main():
        try:
            answer = [make(), None]
        except UserError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, 0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Buffers, such as running statistics, of the first process to all: before the processes judge a model together."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def open_run(*args: Any, **kwargs: Any) -> Run:
    """``Run.open`` in the first process; the others get a :class:`Follower` of the same directory.

    A UserError of the first process is raised in all.
    """
    mine: list[Run] = []

    def opened() -> str:
        mine.append(Run.open(*args, **kwargs))
        return str(mine[0].path)

    path = Path(from_main(opened))
    return mine[0] if mine else Follower(path, args[2] if len(args) > 2 else kwargs["config"])


class Follower(Run):
    """The run that another process writes: reads as :class:`Run` does, writes nothing."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        super().__init__(path, config, None)

    def note(self, **facts: Any) -> None:
        self._facts |= facts

    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def truncate_metrics(self, epoch: int, logged: int | None = None) -> None:
        pass

    def finish(self, result: Mapping[str, Any]) -> None:
        pass

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        pass

    def save_best(self, state: Mapping[str, Any]) -> None:
        pass
