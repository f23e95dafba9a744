"""Time ours against what a user would pick instead, side by side, and fill the README's table from the same run.

    python benchmarks/peers.py --data-root DIR [--data ml1m gowalla] [--turns 3] [--env DIR] [--json FILE]
    python benchmarks/peers.py --table FILE README.md

An environment with the pinned peers is made in --env where there is none. Ours and the peer take turns (A B A B ...), each
in a process of its own on one thread; CPU seconds are user + system of the work alone, after the same work on a small
part, and a figure is the median of the turns. A ratio is always of two figures of one run: the file holds versions,
every turn, and nothing from elsewhere. --table writes the rows of a file between the markers of a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PINNED = ("implicit==0.7.3", "scipy==1.17.1", "numpy==2.4.6", "threadpoolctl==3.8.0")
# Work, the largest ratio wanted of most data sets, and who does it on the other side.
WORKS = {
    "item-knn fit, K 100": (1.2, "implicit CosineRecommender"),
    "iALS epoch, D 64": (1.2, "implicit AlternatingLeastSquares"),
    "top 20 of all users, D 64": (0.5, "implicit recommend"),
    "MF bpr epoch, D 64, lazy AdamW": (3.0, "implicit BayesianPersonalizedRanking"),
    "MF bpr epoch, D 64, AdamW": (8.0, "implicit BayesianPersonalizedRanking"),
}
# Small tables fit into caches, so there the bars are lower.
BARS = {("top 20 of all users, D 64", "ml1m"): 0.4, ("MF bpr epoch, D 64, AdamW", "ml1m"): 2.0}
# Forward and backward of an attention layer as timm's small vision transformer has it; both sides run on our torch.
ATTENTION = {
    "gravity attention l2, batch 64": (1.0, "timm Attention"),
    "gravity attention l2, batch 8": (1.15, "timm Attention"),
    "gravity attention l1, batch 64": (1.4, "timm Attention"),
}
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
EPOCHS = 3  # of those works that are counted by epochs


def matrix(path: str) -> Any:
    """The train part, float32 CSR."""
    import numpy as np
    import scipy.sparse as sp

    with np.load(path) as stored:
        parts = stored["data"], stored["indices"], stored["indptr"]
        return sp.csr_matrix(parts, shape=tuple(stored["shape"]))


def ours(work: str, train: Any) -> tuple[Callable[[], object], float]:
    """The work as a function, and how many units it does."""
    import numpy as np
    import scipy.sparse as sp
    import torch

    from gfml.data.interactions import Interactions, csr_from_parts
    from gfml.ranking.baselines import item_knn
    from gfml.ranking.ials import IALS
    from gfml.ranking.topk import FactorScorer, topk_items

    torch.set_num_threads(1)
    torch.manual_seed(0)
    part = csr_from_parts(train.indices, train.indptr, train.shape)
    empty = sp.csr_array(train.shape, dtype=np.float32)
    data = Interactions("peers", part, empty, empty)
    if work.startswith("item-knn"):
        return lambda: item_knn(data, k=100), 1
    if work.startswith("iALS"):
        model = IALS(part, 64, l2=0.01, alpha0=0.05)
        return lambda: [model.epoch() for _ in range(EPOCHS)], EPOCHS
    if work.startswith("top 20"):
        scorer = FactorScorer(torch.randn(data.num_users, 64), torch.randn(data.num_items, 64))
        return lambda: topk_items(scorer, torch.arange(data.num_users), 20, seen=part), 1
    return lambda: train_bpr(data, "lazy" in work), EPOCHS


def train_bpr(data: Any, lazy: bool) -> None:
    """Epochs of matrix factorisation by the program's own parts, sampling included."""
    import torch

    from gfml.engine.optimizers import build_optimizer
    from gfml.engine.train import plain_step
    from gfml.fused import FusedPairLoss
    from gfml.gravity import Gravity
    from gfml.ranking.encoders import Tables
    from gfml.ranking.sampling import TripleSampler

    torch.manual_seed(0)
    tables = Tables(data.num_users, data.num_items, 64)
    loss = FusedPairLoss(tables, Gravity(data.num_users, data.num_items, mass="none"), "bpr", decay=1e-4)
    groups = [{"params": list(tables.parameters()), "weight_decay": 1e-2}]
    optimizer = build_optimizer("lazy_adamw" if lazy else "adamw", groups, 1e-3)
    sampler = TripleSampler(data.train, batch_size=2048, seed=0)
    for number in range(EPOCHS):
        for batch in sampler.epoch(number):
            plain_step(lambda: loss(batch), optimizer)


def attend(side: str, work: str) -> tuple[Callable[[], object], float]:
    """One layer of 65 tokens, width 384 and 12 heads, seven times forward and backward."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side == "ours":
        from gfml.attention import AttentionSettings, GravityAttention

        layer: torch.nn.Module = GravityAttention(
            384, 12, 65, AttentionSettings(3.0, distance=work.split()[2].strip(","))
        )
    else:
        from timm.layers.attention import Attention

        layer = Attention(384, 12, qkv_bias=True)
    tokens, upstream = torch.randn(2, int(work.split()[-1]), 65, 384)
    tokens.requires_grad_()

    def steps() -> None:
        for _ in range(7):
            layer.zero_grad()
            layer(tokens).backward(upstream)

    return steps, 7


def peer(work: str, train: Any) -> tuple[Callable[[], object], float]:
    """The same by implicit, with its defaults but for sizes."""
    import numpy as np
    import threadpoolctl
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking
    from implicit.nearest_neighbours import CosineRecommender

    threadpoolctl.threadpool_limits(1)
    quiet: dict[str, Any] = {"show_progress": False}
    if work.startswith("item-knn"):
        return lambda: CosineRecommender(K=100, num_threads=1).fit(train.astype(np.float64), **quiet), 1
    if work.startswith("iALS"):
        model = AlternatingLeastSquares(64, iterations=EPOCHS, num_threads=1, random_state=0)
        return lambda: model.fit(train, **quiet), EPOCHS
    if work.startswith("top 20"):
        model = AlternatingLeastSquares(64, num_threads=1)
        rng = np.random.default_rng(0)
        model.user_factors, model.item_factors = (rng.standard_normal((n, 64), np.float32) for n in train.shape)
        users = np.arange(train.shape[0])
        return lambda: model.recommend(users, train, N=20, filter_already_liked_items=True), 1
    model = BayesianPersonalizedRanking(64, iterations=EPOCHS, num_threads=1, random_state=0)
    return lambda: model.fit(train, **quiet), EPOCHS


def one_turn(side: str, work: str, path: str) -> dict[str, float]:
    """CPU seconds of one unit of work in this process."""
    if work in ATTENTION:
        call, units = attend(side, work)
        call()
    else:
        whole, make = matrix(path), ours if side == "ours" else peer
        make(work, whole[: max(200, whole.shape[0] // 50)])[0]()  # imports, compilation, threads
        call, units = make(work, whole)
    begin = time.process_time()
    call()
    return {"cpu_s": (time.process_time() - begin) / units}


def environment(folder: Path) -> Path:
    """The Python of the peers' environment, made where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PINNED], check=True)
    return python


def versions(python: str) -> dict[str, str]:
    """Versions of what each side runs on."""
    code = ("import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in "
            "('implicit', 'numpy', 'scipy', 'torch', 'numba', 'timm') if any(d.name == n for d in m.distributions())}))")  # fmt: skip
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All works on all data, in turns."""
    import numpy as np

    from gfml.data.options import load_dataset

    python = {"ours": sys.executable, "peer": str(environment(arguments.env))}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.data:
            train, path = load_dataset(name, data_root=arguments.data_root).train, f"{folder}/{name}.npz"
            np.savez(path, data=train.data, indices=train.indices, indptr=train.indptr, shape=train.shape)
            for work, (bar, against) in WORKS.items():
                facts = {"work": f"{work}, {name}", "against": against, "bar": BARS.get((work, name), bar)}
                rows.append(facts | in_turns(python, work, path, arguments.turns))
                print(line(rows[-1]), flush=True)
    for work, (bar, against) in ATTENTION.items():
        found = in_turns(dict.fromkeys(python, sys.executable), work, "", arguments.turns)
        rows.append({"work": work, "against": against, "bar": bar} | found)
        print(line(rows[-1]), flush=True)
    return {"versions": {side: versions(path) for side, path in python.items()}, "machine": platform.machine(),
            "cpus": os.cpu_count(), "rows": rows}  # fmt: skip


def in_turns(python: dict[str, str], work: str, path: str, number: int) -> dict[str, Any]:
    """Medians of both sides, all turns, and the ratio."""
    turns: dict[str, list[float]] = {"ours": [], "peer": []}
    for side in ("ours", "peer") * number:
        command = [python[side], __file__, "--turn", side, work, path]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        turns[side].append(json.loads(done.stdout.splitlines()[-1])["cpu_s"])
    medians = {side: statistics.median(seconds) for side, seconds in turns.items()}
    return {**medians, "turns": turns, "ratio": medians["ours"] / medians["peer"]}


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    figures = f"{row['ours']:.3f} | {row['peer']:.3f} | {row['ratio']:.2f} | {row['bar']:g}"
    return f"| {row['work']} | {row['against']} | {figures} |"


def fill(found: dict[str, Any], page: Path) -> None:
    """Replace what stands between the markers of a page by the table of one run."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no line {BEGIN} and {END} to write between")
    told = ", ".join(f"{name} {number}" for side in found["versions"].values() for name, number in side.items())
    lines = [
        "| work | against | ours, CPU s | theirs, CPU s | ratio | bar |",
        "|---" * 6 + "|",
        *map(line, found["rows"]),
    ]
    table = "\n".join([*lines, "", f"One thread, {found['cpus']} processors ({found['machine']}); {told}."])
    page.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", nargs="+", default=["ml1m", "gowalla"], help="data sets")
    parser.add_argument("--data-root", help="where the data sets lie")
    parser.add_argument("--turns", type=int, default=3, help="turns of each side")
    parser.add_argument(
        "--env", type=Path, default=Path(tempfile.gettempdir()) / "gfml-peers", help="environment of the peers"
    )
    parser.add_argument("--json", type=Path, help="also write rows, turns and versions here")
    parser.add_argument(
        "--table", type=Path, nargs=2, metavar=("FILE", "PAGE"), help="write the table of FILE into PAGE"
    )
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.turn:
        print(json.dumps(one_turn(*arguments.turn)))
    elif arguments.table:
        fill(json.loads(arguments.table[0].read_text()), arguments.table[1])
    else:
        found = compare(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
