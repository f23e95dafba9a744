"""The result of a run: what it holds, how it is stored and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gfml.attention import log_masses
from gfml.base.checkpoints import save_state
from gfml.base.files import atomic_open
from gfml.engine.distributed import World
from gfml.engine.runs import Run
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult
from gfml.longtail import without_prior
from gfml.metrics.classification import confusion_matrix, recalls, sensitivity
from gfml.program.cli import Options
from gfml.program.steps import selection_of
from gfml.report.recommenders import text_table
from vision import experiment
from vision.data import VisionData
from vision.experiment import Training

# Columns of the printed table, those a result has.
SHOWN = (
    "accuracy",
    "accuracy_many",
    "accuracy_medium",
    "accuracy_few",
    "accuracy_head",
    "accuracy_mid",
    "accuracy_tail",
    "worst_class",
    "macro_f1",
    "nll",
    "ece",
)


def judge(
    options: Options,
    data: VisionData,
    model: nn.Module,
    training: Training | None,
    fitted: FitResult | None,
    run: Run,
    world: World,
) -> tuple[dict[str, Any], Tensor]:
    """Everything that is reported, and the test logits behind it.

    The headline "test" is the last epoch's; with a validation part "selected" is that of the best epoch on it.
    fitted None: weights were loaded, and only they are judged.
    """
    source = data.source
    result: dict[str, Any] = {
        "model": options.model_name,
        "data": data_facts(options, data),
        "selection": _selection(fitted, run),
    }
    if fitted is not None and source.valid is not None:
        chosen = experiment.predict(options, data, model, source.test, world)
        result["selected"] = {
            "epoch": fitted.best_epoch,
            "test": experiment.metrics(options, data, chosen, source.test),
        }
        with experiment.last_weights(model, training, run):
            logits = experiment.predict(options, data, model, source.test, world)
            result["val"] = experiment.metrics(
                options, data, experiment.predict(options, data, model, source.valid, world), source.valid
            )
    else:
        logits = experiment.predict(options, data, model, source.test, world)
    result["test"] = experiment.metrics(options, data, logits, source.test)
    result["per_class"] = _per_class(data, logits)
    if options.imb_factor and options.long_tail == "ce" and data.counts.all():
        adjusted = experiment.metrics(options, data, without_prior(logits, data.counts), source.test)
        result["also"] = {"log-prior taken off afterwards": adjusted}
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if fitted is not None:
        result |= _cost(training, fitted, world)
    return result, logits


def data_facts(options: Options, data: VisionData) -> dict[str, Any]:
    """Which images a result is about."""
    source = data.source
    facts = {
        "name": f"{source.name}{f' {options.imb_type} {options.imb_factor:g}' if options.imb_factor else ''}",
        "classes": list(source.classes),
    }
    facts |= {"images": {name: len(part) for name, part in source.parts.items()}, "train_counts": data.counts.tolist()}
    facts |= {"image_size": data.image_size, "notes": list(source.notes), "fingerprint": data.fingerprint}
    return facts


def _selection(fitted: FitResult | None, run: Run) -> dict[str, Any]:
    """The headline is the last epoch's, whether or not an epoch is selected beside it."""
    if fitted is None:
        return dict(selection_of(None, run, refit=False))
    facts = {"epoch": fitted.epochs, "rule": "last epoch", "protocol": "last epoch, nothing selected"}
    return {**facts, "weights": fitted.weights, "epochs_trained": fitted.epochs}


def _per_class(data: VisionData, logits: Tensor) -> dict[str, Any]:
    """Accuracy and share of the answers of every class, and how accuracy follows the train counts."""
    labels = torch.from_numpy(data.source.test.labels[: len(logits)])
    answers = logits.argmax(-1)
    found = recalls(confusion_matrix(labels, answers, data.num_classes))
    share = torch.bincount(answers, minlength=data.num_classes).double() / max(len(answers), 1)
    slope = sensitivity(found, data.counts)
    facts = {"accuracy": [None if value != value else value for value in found.tolist()], "answers": share.tolist()}
    return facts | {name: value for name, value in slope._asdict().items() if value == value}


def _cost(training: Training, fitted: FitResult, world: World) -> dict[str, Any]:
    epochs = max(fitted.epochs, 1)
    images = training.sampler.num_batches * training.sampler.batch_size * fitted.epochs
    cost = {"train": fitted.train_seconds, "eval": fitted.eval_seconds, "epoch": fitted.train_seconds / epochs}
    cost["images_per_second"] = images / fitted.train_seconds if fitted.train_seconds else 0.0
    memory = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if world.device.type == "cuda" else {}
    return {"seconds": cost, **memory}


def store(
    data: VisionData,
    model: nn.Module,
    training: Training,
    result: Mapping[str, Any],
    logits: Tensor,
    run: Run,
    tracker: Tracker,
) -> None:
    """Write the reported weights, the arrays behind pictures and comparisons, and ``result.json``."""
    if data.source.valid is not None:
        with experiment.last_weights(model, training, run):
            weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    else:
        weights = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    save_state(run.file("final.pt"), {"model": weights, "selection": result["selection"]})
    arrays = {
        "test_logits": logits.numpy(),
        "test_labels": data.source.test.labels[: len(logits)],
        "train_counts": data.counts,
    }
    arrays |= {f"log_mass/{name}": mass.detach().cpu().numpy() for name, mass in log_masses(model).items()}
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    tracker.scalars(result["selection"]["epoch"], {f"test/{name}": value for name, value in result["test"].items()})
    run.finish(result)


def label_of(options: Options) -> str:
    """A model's short name in tables: with its attention, where it has gravity."""
    name = options.model_name
    if not name.endswith("_gra"):
        return name
    mix = f", {options.mix_mode} mix" if options.mix_on else ""
    mass = {"position": "", "content": ", content mass", "none": ", no mass"}[options.mass_from]
    return f"{name} ({options.dist_mode}, lambda {options.lamb_gra:g}{mass}{mix}, {options.mass_pos})"


def others(result: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Test metrics beside the headline, by name."""
    chosen = {"best epoch on validation": result["selected"]["test"]} if "selected" in result else {}
    return {**chosen, **result.get("also", {})}


def print_results(results: Sequence[tuple[str, Mapping[str, Any], Path]]) -> None:
    """One row for each run, and where everything is, on stdout."""
    rows = {}
    for label, result, _ in results:
        cost = {"train s": result["seconds"]["train"]} if "seconds" in result else {}
        rows[label] = {**result["test"], **cost}
        rows |= {f"{label}, {name}": found for name, found in others(result).items()}
    first = results[0][1]
    print(
        f"\ntest of {first['data']['name']}, {first['data']['images']['test']:,} images; {first['selection']['protocol']}"
    )
    columns = [name for name in (*SHOWN, "train s") if any(name in row for row in rows.values())]
    print(text_table(rows, columns))
    for label, _, path in results:
        print(f"{label}: {path}")
