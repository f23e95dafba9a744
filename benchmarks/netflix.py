"""What every stage of a recommender's way costs as the data grows to the size of the Netflix prize.

    python benchmarks/netflix.py [--sizes 1000000 10000000 100000000] [--stages ...] [--folder DIR] [--json FILE] [--threads N]
    python benchmarks/netflix.py --page docs/netflix.json docs/netflix.md        a page of stored rows, nothing measured

Generated data: 20,000 x 2,000 with a million interactions, 200,000 x 20,000 with ten, 480,189 x 17,770 with a hundred.
Every stage runs in a process of its own and tells CPU seconds (user + system, imports and compilation left out) and the
peak of its resident memory; data pass from stage to stage as files in the folder. Of the epoch at most
--steps batches are done and timed, and the others taken to cost as much; the sampler, the draw of the epoch's pairs and
all other stages do all of their work. The stage "MF rows alone" does of the epoch only what no program can leave out:
weights and moments of the rows of each batch are read and written, asked for in advance; it grows as tables outgrow the
caches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

SHAPES = {10**6: (20_000, 2_000), 10**7: (200_000, 20_000), 10**8: (480_189, 17_770)}
STAGES = ("generate", "write Parquet", "load and cut", "popularity", "item-knn", "ease", "ials epoch", "MF epoch",
          "MF rows alone", "evaluate")  # fmt: skip
JUDGED = 20_000


def save(data: Any, folder: Path) -> None:
    for part in ("train", "test"):
        matrix = data.split(part)
        np.save(folder / f"{part}-indices.npy", matrix.indices)
        np.save(folder / f"{part}-indptr.npy", matrix.indptr)
    (folder / "shape.json").write_text(json.dumps(data.train.shape))


def load(folder: Path) -> Any:
    from gfml.data.interactions import Interactions, csr_from_parts

    shape = tuple(json.loads((folder / "shape.json").read_text()))
    parts = [csr_from_parts(np.load(folder / f"{part}-indices.npy"), np.load(folder / f"{part}-indptr.npy"), shape)
             for part in ("train", "test")]  # fmt: skip
    empty = csr_from_parts(np.empty(0, np.int32), np.zeros(shape[0] + 1, np.int64), shape)
    return Interactions("netflix", parts[0], empty, parts[1])


def write_parquet(data: Any, path: Path) -> None:
    """All pairs as two columns, users in blocks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, pa.schema([("user", pa.int32()), ("item", pa.int32())])) as writer:
        for first in range(0, data.num_users, 4096):
            for part in (data.train, data.test):
                rows = part[first : first + 4096]
                users = np.repeat(np.arange(first, first + rows.shape[0], dtype=np.int32), np.diff(rows.indptr))
                writer.write_table(pa.table({"user": users, "item": rows.indices}))


def epoch(data: Any, steps: int) -> float:
    """An epoch of MF gravity, of which the first ``steps`` batches are done: the seconds that the others would take."""
    from benchmarks.mf import MatrixFactorisation
    from gfml.engine.train import plain_step

    training = MatrixFactorisation(data, "gravity", optimizer="lazy_adamw")
    batches = training.sampler.epoch(1)
    begin = time.process_time()
    for batch in itertools.islice(batches, steps):
        plain_step(lambda: training.loss(batch), training.optimizer)
    return (time.process_time() - begin) * max(0, len(batches) / steps - 1)


def rows_alone(data: Any, steps: int) -> float:
    """What the batches of :func:`epoch` move; returns the seconds that count: those of the rows, scaled to the epoch."""
    import numpy as np

    from gfml.base.compiled import compiled
    from gfml.kernels.rows import fetch_soon
    from gfml.ranking.sampling import TripleSampler

    @compiled
    def move(rows: Any, tables: Any) -> None:
        for n in range(len(rows)):
            fetch_soon(tables, rows, n)
            for table in tables:
                for d in range(table.shape[1]):
                    table[rows[n], d] += 1

    batches = TripleSampler(data.train, batch_size=2048, seed=0).epoch(1)
    touched = [np.unique(np.concatenate([b.users, b.pos + data.num_users, b.neg + data.num_users]))
               for b in itertools.islice(batches, steps)]  # fmt: skip
    tables = tuple(np.zeros((data.num_users + data.num_items, 64), np.float32) for _ in range(3))
    move(np.arange(len(tables[0])), tables)  # compiles, and gives every row its memory
    begin = time.process_time()
    for rows in touched:
        move(rows, tables)
    return (time.process_time() - begin) * len(batches) / len(touched)


def evaluate(data: Any) -> None:
    """Top 20 of 20,000 users by factors, with all metrics."""
    import dataclasses

    import torch

    from gfml.data.interactions import csr_from_parts
    from gfml.ranking.evaluation import evaluate
    from gfml.ranking.topk import FactorScorer

    torch.manual_seed(0)
    starts = data.test.indptr.copy()
    starts[JUDGED:] = starts[min(JUDGED, data.num_users)]
    few = csr_from_parts(data.test.indices[: starts[-1]], starts, data.test.shape)
    scorer = FactorScorer(torch.randn(data.num_users, 64), torch.randn(data.num_items, 64))
    evaluate(scorer, dataclasses.replace(data, test=few), "test", [20], beyond=True)


def work(stage: str, size: int, folder: Path, steps: int) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """What is timed, and what is done with its result afterwards."""
    from gfml.data.large import read_pairs
    from gfml.data.synthetic import generate
    from gfml.ranking import baselines
    from gfml.ranking.ials import IALS

    if stage == "generate":
        return lambda: generate(*SHAPES[size], size, name="netflix"), lambda data: save(data, folder)
    if stage == "load and cut":
        return lambda: read_pairs(folder / "pairs.parquet"), lambda data: save(data, folder)
    data = load(folder)
    model = IALS(data.train, 64, l2=0.01, alpha0=0.05) if stage == "ials epoch" else None
    calls: dict[str, Callable[[], Any]] = {
        "write Parquet": lambda: write_parquet(data, folder / "pairs.parquet"),
        "popularity": lambda: baselines.popularity(data),
        "item-knn": lambda: baselines.item_knn(data, k=100),
        "ease": lambda: baselines.ease(data, 500.0, memory_gib=2.0),
        "ials epoch": lambda: model.epoch() if model else None,
        "MF epoch": lambda: epoch(data, steps),
        "MF rows alone": lambda: rows_alone(data, steps),
        "evaluate": lambda: evaluate(data),
    }
    return calls[stage], lambda result: result


def run_stage(stage: str, size: int, folder: Path, steps: int) -> dict[str, float]:
    """One stage in this process, after the same on a small data set, which pays for imports and compilation."""
    with tempfile.TemporaryDirectory() as small:
        SHAPES[1] = (2_000, 300)
        from gfml.data import synthetic

        large, synthetic.LARGE = synthetic.LARGE, 0
        save(synthetic.generate(2_000, 300, 40_000), Path(small))
        synthetic.LARGE = large
        if stage == "load and cut":
            write_parquet(load(Path(small)), Path(small) / "pairs.parquet")
        if stage != "generate":
            work(stage, 1, Path(small), steps)[0]()
    call, after = work(stage, size, folder, steps)
    begin = time.process_time()
    found = call()
    seconds = time.process_time() - begin + (found if stage == "MF epoch" else 0)
    status = Path("/proc/self/status").read_text()
    after(found)
    row = {"cpu_s": seconds, "peak_gib": int(status.split("VmHWM:")[1].split()[0]) / 2**20}
    if stage == "MF rows alone":
        starts = load(folder).train.indptr.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        row |= {"cpu_s": found, "items_of_a_user": sum(length**2 for length in lengths) / sum(lengths)}
    return row


def measure(stage: str, size: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--sizes", str(size), "--folder", str(folder)]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    row: dict[str, Any] = {"stage": stage, "interactions": size}
    if done.returncode:
        return row | {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return row | json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: CPU seconds, seconds per million interactions, and peak memory, by stage and size."""
    sizes = list(dict.fromkeys(row["interactions"] for row in rows))
    lines = ["| stage | " + " | ".join(f"{size:,}: CPU s, s per million, peak GiB" for size in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        cells = []
        for size in sizes:
            row = next((row for row in rows if (row["stage"], row["interactions"]) == (stage, size)), {})
            each = row.get("cpu_s", 0) * 1e6 / size
            cells.append(
                f"{row['cpu_s']:.2f}, {each:.3f}, {row['peak_gib']:.2f}" if "cpu_s" in row else row.get("failed", "-")
            )
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(stored: dict[str, Any]) -> str:
    """The table as a page, with how many times an interaction costs at the largest size what it does at the smallest."""
    rows, about = stored["rows"], stored["about"]
    sizes = sorted({row["interactions"] for row in rows})
    cost = {(row["stage"], row["interactions"]): row["cpu_s"] / row["interactions"] for row in rows if "cpu_s" in row}
    met = {row["interactions"]: row["items_of_a_user"] for row in rows if "items_of_a_user" in row}
    law = " An interaction of item-knn meets all items of its user: " + ", ".join(
        f"{met[size]:.0f} at {size:,}" for size in sizes if size in met) + "."  # fmt: skip
    grown = [f"{stage} {cost[stage, sizes[-1]] / cost[stage, sizes[0]]:.2f}" for stage in dict.fromkeys(row["stage"] for row in rows)
             if {(stage, sizes[0]), (stage, sizes[-1])} <= cost.keys()]  # fmt: skip
    machine = f"{about['threads']} thread, {about['cpus']} processors ({about['machine']}), torch {about['torch']}"
    machine += f". {about['note']}" if "note" in about else ""
    return (
        f"# As large as Netflix\n\n{' '.join(__doc__.split(chr(10) * 2)[2].split())}\n\n{table(rows)}\n\n"
        f"Cost of an interaction at {sizes[-1]:,} over that at {sizes[0]:,}: {', '.join(grown)}.{law if met else ''} {machine}.\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SHAPES, default=list(SHAPES), help="interactions")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, help="only these, on the data in --folder; others of --json stay"
    )
    parser.add_argument("--folder", type=Path, help="where data lie between stages; default: a temporary folder")
    parser.add_argument("--steps", type=int, default=2000, help="most batches of 2,048 that the epoch is timed on")
    parser.add_argument("--threads", type=int, default=2, help="threads of every stage")
    parser.add_argument("--json", type=Path, help="also write the rows here, after every stage")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--page", type=Path, nargs=2, metavar=("JSON", "FILE"), help="write a page of stored rows")
    arguments = parser.parse_args(argv)
    if arguments.page:
        arguments.page[1].write_text(page(json.loads(arguments.page[0].read_text())))
        return 0
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.sizes[0], arguments.folder, arguments.steps)))
        return 0
    rows = []
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
    }
    if arguments.stages and arguments.json and arguments.json.exists():
        stored = json.loads(arguments.json.read_text())
        again = {(stage, size) for stage in arguments.stages for size in arguments.sizes}
        rows, about = (
            [row for row in stored["rows"] if (row["stage"], row["interactions"]) not in again],
            stored["about"],
        )
    with tempfile.TemporaryDirectory() as temporary:
        for size in arguments.sizes:
            folder = (arguments.folder or Path(temporary)) / str(size)
            folder.mkdir(parents=True, exist_ok=True)
            for stage in arguments.stages or STAGES:
                rows.append(measure(stage, size, folder, arguments))
                print(json.dumps(rows[-1]), flush=True)
                rows.sort(key=lambda row: (row["interactions"], STAGES.index(row["stage"])))
                if arguments.json:
                    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print("\n" + table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
