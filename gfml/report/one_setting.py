"""Which settings do for every data set of a study: from its searches, whose points are the same on each, and from rows run with
a program's own defaults.

``NAME-trials.csv`` has a line per trial: method, point, the validation figure that selects, its epoch and CPU seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gfml.report.reproduce import Cell, Known

Row = Mapping[str, str]
# A setting does for a data set where it keeps this share of what the search found there.
ENOUGH = 0.97
# The end of the label of a row that gives no setting.
DEFAULTS = ", defaults"


class Shared(NamedTuple):
    """A point and, by data set, its validation figure over the best one of the search there."""

    point: str
    shares: dict[str, float]

    @property
    def order(self) -> tuple[int, float]:
        """More data sets that it does for, then the higher lowest share."""
        return sum(share >= ENOUGH for share in self.shares.values()), min(self.shares.values())


def trial_rows(known: Sequence[Known]) -> list[dict[str, str]]:
    """A line per trial of every search that has ended."""
    from gfml.base.runs import cpu_seconds, read_result

    rows = []
    under_way = {one.cell.row for one in known if one.cell.point and one.state not in ("done", "failed")}
    for one in known:
        if one.cell.point and one.path and one.cell.row not in under_way:
            chosen = read_result(one.path)["selection"]
            rows.append(
                {"method": one.cell.row, "point": " ".join(one.cell.point), "value": f"{chosen['value']:.6g}",
                 "epoch": str(chosen["epoch"]), "cpu": f"{cpu_seconds(one.path):.0f}"}
            )  # fmt: skip
    return rows


def _values(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """The validation figure by method, data set and point."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        data, _, method = row["method"].partition(", ")
        values.setdefault(method, {}).setdefault(data, {})[row["point"]] = float(row["value"])
    return values


def shared_points(rows: Sequence[Row]) -> dict[str, list[Shared]]:
    """By method the points that all its searches tried, the best first; methods of one data set are left out."""
    found = {}
    for method, by_data in _values(rows).items():
        best = {data: max(own.values()) for data, own in by_data.items()}
        common = [point for point in next(iter(by_data.values())) if all(point in own for own in by_data.values())]
        shared = [Shared(point, {data: own[point] / best[data] for data, own in by_data.items()}) for point in common]
        if len(by_data) > 1 and shared:
            found[method] = sorted(shared, key=lambda one: one.order, reverse=True)
    return found


def untuned_shares(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By method and data set the median of a search's figures over their best: what a point gets that nobody has chosen."""
    return {
        method: {data: statistics.median(own.values()) / max(own.values()) for data, own in by_data.items()}
        for method, by_data in _values(rows).items()
    }


def default_shares(rows: Sequence[Row], cells: Sequence[Cell], metric: str) -> dict[str, dict[str, float]]:
    """By method and data set: the figure with the defaults over that of the tuned row it names first. Both on test, means of seeds."""
    figures = {row["method"]: float(row[metric]) for row in rows if row.get(metric)}
    found: dict[str, dict[str, float]] = {}
    for cell in cells:
        tuned = cell.against[0] if cell.label.endswith(DEFAULTS) and cell.against else None
        if tuned in figures and cell.label in figures:
            data, _, method = cell.label.removesuffix(DEFAULTS).partition(", ")
            found.setdefault(method, {})[data] = figures[cell.label] / figures[tuned]
    return found


def section(trials: Sequence[Row], rows: Sequence[Row], cells: Sequence[Cell], metric: str) -> str:
    """The part of a study's page; "" where nothing was searched and no row has the defaults."""
    shared = {method: points[0] for method, points in shared_points(trials).items()}
    parts = []
    if defaults := default_shares(rows, cells, metric):
        parts.append(
            f"What a program does when no setting is given, test {metric} over that of the tuned row, means of the seeds:\n\n"
            + _table({method: ("", shares) for method, shares in defaults.items()}, "")
        )
    if shared:
        parts.append(
            "Every search of a method tries the same points. The one that does for most data sets, its validation figure over the"
            " best of the search there:\n\n"
            + _table({method: (one.point, one.shares) for method, one in shared.items()}, "point")
        )
    if untuned := untuned_shares(trials):
        parts.append(
            "How much a method needs its search: the median of the trials over the best one. Spaces are in the study's table.\n\n"
            + _table({method: ("", shares) for method, shares in untuned.items()}, "")
        )
    return "\n\n".join(["### Settings", *parts]) if parts else ""


def _table(found: Mapping[str, tuple[str, Mapping[str, float]]], what: str) -> str:
    sets = list(dict.fromkeys(data for _, shares in found.values() for data in shares))
    head = ["method", *([what] if what else []), *sets, f"at least {ENOUGH:.0%}", "median"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, (point, shares) in found.items():
        enough = f"{sum(share >= ENOUGH for share in shares.values())} of {len(shares)}"
        cells = [f"{shares[data]:.3f}" if data in shares else "" for data in sets]
        named = [f"`{point}`"] if what else []
        lines.append(
            "| " + " | ".join([method, *named, *cells, enough, f"{statistics.median(shares.values()):.3f}"]) + " |"
        )
    return "\n".join(lines)
