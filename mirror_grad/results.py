"""The result of a run: what it holds, how it is stored and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gfml.base.checkpoints import save_state
from gfml.base.files import atomic_open
from gfml.engine.runs import Run
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult
from gfml.program.cli import Options
from gfml.program.steps import cut_offs, selection_of
from gfml.ranking.evaluation import Evaluation
from gfml.report.recommenders import baseline_results, data_facts, judged_text, list_names
from mirror_grad.data import MultimodalData
from mirror_grad.experiment import arm_factor, judge_split
from mirror_grad.models import MODELS
from mirror_grad.options import arm_of

# What is reported without training.
UNTRAINED = {"epoch": 0, "metric": None, "protocol": "no training", "weights": "none", "epochs_trained": 0}
PUBLISHED_MASK = "validation items left in the test lists, as published"


def judge(
    options: Options, data: MultimodalData, model: nn.Module, fitted: FitResult | None, run: Run
) -> tuple[dict[str, Any], Evaluation]:
    """Everything that is reported, and the evaluation of test behind it.

    fitted None: weights were loaded, their selection is the stored result's; or there was nothing to train.
    """
    test = judge_split(options, data, model, "test", beyond=True)
    selection = dict(selection_of(fitted, run, refit=False) if MODELS[options.model].trains else UNTRAINED)
    if options.test_mask == "train":
        selection["protocol"] = f"{selection['protocol'].split('; ' + PUBLISHED_MASK)[0]}; {PUBLISHED_MASK}"
    names = [] if "none" in options.baselines else options.baselines
    result: dict[str, Any] = {
        **facts(options, data),
        "topks": list(options.topks),
        "selection": selection,
        "test": test.means,
        "cold_users": test.cold_users,
        "baselines": baseline_results(
            names,
            data.interactions,
            cut_offs(options.topks, options.select_metric),
            cache_dir=Path(options.out) / "baselines",
        ),
    }
    if data.interactions.valid.nnz:
        result["val"] = judge_split(options, data, model, "valid", beyond=True).means
    result["seconds"] = (
        {"train": fitted.train_seconds, "eval": fitted.eval_seconds}
        if fitted is not None
        else {"train": 0.0, "eval": 0.0}
    )
    return result, test


def facts(options: Options, data: MultimodalData) -> dict[str, Any]:
    """What was trained on what, without its figures."""
    mirror = {"mode": options.mirror} if options.mirror == "off" else {
        "mode": options.mirror, "alpha1": options.mirror_alpha1, "alpha2": options.mirror_alpha2,
        "every": options.mirror_every, "counter": options.mirror_counter, "phase": options.mirror_phase,
    }  # fmt: skip
    widths = {name: int(table.shape[1]) for name, table in data.features.items()}
    return {
        "model": options.model,
        "behaviour": options.behaviour,
        "settings": dict(vars(options.settings)),
        "arm": arm_of(options),
        "mirror": mirror,
        "learning_rate": options.learning_rate * arm_factor(options),
        "data": data_facts(data.interactions),
        "features": {"source": data.feature_source, "widths": widths, "fingerprint": data.fingerprint},
        "test_mask": options.test_mask,
    }


def store(
    data: MultimodalData, model: nn.Module, result: Mapping[str, Any], test: Evaluation, run: Run, tracker: Tracker
) -> None:
    """Write the reported weights, the arrays behind comparisons between runs, and ``result.json``."""
    save_state(run.file("final.pt"), {"model": model.state_dict(), "selection": result["selection"]})
    inter = data.interactions
    arrays = {"item_popularity": inter.item_popularity, "user_activity": inter.user_activity, "test_users": test.users,
              "top": test.top.astype(np.int32), **list_names(inter, test.users)}  # fmt: skip
    arrays |= {
        f"per_user/{name}": values.astype(np.float32) for name, values in test.per_user.items() if "_" not in name
    }
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    tracker.scalars(
        result["selection"]["epoch"] or 0, {f"test/{name}": value for name, value in result["test"].items()}
    )
    run.finish(result)


def print_result(result: Mapping[str, Any], path: Path) -> None:
    """The results table and where everything is, on stdout."""
    print(judged_text(result, {f"{result['model']}, {result['arm']}": result["test"]}))
    if result["features"]["source"] == "random":
        print("features were random noise, as asked: the figures say nothing about the model")
    print(f"run directory   {path}")
