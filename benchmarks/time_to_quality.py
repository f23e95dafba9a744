"""Validation recall against CPU seconds: our losses and models beside implicit's, one page with a figure.

    python benchmarks/time_to_quality.py --data ml1m gowalla --peer-python PYTHON [--budget 30] [--data-root DIR]

Each method trains on one thread of a process of its own until its budget of CPU seconds (user + system) is spent, and
is judged whenever its time has grown by a quarter; judging does not count, nor does compiling. Settings are those of
METHODS, chosen on validation, those of iALS for each data set. ``--peer-python``: an interpreter that has implicit; without
it its curves are left out and the page says so. Writes docs/time-to-quality.json, .png and .md; what is not asked for by
--data and --methods keeps its curves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from gfml.base.files import atomic_open, write_json

DOCS = Path(__file__).resolve().parents[1] / "docs"
BUDGETS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
GRAVITY = {"lr": 5e-3, "lamb": 3.0}
METHODS: dict[str, dict[str, Any]] = {
    "MF bpr": {"loss": "bpr", "lr": 5e-3, "decay": 1e-2},
    "MF gravity": {"loss": "gravity", **GRAVITY},
    "MF mix_bpr": {"loss": "mix_bpr", **GRAVITY},
    "MF bpr, lazy_adamw": {"loss": "bpr", "lr": 5e-3, "decay": 1e-2, "optimizer": "lazy_adamw"},
    "MF gravity, lazy_adamw": {"loss": "gravity", "optimizer": "lazy_adamw", **GRAVITY},
    "MF mix_bpr, lazy_adamw": {"loss": "mix_bpr", "optimizer": "lazy_adamw", **GRAVITY},
    "LightGCN bpr": {"loss": "bpr", "layers": 3, "lr": 5e-3},
    "iALS": {"ials": {"ml1m": {"l2": 0.02, "alpha0": 0.05}, "gowalla": {"l2": 0.003, "alpha0": 0.01}}},
    "implicit BPR": {"peer": "bpr", "learning_rate": 0.05, "regularization": 0.01},
    "implicit ALS": {"peer": "als", "regularization": 50.0, "alpha": 20.0},
}
PEER = """
import json, sys, time
import numpy as np, scipy.sparse as sp
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
kind, path, out, budget, settings = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), json.loads(sys.argv[5])
matrix = sp.csr_matrix(sp.load_npz(path), dtype=np.float32)
kinds = {"als": AlternatingLeastSquares, "bpr": BayesianPersonalizedRanking}
model = kinds[kind](factors=64, num_threads=1, random_state=1, iterations=10**6, **settings)
state = {"start": time.process_time(), "next": 0.0, "away": 0.0, "number": 0}
class Done(Exception):
    pass
def judge(*_):
    now = time.process_time()
    spent = now - state["start"] - state["away"]
    if spent >= state["next"]:
        np.savez(f"{out}/{state['number']}.npz", seconds=spent, user=model.user_factors, item=model.item_factors)
        state["number"], state["next"] = state["number"] + 1, spent * 1.25
    state["away"] += time.process_time() - now
    if spent > budget:
        raise Done
try:
    model.fit(matrix, show_progress=False, callback=judge)
except Done:
    pass
"""


def own_curve(data: Any, settings: dict[str, Any], budget: float) -> list[tuple[float, float]]:
    """(CPU seconds, recall@20) of one of our methods."""
    import torch

    from gfml.engine.optimizers import build_optimizer
    from gfml.engine.train import plain_step
    from gfml.gravity import Gravity
    from gfml.ranking.encoders import LightGCN, Tables
    from gfml.ranking.graph import build_graph
    from gfml.ranking.ials import IALS
    from gfml.ranking.sampling import TripleSampler
    from recsys.model import PairOptions, Recommender

    def parts() -> tuple[Any, Callable[[], Iterator[None]]]:
        torch.manual_seed(0)
        sizes, layers = (data.num_users, data.num_items), settings.get("layers")
        encoder = Tables(*sizes, 64) if layers is None else LightGCN(build_graph(data.train), 64, layers)
        gravity = Gravity(*sizes, lamb=settings.get("lamb", 1.0))
        model = Recommender(encoder, gravity, settings["loss"], pair=PairOptions(decay=settings.get("decay", 1e-4)))
        optimizer = build_optimizer(
            settings.get("optimizer", "adamw"), model.parameter_groups(0.0, False), settings["lr"]
        )
        fused = model.fused_loss()
        loss = model.loss if isinstance(fused, str) else fused

        def steps() -> Iterator[None]:
            sampler = TripleSampler(data.train, batch_size=2048, seed=0)
            for epoch in range(1, 10**6):
                for batch in sampler.epoch(epoch):
                    plain_step(lambda batch=batch: loss(batch), optimizer)
                    yield

        return model, steps

    def ials() -> tuple[Any, Callable[[], Iterator[None]]]:
        model = IALS(data.train, 64, **settings["ials"][data.name])
        return model, lambda: (model.epoch() for _ in range(10**6))

    torch.set_num_threads(1)
    make = ials if "ials" in settings else parts
    next(make()[1]())  # compiles
    model, steps = make()
    return list(_judged(data, model.scorer, steps(), budget))


def _judged(
    data: Any, scorer: Callable[[], Any], steps: Iterator[None], budget: float
) -> Iterator[tuple[float, float]]:
    spent, due = 0.0, 0.1
    while spent <= budget:
        start = time.process_time()
        while spent + time.process_time() - start < due:
            next(steps)
        spent += time.process_time() - start
        yield spent, recall(data, scorer())
        due = spent * 1.25


def recall(data: Any, scorer: Any) -> float:
    from gfml.ranking.evaluation import evaluate

    return evaluate(scorer, data, "valid", [20]).means["recall@20"]


def peer_curve(data: Any, settings: dict[str, Any], budget: float, python: str) -> list[tuple[float, float]]:
    """As :func:`own_curve` of a method of implicit, judged by the same program."""
    import torch

    from gfml.ranking.topk import FactorScorer

    own = {key: value for key, value in settings.items() if key != "peer"}
    with tempfile.TemporaryDirectory() as folder:
        sp.save_npz(f"{folder}/train.npz", sp.csr_matrix(data.train))
        words = [python, "-c", PEER, settings["peer"], f"{folder}/train.npz", folder, str(budget), json.dumps(own)]
        subprocess.run(
            words, check=True, env=os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        )
        curve = []
        for number in range(len(list(Path(folder).glob("[0-9]*.npz")))):
            with np.load(f"{folder}/{number}.npz") as saved:
                scorer = FactorScorer(torch.from_numpy(saved["user"]), torch.from_numpy(saved["item"]))
                curve.append((float(saved["seconds"]), recall(data, scorer)))
    return curve


def curve_alone(name: str, method: str, given: argparse.Namespace) -> list[list[float]]:
    """The curve of one method, made by a process of its own."""
    words = [sys.executable, __file__, "--data", name, "--method", method, "--budget", str(given.budget)]
    words += ["--data-root", given.data_root] if given.data_root else []
    words += ["--peer-python", given.peer_python] if given.peer_python else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def best_until(curve: list[list[float]], seconds: float) -> float | None:
    """The best recall that a curve has seen by then."""
    seen = [value for spent, value in curve if spent <= seconds]
    return max(seen) if seen else None


def page(found: dict[str, dict[str, list[list[float]]]]) -> str:
    """The page's text: for each data set the best validation recall so far at each budget."""
    lines = [
        "# Time to quality",
        "",
        "Validation recall@20 against CPU seconds of training on one thread; judging and compiling not counted. Each cell is",
        "the best value seen by then, the best of a column in bold. Settings were chosen on validation, those of iALS for each",
        "data set. Made by `python benchmarks/time_to_quality.py`.",
        "",
        "![recall@20 against CPU seconds](time-to-quality.png)",
    ]
    for name, curves in found.items():
        budgets = [budget for budget in BUDGETS if any(curve[-1][0] >= budget for curve in curves.values())]
        columns = {budget: [best_until(curve, budget) or 0.0 for curve in curves.values()] for budget in budgets}
        lines += ["", f"## {name}", "", "| method | " + " | ".join(f"{budget:g} s" for budget in budgets) + " |",
                  "|---|" + "---|" * len(budgets)]  # fmt: skip
        for method, curve in curves.items():
            values = {budget: best_until(curve, budget) for budget in budgets}
            cells = [
                "" if v is None else f"**{v:.4f}**" if v == max(columns[b]) else f"{v:.4f}" for b, v in values.items()
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        missing = [method for method in METHODS if method not in curves]
        lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


def figure(found: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """One panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4.5), squeeze=False, layout="constrained")
    for axis, (name, curves) in zip(axes[0], found.items(), strict=True):
        for number, (method, curve) in enumerate(curves.items()):
            style = "--" if method.startswith("implicit") else "-"
            axis.plot(*np.transpose(curve), style, label=method, color=f"C{number % 10}")
        axis.set(xscale="log", xlabel="CPU seconds", ylabel="validation recall@20", title=name)
    drawn.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    drawn.savefig(path, dpi=100)
    plt.close(drawn)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", nargs="+", default=["ml1m", "gowalla"])
    parser.add_argument("--data-root", help="where the data sets lie")
    parser.add_argument("--budget", type=float, default=30.0, help="CPU seconds of each method")
    parser.add_argument("--peer-python", help="an interpreter that has implicit")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="whose curves to make")
    parser.add_argument("--method", choices=METHODS, help="print this curve as JSON, write nothing")
    given = parser.parse_args(argv)
    if given.method:
        from gfml.data.options import load_dataset

        data = load_dataset(given.data[0], data_root=given.data_root)
        settings = METHODS[given.method]
        peer = "peer" in settings
        curve = (
            peer_curve(data, settings, given.budget, given.peer_python)
            if peer
            else own_curve(data, settings, given.budget)
        )
        print(json.dumps(curve))
        return 0
    store = DOCS / "time-to-quality.json"
    found = json.loads(store.read_text(encoding="utf-8"))["curves"] if store.exists() else {}
    for name, method in ((name, method) for name in given.data for method in given.methods):
        if "peer" in METHODS[method] and not given.peer_python:
            continue
        curves = found.get(name, {}) | {method: curve_alone(name, method, given)}
        print(f"{name}, {method}: {curves[method][-1]}", flush=True)
        # After every curve: what was drawn stays when the rest is stopped.
        found[name] = {method: curves[method] for method in METHODS if method in curves}
        write_json(store, {"methods": METHODS, "curves": found})
        figure(found, DOCS / "time-to-quality.png")
        with atomic_open(DOCS / "time-to-quality.md") as file:
            file.write(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
