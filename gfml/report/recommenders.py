"""What every recommender result holds beside the model's own metrics: baselines, masses, the printed table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base.errors import UserError
from gfml.base.files import write_json
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.gravity import Mass
from gfml.metrics.beyond import kendall, spearman
from gfml.ranking import baselines
from gfml.ranking.evaluation import USUAL, Definitions, Evaluation, evaluate
from gfml.ranking.ials import ials

USUAL_METRICS = "metrics of this project (docs/metrics.md)"
# What each baseline is tuned over on validation.
GRIDS: dict[str, baselines.Grid] = {
    "popularity": {},
    "item-knn": {"k": (5, 10, 20, 50, 100, 200, 500), "shrink": (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)},
    "ease": {"l2": (10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)},
    "ials": {
        "alpha0": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        "l2": (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5),
    },
}
# Figures of the tables, best first in a reader's interest; those a result lacks are left out.
TABLE_METRICS = ("recall", "ndcg", "graded_ndcg", "head_recall", "tail_recall", "coverage", "gini", "arp")
BASELINE_FORMAT = 3
# One line each: the columns that tables of recommenders may have. K is the list length after the @.
GLOSSARY = {
    "recall": "share of a user's held-out items among the first K; mean over users",
    "ndcg": "the same with hits near the top counting more (1 / log2(rank + 1)), divided by its best possible value",
    "graded_ndcg": "the same with every hit weighed by a gain of its rating",
    "precision": "share of the first K that are held-out items",
    "hit": "share of users with at least one held-out item among the first K",
    "mrr": "one over the rank of the first hit within K, 0 without one",
    "map": "mean over the hits within K of the precision at their ranks",
    "head_recall": "recall counting only the most popular 20 % of items; mean over users with such items",
    "tail_recall": "recall counting only the other 80 % of items",
    "cold_recall": "recall counting only items that train never shows; mean over users with such items",
    "coverage": "share of the catalogue that is recommended to anyone",
    "gini": "how unevenly items are recommended: 0 all alike, near 1 a few take every slot",
    "arp": "average recommendation popularity: train interactions of the recommended items, mean over lists",
}


def baseline_results(
    names: Sequence[str],
    data: Interactions,
    ks: Sequence[int],
    *,
    cache_dir: Path | None = None,
    memory_gib: float = 3.0,
    seed: int = 2020,
    grids: Mapping[str, baselines.Grid] | None = None,
    definitions: Definitions = USUAL,
) -> dict[str, dict[str, Any]]:
    """Test metrics of simple recommenders: {name: {"test": means, "settings", "tried", "seconds"} or {"skipped": why}}.

    names: keys of :data:`GRIDS`, whose values are searched by ndcg@20 on validation (on a part cut from train when
    the data has none), with those of ``grids`` in their place where given; ``tried`` points were judged. The model is
    then built on ``data.train``, as a learned model is. Results are kept in ``cache_dir`` by the data's fingerprint.
    ease is skipped, with the reason, where its matrix exceeds memory_gib. definitions: of the test figures.
    """
    found = {}
    for name in names:
        file = None if cache_dir is None else cache_dir / f"baseline-{name}-{data.fingerprint[:16]}.json"
        grid = {**GRIDS[name], **((grids or {}).get(name) or {})}
        searched = {setting: list(values) for setting, values in grid.items()}
        key = {
            "format": BASELINE_FORMAT,
            "ks": list(ks),
            "seed": seed,
            "memory_gib": memory_gib,
            "grid": searched,
            "definitions": asdict(definitions),
        }
        stored = _stored(file, json.loads(json.dumps(key)))
        if stored is None:
            stored = _judge_baseline(name, data, ks, memory_gib, seed, grid, definitions)
            if file is not None:
                write_json(file, {"key": key, "result": stored})
        found[name] = stored
    return found


def mass_report(mass: Mass, data: Interactions, item_norm: np.ndarray) -> dict[str, float]:
    """How learned masses relate to popularity (and to the true masses of generated data).

    Rank correlations over items (users) with at least one train interaction; NaNs are left out. ``dead`` is the
    share of relu masses without gradient. item_norm [I]: lengths of the item vectors.
    """
    report: dict[str, float] = {}
    sides = (("item", mass.item, data.item_popularity, data.true_item_mass),
             ("user", mass.user, data.user_activity, data.true_user_mass))  # fmt: skip
    for side, raw, count, truth in sides:
        if raw is None:
            continue
        values = (mass.log_item() if side == "item" else mass.log_user()).detach().cpu().double().numpy()
        seen = count > 0
        report |= {
            f"{side}_log_mass_mean": float(values.mean()),
            f"{side}_log_mass_std": float(values.std()),
            f"{side}_spearman_popularity": spearman(values[seen], count[seen]),
            f"{side}_kendall_popularity": kendall(values[seen], count[seen]),
        }
        if truth is not None:
            report[f"{side}_spearman_true"] = spearman(values[seen], truth[seen])
        if mass.param == "relu":
            report[f"{side}_dead"] = float((raw <= 0).double().mean())
    seen = data.item_popularity > 0
    report["item_norm_spearman_popularity"] = spearman(item_norm[seen], data.item_popularity[seen])
    return {key: value for key, value in report.items() if value == value}


def data_facts(data: Interactions) -> dict[str, Any]:
    """Sizes and origin, for results."""
    return {
        "name": data.name,
        "num_users": data.num_users,
        "num_items": data.num_items,
        "train": data.train.nnz,
        "valid": data.valid.nnz,
        "test": data.test.nnz,
        "fingerprint": data.fingerprint,
        "test_fingerprint": data.part_fingerprint("test"),
        "notes": {key: str(value) for key, value in data.notes.items()},
        "statistics": data_statistics(data),
    }


def data_statistics(data: Interactions) -> dict[str, float]:
    """Actions per user and item over all parts, and the share of empty cells of the matrix."""
    total = data.train.nnz + data.valid.nnz + data.test.nnz
    found: dict[str, float] = {"sparsity": 1 - total / (data.num_users * data.num_items)}
    parts = [data.train, data.valid, data.test]
    for side, axis in (("user", 1), ("item", 0)):
        counts = sum(np.asarray(part.sum(axis=axis)).ravel() for part in parts)
        found |= {f"actions_per_{side}": total / len(counts), f"actions_per_{side}_median": float(np.median(counts))}
    return found


def data_lines(data: Interactions) -> list[str]:
    """Sizes, density and notes of the data, for people."""
    found = data_statistics(data)
    return [
        f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
        f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
        f"actions per user {found['actions_per_user']:.1f} (median {found['actions_per_user_median']:g}), per item "
        f"{found['actions_per_item']:.1f} (median {found['actions_per_item_median']:g}); sparsity {found['sparsity']:.2%}",
        *(f"note: {key}: {value}" for key, value in data.notes.items()),
    ]


def table_columns(
    rows: Mapping[str, Mapping[str, float]], ks: Sequence[int], metrics: Sequence[str] = TABLE_METRICS
) -> list[str]:
    """The metric names a table shows: the usual figures at every K (beyond accuracy at the largest only)."""
    wide = ("recall", "ndcg", "precision", "map", "graded_ndcg")
    wanted = [f"{name}@{k}" for name in metrics for k in (ks if name in wide else ks[-1:])]
    return [name for name in wanted if any(name in row for row in rows.values())]


def text_table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    """Aligned plain text; a missing figure is a dash."""
    width = max(len("method"), *(len(name) for name in rows))
    lines = ["  ".join([f"{'method':<{width}}", *columns])]
    for name, row in rows.items():
        cells = [f"{_figure(row.get(column)):>{len(column)}}" for column in columns]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def judged_text(result: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]) -> str:
    """What a program prints of a result: how it was selected, the table of ``rows`` and the baselines, what was left out."""
    baselines, selection = result["baselines"], result["selection"]
    every = {**rows, **{name: found["test"] for name, found in baselines.items() if "test" in found}}
    lines = [
        f"\ntest of {result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}; {USUAL_METRICS}"
    ]
    lines.append(text_table(every, table_columns(every, result["topks"])))
    lines += other_conventions(every) + equal_rows(result)
    for name, found in baselines.items():
        if "skipped" in found:
            lines.append(f"{name} left out: {found['skipped']}")
        elif found["settings"]:
            chosen = ", ".join(f"{setting} {value:g}" for setting, value in found["settings"].items())
            lines.append(f"{name}: {chosen} (best on validation of {found['tried']} points tried)")
    return "\n".join(lines)


def equal_rows(result: Mapping[str, Any]) -> list[str]:
    """A line where two baselines have the same figures: where they know nothing of the users, both rank by item number."""
    tests = {name: found["test"] for name, found in result["baselines"].items() if "test" in found}
    groups = [[name for name in tests if tests[name] == test] for test in tests.values()]
    cold = result.get("cold_users", 0)
    return [
        f"{' and '.join(group)} have the same figures: of the {cold:,} judged users without train interactions they know "
        "nothing, so all items tie and are listed in the order of their numbers"
        for group in {tuple(group): group for group in groups if len(group) > 1}.values()
        if cold
    ]


def other_conventions(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table for each convention of ``--metrics-as`` that some row has figures of, under its name."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row if ":" in name))
    lines = []
    for convention in dict.fromkeys(name.partition(":")[0] for name in columns):
        own = [name for name in columns if name.startswith(f"{convention}:")]
        lines.append(f"\nmetrics as {convention} defines them (docs/metrics.md)")
        having = {name: row for name, row in rows.items() if any(column in row for column in own)}
        width = max(len(name) for name in own)
        lines.append("  ".join([f"{'metric':<{width}}", *(f"{name:<6}" for name in having)]))
        for column in own:
            cells = [f"{_figure(row.get(column)):<{max(len(name), 6)}}" for name, row in having.items()]
            lines.append("  ".join([f"{column:<{width}}", *cells]).rstrip())
    return lines


def list_names(data: Interactions, users: np.ndarray) -> dict[str, np.ndarray]:
    """What the data calls these users and all items, for analysis.npz: then the lists can be judged against files."""
    named = {"user_names": data.user_ids[users] if data.user_ids is not None else None, "item_names": data.item_ids}
    return {name: ids for name, ids in named.items() if ids is not None}


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _stored(file: Path | None, key: Mapping[str, Any]) -> dict[str, Any] | None:
    if file is None or not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # cut short by a full disk of old: computed again and replaced
    return content.get("result") if isinstance(content, dict) and content.get("key") == key else None


def _judge_baseline(
    name: str,
    data: Interactions,
    ks: Sequence[int],
    memory_gib: float,
    seed: int,
    grid: baselines.Grid,
    definitions: Definitions,
) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        settings, scores = tuned_baseline(name, data, grid, memory_gib=memory_gib, seed=seed)
        scorer = build_baseline(name, data, settings, memory_gib=memory_gib)
    except UserError as error:
        return {"skipped": str(error)}
    judged: Evaluation = evaluate(scorer, data, "test", ks, beyond=True, definitions=definitions)
    return {
        "test": judged.means, "settings": settings, "tried": len(scores), "seconds": time.perf_counter() - started,
    }  # fmt: skip


def build_baseline(name: str, data: Interactions, settings: Mapping[str, Any], *, memory_gib: float = 3.0) -> Any:
    """The scorer of a simple recommender of :data:`GRIDS` with these settings, on ``data.train``."""
    builders: dict[str, Callable[..., Any]] = {
        "popularity": baselines.popularity,
        "item-knn": baselines.item_knn,
        "ease": partial(baselines.ease, memory_gib=memory_gib),
        "ials": ials,
    }
    return builders[name](data, **settings)


def tuned_baseline(
    name: str, data: Interactions, grid: baselines.Grid, *, memory_gib: float = 3.0, seed: int = 2020
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], float]]]:
    """Settings chosen by ndcg@20 on validation (see :func:`baseline_results`), and every point tried with its value."""
    if not grid:
        return {}, []
    chooser = data if data.valid.nnz else replace(data, valid=_nothing_like(data)).with_validation(0.1, seed)
    found = baselines.select(
        lambda **settings: build_baseline(name, chooser, settings, memory_gib=memory_gib), chooser, grid
    )
    return found.settings, found.scores


def _nothing_like(data: Interactions) -> Any:
    empty = np.empty(0, np.int64)
    return csr_from_pairs(empty, empty, data.num_users, data.num_items)
