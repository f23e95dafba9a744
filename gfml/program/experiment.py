"""What a paper says of its runs, and nothing else: the driver does the rest (:mod:`gfml.program.driver`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gfml.base.checkpoints import damaged, load_state
from gfml.base.errors import UserError
from gfml.engine.distributed import World
from gfml.engine.runs import Run
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult, Step, Terms, WeightAverage, load_best, plain_step
from gfml.program.foreign import load_named


@dataclass
class Training:
    """How a model is trained; see :func:`gfml.engine.train.fit`. amp, compile: None takes ``--amp``, ``--compile``."""

    optimizer: Any
    batches: Callable[[int], Iterable[Any]]
    loss: Callable[[Any], Terms]
    step: Step = plain_step
    scheduler: Any = None
    ema: WeightAverage | None = None
    amp: bool | None = None
    compile: bool | None = None


@dataclass
class Judged:
    """What a judgement found. result: for result.json; arrays: for analysis.npz; detail: what pictures need."""

    result: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    detail: Any = None


class Experiment:
    """One run of a paper, from its settings and data to what is reported.

    A paper says in a subclass how data is read (:meth:`load`), what is built (:meth:`build`, :meth:`training`), how a
    split is judged (:meth:`evaluate` for selection, :meth:`judge` for the report) and how all that is called.
    """

    # Whether all processes judge together; otherwise the first one does it for all.
    judged_by_all = False
    # Whether --eval-only draws the page again.
    redrawn = False

    # What its runs cannot, by the name of a setting, and why.
    without: Mapping[str, str] = {}

    # Flags with which several processes cannot share a batch; :meth:`sharing_problem` refuses each.
    unshared: Sequence[str] = ()

    def __init__(self, settings: Any, data: Any, world: World | None = None) -> None:
        self.settings, self.data = settings, data
        self.world = world or World(0, 1, torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.world.device

    # -- data

    @classmethod
    def load(cls, settings: Any) -> Any:
        """The data, checked. It has a ``fingerprint``."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """What ``result["data"]`` says of the data that a result is about."""
        return self.data.fingerprint

    def whole(self) -> Self:
        """The same on train and validation together, for ``--refit``."""
        raise UserError("--refit needs a validation part cut from train, which this data has not: drop it")

    # -- model

    def build(self, *, start: bool = True) -> nn.Module:
        """A fresh model on the device. start False: saved weights will follow, so none are read from elsewhere."""
        raise NotImplementedError

    def check(self) -> None:
        """UserError for what can be known to be wrong before a run directory is made, such as a foreign file of weights."""

    def training(self, model: nn.Module) -> Training | None:
        """Optimizer, batches and loss; None for a model that is not trained."""
        raise NotImplementedError

    def sharing_problem(self) -> str | None:
        """Why several processes cannot share a batch, naming the flag; None where they can."""
        return None

    # -- judging

    @property
    def select(self) -> str | None:
        """What chooses the epoch, such as "val/ndcg@20"; None keeps the last one."""
        return f"{self.settings.select_on}/{self.settings.select_metric}"

    @property
    def patience(self) -> int | None:
        """Evaluations in a row without a better one before stopping."""
        return getattr(self.settings, "patience", None)

    @property
    def eval_every(self) -> int:
        """Epochs between evaluations."""
        return getattr(self.settings, "eval_every", 1)

    def evaluate(self, model: nn.Module, split: str) -> Mapping[str, float]:
        """Metrics of "valid" or "test", for selection."""
        raise NotImplementedError

    def judge(self, model: nn.Module, fitted: FitResult | None, run: Run | None) -> Judged:
        """Everything that is reported. fitted None: weights were loaded; run None: they are no run's."""
        raise NotImplementedError

    def selection(self, fitted: FitResult | None, run: Run) -> dict[str, Any]:
        """How the reported epoch was chosen. fitted None: weights were loaded, and the stored result says it."""
        if fitted is None:
            if run.is_done:
                return dict(run.result["selection"])
            best = run.load_best()
            protocol = "best so far of an unfinished run"
            return {"epoch": best["epoch"], "metric": best["metric"], "protocol": protocol}
        selection = fitted.selection()
        if getattr(self.settings, "refit", False):
            selection["protocol"] += ", trained anew on train and validation"
        return selection

    # -- files

    def final_weights(self, model: nn.Module, run: Run) -> dict[str, Any]:
        """What the reported weights' file holds."""
        return {"model": model.state_dict()}

    def restore(self, path: Path, *, done: bool = True) -> nn.Module:
        """The model that a run's result is about, in eval mode; done False: the best so far of an unfinished run."""
        model = self.build(start=False)
        if not done:
            load_best(model, path)
            return model.eval()
        try:
            model.load_state_dict(load_state(path / "final.pt")["model"])
        except (KeyError, RuntimeError) as error:
            raise damaged(path / "final.pt", f"of another model: {str(error).splitlines()[0]}") from error
        return model.eval()

    def adopt(self, state: Mapping[str, Tensor], origin: object) -> nn.Module:
        """A model with the named tensors of another program's file, in eval mode. UserError where they do not fit."""
        return load_named(self.build(start=False), state, origin)

    @property
    def epochs(self) -> int:
        """The last epoch."""
        return self.settings.epochs

    @property
    def progress(self) -> bool | None:
        """True a bar, None a bar on a terminal and otherwise a line per evaluation, False silent."""
        return self.settings.progress if self.world.is_main else False

    def tracker(self, run: Run, training: Training | None) -> Tracker:
        """Where curves go."""
        wanted = self.settings.tensorboard and self.world.is_main and not self.settings.eval_only
        return Tracker(run.file("tensorboard") if wanted else None)

    def track(self, tracker: Tracker, model: nn.Module, judged: Judged) -> None:
        """Further curves and tables for TensorBoard, once, at the end."""
        epoch = judged.result["selection"]["epoch"] or 0
        tracker.scalars(epoch, {f"test/{name}": value for name, value in judged.result["test"].items()})

    def finished(self, model: nn.Module, judged: Judged, run: Run) -> None:
        """Further files of a run, after its result."""

    def page(self, run: Run, judged: Judged) -> Path | None:
        """Draw the report of a run; the path of its page."""
        return None

    @classmethod
    def joint_page(cls, settings: Any, paths: list[Path]) -> Path | None:
        """Draw one report of all runs of a command line, where a paper compares them; the path of its page."""
        return None

    def again(self, run: Run) -> None:
        """What is made of a run that was done already, before its result is shown."""

    # -- words

    @property
    def label(self) -> str:
        """The middle of the run directory's name."""
        raise NotImplementedError

    def data_lines(self) -> list[str]:
        """Sizes and notes of the data."""
        raise NotImplementedError

    def describe(self, model: nn.Module) -> list[str]:
        """What is about to run."""
        return []

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        """What is printed of a result."""
        raise NotImplementedError

    @classmethod
    def text(cls, settings: Any, results: Sequence[tuple[Mapping[str, Any], Path]]) -> str:
        """What is printed of the results of a command line, one for each of its runs."""
        return "\n".join(cls.result_text(result) for result, _ in results)
