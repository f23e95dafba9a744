"""Time ours against what a user would pick instead, side by side, and fill the README's table from the same run.

    python benchmarks/peers.py --data-root DIR [--data ml1m gowalla] [--turns 3] [--only TEXT ...] [--env DIR] [--json FILE]
    python benchmarks/peers.py --table FILE README.md

Environments with the pinned peers are made in --env where there are none (0.7 GB). Ours and the peer take turns
(A B A B ...), each in a process of its own on one thread; CPU seconds are user + system of the work alone, after the same
work on a small part, and a figure is the median of the turns. A ratio is always of two figures of one run: the file holds
versions, every turn, and nothing from elsewhere; --only measures rows whose name has one of the texts and leaves the others
of the file. A floor, timed in our turns, is what nobody can leave out: the product of the tables for lists, one step of the
optimizer over all trained numbers for every batch, with the linear maps of a multimodal model that maps all items, the linear
maps of attention. A peer that cannot be installed or fails has a row with the reason as it was printed. --table writes the rows
of a file between the markers of a Markdown page. All rows take about 45 minutes of one quiet processor.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# What is installed in the environment of each peer. What needs torch takes ours, so that both sides have the same.
PINNED = {
    "implicit": ("implicit==0.7.3", "scipy==1.17.1", "numpy==2.4.6", "threadpoolctl==3.8.0"),
    "recbole": ("recbole==1.2.1", "scipy==1.11.4", "numpy==1.26.4", "pandas==2.2.3"),
    "warprec": ("warprec==2.2.8",),
}
ON_OUR_TORCH = ("recbole", "warprec")


class Row(NamedTuple):
    """A line of the table: who does the work on the other side, the largest ratio wanted, and the peer's environment, of
    PINNED, or "" for this one."""

    work: str
    against: str
    bar: float | None = None
    env: str = ""


BPR_PEER = "implicit BayesianPersonalizedRanking"
SPARSE = (
    Row("item-knn fit, K 100", "implicit CosineRecommender", 1.2, "implicit"),
    Row("item-knn fit, K 100, added memory in MiB", "implicit CosineRecommender", 1.2, "implicit"),
    Row("iALS epoch, D 64", "implicit AlternatingLeastSquares", 1.2, "implicit"),
    Row("top 20 of all users, D 64", "implicit recommend", 0.5, "implicit"),
    Row("MF bpr epoch, D 64, lazy AdamW", BPR_PEER, 3.0, "implicit"),
    Row("MF bpr epoch, D 64, AdamW", BPR_PEER, 8.0, "implicit"),
)
# Small tables fit into caches, so there the bars are lower.
BARS = {("top 20 of all users, D 64", "ml1m"): 0.4, ("MF bpr epoch, D 64, AdamW", "ml1m"): 2.0}
FRAMEWORKS = {
    "ml1m": (Row("BPR epoch, D 64, Adam", "RecBole BPR", None, "recbole"),
             Row("BPR epoch, D 64, Adam", "WarpRec BPR", None, "warprec")),
    "lastfm": (Row("LightGCN epoch, 2 layers, Adam", "RecBole LightGCN", None, "recbole"),),
}  # fmt: skip
WIDTHS = {"image": 4096, "text": 384}
# MMRec's step and validation, rebuilt in mmrec.py; features are noise of the published widths.
BABY = tuple(
    Row(work, "MMRec's step, rebuilt", bar)
    for work, bar in {"BPR epoch": 0.15, "VBPR epoch": 0.35, "VBPR epoch, our features in bfloat16": None,
                      "LightGCN epoch, 2 layers": 0.15, "BM3 epoch": 0.25, "FREEDOM epoch": 0.25,
                      "LATTICE epoch": 0.25, "MGCN epoch, its first 12 batches": 0.25,
                      "MMGCN epoch, its first 12 batches": 0.25, "DRAGON epoch, its first 12 batches": 0.25,
                      "BPR validation": 0.15}.items()
)  # fmt: skip
# Ours does what the program does: a graph once an epoch, tables that stay as drawn, lists that are filled up.
AS_PUBLISHED = ("LATTICE", "MMGCN", "DRAGON")
# Forward and backward of an attention layer as timm's small vision transformer has it; both sides run on our torch.
ATTENTION = (
    Row("gravity attention l2, batch 64", "timm Attention", 1.0),
    Row("gravity attention l2, batch 8", "timm Attention", 1.15),
    Row("gravity attention l1, batch 64", "timm Attention", 1.4),
)
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
EPOCHS = 3  # of those works that are counted by epochs


def matrix(path: str) -> Any:
    """The train part, float32 CSR."""
    import numpy as np
    import scipy.sparse as sp

    with np.load(path) as stored:
        parts = stored["data"], stored["indices"], stored["indptr"]
        return sp.csr_matrix(parts, shape=tuple(stored["shape"]))


def sparse_work(work: str, train: Any) -> tuple[Callable[[], object], float]:
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


def implicit_work(work: str, train: Any) -> tuple[Callable[[], object], float]:
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


def first_batches(work: str) -> int | None:
    """How many batches of an epoch a work is; None for all."""
    found = re.search(r"first (\d+) batches", work)
    return int(found[1]) if found else None


def program_work(
    program: str, *tokens: str, validation: bool = False, most: int | None = None
) -> tuple[Callable[[], object], float]:
    """An epoch, or a validation, of one of our programs, after two batches; what its flags say, sampling included.

    most: batches of the epoch, None for all."""
    import importlib

    import torch

    torch.set_num_threads(1)
    experiment = importlib.import_module(f"{program}.experiment")
    kind = experiment.MirrorGrad if program == "mirror_grad" else experiment.Recsys
    settings = importlib.import_module(f"{program}.main").PROGRAM.parse(tokens)
    this = kind(settings, kind.load(settings))
    model = this.build().train()
    training = this.training(model)

    def train(number: int, most: int | None = None) -> None:
        for batch in itertools.islice(training.batches(number), most):
            training.step(lambda: training.loss(batch), training.optimizer)

    train(1, 2)
    if validation:
        return lambda: this.evaluate(model.eval(), "valid"), 1
    return lambda: train(2, most), 1


def baby_data(data_root: str) -> Any:
    from gfml.data.options import load_dataset

    return load_dataset("amazon-baby", data_root=data_root)


def mmrec_work(work: str, data_root: str) -> tuple[Callable[[], object], float]:
    """The same by the rebuilt steps of ``mmrec.py``, on the same interactions and features."""
    import mmrec
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = baby_data(data_root)
    train = data.train.astype(float)
    features = {name: torch.randn(data.num_items, width) for name, width in WIDTHS.items()}
    model = mmrec.MODELS[work.split()[0]](train, features)
    batches, optimizer = mmrec.Batches(train), torch.optim.Adam(model.parameters(), lr=1e-3)
    mmrec.train_epoch(model, batches, optimizer, most=2)
    if "validation" in work:
        return lambda: mmrec.validate(model, data.train, data.valid), 1
    return lambda: mmrec.train_epoch(model, batches, optimizer, first_batches(work)), 1


def recbole_work(work: str, train: Any) -> tuple[Callable[[], object], float]:
    """An epoch of RecBole, sampling included, on files that it reads itself; two users with one pair are left to judge."""
    import logging

    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    torch.set_num_threads(1)
    sys.argv[1:] = []
    logging.disable()
    # A trainer writes its TensorBoard files into the folder it is made in.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        place = Path(folder) / "peers"
        place.mkdir()
        users, items = train.nonzero()
        for part, number in (("train", len(users)), ("valid", 2), ("test", 2)):
            rows = "".join(f"{user}\t{item}\n" for user, item in zip(users[:number], items[:number]))
            (place / f"peers.{part}.inter").write_text(f"user_id:token\titem_id:token\n{rows}")
        settings = {"data_path": folder, "checkpoint_dir": folder, "benchmark_filename": ["train", "valid", "test"],
                    "load_col": {"inter": ["user_id", "item_id"]}, "use_gpu": False, "show_progress": False,
                    "embedding_size": 64, "n_layers": 2, "train_batch_size": 2048, "learning_rate": 1e-3}  # fmt: skip
        config = Config(model=work.split()[0], dataset="peers", config_dict=settings)
        init_seed(0, True)
        data = create_dataset(config)
        batches, _, _ = data_preparation(config, data)
        model = get_model(config["model"])(config, batches.dataset).to("cpu")
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    return lambda: trainer._train_epoch(batches, 0, show_progress=False), 1


def prepare(side: str, work: str, path: str, data_root: str) -> tuple[Callable[[], object], float]:
    """The work of a row as a function, and how many units it does."""
    name, _, data = work.rpartition(", ")
    root = ("--data-root", data_root)
    if any(row.work == work for row in ATTENTION):
        call, units = attend(side, work)
        call()
        return call, units
    if data == "amazon-baby":
        if side == "peer":
            return mmrec_work(name, data_root)
        model, behaviour = name.split()[0], "published" if name.startswith(AS_PUBLISHED) else "fixed"
        held = "bfloat16" if "bfloat16" in name else "float32"
        flags = f"--model {model} --dataset baby --not_mg --features random --feature-dtype {held} --behaviour {behaviour}".split()
        return program_work("mirror_grad", *flags, *root, validation="validation" in name, most=first_batches(name))
    if any(row.work == name for rows in FRAMEWORKS.values() for row in rows):
        if side == "peer":
            recbole_work(name, matrix(path)[:200])[0]()
            return recbole_work(name, matrix(path))
        how = ("--model", "lgn", "--layer", "2") if "LightGCN" in name else ("--model", "mf")
        return program_work("recsys", *how, "--loss_mode", "bpr", "--sampler", "interaction", "--dataset", data, *root)
    whole, make = matrix(path), sparse_work if side == "ours" else implicit_work
    make(name, whole[: max(200, whole.shape[0] // 50)])[0]()  # imports, compilation, threads
    return make(name, whole)


def floor(work: str, path: str, data_root: str) -> Callable[[], object] | None:
    """The part of a unit of work that whoever does it must do, in torch's own operations; None where none is told."""
    import torch

    if "attention" in work:
        layers = torch.nn.Linear(384, 3 * 384), torch.nn.Linear(384, 384)
        tokens = torch.randn(int(work.split()[-1]), 65, 384, requires_grad=True)
        return lambda: [layer(tokens).sum().backward() for layer in layers]
    baby = work.endswith("amazon-baby")
    if not baby and "top 20" not in work and "D 64, AdamW" not in work:
        return None
    train = baby_data(data_root).train if baby else matrix(path)
    if "top 20" in work or "validation" in work:
        user, item = (torch.randn(n, 64) for n in train.shape)
        return lambda: [rows @ part.T for rows in user.split(256) for part in item.split(512)]  # tiles fit the cache
    (users, items), image, text = train.shape, *WIDTHS.values()
    sizes = [users * 64, (users if work.startswith("DRAGON") else items) * 64]
    if work.startswith("VBPR"):
        sizes += [users * 64, sum(WIDTHS.values()) * 64]
    if work.startswith(("BM3", "FREEDOM", "MGCN")):
        sizes += [items * width for width in WIDTHS.values()]
    # Linear maps of all items or nodes in every batch: rows, widths, and whether what is mapped is trained.
    maps: dict[str, list[tuple[int, int, int, bool]]] = {
        "MGCN": [(items, image, 64, True), (items, text, 64, True)],
        "MMGCN": [(items, image, 256, False), (users + items, 256, 256, True), (users + items, text, text, False)],
        "DRAGON": [(items, image, 256, False), (items, text, 256, False)],
    }
    layers = [(torch.nn.Linear(inner, outer), torch.randn(rows, inner, requires_grad=trained))
              for rows, inner, outer, trained in maps.get(work.split()[0], [])]  # fmt: skip
    tables = [] if work.startswith("MMGCN") else [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = (torch.optim.Adam if baby else torch.optim.AdamW)(
        [*tables, *(number for layer, _ in layers for number in layer.parameters())], fused=True
    )
    for table in tables:
        table.grad = torch.ones_like(table)

    def step() -> None:
        for layer, rows in layers:
            layer(rows).sum().backward()
        optimizer.step()

    return lambda: [step() for _ in range(first_batches(work) or -(-train.nnz // 2048))]


def timed(call: Callable[[], object], units: float = 1) -> float:
    """CPU seconds of a unit of work in this process."""
    begin = time.process_time()
    call()
    return (time.process_time() - begin) / units


def added_memory(call: Callable[[], object]) -> float:
    """MiB by which the resident memory of this process grew at most during a call (Linux)."""

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / 1024


def one_turn(side: str, work: str, path: str, data_root: str) -> dict[str, float]:
    """CPU seconds, or memory, of one unit of work in this process and, on our side, seconds of its floor."""
    call, units = prepare(side, work, path, data_root)
    if "memory" in work:
        return {"cost": added_memory(call)}
    found = {"cost": timed(call, units)}
    alone = floor(work, path, data_root) if side == "ours" else None
    if alone is not None:
        alone()
        found["floor_s"] = timed(alone)
    return found


def environment(name: str, folder: Path) -> str:
    """The Python of a peer's environment, made where there is none; this one for ""."""
    if not name:
        return sys.executable
    home = folder / name
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        if name in ON_OUR_TORCH:
            code = "import sysconfig; print(sysconfig.get_path('purelib'))"
            own = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
            Path(own, "torch.pth").write_text(sysconfig.get_path("purelib"))
        command = [str(python), "-m", "pip", "install", "-q", *PINNED[name]]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (home / "complete").touch()
    return str(python)


def versions(python: str) -> dict[str, str]:
    """Versions of what each side runs on."""
    code = ("import importlib.metadata as m, json, sys; print(json.dumps({n: next((d.version for d in m.distributions(name=n)),"
            " None) for n in ('implicit', 'recbole', 'numpy', 'scipy', 'torch', 'numba', 'timm')}))")  # fmt: skip
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: number for name, number in found.items() if number}


def plan(names: list[str]) -> list[tuple[Row, str]]:
    """Rows with the data set that each needs a file of, "" for none; their works are named after it."""
    rows = [(row._replace(bar=BARS.get((row.work, name), row.bar)), name) for name in names for row in SPARSE]
    rows += [(row, name) for name, some in FRAMEWORKS.items() for row in some]
    named = [(row._replace(work=f"{row.work}, {name}"), name) for row, name in rows]
    named += [(row._replace(work=f"{row.work}, amazon-baby"), "") for row in BABY]
    return named + [(row, "") for row in ATTENTION]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, or those that --only names, in turns; after each of them the file is written anew."""
    import numpy as np

    from gfml.data.options import load_dataset

    chosen = [(row, data) for row, data in plan(arguments.data)
              if not arguments.only or any(text in f"{row.work} {row.against}" for text in arguments.only)]  # fmt: skip
    found = {"versions": {"ours": versions(sys.executable)}, "machine": platform.machine(), "cpus": os.cpu_count(),
             "rows": {}}  # fmt: skip
    if arguments.only and arguments.json and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
        found["rows"] = {(row["work"], row["against"]): row for row in found["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        for row, data in chosen:
            path = Path(folder) / f"{data}.npz"
            if data and not path.exists():
                train = load_dataset(data, data_root=arguments.data_root).train
                np.savez(path, data=train.data, indices=train.indices, indptr=train.indptr, shape=train.shape)
            facts = {"work": row.work, "against": row.against, "bar": row.bar, "load": os.getloadavg()[0]}
            try:
                python = {"ours": sys.executable, "peer": environment(row.env, arguments.env)}
                facts |= in_turns(python, row.work, str(path), arguments)
                if row.env:
                    found["versions"][row.env] = versions(python["peer"])
            except subprocess.CalledProcessError as error:
                facts["failed"] = reason(error.stderr)
            found["rows"][row.work, row.against] = facts
            print(line(facts), flush=True)
            if arguments.json:
                stored = found | {"rows": list(found["rows"].values())}
                from gfml.base.files import write_json

                write_json(arguments.json, stored)
    return found


def reason(text: str) -> str:
    """What a failed program printed: the end of its lines of errors, or of all."""
    if found := re.search(r"Requires-Python [^\s;]+", text):
        return f"not installed: {found[0]}"
    lines = text.strip().splitlines() or ["no message"]
    said = " ".join([line for line in lines if line.startswith("ERROR:")] or lines[-1:])
    return said if len(said) < 200 else f"... {said[-190:]}"


def in_turns(python: dict[str, str], work: str, path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides, all turns, and the ratio."""
    turns: dict[str, list[float]] = {"ours": [], "peer": [], "floor": []}
    for side in ("ours", "peer") * arguments.turns:
        command = [python[side], __file__, "--data-root", str(arguments.data_root), "--turn", side, work, path]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        found = json.loads(done.stdout.splitlines()[-1])
        turns[side].append(found["cost"])
        turns["floor"] += [found["floor_s"]] if "floor_s" in found else []
    medians = {side: statistics.median(seconds) for side, seconds in turns.items() if seconds}
    return {**medians, "turns": turns, "ratio": medians["ours"] / medians["peer"]}


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    if "failed" in row:
        return f"| {row['work']} | {row['against']} | | | | {row['failed'].replace('|', '/')} | |"
    alone = f"{row['floor']:.3f}" if "floor" in row else ""
    figures = f"{row['ours']:.3f} | {row['peer']:.3f} | {alone} | {row['ratio']:.2f}"
    return f"| {row['work']} | {row['against']} | {figures} | {format(row['bar'], 'g') if row['bar'] else ''} |"


def fill(found: dict[str, Any], page: Path) -> None:
    """Replace what stands between the markers of a page by the table of one run."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no line {BEGIN} and {END} to write between")
    told = "; ".join(
        f"{side}: {', '.join(f'{name} {number}' for name, number in those.items())}"
        for side, those in found["versions"].items()
    )
    lines = [
        "| work | against | ours, CPU s | theirs, CPU s | floor, CPU s | ratio | bar |",
        "|---" * 7 + "|",
        *map(line, found["rows"]),
    ]
    loads = [row["load"] for row in found["rows"] if "load" in row]
    busy = f", load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    about = f"One thread, {found['cpus']} processors ({found['machine']}){busy}. {told}."
    table = "\n".join([*lines, "", about])
    page.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", nargs="+", default=["ml1m", "gowalla"], help="data sets")
    parser.add_argument("--data-root", help="where the data sets lie")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows whose work or peer has one of these in its name"
    )
    parser.add_argument("--turns", type=int, default=3, help="turns of each side")
    parser.add_argument(
        "--env", type=Path, default=Path(tempfile.gettempdir()) / "gfml-peers", help="folder of the peers' environments"
    )
    parser.add_argument("--json", type=Path, help="also write rows, turns and versions here")
    parser.add_argument(
        "--table", type=Path, nargs=2, metavar=("FILE", "PAGE"), help="write the table of FILE into PAGE"
    )
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.turn:
        print(json.dumps(one_turn(*arguments.turn, arguments.data_root)))
    elif arguments.table:
        fill(json.loads(arguments.table[0].read_text()), arguments.table[1])
    else:
        compare(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
