"""The result of a run: what it holds, how it is stored and how it is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contextual.data import RetrievalData
from contextual.experiment import Judge, Retriever, build_model
from contextual.names import describe_lam
from gfml.base.checkpoints import save_state
from gfml.base.files import atomic_open
from gfml.engine.distributed import World, is_main
from gfml.engine.runs import Run, seed_everything
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult
from gfml.metrics.retrieval import Retrieval, by_class, nmi
from gfml.program.cli import Options
from gfml.program.steps import selection_of

NMI_UP_TO = 20_000
# How the baselines of --baselines are called in results.
NAMES = {"pixels": "pixels", "start": "starting network"}


@dataclass(frozen=True)
class Shown:
    """What pictures and per-class tables are made of: the retrieval of test, and the embeddings of its queries."""

    test: Retrieval
    embeddings: Tensor


def judge(
    options: Options, data: RetrievalData, model: Retriever, world: World, fitted: FitResult | None, run: Run
) -> tuple[dict[str, Any], Shown]:
    """Everything that is reported, and the retrieval of test behind it. fitted None: weights were loaded."""
    judged = Judge(options, data, model, world)
    found, embeddings = judged.retrieval("test")
    result: dict[str, Any] = {
        "model": f"{options.backbone} {options.loss}",
        "pipeline": options.pipeline,
        "data": facts(data),
        "selection": selection_of(fitted, run, refit=options.refit),
        "loss": model.criterion.describe(),
        "test": found.means,
        "unmatched_queries": found.unmatched,
        "per_class": per_class(found, data),
        "baselines": baselines(options, judged),
    }
    if options.loss == "hybrid":
        result["lam"] = describe_lam(options.lam_convention)
    if options.nmi or (options.nmi is None and len(data.test) <= NMI_UP_TO):
        result["test"]["nmi"] = nmi(embeddings.float(), torch.from_numpy(data.test.labels), seed=options.seed)
    if data.valid is not None and not options.refit:
        result["val"] = judged.retrieval("valid")[0].means
    if options.judge_train:
        result["train"] = judged.retrieval("train")[0].means
    if fitted is not None:
        result["seconds"] = {"train": fitted.train_seconds, "eval": fitted.eval_seconds}
    return result, Shown(found, embeddings)


def facts(data: RetrievalData) -> dict[str, Any]:
    """Name, sizes, fingerprint and notes of the data."""
    parts = {"train": data.train, "valid": data.valid, "test": data.test, "gallery": data.gallery}
    sizes = {
        name: {"images": len(part), "classes": len(part.classes)} for name, part in parts.items() if part is not None
    }
    return {"name": data.name, "fingerprint": data.fingerprint, "notes": list(data.notes), **sizes}


def per_class(found: Retrieval, data: RetrievalData) -> list[dict[str, Any]]:
    """The classes of test, hardest first, by name; values that do not exist are None."""
    rows = by_class(found, data.test.labels)
    return [
        {
            name: data.test.classes[value] if name == "class" else None if value != value else value
            for name, value in row.items()
        }
        for row in rows
    ]


def baselines(options: Options, judged: Judge) -> dict[str, Any]:
    """Test by the centred pixels of the test pictures, made 16 x 16, and by the pooled features of the starting network."""
    makers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "pixels": lambda: small_pixels, "start": lambda: starting_features(options, judged.world),
    }  # fmt: skip
    chosen = [name for name in makers if name in options.baselines]
    return {NAMES[name]: {"test": judged.retrieval("test", makers[name]())[0].means} for name in chosen}


def small_pixels(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 768]: the picture at 16 x 16, its mean taken out."""
    small = F.adaptive_avg_pool2d(pictures, 16).flatten(1)
    return small - small.mean(dim=1, keepdim=True)


def starting_features(options: Options, world: World) -> Callable[[Tensor], Tensor]:
    """The pooled features of the network as it was before training."""
    seed_everything(options.seed)
    net = build_model(options, 2, world.device).net.eval()
    return lambda pictures: net.pool(net.backbone(pictures))


def store(
    options: Options,
    data: RetrievalData,
    model: Retriever,
    result: Mapping[str, Any],
    shown: Shown,
    run: Run,
    tracker: Tracker,
) -> None:
    """Write the reported weights, the arrays behind comparisons between runs, the page, and ``result.json``."""
    save_state(run.file("final.pt"), {"model": model.state_dict(), "selection": result["selection"]})
    arrays = {f"per_query/{name}": values.astype(np.float32) for name, values in shown.test.per_query.items()}
    arrays |= {
        "labels": data.test.labels,
        "neighbours": shown.test.neighbours.astype(np.int32),
        "right": shown.test.right,
    }
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    tracker.scalars(
        result["selection"]["epoch"] or 0, {f"test/{name}": value for name, value in result["test"].items()}
    )
    draw(options, data, result, shown, run)
    run.finish(result)


def draw(options: Options, data: RetrievalData, result: Mapping[str, Any], shown: Shown, run: Run) -> None:
    """Write the page with ``--pictures`` queries; none with 0, and none in the other processes."""
    if options.pictures and is_main():
        from contextual.report import write_page

        write_page(run, data, result, shown.test, queries=options.pictures, seed=options.seed)


def print_result(result: Mapping[str, Any], path: Path) -> None:
    """The results table and where everything is, on stdout of the first process."""
    if not is_main():
        return
    from gfml.report.recommenders import text_table

    rows = {f"{result['model']}, test": result["test"]}
    rows |= {f"{result['model']}, {part}": result[part] for part in ("val", "train") if part in result}
    rows |= {f"{name}, test": found["test"] for name, found in result["baselines"].items()}
    selection = result["selection"]
    print(f"\n{result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}")
    print(f"loss {result['loss']}")
    print(text_table(rows, list(result["test"])))
    if result["unmatched_queries"]:
        print(
            f"{result['unmatched_queries']} queries have no match; they count as misses in recall and are left out of the rest"
        )
    print(f"run directory   {path}")
