"""The result of a run: what it holds, how it is stored and how it is printed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfml.base.checkpoints import save_state
from gfml.base.files import atomic_open
from gfml.data.interactions import Interactions
from gfml.engine.runs import Run
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult
from gfml.program.cli import Options
from gfml.program.steps import cut_offs, definitions_of, selection_of
from gfml.ranking.evaluation import Evaluation, evaluate
from gfml.report.recommenders import baseline_results, data_facts, judged_text, list_names, mass_report, table_columns
from recsys.experiment import scorer_of
from recsys.model import Recommender

MASS_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def judge(
    options: Options, data: Interactions, model: Recommender, fitted: FitResult | None, run: Run
) -> dict[str, Any]:
    """Everything that is reported: metrics of both parts, baselines, masses, and how the epoch was selected.

    fitted None: weights were loaded, their selection is the stored result's.
    """
    started = time.perf_counter()
    test = evaluation(options, data, model, "test")
    result: dict[str, Any] = {
        "model": f"{options.model} {options.loss_mode}",
        "topks": list(options.topks),
        "data": data_facts(data),
        "selection": selection_of(fitted, run, refit=options.refit),
        "test": test.means,
        "cold_users": test.cold_users,
    }
    if data.valid.nnz:
        result["val"] = evaluation(options, data, model, "valid").means
    names = [] if "none" in options.baselines else options.baselines
    result["baselines"] = baseline_results(
        names, data, cut_offs(options.topks, options.es_metric), cache_dir=Path(options.out) / "baselines"
    )
    if model.ranks_by_gravity and model.gravity.mass.mode != "none":
        norms = model.encoder.vectors()[1].detach().norm(dim=1).cpu().double().numpy()
        result["mass"] = mass_report(model.gravity.mass, data, norms)
        result["mass_curve"] = _mass_curve(options, data, model)
    result["seconds"] = {"report": time.perf_counter() - started}
    if fitted is not None:
        result["seconds"] |= {"train": fitted.train_seconds, "eval": fitted.eval_seconds}
    result["_test_evaluation"] = test
    return result


def evaluation(options: Options, data: Interactions, model: Recommender, split: str) -> Evaluation:
    """Accuracy and beyond of one part."""
    device = model.encoder.nodes.device
    return evaluate(
        scorer_of(options, model),
        data,
        split,
        cut_offs(options.topks, options.es_metric),
        beyond=True,
        device=device,
        definitions=definitions_of(options, judging=True),
    )


def store(
    options: Options, data: Interactions, model: Recommender, result: dict[str, Any], run: Run, tracker: Tracker
) -> None:
    """Write the reported weights, the arrays behind the report, ``result.json`` and the report itself."""
    test: Evaluation = result.pop("_test_evaluation")
    save_state(run.file("final.pt"), {"model": model.state_dict(), "selection": result["selection"]})
    arrays = _arrays(data, model, test)
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    if options.tensorboard:
        _write_tensorboard(data, model, result, tracker)
    run.finish(result)
    if options.report:
        from recsys.report import write_report

        write_report([run.path], run.file("report"))


def print_result(result: Mapping[str, Any], path: Path) -> None:
    """The results table and where everything is, on stdout."""
    print(judged_text(result, {result["model"]: result["test"]}))
    _print_masses(result.get("mass", {}))
    print(f"run directory   {path}")
    for what, name in (("report", "report/report.html"), ("plots", "report"), ("TensorBoard", "tensorboard")):
        if (path / name).exists():
            print(f"{what:<15} {path / name}")


def _print_masses(mass: Mapping[str, float]) -> None:
    if "item_spearman_popularity" in mass:
        print(f"item mass: Spearman {mass['item_spearman_popularity']:.3f} with popularity", end="")
        print(f", {mass['item_spearman_true']:.3f} with the true mass" if "item_spearman_true" in mass else "")


def _mass_curve(options: Options, data: Interactions, model: Recommender) -> dict[str, Any] | None:
    """Overall, head and tail recall as the item masses are damped: on validation, so that test stays unread."""
    if model.gravity.mass.item is None:
        return None
    split, k = "valid" if data.valid.nnz else "test", max(options.topks)
    names = (f"recall@{k}", f"ndcg@{k}", f"head_recall@{k}", f"tail_recall@{k}", f"arp@{k}")
    points = []
    for scale in MASS_SCALES:
        scorer = model.scorer(options.infer_mode, scale)
        means = evaluate(scorer, data, split, [k], beyond=True, device=model.encoder.nodes.device).means
        points.append({"mass_scale": scale} | {name: means[name] for name in names if name in means})
    return {"split": split, "points": points}


def _arrays(data: Interactions, model: Recommender, test: Evaluation) -> dict[str, np.ndarray]:
    """What the report and comparisons between runs read."""
    arrays = {"item_popularity": data.item_popularity, "user_activity": data.user_activity, "test_users": test.users,
              "top": test.top.astype(np.int32), **list_names(data, test.users)}  # fmt: skip
    arrays |= {
        f"per_user/{name}": values.astype(np.float32) for name, values in test.per_user.items() if _is_kept(name)
    }
    mass = model.gravity.mass
    if model.ranks_by_gravity:
        arrays |= {"item_log_mass": _numpy(mass.log_item())} if mass.item is not None else {}
        arrays |= {"user_log_mass": _numpy(mass.log_user())} if mass.user is not None else {}
    if data.true_item_mass is not None:
        arrays |= {"true_item_mass": data.true_item_mass, "true_user_mass": data.true_user_mass}
    return arrays


def _is_kept(name: str) -> bool:
    """Values per user for intervals and tests: the accuracies, of head and tail too, and the lists' statistics."""
    return "_" not in name or name.startswith(("head_recall@", "tail_recall@"))


def _write_tensorboard(data: Interactions, model: Recommender, result: Mapping[str, Any], tracker: Tracker) -> None:
    epoch = result["selection"]["epoch"] or 0
    shown = table_columns({"test": result["test"]}, result["topks"])
    tracker.scalars(epoch, {f"test/{name}": result["test"][name] for name in shown})
    mass = model.gravity.mass
    if mass.item is not None:
        tracker.histogram("mass/item", mass.log_item(), epoch)
    if mass.user is not None:
        tracker.histogram("mass/user", mass.log_user(), epoch)
    popular = torch.from_numpy(np.argsort(-data.item_popularity, kind="stable")[:2000].copy())
    names = popular.numpy() if data.item_ids is None else data.item_ids[popular.numpy()]
    labels = [[name, int(data.item_popularity[i])] for name, i in zip(names, popular.tolist(), strict=True)]
    items = model.encoder.vectors()[1].detach().cpu()[popular]
    tracker.projector("items", items, labels, columns=["item", "train interactions"], step=epoch)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
