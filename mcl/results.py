"""The result of a run: what it holds, how it is stored and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base.checkpoints import save_state
from gfml.base.files import atomic_open
from gfml.data.interactions import Interactions
from gfml.engine.runs import Run
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult
from gfml.program.cli import Options
from gfml.program.steps import cut_offs, selection_of
from gfml.ranking.evaluation import Evaluation
from gfml.report.recommenders import baseline_results, data_facts, judged_text, list_names, mass_report
from mcl.experiment import judge_split
from mcl.model import SCORES, MetricRecommender


def judge(
    options: Options, data: Interactions, model: MetricRecommender, fitted: FitResult | None, run: Run
) -> tuple[dict[str, Any], Evaluation]:
    """Everything that is reported, and the evaluation of test behind it.

    Models with masses are judged by both scores: "test" is that of ``--score``, "scores" holds both.
    fitted None: weights were loaded, their selection is the stored result's.
    """
    test = judge_split(options, data, model, "test", beyond=True)
    names = [] if "none" in options.baselines else options.baselines
    result: dict[str, Any] = {
        "model": f"{options.encoder} {options.mode}",
        "topks": list(options.topks),
        "data": data_facts(data),
        "selection": selection_of(fitted, run, refit=options.refit),
        "score": options.score,
        "test": test.means,
        "cold_users": test.cold_users,
        "baselines": baseline_results(
            names, data, cut_offs(options.topks, options.select_metric), cache_dir=Path(options.out) / "baselines"
        ),
    }
    if data.valid.nnz:
        result["val"] = judge_split(options, data, model, "valid", beyond=True).means
    if model.gravity is not None:
        others = {score: judge_split(options, data, model, "test", score=score, beyond=True).means for score in SCORES}
        norms = model.encoder.vectors()[1].detach().norm(dim=1).cpu().double().numpy()
        result |= {"scores": others, "mass": mass_report(model.gravity.mass, data, norms)}
    if fitted is not None:
        result["seconds"] = {"train": fitted.train_seconds, "eval": fitted.eval_seconds}
    return result, test


def store(
    data: Interactions,
    model: MetricRecommender,
    result: Mapping[str, Any],
    test: Evaluation,
    run: Run,
    tracker: Tracker,
) -> None:
    """Write the reported weights, the arrays behind comparisons between runs, and ``result.json``."""
    save_state(run.file("final.pt"), {"model": model.state_dict(), "selection": result["selection"]})
    arrays = {"item_popularity": data.item_popularity, "user_activity": data.user_activity, "test_users": test.users,
              "top": test.top.astype(np.int32), **list_names(data, test.users)}  # fmt: skip
    arrays |= {
        f"per_user/{name}": values.astype(np.float32) for name, values in test.per_user.items() if "_" not in name
    }
    if model.gravity is not None:
        mass = model.gravity.mass
        arrays |= {
            "item_log_mass": mass.log_item().detach().cpu().numpy(),
            "user_log_mass": mass.log_user().detach().cpu().numpy(),
        }
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    tracker.scalars(
        result["selection"]["epoch"] or 0, {f"test/{name}": value for name, value in result["test"].items()}
    )
    run.finish(result)


def print_result(result: Mapping[str, Any], path: Path) -> None:
    """The results table and where everything is, on stdout."""
    other = {score: means for score, means in result.get("scores", {}).items() if score != result["score"]}
    rows = {f"{result['model']}, by {result['score']}": result["test"]}
    rows |= {f"{result['model']}, by {score}": means for score, means in other.items()}
    print(judged_text(result, rows))
    mass = result.get("mass", {})
    if "item_spearman_popularity" in mass:
        print(f"item mass: Spearman {mass['item_spearman_popularity']:.3f} with popularity", end="")
        print(f", {mass['item_dead']:.0%} without gradient" if "item_dead" in mass else "")
    print(f"run directory   {path}")
