"""What an epoch of matrix factorisation costs: losses, optimizers, kernels, threads, and the number of interactions.

    python benchmarks/mf.py epochs [--data ml1m gowalla] [--data-root DIR] [--json FILE]
    python benchmarks/mf.py threads [--data ml1m]
    python benchmarks/mf.py scale [--sizes 1000000 10000000 100000000]

CPU seconds (user + system) of this process, the smallest of several turns in which all calls take part, so that a busy
machine slows all alike; ratios are within one run. Against other libraries: ``benchmarks/peers.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gfml.data.interactions import Interactions
from gfml.data.options import load_dataset
from gfml.engine.optimizers import OPTIMIZERS, build_optimizer
from gfml.engine.train import plain_step
from gfml.gravity import Gravity
from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import TripleSampler
from recsys.model import Recommender

# Users and items that go with a number of interactions.
SIZES = {10**6: (20_000, 2_000), 10**7: (200_000, 20_000), 10**8: (480_189, 17_770)}


class MatrixFactorisation:
    """Tables with one loss, its optimizer and its sampler; ``epoch()`` trains one epoch, sampling included."""

    def __init__(
        self, data: Interactions, loss: str = "bpr", *, optimizer: str = "adamw", kernel: str = "auto", dim: int = 64,
        batch_size: int = 2048, lr: float = 1e-3, seed: int = 0,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.model = Recommender(
            Tables(data.num_users, data.num_items, dim), Gravity(data.num_users, data.num_items), loss
        )
        self.optimizer = build_optimizer(optimizer, self.model.parameter_groups(0.01, False), lr)
        self.sampler = TripleSampler(data.train, batch_size=batch_size, seed=seed)
        fused = self.model.fused_loss() if kernel == "auto" else "autograd"
        self.loss = self.model.loss if isinstance(fused, str) else fused
        self.epochs = 0

    def epoch(self, steps: int | None = None) -> int:
        """One epoch, or its first ``steps``; returns the number of triples."""
        self.epochs += 1
        triples = 0
        for number, batch in enumerate(self.sampler.epoch(self.epochs)):
            if number == steps:
                break
            plain_step(lambda batch=batch: self.loss(batch), self.optimizer)
            triples += len(batch)
        return triples


def in_turn(calls: dict[str, Callable[[], Any]], runs: int, clock: Callable[[], float]) -> dict[str, float]:
    """The smallest time of each call over ``runs`` turns, after a warm-up; a call that returns a float is that time."""
    best: dict[str, float] = {}
    for turn in range(runs + 1):
        for name, call in calls.items():
            start = clock()
            found = call()
            seconds = found if isinstance(found, float) else clock() - start
            if turn:
                best[name] = min(seconds, best.get(name, seconds))
    return best


def epochs(data: Interactions, runs: int) -> Iterator[dict[str, Any]]:
    """Every loss, optimizer and kernel on one data set."""
    cells = {f"{loss}, adamw": {"loss": loss} for loss in ("bpr", "gravity", "mix_bpr")}
    cells |= {f"bpr, {name}": {"optimizer": name} for name in OPTIMIZERS[1:]}
    cells |= {f"{loss}, lazy_adamw": {"loss": loss, "optimizer": "lazy_adamw"} for loss in ("gravity", "mix_bpr")}
    cells |= {
        f"{loss}, adamw, autograd": {"loss": loss, "kernel": "autograd"} for loss in ("bpr", "gravity", "mix_bpr")
    }
    calls = {name: MatrixFactorisation(data, **cell).epoch for name, cell in cells.items()}
    seconds = in_turn(calls, runs, time.process_time)
    for name, value in seconds.items():
        yield {"data": data.name, "work": name, "cpu_s": value, "over_bpr": value / seconds["bpr, adamw"]}


def threads(data: Interactions, runs: int) -> Iterator[dict[str, Any]]:
    """Wall seconds of an epoch with one thread and with two."""
    calls = {}
    for optimizer in ("adamw", "lazy_adamw"):
        for number in (1, 2):
            training = MatrixFactorisation(data, optimizer=optimizer)

            def epoch(training: MatrixFactorisation = training, number: int = number) -> None:
                torch.set_num_threads(number)
                training.epoch()

            calls[f"bpr, {optimizer}, {number} threads"] = epoch
    seconds = in_turn(calls, runs, time.perf_counter)
    for name, value in seconds.items():
        first = seconds[name.replace("2 threads", "1 threads")]
        yield {"data": data.name, "work": name, "wall_s": value, "over_one_thread": value / first}


def scale(sizes: list[int], runs: int, steps: int = 200) -> Iterator[dict[str, Any]]:
    """Microseconds of a gravity triple as tables and interactions grow, sampling of the steps included."""
    from gfml.data.synthetic import generate

    first: dict[str, float] = {}
    for size in sizes:
        data = generate(*SIZES[size], size, seed=0)
        calls, counts = {}, {}
        for optimizer in OPTIMIZERS:
            training = MatrixFactorisation(data, "gravity", optimizer=optimizer)
            batches = [batch for batch, _ in zip(training.sampler.epoch(1), range(steps), strict=False)]
            counts[optimizer] = sum(map(len, batches))

            def some(training: MatrixFactorisation = training, batches: list = batches) -> None:
                for batch in batches:
                    plain_step(lambda: training.loss(batch), training.optimizer)

            calls[optimizer] = some
        for optimizer, value in in_turn(calls, runs, time.process_time).items():
            each = 1e6 * value / counts[optimizer]
            first.setdefault(optimizer, each)
            work = f"gravity, {optimizer}"
            yield {
                "interactions": data.train.nnz,
                "work": work,
                "us_a_triple": each,
                "over_first": each / first[optimizer],
            }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("part", choices=("epochs", "threads", "scale"))
    parser.add_argument("--data", nargs="+", default=None, help="data sets; default ml1m and gowalla, for threads ml1m")
    parser.add_argument("--data-root", help="where the data sets lie")
    parser.add_argument("--sizes", type=int, nargs="+", choices=tuple(SIZES), default=list(SIZES)[:2])
    parser.add_argument("--runs", type=int, default=3, help="turns of each call")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args(argv)
    if given.part != "threads":
        torch.set_num_threads(1)
    rows = []
    if given.part == "scale":
        parts = [scale(given.sizes, given.runs)]
    else:
        names = given.data or (["ml1m", "gowalla"] if given.part == "epochs" else ["ml1m"])
        sets = (load_dataset(name, data_root=given.data_root) for name in names)
        parts = [(epochs if given.part == "epochs" else threads)(data, given.runs) for data in sets]
    for part in parts:
        for row in part:
            rows.append(row)
            print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in row.items()),
                  flush=True)  # fmt: skip
    if given.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        given.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
