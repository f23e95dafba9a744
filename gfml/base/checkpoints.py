"""Checkpoints: tensors and plain values in one file, written whole, read without running code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from gfml.base.errors import UserError
from gfml.base.files import atomic_open, explain_os_error

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
    """Read what :func:`save_state` wrote. UserError when the file is missing, damaged or something else."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}: train the run first, without --eval-only") from None
    except Exception as error:  # a damaged file raises almost anything: KeyError, EOFError, RuntimeError, OSError
        raise damaged(path, "cut short or not a checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged(path, f"not a {FORMAT!r}")
    return content["state"]


def damaged(path: str | os.PathLike[str], why: str) -> UserError:
    """The error for a checkpoint that cannot be used."""
    return UserError(f"cannot use the checkpoint {path} ({why}): delete it or give --overwrite to train from the start")
