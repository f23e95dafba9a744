"""A finished run, ready to use: its program, settings, data and trained model.

run = gfml.load("runs/recsys-lastfm-lgn-bpr-1a2b3c4d")
scores = run.experiment.scorer(run.model).score(users)
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gfml.base.errors import UserError
from gfml.base.runs import read_result, require_done
from gfml.data.interactions import Interactions
from gfml.engine.distributed import World
from gfml.program.cli import resolve_device, set_threads
from gfml.program.experiment import Experiment
from gfml.program.program import Program, program_of


@dataclass(frozen=True)
class Loaded:
    """A run's program, settings, data, experiment and the model that its result is about, in eval mode."""

    path: Path
    program: Program
    experiment: Experiment
    model: nn.Module

    @property
    def settings(self) -> Any:
        """Every setting, as attributes."""
        return self.experiment.settings

    @property
    def data(self) -> Any:
        """The data that the model was trained on."""
        return self.experiment.data

    @property
    def interactions(self) -> Interactions:
        """Who has which items, of a recommender."""
        return self.experiment.interactions

    @property
    def result(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        return read_result(self.path)


def load(path: str | os.PathLike[str], *, device: str = "auto", threads: int = 0, **changes: Any) -> Loaded:
    """The finished run at ``path``. changes: settings that say where the data lies now, such as ``data_root``.

    Raises UserError when there is no run, it is not finished, its program is not installed, its data is gone or has
    changed, or its weights are damaged.
    """
    path = Path(path)
    program = program_of_run(path)
    settings = program.with_changes(str(path / "config.toml"), {"device": device, "threads": threads, **changes})
    set_threads(settings)
    kind = program.load_experiment()
    this = kind(settings, kind.load(settings), World(0, 1, resolve_device(settings)))
    this = this.whole() if getattr(settings, "refit", False) else this
    found = read_result(path).get("data", {}).get("fingerprint")
    if found != this.fingerprint:
        raise UserError(
            f"the data has changed since {path} was trained ({str(found)[:12]}, now {this.fingerprint[:12]}): "
            "bring the old data back, say where it is with --dataset or --data-root, or train anew"
        )
    return Loaded(path, program, this, this.restore(path))


def program_of_run(path: Path) -> Program:
    """The program that made a finished run. UserError where there is none."""
    require_done(path)
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path / 'run.json'} ({error}), which says what made the run: restore it"
        ) from None
    module = facts.get("program") or _module_called(facts)
    if not re.fullmatch(r"\w+(\.\w+)+", str(module)):
        raise UserError(f"{path / 'run.json'} does not say which program made the run: train it anew")
    return program_of(module)


def _module_called(facts: dict[str, Any]) -> str:
    """The program's module by the command of the first session: runs from before it was recorded."""
    words = shlex.split(facts.get("sessions", [{}])[0].get("command", ""))
    file = Path(words[0]) if words else Path()
    return f"{file.parent.name}.{file.stem}"
