"""Optimizers that touch what a batch touches: rows of a table whose gradient is 0 stay as they are.

A dense optimizer walks the whole table at every step, whatever the batch: with momentum and decay every row moves. The
lazy ones treat each row (the first dimension of a parameter) as a parameter of its own that is stepped only when its
gradient is not 0. Neither its moments nor its weights decay in between. The step counter, and so the correction of the
moments' bias, is global.

    LazyAdamW     moments m, v and decoupled decay at touched rows only. Differs from AdamW wherever a row is left out of a
                  batch: there AdamW goes on moving the row by its momentum, and decays m, v and the row itself.
    LazyAdagrad   the same numbers as Adagrad, which leaves rows without gradient alone anyway, but for the decay, which
                  is decoupled and at touched rows only.

Which rows a gradient has is known of those that :mod:`gfml.fused` made (:func:`gfml.fused.touched_rows`), on CUDA by one
kernel for LazyAdamW; of others all rows are looked at. States are those of torch's optimizers of the same name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gfml.base.optim import light, zeros_like
from gfml.fused import Held, threads_for, touched_on_device, touched_rows

OPTIMIZERS = ("adamw", "lazy_adamw", "adagrad")


def build_optimizer(name: str, groups: Iterable[dict[str, Any]], lr: float) -> Optimizer:
    """One of OPTIMIZERS for parameter groups with their own ``weight_decay``; adamw is torch's fused AdamW."""
    if name == "adamw":
        return DenseAdamW(groups, lr=lr, fused=True)
    return {"lazy_adamw": LazyAdamW, "adagrad": LazyAdagrad}[name](groups, lr=lr)


class _AdamW(light(torch.optim.AdamW)):
    """An AdamW that can sum the gradients of rows itself: :func:`gfml.engine.train.plain_step` lets it."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._rows = _RowSteps()

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Inside the block fused losses may hand over gradients as :class:`gfml.fused.Held`, for the next step alone."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._rows.taken = {}
        for parameter in parameters:
            parameter.taken = self._rows.taken
        try:
            yield
        except BaseException:
            self._rows.taken = {}
            raise
        finally:
            for parameter in parameters:
                del parameter.taken

    def _step_taken(self, *, dense: bool) -> None:
        """Step the tables whose gradients were handed over."""
        taken, self._rows.taken = self._rows.taken, {}
        for group in self.param_groups if taken else ():
            for parameter in group["params"]:
                if parameter in taken:
                    moments, numbers = self._now(group, parameter)
                    self._rows.sum_and_step(taken[parameter], parameter, moments, numbers, dense=dense)

    def _now(self, group: dict[str, Any], parameter: Tensor) -> tuple[list[Tensor], tuple]:
        """The moments of a parameter and the numbers of its next step, which is counted; see ``adamw_rows``."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = (zeros_like(parameter) for _ in range(2))
        steps, (beta1, beta2) = _count(state, parameter), group["betas"]
        keep, rate = 1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - beta1**steps)
        numbers = (keep, rate, beta1, beta2, _inverse_root(1 - beta2**steps), group["eps"])
        return [state["exp_avg"], state["exp_avg_sq"]], numbers


class DenseAdamW(_AdamW):
    """torch's AdamW, also of gradients that were handed over row by row."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` as in torch."""
        loss = _evaluated(closure)
        if _with_gradient(self):
            super().step()
        self._step_taken(dense=True)
        return loss


class LazyAdamW(_AdamW):
    """AdamW at the rows that have a gradient; see the module text. Settings as AdamW's, without amsgrad."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` as in torch."""
        loss = _evaluated(closure)
        for group, parameter in _with_gradient(self):
            self._rows("adamw_rows", _adamw, parameter, *self._now(group, parameter))
        self._step_taken(dense=False)
        return loss


class LazyAdagrad(light(torch.optim.Adagrad)):
    """Adagrad with decoupled decay at the rows that have a gradient; see the module text."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value, eps=eps
        )
        self._rows = _RowSteps()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` as in torch."""
        loss = _evaluated(closure)
        for group, parameter in _with_gradient(self):
            state = self.state[parameter]
            state["step"] += 1
            numbers = (1 - group["lr"] * group["weight_decay"], group["lr"], group["eps"])
            self._rows("adagrad_rows", _adagrad, parameter, [state["sum"]], numbers)
        return loss


class _RowSteps:
    """Runs a rule of :mod:`gfml.kernels.rows` on CPUs, and its equivalent in torch elsewhere."""

    def __init__(self) -> None:
        self._team: Any = None
        self.taken: dict[Tensor, Held] = {}

    def sum_and_step(
        self, held: Held, parameter: Tensor, moments: list[Tensor], numbers: tuple, *, dense: bool
    ) -> None:
        """AdamW at the rows of a gradient that was handed over; dense: at all rows of the table."""
        from gfml.base.compiled import Team
        from gfml.kernels.rows import adamw_chains

        self._team = self._team or Team()
        arrays = [t.detach().numpy() for t in (parameter, *moments)]
        values, number = held.out.rows.reshape(-1, parameter.shape[1]), len(parameter) if dense else len(held.rows)
        gradient = held.now, held.rows, held.chains, values, held.scale
        parts = threads_for(number * parameter.shape[1])
        self._team(
            lambda part: adamw_chains(
                number * part // parts, number * (part + 1) // parts, dense, *gradient, *arrays, *numbers
            ),
            parts,
        )
        torch.autograd.graph.increment_version([parameter, *moments])

    def __call__(
        self, rule: str, anywhere: Callable[..., None], parameter: Tensor, states: list[Tensor], numbers: tuple
    ) -> None:
        tensors = [parameter, parameter.grad, *states]
        on_device = touched_on_device(parameter.grad) if rule == "adamw_rows" else None
        if on_device is not None and all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors):
            from gfml.kernels.triples import adamw

            adamw(*on_device, tensors, numbers)
            return
        if any(t.device.type != "cpu" or not t.is_contiguous() or t.dtype not in _KINDS for t in tensors):
            anywhere(*tensors, *numbers)
            return
        from gfml.base.compiled import Team
        from gfml.kernels import rows as kernels

        self._team = self._team or Team()
        known = touched_rows(parameter.grad)
        size = len(parameter) if parameter.dim() else 1
        rows = np.arange(size) if known is None else known
        arrays = [t.detach().view(size, -1).numpy() for t in tensors]
        parts = threads_for(len(rows) * arrays[0].shape[1])

        def work(part: int) -> None:
            mine = rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]
            getattr(kernels, rule)(mine, *arrays, *numbers)

        self._team(work, parts)
        # Written through NumPy: a graph that was built on the old values must not go on with the new ones.
        torch.autograd.graph.increment_version([parameter, *states])


_KINDS = (torch.float32, torch.float64)


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *numbers: float) -> None:
    """:func:`gfml.kernels.rows.adamw_rows` at all rows whose gradient is not 0."""
    keep, rate, beta1, beta2, root, eps = numbers
    touched = _touched(g)
    m.copy_(torch.where(touched, beta1 * m + (1 - beta1) * g, m))
    v.copy_(torch.where(touched, beta2 * v + (1 - beta2) * g * g, v))
    p.copy_(torch.where(touched, keep * p - rate * m / (v.sqrt() * root + eps), p))


def _adagrad(p: Tensor, g: Tensor, total: Tensor, keep: float, rate: float, eps: float) -> None:
    """:func:`gfml.kernels.rows.adagrad_rows` at all rows whose gradient is not 0."""
    total += g * g
    p.copy_(torch.where(_touched(g), keep * p - rate * g / (total.sqrt() + eps), p))


def _count(state: dict[str, Any], parameter: Tensor) -> Tensor | float:
    """The number of this step. Elsewhere than on the CPU it stays on the device: recorded steps go on counting there."""
    if parameter.device.type == "cpu":
        steps = state["step"].numpy()
        steps += 1
        return float(steps)
    state["step"] = state["step"].to(parameter.device)
    state["step"] += 1
    return state["step"].double()  # in float32 1 - beta2^steps would lose four digits


def _inverse_root(value: Tensor | float) -> Tensor | float:
    return value.rsqrt() if isinstance(value, Tensor) else 1 / math.sqrt(value)


def _touched(gradient: Tensor) -> Tensor:
    """Bool, of a shape that broadcasts to the gradient's."""
    other = tuple(range(1, gradient.dim()))
    return (gradient != 0).any(other, keepdim=True) if other else gradient != 0


def _with_gradient(optimizer: Optimizer) -> list[tuple[dict[str, Any], Tensor]]:
    return [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _evaluated(closure: Callable[[], Tensor] | None) -> Tensor | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
