"""Training steps as CUDA graphs: recorded once, then replayed as one launch instead of some hundred.

    capture = StepCapture(model, optimizer, step, loss_fn)          # fit(..., cuda_graph="auto") makes one
    for batch in batches:
        terms = capture(batch)                                      # the same numbers as without

A recording holds forward, backward and update for batches of one form: shapes, numbers beside the tensors, and what
the step is about to do (a mirrored batch or a plain one). Each form has a recording of its own; batches that a sampler
fills up (:func:`gfml.ranking.sampling.padded`) have one form. The first batches of a form run as they are, on another stream,
and one of them is watched for anything that makes the host wait for the device, which no recording can hold. Recordings of
Adam and AdamW read the learning rates from the device, so that a schedule may change them at every step. Other settings are
constants of a recording: when they change, it is made anew. Where a step cannot be recorded training goes on without, and
``reason`` says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gfml.base.errors import UserError
from gfml.engine.optimizers import LazyAdamW

MODES = ("auto", "0", "1")
# Batches of a form that run as they are: in the first, optimizers make their state and kernels are compiled.
WARM_UP = 2
# Recordings at a time. More forms than that, over and over, are batches without a constant form.
MOST_FORMS = 4


class CannotRecord(Exception):
    """Why a step cannot be recorded."""


class Recording(Protocol):
    """Something that runs again what it was made of."""

    def replay(self) -> None: ...


class StepCapture:
    """Calls of a training step with a batch each, recorded where that can be; see the module text.

    step: as in :func:`gfml.engine.train.fit`. A class of steps that can be recorded has ``graph_key()``, a hashable that
        says what the next call does, and ``replayed()``, which counts a call that was replayed; a function needs neither.
        A step that schedules learning rates sets those of the next call in ``prepare(optimizer)``, but for tensors.
    required: UserError instead of going on without.
    record: makes a :class:`Recording` of a function; tests give another than CUDA's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        step: Callable[..., Mapping[str, Any]],
        loss_fn: Callable[[Any], Mapping[str, Any]],
        *,
        required: bool = False,
        record: Callable[[Callable[[], None]], Recording] | None = None,
    ) -> None:
        self.model, self.optimizer, self.step, self.loss_fn = model, optimizer, step, loss_fn
        self.required, self.record = required, record or _cuda_graph
        self.reason = ""
        self._watch = record is None
        self._forms: dict[Hashable, _Form] = {}
        self._seen: dict[Hashable, int] = {}
        self._settings: Hashable = None
        self._rates = _Rates(optimizer, next(model.parameters()).device)
        self._steps = self._recordings = 0

    def __call__(self, batch: Any) -> Mapping[str, Any]:
        """The terms of one step, as the step gives them."""
        if self.reason:
            return self._plain(batch)
        try:
            return self._recorded(batch)
        except CannotRecord as error:
            self._give_up(str(error))
            return self._plain(batch)

    def forget(self) -> None:
        """Drop the recordings: the model is about to use other tensors."""
        self._forms.clear()

    def _plain(self, batch: Any) -> Mapping[str, Any]:
        return self.step(lambda: self.loss_fn(batch), self.optimizer)

    def _recorded(self, batch: Any) -> Mapping[str, Any]:
        self._steps += 1
        for part in _chain(self.step):
            if hasattr(part, "prepare"):
                part.prepare(self.optimizer)
        settings = _settings(self.optimizer, rates=not self._rates.tensors)
        if settings != self._settings:
            self._settings = settings
            self.forget()
        tensors, form = _taken_apart(batch)
        key = form, graph_key(self.step)
        found = self._forms.get(key)
        if found is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if len(self._seen) > MOST_FORMS:
                raise CannotRecord(f"batches come in more than {MOST_FORMS} forms")
            if self._seen[key] <= WARM_UP:
                return self._warm(batch, watch=self._seen[key] == WARM_UP)
            self._rates.fill()
            found = self._forms[key] = self._new_form(batch, tensors)
        else:
            self._rates.fill()
            torch._foreach_copy_(found.tensors, tensors)
            replayed(self.step)
            for count, more in found.counts:
                count += more
        found.recording.replay()
        return found.terms()

    def _warm(self, batch: Any, watch: bool) -> Mapping[str, Any]:
        """A step as it is, on a stream of its own."""
        if not self._watch:
            return self._plain(batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _watched(watch) as waits:
            terms = self._plain(batch)
        torch.cuda.current_stream().wait_stream(stream)
        if waits:
            self._give_up(f"the step waits for the device at {waits[0]}")
        return terms

    def _new_form(self, batch: Any, tensors: list[Tensor]) -> _Form:
        self._recordings += 1
        if self._recordings > 8 and 2 * self._recordings > self._steps:
            raise CannotRecord("the optimizer's settings change from step to step")
        own = [tensor.clone() for tensor in tensors]
        form = _Form(own)
        static = _put_together(batch, iter(own))
        before, counts = _host_state(self.step), _host_counts(self.optimizer)
        counted = [count.clone() for count in counts]

        def once() -> None:
            form.keep(self._plain(static))

        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self._rates.used(), _capturable(self.optimizer, self._watch):
                form.recording = self.record(once)
        except (RuntimeError, AssertionError) as error:
            for part, values in before:
                vars(part).update(values)
            self.optimizer.zero_grad(set_to_none=True)
            raise CannotRecord(str(error).strip().splitlines()[0]) from error
        form.counts = [(count, count - old) for count, old in zip(counts, counted, strict=True)]
        return form

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.forget()
        if self.required:
            raise UserError(f"found `cuda_graph 1`, but {reason}: give `cuda_graph auto or 0`")


class _Form:
    """One recording with the tensors it reads and the terms it writes."""

    recording: Recording

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.counts: list[tuple[Tensor, Tensor]] = []
        self.names: list[str] = []
        self.numbers: dict[str, float] = {}
        self.values: Tensor | None = None

    def keep(self, terms: Mapping[str, Any]) -> None:
        """Terms as one tensor, so that a replay leaves one thing to copy."""
        self.names = [name for name, value in terms.items() if isinstance(value, Tensor)]
        self.numbers = {name: value for name, value in terms.items() if not isinstance(value, Tensor)}
        self.values = torch.stack([terms[name].detach().double().reshape(()) for name in self.names])

    def terms(self) -> dict[str, Any]:
        return dict(zip(self.names, self.values.clone().unbind(), strict=True)) | self.numbers


def capture_problem(model: nn.Module, step: Any, optimizer: Any, device: torch.device) -> str | None:
    """Why steps of this model cannot be recorded; None where that is only seen when they run.

    A model or a step says with a text ``host_state`` that it depends on more than parameters, buffers and the batch.
    """
    if device.type != "cuda":
        return f"the device is {device.type}"
    for part in (model, step):
        if text := getattr(part, "host_state", None):
            return text
    if isinstance(optimizer, (torch.optim.SGD, LazyAdamW)):
        return None
    # Adagrad's count, on the host, does not enter a step whose rate does not decay by it.
    kept = (
        group.get("fused") or group.get("capturable") or group.get("lr_decay") == 0 for group in optimizer.param_groups
    )
    return None if all(kept) else f"{type(optimizer).__name__} counts its steps on the host"


def _host_counts(optimizer: Any) -> list[Tensor]:
    """Step counters on the host of parameters elsewhere, which no recording can move."""
    states = (item for part in getattr(optimizer, "parts", (optimizer,)) for item in part.state.items())
    counts = [(parameter, state["step"]) for parameter, state in states if "step" in state]
    return [count for parameter, count in counts if count.device != parameter.device]


class _Rates:
    """Learning rates of the groups on the device, where recordings read them; none of optimizers that take numbers alone."""

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self._optimizer, self._held = optimizer, isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        # The fused kernel of CUDA reads float32.
        kind = torch.float64 if device.type == "cpu" else torch.float32
        self.tensors = [torch.zeros((), dtype=kind, device=device) for _ in self.groups]
        self._filled: list[float | None] = [None] * len(self.groups)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Those of now: loading a state makes others."""
        return self._optimizer.param_groups if self._held else []

    def fill(self) -> None:
        """Bring over what has changed, without a wait."""
        for place, (group, tensor) in enumerate(zip(self.groups, self.tensors, strict=True)):
            if group["lr"] != self._filled[place]:
                self._filled[place] = group["lr"]
                tensor.fill_(group["lr"])

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the groups hold the tensors."""
        groups = self.groups
        numbers = [group["lr"] for group in groups]
        for group, tensor in zip(groups, self.tensors, strict=True):
            group["lr"] = tensor
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number


def _cuda_graph(call: Callable[[], None]) -> Recording:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@contextmanager
def _watched(on: bool) -> Any:
    """Places where the host waited for the device inside the block."""
    waits: list[str] = []
    if not on:
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [
        f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)
    ]


def _taken_apart(value: Any) -> tuple[list[Tensor], Hashable]:
    """Tensors of a batch, and everything about it that is not in them."""
    if isinstance(value, Tensor):
        return [value], (tuple(value.shape), value.dtype, value.device)
    if is_dataclass(value):
        parts = [(part.name, getattr(value, part.name)) for part in fields(value)]
    elif isinstance(value, (tuple, list)):
        parts = list(enumerate(value))
    elif isinstance(value, Hashable):
        return [], value
    else:
        raise CannotRecord(f"a batch holds a {type(value).__name__}")
    tensors, forms = [], []
    for name, part in parts:
        found, form = _taken_apart(part)
        tensors += found
        forms.append((name, form))
    return tensors, (type(value), tuple(forms))


def _put_together(value: Any, tensors: Any) -> Any:
    """The batch with other tensors, in the order of :func:`_taken_apart`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{part.name: _put_together(getattr(value, part.name), tensors) for part in fields(value)}
        )
    if isinstance(value, (tuple, list)):
        parts = [_put_together(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def graph_key(step: Any) -> Hashable:
    """What the next call of a step does; functions always do the same. CannotRecord for other steps without a key."""
    if hasattr(step, "graph_key"):
        return step.graph_key()
    if isinstance(step, (partial, FunctionType)):
        return ()
    raise CannotRecord(f"a {type(step).__name__} does things on the host")


def replayed(step: Any) -> None:
    """Tell a step that a call of it was replayed."""
    if hasattr(step, "replayed"):
        step.replayed()


def _host_state(step: Any) -> list[tuple[Any, dict[str, Any]]]:
    """What a failed recording may have changed in a step, and in the step inside it."""
    return [(part, dict(vars(part))) for part in _chain(step) if hasattr(part, "graph_key")]


def _chain(step: Any) -> Iterator[Any]:
    """A step, the step inside it, and so on."""
    while step is not None:
        yield step
        step = getattr(step, "inner", None)


def _settings(optimizer: Any, *, rates: bool) -> Hashable:
    """Numbers of the parameter groups, which a recording holds as constants; learning rates if ``rates``."""
    return tuple(
        (name, value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if isinstance(value, (int, float, bool, tuple)) and (rates or name != "lr")
    )


@contextmanager
def _capturable(optimizer: Any, wanted: bool) -> Iterator[None]:
    """Inside, the optimizer lets itself be recorded."""
    groups = [group for group in optimizer.param_groups if wanted and group.get("capturable") is False]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
