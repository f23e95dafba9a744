"""Checkpoints: tensors and plain values in one file, written whole, read without running code."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gfml.base.errors import UserError
from gfml.base.files import atomic_open, explain_os_error
from gfml.base.runs import train_anew

FORMAT = "gfml checkpoint 1"


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write tensors and plain values with torch.save, atomically."""
    try:
        with atomic_open(path, "wb") as stream:
            torch.save({"format": FORMAT, "state": dict(state)}, stream)
    except RuntimeError as error:
        # torch.save turns the OSError of a full disk into its own RuntimeError.
        if isinstance(error.__context__, OSError):
            raise explain_os_error(error.__context__, path) from error
        raise


def load_state(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what :func:`save_state` wrote. UserError when the file is missing, damaged or something else.

    The archive's checksums are verified first, which torch.load does not: one flipped bit would only change a weight.
    It costs about a second for each 2 GB, as the file is then read a second time, from the system's cache.
    """
    try:
        if broken := broken_part(path):
            raise damaged(path, f"its part {broken} does not have its checksum")
        content = load_plain(path, device)
    except FileNotFoundError:
        # Training makes the missing file, except in a run that is done.
        if (Path(path).parent / "done").exists():
            raise damaged(path, "it is missing") from None
        raise UserError(f"there is no {path}: train the run first, without `eval_only`") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file raises almost anything: KeyError, EOFError, RuntimeError, OSError
        raise damaged(path, "cut short or not a checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged(path, f"not a {FORMAT!r}")
    return content["state"]


def load_plain(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """What torch.save wrote of tensors and plain values; its warnings about other files are left to the errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location=device, weights_only=True)


def broken_part(path: str | os.PathLike[str]) -> str | None:
    """The first part of torch's archive that does not have its checksum; None where all have, or where it is no archive."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def damaged(path: str | os.PathLike[str], why: str) -> UserError:
    """The error for a checkpoint that cannot be used, with what helps for this file."""
    run = Path(path).parent
    own = (run / "config.toml").is_file()
    if own and Path(path).name == "last.pt":
        advice = "delete it and run the same command again, which then trains from the start"
    elif run.name.startswith("refit-") and (run.parent / "config.toml").is_file():
        advice = f"delete {run} and run the same command again"
    elif own:
        advice = train_anew(run)
    else:  # somebody else's
        advice = "give another file"
    return UserError(f"cannot use the checkpoint {path} ({why}): {advice}")
