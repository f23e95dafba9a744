"""The result of a run or of eval.py: what it holds, how it is stored and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfml.base.checkpoints import load_state, save_state
from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.data.interactions import Interactions
from gfml.engine.runs import Run
from gfml.engine.train import FitResult
from gfml.program.cli import Options
from gfml.program.steps import definitions_of
from gfml.ranking.evaluation import Evaluation, evaluate
from gfml.report.recommenders import baseline_results, data_facts, list_names, other_conventions, text_table
from hlrm.experiment import build_model, model_name, scorer_of
from hlrm.metrics import cohort_metrics, cohorts
from hlrm.model import RelationModel

# Our metric names for the columns of the printed tables, which are the port's.
COLUMNS = {"HitRate": "hit", "MAP": "map", "MRR": "mrr", "NDCG": "ndcg", "PREC": "precision", "REC": "recall"}
PAPER_COLUMNS = {"HitRate": "hitrate", "MAP": "map", "MRR": "mrr", "NDCG": "ndcg", "PREC": "prec", "REC": "rec",
                 "NDCG local": "ndcg_local", "MMR": "mmr"}  # fmt: skip


def judge(options: Options, data: Interactions, model: RelationModel, split: str) -> tuple[dict[str, Any], Evaluation]:
    """Both protocols on one part, and the evaluation behind them.

    ``<split>``: full catalogue, every user of the part, usual definitions (and figures beyond accuracy).
    "sampled": the paper's protocol: cohorts of random users, the published formulas, means and deviations over cohorts.
    Both rank the whole catalogue; "sampled" samples users. They share one ranking.
    """
    found = evaluate(
        scorer_of(options, data, model, split),
        data,
        split,
        options.topk,
        beyond=True,
        mask_seen=options.mask_seen,
        device=model.encoder.nodes.device,
        definitions=definitions_of(options, judging=True),
    )
    groups = cohorts(len(found.users), options.eval_size, options.num_cohorts, options.split_seed)
    relevant, sampled = data.split(split)[found.users], {}
    for k in options.topk:
        sampled |= cohort_metrics(found.top, relevant, data.item_popularity, k, groups, whole_list=bool(options.compat))
    result = {
        "val" if split == "valid" else split: found.means,
        "sampled": sampled,
        "protocol": {
            "split": split,
            "users": len(found.users),
            "cohorts": len(groups),
            "cohort_size": len(groups[0]),
            "seen items": "left out" if options.mask_seen else "recommended too, as in the port",
        },
        "cold_users": found.cold_users,
    }
    return result, found


def report(options: Options, data: Interactions, model: RelationModel, split: str) -> tuple[dict[str, Any], Evaluation]:
    """:func:`judge` with the model's name, the data and the baselines."""
    found, evaluation = judge(options, data, model, split)
    names = [] if "none" in options.baselines or split != "test" or not options.mask_seen else options.baselines
    simple = baseline_results(names, data, options.topk, cache_dir=Path(options.out) / "baselines")
    result = {"model": model_name(options), "topks": list(options.topk), "data": data_facts(data), **found}
    return result | {"baselines": simple}, evaluation


def store(options: Options, data: Interactions, model: RelationModel, fitted: FitResult, run: Run) -> dict[str, Any]:
    """Judge the selected weights, write them, the arrays behind the report and ``result.json``; returns the result."""
    result, test = report(options, data, model, "test")
    result["selection"] = fitted.selection()
    result["seconds"] = {"train": fitted.train_seconds, "eval": fitted.eval_seconds}
    save_model(run.file("final.pt"), options, data, model, result["selection"])
    if options.save_model:
        save_model(Path(options.save_dir), options, data, model, result["selection"])
    arrays = {"item_popularity": data.item_popularity, "user_activity": data.user_activity, "test_users": test.users,
              "top": test.top.astype(np.int32), **list_names(data, test.users)}  # fmt: skip
    arrays |= {
        f"per_user/{name}": values.astype(np.float32) for name, values in test.per_user.items() if "_" not in name
    }
    with atomic_open(run.file("analysis.npz"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    run.finish(result)
    return result


def save_model(
    path: Path, options: Options, data: Interactions, model: RelationModel, selection: Mapping[str, Any]
) -> None:
    """Weights with everything eval.py needs: flags, and which data they were trained on."""
    flags = {name: value for name, value in vars(options).items() if name not in ("resolved", "config")}
    save_state(path, {
        "model": model.state_dict(), "options": flags, "data": data.fingerprint, "selection": dict(selection),
    })  # fmt: skip


def read_model(path: Path) -> tuple[dict[str, Any], Path]:
    """What :func:`save_model` wrote, from the file or from the run directory that holds it, and the file."""
    file = path / "final.pt" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no saved model {file}: train one with hlrm/train.py, or give --save_dir FILE")
    saved = load_state(file)
    if not {"model", "options", "data", "selection"} <= saved.keys():
        raise UserError(
            f"{file} was not written by hlrm/train.py (it holds {', '.join(sorted(saved))}): give another --save_dir"
        )
    return saved, file


def restore(
    options: Options, data: Interactions, saved: Mapping[str, Any], file: Path, device: torch.device
) -> RelationModel:
    """The saved model, in eval mode. UserError when data or shapes are others."""
    if saved["data"] != data.fingerprint:
        raise UserError(
            f"{file} was trained on other data ({saved['data'][:12]}) than {data.name} ({data.fingerprint[:12]}): "
            "give the data and the split of its training"
        )
    model = build_model(options, data, device, start=False)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise UserError(
            f"{file} holds a model of another shape ({str(error).splitlines()[-1].strip()}): give its own flags"
        ) from None
    return model.eval()


def print_result(result: Mapping[str, Any], where: str) -> None:
    """The tables of both protocols, and where everything is, on stdout."""
    protocol, selection = result["protocol"], result["selection"]
    split = "val" if protocol["split"] == "valid" else "test"
    print(f"\n{protocol['split']} of {result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}")
    judged = f"{protocol['users']} users, seen items {protocol['seen items']}"
    print(f"\nfull catalogue, all {judged}, usual definitions")
    rows = {result["model"]: result[split]}
    rows |= {name: found["test"] for name, found in result["baselines"].items() if "test" in found}
    _print_tables(rows, COLUMNS, result["topks"])
    print("\n".join(other_conventions(rows)), end="")
    groups = f"{protocol['cohorts']} cohorts of {protocol['cohort_size']} of these users"
    print(f"\nsampled users as in the paper, {groups}, published formulas")
    sampled = result["sampled"].items()
    rows = {f"{result['model']}, {kind}": {name: value[kind] for name, value in sampled} for kind in ("mean", "std")}
    _print_tables(rows, PAPER_COLUMNS, result["topks"])
    print(where)


def _print_tables(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str], ks: Sequence[int]) -> None:
    """One table for every K, under the port's names."""
    for k in ks:
        named = {
            name: {f"{shown}@{k}": means[f"{ours}@{k}"] for shown, ours in columns.items() if f"{ours}@{k}" in means}
            for name, means in rows.items()
        }
        print(text_table(named, list(next(iter(named.values())))))
