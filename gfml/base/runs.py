"""What a run directory holds, read without opening it and without torch: which run it is, its state, what it found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tomllib
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from gfml.base.errors import UserError
from gfml.base.files import is_locked
from gfml.base.toml import LOCATION_FLAGS

State = Literal["not launched", "running", "incomplete", "done", "failed"]

# A continued run may go further than it was meant to; everything else must stay.
EXTENDABLE = frozenset({"epochs", "patience"})


def identity(config: Mapping[str, Any], exclude: Collection[str] = LOCATION_FLAGS) -> dict[str, Any]:
    """The part of a resolved config that decides what is computed, its keys in the ``_`` spelling."""
    words = {key.replace("-", "_"): list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return {key: words[key] for key in sorted(words) if key not in exclude}


def run_id(family: str, label: str, config: Mapping[str, Any], exclude: Collection[str] = LOCATION_FLAGS) -> str:
    """``family-label-hash``: the same for the same family and :func:`identity`, wherever it runs."""
    text = json.dumps([family, identity(config, exclude)], sort_keys=True)
    parts = [re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.")[:60] for part in (family, label)]
    return "-".join([*filter(None, parts), hashlib.sha256(text.encode()).hexdigest()[:8]])


def run_state(path: str | os.PathLike[str]) -> State:
    """What became of the run at ``path``."""
    path = Path(path)
    if not (path / "config.toml").is_file():
        return "not launched"
    if is_done(path):
        return "done"
    if is_locked(path / ".lock"):
        return "running"
    return "failed" if (path / "failed").exists() else "incomplete"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The resolved config of the run at ``path``; UserError when there is no run."""
    require_run(Path(path))
    return _stored_config(Path(path))


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``result.json``; UserError when the run has none."""
    file = Path(path) / "result.json"
    found = read_json(file)
    if found is None:
        raise UserError(f"the run {path} has no result ({run_state(path)}): finish it with `resume {path}`")
    if "selection" not in found or told_checksums(file.parent)[:1] not in ([], checksums(file.parent)[:1]):
        raise UserError(f"{file} is no result of a run, or damaged: delete it and finish the run again")
    return found


def checksums(path: Path) -> list[str]:
    """Of ``result.json`` and of its text, where one flipped bit would only change a figure."""
    files = [path / name for name in ("result.json", "result.txt")]
    return [f"{zlib.crc32(file.read_bytes()):08x}" for file in files if file.exists()]


def told_checksums(path: Path) -> list[str]:
    """What ``done`` says they are, behind the time and a word; nothing in runs from before it did."""
    done = path / "done"
    return done.read_text(encoding="utf-8", errors="replace").split()[2:] if done.exists() else []


def trials_sum(content: Mapping[str, Any]) -> str:
    """The checksum that ``trials.json`` of a sweep holds of its other content."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def read_trials(folder: Path) -> dict[str, Any] | None:
    """The content of a sweep's ``trials.json``, None without one; UserError for a damaged one."""
    found = read_json(folder / "trials.json", "trials")
    if found is not None and found.pop("crc32", None) not in (None, trials_sum(found)):
        raise UserError(
            f"{folder / 'trials.json'} does not have its checksum: delete it and run the sweep again without `resume`"
        )
    return found


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, each with an "epoch"; a last line cut short by a crash is left out."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    try:
        *lines, _rest = file.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row["epoch"], int) for row in rows):
            raise ValueError("an epoch is no number")
    except (OSError, ValueError, TypeError, KeyError):
        raise damaged_log(file) from None
    return rows


def damaged_log(file: Path) -> UserError:
    """The error for what a run wrote down epoch by epoch."""
    return UserError(f"{file} is damaged: restore it, or {train_anew(file.parent)}")


def require_run(path: Path) -> None:
    """UserError where no run is."""
    if not (path / "config.toml").is_file():
        inside = sorted(file.parent for file in path.glob("*/config.toml"))
        advice = f"give one of the {len(inside)} inside, such as {inside[0]}" if inside else "train it first"
        raise UserError(f"there is no run at {path}: check the directory, or {advice}")


def require_done(path: Path) -> None:
    """UserError where no run is, or one that is not finished."""
    require_run(path)
    if (state := run_state(path)) != "done":
        raise UserError(f"the run {path} is not finished ({state}): continue it with `resume {path}`")


def is_done(path: Path) -> bool:
    """Both of its last two files stand. Without its result a run is finished again, from its last checkpoint."""
    return (path / "done").exists() and (path / "result.json").exists()


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path / 'config.toml'} ({error}): restore it or give `overwrite`") from None


def read_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """The object in a JSON file, None without one; UserError for a damaged one, or one without these keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or (missing := [key for key in keys if key not in found]):
            raise ValueError(f"no {missing[0]}" if isinstance(found, dict) else "no object")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): delete it and run the same command again") from None


def find_done(
    out: str | os.PathLike[str],
    family: str,
    config: Mapping[str, Any],
    exclude: Collection[str],
    name: str | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Path | None:
    """The finished run of a config below ``out``, whatever its label, or at ``name`` or ``resume``; None without one.

    UserError where that directory holds another experiment.
    """
    stem, _, number = run_id(family, "", config, exclude).rpartition("-")
    if resume or name:
        found = [Path(resume) if resume else Path(out) / checked_name(name or "")]
    else:
        found = [path for path in Path(out).glob(f"{stem}-*") if path.name.endswith(f"-{number}")]
    found = [path for path in found if is_done(path) and not goes_beyond(path, config, exclude, resume=bool(resume))]
    return found[0] if len(found) == 1 else None


def goes_beyond(path: Path, config: Mapping[str, Any], exclude: Collection[str], *, resume: bool) -> bool:
    """Whether ``config`` goes beyond the stored one; UserError when it is a different experiment."""
    if not (path / "config.toml").exists():
        return False
    old, new = identity(_stored_config(path), exclude), identity(config, exclude)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if not changed:
        return False
    text = ", ".join(f"{key} {old.get(key)} (now {new.get(key)})" for key in changed)
    if not resume:
        raise UserError(f"{path} holds a run with {text}: give `resume {path}`, another `run_name` or `overwrite`")
    if not EXTENDABLE.issuperset(changed):
        free = " and ".join(sorted(EXTENDABLE))
        raise UserError(f"{path} was started with {text}: with `resume` only {free} may change")
    return True


def checked_name(name: str) -> str:
    """A name for a run directory; UserError for what is none."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._~+=-]*", name):
        raise UserError(f"found the run name {name!r}, wanted letters, digits and . _ - + = ~ only: mend `run_name`")
    if len(name) > 200:
        raise UserError(f"found a run name of {len(name)} letters, wanted 200 at most: shorten `run_name`")
    return name


def train_anew(run: Path) -> str:
    """Advice that works for any run that can be read no more: its own flags again, in its own place."""
    place = f"`config {shlex.quote(str(run / 'config.toml'))}` `out {shlex.quote(str(run.parent))}`"
    return f"train anew with {place} `run_name {shlex.quote(run.name)}` `overwrite`, which keeps the old run"


def cpu_seconds(path: Path) -> float:
    """User and system seconds of all sessions of a run that ended by themselves."""
    facts = read_json(path / "run.json") or {}
    return sum(session.get("cpu_seconds", 0.0) for session in facts.get("sessions", []))
