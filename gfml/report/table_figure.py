"""The figure of a table: its rows in groups, published values beside them, and what each row changes.

Rows that are compared with one another (``against`` in the table's file), such as a model's with and without mirror gradient,
form a group. For each metric the left panel shows the rows' figures, the right one their differences, in percent, to the
first of the rows they are compared with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gfml.base.files import atomic_open
from gfml.report.page import COLORS, GREYS, legend_below, panels, png, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Places between two groups, in places of a row; inches of a place, and of what lies above and below all of them.
GAP, PLACE, AROUND = 1.0, 0.135, 1.5
WIDTH, DPI = 10.0, 100


@dataclass(frozen=True)
class Drawn:
    """What a figure shows. rows: the table's stored rows by label, the published ones too.

    first: the row that a row's difference is to; papers: the published row beside it; tests: the rows of NAME-paired.csv,
    of which each pair's last is that over seeds.
    """

    rows: Mapping[str, Mapping[str, str]]
    labels: Sequence[str]
    first: Mapping[str, str]
    papers: Mapping[str, str]
    tests: Sequence[Mapping[str, str]]

    def value(self, label: str | None, name: str) -> float | None:
        """A stored figure; None where there is none."""
        text = self.rows.get(label or "", {}).get(name)
        return float(text) if text else None

    def change(self, label: str, metric: str) -> tuple[float, float, float] | None:
        """Difference of a row and the ends of its bar, in percent: ± standard deviation or, of one seed, interval over users."""
        found = [
            test
            for test in self.tests
            if (test["row"], test["against"], test["metric"]) == (label, self.first.get(label), metric)
        ]
        if not found or not float(found[-1]["mean_against"]):
            return None
        *users, total = found
        middle = float(total["difference"])
        if len(users) == 1:
            ends = [float(users[0]["low"]), float(users[0]["high"])]
        else:
            ends = [middle - float(total["std"]), middle + float(total["std"])]
        middle, low, high = (100 * value / float(total["mean_against"]) for value in (middle, *ends))
        return middle, low, high

    def published_change(self, label: str, metric: str) -> float | None:
        """The same of the published rows."""
        ours, theirs = (self.value(self.papers.get(name or ""), metric) for name in (label, self.first.get(label)))
        return None if ours is None or not theirs else 100 * (ours / theirs - 1)


def write_figure(path: Path, drawn: Drawn, metrics: Sequence[str]) -> None:
    """Write the figure; nothing where no row has one of the metrics."""
    known = [metric for metric in metrics if any(_has(drawn, label, metric) for label in drawn.labels)]
    if known:
        picture = png(draw(drawn, known), dpi=DPI)
        with atomic_open(path, "wb") as stream:
            stream.write(picture)


def _has(drawn: Drawn, label: str, metric: str) -> bool:
    return any(drawn.value(name, metric) is not None for name in (label, drawn.papers.get(label)))


def groups_of(labels: Sequence[str], first: Mapping[str, str]) -> list[list[str]]:
    """Labels that are compared with one another, directly or through others, together; in the order given."""
    linked = {label: {label} for label in labels}
    for label, other in first.items():
        joined = linked[label] | linked[other]
        linked |= dict.fromkeys(joined, joined)
    return [
        list(group)
        for group in dict.fromkeys(tuple(name for name in labels if name in linked[label]) for label in labels)
    ]


def names_of(group: Sequence[str]) -> tuple[str, list[str]]:
    """What the labels of a group begin with, and what each has besides: "plain" for nothing."""
    start = os.path.commonprefix(list(group))
    return start.strip(" ,+"), [label[len(start) :].strip(" ,+") or "plain" for label in group]


@dataclass(frozen=True)
class Layout:
    """Where rows stand. places, kinds and colors by label (kind: the row's name within its group); middles by group; height in places."""

    places: Mapping[str, float]
    kinds: Mapping[str, str]
    colors: Mapping[str, str]
    middles: Mapping[str, float]
    edges: Sequence[float]
    height: float


def layout_of(drawn: Drawn, metrics: Sequence[str]) -> Layout:
    """The rows with a figure in one of the metrics, their own or published, in groups from top to bottom."""
    places: dict[str, float] = {}
    kinds: dict[str, str] = {}
    middles: dict[str, float] = {}
    edges: list[float] = []
    top = 0.0
    for group in groups_of(drawn.labels, drawn.first):
        name, rest = names_of(group)
        kinds |= dict(zip(group, rest, strict=True))
        shown = [label for label in group if any(_has(drawn, label, metric) for metric in metrics)]
        if shown:
            places |= {label: top + number for number, label in enumerate(shown)}
            middles[name] = top + (len(shown) - 1) / 2
            top += len(shown) + GAP
            edges.append(top - 0.5 - GAP / 2)
    series = list(dict.fromkeys(kinds[label] for label in places))
    colors = {label: COLORS[series.index(kinds[label]) % len(COLORS)] for label in places}
    return Layout(places, kinds, colors, middles, edges[:-1], top - GAP)


@styled
def draw(drawn: Drawn, metrics: Sequence[str]) -> Figure:
    """A line of panels for each metric."""
    layout = layout_of(drawn, metrics)
    differs = any(label in drawn.first for label in layout.places)
    figure, axes = panels(len(metrics), 2 if differs else 1, width=WIDTH, height=AROUND + PLACE * layout.height)
    for line, metric in zip(axes, metrics, strict=True):
        _values(line[0], drawn, metric, layout)
        if differs:
            _changes(line[1], drawn, metric, layout)
        for axis in line:
            axis.set_yticks(
                list(layout.middles.values()), list(layout.middles) if axis is line[0] else [""] * len(layout.middles)
            )
            axis.set_ylim(layout.height - 0.2, -0.8)
            axis.tick_params(axis="y", length=0)
            axis.grid(False, axis="y")
            for edge in layout.edges:
                axis.axhline(edge, color="#8d929b40", linewidth=0.8)
    _legend(figure, axes[0, 0], drawn, metrics, layout)
    return figure


def _values(axis: Axes, drawn: Drawn, metric: str, layout: Layout) -> None:
    """Figures with their standard deviation over seeds, published values, and what needs no training."""
    for label, place in layout.places.items():
        value, paper = drawn.value(label, metric), drawn.value(drawn.papers.get(label), metric)
        if value is not None:
            spread = drawn.value(label, f"{metric} std")
            axis.errorbar(value, place, xerr=spread, fmt="o", color=layout.colors[label], markersize=5, capsize=2)
        if paper is not None:
            axis.plot(paper, place, "D", color=layout.colors[label], markerfacecolor="none", markersize=6)
    simple = [
        name
        for name, row in drawn.rows.items()
        if row["protocol"] == "no training" and name not in drawn.labels and row.get(metric)
    ]
    for number, name in enumerate(simple):
        style = ("--", ":", "-.")[number % 3]
        axis.axvline(float(drawn.rows[name][metric]), color=GREYS[0], linewidth=1, linestyle=style, label=name)
    axis.set(title=f"{metric} on test", xlabel="mean ± standard deviation over seeds")


def _changes(axis: Axes, drawn: Drawn, metric: str, layout: Layout) -> None:
    """Differences with their bars, and the published ones."""
    for label, place in layout.places.items():
        change, paper = drawn.change(label, metric), drawn.published_change(label, metric)
        if change is not None:
            middle, low, high = change
            axis.plot([low, high], [place, place], color=layout.colors[label], linewidth=1.8)
            axis.plot(middle, place, "o", color=layout.colors[label], markersize=5)
        if paper is not None:
            axis.plot(paper, place, "D", color=layout.colors[label], markerfacecolor="none", markersize=6)
    axis.axvline(0, color="#8d929b", linewidth=1)
    against = dict.fromkeys(layout.kinds[drawn.first[label]] for label in layout.places if label in drawn.first)
    bars = "%; bar: ± standard deviation over seeds,\nor 95 % interval over users of one seed"
    axis.set(title=f"Change to {' or '.join(against)}", xlabel=bars)


def _legend(figure: Figure, axis: Axes, drawn: Drawn, metrics: Sequence[str], layout: Layout) -> None:
    """What colours and marks mean, below the figure."""
    series = {layout.kinds[label]: color for label, color in layout.colors.items()}
    for kind, color in series.items() if len(series) > 1 else ():
        axis.plot([], [], "o", color=color, label=kind)
    if any(drawn.value(drawn.papers.get(label), metric) is not None for label in layout.places for metric in metrics):
        axis.plot([], [], "D", color=GREYS[0], markerfacecolor="none", label="published")
    legend_below(figure, axis)
