"""What reading, cutting and caching a table costs beside pyarrow's reading and factorising of the same columns.

Called by ``scripts/bench.py data``. The table is made here: string ids of 13 and 10 characters, times in seconds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("user_id", "item_id", "timestamp")


class Cost(NamedTuple):
    """CPU seconds of ours and of pyarrow, of the second start, and the largest resident MiB of a process that reads."""

    ours: float
    wall: float
    other: float
    again: float
    again_wall: float
    peak_mb: float
    file_mb: float


def write_table(path: Path, rows: int, seed: int = 0) -> None:
    """``rows`` interactions of ``rows / 20`` users with ``rows / 100`` items, popular ones more often."""
    rng = np.random.default_rng(seed)

    def names(prefix: str, count: int, width: int) -> pa.Array:
        letters = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", dtype=np.uint8)
        text = letters[rng.integers(0, 36, (count, width))].view(f"S{width}").ravel().astype(f"U{width}")
        return pa.array(np.char.add(prefix, text))

    users, items = names("A", max(rows // 20, 2), 12), names("B", max(rows // 100, 2), 9)
    user = pa.array((rng.random(rows) ** 2 * len(users)).astype(np.int64))
    item = pa.array((rng.random(rows) ** 3 * len(items)).astype(np.int64))
    times = pa.array(rng.integers(1_300_000_000, 1_700_000_000, rows))
    arrow_csv.write_csv(
        pa.table([users.take(user), items.take(item), times], names=COLUMNS),
        path,
        arrow_csv.WriteOptions(quoting_style="none"),
    )


def read_by_pyarrow(path: Path) -> list[pa.ChunkedArray]:
    """The columns read and the ids factorised: what any program must do first."""
    table = arrow_csv.read_csv(path)
    return [table[name].dictionary_encode() for name in COLUMNS[:2]]


def read_by_us(path: Path, cache: Path) -> None:
    """Read, cut each user's pairs by time, cache."""
    from gfml.data.options import load_dataset

    load_dataset(path, split="user-time", cache_dir=cache)


def cost(path: Path, runs: int = 3) -> Cost:
    """Ours and pyarrow in turns, ours with an empty cache each time, then again from the cache; peak of a new process."""
    found: dict[str, list[tuple[float, float]]] = {"other": [], "ours": [], "again": []}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            cache = Path(folder) / str(run)
            calls = {
                "other": lambda: read_by_pyarrow(path),
                "ours": lambda: read_by_us(path, cache),
                "again": lambda: read_by_us(path, cache),
            }
            for name, call in calls.items():
                cpu, wall = time.process_time(), time.perf_counter()
                call()
                found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        least = {name: min(pairs) for name, pairs in found.items()}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, __file__, str(path), str(Path(folder) / "peak")]
        peak = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    return Cost(*least["ours"], least["other"][0], *least["again"], peak, path.stat().st_size / 2**20)


def bench(sizes: list[int]) -> list[Cost]:
    """:func:`cost` of a table of each size."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for rows in sizes:
            path = Path(folder) / "table.csv"
            write_table(path, rows)
            read_by_us(path, Path(folder) / "warm")
            found.append(cost(path))
    return found


if __name__ == "__main__":
    read_by_us(Path(sys.argv[1]), Path(sys.argv[2]))
    # Not ru_maxrss: a process inherits there what its parent held when it was started.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps(int(peak[1]) / 1024))
