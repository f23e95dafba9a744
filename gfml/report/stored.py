"""Stored runs of any program as their files tell them: what pages, comparisons and sweeps read, once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base import files
from gfml.base.errors import UserError
from gfml.base.runs import identity, read_config, read_metrics, read_result, require_done, run_state, train_anew
from gfml.base.toml import LOCATION_FLAGS
from gfml.report.page import COLORS

# Flags of every program that say where things are or what is shown beside, not what is computed.
BESIDE = LOCATION_FLAGS | {"data_root", "cache_dir", "cache", "download", "baselines", "report", "load"}
# What a program judges one by one: ``per_user/NAME`` in analysis.npz.
UNITS = ("user", "query", "image")


@dataclass(frozen=True)
class StoredRun:
    """A run directory. label, color: its own among those read together; config: its flags in ``_`` spelling, without places."""

    path: Path
    label: str
    color: str
    state: str
    config: Mapping[str, Any]

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json. UserError for a run that is not done."""
        return read_result(self.path)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of run.json; empty where the run was moved without it."""
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.path)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The content of analysis.npz. UserError when it cannot be read."""
        return read_arrays(self.path)

    @property
    def data(self) -> dict[str, Any]:
        return self.result["data"]

    @property
    def selection(self) -> dict[str, Any]:
        return self.result["selection"]

    @property
    def test(self) -> dict[str, float]:
        return self.result["test"]

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Test figures of what needs no training."""
        return {name: found["test"] for name, found in self.result.get("baselines", {}).items() if "test" in found}

    @property
    def k(self) -> int:
        """The longest list of ``--topks``."""
        return max(self.result["topks"])

    @property
    def on_test(self) -> bool:
        """Whether the epoch was chosen by what is reported."""
        return self.selection.get("split") == "test"

    @property
    def unit(self) -> str | None:
        """What was judged one by one: user, query or image; None where nothing of the kind is stored."""
        return next((unit for unit in UNITS if any(name.startswith(f"per_{unit}/") for name in self.arrays)), None)

    @cached_property
    def per_unit(self) -> dict[str, np.ndarray]:
        """Metrics of every user, query or image."""
        head = f"per_{self.unit}/"
        return {name.removeprefix(head): values for name, values in self.arrays.items() if name.startswith(head)}

    def why_unpaired(self, other: StoredRun) -> str:
        """Why figures of single users, queries or images of two runs are not of the same ones; empty where they are."""
        if self.unit is None or self.unit != other.unit:
            return "no figures per user in analysis.npz"
        if self.unit == "user":
            here, there = self.arrays["test_users"], other.arrays["test_users"]
            if not np.array_equal(here, there):
                return f"other users judged, {len(here):,} and {len(there):,}"
        parts = [run.data.get("test_fingerprint", run.data["fingerprint"]) for run in (self, other)]
        return "" if parts[0] == parts[1] else f"another split of {self.data['name']}, so another test part"


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
    colors = [COLORS[number % len(COLORS)] for number in range(len(folders))]
    parts = zip(folders, labels(names, configs), colors, map(run_state, folders), configs, strict=True)
    return [StoredRun(*part) for part in parts]


def finished_runs(paths: Sequence[str | os.PathLike[str]], holds: Collection[str], what: str) -> list[StoredRun]:
    """The same for a page, named after their models. UserError for a run that is not done or whose result lacks ``holds``."""
    runs = read_runs(paths)
    for run in runs:
        require_done(run.path)
        if not set(holds) <= run.result.keys():
            raise UserError(f"{run.path} is no run of {what}: give the directory of one")
    named = labels([kind_of(run) for run in runs], [run.config for run in runs])
    return [replace(run, label=label) for run, label in zip(runs, named, strict=True)]


def kind_of(run: StoredRun) -> str:
    """The model, and where it has them the arm of the comparison it is in and its behaviour if that is not the usual one."""
    behaviour = run.result.get("behaviour", "fixed")
    parts = [run.result["model"], run.result.get("arm"), None if behaviour == "fixed" else behaviour]
    return ", ".join(part for part in parts if part)


def beside(paths: Sequence[str | os.PathLike[str]], what: str) -> Path:
    """Where something about runs goes: into the only one; of several beside them, under a name that only these runs have."""
    if len(paths) == 1:
        return Path(paths[0]) / what
    folders = [Path(path).resolve() for path in paths]
    # The digest of a name such as recsys-lastfm-mf-1a2b3c4d says enough.
    marks = [found[1] if (found := re.search(r"-([0-9a-f]{8})$", path.name)) else path.name for path in folders]
    name = "-".join([what, *marks])
    if len(name) > 60:
        name = f"{what}-{len(marks)}-runs-{hashlib.sha256(' '.join(marks).encode()).hexdigest()[:8]}"
    return Path(os.path.commonpath([path.parent for path in folders])) / name


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
