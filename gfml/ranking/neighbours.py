"""Nearest rows of a feature table by cosine: exact, in blocks, sparse, and kept on disk under the content's hash."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.distances import common_floats
from gfml.ranking.topk import FactorScorer, topk_items

logger = logging.getLogger("gfml.ranking.neighbours")

FORMAT = 1  # raise it when the same features and options give other neighbours


def nearest_rows(
    features: Tensor, k: int, *, shrink: float = 0.0, cache_dir: Path | None = None, memory_mb: float = 256
) -> sp.csr_array:
    """The k most similar rows of each row, itself included: CSR [n, n] with the similarities as values.

        s(i, j) = f_i . f_j / (|f_i| |f_j| + shrink)

    Of equally similar rows the lower number is nearer. A row of zeros is like itself alone (s = 1), so that nothing is
    ever divided by zero. Shape: features [n, width], float, computed in float32 at least.
    Cost: n^2 * width products once; ``memory_mb`` MiB beside features and result; n * k stored entries.
    cache_dir: where the result is kept, by the hash of the features' bytes, k and shrink; None keeps nothing.
    Errors: UserError if k is not in 1..n; ValueError for features that are not finite.
    """
    if not 1 <= k <= len(features):
        raise UserError(f"found {k} neighbours an item, wanted 1 to the {len(features)} items there are: mend `knn_k`")
    (features,) = common_floats(features)
    path = None if cache_dir is None else Path(cache_dir) / f"neighbours-{_key(features, k, shrink)}.npz"
    found = None if path is None else _load(path, len(features), k)
    if found is None:
        found = _search(features, k, shrink, memory_mb)
        if path is not None:
            _save(path, *found)
    return _to_csr(features, *found)


def nearest_ids(features: Tensor, k: int, memory_mb: float = 256) -> Tensor:
    """Ids of the k rows of highest cosine for each row: int64 [n, k], on the device of the features; no gradient."""
    (features,) = common_floats(features.detach())
    unit = F.normalize(features, dim=1)
    everyone = torch.arange(len(unit), device=unit.device)
    return topk_items(FactorScorer(unit, unit), everyone, k, seen=None, memory_mb=memory_mb)


@dataclass(frozen=True)
class _Shrunk:
    """Similarities with ``shrink``, as something to rank."""

    features: Tensor
    shrink: float

    @property
    def num_users(self) -> int:
        return len(self.features)

    num_items = num_users

    def score(self, users: Tensor) -> Tensor:
        norm = self.features.norm(dim=1)
        chosen = self.features[users]
        return (chosen @ self.features.T).div_(norm[users, None] * norm + self.shrink)

    def factors(self) -> None:
        return None


def _search(features: Tensor, k: int, shrink: float, memory_mb: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [n, k] and similarities [n, k], best first."""
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values: rows cannot be compared")
    if shrink:
        everyone = torch.arange(len(features))
        ids = topk_items(_Shrunk(features, shrink), everyone, k, seen=None, memory_mb=memory_mb)
    else:
        ids = nearest_ids(features, k, memory_mb)
    norm = features.norm(dim=1)
    # One rank at a time: k gathers of [n, width] never stand side by side.
    dots = torch.stack([(features * features[rank]).sum(1) for rank in ids.unbind(1)], 1)
    below = norm[:, None] * norm[ids] + shrink
    similarity = torch.where(below > 0, dots / below, 0.0)
    return ids.numpy(), similarity.numpy()


def _to_csr(features: Tensor, ids: np.ndarray, similarity: np.ndarray) -> sp.csr_array:
    count, k = ids.shape
    rows = np.repeat(np.arange(count), k)
    empty = (features == 0).all(1).numpy()
    keep = ~empty[rows]
    alone = empty.nonzero()[0]
    rows, columns = np.concatenate([rows[keep], alone]), np.concatenate([ids.ravel()[keep], alone])
    values = np.concatenate([similarity.ravel()[keep], np.ones(len(alone), similarity.dtype)])
    return sp.csr_array((values, (rows, columns)), shape=(count, count))


def _key(features: Tensor, k: int, shrink: float) -> str:
    digest = hashlib.sha256(repr((FORMAT, tuple(features.shape), str(features.dtype), k, float(shrink))).encode())
    digest.update(features.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(path: Path, count: int, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            ids, similarity = stored["ids"].astype(np.int64), stored["similarity"]
        if ids.shape != (count, k) or similarity.shape != (count, k):
            raise ValueError("it holds another number of rows")
    except Exception as error:  # a damaged archive fails in any way at all
        logger.warning("kept neighbours %s are damaged (%s): searching again", path, type(error).__name__)
        return None
    return ids, similarity


def _save(path: Path, ids: np.ndarray, similarity: np.ndarray) -> None:
    try:
        with atomic_open(path, "wb") as stream:
            np.savez(stream, ids=ids.astype(np.int32), similarity=similarity)
    except UserError as error:
        logger.warning("neighbours not kept: %s", str(error).split(":")[0])
