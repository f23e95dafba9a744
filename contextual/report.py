"""The page of a run: figures, learning curves, queries with their nearest neighbours, and the hardest classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from contextual.data import RetrievalData
from gfml.data.images import ImageSet, resize
from gfml.engine.runs import Run
from gfml.metrics.retrieval import Retrieval
from gfml.report.page import Page, figure_of, panels, styled
from gfml.report.sections import intervals_of, learning, metric_cells, what_ran
from gfml.report.stored import StoredRun, finished_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, QUERY = "#2f9e68", "#d4574a", "#6f7682"
SIDE = 96


def write_page(run: Run, data: RetrievalData, found: Retrieval, *, queries: int, seed: int) -> Path:
    """Write ``report/report.html`` and ``.md`` in the run directory; the path of the page."""
    [stored] = finished_runs([run.path], ["model", "loss", "test", "per_class"], "contextual/main.py or train.py")
    selection = stored.selection
    page = Page(
        f"{stored.label} on {data.name}",
        f"{selection['protocol']}, epoch {selection['epoch']}. Loss {stored.result['loss']}.",
    )
    if "optimistic" in selection["protocol"] and not stored.on_test:
        page.note("warning", "The epoch was chosen by the figures reported here: they are optimistic.")
    what_ran(page, [stored], lambda run: {"data": f"{data.name}: {data.sizes}", "model": run.label})
    _figures(page, stored)
    learning(page, [stored])
    _neighbours(page, data, found, queries, seed)
    _classes(page, stored.result["per_class"])
    return page.write(run.file("report"))


def _figures(page: Page, run: StoredRun) -> None:
    result, columns = run.result, list(run.test)
    on_test = {"test": run.test} | {f"{name}, test": found for name, found in run.baselines.items()}
    others = {name: result[name] for name in ("val", "train") if name in result}
    page.section("Figures")
    page.table(
        ["", *columns],
        metric_cells(on_test, columns, {}, intervals={"test": intervals_of(run, columns)}) + metric_cells(others, columns, {}, unranked=columns),
        "Best on test in bold; small print: 95 % bootstrap interval of the mean over queries. pixels: centred pictures at 16 x 16. "
        "starting network: its pooled features.",
    )  # fmt: skip


def _neighbours(page: Page, data: RetrievalData, found: Retrieval, queries: int, seed: int) -> None:
    references = data.gallery or data.test
    rng, right = np.random.default_rng(seed), found.right[:, 0]
    page.section("Queries and their nearest neighbours")
    chosen = one_per_class(rng.permutation(len(right)), data.test.labels, queries)
    caption = "Queries at random, of different classes (left), and their neighbours, nearest first. Green: the query's class. Red: another."
    page.figure("neighbours", neighbour_figure(data.test, references, found, chosen), caption)
    wrong = np.flatnonzero(~right)
    if len(wrong):
        # The errors the model is surest of.
        order = wrong[np.argsort(-found.cosines[wrong, 0], kind="stable")]
        chosen = one_per_class(order, data.test.labels, queries)
        page.figure(
            "errors",
            neighbour_figure(data.test, references, found, chosen),
            "Wrong nearest neighbours with the highest cosines.",
        )


def _classes(page: Page, rows: Sequence[Mapping[str, Any]], most: int = 20) -> None:
    names = [name for name in rows[0] if name != "class"]
    cells = [
        [str(row["class"]), *(figure_of(row[name]) if name != "queries" else str(row[name]) for name in names)]
        for row in rows[:most]
    ]
    page.section("Hardest classes")
    page.table(
        ["class", *names], cells, f"{min(most, len(rows))} of {len(rows)} classes, by recall@1; all are in result.json."
    )


def one_per_class(order: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """The first ``number`` positions of ``order`` whose classes differ, filled up with others when classes run out."""
    _, first = np.unique(labels[order], return_index=True)
    first = np.sort(first)[:number]
    rest = np.setdiff1d(np.arange(len(order)), first)[: number - len(first)]
    return order[np.concatenate([first, rest])]


@styled
def neighbour_figure(
    queries: ImageSet, references: ImageSet, found: Retrieval, chosen: np.ndarray, most: int = 8
) -> Figure:
    """A row per query: the query, then its nearest references framed green (its class) or red (another)."""
    columns = min(most, found.neighbours.shape[1]) + 1
    figure, axes = panels(len(chosen), columns, width=1.15 * columns, height=1.45)
    for row, query in enumerate(chosen.tolist()):
        _picture(axes[row, 0], queries, query, QUERY, queries.classes[queries.labels[query]])
        for column in range(1, columns):
            other, right = int(found.neighbours[query, column - 1]), bool(found.right[query, column - 1])
            cosine = f"{found.cosines[query, column - 1]:.2f}"
            label = cosine if right else f"{cosine} {references.classes[references.labels[other]]}"
            _picture(axes[row, column], references, other, RIGHT if right else WRONG, label)
    return figure


def _picture(axis: Axes, images: ImageSet, index: int, color: str, label: str) -> None:
    axis.imshow(resize(images.image(index), SIDE))
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.set_title(
        label if len(label) <= 16 else f"{label[:15]}…",
        fontsize=8,
        color=color,
        loc="center",
        pad=3,
        fontweight="normal",
    )
    for spine in axis.spines.values():
        spine.set(visible=True, color=color, linewidth=2.5)
