"""Parsed data on disk, found by the content it was made from, so that it can never be stale."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.data.interactions import Interactions

logger = logging.getLogger("gfml.data")

FORMAT = 3  # raise it when readers or splits change what the same files and options give


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/gfml/parsed``, by default ``~/.cache/gfml/parsed``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gfml" / "parsed"


def cache_key(paths: Iterable[Path], options: Mapping[str, object]) -> str:
    """sha256 over the bytes of the files, the options and the format version."""
    digest = hashlib.sha256(json.dumps([FORMAT, dict(options)], sort_keys=True, default=str).encode())
    for path in paths:
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def cached(key: str, directory: Path, build: Callable[[], Interactions]) -> Interactions:
    """The data stored under ``key``, or what ``build`` returns, stored for the next time.

    A stored file that cannot be read is rebuilt, and a directory that cannot be written is done
    without; each is told in one line of the log ``gfml.data``.
    """
    path = directory / f"{key}.npz"
    if path.exists():
        try:
            return _load(path, key)
        except Exception as error:  # a damaged archive fails in any way at all
            logger.warning("cached data %s is damaged (%s): reading the source again", path, type(error).__name__)
    data = build()
    try:
        _save(path, key, data)
    except UserError as error:
        logger.warning("parsed data not cached: %s", str(error).split(":")[0])
    return data


def _save(path: Path, key: str, data: Interactions) -> None:
    about = {"key": key, "name": data.name, "shape": list(data.train.shape), "notes": data.notes}
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
    for part in ("train", "valid", "test"):
        matrix = data.split(part)
        arrays[f"{part}_indptr"] = matrix.indptr
        arrays[f"{part}_indices"] = matrix.indices
    optional = {"user_ids": data.user_ids, "item_ids": data.item_ids, "test_ratings": data.test_ratings}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    with atomic_open(path, "wb") as stream:
        np.savez(stream, **arrays)


def _load(path: Path, key: str) -> Interactions:
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    about = json.loads(arrays["about"].tobytes())
    if about["key"] != key:
        raise ValueError("the file was written for other data")
    return Interactions(
        about["name"],
        *(_matrix(arrays, part, tuple(about["shape"])) for part in ("train", "valid", "test")),
        user_ids=arrays.get("user_ids"),
        item_ids=arrays.get("item_ids"),
        test_ratings=arrays.get("test_ratings"),
        notes=about["notes"],
    )


def _matrix(arrays: Mapping[str, np.ndarray], part: str, shape: tuple[int, int]) -> sp.csr_array:
    indices = arrays[f"{part}_indices"]
    matrix = sp.csr_array((np.ones(len(indices), dtype=np.float32), indices, arrays[f"{part}_indptr"]), shape=shape)
    matrix.has_sorted_indices = True
    return matrix
