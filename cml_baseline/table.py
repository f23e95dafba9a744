"""The table of a training: epoch, total loss, recall and seconds, printed as it goes and stored as ``epochs.csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gfml.base.files import write_csv
from gfml.base.runs import damaged_log
from gfml.engine.tracking import Tracker


class EpochTable(Tracker):
    """A tracker that also prints a line for every epoch and keeps the lines in a file of the run.

    total loss: sum over the epoch's pairs, penalties included: the mean over its batches times ``factor``.
    seconds: wall time of the epoch's training, without evaluation. A continued run keeps the lines before it.
    quiet: print and write nothing, in all processes but the first.
    """

    def __init__(
        self,
        log_dir: Path | None,
        path: Path,
        prefix: str,
        metrics: Sequence[str],
        factor: float,
        *,
        quiet: bool = False,
    ) -> None:
        super().__init__(log_dir)
        self.path, self.factor, self.quiet = path, factor, quiet
        self.columns = {f"{prefix}/{name}": name for name in metrics}
        self.rows: list[dict[str, str]] = []

    def start(self, first_step: int) -> None:
        """Keep the lines of earlier epochs and print the heading."""
        super().start(first_step)
        if self.quiet:
            return
        self.rows = [row for row in read_epochs(self.path) if int(row["epoch"]) < first_step]
        print(
            "  ".join(["epoch", f"{'total loss':>12}", *(f"{name:>10}" for name in self.columns.values()), "seconds"]),
            flush=True,
        )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One line, from a row of :func:`gfml.engine.train.fit`."""
        super().scalars(step, values)
        if "train/loss" not in values or self.quiet:
            return
        row = {"epoch": str(step), "total loss": f"{values['train/loss'] * self.factor:.1f}"}
        row |= {name: f"{values[key]:.4f}" if key in values else "" for key, name in self.columns.items()}
        row["seconds"] = f"{values['seconds/train']:.2f}"
        self.rows.append(row)
        numbers = (f"{row[name]:>10}" for name in self.columns.values())
        print("  ".join([f"{step:>5}", f"{row['total loss']:>12}", *numbers, f"{row['seconds']:>7}"]), flush=True)
        write_csv(self.path, self.rows)


def read_epochs(path: Path) -> list[dict[str, str]]:
    """The lines stored so far; none without the file. UserError for a damaged one."""
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
            if not all(row["epoch"].isdecimal() for row in rows):
                raise ValueError("an epoch is no number")
    except (OSError, ValueError, KeyError, AttributeError, csv.Error):
        raise damaged_log(path) from None
    return rows
