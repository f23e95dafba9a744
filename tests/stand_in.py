"""A device that stands in for a GPU: its tensors say another device than the CPU, hold numbers, and count what comes back.

Tensors of the device "meta" with a hidden tensor on the CPU each: programs take the ways they take on CUDA, autograd
walks back through them, and every operation passes :class:`StandIn`, which does it on the hidden tensors, refuses those of
two devices, forward and backward, and notes those that would make a host wait for a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gfml.engine.capture import StepCapture

DEVICE = torch.device("meta")
# Operations whose result is a number on the host, or has a size that only the numbers tell.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
         "bincount", "equal", "is_nonzero")  # fmt: skip


# Operations that may take tensors of two devices.
BETWEEN = (
    "_to_copy",
    "copy_",
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_has_compatible_shallow_copy_type",
)


class OnDevice(Tensor):
    """A tensor that says it is on the device; ``hidden`` has its numbers."""

    hidden: Tensor

    @staticmethod
    def __new__(cls, hidden: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, hidden.shape, strides=hidden.stride() if hidden.layout == torch.strided else None,
            storage_offset=hidden.storage_offset(), dtype=hidden.dtype, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.hidden = hidden
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.hidden!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the stand-in device")


class _AnyGenerator(torch.Generator):
    """A generator of the CPU, for whatever device."""

    def __new__(cls, device: Any = None) -> _AnyGenerator:
        return super().__new__(cls, "cpu")


class StandIn(TorchDispatchMode):
    """Inside, the device is there. waits: operations that would have made the host wait so far, and how often each."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        here = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice)]
        wanted = kwargs.get("device")
        there = torch.device(wanted).type == DEVICE.type if wanted is not None else bool(here)
        if not here and not there:
            return func(*args, **kwargs)
        if here and any(leaf.dim() for leaf in _strays((args, kwargs))) and _name(func) not in BETWEEN:
            raise RuntimeError(f"{func} of tensors on two devices")
        if wait := _wait(func, args, kwargs, here, there):
            self.waits[wait] += 1
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        known = {id(leaf.hidden): leaf for leaf in here}
        args, kwargs = tree_map(lambda leaf: leaf.hidden if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
        found = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:  # the outer tensor's own shape changes
            with no_dispatch():
                func(here[0], *args[1:], **kwargs)
        if not there:
            return found.clone() if id(found) in known else found
        return tree_map(lambda part: _wrapped(part, known), found)


def _wrapped(part: Any, known: dict[int, OnDevice]) -> Any:
    if not isinstance(part, Tensor):
        return part
    return known[id(part)] if id(part) in known else OnDevice(part)


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _strays(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice)]


def _wait(func: Any, args: Any, kwargs: dict[str, Any], here: list[OnDevice], there: bool) -> str:
    """The name of an operation that would make the host wait for a GPU; empty for others."""
    name = _name(func)
    if name in WAITS or (name == "repeat_interleave" and len(args) < 2 and kwargs.get("output_size") is None):
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [part for part in args[1] if part is not None and part.dtype in (torch.bool, torch.uint8)]
        return f"{name} by a mask" if masks else "copy from the host" if _strays(args) else ""
    if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
        if not there or (name == "copy_" and len(here) < 2):
            return "copy to the host" if here and not (name == "copy_" and args[0] is here[0]) else "copy from the host"
        return "" if here else "copy from the host"
    return ""


@contextmanager
def stand_in_device() -> Iterator[StandIn]:
    """Programs that are started inside get the device whatever ``--device`` says; the mode is given, not yet entered."""
    autocast = torch.autocast

    def cast(device: str, *more: Any, **named: Any) -> Any:
        return autocast("cpu" if device == DEVICE.type else device, *more, **named)

    with (
        mock.patch("gfml.program.driver.resolve_device", lambda settings: DEVICE),
        mock.patch.object(torch, "autocast", cast),
        mock.patch.object(torch, "Generator", _AnyGenerator),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type]),
    ):
        yield StandIn()


class Replayed:
    """What a CUDA graph does, without one: making it runs the program and moves no tensor, replaying moves tensors alone."""

    def __init__(self, owner: StepCapture, call: Callable[[], None]) -> None:
        self.owner, self.call, self.replays = owner, call, 0
        self.then, self.rates = _host_state(owner.step), [group["lr"] for group in owner.optimizer.param_groups]
        before, draws = [tensor.clone() for tensor in self.tensors(there=True)], torch.get_rng_state()
        call()
        self._put(self.tensors(there=True), before)
        torch.set_rng_state(draws)

    def tensors(self, *, there: bool) -> list[Tensor]:
        """What a step may change on the device, or of the optimizer elsewhere."""
        model, optimizer = self.owner.model, self.owner.optimizer
        own = [*model.parameters(), *model.buffers()] if there else []
        states = [state for part in getattr(optimizer, "parts", (optimizer,)) for state in part.state.values()]
        found = [*own, *(value for state in states for value in state.values() if isinstance(value, Tensor))]
        return [tensor for tensor in found if (tensor.device == next(model.parameters()).device) == there]

    def replay(self) -> None:
        groups = self.owner.optimizer.param_groups
        now, rates = _host_state(self.owner.step), [group["lr"] for group in groups]
        counts = [tensor.clone() for tensor in self.tensors(there=False)]
        _restore(self.then)
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        self.call()
        _restore(now)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self._put(self.tensors(there=False), counts)
        self.replays += 1

    @staticmethod
    @torch.no_grad()
    def _put(tensors: list[Tensor], values: list[Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _host_state(step: Any) -> list[tuple[Any, dict[str, Any]]]:
    found = []
    while hasattr(step, "graph_key"):
        found.append((step, dict(vars(step))))
        step = getattr(step, "inner", None)
    return found


def _restore(state: list[tuple[Any, dict[str, Any]]]) -> None:
    for part, values in state:
        vars(part).clear()
        vars(part).update(values)
