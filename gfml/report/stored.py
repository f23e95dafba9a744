"""Stored runs of any program as their files tell them, for comparisons and reports over many runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base import files
from gfml.base.checkpoints import train_anew
from gfml.base.errors import UserError
from gfml.base.toml import LOCATION_FLAGS
from gfml.engine.runs import identity, read_config, read_metrics, read_result, run_state

# Flags of every program that say where things are or what is shown beside, not what is computed.
BESIDE = LOCATION_FLAGS | {"data_root", "cache_dir", "cache", "download", "baselines", "report", "load"}


@dataclass(frozen=True)
class StoredRun:
    """A run directory. label: its own among those read together; config: its flags in ``_`` spelling, without places."""

    path: Path
    label: str
    state: str
    config: Mapping[str, Any]

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json. UserError for a run that is not done."""
        return read_result(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.path)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The content of analysis.npz. UserError when it cannot be read."""
        return read_arrays(self.path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The content of a run's analysis.npz. UserError when it cannot be read."""
    return files.read_arrays(path / "analysis.npz", train_anew(path))


def each_once(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths. UserError for a directory that is given twice."""
    folders = [Path(path) for path in paths]
    for number, path in enumerate(folders):
        if path.resolve() in {other.resolve() for other in folders[:number]}:
            raise UserError(f"found the run {path} twice, wanted each once: drop one")
    return folders


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[StoredRun]:
    """The runs in these directories. UserError for a directory without a run and for one given twice."""
    folders = each_once(paths)
    configs = [identity(read_config(path), BESIDE) for path in folders]
    # What a run directory is named after, without the digest of its settings.
    names = [path.resolve().name.rpartition("-")[0] or path.resolve().name for path in folders]
    return [
        StoredRun(*parts)
        for parts in zip(folders, labels(names, configs), map(run_state, folders), configs, strict=True)
    ]


def varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The flags in which some of the configs differ, by name."""
    names = sorted({name for config in configs for name in config})
    return [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]


def labels(names: Sequence[str], configs: Sequence[Mapping[str, Any]], most: int = 3) -> list[str]:
    """Names; where those repeat, also the first ``most`` flags in which their configs differ, and a number at need."""
    found = []
    for name, config in zip(names, configs, strict=True):
        same = [other for other, another in zip(configs, names, strict=True) if another == name]
        said = ", ".join(f"{key} {flag_value(config.get(key))}" for key in varied(same)[:most])
        found.append(f"{name} ({said})" if said else name)
    return [
        f"{label} #{found[: n + 1].count(label)}" if found.count(label) > 1 else label for n, label in enumerate(found)
    ]


def flag_value(value: Any) -> str:
    """A flag's value for reading."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(flag_value, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
