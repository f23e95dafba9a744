"""The result of a run: what it holds, how it is stored and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cml_baseline.experiment import cut_offs, judge_split
from cml_baseline.table import read_epochs
from gfml.base.checkpoints import save_state
from gfml.base.files import atomic_open
from gfml.cml import MetricLearner
from gfml.data.interactions import Interactions
from gfml.engine.runs import Run
from gfml.engine.train import FitResult
from gfml.program.cli import Options
from gfml.program.steps import selection_of
from gfml.ranking.evaluation import Evaluation
from gfml.report.recommenders import (
    USUAL_METRICS,
    baseline_results,
    data_facts,
    list_names,
    other_conventions,
    table_columns,
    text_table,
)

# Recall of item groups, by popularity in train: the most popular fifth, the other 80 %, and items train never shows.
GROUPS = ("q1", "tail", "cold")


def judge(
    options: Options, data: Interactions, model: MetricLearner, fitted: FitResult | None, run: Run
) -> tuple[dict[str, Any], Evaluation]:
    """Everything that is reported, and the evaluation of test behind it.

    fitted None: weights were loaded, their selection is the stored result's.
    """
    test = judge_split(options, data, model, "test", beyond=True)
    names = [] if "none" in options.baselines else options.baselines
    result: dict[str, Any] = {
        "model": "cml" if model.features is None else "cml with features",
        "topks": list(options.topks),
        "data": data_facts(data),
        "selection": selection_of(fitted, run, refit=options.refit),
        "test": test.means,
        "cold_users": test.cold_users,
        "cold_items": int((data.item_popularity == 0).sum()),
        "baselines": baseline_results(names, data, cut_offs(options), cache_dir=Path(options.out) / "baselines"),
        "epochs": read_epochs(run.file("epochs.csv")),
    }
    if data.valid.nnz:
        result["val"] = judge_split(options, data, model, "valid", beyond=True).means
    if fitted is not None:
        result["seconds"] = {"train": fitted.train_seconds, "eval": fitted.eval_seconds}
    return result, test


def store(data: Interactions, model: MetricLearner, result: Mapping[str, Any], test: Evaluation, run: Run) -> None:
    """Write the reported weights, the arrays behind the report, and ``result.json``."""
    save_state(run.file("final.pt"), {"model": model.state_dict(), "selection": result["selection"]})
    user, item = (part.cpu().numpy() for part in model.vectors())
    arrays = {"item_popularity": data.item_popularity, "user_activity": data.user_activity, "test_users": test.users,
              "top": test.top.astype(np.int32), **list_names(data, test.users), "user": user, "item": item}  # fmt: skip
    if (offsets := model.offsets()) is not None:
        arrays["item_offset"] = offsets.cpu().numpy()
    if data.item_ids is not None:
        arrays["item_ids"] = np.asarray([str(name) for name in data.item_ids.tolist()])
    arrays |= {
        f"per_user/{name}": values.astype(np.float32) for name, values in test.per_user.items() if _is_kept(name)
    }
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    run.finish(result)


def _is_kept(name: str) -> bool:
    return "_" not in name or name.startswith(tuple(f"{group}_recall@" for group in ("head", *GROUPS)))


def print_result(result: Mapping[str, Any], path: Path) -> None:
    """The results table, the recall of item groups and where everything is, on stdout."""
    rows = {result["model"]: result["test"]}
    rows |= {name: found["test"] for name, found in result["baselines"].items() if "test" in found}
    selection, k = result["selection"], max(result["topks"])
    print(f"\ntest of {result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}; {USUAL_METRICS}")
    groups = [f"{group}_recall@{k}" for group in GROUPS if any(f"{group}_recall@{k}" in row for row in rows.values())]
    usual = [name for name in table_columns(rows, result["topks"]) if not name.startswith(("head_", "tail_"))]
    print(text_table(rows, usual))
    print(
        f"\nby popularity in train: q1 the most popular fifth, tail the other 80 %, cold {result['cold_items']:,} items without interactions"
    )
    print("\n".join([text_table(rows, groups), *other_conventions(rows)]))
    for name, found in result["baselines"].items():
        if "skipped" in found:
            print(f"{name} left out: {found['skipped']}")
    print(f"\nrun directory   {path}")
    for what, name in (
        ("epochs", "epochs.csv"),
        ("report", "report/report.html"),
        ("index", "ann"),
        ("TensorBoard", "tensorboard"),
    ):
        if (path / name).exists():
            print(f"{what:<15} {path / name}")
