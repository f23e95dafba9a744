"""Paired tests between the rows of a table, at two levels that answer two questions.

users: for each seed, between the two trained models over the users both judged (``scripts/compare.py``): is the difference
more than chance in who the users are? seeds: a paired t-test over the seeds' differences: is it more than chance in
training? With one seed there is no test of the second kind.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gfml.report.compare import check_comparable, metrics_of
from gfml.report.compare import compare as compare_runs
from gfml.report.stored import read_runs

RESAMPLES = 2000


def paired_rows(
    pairs: Sequence[tuple[str, str]],
    runs: Mapping[tuple[str, int], Path],
    metrics: Sequence[str],
    stored: Sequence[Mapping[str, str]] = (),
) -> list[dict[str, str]]:
    """The tests of each pair (row, the row it is compared with) and metric, as rows of NAME-paired.csv.

    runs: the finished run of (label, seed). A pair with no seed in common, or with fewer than are stored, keeps its stored
    rows. ``p_holm`` is corrected over all tests of a level. UserError for runs that judged other users or lack a metric.
    """
    rows: list[dict[str, str]] = []
    for label, against in pairs:
        seeds = [seed for name, seed in runs if name == label and (against, seed) in runs]
        fresh = _users(label, against, seeds, runs, metrics)
        for metric in metrics:
            users = [row for row in fresh if row["metric"] == metric]
            kept = [row for row in stored if (row["row"], row["against"], row["metric"]) == (label, against, metric)]
            rows += [*users, _seeds(users)] if users and len(users) >= len(kept) - 1 else map(dict, kept)
    return _corrected(rows)


def _users(
    label: str, against: str, seeds: Sequence[int], runs: Mapping[tuple[str, int], Path], metrics: Sequence[str]
) -> list[dict[str, str]]:
    """A row per seed and metric."""
    rows = []
    for seed in seeds:
        second, first = read_runs([runs[label, seed], runs[against, seed]])
        check_comparable(first, second)
        for found in compare_runs([(first, second)], metrics_of([first, second], metrics), RESAMPLES):
            facts = {
                "row": label,
                "against": against,
                "metric": found["metric"],
                "level": "users",
                "seed": str(seed),
                "n": str(found["users"]),
            }
            numbers = {name: found[name] for name in ("mean", "mean_against", "difference", "low", "high")} | {
                "p": found["p_wilcoxon"]
            }
            rows.append(facts | {name: f"{value:.6g}" for name, value in numbers.items()})
    return rows


def _seeds(users: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The row over seeds of one pair and metric."""

    from gfml.metrics.compare import paired_tests

    found = {key: users[0][key] for key in ("row", "against", "metric")} | {"level": "seeds", "n": str(len(users))}
    means = {name: [float(row[name]) for row in users] for name in ("mean", "mean_against", "difference")}
    numbers = {name: statistics.mean(values) for name, values in means.items()}
    if len(users) > 1:
        tests = paired_tests(np.array(means["difference"]), np.zeros(len(users)))
        numbers |= {"std": statistics.stdev(means["difference"]), "p": tests.t_pvalue}
    return found | {name: f"{value:.6g}" for name, value in numbers.items()}


def _corrected(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with ``p_holm``, over all tests of the same level."""

    from gfml.metrics.compare import holm

    for level in ("users", "seeds"):
        tested = [row for row in rows if row["level"] == level and row.get("p")]
        adjusted = holm(np.array([float(row["p"]) for row in tested]))
        for row, value in zip(tested, adjusted.tolist(), strict=True):
            row["p_holm"] = f"{value:.6g}"
    return rows
