"""TensorBoard files of a run. TensorBoard is imported when the first value is written, not before."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.base.files import explain_os_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Tracker:
    """Writes to TensorBoard below ``log_dir``; with ``log_dir=None`` every method does nothing.

    Steps are epochs. :meth:`start` at a continued run hides what an earlier session wrote from that epoch on, so no
    epoch shows twice. Hyper-parameters are in the run's config.toml and not repeated here.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None) -> None:
        self.log_dir = None if log_dir is None else Path(log_dir)
        self._first_step = 0
        self._writer: Any = None

    def start(self, first_step: int) -> None:
        """Say which epoch comes next; call before anything is written."""
        if self._writer is not None:
            raise ValueError("start comes before the first value")
        self._first_step = first_step

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One curve per key; "epoch" and values that are not finite numbers are left out."""
        if self.log_dir is None:
            return
        for key, value in values.items():
            if key != "epoch" and isinstance(value, (int, float)) and math.isfinite(value):
                self._open().add_scalar(key, value, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Histogram of all finite entries of a tensor of any shape; nothing when there are none."""
        if self.log_dir is None:
            return
        numbers = values.detach().float().cpu().flatten()
        numbers = numbers[torch.isfinite(numbers)]
        if len(numbers):
            self._open().add_histogram(name, numbers, step)

    def projector(
        self, name: str, embedding: Tensor, metadata: Sequence[Any], columns: Sequence[str] | None = None, step: int = 0
    ) -> None:
        """Embedding projector: embedding [N, D] and a label, or with ``columns`` a row of labels, for each of the N."""
        if len(metadata) != len(embedding):
            raise ValueError(f"found {len(metadata)} labels for {len(embedding)} embeddings, wanted one for each")
        if self.log_dir is None:
            return
        # The metadata file has one line per point and tabs between columns.
        rows: list[Any] = [[_clean(cell) for cell in row] if columns else _clean(row) for row in metadata]
        points, header = embedding.detach().float().cpu(), list(columns) if columns else None
        self._open().add_embedding(points, rows, metadata_header=header, global_step=step, tag=name)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A matplotlib figure; it is closed afterwards."""
        if self.log_dir is not None:
            self._open().add_figure(name, figure, step)

    def close(self) -> None:
        """Write everything out. Safe to call twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(str(self.log_dir), purge_step=self._first_step)
            except OSError as error:
                raise explain_os_error(error, self.log_dir) from error
            except ImportError as error:
                raise UserError(f"cannot use TensorBoard ({error}): install it or give `tensorboard 0`") from None
        return self._writer


def _clean(label: object) -> str:
    return " ".join(str(label).split()) or "-"
