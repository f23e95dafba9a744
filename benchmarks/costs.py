"""Rows of ``scripts/bench.py``: what training and evaluation cost, beside something timed in the same process."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import bench
from gfml.attention import PLAIN, AttentionSettings, GravityAttention
from gfml.cml import MetricLearner
from gfml.data.options import load_dataset
from gfml.distances import SquaredDistance
from gfml.engine.train import plain_step
from gfml.gravity import Gravity, GravityScorer
from gfml.losses import warp_hinge
from gfml.metrics.ranking import ranking_metrics
from gfml.program.steps import ProjectedStep
from gfml.ranking.encoders import LightGCN
from gfml.ranking.evaluation import evaluate
from gfml.ranking.graph import Graph, build_graph
from gfml.ranking.sampling import TripleSampler, TwoStageSampler
from gfml.ranking.topk import FactorScorer, topk_items

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """One comparison. ``bar``: largest ratio or CPU seconds wanted, as text; empty where there is none."""

    work: str
    ours_cpu: float
    ours_wall: float
    against: str
    other_cpu: float
    bar: str

    @property
    def ratio(self) -> float:
        return self.ours_cpu / self.other_cpu if self.other_cpu else float("nan")


def measure(call: Callable[[], object], *, runs: int = 5, warm_up: int = 1) -> tuple[float, float]:
    """Smallest CPU and wall seconds of ``runs`` calls."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(runs):
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(cpu for cpu, _ in times), min(wall for _, wall in times)


def measure_in_turn(calls: dict[str, Callable[[], object]], *, runs: int = 5) -> dict[str, tuple[float, float]]:
    """CPU and wall seconds of several calls that take turns, so that a busy machine slows all alike: the smallest of
    ``runs`` after a warm-up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            found = measure(call, runs=1, warm_up=0)
            times[name] += [found] if turn else []
    return {name: tuple(min(column) for column in zip(*rows, strict=True)) for name, rows in times.items()}


def reference(name: str, folder: str = "gfml/ranking") -> ModuleType:
    """A plain implementation kept with the tests."""
    path = ROOT / "tests" / folder / f"reference_{name}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench_sampling(data: Any) -> Iterable[Row]:
    """One epoch of triples against a plain loop, which is timed on a tenth of them."""
    sampler = TripleSampler(data.train, batch_size=2048, seed=0)
    cpu, wall = measure(lambda: [None for _ in sampler.epoch(1)])
    plain = reference("sampler")
    part = data.train[: data.num_users // 10]
    positives = plain.rows_as_lists(part)
    other, _ = measure(lambda: plain.reference_epoch(positives, data.num_items, random.Random(0)), runs=1, warm_up=0)
    yield Row(
        f"sampling, {data.train.nnz:,} triples", cpu, wall, "Python loop", other * data.train.nnz / part.nnz, "<= 0.5 s"
    )


def floors(graph: Graph) -> tuple[Tensor, float, float]:
    """Vectors of 64 for the nodes of a graph, and CPU seconds of one library product with them and of a fused Adam step."""
    matrix = torch.sparse_csr_tensor(
        graph.indptr, graph.indices, graph.values, size=(graph.num_nodes,) * 2, check_invariants=False
    )
    dense = torch.randn(graph.num_nodes, 64)
    table = torch.nn.Parameter(dense.clone())
    table.grad = torch.randn_like(dense)
    step = torch.optim.Adam([table], fused=True).step
    return dense, measure(lambda: matrix @ dense, runs=8)[0], measure(step, runs=8)[0]


def bench_lightgcn_step(data: Any) -> Iterable[Row]:
    """One LightGCN training step (K = 3, D = 64, batch 2048) against six products and a fused Adam: the library's products,
    and ours, of which the last forward one is taken at the rows of the batch alone."""

    from recsys.model import Recommender

    torch.manual_seed(0)
    cpu, wall = measure(lambda: build_graph(data.train), runs=2)
    yield Row("adjacency", cpu, wall, "", 0.0, "")
    graph = build_graph(data.train)
    model = Recommender(LightGCN(graph, 64, 3), Gravity(data.num_users, data.num_items, mass="none"), "bpr")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = list(TripleSampler(data.train, batch_size=2048, seed=0).epoch(1))[:8]
    turn = iter(range(10**9))

    def step() -> None:
        batch = batches[next(turn) % len(batches)]
        plain_step(lambda: model.loss(batch), optimizer)

    dense, product, adam = floors(graph)
    ids = torch.cat([batches[0].users, data.num_users + batches[0].pos, data.num_users + batches[0].neg]).unique()
    times = measure_in_turn({
        "step": step, "product": lambda: graph.multiply(dense), "rows": lambda: graph.multiply_rows(ids, dense)
    }, runs=12)  # fmt: skip
    (cpu, wall), (bag, bag_wall), (rows, _) = times.values()
    yield Row("LightGCN step", cpu, wall, "6 CSR products + Adam", 6 * product + adam, "<= 0.75 s, <= 1.25 x")
    yield Row("LightGCN step", cpu, wall, "its own products + Adam", 5 * bag + rows + adam, "<= 1.15 x")
    yield Row("one product", bag, bag_wall, "library CSR product", product, "")

    plain = reference("lightgcn")
    adjacency = plain.coo_adjacency(data.train)
    nodes = torch.nn.Parameter(dense * 0.1)
    slow = torch.optim.Adam([nodes], lr=1e-3)
    triple = (batches[0].users, batches[0].pos, batches[0].neg)
    other, _ = measure(lambda: plain.training_step(adjacency, nodes, slow, triple, data.num_users, 3, 1e-4), runs=2)
    yield Row("LightGCN step", cpu, wall, "plain COO step", other, "")


def bench_evaluation(data: Any) -> Iterable[Row]:
    """All metrics of a full-catalogue top 20 against the score products and torch.topk alone, and a plain loop."""

    torch.manual_seed(0)
    user, item = torch.randn(data.num_users, 64), torch.randn(data.num_items, 64)
    scorer, judged = FactorScorer(user, item), torch.from_numpy(np.flatnonzero(np.diff(data.test.indptr)))
    lists, relevant = topk_items(scorer, judged, 20, seen=data.seen("test")).numpy(), data.test[judged.numpy()]
    times = measure_in_turn({
        "all": lambda: evaluate(scorer, data, "test", [20]),
        "ranking": lambda: topk_items(scorer, judged, 20, seen=data.seen("test")),
        "metrics": lambda: ranking_metrics(lists, relevant, [20]),
    }, runs=3)  # fmt: skip
    (cpu, wall), (ranking, _), metrics = times.values()
    yield Row("metrics of the top 20", *metrics, "the ranking", ranking, "<= 0.25 x")

    def floor() -> None:
        for start in range(0, data.num_users, 1024):
            torch.topk(user[start : start + 1024] @ item.T, 20)

    other, _ = measure(floor, runs=2, warm_up=0)
    yield Row("full evaluation, top 20", cpu, wall, "GEMM + topk", other, "<= 15 s, <= 1.3 x")
    plain = reference("eval")
    few = range(20)
    seen, wanted = (plain.rows_as_sets(part, few) for part in (data.seen("test"), data.test))
    scores = (user[:20] @ item.T).numpy()

    def loop() -> None:
        for u in few:
            plain.reference_metrics(plain.reference_topk(scores[u], seen[u], 20), wanted[u] or {0}, 20)

    slow, _ = measure(loop, runs=1, warm_up=0)
    yield Row("full evaluation, top 20", cpu, wall, "Python loop", slow * data.num_users / len(few), "")


def bench_gravity_scoring(data: Any) -> Iterable[Row]:
    """Ranking by gravity against ranking by the dot product; l1 against torch.cdist over the same blocks."""

    torch.manual_seed(0)
    user, item = torch.randn(data.num_users, 64), torch.randn(data.num_items, 64)
    users = torch.arange(min(4000, data.num_users))
    seen = data.seen("test")

    def top(scorer: Any, users: Any = users, seen: Any = seen) -> None:
        topk_items(scorer, users, 20, seen=seen)

    dot, _ = measure(lambda: top(FactorScorer(user, item)), runs=3)
    for kind in ("l2", "emd", "kl"):
        gravity = Gravity(data.num_users, data.num_items, distance=kind, mass="item", emb_norm=kind != "kl")
        scorer = GravityScorer(gravity, user, item)
        cpu, wall = measure(lambda: top(scorer), runs=3)
        yield Row(f"gravity {kind} top 20 of {len(users):,} users", cpu, wall, "dot top 20", dot, "<= 1.5 x")
    few = users[:200]
    distance = SquaredDistance("l1")
    cpu, wall = measure(lambda: distance.all_pairs(user[few], item), runs=2)
    other, _ = measure(lambda: torch.cdist(user[few], item, p=1), runs=2)
    yield Row(f"gravity l1 scores of {len(few)} users", cpu, wall, "torch.cdist p=1", other, "<= 1.2 x")


def bench_mcl(data: Any) -> Iterable[Row]:
    """Epoch of MCL (K = 3, D = 64, 1 000 users a batch, W = 10) and its evaluation.

    Floor of a step: six library products, the pair distances as one dense product of the batch's users with all items
    and its two backward products, and a fused Adam.
    """

    from mcl.model import MetricRecommender, MixedCentricOptions
    from mcl.sampler import UserBatchSampler

    torch.manual_seed(0)
    graph = build_graph(data.train)
    model = MetricRecommender(
        LightGCN(graph, 64, 3, combine="sum", init="xavier_uniform"), None, "mcl", mixed=MixedCentricOptions(1000)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    sampler = UserBatchSampler(data.train, batch_size=1000, num_negatives=10, seed=0, drop_last=True)
    turn = iter(range(1, 10**9))

    def epoch() -> None:
        for batch in sampler.epoch(next(turn)):
            plain_step(lambda: model.loss(batch), optimizer)

    cpu, wall = measure(epoch, runs=8, warm_up=2)
    dense, product, adam = floors(graph)
    query, items = dense[:1000].clone().requires_grad_(), dense[data.num_users :].clone().requires_grad_()
    grad = torch.randn(1000, data.num_items)
    pairs, _ = measure(lambda: torch.autograd.grad(query @ items.T, (query, items), grad), runs=8)
    steps, name = sampler.num_batches, f"MCL epoch, {data.name}, {sampler.num_batches} steps"
    yield Row(name, cpu, wall, "6 products + pair GEMM + Adam", steps * (6 * product + pairs + adam), "<= 2 x")
    yield Row(name, cpu, wall, "6 products + Adam", steps * (6 * product + adam), "")
    draw, draw_wall = measure(lambda: list(sampler.epoch(next(turn))), runs=5)
    yield Row(f"of which sampling, {data.name}", draw, draw_wall, "", 0.0, "")

    batch, first = next(iter(sampler.epoch(1))), data.num_users
    plain = reference("mcl", "mcl")

    def gathered() -> None:
        ids = (batch.users, batch.counts, batch.pos + first, batch.neg + first)
        plain.plain_loss(model.encoder.outputs(), *ids, batch_size=1000).backward()

    ours, ours_wall = measure(lambda: plain_step(lambda: model.loss(batch), optimizer), runs=8)
    other, _ = measure(gathered, runs=2)
    yield Row(f"MCL step, {data.name}", ours, ours_wall, "gathered pairs, loop over users", other, "")

    model.eval()
    yield _mcl_evaluation(model, data, dense)


def _mcl_evaluation(model: Any, data: Any, dense: Any) -> Row:
    """The judging of all users against products of the same size and their largest entries."""

    cpu, wall = measure(lambda: evaluate(model.scorer(), data, "test", [5, 10, 20]), runs=5)
    user = dense[torch.from_numpy(np.flatnonzero(np.diff(data.test.indptr)))]

    def floor() -> None:
        for block in user.split(1024):
            torch.topk(block @ dense[data.num_users :].T, 20)

    other, _ = measure(floor, runs=5)
    return Row(f"MCL evaluation, {data.name}", cpu, wall, "GEMM + topk", other, "<= 2 x")


def bench_cml(data: Any) -> Iterable[Row]:
    """Epoch of CML (D = 50, 10 negatives, batch 10 000, AdaGrad), and its step against one that keeps every negative.

    The other step gathers user, positive and all negatives into one graph: the same loss and gradient.
    """

    torch.manual_seed(0)
    model = MetricLearner(data.num_users, data.num_items, 50)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, foreach=True)
    options = {"batch_size": 10_000, "seed": 0, "scheme": "interaction", "num_negatives": 10}
    sampler, step, turn = TripleSampler(data.train, **options), ProjectedStep(plain_step, model), iter(range(1, 10**9))

    def epoch() -> None:
        for batch in sampler.epoch(next(turn)):
            step(lambda: model.loss(batch), optimizer)

    cpu, wall = measure(epoch, runs=3)
    yield Row(f"CML epoch, {data.train.nnz:,} pairs", cpu, wall, "", 0.0, "<= 12 s")
    draw, draw_wall = measure(lambda: list(sampler.epoch(next(turn))), runs=3)
    yield Row("of which sampling", draw, draw_wall, "", 0.0, "")
    near = TwoStageSampler(data.train, item_vectors=lambda: model.encoder.vectors()[1], **options)
    draw, draw_wall = measure(lambda: list(near.epoch(next(turn))), runs=1)
    yield Row("two-stage sampling", draw, draw_wall, "", 0.0, "")
    batch = next(iter(sampler.epoch(1)))

    def whole_graph() -> dict[str, Any]:
        found = model.encoder(batch.users, torch.cat([batch.pos[:, None], batch.neg], 1))
        sq_distance = (found.items - found.user[:, None]).square().sum(-1)
        return {"loss": warp_hinge(sq_distance[:, 0], sq_distance[:, 1:], margin=0.5, num_items=data.num_items).loss}

    ours, ours_wall = measure(lambda: step(lambda: model.loss(batch), optimizer), runs=8)
    other, _ = measure(lambda: step(whole_graph, optimizer), runs=8)
    yield Row("CML step", ours, ours_wall, "all negatives in the graph", other, "")
    cpu, wall = measure(lambda: evaluate(model.scorer(), data, "test", [50, 100]), runs=3)
    yield Row("CML evaluation", cpu, wall, "", 0.0, "")


def bench_multimodal(name: str, model: str, data_root: str | None, steps: int = 5) -> tuple[Row, float]:
    """An epoch of a multimodal model: batches times the fastest of some steps after a first, plus drawing the batches.

    Features are noise of the published widths (4096 and 384) where the model reads any; plain training, batch 2048.
    With it the peak of this process's resident memory in MiB, an evaluation of the validation part included.
    """
    from mirror_grad.experiment import MirrorGrad
    from mirror_grad.main import PROGRAM

    root = [f"--data-root={data_root}"] if data_root else []
    words = f"--model {model} --dataset {name} --not_mg --features random --random-widths 4096 384"
    settings = PROGRAM.parse([*words.split(), *root])
    this = MirrorGrad(settings, MirrorGrad.load(settings))
    built = this.build().train()
    training = this.training(built)
    optimizer, step = training.optimizer, training.step
    start = time.process_time(), time.perf_counter()
    epoch = training.batches(1)
    batches = list(itertools.islice(epoch, steps + 1))
    drawing = time.process_time() - start[0], time.perf_counter() - start[1]
    given = itertools.cycle(batches)
    cpu, wall = measure(lambda: step(functools.partial(built.loss, next(given)), optimizer), runs=steps)
    this.evaluation(built.eval(), "valid")
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    row = Row(f"{model} epoch on {this.interactions.name}, {len(epoch)} steps", cpu * len(epoch) + drawing[0],
              wall * len(epoch) + drawing[1], "", 0.0, "")  # fmt: skip
    return row, peak


def bench_attention(batch: int) -> Iterable[Row]:
    """Forward and backward of one attention layer at the published sizes: 65 tokens, 12 heads, width 384, lambda 3.

    Against the same layer with dot heads alone, which is torch's fused attention.
    """

    torch.manual_seed(0)
    plain, lamb = reference("attention", "gfml"), 3.0
    settings = {
        "gravity": AttentionSettings(lamb),
        "gravity without mass": AttentionSettings(lamb, mass="none"),
        "gravity, content mass": AttentionSettings(lamb, mass="content"),
        "gravity, masses per head": AttentionSettings(lamb, per_head=True),
        "gravity, learned lambda": AttentionSettings(lamb, learn_lamb=True),
        "normal mix": AttentionSettings(lamb, mix="normal"),
        "split 6": AttentionSettings(lamb, mix="split"),
        "split 6, blended": AttentionSettings(lamb, mix="split", split_mix=True),
        "gravity l1": AttentionSettings(lamb, distance="l1"),
        "gravity, explicit kernel": AttentionSettings(lamb, kernel="explicit"),
    }
    sizes = (384, 12, 65)
    layers = {"torch's fused attention": GravityAttention(*sizes, PLAIN)}
    layers |= {name: GravityAttention(*sizes, each) for name, each in settings.items()}
    for kind, p in (("l2", 2.0), ("l1", 1.0)):
        layers[f"cdist and autograd, {kind}"] = plain.PlainGravityAttention(*sizes, lamb, p)
    x, grad = (torch.randn(batch, 65, 384) for _ in range(2))
    x.requires_grad_()

    def step(layer: torch.nn.Module) -> None:
        layer.zero_grad()
        layer(x).backward(grad)

    times = measure_in_turn({name: functools.partial(step, layer) for name, layer in layers.items()})
    base, *others = times
    for name in others:
        bar = "" if name.startswith("cdist") or "explicit" in name else "<= 1.5 x"
        yield Row(f"attention layer, {name}", *times[name], base, times[base][0], bar)
    for kind in ("l2", "l1"):
        ours, other = times["gravity" if kind == "l2" else "gravity l1"], f"cdist and autograd, {kind}"
        yield Row(f"attention layer, gravity {kind}", *ours, other, times[other][0], "")


def bench_vision_model(batch: int) -> Iterable[Row]:
    """Training step of the published model (7 layers, width 384) with gravity in its layers against plain ``vit``."""

    from vision.models import build_model
    from vision.vit import ViTSettings

    split = {"mix": "split", "split_mix": True}
    cases = {f"vit_gra {place}": (place, {}) for place in ("full", "full_fix", "head", "tail")}
    cases |= {"vit_gra full, normal mix": ("full", {"mix": "normal"})}
    cases |= {f"vit_gra {place}, split 6 blended": (place, split) for place in ("full", "tail")}
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def steps(name: str, place: str = "full", options: dict[str, Any] | None = None) -> Callable[[], None]:
        torch.manual_seed(0)
        settings = AttentionSettings(3.0, **(options or {}))
        model = build_model(name, num_classes=10, vit=ViTSettings(mass_pos=place), attention=settings)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return step

    calls = {"vit": steps("vit")} | {name: steps("vit_gra", *case) for name, case in cases.items()}
    times = measure_in_turn(calls, runs=3)
    for name in cases:
        yield Row(f"training step of {batch}, {name}", *times[name], "vit", times["vit"][0], "<= 1.5 x")


def bench_contextual(batch: int, repeats: int) -> Iterable[Row]:
    """Value and gradient by the similarities: closed form against autograd, in turn. Peak memory is printed.

    Batches of four pictures per class, 512-d: classes apart (neighbourhoods of 4), no classes (of 10 to 14), and one
    point (everything is a neighbour, so the closed form multiplies dense matrices too).
    """

    from contextual.losses import Weights, cosine_similarities, hybrid

    torch.manual_seed(0)
    labels = torch.arange(batch) // 4
    centres, noise = torch.randn(batch // 4, 512)[labels], torch.randn(batch, 512)
    kinds = {"classes apart": centres + 0.7 * noise, "no classes": noise, "one point": centres[:1] + 0.01 * noise}
    for losses, weights in {"contextual": Weights(1, 0, 0), "hybrid": Weights(0.4, 0.5, 0.1)}.items():
        for kind, rows in kinds.items():
            sim = cosine_similarities(rows).requires_grad_()

            def once(backend: str, sim: torch.Tensor = sim, weights: Weights = weights) -> None:
                torch.autograd.grad(hybrid(sim, labels, weights, backend=backend).loss, sim)

            def many(backend: str, once: Callable[[str], None] = once) -> None:
                for _ in range(repeats):
                    once(backend)

            times = measure_in_turn({name: functools.partial(many, name) for name in ("fused", "reference")}, runs=7)
            work = f"{losses} loss, B {batch}, {kind}"
            peak, other = (peak_memory(functools.partial(once, name)) for name in ("fused", "reference"))
            found = f"{peak / 2**20:.2f} MiB against {other / 2**20:.2f}, ratio {peak / other:.3f}"
            print(f"peak memory of {work}: {found}{' (bar 0.2)' if kind == 'classes apart' else ''}", flush=True)
            bar = "<= 0.2 x" if kind == "classes apart" else ""
            yield Row(f"{repeats} x {work}", *times["fused"], "autograd", times["reference"][0], bar)


def peak_memory(call: Callable[[], object]) -> int:
    """Largest number of bytes that tensors made by a call hold at a time, after a first call: from the allocations that
    torch's profiler records, those inside operators included."""
    call()
    return max(_peak_on_cpu(call) for _ in range(3))  # the profiler loses an event now and then


def _peak_on_cpu(call: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held, default=0)


def table(rows: list[Row]) -> str:
    """Aligned text."""
    lines = [("work", "ours cpu s", "wall s", "against", "cpu s", "ratio", "bar")]
    for row in rows:
        other = (f"{row.other_cpu:.3f}", f"{row.ratio:.3f}") if row.other_cpu else ("", "")
        lines.append((row.work, f"{row.ours_cpu:.3f}", f"{row.ours_wall:.3f}", row.against, *other, row.bar))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def recsys(arguments: argparse.Namespace) -> list[Row]:
    """All recommender benchmarks that were asked for."""
    big = load_dataset(arguments.big, data_root=arguments.data_root)
    parts = {
        "sampling": lambda: bench_sampling(big),
        "lightgcn": lambda: bench_lightgcn_step(big),
        "evaluation": lambda: bench_evaluation(big),
        "scoring": lambda: bench_gravity_scoring(big),
    }
    rows = []
    for name in arguments.only or parts:
        for row in parts[name]():
            rows.append(row)
            print(table([row]).splitlines()[1], flush=True)
    return rows


def mcl(arguments: argparse.Namespace) -> list[Row]:
    """Both data sets of the MCL paper that are at hand."""
    names = ("amazon-music", "amazon-grocery")
    return [row for name in names for row in bench_mcl(load_dataset(name, data_root=arguments.data_root, val_ratio=0))]


def cml(arguments: argparse.Namespace) -> list[Row]:
    """MovieLens-1M under the CML paper's cut."""
    return list(
        bench_cml(load_dataset("ml1m", data_root=arguments.data_root, split="per-user", split_ratios=(0.6, 0.2, 0.2)))
    )


def mirror(arguments: argparse.Namespace) -> list[Row]:
    """One epoch of every trained multimodal model, or of --models; each in a process of its own for its peak memory."""
    from mirror_grad.models import MODELS

    models = arguments.models or [name for name, entry in MODELS.items() if entry.trains]
    if len(models) > 1:
        return [row for model in models for row in _mirror_elsewhere(model, arguments)]
    row, peak = bench_multimodal(arguments.data, models[0], arguments.data_root)
    print(f"peak memory of {row.work}: {peak:,.0f} MiB (bar 8,192 MiB)", flush=True)
    return [row]


def _mirror_elsewhere(model: str, arguments: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        words = f"{ROOT / 'scripts' / 'bench.py'} mirror --data {arguments.data} --models {model} --json {rows}"
        command = [
            sys.executable,
            *words.split(),
            *([f"--data-root={arguments.data_root}"] if arguments.data_root else []),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = [Row(*(row[name] for name in Row._fields)) for row in json.loads(rows.read_text())]
    print(next(line for line in done.stdout.splitlines() if line.startswith("peak memory")))
    print(table(found).splitlines()[-1], flush=True)
    return found


def vision(arguments: argparse.Namespace) -> list[Row]:
    """Attention layer and whole model."""
    parts = {"attention": (bench_attention, 64), "model": (bench_vision_model, 16)}
    chosen = [parts[name] for name in arguments.only or parts]
    return [row for part, size in chosen for row in part(arguments.batch or size)]


def contextual(arguments: argparse.Namespace) -> list[Row]:
    """Batch sizes of the published runs; --sizes for others."""
    sizes = arguments.sizes or (128, 256, 512)
    return [row for batch in sizes for row in bench_contextual(batch, repeats=max(1, 2560 // batch))]


def data(arguments: argparse.Namespace) -> list[Row]:
    """A table read, cut and cached, beside pyarrow's reading and factorising of it."""
    rows = []
    for size, cost in zip(sizes := arguments.sizes or [10_000_000], bench(sizes), strict=True):
        read, against = f"{size:,} rows read, cut by time, cached", "pyarrow reads, factorises"
        rows += [
            Row(read, cost.ours, cost.wall, against, cost.other, "1.5"),
            Row("second start", cost.again, cost.again_wall, "first start", cost.ours, "0.1"),
            Row("peak memory, MiB", cost.peak_mb, 0, "file, MiB", cost.file_mb, "3"),
        ]
    return rows


FAMILIES = {
    "recsys": recsys, "mcl": mcl, "cml": cml, "mirror": mirror, "vision": vision, "contextual": contextual, "data": data,
}  # fmt: skip
