"""The life of a run, whoever's it is: open or continue, train, refit, judge, store, draw, print."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from gfml.base.checkpoints import save_state
from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.base.runs import EXTENDABLE
from gfml.base.toml import LOCATION_FLAGS
from gfml.engine import distributed
from gfml.engine.distributed import World
from gfml.engine.runs import Run, seed_everything
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult, fit
from gfml.program.cli import resolve_device, set_threads
from gfml.program.experiment import Experiment, Judged, Training
from gfml.program.program import IS_DONE, TEXT, Program, places

LOG = "log.txt"


def drive(program: Program, settings: Any) -> int:
    """Every run that the settings ask for, then their results in one text."""
    kind = program.load_experiment()
    set_threads(settings)
    with distributed.session(resolve_device(settings)) as world:
        found = [run_one(program, kind, own, world) for own in settings.each()]
        if world.is_main:
            print(kind.text(settings, found))
            for _, path in found:
                print(places(path))
            if settings.report and not settings.eval_only:
                page = kind.joint_page(settings, [path for _, path in found])
                print(*([f"{'report':<15} {page}"] if page else []), end="\n" if page else "")
    return 0


def run_one(program: Program, kind: type[Experiment], settings: Any, world: World) -> tuple[Mapping[str, Any], Path]:
    """One run: its result and its directory. A finished one is read, an unfinished one continued."""
    with distributed.main_first():
        data = kind.load(settings)
    this = kind(settings, data, world)
    this.check()
    with (
        distributed.open_run(
            settings.out, program.family, settings.resolved, label=this.label, exclude=LOCATION_FLAGS | settings.beside(),
            name=settings.run_name, resume=settings.resume, overwrite=settings.overwrite, read_only=settings.eval_only,
        ) as run,
        logged(run, world),
    ):  # fmt: skip
        if run.is_done and not settings.eval_only:
            if world.is_main:
                print(IS_DONE.format(run.path))
            this.again(run)
            return run.result, run.path
        if settings.load and not run.file("last.pt").exists():
            raise UserError(f"--load 1 found no checkpoint in {run.path}: train first, or give --load 0")
        run.check_data(data.fingerprint)
        seed_everything(settings.seed)
        if settings.eval_only:
            this, model = reported(this, run)
            judged = judge(this, model, None, run)
            if this.redrawn and run.is_done and settings.report and world.is_main:
                this.page(run, judged)
        else:
            if world.is_main:
                run.note(program=program.module)
            judged = train_and_judge(program, this, run)
        return judged.result, run.path


def train_and_judge(program: Program, this: Experiment, run: Run) -> Judged:
    """From a fresh or continued model to the stored result."""
    settings, world = this.settings, this.world
    if world.size > 1 and (problem := this.sharing_problem()):
        raise UserError(
            f"found {problem} with several processes, wanted a loss that is a sum over rows: drop it or start one process"
        )
    model = this.build()
    if world.is_main:
        run.note(machine=machine(world), parameters=parameters_by_part(model))
        print("\n".join([*_opening(this, model, run)]), file=sys.stderr)
    training, fitted = this.training(model), None
    with this.tracker(run, training) as tracker:
        if training is not None:
            fitted = fit(
                model, select=this.select, evaluate=None if this.select is None else lambda split: evaluate(this, model, split),
                run=run, epochs=this.epochs, eval_every=this.eval_every, patience=this.patience,
                tracker=tracker, **_how(this, training),
            )  # fmt: skip
            if world.is_main:
                print(fitted.stopped, file=sys.stderr)
            if getattr(settings, "refit", False):
                this, model = refit(program, this, fitted, run)
        if not (world.is_main or this.judged_by_all):
            return Judged({})
        judged = judge(this, model, fitted, run)
        if world.is_main:
            store(this, model, judged, run, tracker)
    return judged


def _how(this: Experiment, training: Training) -> dict[str, Any]:
    """What :func:`fit` is given of the training and the settings."""
    settings = this.settings
    return {
        "optimizer": training.optimizer, "batches": training.batches, "loss_fn": training.loss, "step": training.step,
        "scheduler": training.scheduler, "ema": training.ema, "compile_loss": settings.compile if training.compile is None else training.compile,
        "cuda_graph": settings.cuda_graph,
        "amp": settings.amp if training.amp is None else training.amp, "checkpoint_every": settings.checkpoint_every,
        "progress": this.progress,
    }  # fmt: skip


def evaluate(this: Experiment, model: nn.Module, split: str) -> Mapping[str, float]:
    """Metrics for selection, the same in every process."""
    if this.judged_by_all:
        return this.evaluate(model, split)
    return distributed.from_main(lambda: dict(this.evaluate(model, split)))


def refit(program: Program, this: Experiment, fitted: FitResult, run: Run) -> tuple[Experiment, nn.Module]:
    """A fresh model on train and validation, trained for the selected number of epochs.

    The refit has a run directory of its own inside the run, so an interrupted one continues, and a run that is extended
    and selects another epoch has another refit.
    """
    whole, epochs = this.whole(), fitted.best_epoch or 0
    seed_everything(this.settings.seed)
    model = whole.build()
    training = whole.training(model)
    config = {key: value for key, value in run.config.items() if key not in EXTENDABLE} | {"epochs": epochs}
    with distributed.open_run(run.path, program.family, config, name=f"refit-{epochs}") as inner:
        if inner.is_done:
            model.load_state_dict(inner.load_best()["model"])
            return whole, model.eval()
        fit(model, evaluate=None, select=None, run=inner, epochs=epochs, **_how(whole, training))
        inner.finish({"selection": {**fitted.selection(), "refit": "on train and validation, for the selected epochs"}})
    return whole, model


def reported(this: Experiment, run: Run) -> tuple[Experiment, nn.Module]:
    """The model that the run's result is about, and the experiment with the data it was trained on."""
    if getattr(this.settings, "refit", False) and run.is_done:
        this = this.whole()
    return this, this.restore(run.path, done=run.is_done)


def judge(this: Experiment, model: nn.Module, fitted: FitResult | None, run: Run) -> Judged:
    """What the experiment finds, with its selection and costs."""
    judged = this.judge(model, fitted, run)
    judged.result["selection"] = this.selection(fitted, run)
    if fitted is not None:
        costs = {"train": fitted.train_seconds, "eval": fitted.eval_seconds}
        judged.result["seconds"] = costs | judged.result.get("seconds", {})
    return judged


def judge_weights(program: Program, settings: Any, state: Mapping[str, Tensor], origin: str) -> str:
    """What is printed of the named tensors of another program's file. Nothing is trained or written."""
    kind = program.load_experiment()
    set_threads(settings)
    this = kind(settings, kind.load(settings), World(0, 1, resolve_device(settings)))
    judged = this.judge(this.adopt(state, origin).to(this.device), None, None)
    judged.result["selection"] = {"epoch": 0, "metric": None, "protocol": f"weights of {origin}"}
    return kind.text(settings, [(judged.result, Path(origin))])


def store(this: Experiment, model: nn.Module, judged: Judged, run: Run, tracker: Tracker) -> None:
    """Write the reported weights, the arrays behind reports and comparisons, the result, its text and the page."""
    result = judged.result
    save_state(run.file("final.pt"), this.final_weights(model, run) | {"selection": result["selection"]})
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **judged.arrays)
    this.track(tracker, model, judged)
    run.note(peak_memory_gib=peak_memory_gib(this.device))
    text = this.text(this.settings, [(result, run.path)]) + "\n"
    with atomic_open(run.file(TEXT)) as stream:
        stream.write(text)
    run.finish(result)
    with open(run.file(LOG), "a", encoding="utf-8") as log:
        log.write(text)
    this.finished(model, judged, run)
    if this.settings.report:
        this.page(run, judged)


# -- the record


def machine(world: World) -> dict[str, Any]:
    """Cores, threads and device of this session."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": name,
        "processes": world.size,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: by tensors on CUDA, by the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters below each child of the model, those of its own under "own", and all."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    counts["own"] = sum(p.numel() for p in model.parameters(recurse=False))
    counts = {name: number for name, number in counts.items() if number}
    return counts | {"all": sum(p.numel() for p in model.parameters())}


def _opening(this: Experiment, model: nn.Module, run: Run) -> Iterator[str]:
    """What is about to run, in a few lines."""
    settings, world = this.settings, this.world
    yield from this.data_lines()
    yield from this.describe(model)
    parts = parameters_by_part(model)
    count = f"{parts.pop('all'):,} parameters"
    named = ", ".join(f"{name} {number:,}" for name, number in parts.items())
    several = f", {world.size} processes" if world.size > 1 else ""
    yield f"{count}{f' ({named})' if len(parts) > 1 else ''} on {world.device}{several}; seed {settings.seed}"
    if this.select is not None:
        part, _, metric = this.select.partition("/")
        yield f"selecting by {metric} on {'TEST, the original protocol: optimistic' if part == 'test' else 'validation'}"
    yield f"run directory {run.path}"


@contextlib.contextmanager
def logged(run: Run, world: World) -> Iterator[None]:
    """What the first process prints inside the block is kept in ``log.txt`` of a run that is open for writing."""
    if not world.is_main or not run.is_open:
        yield
        return
    with open(run.file(LOG), "a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(_Tee(sys.stdout, log)), contextlib.redirect_stderr(_Tee(sys.stderr, log)):
            yield


class _Tee:
    """A stream whose lines are also written to a log; bars that draw over themselves are not."""

    def __init__(self, stream: IO[str], log: IO[str]) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text:
            self._log.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._log.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
