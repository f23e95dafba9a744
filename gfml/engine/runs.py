"""Run directories: one per resolved config, written so that it can be stopped at any point and continued.

A directory holds ``config.toml`` (a valid ``--config``), ``run.json`` (command, commit, versions, device, times),
``metrics.jsonl`` (a line per epoch), ``last.pt`` and ``best.pt``, ``result.json`` and ``result.txt`` (as it is printed), and
in the end ``done`` or ``failed`` (with the traceback). Files appear whole or not at all. Only one process at a time writes to a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import traceback
import weakref
import zlib
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch

import gfml
from gfml.base.checkpoints import load_state, save_state
from gfml.base.errors import UserError
from gfml.base.files import atomic_open, os_errors, remove_leftovers, try_lock, write_json
from gfml.base.runs import (
    State,
    checked_name,
    checksums,
    damaged_log,
    goes_beyond,
    is_done,
    read_json,
    read_metrics,
    read_result,
    require_run,
    run_id,
)
from gfml.base.toml import LOCATION_FLAGS, toml_text


class Run:
    """One run directory, open for writing. Use as a context manager: leaving it records how the run ended.

    Without an exception and without :meth:`finish` the run is incomplete; Ctrl-C leaves it incomplete; any other
    exception marks it failed. Starting it again continues from ``last.pt`` in every case.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], lock: IO[str] | None) -> None:
        self.path = path
        self.config = dict(config)
        self._lock, self._rows_sum = lock, 0
        self._facts: dict[str, Any] = read_json(path / "run.json") or {}

    @classmethod
    def open(
        cls,
        out: str | os.PathLike[str],
        family: str,
        config: Mapping[str, Any],
        *,
        label: str = "",
        exclude: Collection[str] = LOCATION_FLAGS,
        name: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        read_only: bool = False,
    ) -> Self:
        """Open the run of ``config`` (see :attr:`gfml.base.settings.Settings.resolved`) below ``out``, new, unfinished or done.

        name: directory name instead of ``run_id(family, label, config, exclude)``.
        resume: open this directory; ``config`` may differ from the stored one in ``epochs`` and ``patience`` alone.
        overwrite: an earlier run of that name is renamed to ``name~1`` (or ~2, ...) first.
        read_only: take no lock and write nothing; the run must exist (for ``--eval-only``).
        Raises UserError when the directory cannot be written, is in use, or holds a run of other settings.
        """
        if resume and overwrite:
            raise UserError("found `resume` and `overwrite` together: continue a run or start anew, not both")
        path = Path(resume) if resume else Path(out) / checked_name(name or run_id(family, label, config, exclude))
        if read_only or resume:
            require_run(path)
        if read_only:
            return cls(path, config, None)
        _require_run_or_nothing(path)
        if overwrite:
            _set_aside(path)
        extended = goes_beyond(path, config, exclude, resume=bool(resume))
        if is_done(path) and not extended:
            return cls(path, config, None)
        with os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
        try:
            run = cls(path, config, lock)
        except BaseException:
            lock.close()
            raise
        try:
            # Another process may have finished it since the first look.
            if run.is_done and not extended:
                run.close()
            else:
                run._start(family)
        except BaseException:
            run.close()
            raise
        return run

    def _start(self, family: str) -> None:
        with os_errors(self.path):
            for name in ("done", "failed"):
                (self.path / name).unlink(missing_ok=True)
            remove_leftovers(self.path)
        with atomic_open(self.path / "config.toml") as stream:
            stream.write(toml_text(self.config))
        self._cpu = time.process_time()
        sessions = [*self._facts.get("sessions", []), {"command": shlex.join(sys.argv), "started": _now()}]
        facts = {"family": family, "run": self.path.name, "seed": self.config.get("seed"), **_code_version()}
        self.note(**facts, versions=_versions(), sessions=sessions)

    # -- state

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def is_done(self) -> bool:
        """Whether the run had finished; its :attr:`result` then stands and nothing can be written."""
        return is_done(self.path)

    @property
    def is_open(self) -> bool:
        """Whether this process may write to it."""
        return self._lock is not None

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of ``result.json``, None before the run is done."""
        return read_result(self.path) if self.is_done else None

    def file(self, name: str) -> Path:
        """The path of a further file in the run directory; UserError when an open run's directory was removed."""
        if self._lock is not None:
            self._writable()
        return self.path / name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            error.add_note(f"the run is incomplete; continue it with `resume {shlex.quote(str(self.path))}`")
        try:
            if self._lock is not None:
                # The error under way matters more than one about recording it.
                with contextlib.suppress(UserError) if error else contextlib.nullcontext():
                    self._writable()
                    self._record_end(error)
        finally:
            self.close()

    def _record_end(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            with atomic_open(self.path / "failed") as stream:
                stream.write("".join(traceback.format_exception(error)))
        sessions = [dict(session) for session in self._facts["sessions"]]
        used = time.process_time() - self._cpu
        sessions[-1] |= {"ended": _now(), "state": _ended_as(error, self.is_done), "cpu_seconds": round(used, 2)}
        self.note(sessions=sessions)

    def close(self) -> None:
        """Give the lock back. Safe to call twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- records

    def note(self, **facts: Any) -> None:
        """Add facts to ``run.json``, for example ``device``."""
        self._writable()
        self._facts |= facts
        write_json(self.path / "run.json", self._facts)

    def check_data(self, fingerprint: str) -> None:
        """Record what the run was trained on; UserError when an earlier session of it saw other data."""
        found = self._facts.get("data")
        if found not in (None, fingerprint):
            raise UserError(
                f"the data has changed since {self.path} was started ({found[:12]}, now {fingerprint[:12]}): "
                "bring the old data back or start anew with `overwrite`"
            )
        if found is None and self._lock is not None:
            self.note(data=fingerprint)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``. ``row`` has an "epoch"; numbers that are not finite become null."""
        self._writable()
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(known, allow_nan=False)
        path = self.path / "metrics.jsonl"
        with os_errors(path), open(path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        self._rows_sum = zlib.crc32(f"{line}\n".encode(), self._rows_sum)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return read_metrics(self.path)

    def truncate_metrics(self, epoch: int, logged: int | None = None) -> None:
        """Forget the rows after ``epoch``: what was logged since the checkpoint will be logged again.

        logged: the checksum of the rows before, as the checkpoint has it; UserError when they have another.
        """
        self._writable()
        text = "".join(json.dumps(row) + "\n" for row in self.metrics() if row["epoch"] <= epoch)
        self._rows_sum = zlib.crc32(text.encode())
        if logged not in (None, self._rows_sum):
            raise damaged_log(self.path / "metrics.jsonl")
        with atomic_open(self.path / "metrics.jsonl") as stream:
            stream.write(text)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json`` and mark the run done.

        result: at least "selection" (epoch, metric, rule, split, protocol; see ``FitResult.selection``) and the
        metrics by split, for example "val" and "test".
        """
        self._writable()
        if "selection" not in result:
            raise ValueError(f"a result must say how its epoch was selected; found only {sorted(result)}")
        write_json(self.path / "result.json", result)
        with atomic_open(self.path / "done") as stream:
            stream.write(" ".join([_now(), "crc32", *checksums(self.path)]) + "\n")

    def _writable(self) -> None:
        if self._lock is None:
            raise ValueError(f"the run {self.path} is done, closed or open for reading only")
        if not (self.path / "config.toml").is_file():
            raise UserError(f"the run directory {self.path} was removed meanwhile: run the same command again")

    # -- checkpoints

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace ``last.pt``; it also holds a checksum of the rows logged so far."""
        self._writable()
        save_state(self.path / "last.pt", {**state, "logged": self._rows_sum})

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The content of ``last.pt`` on the CPU; None when there is none yet."""
        path = self.path / "last.pt"
        return load_state(path) if path.exists() else None

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Replace ``best.pt``."""
        self._writable()
        save_state(self.path / "best.pt", state)

    def load_best(self) -> dict[str, Any]:
        """The content of ``best.pt`` on the CPU; UserError when there is none."""
        return load_state(self.path / "best.pt")


def _require_run_or_nothing(path: Path) -> None:
    """Never write into, or rename, a directory that somebody else filled."""
    if not path.is_dir() or (path / "config.toml").exists():
        return
    if any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UserError(f"{path} is a directory but not a run: give another `run_name` or `out`")


# -- opening


def _set_aside(path: Path) -> None:
    """Rename an earlier run to the first free ``name~N``."""
    if not path.exists():
        return
    lock = _take_lock(path)
    try:
        number = next(n for n in range(1, 10**9) if not path.with_name(f"{path.name}~{n}").exists())
        with os_errors(path):
            path.rename(path.with_name(f"{path.name}~{number}"))
    finally:
        lock.close()


def _take_lock(path: Path) -> IO[str]:
    """Hold ``.lock`` in the run directory until the file is closed or the process ends, whatever it forked."""
    lock = try_lock(path / ".lock")
    if lock is None:
        raise UserError(f"another process is writing to {path}: wait for it, or give another `run_name` or `out`")
    os.register_at_fork(after_in_child=partial(_close, weakref.ref(lock)))
    return lock


def _close(lock: weakref.ref[IO[str]]) -> None:
    """In a forked reader process, which would keep the lock of a killed trainer."""
    if (file := lock()) is not None:
        file.close()


# -- facts


def _ended_as(error: BaseException | None, done: bool) -> State:
    """How a session ended."""
    if done:
        return "done"
    return "failed" if isinstance(error, Exception) else "incomplete"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    import scipy

    modules = {"gfml": gfml, "torch": torch, "numpy": np, "scipy": scipy}
    return {"python": platform.python_version()} | {name: str(module.__version__) for name, module in modules.items()}


def _code_version() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that gfml is imported from; nothing for an installed package."""
    root = Path(gfml.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


# -- random numbers


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, as tensors and numbers."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put :func:`rng_state` back. CUDA states are put back as far as there are devices."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda.cpu(), device)
