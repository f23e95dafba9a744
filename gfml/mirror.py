"""Mirror Gradient: every few batches a descent step, then a smaller ascent step on the same batch.

    theta' = theta - alpha1 * lr * grad L(theta);   theta = theta' + alpha2 * lr * grad L(theta')

With plain SGD this is a step of size (alpha1 - alpha2) * lr on L plus a penalty
alpha1 * alpha2 * lr / (2 (alpha1 - alpha2)) * |grad L|^2, up to O(lr^3).

Use with any loop; the closure computes the loss of one fixed batch and does not call backward::

    mirror = MirrorGradient(torch.optim.Adam(model.parameters(), lr=1e-3), alpha1=1.0, alpha2=0.2, every=3)
    for batch in batches:
        report = mirror.step(lambda: loss_fn(model, batch))

with ``gfml.engine.train.fit(..., step=mirror)`` (with ``counter="epoch"`` let its ``batches(epoch)`` call
``mirror.new_epoch()`` first), or by hand when a batch needs several backward passes::

    if mirror.is_mirror_step():
        with mirror.first_half():
            loss_fn(model, batch).backward()
        with mirror.second_half():
            loss_fn(model, batch).backward()
    else:
        with mirror.ordinary_step():
            loss_fn(model, batch).backward()

What it does to the rest of a training program:

- Regularisers inside the loss are scaled and inverted with it. Weight decay of the optimizer is not: see ``wd``.
- A scheduler is stepped by the caller, once per batch or epoch; both halves use the same learning rate.
- Sampled negatives belong to the batch, not to the closure: both halves must see the same ones.
- Dropout and other noise is drawn anew for the second half unless ``rng="replay"``.
- Batch norm in train mode updates its running statistics in both halves, unless ``statistics="first"``.
- The loss to report is that of the first half, at the parameters before the step.
- The hook moves nothing from the device to the host, except the skip decision of ``scaler`` and ``guard``.

Differences from the paper: its batch counter starts at 1, so its schedule is ``phase=every - 1``. Its
published trainer is ``mode="two_step", counter="epoch", clip_halves="second"``. There the optimizer's
moments are shared by both halves, so that under Adam the second half usually still descends; ``fused``
and ``precond`` keep the intended ascent. ``alpha2=0`` is not plain training in ``two_step`` with a
stateful optimizer, whose state still advances twice; ``every=0`` is.

Source: Zhong et al., Mirror Gradient: Towards Robust Multimodal Recommender Systems via Exploring Flat
Local Minima, WWW 2024. ``backstitch`` has the order of Wang et al., Backstitch, Interspeech 2017.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from gfml.base.errors import UserError, choice_error

MODES = ("two_step", "fused", "precond", "sgd_mirror", "backstitch", "repeat")
_CHOICES = {
    "mode": MODES,
    "counter": ("global", "epoch"),
    "rng": ("fresh", "replay"),
    "wd": ("both", "first", "once"),
    "clip_halves": ("both", "second"),
    "statistics": ("both", "first"),
}

Closure = Callable[[], Tensor | Sequence[Tensor] | Mapping[str, Any]]


@dataclass(frozen=True)
class StepReport:
    """What one batch did. All tensors are detached and stay on their device.

    loss: scalar, at the parameters before the step. terms: ``{"loss": loss}`` and the closure's named terms.
    mirror_loss: scalar at the intermediate point; None if the batch was not mirrored or was skipped before it.
    skipped: a gradient was not finite and nothing was changed (only ever True with ``scaler`` or ``guard``).
    diagnostics: with ``diagnostics=True``, on mirrored batches, of the raw gradients g1 and g2 (before
        clipping and alpha): grad_norm, mirror_grad_norm, grad_cosine, and displacement_cosine = cos(second
        displacement, g2), which is +1 for a true ascent (absent in ``fused``, which has one displacement).
    """

    loss: Tensor
    terms: dict[str, Any]
    mirror_loss: Tensor | None
    mirrored: bool
    skipped: bool
    diagnostics: dict[str, Tensor]


@dataclass
class _Pair:
    """What lives between the two halves of one mirrored batch; tensors are keyed by parameter."""

    random_state: list[Callable[[], Any]] = field(default_factory=list)  # each call restores one generator
    raw: dict[Tensor, Tensor] = field(default_factory=dict)  # g1 for the diagnostics
    held: dict[Tensor, Tensor] = field(default_factory=dict)  # g1 after clipping, for `fused`
    middle: dict[Tensor, Tensor] = field(default_factory=dict)  # theta' for the diagnostics
    start: dict[Tensor, Tensor] = field(default_factory=dict)  # theta, where a way back is needed
    state: dict[Tensor, Any] | None = None  # optimizer state at theta, where a way back is needed
    buffers: dict[str, Tensor] = field(default_factory=dict)  # the module's before the batch, likewise
    skipped: bool = False


class MirrorGradient:
    """Runs an optimizer with the mirror step on every ``every``-th batch.

    alpha1, alpha2: factors of the descent and of the inverted gradient, alpha1 > alpha2 >= 0.
    every: mirror batch i (from 0) when i % every == phase; 0 or None, or alpha2=None, switch the mirror
        off, and then each step is bit for bit the optimizer's own.
    counter: ``global`` counts all batches; ``epoch`` starts again at each ``new_epoch()``.
    mode: ``two_step`` steps the optimizer with alpha1 g1, then with -alpha2 g2 (as published).
        ``fused`` takes g2 at theta - alpha1 lr g1, goes back and steps once with alpha1 g1 - alpha2 g2.
        ``sgd_mirror`` steps with alpha1 g1, then adds alpha2 lr g2.
        ``precond`` steps with alpha1 g1, then adds alpha2 lr g2 / (sqrt(v) + eps) with Adam's second moment v
        of that step (bias-corrected, left unchanged); Adam and AdamW only.
        ``backstitch`` steps with -alpha2 g1, then with alpha1 g2.
        ``repeat`` steps with alpha1 g1, then with +alpha2 g2: the control that has the extra step but no inversion.
    rng: ``replay`` gives the second half the random draws of the first, from the default CPU generator, those
        of the parameters' CUDA devices and ``generators``; Python's and numpy's are not covered.
    wd: which optimizer step of a mirrored batch decays the weights: ``both`` (as published), ``first``, or
        ``once`` = the one with alpha1, as a plain step would (the same as ``first`` but in ``backstitch``).
        Matters only in the three modes that step twice.
    clip: largest norm of a gradient, before it is multiplied by alpha, in both halves and on ordinary batches.
        clip_halves="second" is the published trainer's rule, for ``two_step``: the first half is not clipped,
        and the second is clipped after the multiplication.
    scaler: a GradScaler. A mirrored batch is done in full or not at all, and the scale is updated once.
        Within the contexts the caller runs ``scaler.scale(loss).backward()``; ``step`` does it itself.
    guard: the same all-or-nothing rule without a scaler. Both keep a copy of parameters, state and buffers during
        a batch and read one flag from the device.
    module: the network whose buffers belong to the rule: a batch with NaN leaves NaN in the running statistics of
        batch norm too. Needed by ``scaler`` and ``guard``, and by ``statistics="first"``.
    statistics: ``first`` lets batch norm update its running statistics in the first half only, so that a mirrored
        batch counts once in them, at the parameters before the step.
    params: restricts the inverted half to these parameters; the others take the alpha1 step alone.

    Examples:
        One mirrored step of SGD on L = w^2 / 2 from w = 1 with rate 0.5: down to 1 - 0.5 = 0.5, then up by 0.4 * 0.5 * 0.5.

        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> mirror = MirrorGradient(torch.optim.SGD([w], lr=0.5), alpha1=1.0, alpha2=0.4, every=1)
        >>> report = mirror.step(lambda: w.square() / 2)
        >>> w.item(), report.mirrored, report.loss, report.mirror_loss
        (0.6000000238418579, True, tensor(0.5000), tensor(0.1250))

    Errors: UserError for settings out of range and for optimizers that call the closure themselves (LBFGS), ValueError
    for wrong calls, such as a closure that calls backward. Without ``guard`` an exception
    raised in the second half leaves the parameters at the intermediate point (``fused``: at theta).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        alpha1: float = 1.0,
        alpha2: float | None = 0.2,
        every: int | None = 3,
        mode: str = "two_step",
        counter: str = "global",
        phase: int = 0,
        rng: str = "fresh",
        wd: str = "both",
        clip: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        params: Iterable[Tensor] | None = None,
        *,
        clip_halves: str = "both",
        guard: bool = False,
        generators: Sequence[torch.Generator] = (),
        diagnostics: bool = False,
        module: nn.Module | None = None,
        statistics: str = "both",
    ) -> None:
        self.optimizer = optimizer
        self.alpha1, self.alpha2, self.every, self.mode = alpha1, alpha2, every or 0, mode
        self.counter, self.phase, self.rng, self.wd = counter, phase, rng, wd
        self.clip, self.clip_halves = clip, clip_halves
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.guard, self.generators, self.diagnostics = guard, tuple(generators), diagnostics
        self.module, self.statistics = module, statistics
        self._check_settings()
        self._filter = None if params is None else self._checked_filter(params)
        self._pair: _Pair | None = None
        self._index = 0
        self._skipped = self._noted = False
        self._diagnosis: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ use

    @property
    def enabled(self) -> bool:
        """False when every step is the bare optimizer's."""
        return self.every > 0 and self.alpha2 is not None

    @property
    def _ascent(self) -> float:
        return 0.0 if self.alpha2 is None else self.alpha2

    def is_mirror_step(self) -> bool:
        """Whether the next batch is mirrored."""
        return self.enabled and self._index % self.every == self.phase

    @property
    def host_state(self) -> str:
        """Why batches cannot be recorded; empty where they can."""
        if self.rng == "replay" or self._must_check:
            return "the mirror step reads back random states or the skip decision"
        return ""

    def graph_key(self) -> bool:
        """What a recording of the next batch depends on: whether it is mirrored (:mod:`gfml.engine.capture`)."""
        return self.is_mirror_step()

    def replayed(self) -> None:
        """Count a batch that a recording made."""
        self._index += 1

    def new_epoch(self) -> None:
        """Start the batch count again, if ``counter`` is ``epoch``."""
        if self.counter == "epoch":
            self._index = 0

    def step(self, closure: Closure) -> StepReport:
        """One batch: loss, gradient and update, twice where mirrored.

        closure() returns a scalar loss with its graph, a sequence of scalars that is summed, or a dict with
        the loss under "loss" and named terms. It is called once, on mirrored batches twice; it must not
        call backward nor change its batch. Gradients left from before are cleared.
        """
        if not self.is_mirror_step():
            with self.ordinary_step():
                loss, terms = self._backward(closure)
            return StepReport(loss, terms, None, False, self._skipped, {})
        mirror_loss = None
        with self.first_half():
            loss, terms = self._backward(closure)
        if self._pair is not None and self._pair.skipped:
            self._close(skipped=True)
        else:
            with self.second_half():
                mirror_loss, _ = self._backward(closure)
        return StepReport(loss, terms, mirror_loss, True, self._skipped, self._diagnosis)

    def __call__(self, closure: Closure, optimizer: Optimizer) -> dict[str, Any]:
        """``step`` in the form of ``gfml.engine.train.fit``.

        Returns the terms of the first half; on mirrored batches also mirror_loss and the diagnostics.
        """
        if optimizer is not self.optimizer:
            raise ValueError("the mirror step was built for another optimizer: pass fit the one it wraps")
        report = self.step(closure)
        mirror_loss = {} if report.mirror_loss is None else {"mirror_loss": report.mirror_loss}
        return report.terms | mirror_loss | report.diagnostics

    # ------------------------------------------------------------------ the three kinds of gradient

    @contextmanager
    def ordinary_step(self) -> Iterator[None]:
        """Collects the gradient of a batch that is not mirrored; at exit the optimizer steps."""
        if self.is_mirror_step():
            raise ValueError("this batch is to be mirrored: ask is_mirror_step() and use first_half, second_half")
        self.optimizer.zero_grad(set_to_none=True)
        buffers = self._buffers() if self._must_check else {}
        with self._put_back_after_errors(buffers):
            yield
        self._unscale()
        skipped = self._must_skip()
        if skipped:
            self._put_buffers(buffers)
        else:
            self._clip()
            self.optimizer.step()
        self._close(skipped)

    @contextmanager
    def first_half(self) -> Iterator[None]:
        """Collects g1; at exit the parameters are at the intermediate point."""
        if self._pair is not None or not self.is_mirror_step():
            raise ValueError("first_half belongs to a mirrored batch, once: ask is_mirror_step()")
        pair = _Pair(random_state=self._random_state() if self.rng == "replay" else [])
        pair.buffers = self._buffers() if self._must_check else {}
        self.optimizer.zero_grad(set_to_none=True)
        with self._put_back_after_errors(pair.buffers):
            yield
        if self.scaler is not None:
            # unscale_ works once per update and is kept for the second half, whose check update() reads.
            self._multiply(1.0 / self.scaler.get_scale())
        self._pair = pair
        pair.skipped = self._must_skip()
        if not pair.skipped:
            self._to_middle(pair)
        else:
            self._put_buffers(pair.buffers)
            self._unscale()  # records what was found, so that update() lowers the scale

    @contextmanager
    def second_half(self) -> Iterator[None]:
        """Collects g2 at the intermediate point; at exit the mirrored batch is complete."""
        pair = self._pair
        if pair is None:
            raise ValueError("second_half follows first_half")
        self.optimizer.zero_grad(set_to_none=True)
        for restore in pair.random_state:
            restore()
        still = self._buffers(_NormBase) if self.statistics == "first" else {}
        try:
            with self._put_back_after_errors(still):
                yield
        except BaseException:
            self._roll_back(pair)
            self._pair = None
            raise
        self._put_buffers(still)
        if not pair.skipped:
            self._unscale()
            pair.skipped = self._must_skip()
            if pair.skipped:
                self._roll_back(pair)
            else:
                self._to_end(pair)
        self._close(pair.skipped)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the batch count and the settings; between batches only."""
        if self._pair is not None:
            raise ValueError("a mirrored batch is half done: save before first_half or after second_half")
        return {"optimizer": self.optimizer.state_dict(), "index": self._index, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; UserError if the settings differ."""
        for name, wanted in self._settings().items():
            found = state["settings"].get(name, "both" if name == "statistics" else None)
            if found != wanted:
                raise UserError(f"the checkpoint has mirror {name}={found}, the run has {wanted}: resume with {found}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._index = int(state["index"])

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_CHOICES, "alpha1", "alpha2", "every", "phase", "clip")}

    def _check_settings(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise choice_error(f"mirror {name}", getattr(self, name), known)
        if self.alpha2 is not None and not self.alpha1 > self.alpha2 >= 0:
            raise UserError(f"found alpha1={self.alpha1} and alpha2={self.alpha2}, wanted alpha1 > alpha2 >= 0")
        if self.every < 0 or self.every != int(self.every):
            raise UserError(f"found every={self.every}, wanted a whole number of batches, or 0 for no mirror")
        if self.phase != int(self.phase) or not 0 <= self.phase < max(self.every, 1):
            raise UserError(f"found phase={self.phase}, wanted 0 <= phase < every={self.every}")
        if (self.guard or self.scaler is not None or self.statistics == "first") and self.module is None:
            what = "guard, scaler and statistics='first' move a network's running statistics back or keep them still"
            raise UserError(f"{what}, found no network: give module=MODEL, or module=nn.Module() where there is none")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"found clip={self.clip}, wanted a norm above 0, or none")
        if self.clip_halves == "second" and self.mode != "two_step":
            raise UserError(f"clip_halves='second' is defined for mode two_step, not {self.mode}: use 'both'")
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        if isinstance(self.optimizer, torch.optim.LBFGS) or (closure and closure.default is inspect.Parameter.empty):
            found = type(self.optimizer).__name__
            raise UserError(
                f"{found} calls the loss itself, several times a step: give SGD, Adam or another of one step"
            )
        is_adam = isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW)
        if self.enabled and self.mode == "precond" and not is_adam:
            found = type(self.optimizer).__name__
            raise UserError(f"mode precond needs Adam or AdamW, found {found}: use sgd_mirror or fused")

    def _checked_filter(self, params: Iterable[Tensor]) -> set[int]:
        chosen = {id(p) for p in params}
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not chosen or not chosen <= known:
            raise ValueError(f"{len(chosen - known)} of {len(chosen)} tensors in params are not in the optimizer")
        return chosen

    # ------------------------------------------------------------------ the two halves

    @torch.no_grad()
    def _to_middle(self, pair: _Pair) -> None:
        """theta -> theta', from the gradients at theta."""
        if self.diagnostics:
            pair.raw = {p: gradient.clone() for p, gradient in self._gradients().items()}
        if self.mode == "fused":
            self._clip()
            # Copies: a loss may write its next gradient where this one is (gfml.fused).
            pair.held = {p: gradient.clone() for p, gradient in self._gradients().items()}
            pair.start = {p: p.clone() for p in pair.held if self._is_mirrored(p)}
            self._move(-self.alpha1)
        else:
            if self._must_check:
                pair.start = {p: p.clone() for p in self._gradients()}
                pair.state = {p: copy.deepcopy(state) for p, state in self.optimizer.state.items()}
            self._optimizer_step(second=False)
        if self.diagnostics and self.mode != "fused":
            pair.middle = {p: p.clone() for p in pair.raw}

    @torch.no_grad()
    def _to_end(self, pair: _Pair) -> None:
        """theta' -> the new theta, from the gradients at theta'."""
        if self.diagnostics:
            second = {p: gradient.clone() for p, gradient in self._gradients().items()}
        if self.mode in ("two_step", "backstitch", "repeat"):
            self._optimizer_step(second=True)
        else:
            if self.mode == "fused":
                self._put_parameters(pair)
            self._keep_mirrored_only()
            self._clip()
            if self.mode == "fused":
                self._combine(pair)
                self.optimizer.step()
            else:
                self._move(self._ascent)
        if self.diagnostics:
            self._diagnosis = _diagnose(pair, second)

    def _optimizer_step(self, *, second: bool) -> None:
        """One of up to two optimizer steps of a mirrored batch, with alpha1 g or -alpha2 g."""
        smaller = self.mode in ("two_step", "backstitch", "repeat") and second == (self.mode != "backstitch")
        if smaller:
            self._keep_mirrored_only()
        if self.clip_halves == "both":
            self._clip()
        sign = 1 if self.mode == "repeat" else -1
        self._multiply(sign * self._ascent if smaller else self.alpha1)
        if self.clip_halves == "second" and second:
            self._clip()
        decays = {"both": True, "first": not second, "once": not smaller}[self.wd]
        with _weight_decay(self.optimizer, decays):
            self.optimizer.step()

    def _combine(self, pair: _Pair) -> None:
        """Gradients become alpha1 g1 - alpha2 g2; g1 alone where g2 is absent, and the other way round."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                g1, g2 = pair.held.get(p), p.grad
                if g2 is not None:
                    g2.mul_(-self._ascent)
                if g1 is not None:
                    g1.mul_(self.alpha1)
                    p.grad = g1 if g2 is None else g1 + g2

    def _move(self, factor: float) -> None:
        """p += factor * lr * direction for all mirrored parameters; the direction is p.grad but in `precond`."""
        for group in self.optimizer.param_groups:
            rate = -group["lr"] if group.get("maximize") else group["lr"]
            for p in group["params"]:
                if p.grad is None or not self._is_mirrored(p):
                    continue
                direction = p.grad
                if self.mode == "precond":
                    direction = _adam_direction(self.optimizer.state[p], p.grad, group)
                if isinstance(rate, Tensor):
                    p.add_(direction * (rate * factor))
                else:
                    p.add_(direction, alpha=rate * factor)

    @torch.no_grad()
    def _roll_back(self, pair: _Pair) -> None:
        """Parameters, and where they were kept the optimizer state and the buffers, as before the first half."""
        self._put_parameters(pair)
        self._put_buffers(pair.buffers)
        if pair.state is not None:
            self.optimizer.state.clear()
            self.optimizer.state.update(pair.state)

    @staticmethod
    def _put_parameters(pair: _Pair) -> None:
        for p, value in pair.start.items():
            p.copy_(value)

    def _buffers(self, kind: type[nn.Module] = nn.Module) -> dict[str, Tensor]:
        """Copies of the buffers of the module's parts of this kind, by name."""
        parts = self.module.named_modules() if self.module is not None else ()
        own = [(name, part) for name, part in parts if isinstance(part, kind)]
        return {
            f"{name}.{key}": value.clone() for name, part in own for key, value in part.named_buffers(recurse=False)
        }

    @torch.no_grad()
    def _put_buffers(self, values: Mapping[str, Tensor]) -> None:
        if self.module is None:
            return
        for name, value in values.items():
            place, _, key = name.rpartition(".")
            getattr(self.module.get_submodule(place), key).copy_(value)

    @contextmanager
    def _put_back_after_errors(self, buffers: Mapping[str, Tensor]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._put_buffers(buffers)
            raise

    # ------------------------------------------------------------------ gradients

    def _backward(self, closure: Closure) -> tuple[Tensor, dict[str, Any]]:
        with torch.enable_grad():
            output = closure()
            if self._gradients():
                raise ValueError("the closure called backward itself: let it compute and return the loss alone")
            loss, terms = _read_loss(output)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return terms["loss"], terms

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Every parameter that has a gradient, with it, in the optimizer's order."""
        return {p: p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None}

    def _is_mirrored(self, p: Tensor) -> bool:
        return self._filter is None or id(p) in self._filter

    def _keep_mirrored_only(self) -> None:
        for p in self._gradients():
            if not self._is_mirrored(p):
                p.grad = None

    @torch.no_grad()
    def _multiply(self, factor: float) -> None:
        grads = [*self._gradients().values()]
        if grads and factor != 1:
            torch._foreach_mul_(grads, factor)

    def _unscale(self) -> None:
        """Divide by the scale and note whether all is finite, which a batch without any gradient cannot."""
        if self.scaler is not None and self._gradients():
            self.scaler.unscale_(self.optimizer)
            self._noted = True

    def _clip(self) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([*self._gradients()], self.clip)

    @property
    def _must_check(self) -> bool:
        return self.guard or self.scaler is not None

    def _must_skip(self) -> bool:
        """Reads one flag from the device, and only where skipping is on."""
        if not self._must_check:
            return False
        finite = [_dense(found).isfinite().all() for found in self._gradients().values()]
        return bool(finite) and not bool(torch.stack(finite).all())

    def _close(self, skipped: bool) -> None:
        """End of a batch: the scale is updated and the batch counted once, mirrored or not."""
        if self.scaler is not None and self._noted:
            self.scaler.update()
        if skipped:
            self.optimizer.zero_grad(set_to_none=True)
            self._diagnosis = {}
        self._pair, self._skipped, self._noted = None, skipped, False
        self._index += 1

    def _random_state(self) -> list[Callable[[], Any]]:
        """Calls that bring the generators back to their present state."""
        calls: list[Callable[[], Any]] = [partial(torch.set_rng_state, torch.get_rng_state())]
        for generator in self.generators:
            calls.append(partial(generator.set_state, generator.get_state()))
        devices = {p.device for group in self.optimizer.param_groups for p in group["params"]}
        for device in sorted(devices - {torch.device("cpu")}, key=str):
            if device.type != "cuda":
                raise UserError(f"rng='replay' works on cpu and cuda, found {device.type}: use rng='fresh'")
            calls.append(partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
        return calls


def mirror_step(
    closure: Closure, optimizer: Optimizer, alpha1: float = 1.0, alpha2: float = 0.2, **settings: Any
) -> StepReport:
    """One mirrored batch, for loops that decide themselves which to mirror.

    ``settings`` are those of ``MirrorGradient`` (mode, rng, wd, clip, ...), but no counter.
    """
    return MirrorGradient(optimizer, alpha1, alpha2, every=1, **settings).step(closure)


def _read_loss(output: Tensor | Sequence[Tensor] | Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The loss with its graph, and all terms without."""
    terms = dict(output) if isinstance(output, Mapping) else {}
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise ValueError(f"the closure's dict needs the key 'loss', found {', '.join(map(str, output))}")
        loss = output["loss"]
    else:
        loss = sum(output) if isinstance(output, Sequence) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("the closure must return a scalar tensor, several to be summed, or a dict with 'loss'")
    loss = loss.reshape(())
    terms["loss"] = loss
    # Copies: a term may be a view of a parameter, which is about to move.
    return loss, {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in terms.items()}


@contextmanager
def _weight_decay(optimizer: Optimizer, on: bool) -> Iterator[None]:
    """With on=False the optimizer's own weight decay is 0 inside."""
    groups = [] if on else [group for group in optimizer.param_groups if "weight_decay" in group]
    saved = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, value in zip(groups, saved, strict=True):
            group["weight_decay"] = value


def _adam_direction(state: Mapping[str, Any], gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """gradient / (sqrt(v / (1 - beta2^t)) + eps) with Adam's second moment v; 0 for a parameter Adam never stepped."""
    if "exp_avg_sq" not in state:
        return torch.zeros_like(gradient)
    # In float64, because 1 - beta2^t loses four digits in the float32 in which Adam counts its steps.
    correction = 1.0 - group["betas"][1] ** torch.as_tensor(state["step"]).double()
    second_moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return gradient / (second_moment / correction).sqrt_().add_(group["eps"])


def _diagnose(pair: _Pair, second: dict[Tensor, Tensor]) -> dict[str, Tensor]:
    """Norms and cosines over the parameters that have both gradients (norms: that have the one); 0 where none has."""
    both = [p for p in pair.raw if p in second]
    found = {
        "grad_norm": _inner(pair.raw.values(), pair.raw.values()).sqrt(),
        "mirror_grad_norm": _inner(second.values(), second.values()).sqrt(),
        "grad_cosine": _cosine([pair.raw[p] for p in both], [second[p] for p in both]),
    }
    if pair.middle:
        found["displacement_cosine"] = _cosine([p - pair.middle[p] for p in both], [second[p] for p in both])
    return found


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _inner(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Inner product over lists of tensors, scalar []; 0 of empty lists."""
    products = [(_dense(x) * _dense(y)).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack(products).sum() if products else torch.zeros(())


def _cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    norms = (_inner(a, a) * _inner(b, b)).sqrt()
    return _inner(a, b) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
