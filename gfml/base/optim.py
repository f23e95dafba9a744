"""torch's optimizers without its compiler, and memory for what is as large as a table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer


class _Light:
    """The methods of an optimizer without what hides them from torch's compiler, which imports it first."""

    param_groups: list[dict[str, Any]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        return inspect.unwrap(Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inspect.unwrap(Optimizer.load_state_dict)(self, state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            inspect.unwrap(Optimizer.zero_grad)(self, set_to_none)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return inspect.unwrap(super().step.__func__)(self, closure)  # type: ignore[misc]


@cache
def light(kind: type[Optimizer]) -> Any:
    """``kind``, one of torch's optimizers, with the same steps and states: building it saves two CPU seconds.

    torch wraps these methods of its optimizers so that a program that compiles its steps leaves them alone; calling
    them imports the compiler. Only for steps that are not compiled.
    """
    return type(kind.__name__, (_Light, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__})


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of the same shape, type and device; on a CPU in large pages, which NumPy asks the system for and torch does not.

    Rows of a large table are then found faster, and memory that is new at every step costs a tenth.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return torch.from_numpy(np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
