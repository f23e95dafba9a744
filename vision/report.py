"""One report of one or several finished runs on the same images: tables and pictures as HTML and as Markdown.

    python vision/report.py runs/vision-... runs/vision-... --data-root data

Reads what the runs stored; the attention maps run the stored weights on a few test images, so the data must be there.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gfml.base.errors import UserError
from gfml.program.cli import run_main
from gfml.report.page import FORMATS, GREYS, Page, figure_of, grouped_bars, legend_below, panels, styled
from gfml.report.ranking_page import build_parser
from gfml.report.sections import colors_of, differences, duration, intervals_of, learning, metric_cells, what_ran
from gfml.report.stored import StoredRun, beside, finished_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vision.data import VisionData
    from vision.settings import VisionSettings

COLUMNS = {
    "accuracy": "accuracy", "accuracy_many": "many", "accuracy_medium": "medium", "accuracy_few": "few", "accuracy_head": "head",
    "accuracy_mid": "mid", "accuracy_tail": "tail", "worst_class": "worst class", "geometric_mean": "geometric mean",
    "harmonic_mean": "harmonic mean", "macro_f1": "macro F1", "nll": "NLL", "ece": "ECE", "ece_few": "ECE few", "ece_tail": "ECE tail",
}  # fmt: skip
LOWER_IS_BETTER = frozenset({"nll", "ece", "ece_few", "ece_tail"})
NUM_PICTURES = 4
# Class names are written out up to so many classes.
NAMED_CLASSES = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser("vision/report.py")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie (default: as the runs say)")
    given = parser.parse_args(argv)
    print(draw(given.runs, given.out, given.format and (given.format,), data_root=given.data_root))
    return 0


def draw(
    paths: Sequence[str | Path],
    out: str | os.PathLike[str] | None = None,
    formats: Sequence[str] | None = None,
    *,
    data_root: str | None = None,
) -> Path:
    """Write the pages and pictures; the path of report.html. UserError for runs on several sets of images."""
    from vision.data import load

    runs = finished_runs(paths, ["model", "data", "per_class"], "vision/main.py")
    names = {(run.data["name"], run.data["fingerprint"]) for run in runs}
    if len(names) > 1:
        found = ", ".join(sorted(name for name, _ in names))
        raise UserError(f"the runs are on different images ({found}): give a report each")
    data = load(_settings(runs[0], data_root))
    if data.fingerprint != runs[0].data["fingerprint"]:
        raise UserError(f"the images of {runs[0].path} have changed since it was trained: bring the old ones back")
    images = runs[0].data["images"]
    sizes = f"{images['train']:,} train and {images['test']:,} test images of {data.image_size} x {data.image_size}"
    page = Page(f"Vision report: {runs[0].data['name']}", f"{len(data.source.classes)} classes, {sizes}.")
    for note in runs[0].data["notes"]:
        page.note("plain", note)
    what_ran(page, runs, lambda run: {"model": f"{run.label}, {run.result['parameters']:,} parameters"})
    _results(page, runs)
    learning(page, runs, select="train/accuracy" if data.source.valid is None else "val/balanced_accuracy")
    _classes(page, runs, data)
    _calibration(page, runs)
    _masses(page, runs)
    _attention(page, runs, data)
    return page.write(out or beside(paths, "report"), formats or FORMATS)


def _settings(run: StoredRun, data_root: str | None) -> VisionSettings:
    from vision.main import PROGRAM

    found = PROGRAM.with_changes(str(run.path / "config.toml"), {"data_root": data_root} if data_root else {})
    # What a refit reports was trained on all of it.
    return replace(found, val_fraction=0.0) if found.refit else found


# -- tables


def _results(page: Page, runs: Sequence[StoredRun]) -> None:
    from vision.experiment import others

    rows = {run.label: run.test for run in runs}
    rows |= {f"{run.label}, {name}": found for run in runs for name, found in others(run.result).items()}
    names = {name: shown for name, shown in COLUMNS.items() if any(name in test for test in rows.values())}
    renamed = {label: {names[name]: test[name] for name in names if name in test} for label, test in rows.items()}
    ours = {run.label: {names[name]: said for name, said in intervals_of(run, list(names)).items()} for run in runs}
    lower = [names[name] for name in names if name in LOWER_IS_BETTER]
    page.section("Test accuracy")
    columns = list(names.values())
    page.table(
        ["model", *columns],
        metric_cells(renamed, columns, colors_of(runs), intervals=ours, lower=lower),
        _caption(runs[0]),
    )
    differences(page, runs, ["accuracy", "nll"])
    cost = [[run.label, f"{run.result['parameters']:,}", *_seconds(run.result.get("seconds"))] for run in runs]
    page.table(["model", "parameters", "an epoch", "images a second"], cost, "Cost of training.")


def _caption(run: StoredRun) -> str:
    text = "Small print: 95 % bootstrap interval of the mean over images. Worst class, geometric and harmonic mean: of the accuracies of the classes. ECE: 15 bins."
    if "accuracy_head" in run.result["test"]:
        text += (
            " Mean accuracy of classes with more than 100, 20 to 100, and fewer than 20 train images (many, medium, few); "
            "of the 3 most frequent tenths, those between, the 3 rarest (head, mid, tail)."
        )
    return text


def _seconds(seconds: Mapping[str, float] | None) -> list[str]:
    return [duration(seconds["epoch"]), f"{seconds['images_per_second']:,.0f}"] if seconds else ["–", "–"]


# -- pictures


def _classes(page: Page, runs: Sequence[StoredRun], data: VisionData) -> None:
    page.section("Classes")
    page.figure("classes", _class_bars(runs, data), "Accuracy of each class; the line is its number of train images.")
    page.table(*_class_table(runs, data))
    page.figure(
        "confusion", _confusions(runs, data), "Share of the test images of a class (row) that get each answer (column)."
    )


def _class_table(runs: Sequence[StoredRun], data: VisionData) -> tuple[list[str], list[list[str]], str]:
    """Columns, rows and caption: train images, and of each run the accuracy and the share of answers of every class."""
    told = [f"{what} {run.label}" for run in runs for what in ("accuracy", "answers")]
    rows = []
    for number, name in enumerate(data.source.classes):
        pairs = [figure_of(run.result["per_class"][key][number], 3) for run in runs for key in ("accuracy", "answers")]
        rows.append([name, f"{data.counts[number]:,}", figure_of(data.counts[number] / data.counts.sum(), 3), *pairs])
    slopes = [
        f"{run.label} {figure_of(run.result['per_class']['slope'], 3)}"
        for run in runs
        if "slope" in run.result["per_class"]
    ]
    caption = "Answers: share of all test images that are given the class."
    if slopes:
        caption += f" Accuracy gained per factor e in train images: {'; '.join(slopes)}."
    return ["class", "train images", "share of train", *told], rows, caption


@styled
def _class_bars(runs: Sequence[StoredRun], data: VisionData) -> Figure:
    figure, axes = panels(1, 1, height=4.0)
    axis, order = axes[0, 0], np.argsort(-data.counts, kind="stable")
    classes = data.source.classes
    names = [classes[c] if len(classes) <= NAMED_CLASSES else "" for c in order]
    accuracies = {run.label: np.array(run.result["per_class"]["accuracy"], dtype=float)[order] for run in runs}
    grouped_bars(axis, names, accuracies, colors_of(runs))
    axis.set(ylabel="accuracy", ylim=(0, 1), xlabel="classes, the most train images first")
    axis.tick_params(axis="x", rotation=45 if len(order) > 6 else 0)
    axis.plot([], [], color=GREYS[0], marker="o", markersize=3, label="train images (right)")
    counts = axis.twinx()
    counts.plot(np.arange(len(order)), data.counts[order], color=GREYS[0], marker="o", markersize=3, linewidth=1.2)
    counts.set_ylabel("train images")
    counts.set_ylim(bottom=0)
    counts.grid(False)
    legend_below(figure, axis)
    return figure


@styled
def _confusions(runs: Sequence[StoredRun], data: VisionData) -> Figure:
    columns = min(len(runs), 2)
    figure, axes = panels(
        -(-len(runs) // columns), columns, height=6.0 if columns == 2 else 7.5, width=12 if columns == 2 else 8
    )
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, run in zip(axes.flat, runs, strict=False):
        matrix = _confusion(run)
        shown = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(run.label)
        axis.grid(False)
        axis.set(xlabel="answer", ylabel="class", xticks=[], yticks=[])
        if len(matrix) > NAMED_CLASSES:
            axis.figure.colorbar(shown, ax=axis, fraction=0.046, label="share of the class")
            continue
        places = range(len(matrix))
        axis.set_xticks(places, data.source.classes, rotation=45, ha="right")
        axis.set_yticks(places, data.source.classes)
        for (row, column), value in np.ndenumerate(matrix):
            if value >= 0.005:
                color = "white" if value > 0.5 else "#345"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=color)
    return figure


def _confusion(run: StoredRun) -> np.ndarray:
    """Rows of the confusion matrix as shares [C, C]."""
    logits, labels = run.arrays["test_logits"], run.arrays["test_labels"]
    matrix = np.zeros((logits.shape[1],) * 2)
    np.add.at(matrix, (labels, logits.argmax(1)), 1)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def _calibration(page: Page, runs: Sequence[StoredRun]) -> None:
    page.section("Calibration")
    page.figure(
        "calibration",
        _draw_calibration(runs),
        "Below the diagonal a model is too sure of itself. Test images in 15 bins by the probability of the answer.",
    )


@styled
def _draw_calibration(runs: Sequence[StoredRun]) -> Figure:
    from scipy.special import softmax

    figure, axes = panels(1, 2, height=4.0)
    left, right = axes[0]
    left.plot([0, 1], [0, 1], color=GREYS[1], linewidth=1, linestyle=":")
    for run in runs:
        probabilities, labels = softmax(run.arrays["test_logits"].astype("float64"), axis=1), run.arrays["test_labels"]
        sure, is_right = probabilities.max(1), probabilities.argmax(1) == labels
        bins = np.clip(np.ceil(sure * 15).astype(int) - 1, 0, 14)
        full = [b for b in range(15) if (bins == b).any()]
        means = ([values[bins == b].mean() for b in full] for values in (sure, is_right))
        left.plot(*means, marker="o", markersize=4, color=run.color, label=f"{run.label}: ECE {run.test['ece']:.3f}")
        shares = np.full(len(sure), 1 / len(sure))
        right.hist(sure, np.linspace(0, 1, 16), histtype="step", color=run.color, linewidth=1.6, weights=shares)
    left.set(
        title="Reliability",
        xlabel="probability of the answer",
        ylabel="share of right answers",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    right.set(title="How sure", xlabel="probability of the answer", ylabel="share of test images")
    legend_below(figure, left)
    return figure


def _masses(page: Page, runs: Sequence[StoredRun]) -> None:
    """A map for every gravity layer with position masses: one row a run, one column a layer, heads averaged."""
    found = [(run, layers) for run in runs if (layers := _mass_maps(run))]
    if not found:
        return
    page.section("Masses")
    page.figure(
        "masses",
        _draw_masses(found),
        "Learned log-mass of each patch position in each gravity layer (mean over tables where heads have their own); "
        "larger attracts more attention. The constant is free: softmax cancels it.",
    )


@styled
def _draw_masses(found: Sequence[tuple[StoredRun, list[tuple[str, np.ndarray, float | None]]]]) -> Figure:
    columns = max(len(layers) for _, layers in found)
    figure, axes = panels(len(found), columns, height=2.6, width=max(2.6 * columns, 5.0))
    for row, (run, layers) in zip(axes, found, strict=True):
        for axis in row[len(layers) :]:
            axis.axis("off")
        for axis, (name, grid, token) in zip(row, layers, strict=False):
            shown = axis.imshow(grid, cmap="viridis")
            figure.colorbar(shown, ax=axis, fraction=0.046)
            axis.set_title(f"{name}{f', class token {token:.2f}' if token is not None else ''}", fontsize=9)
            axis.grid(False)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(run.label, fontsize=9)
    return figure


def _mass_maps(run: StoredRun) -> list[tuple[str, np.ndarray, float | None]]:
    """(layer, map [P, P], mass of the class token) of the layers whose tokens form a square."""
    maps = []
    for key, masses in run.arrays.items():
        if not key.startswith("log_mass/"):
            continue
        mean = masses.reshape(-1, masses.shape[-1]).mean(0)
        side = int(len(mean) ** 0.5)
        extra = len(mean) - side**2
        if extra in (0, 1):
            token = float(mean[0]) if extra else None
            maps.append((_layer_name(key.removeprefix("log_mass/")), mean[extra:].reshape(side, side), token))
    return maps


def _layer_name(name: str) -> str:
    """``blocks.3.attention`` -> ``layer 4``."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0] + 1}" if numbers else name


def _attention(page: Page, runs: Sequence[StoredRun], data: VisionData) -> None:
    """Where the class token looks, for a few test images, and how spread attention is."""
    found = {run.label: weights for run in runs if (weights := _weights(run, data))}
    if not found:
        return
    page.section("Attention")
    shown = {label: layers for label, layers in found.items() if _is_square(next(iter(layers.values())))}
    if shown:
        page.figure(
            "attention",
            _attention_maps(shown, data),
            "First column: test images. Then, layer by layer, the attention of the class token (of all tokens where there "
            "is none) to the patches, mean over heads; bright is much.",
        )
    rows = [row for label, layers in found.items() for row in _spread(label, layers)]
    page.table(["model and layer", "entropy by head, share of uniform", "attention to the first token"], rows,
               "Entropy of a query's weights over that of uniform weights, mean over queries and images, head by head.")  # fmt: skip


def _weights(run: StoredRun, data: VisionData) -> dict[str, Tensor]:
    """Attention [B, H, n, n] by layer on the first image of a few classes; empty for a model without such layers."""
    import torch

    from gfml.attention import attention_weights
    from vision.augment import normalize
    from vision.experiment import Vision

    model = Vision(_settings(run, None), data).restore(run.path)
    images = torch.from_numpy(data.source.test.array()[_pictured(data)].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        found = attention_weights(model, normalize(images, *data.statistics))
    return {_layer_name(name): weights for name, weights in found.items()}


def _pictured(data: VisionData) -> np.ndarray:
    """The first test image of classes spread over the labels."""
    classes = np.linspace(0, data.num_classes - 1, min(NUM_PICTURES, data.num_classes)).round().astype(int)
    return np.array(
        [np.flatnonzero(data.source.test.labels == c)[0] for c in classes if (data.source.test.labels == c).any()]
    )


def _is_square(weights: Tensor) -> bool:
    n = weights.shape[-1]
    return n - int(n**0.5) ** 2 in (0, 1)


@styled
def _attention_maps(found: Mapping[str, Mapping[str, Tensor]], data: VisionData) -> Figure:
    where, source = _pictured(data), data.source
    columns = max(len(layers) for layers in found.values())
    figure, axes = panels(len(found) * len(where), 1 + columns, height=1.6, width=1.8 * (1 + columns) + 1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for block, (label, layers) in enumerate(found.items()):
        lines = axes[block * len(where) :]
        lines[0, 0].set_ylabel(label, fontsize=8)
        for row, (image, line) in enumerate(zip(where, lines, strict=False)):
            line[0].imshow(source.test.image(image))
            line[0].set_title(source.classes[source.test.labels[image]], fontsize=9)
            for axis, (name, weights) in zip(line[1:], layers.items(), strict=False):
                seen = _seen(weights[row]).numpy()
                shown = axis.imshow(seen / max(seen.max(), 1e-12), cmap="magma", vmin=0, vmax=1)
                axis.set_title(name if row == 0 else "", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.03, aspect=40, label="attention / largest of its picture")
    return figure


def _seen(weights: Tensor) -> Tensor:
    """[H, n, n] -> attention to each patch [P, P]."""
    n = weights.shape[-1]
    side = int(n**0.5)
    mean = weights.mean(0)
    seen = mean[0, 1:] if n - side**2 else mean.mean(0)
    return seen.reshape(side, side)


def _spread(label: str, layers: Mapping[str, Tensor]) -> list[list[str]]:
    from gfml.attention import summarize_weights

    rows = []
    for name, weights in layers.items():
        summary = summarize_weights(weights)
        entropy = ", ".join(f"{value / math.log(weights.shape[-1]):.2f}" for value in summary.entropy.tolist())
        rows.append([f"{label}, {name}", entropy, f"{summary.first_token.mean().item():.3f}"])
    return rows


if __name__ == "__main__":
    sys.exit(run_main(main))
