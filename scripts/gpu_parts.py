"""The parts of ``gpu_check.py``: generators of rows, {"work": name, numbers...}; "ok": False marks a number out of bounds."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import gpu_probe as probe
import torch
import torch.nn.functional as F
from gpu_probe import NotRun
from torch import Tensor
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[1]
Rows = Iterator[dict[str, Any]]
# Largest relative differences of losses and of the way parameters went in 20 steps, and of metrics.
LOSS_LIMIT, WAY_LIMIT, METRIC_LIMIT = 1e-3, 5e-2, 2e-2
STEPS = 20
SMALL = f"--dataset synthetic {probe.SMALL}"
# One way through each program that is run from its flags to its result.
WHOLE = ("recsys lgn bpr", "recsys mf gravity", "cml two-stage", "mcl mix ema", "hlrm plus", "contextual 256", "vision published mix", "mirror FREEDOM")  # fmt: skip
# Programs that go on without recordings.
UNRECORDED = ("mirror LATTICE", "contextual proxy")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


class Part(NamedTuple):
    """group: correct parts and runs go side by side, time parts build so and measure alone."""

    group: str
    run: Callable[[argparse.Namespace], Rows]


# -- small tools

_held = 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, no other part measures: parts build side by side and take turns on the device."""
    global _held
    path = os.environ.get("GPU_CHECK_LOCK")
    if path is None or _held:
        yield
        return
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held += 1
        try:
            yield
        finally:
            _held -= 1


def measured(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function has the device to itself."""

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        with alone():
            return function(*args, **named)

    return run


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@measured
def milliseconds(call: Callable[[], object], device: str, *, runs: int = 20, warm_up: int = 5) -> float:
    """Median of ``runs`` calls after a warm-up: device events on CUDA, wall time on the CPU."""
    found = []
    if device == "cpu":  # for trying the script out
        runs, warm_up = 1, 1
    for _ in range(warm_up):
        call()
    for _ in range(runs):
        if device == "cpu":
            started = time.perf_counter()
            call()
            found.append((time.perf_counter() - started) * 1e3)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        first.record()
        call()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last))
    return statistics.median(found)


@measured
def megabytes(device: str, call: Callable[[], object]) -> float:
    """Most device memory that a call held, in MiB."""
    if device == "cpu":
        call()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


@measured
def epoch_seconds(found: SimpleNamespace, device: str, epochs: int) -> float:
    """Median seconds of an epoch of ``fit``, sampling and reading of the terms included; the first is warm-up."""
    from gfml.engine.train import fit

    epochs = 2 if device == "cpu" else epochs
    stamps: list[float] = []

    def batches(epoch: int) -> Any:
        synchronize(device)
        stamps.append(time.perf_counter())
        return found.batches(epoch)

    kept = {name: value for name, value in vars(found).items() if name not in ("tracker", "patience", "evaluate_first")}
    own = {"batches": batches, "run": None, "evaluate": None, "select": None, "epochs": epochs, "progress": False}
    fit(**kept | own)
    synchronize(device)
    stamps.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(stamps[1:-1], stamps[2:], strict=True))


@measured
def recorded_milliseconds(call: Callable[[], object], device: str) -> float:
    """As :func:`milliseconds` of the call as a CUDA graph: without the host's part."""
    if device == "cpu":
        return milliseconds(call, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay, device)


@measured
def kernel_milliseconds(
    call: Callable[[], object], device: str, steps: int = 10, largest: list[str] | None = None
) -> tuple[float, dict[str, int]]:
    """Sum of the device's own times of a call's kernels, and how often the host waited in ``steps`` calls.

    largest: receives the longest kernels with their milliseconds and numbers of launches a call.
    """
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    steps = steps if device == "cuda" else 1
    call()
    synchronize(device)
    with profile(activities=kinds) as prof:
        for _ in range(steps):
            call()
    events, waits = prof.key_averages(), {}
    for event in events:
        for name in SYNCS:
            if name in event.key:
                waits[name] = waits.get(name, 0) + event.count
    # The profiler itself waits once, when it stops.
    waits = {name: count for name, count in waits.items() if name != "cudaDeviceSynchronize" or count > 1}
    # Operators, and annotations such as Optimizer.step#..., repeat the time of their kernels.
    kernels = [event for event in events if event.device_type != DeviceType.CPU and "#" not in event.key]
    if largest is not None:
        kernels.sort(key=lambda event: -event.self_device_time_total)
        largest += [
            f"{e.key[:70]} {e.self_device_time_total / 1e3 / steps:.4f} x{e.count / steps:.0f}" for e in kernels[:14]
        ]
    return sum(event.self_device_time_total for event in kernels) / 1e3 / steps, waits


def flags_of(args: argparse.Namespace, name: str, flags: str, tiny: str) -> SimpleNamespace:
    """What a program trains with on a stored data set, or on toy data."""
    folder = {"gowalla": "gowalla", "ml1m": "ml-1m", "baby": "mmrec-baby", "cimb10": "cifar10"}[name]
    if not args.tiny and not (args.data_root / folder).is_dir():
        raise NotRun(f"no {folder} in --data-root")
    words = tiny if args.tiny else f"--dataset {name} --data-root {args.data_root} {flags}"
    return SimpleNamespace(words=words)


# -- (a) numbers


def compare(name: str, device: str) -> dict[str, Any]:
    """20 steps on the device beside 20 on the CPU, from the same start, batches and noise; then a judged part."""
    # Convolutions in TF32, the library's default, are off by 1e-3.
    torch.backends.cudnn.allow_tf32 = False
    ours, other = probe.caught(name, "cpu"), probe.caught(name, device)
    next(iter(other.batches(1)))
    batches = list(islice(cycle(list(islice(iter(ours.batches(1)), STEPS))), STEPS))
    start = probe.vector(ours.model)
    wanted, found = list(probe.steps(ours, batches, "cpu")), list(probe.steps(other, batches, device))
    loss = max(abs(a - b) / max(abs(a), 1e-2) for a, b in zip(wanted, found, strict=True))
    end, there = probe.vector(ours.model), probe.vector(other.model)
    way = float((end - there).norm() / (end - start).norm())
    row: dict[str, Any] = {"work": name, "loss": loss, "way": way}
    if other.evaluate is not None:
        other.model.load_state_dict(ours.model.state_dict())
        split = {"val": "valid", "test": "test"}[ours.select.partition("/")[0]]
        with torch.no_grad():
            a, b = (part.model.eval() and part.evaluate(split) for part in (ours, other))
        row["metric"] = max(abs(a[key] - b[key]) / max(abs(a[key]), 0.1) for key in a)
    row["ok"] = loss <= LOSS_LIMIT and way <= WAY_LIMIT and row.get("metric", 0) <= METRIC_LIMIT
    return row


def numbers(group: str) -> Callable[[argparse.Namespace], Rows]:
    """A part that compares the programs of a group, or those with kernels; one that fails costs no other."""

    def run(args: argparse.Namespace) -> Rows:
        start = {"metric": "cml"}.get(group, group.rstrip("12"))
        chosen = [*probe.KERNELS] if group == "fused" else [name for name in probe.PROGRAMS if name.startswith(start)]
        half = len(chosen) // 2
        chosen = {"mirror1": chosen[:half], "mirror2": chosen[half:]}.get(group, chosen)
        for name in chosen[: 1 if args.tiny else None]:
            yield from guarded(name, lambda name=name: compare(name, args.device))

    return run


def guarded(name: str, call: Callable[[], dict[str, Any]]) -> Rows:
    """The call's row, or one that tells where it failed."""
    try:
        yield call()
    except NotRun:
        raise
    except Exception as error:
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        told = f"{type(error).__name__}: {str(error)[:300]}"
        yield {"work": name, "ok": False, "error": told, "where": " ".join(where[-6:])}


def whole(args: argparse.Namespace) -> Rows:
    """Programs from their flags to their results, side by side."""
    chosen = WHOLE[: 2 if args.tiny else None]
    with ThreadPoolExecutor(4) as pool:
        for name, call in [(name, pool.submit(_whole, name, args.device)) for name in chosen]:
            yield from guarded(f"{name}, whole", call.result)


def _whole(name: str, device: str) -> dict[str, Any]:
    module, flags = probe.PROGRAMS[name]
    with tempfile.TemporaryDirectory() as out:
        words = [*flags.split(), *([] if "--max-epochs" in flags else ["--epochs", "2"])]
        run_program(module, *words, "--device", device, "--no-progress", "--out", out)
        return {"work": f"{name}, whole", "ok": bool(list(Path(out).glob("*/result.json")))}


def marked(args: argparse.Namespace) -> Rows:
    """``pytest -m gpu``."""
    words = [sys.executable, *"-m pytest -q -m gpu -p no:cacheprovider --no-header --tb=short tests".split()]
    words += ["--collect-only"] if args.tiny else []
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    row = {"work": "pytest -m gpu", "ok": done.returncode == 0, "last": lines[-1] if lines else ""}
    if not row["ok"]:
        row["error"] = "\n".join(lines[-60:])[-5000:]
    yield row


# -- recorded steps


def recorded(args: argparse.Namespace) -> Rows:
    """Programs whose steps are recordings, beside plain ones on the same device, or why they are none."""
    for name in [*probe.PROGRAMS, *probe.KERNELS][: 1 if args.tiny else None]:
        yield from guarded(name, lambda name=name: _recorded(name, args.device))


def _recorded(name: str, device: str) -> dict[str, Any]:
    from gfml.engine.capture import StepCapture, capture_problem

    ours, plain = (probe.caught(name, device) for _ in range(2))
    how = ours.model, ours.optimizer, ours.step, ours.loss_fn
    on_cpu = {"record": lambda call: SimpleNamespace(replay=call)} if device == "cpu" else {}
    capture = StepCapture(*how, **on_cpu)
    reason = capture_problem(ours.model, ours.step, ours.optimizer, torch.device("cuda"))
    batches = list(islice(cycle(list(plain.batches(1))), STEPS))  # the last one of an epoch too
    next(iter(ours.batches(1)))  # a model may thin its graph for an epoch
    found = [] if reason else list(probe.steps(ours, batches, device, capture, draws=False))
    wanted = list(probe.steps(plain, batches, device, draws=False)) if found else []
    reason = reason or capture.reason
    loss = max((abs(a - b) / max(abs(b), 1e-2) for a, b in zip(found, wanted, strict=True)), default=0.0)
    return {
        "work": name,
        "loss": loss,
        "reason": reason or "none",
        "ok": loss <= LOSS_LIMIT and bool(reason) == (name in UNRECORDED),
    }


# -- (c) waiting


def waiting(args: argparse.Namespace) -> Rows:
    """Programs whose batches or steps make the host wait for the device in 20 steps, and where."""
    for name in [*probe.KERNELS, *probe.PROGRAMS][: 2 if args.tiny else None]:
        yield from guarded(name, lambda name=name: _waiting(name, args.device))


def _waiting(name: str, device: str) -> dict[str, Any]:
    found = probe.caught(name, device)
    found.model.train()

    def once(batch: Any) -> None:
        found.step(lambda: found.loss_fn(batch), found.optimizer)

    drawn = cycle(found.batches(1))
    for _ in range(3):
        once(next(drawn))
    places = {}
    for kind in ("batch", "step"):
        batches = list(islice(cycle(found.batches(1)), STEPS))
        places[kind] = _first_wait(device, (lambda: list(islice(iter(found.batches(1)), STEPS))) if kind == "batch" else (lambda: [once(batch) for batch in batches]))  # fmt: skip
    return {"work": name, "ok": places["step"] is None, **{kind: place or "none" for kind, place in places.items()}}


def _first_wait(device: str, call: Callable[[], object]) -> str | None:
    if device == "cpu":
        call()
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "called a synchronizing" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "site-packages" not in frame.filename and "gpu_" not in frame.filename]
        return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}" if own else str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


# -- (b) times


def recsys(args: argparse.Namespace, dataset: str, flags: str) -> SimpleNamespace:
    """What recsys/main.py trains with."""
    import recsys.main

    words = f"{flags_of(args, dataset, '', SMALL).words} {flags} --baselines none --report 0 --es_on test"
    return probe.caught_main(recsys.main.main, f"{words} --device {args.device} --no-progress".split())


def step_rows(
    args: argparse.Namespace, work: str, make: Callable[..., SimpleNamespace], bar: str, epochs: int = 5
) -> Rows:
    """An epoch, captured and eager; a step of each; the sum of its kernels; memory."""
    device = args.device
    made = {kind: make(f"--cuda-graph {flag}") for kind, flag in (("ours", "auto"), ("eager", "0"))}
    seconds = {kind: epoch_seconds(found, device, epochs if kind == "ours" else 2) for kind, found in made.items()}
    row: dict[str, Any] = {
        "work": f"{work}, epoch", "seconds": seconds["ours"], "bar": bar, "eager_seconds": seconds["eager"],
        "of_eager": seconds["ours"] / seconds["eager"],
    }  # fmt: skip
    yield row
    found = made["eager"]
    batch = next(iter(found.batches(1)))
    found.model.train()

    def step() -> None:
        found.step(lambda: found.loss_fn(batch), found.optimizer)

    eager = milliseconds(step, device)
    largest: list[str] = []
    kernels, waits = kernel_milliseconds(step, device, largest=largest)
    number = len(found.batches(1))
    own = seconds["ours"] * 1e3 / number
    yield {
        "work": f"{work}, step", "ms": own, "eager_ms": eager, "kernels_ms": kernels, "of_eager": own / eager,
        "of_kernels": own / kernels if kernels else 0.0, "bar": "<= 0.35 of eager", "steps": number,
        "mib": megabytes(device, step), "waits": sum(waits.values()), "largest": largest,
    }  # fmt: skip


def lightgcn(args: argparse.Namespace) -> Rows:
    """LightGCN on gowalla: epoch, step, evaluation, and the published way to do a step."""
    flags = "--model lgn --loss_mode bpr --embedding-dim 64 --batch-size 2048 --topks 20 --es_metric recall@20"

    def make(more: str = "") -> SimpleNamespace:
        return recsys(args, "gowalla", f"{flags} {more}")

    yield from step_rows(args, "LightGCN gowalla", make, "<= 1.0 s", epochs=4)
    found = make()
    found.model.eval()
    with torch.no_grad():
        judged = milliseconds(lambda: found.evaluate("test"), args.device, runs=3, warm_up=1)
        user, item = (part.detach() for part in found.model.encoder.vectors())
        bare = milliseconds(lambda: _bare_ranking(user, item), args.device, runs=3, warm_up=1)
        yield {
            "work": "LightGCN gowalla, full evaluation", "seconds": judged / 1e3, "bar": "<= 0.5 s", "products_and_topk_seconds": bare / 1e3,
            "ratio": judged / bare, "mib": megabytes(args.device, lambda: found.evaluate("test")),
        }  # fmt: skip
    yield {"work": "LightGCN gowalla, published step", "ms": _published_lightgcn(found, args.device)}


def _bare_ranking(user: Tensor, item: Tensor) -> None:
    for rows in user.split(4096):
        (rows @ item.T).topk(20)


def _published_lightgcn(found: SimpleNamespace, device: str) -> float:
    """A step as in the published program: autograd through COO products, dense Adam in a loop."""
    graph, nodes = found.model.encoder.graph, torch.nn.Parameter(found.model.encoder.nodes.detach().clone())
    rows = torch.repeat_interleave(graph.indptr.diff().long())
    places = torch.stack([rows, graph.indices.long()])
    matrix = torch.sparse_coo_tensor(places, graph.values, check_invariants=False).coalesce()
    optimizer = torch.optim.Adam([nodes], lr=1e-3, foreach=False, fused=False)
    batch = next(iter(found.batches(1)))
    users, pos, neg = batch.users, batch.pos + graph.num_users, batch.neg + graph.num_users

    def step() -> None:
        layers = [nodes]
        for _ in range(3):
            layers.append(torch.sparse.mm(matrix, layers[-1]))
        final = torch.stack(layers, 1).mean(1)
        u, p, n = final[users], final[pos], final[neg]
        decay = 0.5 * (nodes[users].norm(2).pow(2) + nodes[pos].norm(2).pow(2) + nodes[neg].norm(2).pow(2)) / len(users)
        loss = F.softplus((u * n).sum(1) - (u * p).sum(1)).mean() + 1e-4 * decay
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return milliseconds(step, device, runs=10)


MF = "--model mf --embedding-dim 64 --batch-size 2048 --topks 20 --es_metric recall@20 --sampler interaction"


def factorisation(args: argparse.Namespace) -> Rows:
    """MF with bpr and gravity on ml1m and gowalla."""
    for dataset, loss in (("gowalla", "bpr"), ("gowalla", "gravity"), ("ml1m", "bpr"), ("ml1m", "gravity")):

        def make(more: str, loss: str = loss, dataset: str = dataset) -> SimpleNamespace:
            return recsys(args, dataset, f"{MF} --loss_mode {loss} {more}")

        yield from step_rows(
            args, f"MF {loss} {dataset}", make, "<= 0.15 s" if (dataset, loss) == ("gowalla", "bpr") else ""
        )


def multimodal(args: argparse.Namespace) -> Rows:
    """An epoch of every multimodal model on baby, features of the published widths (noise: times do not depend on it)."""
    import mirror_grad.main

    half = len(probe.TRAINED) // 2
    models = probe.TRAINED[:half] if args.part.endswith("1") else probe.TRAINED[half:]
    words = flags_of(
        args, "baby", "--features random --random-widths 4096 384", f"{SMALL} --features random --random-widths 48 24"
    ).words
    for name in models[: 1 if args.tiny else None]:

        def one(name: str = name) -> dict[str, Any]:
            argv = f"--model {name} {words} --not_mg --baselines none --embedding-dim 64 --batch-size 2048"
            found = probe.caught_main(mirror_grad.main.main, f"{argv} --device {args.device} --no-progress".split())
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = epoch_seconds(found, args.device, 3)
            row = {"work": f"{name} baby, epoch", "seconds": seconds, "steps": len(found.batches(1))}
            if args.device == "cuda":
                row["mib"] = torch.cuda.max_memory_allocated() / 2**20
            found.model.eval()
            judged = milliseconds(lambda: found.evaluate("valid"), args.device, runs=2, warm_up=1)
            return row | {"evaluation_seconds": judged / 1e3}

        yield from guarded(f"{name} baby, epoch", one)


def fused(args: argparse.Namespace) -> Rows:
    """MF's losses by kernels of their own, and steps of touched rows alone, beside autograd in recorded steps."""
    for loss, more in (("bpr", ""), ("gravity", ""), ("mix", ""), ("gravity", "--optimizer lazy_adamw")):
        seconds = {}
        for kernel in ("fused", "autograd"):
            found = recsys(args, "gowalla", f"{MF} --loss_mode {loss} {more} --kernel {kernel}")
            seconds[kernel] = epoch_seconds(found, args.device, 4)
        yield {
            "work": f"MF {loss} gowalla {more.partition(' ')[2]}, epoch by kernels", "seconds": seconds["fused"],
            "autograd_seconds": seconds["autograd"], "of_autograd": seconds["fused"] / seconds["autograd"],
        }  # fmt: skip


def mcl_steps(args: argparse.Namespace) -> Rows:
    """MCL, whose padded batches can be recorded: an epoch on ml1m, recorded and eager."""
    import mcl.main

    words = flags_of(args, "ml1m", "--dim 64 --batch_size 500 --num_neg 5 --topks 20 --baselines none", probe.MCL).words

    def make(more: str) -> SimpleNamespace:
        return probe.caught_main(mcl.main.main, f"{words} {more} --device {args.device} --no-progress".split())

    yield from step_rows(args, "MCL ml1m", make, "", epochs=3)


def contextual(args: argparse.Namespace) -> Rows:
    """The contextual and the hybrid loss, forward and backward, against the readable reference."""
    from contextual import losses

    for batch in (16,) if args.tiny else (256, 512, 1024, 2048):
        torch.manual_seed(0)
        rows = torch.randn(batch, 512, device=args.device, requires_grad=True)
        labels = torch.arange(batch // 4, device=args.device).repeat_interleave(4)

        def call(backend: str, weights: Any, rows: Tensor = rows, labels: Tensor = labels) -> None:
            rows.grad = None
            losses.hybrid(losses.cosine_similarities(rows), labels, weights, backend=backend).loss.backward()

        for name, weights in (("contextual", (1, 0, 0)), ("hybrid", (0.4, 0.5, 0.1))):
            chosen = losses.Weights(*weights)
            ours, other = (milliseconds(lambda b=b, w=chosen: call(b, w), args.device) for b in ("fused", "reference"))
            kernels, waits = kernel_milliseconds(lambda w=chosen: call("fused", w), args.device)
            yield {
                "work": f"{name} loss, B {batch}", "recorded_ms": recorded_milliseconds(lambda w=chosen: call("fused", w), args.device), "ms": ours, "reference_ms": other, "ratio": ours / other, "kernels_ms": kernels,
                "bar": "<= 3 ms" if batch == 512 else "", "waits": sum(waits.values()),
                "mib": megabytes(args.device, lambda w=chosen: call("fused", w)),
                "reference_mib": megabytes(args.device, lambda w=chosen: call("reference", w)),
            }  # fmt: skip


def attention(args: argparse.Namespace) -> Rows:
    """A gravity layer against the same layer with the library's attention, forward and backward."""
    from gfml.attention import PLAIN, AttentionSettings, GravityAttention

    bars = {65: "<= 1.10", 785: "<= 1.5"}
    for tokens, batch in ((9, 2),) if args.tiny else ((65, 128), (197, 64), (785, 16)):
        for dtype in (torch.float32, torch.bfloat16):
            times, memory, recorded = {}, {}, {}
            for name, settings in (
                ("gravity", AttentionSettings(lamb=3.0)),
                ("explicit", AttentionSettings(lamb=3.0, kernel="explicit")),
                ("plain", PLAIN),
            ):
                torch.manual_seed(0)
                layer = GravityAttention(384, 12, tokens, settings).to(args.device)
                x = torch.randn(batch, tokens, 384, device=args.device, requires_grad=True)

                def call(layer: torch.nn.Module = layer, x: Tensor = x, dtype: torch.dtype = dtype) -> None:
                    x.grad = None
                    layer.zero_grad(set_to_none=True)
                    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                        out = layer(x)
                    out.float().square().mean().backward()

                call()  # kernels are compiled while other parts measure
                times[name], memory[name] = milliseconds(call, args.device), megabytes(args.device, call)
                recorded[name] = recorded_milliseconds(call, args.device)
            yield {
                "work": f"gravity attention, {tokens} tokens, {str(dtype)[6:]}", "ms": times["gravity"], "sdpa_ms": times["plain"],
                "ratio": times["gravity"] / times["plain"], "explicit_ms": times["explicit"], "bar": bars.get(tokens, ""),
                "recorded_ms": recorded["gravity"], "recorded_sdpa_ms": recorded["plain"], "recorded_ratio": recorded["gravity"] / recorded["plain"],
                "mib": memory["gravity"], "sdpa_mib": memory["plain"], "explicit_mib": memory["explicit"],
            }  # fmt: skip


def flex(args: argparse.Namespace) -> Rows:
    """The attention kernels by themselves, forward and backward, beside FlexAttention's form of the same."""
    from torch.nn.attention.flex_attention import flex_attention

    from gfml.attention import power_law_attention

    if args.device == "cpu":
        raise NotRun("FlexAttention has no backward pass on a CPU")
    attend = torch.compile(flex_attention, dynamic=False)
    for n, batch in ((65, 128), (785, 16)):
        inputs = [
            torch.randn(batch, 12, n, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        ]
        column, beta = (torch.rand(size, device="cuda", requires_grad=True) for size in (n, 12))
        above = torch.randn(batch, 12, n, 32, device="cuda", dtype=torch.bfloat16)

        def by_flex(inputs: list[Tensor] = inputs, column: Tensor = column, beta: Tensor = beta) -> Tensor:
            norms = [part.float().square().sum(-1) for part in inputs[:2]]

            def score(dot: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return column[j] - beta[h] * (1 + norms[0][b, h, i] + norms[1][b, h, j] - 2 * dot).clamp_min(1).log()

            return attend(*inputs, score_mod=score, scale=1.0)

        def by_kernels(inputs: list[Tensor] = inputs, column: Tensor = column, beta: Tensor = beta) -> Tensor:
            return power_law_attention(*inputs, column.view(1, 1, -1), beta.view(-1, 1, 1))

        grads, times = {}, {}
        for name, call in (("flex", by_flex), ("kernels", by_kernels)):

            def both(
                call: Callable[[], Tensor] = call, leaves: Any = (*inputs, column, beta), above: Tensor = above
            ) -> Any:
                return torch.autograd.grad(call(), leaves, above)

            grads[name] = both()
            times[name] = milliseconds(both, "cuda")
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(grads["kernels"], grads["flex"], strict=True))
        yield {
            "work": f"gravity attention, {n} tokens, bfloat16, beside FlexAttention", "ms": times["kernels"], "flex_ms": times["flex"],
            "ratio": times["kernels"] / times["flex"], "difference": off, "ok": off < 5e-2,
        }  # fmt: skip


# Tiles tried for attention kernels: (queries, keys, warps) forward; backward, over keys and over queries.
FORWARD_TILES = {65: ((32, 128, 4), (64, 128, 8), (16, 128, 4)), 785: ((64, 64, 4), (128, 64, 4), (64, 128, 4))}
BACKWARD_TILES = {
    65: (((16, 128, 4),) * 2, ((16, 128, 8),) * 2, ((32, 128, 8),) * 2),
    785: (((32, 64, 4), (64, 32, 4)), ((64, 64, 8), (64, 64, 8)), ((64, 32, 4), (64, 64, 4))),
}


def tiles(args: argparse.Namespace) -> Rows:
    """Attention kernels by themselves with several tiles, beside the library's attention."""
    from gfml.kernels import power_law

    if args.device == "cpu":
        raise NotRun("Triton needs a GPU")
    for n, batch in ((65, 128), (785, 16)):
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v, above = (torch.randn(batch, 12, n, 32, device="cuda").to(dtype) for _ in range(4))
            column, options = torch.zeros(1, 1, n, device="cuda").expand(batch, 12, n), power_law.Options(1.0, 0.0)
            usual = power_law._tiles(n, dtype == torch.float32)
            out, lse = power_law.forward(q, k, v, column, 0.15, options)
            row: dict[str, Any] = {"work": f"attention kernels, {n} tokens, {str(dtype)[6:]}"}
            for tile in FORWARD_TILES[n]:
                with mock.patch.object(power_law, "_tiles", lambda *_, tile=tile: (power_law._Tile(*tile), *usual[1:])):
                    power_law.forward(q, k, v, column, 0.15, options)  # compiled while others measure
                    row[f"forward {tile}"] = recorded_milliseconds(
                        lambda: power_law.forward(q, k, v, column, 0.15, options), "cuda"
                    )
            for pair in BACKWARD_TILES[n]:
                chosen = tuple(power_law._Tile(*tile) for tile in pair)
                with mock.patch.object(power_law, "_tiles", lambda *_, chosen=chosen: (usual[0], *chosen)):
                    power_law.backward(above, out, lse, q, k, v, column, 0.15, options)
                    row[f"backward {pair}"] = recorded_milliseconds(
                        lambda: power_law.backward(above, out, lse, q, k, v, column, 0.15, options), "cuda"
                    )
            inputs = [part.detach().requires_grad_() for part in (q, k, v)]
            row["sdpa forward"] = recorded_milliseconds(lambda: F.scaled_dot_product_attention(q, k, v), "cuda")

            def both(inputs: list[Tensor] = inputs, above: Tensor = above) -> None:
                torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, above)

            row["sdpa both"] = recorded_milliseconds(both, "cuda")
            yield row


PUBLISHED_VIT = (
    "--batch-size 128 --weight-decay 5e-5 --lr 1e-3 --min-lr 1e-5 --warmup-epoch 5 --dropout 0.0 --head 12 --num-layers 7 --hidden 384 "
    "--mlp-hidden 384 --autoaugment --label-smoothing --max-epochs 200"
)
PUBLISHED_GRAVITY = "--model-name vit_gra --lamb_gra 3.0 --lamb_mix 0.5 --mix_on 1 --mix_mode split --dist_mode l2 --mass_pos tail --num_split 6 --split_mix 1"


def vit(args: argparse.Namespace) -> Rows:
    """The published vision transformer's step at batch 128, gravity against plain, in bfloat16 and float32."""
    import vision.main

    for precision in (16, 32):
        times, memory = {}, {}
        for name, flags in (
            ("gravity", PUBLISHED_GRAVITY),
            ("every layer", "--model-name vit_gra --lamb_gra 3.0"),
            ("plain", "--model-name vit"),
        ):
            words = flags_of(args, "cimb10", PUBLISHED_VIT, f"{probe.VISION} --batch-size 16").words
            found = probe.caught_main(
                vision.main.main,
                f"{flags} {words} --precision {precision} --device {args.device} --no-progress".split(),
            )
            batch = next(iter(found.batches(1)))
            found.model.train()

            def step(found: SimpleNamespace = found, batch: Any = batch) -> None:
                def closure() -> Any:
                    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=found.amp):
                        return found.loss_fn(batch)

                found.step(closure, found.optimizer)

            times[name], memory[name] = milliseconds(step, args.device), megabytes(args.device, step)
            times[f"{name} kernels"], _ = kernel_milliseconds(step, args.device)
        for name, bar in (("gravity", "<= 1.05"), ("every layer", "")):
            yield {
                "work": f"published ViT step, {name}, {precision} bit", "ms": times[name], "plain_ms": times["plain"],
                "ratio": times[name] / times["plain"], "kernels_ms": times[f"{name} kernels"], "plain_kernels_ms": times["plain kernels"],
                "bar": bar, "mib": memory[name], "plain_mib": memory["plain"],
            }  # fmt: skip


ARMS = {
    "plain": "--model-name vit",
    "distance": f"{PUBLISHED_GRAVITY} --mass_from none",
    "tail": PUBLISHED_GRAVITY,
    "adjusted": "--model-name vit --long-tail logit-adjustment",
}


def published_vit(args: argparse.Namespace) -> Rows:
    """One arm of the published ViT on cimb10, 200 epochs from one seed."""
    arm = args.part.partition("-")[2]
    words = flags_of(args, "cimb10", PUBLISHED_VIT, probe.VISION).words
    found = _test_metrics("vision.main", f"{ARMS[arm]} {words} --report 0", args.device)
    kept = {name: found[name] for name in ("accuracy", "accuracy_many", "accuracy_medium", "accuracy_few")}
    yield {"work": f"published ViT, cimb10, {arm}", "command": f"vision/main.py {ARMS[arm]} {PUBLISHED_VIT}"} | kept


def ceilings(args: argparse.Namespace) -> Rows:
    """What the card gives to a copy and to a product."""
    size = 1 << (10 if args.tiny else 28)
    a = torch.randn(2, size, device=args.device)
    yield {"work": "copy", "gb_per_s": 8 * size / milliseconds(lambda: a[1].copy_(a[0]), args.device) / 1e6}
    side = 64 if args.tiny else 8192
    for dtype in (torch.float32, torch.bfloat16):
        m = torch.randn(side, side, device=args.device, dtype=dtype)
        speed = 2 * side**3 / milliseconds(lambda m=m: m @ m, args.device, runs=5) / 1e9
        yield {"work": f"product, {str(dtype)[6:]}", "tflop_per_s": speed}


def precision(args: argparse.Namespace) -> Rows:
    """What bfloat16 and TF32 do to metrics: short runs from the same seed."""
    epochs = f"--epochs {1 if args.tiny else 12} --eval-every 4"
    for loss in ("bpr", "gravity"):
        words = f"{flags_of(args, 'ml1m', '', SMALL).words} --model mf --loss_mode {loss} --embedding-dim 64 --topks 20"
        words += f" --es_metric recall@20 --baselines none --report 0 --lr 5e-3 {epochs}"
        kinds = {"float32": "", "bfloat16": "--amp"}
        found = {name: _test_metrics("recsys.main", f"{words} {more}", args.device) for name, more in kinds.items()}
        yield {"work": f"MF {loss} ml1m, recall@20"} | {name: part["recall@20"] for name, part in found.items()}
    words = flags_of(args, "cimb10", PUBLISHED_VIT.replace("--max-epochs 200", "--max-epochs 20"), probe.VISION).words
    words = f"{PUBLISHED_GRAVITY} {words} --report 0"
    kinds = {"float32": "--precision 32 --tf32 0", "TF32": "--precision 32 --tf32 1", "bfloat16": "--precision 16"}
    kinds = dict(list(kinds.items())[: 1 if args.tiny else None])
    with ThreadPoolExecutor(3) as pool:
        calls = {
            n: pool.submit(_test_metrics, "vision.main", f"{words} {more}", args.device) for n, more in kinds.items()
        }
        found = {name: call.result()["accuracy"] for name, call in calls.items()}
    yield {"work": "published ViT, cimb10, accuracy after 20 epochs"} | found


def _test_metrics(module: str, flags: str, device: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        run_program(module, *flags.split(), "--device", device, "--no-progress", "--out", out)
        return json.loads(next(Path(out).glob("*/result.json")).read_text())["test"]


def run_program(module: str, *words: str) -> None:
    """A program in a process of its own; RuntimeError with what it said if it fails."""
    code = "import sys; from gfml.program.cli import run_main; from importlib import import_module as i; sys.exit(run_main(i(sys.argv[1]).main, sys.argv[2:]))"
    done = subprocess.run([sys.executable, "-c", code, module, *words], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-700:])


# -- (d) resume, several cards


def resume(args: argparse.Namespace) -> Rows:
    """An interrupted run that is continued, against one that was not; weights side by side."""
    names = ("recsys mf gravity", "recsys lgn bpr")
    with ThreadPoolExecutor(2) as pool:
        for name, call in [(name, pool.submit(_resume, name, args.device)) for name in names]:
            yield from guarded(f"resume {name}", call.result)


def _resume(name: str, device: str) -> dict[str, Any]:
    from gfml.base.checkpoints import load_state

    module, flags = probe.PROGRAMS[name]
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(2) as pool:
        common = [*flags.split(), "--device", device, "--no-progress", "--out", out, "--eval-every", "1"]
        runs = [
            pool.submit(run_program, module, *common, "--epochs", str(epochs), "--run-name", part)
            for part, epochs in (("whole", 4), ("part", 2))
        ]
        for run in runs:
            run.result()
        run_program(module, "--resume", f"{out}/part", "--epochs", "4", "--device", device, "--no-progress")
        states = [load_state(Path(out) / part / "last.pt")["model"] for part in ("whole", "part")]
    kept = [[value.double().reshape(-1) for value in state.values() if value.is_floating_point()] for state in states]
    a, b = map(torch.cat, kept)
    difference = float((a - b).norm() / a.norm())
    equal = bool(torch.equal(a, b))
    return {"work": f"resume {name}", "equal_bits": equal, "difference": difference, "ok": difference < 1e-4}


def processes(args: argparse.Namespace) -> Rows:
    """Two processes with NCCL share each batch."""
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotRun("one card; two are needed")
    if args.tiny:
        raise NotRun("toy sizes")
    with tempfile.TemporaryDirectory() as out:
        words = f"-m torch.distributed.run --standalone --nproc-per-node 2 recsys/main.py {probe.PROGRAMS['recsys lgn bpr'][1]}"
        words += f" --epochs 2 --device {args.device} --out {out}"
        done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True, cwd=ROOT)
        yield {
            "work": "two processes",
            "ok": done.returncode == 0,
            "error": done.stderr[-500:] if done.returncode else "",
        }


PARTS: dict[str, Part] = {
    **{
        f"numbers-{group}": Part("correct", numbers(group))
        for group in ("recsys", "metric", "mcl", "hlrm", "fused", "contextual", "vision", "mirror1", "mirror2")
    },
    "tests": Part("correct", marked),
    "whole": Part("correct", whole),
    "waiting": Part("correct", waiting),
    "recorded": Part("correct", recorded),
    "resume": Part("correct", resume),
    "precision": Part("correct", precision),
    "processes": Part("correct", processes),
    "times-ceilings": Part("times", ceilings),
    "times-lightgcn": Part("times", lightgcn),
    "times-factorisation": Part("times", factorisation),
    "times-fused": Part("times", fused),
    "times-mcl": Part("times", mcl_steps),
    "times-contextual": Part("times", contextual),
    "times-attention": Part("times", attention),
    "times-flex": Part("times", flex),
    "times-tiles": Part("times", tiles),
    "times-vit": Part("times", vit),
    "times-multimodal1": Part("times", multimodal),
    "times-multimodal2": Part("times", multimodal),
    **{f"vit-{arm}": Part("runs", published_vit) for arm in ARMS},
}
