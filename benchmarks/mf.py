"""What an epoch of matrix factorisation costs: losses, optimizers, kernels and threads.

    python benchmarks/mf.py epochs [--data ml1m gowalla] [--data-root DIR] [--json FILE]
    python benchmarks/mf.py threads [--data ml1m]

CPU seconds (user + system) of this process, the smallest of several turns in which all calls take part, so that a busy
machine slows all alike; ratios are within one run. Against other libraries: ``benchmarks/peers.py``; growth with the
number of interactions: ``benchmarks/netflix.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
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
from gfml.ranking.evaluation import evaluate
from gfml.ranking.sampling import TripleSampler
from gfml.ranking.topk import FactorScorer
from recsys.model import Recommender

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.costs import measure_in_turn


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


def epochs(data: Interactions, runs: int) -> Iterator[dict[str, Any]]:
    """Every loss, optimizer and kernel on one data set."""
    cells = {f"{loss}, adamw": {"loss": loss} for loss in ("bpr", "gravity", "mix_bpr")}
    cells |= {f"bpr, {name}": {"optimizer": name} for name in OPTIMIZERS[1:]}
    cells |= {f"{loss}, lazy_adamw": {"loss": loss, "optimizer": "lazy_adamw"} for loss in ("gravity", "mix_bpr")}
    cells |= {
        f"{loss}, adamw, autograd": {"loss": loss, "kernel": "autograd"} for loss in ("bpr", "gravity", "mix_bpr")
    }
    calls = {name: MatrixFactorisation(data, **cell).epoch for name, cell in cells.items()}
    seconds = {name: cpu for name, (cpu, _) in measure_in_turn(calls, runs=runs).items()}
    for name, value in seconds.items():
        yield {"data": data.name, "work": name, "cpu_s": value, "over_bpr": value / seconds["bpr, adamw"]}


def threads(data: Interactions, runs: int) -> Iterator[dict[str, Any]]:
    """Wall seconds of an epoch, and of an evaluation of all users, with one thread and with two."""
    scorer = FactorScorer(*(torch.randn(count, 64) for count in data.train.shape))
    calls: dict[str, Callable[[], object]] = {}
    for number in (1, 2):

        def judge(number: int = number) -> None:
            torch.set_num_threads(number)
            evaluate(scorer, data, "test", [20])

        calls[f"evaluation, {number} threads"] = judge
    for optimizer in ("adamw", "lazy_adamw"):
        for number in (1, 2):
            training = MatrixFactorisation(data, optimizer=optimizer)

            def epoch(training: MatrixFactorisation = training, number: int = number) -> None:
                torch.set_num_threads(number)
                training.epoch()

            calls[f"bpr, {optimizer}, {number} threads"] = epoch
    seconds = {name: wall for name, (_, wall) in measure_in_turn(calls, runs=runs).items()}
    for name, value in seconds.items():
        first = seconds[name.replace("2 threads", "1 threads")]
        yield {"data": data.name, "work": name, "wall_s": value, "over_one_thread": value / first}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("part", choices=("epochs", "threads"))
    parser.add_argument("--data", nargs="+", default=None, help="data sets; default ml1m and gowalla, for threads ml1m")
    parser.add_argument("--data-root", help="where the data sets lie")
    parser.add_argument("--runs", type=int, default=3, help="turns of each call")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args(argv)
    if given.part == "epochs":
        torch.set_num_threads(1)
    rows = []
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
