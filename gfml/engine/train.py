"""Training: one plain function, :func:`fit`, made of public parts.

A program that does not fit writes its own loop from the parts: :func:`plain_step`, :class:`WeightAverage`,
:class:`BestKeeper`, :class:`EarlyStopping`, :class:`TermMeans`, ``run.log`` and ``run.checkpoint``.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gfml.base.checkpoints import damaged, load_state
from gfml.base.errors import Terminated, UserError, choice_error
from gfml.engine import distributed
from gfml.engine.capture import MODES as CAPTURE_MODES
from gfml.engine.capture import StepCapture, capture_problem
from gfml.engine.runs import Run, rng_state, seed_everything, set_rng_state
from gfml.engine.tracking import Tracker

Terms = Mapping[str, Tensor | float]
Closure = Callable[[], Terms]
# The names that --es_on and `select` use, and the parts of the data they mean.
SPLITS = {"val": "valid", "valid": "valid", "test": "test"}


# Longest time that a crash may cost, as far as epochs end that often.
CHECKPOINT_SECONDS = 120.0
# After SIGTERM an epoch that should end within so many seconds is finished, so that nothing of it is lost.
GRACE_SECONDS = 10.0


# What stands for a selection when nothing is judged.
LAST_EPOCH = "last epoch"


class Step(Protocol):
    """One update of the parameters: calls ``closure()`` as often as it needs and returns its terms.

    The terms are detached copies of the values before the update. A step may have ``state_dict`` and
    ``load_state_dict``, which checkpoints use, and ``new_epoch()``, which is called before the first batch.
    """

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms: ...


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> object: ...


def plain_step(closure: Closure, optimizer: torch.optim.Optimizer, *, clip_norm: float | None = None) -> Terms:
    """One ordinary optimizer step; returns the terms of the closure, detached.

    clip_norm: largest L2 norm of the whole gradient, e.g. ``partial(plain_step, clip_norm=1.0)``. Without one an optimizer
    that can sum gradients itself does (:class:`gfml.engine.optimizers.DenseAdamW`): a table's ``.grad`` then stays None.
    """
    optimizer.zero_grad(set_to_none=True)
    terms = closure()
    takes = clip_norm is None and hasattr(optimizer, "taking")
    with optimizer.taking() if takes else contextlib.nullcontext():
        getattr(terms["loss"], "straight", terms["loss"].backward)()
    # Copies: a term may be a parameter itself, which is about to move.
    values = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in terms.items()}
    if clip_norm is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    optimizer.step()
    return values


class Optimizers:
    """Several optimizers, each with parameters of its own, that step as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


class EarlyStopping:
    """Stop after ``patience`` evaluations in a row that are not strictly better than the best. None: never."""

    def __init__(self, patience: int | None) -> None:
        if patience is not None and patience < 1:
            raise UserError(f"found a patience of {patience}, wanted at least 1 evaluation or none: mend `patience`")
        self.patience = patience
        self.best = -math.inf
        self.num_bad = 0

    def update(self, value: float) -> bool:
        """Count one evaluation (higher is better); whether to stop now."""
        if value > self.best:
            self.best, self.num_bad = value, 0
        else:
            self.num_bad += 1
        return self.should_stop

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.num_bad >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.num_bad = state["best"], state["num_bad"]


class WeightAverage:
    """Exponential moving average of some parameters.

    Starts as a copy. The n-th :meth:`update` (n = 1, 2, ...) does, with d = min(decay, (1 + n) / (10 + n)):
        average <- average - (1 - d) * (average - parameter).
    With decay 0.995 the cap is reached at n = 1790. An empty list of parameters makes everything a no-op.
    Uses torch.optim.swa_utils' update without its AveragedModel, which would read a counter back from the device at
    every step and would copy instead of averaging at the first.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.995) -> None:
        if not 0 <= decay <= 1:
            raise UserError(f"found an averaging decay of {decay}, wanted 0 <= decay <= 1: mend `lam_d`")
        self.parameters = list(parameters)
        self.decay = decay
        self.num_updates = 0
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    def __len__(self) -> int:
        return len(self.parameters)

    @torch.no_grad()
    def update(self) -> None:
        """Call after every optimizer step."""
        self.num_updates += 1
        if not self.parameters:
            return
        n = self.num_updates
        update = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        update(self.averages, [parameter.detach() for parameter in self.parameters], None)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[list[Tensor]]:
        """The parameters hold their averages inside the block and their own values, bit for bit, after it.

        Yields the own values. They come back after an exception too.
        """
        live = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._put(self.averages)
            yield live
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if [a.shape for a in state["averages"]] != [a.shape for a in self.averages]:
            raise ValueError("the averaged parameters differ in number or shape")
        self.num_updates = state["num_updates"]
        for average, value in zip(self.averages, state["averages"], strict=True):
            average.copy_(value)


class BestKeeper:
    """Keeps a copy, in main memory, of the weights that gave the best value so far (higher is better)."""

    def __init__(self, model: nn.Module, ema: WeightAverage | None = None) -> None:
        self.model = model
        self.epoch: int | None = None
        self.value = -math.inf
        self.state: dict[str, Any] | None = None
        self._ema = ema if ema is not None and len(ema) else None

    def offer(self, epoch: int, value: float) -> bool:
        """Whether ``value`` is strictly better than all before; then remembers epoch and value (not yet weights)."""
        if not value > self.value:
            return False
        self.epoch, self.value = epoch, value
        return True

    def take(self, metric: str) -> dict[str, Any]:
        """Copy the weights that :meth:`evaluated` shows, and the live values of the averaged ones."""
        with self.evaluated() as live:
            weights = _to_memory(self.model.state_dict())
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        averaged = zip(self._ema.parameters, live, strict=True) if self._ema else ()
        self.state = {
            "model": weights,
            "weights": self.weights,
            "live": {names[id(parameter)]: value.cpu() for parameter, value in averaged if id(parameter) in names},
            "epoch": self.epoch,
            "metric": metric,
            "value": self.value,
        }
        return self.state

    @property
    def weights(self) -> str:
        """Which weights are judged and kept: "averaged" or "live"."""
        return "averaged" if self._ema else "live"

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[list[Tensor]]:
        """Inside the block the model holds the weights that are judged: the averages, if there are any."""
        if self._ema is None:
            yield []
        else:
            with self._ema.swapped() as live:
                yield live

    def restore(self) -> None:
        """Load the best weights into the model; without any, leave it as it is."""
        if self.state is not None:
            self.model.load_state_dict(self.state["model"])


def _to_memory(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


class TermMeans:
    """Means over the batches of an epoch, and a watch for a loss that is not finite.

    The terms stay on their device and are read back together every ``check_every`` steps, so that a step on CUDA
    never waits for the device; on the CPU waiting costs nothing and every step is checked.
    Each term's mean is over the batches that had it.
    """

    def __init__(self, epoch: int, check_every: int = 100) -> None:
        self.epoch = epoch
        self.check_every = check_every
        self.step = 0
        self._waiting: list[dict[str, Tensor | float]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, terms: Terms) -> None:
        """Take the terms of one batch. UserError names epoch, step and every term when the loss is nan or infinite."""
        self._waiting.append(dict(terms))
        loss = terms["loss"]
        if len(self._waiting) >= self.check_every or not isinstance(loss, Tensor) or loss.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Read the waiting terms back and check them."""
        tensors = [v.detach() for terms in self._waiting for v in terms.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack([tensor.double().reshape(()) for tensor in tensors]).tolist() if tensors else ())
        waiting, self._waiting = self._waiting, []
        for terms in waiting:
            read = {key: next(numbers) if isinstance(v, Tensor) else float(v) for key, v in terms.items()}
            self._count(read)

    def _count(self, terms: dict[str, float]) -> None:
        self.step += 1
        if not math.isfinite(terms["loss"]):
            values = ", ".join(f"{key} {value:.6g}" for key, value in terms.items())
            raise UserError(
                f"the loss is {terms['loss']} at epoch {self.epoch}, step {self.step} ({values}): "
                "lower `lr`, or look at the term that is not finite"
            )
        for key, value in terms.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._counts[key] = self._counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of every term so far."""
        self.flush()
        return {key: self._sums[key] / self._counts[key] for key in self._sums}


@dataclass
class FitResult:
    """What :func:`fit` did. The model now holds the weights of ``best_epoch``.

    best_epoch, best_value: None and -inf when nothing was evaluated.
    epochs: last epoch trained. stopped: why it was the last. weights: "averaged" or "live". Seconds include earlier sessions of the run.
    history: one row per epoch, as in metrics.jsonl: {"epoch", "train/loss", ..., "val/ndcg@20", ...}.
    """

    select: str
    best_epoch: int | None
    best_value: float
    epochs: int
    stopped_early: bool
    stopped: str
    weights: str
    train_seconds: float
    eval_seconds: float
    history: list[dict[str, Any]] = field(repr=False)

    def selection(self) -> dict[str, Any]:
        """How the reported epoch was chosen, for ``run.finish``."""
        if self.select == LAST_EPOCH:
            facts = {"epoch": self.epochs, "rule": LAST_EPOCH, "protocol": "nothing selected", "weights": self.weights}
            return {**facts, "epochs_trained": self.epochs, "stopped": self.stopped}
        part, _, metric = self.select.partition("/")
        on_test = "selected on test (optimistic, as in the original code)"
        return {
            "epoch": self.best_epoch,
            "metric": metric,
            "split": part,
            "value": self.best_value if self.best_epoch is not None else None,
            "rule": "highest value, the earliest epoch of equal ones",
            "protocol": on_test if part == "test" else "selected on validation",
            "weights": self.weights,
            "epochs_trained": self.epochs,
            "stopped_early": self.stopped_early,
            "stopped": self.stopped,
        }


@dataclass
class _Progress:
    """Everything that a checkpoint carries, and how far training is."""

    model: nn.Module
    parts: dict[str, Stateful]
    best: BestKeeper
    stopping: EarlyStopping
    epoch: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "eval": 0.0})
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "best": {"epoch": self.best.epoch, "value": self.best.value},
            "stopping": self.stopping.state_dict(),
            "seconds": self.seconds,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state["parts"]) != set(self.parts):
            raise ValueError(f"it holds {', '.join(sorted(state['parts']))}, wanted {', '.join(sorted(self.parts))}")
        self.model.load_state_dict(state["model"])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.best.epoch, self.best.value = state["best"]["epoch"], state["best"]["value"]
        self.stopping.load_state_dict(state["stopping"])
        self.epoch, self.seconds = state["epoch"], dict(state["seconds"])
        set_rng_state(state["rng"])

    @contextlib.contextmanager
    def timed(self, what: str, row: dict[str, Any]) -> Iterator[None]:
        """Seconds of a part of the epoch, into its row and the sum."""
        started = time.perf_counter()
        yield
        row[f"seconds/{what}"] = time.perf_counter() - started
        self.seconds[what] += row[f"seconds/{what}"]

    def result(self, select: str, epochs: int) -> FitResult:
        """What training gave; select: the rule as a run names it."""
        early = self.stopping.should_stop and self.epoch < epochs
        why = f"no better {select} for {self.stopping.num_bad} evaluations"
        return FitResult(
            select=select,
            best_epoch=self.best.epoch,
            best_value=self.best.value,
            epochs=self.epoch,
            stopped_early=early,
            stopped=f"stopped at epoch {self.epoch}: {why}" if early else "all epochs done",
            weights=self.best.weights,
            train_seconds=self.seconds["train"],
            eval_seconds=self.seconds["eval"],
            history=self.rows,
        )


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    batches: Callable[[int], Iterable[Any]],
    loss_fn: Callable[[Any], Terms],
    evaluate: Callable[[str], Mapping[str, float]] | None,
    select: str | None,
    run: Run | None,
    epochs: int,
    step: Step = plain_step,
    eval_every: int = 1,
    patience: int | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ema: WeightAverage | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    evaluate_first: bool = False,
    checkpoint_every: int = 10,
    check_every: int = 100,
    amp: bool = False,
    compile_loss: bool = False,
    cuda_graph: str = "auto",
    progress: bool | None = None,
    tracker: Tracker | None = None,
) -> FitResult:
    """Train for ``epochs`` epochs and leave the best evaluated weights in the model, which is then in eval mode.

    batches(epoch): the batches of epoch 1, 2, ...; everything random in it comes from ``epoch``, from the global
        generators or from an object in ``stateful``, so that a continued run repeats it.
    loss_fn(batch): {"loss": scalar to minimise, further named scalars to log}.
    evaluate(split): {metric: value} for "valid" or "test"; runs in eval mode, without gradients, with the averaged
        weights if there are any, and cannot disturb training's random numbers.
    select: "val/ndcg@20" chooses the epoch with the highest value; "test/ndcg@20" is the original code's protocol.
        None (with evaluate None) judges nothing and keeps the last epoch, for a refit on all training data.
    run: where metrics and checkpoints go; a run with a checkpoint is continued, exactly. None keeps all in memory.
    step: how the parameters are updated; its ``state_dict`` is kept if it has one.
    eval_every, patience: an evaluation every so many epochs and after the last one; patience counts evaluations.
        Going on with more epochs repeats a longer run exactly if the first ``epochs`` is a multiple of eval_every.
    scheduler: stepped after every epoch, without a metric. ema: updated after every batch.
    stateful: further objects with state_dict and load_state_dict, such as a sampler with its own generator.
    evaluate_first: evaluate the untrained model as epoch 0.
    checkpoint_every: epochs between checkpoints, besides those at every evaluation and, where epochs are long,
        every two minutes.
    amp: bfloat16 autocast around loss_fn. compile_loss: torch.compile it.
    cuda_graph: auto records steps on CUDA where that can be (:mod:`gfml.engine.capture`) and otherwise says in one line
        why not; 1 insists; 0 leaves them alone. The numbers are the same.
    progress: True a bar, None a bar on a terminal and otherwise a line per evaluation, False silent.
    Several processes (:mod:`gfml.engine.distributed`): ``loss_fn`` calls the wrapped model, ``run`` is that of ``open_run``, and
        ``evaluate`` returns the same in each. Train terms are then means over processes, and each epoch starts from
        random numbers of (seed, epoch, process), so that a continued run needs those of no other process.
    Raises UserError when the loss or the selected metric is not finite, the metric does not exist, there are no
        batches, or the checkpoint does not belong to this model.
    """
    _check_lengths(epochs, eval_every)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "ema": ema, **(stateful or {}), "step": step}
    state = _Progress(model, _kept(parts), BestKeeper(model, ema), EarlyStopping(patience))
    judge, rule, seed = _Judge(state, evaluate, select), select or LAST_EPOCH, torch.initial_seed()
    if run is not None:
        _restore(state, run, rule)
    show, tracker = _Display(progress, epochs, state.epoch, judges=select is not None), tracker or Tracker(None)
    fresh = state.epoch == 0 and not state.rows
    tracker.start(0 if fresh else state.epoch + 1)
    compute = torch.compile(loss_fn) if compile_loss else loss_fn
    run_step = _Stepper(model, optimizer, step, compute, amp, "`compile` is given" if compile_loss else "", cuda_graph)
    first = 0 if fresh and (evaluate_first or epochs == 0) else state.epoch + 1

    with show, _Ending() as ending:
        for epoch in range(first, epochs + 1):
            if state.stopping.should_stop:
                break
            ending.epoch_begins()
            row: dict[str, Any] = {"epoch": epoch}
            last = epoch == epochs
            if epoch > 0:
                _reseed(seed, epoch)
                with state.timed("train", row):
                    row |= _train_epoch(epoch, model, batches, run_step, scheduler, ema, check_every, show)
            judged = select is not None and (epoch % eval_every == 0 or last)
            better = judge(row) if judged else select is None and last and state.best.offer(epoch, float(epoch))
            checkpoint = judged or epoch % checkpoint_every == 0 or last or ending.asked
            _finish_epoch(state, row, run, rule, better, checkpoint)
            tracker.scalars(epoch, row)
            show.epoch_done(row, judged, better, rule)
            if ending.asked:
                raise Terminated
    state.best.restore()
    model.eval()
    return state.result(rule, epochs)


def _check_lengths(epochs: int, eval_every: int) -> None:
    if eval_every < 1 or epochs < 0:
        found = f"found {epochs} epochs and an evaluation every {eval_every}"
        raise UserError(f"{found}, wanted epochs >= 0 and every >= 1: mend `epochs`, `eval_every`")


def _reseed(seed: int, epoch: int) -> None:
    """Each of several processes draws its own numbers, the same whenever the epoch begins."""
    if distributed.world_size() > 1:
        seed_everything(hash((seed, epoch, distributed.rank())) % 2**63)


def _kept(parts: Mapping[str, Any]) -> dict[str, Stateful]:
    """Those that a checkpoint carries: a step may have no state."""
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


class _Judge:
    """The evaluation that selects: its values into the row, the best and the patience told of them."""

    def __init__(
        self, state: _Progress, evaluate: Callable[[str], Mapping[str, float]] | None, select: str | None
    ) -> None:
        self.state, self.evaluate, self.select = state, evaluate, select
        self.part, _, self.metric = (select or f"val/{LAST_EPOCH}").partition("/")
        if self.part not in SPLITS or not self.metric:
            raise UserError(f"found the selection {select!r}, wanted val/METRIC or test/METRIC such as val/ndcg@20")

    def __call__(self, row: dict[str, Any]) -> bool:
        """Whether this epoch is the best so far."""
        epoch, best = row["epoch"], self.state.best
        with self.state.timed("eval", row):
            values = _evaluate(best, self.evaluate, SPLITS[self.part])
            row |= {f"{self.part}/{key}": value for key, value in values.items()}
            value = self._selected(values, epoch)
            better = best.offer(epoch, value)
            self.state.stopping.update(value)
        return better

    def _selected(self, values: Mapping[str, float], epoch: int) -> float:
        if self.metric not in values:
            raise choice_error("selection metric", self.metric, values)
        value = values[self.metric]
        if not math.isfinite(value):
            found = f"{self.select} is {value} at epoch {epoch}"
            raise UserError(f"{found}, wanted a finite number: is that part of the data empty? Mend `val_ratio`")
        return value


class _Stepper:
    """One training step for each batch: as it is, or recorded on CUDA."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        step: Step,
        loss_fn: Callable[[Any], Terms],
        amp: bool,
        problem: str,
        cuda_graph: str,
    ) -> None:
        if cuda_graph not in CAPTURE_MODES:
            raise choice_error("cuda_graph", cuda_graph, CAPTURE_MODES)
        device = next(model.parameters()).device
        self._loss_fn, self._context = loss_fn, partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=amp)
        problem = problem or ("several processes share each batch" if distributed.world_size() > 1 else "")
        problem = problem or capture_problem(model, step, optimizer, device) or ""
        if cuda_graph == "1" and problem:
            raise UserError(f"found `cuda_graph 1`, but {problem}: give `cuda_graph auto or 0`")
        self._capture = StepCapture(model, optimizer, step, self._loss, required=cuda_graph == "1")
        self._capture.reason = problem or ("`cuda_graph 0`" if cuda_graph == "0" else "")
        self._said = cuda_graph == "0" or device.type != "cuda"  # where nobody would expect recordings

    def new_epoch(self) -> None:
        """What the step counts by epoch; recordings of a model that changes its tensors then end."""
        if hasattr(self._capture.step, "new_epoch"):
            self._capture.step.new_epoch()
        if hasattr(self._capture.model, "new_epoch"):
            self._capture.forget()

    def __call__(self, batch: Any) -> Terms:
        if self._capture.reason:
            return self._capture.step(partial(self._loss, batch), self._capture.optimizer)
        return self._capture(batch)

    def _loss(self, batch: Any) -> Terms:
        with self._context():
            return self._loss_fn(batch)

    def why_not(self) -> str:
        """Why steps are not recorded, once; empty where they are, and where nobody would expect it."""
        text = "" if self._said else self._capture.reason
        self._said = self._said or bool(text)
        return text


def _train_epoch(
    epoch: int,
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    run_step: _Stepper,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    ema: WeightAverage | None,
    check_every: int,
    show: _Display,
) -> dict[str, float]:
    """One pass over the batches: the learning rate where it changes, and the mean of every term."""
    rate = {} if scheduler is None else {"lr": scheduler.optimizer.param_groups[0]["lr"]}
    model.train()
    run_step.new_epoch()
    terms = TermMeans(epoch, check_every)
    iterable = batches(epoch)
    total = len(iterable) if hasattr(iterable, "__len__") else None
    for batch in iterable:
        terms.add(run_step(batch))
        if ema is not None:
            ema.update()
        show.batch_done(total)
    if why := run_step.why_not():
        show.note(f"note: steps are not recorded as CUDA graphs: {why}")
    found = terms.means()
    if not found:
        raise UserError(f"epoch {epoch} had no batches: the training part is empty or smaller than one batch")
    means = distributed.mean_of(found, next(model.parameters()).device)
    if scheduler is not None:
        scheduler.step()
    return rate | {f"train/{key}": value for key, value in means.items()}


def _evaluate(best: BestKeeper, evaluate: Callable[[str], Mapping[str, float]], split: str) -> dict[str, float]:
    """``evaluate(split)`` on the judged weights; modes and random numbers are as before afterwards."""
    random_numbers, training = rng_state(), best.model.training
    best.model.eval()
    try:
        with best.evaluated(), torch.no_grad():
            return {key: float(value) for key, value in evaluate(split).items()}
    finally:
        best.model.train(training)
        set_rng_state(random_numbers)


def _finish_epoch(
    state: _Progress, row: dict[str, Any], run: Run | None, select: str, better: bool, checkpoint: bool
) -> None:
    """Write the epoch down: metrics, then checkpoint, then best weights.

    In this order a crash between any two leaves a run that continues exactly: rows after the checkpoint are
    forgotten, and best weights that are missing are those of the checkpoint itself.
    """
    state.epoch = row["epoch"]
    state.rows.append(row)
    if better:
        state.best.take(select)
    if run is None:
        return
    run.log(row)
    if checkpoint or time.monotonic() - state.saved_at > CHECKPOINT_SECONDS:
        state.saved_at = time.monotonic()
        run.checkpoint(state.state_dict())
    if better:
        run.save_best(state.best.state)


def _restore(state: _Progress, run: Run, select: str) -> None:
    """Continue from the run's checkpoint, if it has one."""
    saved = run.load_checkpoint()
    if saved is None:
        run.truncate_metrics(-1)
        return
    path = run.file("last.pt")
    try:
        state.load_state_dict(saved)
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise damaged(path, f"of another model or program: {str(error).splitlines()[0]}") from error
    run.truncate_metrics(state.epoch, saved.get("logged"))
    # A process that only follows may read the rows before they are truncated.
    state.rows = [row for row in run.metrics() if row["epoch"] <= state.epoch]
    _restore_best(state, run, select)


def _restore_best(state: _Progress, run: Run, select: str) -> None:
    if state.best.epoch is None:
        return
    if state.best.epoch == state.epoch:
        # Stopped between the checkpoint and best.pt, or right after: these very weights are the best.
        run.save_best(state.best.take(select))
        return
    if not run.file("best.pt").exists():
        raise damaged(run.file("best.pt"), "it is missing")
    found = run.load_best()
    if (found.get("epoch"), found.get("value")) != (state.best.epoch, state.best.value):
        raise damaged(run.file("best.pt"), f"of epoch {found.get('epoch')}, wanted epoch {state.best.epoch}")
    state.best.state = found


def load_best(model: nn.Module, run_dir: str | Path) -> dict[str, Any]:
    """Load ``best.pt`` of a run into the model; returns its epoch, metric, value and which weights they are."""
    path = Path(run_dir) / "best.pt"
    saved = load_state(path)
    try:
        model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError) as error:
        raise damaged(path, f"of another model: {str(error).splitlines()[0]}") from error
    return {key: saved[key] for key in ("epoch", "metric", "value", "weights")}


class _Ending:
    """SIGTERM in training: an epoch that should end soon is finished and kept first; a second signal ends at once.

    Only where the signal is handled (:func:`gfml.program.cli.run_main`), and with one process: several would stop at
    different epochs.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._process, self._begun, self._expected = os.getpid(), math.nan, math.nan

    def epoch_begins(self) -> None:
        """The epoch to come should take as long as the one before; how long the first takes nobody knows."""
        now = time.monotonic()
        self._expected, self._begun = now - self._begun, now

    def __enter__(self) -> _Ending:
        alone = threading.current_thread() is threading.main_thread() and distributed.world_size() == 1
        before = signal.getsignal(signal.SIGTERM) if alone else None
        if callable(before):
            self._before = before
            signal.signal(signal.SIGTERM, self._signal)
        return self

    def _signal(self, number: int, frame: object) -> None:
        soon = self._begun + self._expected - time.monotonic() <= GRACE_SECONDS
        if self.asked or not soon or os.getpid() != self._process:
            self._before(number, frame)
        self.asked = True

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class _Display:
    """A bar over the epochs, and a line per evaluation (per epoch where none is made), both on stderr; see ``progress`` of :func:`fit`."""

    def __init__(self, progress: bool | None, epochs: int, done: int, *, judges: bool) -> None:
        self._lines, self._judges = progress is not False, judges
        self._wanted = progress or (progress is None and sys.stderr.isatty())
        self._epochs, self._done = epochs, done
        self._bar: Any = None
        self._started = time.perf_counter()

    def __enter__(self) -> _Display:
        if self._lines and 0 < self._done < self._epochs:
            self._write(f"continuing after epoch {self._done}")
        if self._wanted:
            from tqdm import tqdm

            form = "{percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} epochs [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(total=self._epochs, initial=self._done, bar_format=form, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, text: str) -> None:
        if self._lines:
            self._write(text)

    def batch_done(self, total: int | None) -> None:
        if self._bar is not None and total:
            self._bar.update(1 / total)

    def epoch_done(self, row: Mapping[str, Any], judged: bool, better: bool, select: str) -> None:
        if self._bar is not None:
            self._bar.n = row["epoch"]
            self._bar.set_postfix_str(f"loss {row.get('train/loss', math.nan):.4f}", refresh=False)
            self._bar.update(0)
        # Where nothing is ever judged each epoch has its line, unless a bar shows the loss.
        if self._lines and (judged or not (self._judges or self._bar)):
            terms = [f"{key[6:]} {value:.4f}" for key, value in row.items() if key.startswith("train/")]
            chosen = [f"{select} {row[select]:.4f}{' *' if better else ''}"] if judged else []
            seconds = f"[{time.perf_counter() - self._started:.0f}s]"
            self._write("  ".join([f"epoch {row['epoch']:>4}", *terms, *chosen, seconds]))

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
