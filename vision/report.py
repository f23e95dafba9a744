"""One report of one or several finished runs on the same images: tables and pictures as HTML and as Markdown.

    python vision/report.py runs/vision-... runs/vision-... --data-root data

Reads what the runs stored; the attention maps run the stored weights on a few test images, so the data must be there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.program.cli import Parser, run_main

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from gfml.report.page import Cell, Page
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


def build_parser() -> Parser:
    """The command line of ``vision/report.py``."""
    parser = Parser(
        prog="vision/report.py",
        description="A report with tables and pictures of finished vision runs on the same images.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie (default: as the runs say)")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: RUN/report; of several runs, report beside them)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(argv)
    print(write_report([Path(path) for path in given.runs], data_root=given.data_root, out=given.out))
    return 0


@dataclass(frozen=True)
class StoredRun:
    """A finished run: its flags, result, arrays, and its name and colour in the report."""

    path: Path
    settings: VisionSettings
    result: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    label: str
    color: str

    def probabilities(self) -> np.ndarray:
        """Of the test images, float64 [N, C]."""
        from scipy.special import softmax

        return softmax(self.arrays["test_logits"].astype("float64"), axis=1)

    def recalls(self) -> np.ndarray:
        """Accuracy of every class [C], NaN where there is no test image."""
        import numpy as np

        return np.array([np.nan if value is None else value for value in self.result["per_class"]["accuracy"]])


def write_report(
    paths: Sequence[Path],
    data: VisionData | None = None,
    *,
    data_root: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the pages and pictures; the path of report.html. ``data`` None: read as the first run's flags say."""
    from gfml.report.page import Page
    from vision.data import load

    runs = _read(paths, data_root)
    data = data or load(runs[0].settings)
    if data.fingerprint != runs[0].result["data"]["fingerprint"]:
        raise UserError(f"the images of {runs[0].path} have changed since it was trained: bring the old ones back")
    first = runs[0].result
    images = first["data"]["images"]
    page = Page(
        f"Vision report: {first['data']['name']}",
        f"{len(data.source.classes)} classes, {images['train']:,} train and {images['test']:,} test images "
        f"of {data.image_size} x {data.image_size}.",
    )
    for note in first["data"]["notes"]:
        page.note("plain", note)
    _results(page, runs)
    _learning(page, runs)
    _classes(page, runs, data)
    _calibration(page, runs)
    _masses(page, runs)
    _attention(page, runs, data)
    return page.write(out or (paths[0] / "report" if len(paths) == 1 else _beside(paths)))


def _beside(paths: Sequence[Path]) -> Path:
    return paths[0].parent / "report"


def _read(paths: Sequence[Path], data_root: str | None) -> list[StoredRun]:
    from gfml.base.checkpoints import train_anew
    from gfml.base.files import read_arrays
    from gfml.engine.runs import read_config, read_result
    from gfml.report.page import COLORS
    from vision.main import PROGRAM

    runs: list[StoredRun] = []
    for number, path in enumerate(paths):
        read_config(path)
        changes = {"data_root": data_root} if data_root else {}
        settings = PROGRAM.with_changes(str(path / "config.toml"), changes)
        arrays = read_arrays(path / "analysis.npz", train_anew(path))
        label = settings.label
        label = label if label not in [run.label for run in runs] else f"{label} [{path.name[-8:]}]"
        runs.append(StoredRun(path, settings, read_result(path), arrays, label, COLORS[number % len(COLORS)]))
    names = {(run.result["data"]["name"], run.result["data"]["fingerprint"]) for run in runs}
    if len(names) > 1:
        raise UserError(
            f"the runs are on different images ({', '.join(sorted(name for name, _ in names))}): give a report each"
        )
    return runs


# -- tables


def _results(page: Page, runs: Sequence[StoredRun]) -> None:
    from vision.experiment import others

    rows = [(run.label, run.color, run.result["test"]) for run in runs]
    rows += [(f"{run.label}, {name}", run.color, found) for run in runs for name, found in others(run.result).items()]
    page.section("Test accuracy")
    page.text(
        f"Headline: {runs[0].result['selection']['protocol']}, {runs[0].result['selection']['epochs_trained']} epochs."
    )
    names = [name for name in COLUMNS if any(name in test for _, _, test in rows)]
    page.table(["model", *(COLUMNS[name] for name in names)], _cells(rows, names), _caption(runs[0]))
    cost = [[run.label, f"{run.result['parameters']:,}", *_seconds(run.result.get("seconds"))] for run in runs]
    page.table(["model", "parameters", "seconds an epoch", "images a second"], cost, "Cost of training.")


def _cells(rows: Sequence[tuple[str, str, Mapping[str, float]]], names: Sequence[str]) -> list[list[Cell]]:
    from gfml.report.page import Cell, best_rows, figure_of

    best = {
        name: best_rows([test.get(name) for _, _, test in rows], higher=name not in LOWER_IS_BETTER) for name in names
    }
    return [
        [Cell(label, color=color), *(Cell(figure_of(test.get(name)), best=number in best[name]) for name in names)]
        for number, (label, color, test) in enumerate(rows)
    ]


def _caption(run: StoredRun) -> str:
    text = "Worst class, geometric and harmonic mean: of the accuracies of the classes. ECE: 15 bins."
    if "accuracy_head" in run.result["test"]:
        text += (
            " Mean accuracy of classes with more than 100, 20 to 100, and fewer than 20 train images (many, medium, few); "
            "of the 3 most frequent tenths, those between, the 3 rarest (head, mid, tail)."
        )
    return text


def _seconds(seconds: Mapping[str, float] | None) -> list[str]:
    from gfml.report.page import figure_of

    return [figure_of(seconds["epoch"], 2), figure_of(seconds["images_per_second"])] if seconds else ["–", "–"]


# -- pictures


def _learning(page: Page, runs: Sequence[StoredRun]) -> None:
    from matplotlib.ticker import MaxNLocator

    from gfml.engine.runs import read_metrics
    from gfml.report.page import Curves, panels, styled

    @styled
    def draw() -> Figure:
        figure, axes = panels(1, 2, height=3.8)
        for run in runs:
            curves = Curves(run.label, read_metrics(run.path), "", None, run.color)
            for axis, keys in zip(axes[0], (("train/loss",), ("train/accuracy", "val/balanced_accuracy")), strict=True):
                for key, style in zip(keys, ("-", "--"), strict=False):
                    epochs, values = curves.series(key)
                    if len(epochs):
                        axis.plot(
                            epochs,
                            values,
                            style,
                            color=run.color,
                            label=f"{run.label}{', validation' if key.startswith('val') else ''}",
                        )
        for axis in axes[0]:
            axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes[0, 0].set(title="Train loss", xlabel="epoch")
        axes[0, 1].set(title="Accuracy on augmented train images", xlabel="epoch")
        axes[0, 1].legend()
        return figure

    page.section("Learning")
    page.figure("learning", draw(), "Means over the batches of each epoch, augmentation included.")


def _classes(page: Page, runs: Sequence[StoredRun], data: VisionData) -> None:
    page.section("Classes")
    page.figure("classes", _class_bars(runs, data), "Accuracy of each class; the line is its number of train images.")
    page.table(*_class_table(runs, data))
    page.figure(
        "confusion", _confusions(runs, data), "Share of the test images of a class (row) that get each answer (column)."
    )


def _class_table(runs: Sequence[StoredRun], data: VisionData) -> tuple[list[str], list[list[str]], str]:
    """Columns, rows and caption: train images, and of each run the accuracy and the share of answers of every class."""
    from gfml.report.page import figure_of

    columns = [
        "class",
        "train images",
        "share of train",
        *(f"{what} {run.label}" for run in runs for what in ("accuracy", "answers")),
    ]
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
    return (
        columns,
        rows,
        f"{caption} Accuracy gained per factor e in train images: {'; '.join(slopes)}." if slopes else caption,
    )


def _class_bars(runs: Sequence[StoredRun], data: VisionData) -> Figure:
    import numpy as np

    from gfml.report.page import GREYS, grouped_bars, legend_below, panels, styled

    @styled
    def draw() -> Figure:
        figure, axes = panels(1, 1, height=4.0)
        axis, order = axes[0, 0], np.argsort(-data.counts, kind="stable")
        names = [_short(data.source.classes[c], len(order)) for c in order]
        grouped_bars(
            axis, names, {run.label: run.recalls()[order] for run in runs}, {run.label: run.color for run in runs}
        )
        axis.set(ylabel="accuracy", ylim=(0, 1))
        axis.tick_params(axis="x", rotation=45 if len(order) > 6 else 0)
        counts = axis.twinx()
        counts.plot(np.arange(len(order)), data.counts[order], color=GREYS[0], marker="o", markersize=3, linewidth=1.2)
        counts.set_ylabel("train images")
        counts.set_ylim(bottom=0)
        counts.grid(False)
        legend_below(figure, axis)
        return figure

    return draw()


def _short(name: str, num_classes: int) -> str:
    return name if num_classes <= NAMED_CLASSES else ""


def _confusions(runs: Sequence[StoredRun], data: VisionData) -> Figure:
    import numpy as np

    from gfml.report.page import panels, styled

    @styled
    def draw() -> Figure:
        columns = min(len(runs), 2)
        rows = -(-len(runs) // columns)
        figure, axes = panels(rows, columns, height=4.8 if columns == 2 else 7.0)
        for axis, run in zip(axes.flat, runs, strict=False):
            matrix = _confusion(run)
            axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
            axis.set_title(run.label, fontsize=9)
            _name_classes(axis, data.source.classes)
            if len(matrix) <= NAMED_CLASSES:
                for (row, column), value in np.ndenumerate(matrix):
                    if value >= 0.005:
                        axis.text(
                            column,
                            row,
                            f"{100 * value:.0f}",
                            ha="center",
                            va="center",
                            fontsize=6.5,
                            color="white" if value > 0.5 else "#445",
                        )
        for axis in axes.flat[len(runs) :]:
            axis.axis("off")
        return figure

    return draw()


def _confusion(run: StoredRun) -> np.ndarray:
    """Rows of the confusion matrix as shares [C, C]."""
    import numpy as np

    logits, labels = run.arrays["test_logits"], run.arrays["test_labels"]
    matrix = np.zeros((logits.shape[1],) * 2)
    np.add.at(matrix, (labels, logits.argmax(1)), 1)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def _name_classes(axis: Axes, classes: Sequence[str]) -> None:
    axis.grid(False)
    if len(classes) > NAMED_CLASSES:
        axis.set(xticks=[], yticks=[])
        return
    places = range(len(classes))
    axis.set_xticks(places, classes, rotation=45, ha="right", fontsize=7)
    axis.set_yticks(places, classes, fontsize=7)
    axis.set(xlabel="answer", ylabel="class")


def _calibration(page: Page, runs: Sequence[StoredRun]) -> None:
    import numpy as np

    from gfml.report.page import GREYS, panels, styled

    @styled
    def draw() -> Figure:
        figure, axes = panels(1, 2, height=4.0)
        left, right = axes[0]
        left.plot([0, 1], [0, 1], color=GREYS[1], linewidth=1, linestyle=":")
        edges = np.linspace(0, 1, 16)
        for run in runs:
            probabilities, labels = run.probabilities(), run.arrays["test_labels"]
            sure, right_answer = probabilities.max(1), probabilities.argmax(1) == labels
            bins = np.clip(np.ceil(sure * 15).astype(int) - 1, 0, 14)
            full = [b for b in range(15) if (bins == b).any()]
            means = ([values[bins == b].mean() for b in full] for values in (sure, right_answer))
            left.plot(*means, marker="o", markersize=4, color=run.color,
                      label=f"{run.label}: ECE {run.result['test']['ece']:.3f}")  # fmt: skip
            right.hist(
                sure, edges, histtype="step", color=run.color, linewidth=1.6, weights=np.full(len(sure), 1 / len(sure))
            )
        left.set(
            title="Reliability",
            xlabel="probability of the answer",
            ylabel="share of right answers",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        right.set(title="How sure", xlabel="probability of the answer", ylabel="share of test images")
        left.legend()
        return figure

    page.section("Calibration")
    page.figure(
        "calibration",
        draw(),
        "Below the diagonal a model is too sure of itself. Test images in 15 bins by the probability of the answer.",
    )


def _masses(page: Page, runs: Sequence[StoredRun]) -> None:
    """A map for every gravity layer with position masses: one row a run, one column a layer, heads averaged."""
    found = [(run, layers) for run in runs if (layers := _mass_maps(run))]
    if not found:
        return

    from gfml.report.page import panels, styled

    @styled
    def draw() -> Figure:
        columns = max(len(layers) for _, layers in found)
        figure, axes = panels(len(found), columns, height=2.6, width=max(2.6 * columns, 5.0))
        for row, (run, layers) in zip(axes, found, strict=True):
            for axis in row[len(layers) :]:
                axis.axis("off")
            for axis, (name, grid, token) in zip(row, layers, strict=False):
                shown = axis.imshow(grid, cmap="viridis")
                figure.colorbar(shown, ax=axis, fraction=0.046)
                axis.set_title(f"{name}{f', class token {token:.2f}' if token is not None else ''}", fontsize=8)
                axis.grid(False)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(run.label, fontsize=7)
        return figure

    page.section("Masses")
    page.figure(
        "masses",
        draw(),
        "Learned log-mass of each patch position in each gravity layer (mean over tables where heads have their own); "
        "larger attracts more attention. The constant is free: softmax cancels it.",
    )


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
            maps.append(
                (
                    _layer_name(key.removeprefix("log_mass/")),
                    mean[extra:].reshape(side, side),
                    float(mean[0]) if extra else None,
                )
            )
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

    model = Vision(run.settings, data).restore(run.path)
    images = torch.from_numpy(data.source.test.array()[_pictured(data)].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        found = attention_weights(model, normalize(images, *data.statistics))
    return {_layer_name(name): weights for name, weights in found.items()}


def _pictured(data: VisionData) -> np.ndarray:
    """The first test image of classes spread over the labels."""
    import numpy as np

    classes = np.linspace(0, data.num_classes - 1, min(NUM_PICTURES, data.num_classes)).round().astype(int)
    return np.array(
        [np.flatnonzero(data.source.test.labels == c)[0] for c in classes if (data.source.test.labels == c).any()]
    )


def _is_square(weights: Tensor) -> bool:
    n = weights.shape[-1]
    return n - int(n**0.5) ** 2 in (0, 1)


def _attention_maps(found: Mapping[str, Mapping[str, Tensor]], data: VisionData) -> Figure:
    from gfml.report.page import panels, styled

    @styled
    def draw() -> Figure:
        where = _pictured(data)
        columns = max(len(layers) for layers in found.values())
        figure, axes = panels(len(found) * len(where), 1 + columns, height=1.5, width=1.7 * (1 + columns))
        for block, (label, layers) in enumerate(found.items()):
            for row, image in enumerate(where):
                line = axes[block * len(where) + row]
                for axis in line:
                    axis.axis("off")
                line[0].imshow(data.source.test.image(image))
                line[0].set_title(
                    label if row == 0 else data.source.classes[data.source.test.labels[image]], fontsize=7
                )
                for axis, (name, weights) in zip(line[1:], layers.items(), strict=False):
                    axis.imshow(_seen(weights[row]).numpy(), cmap="magma", vmin=0)
                    axis.set_title(name if row == 0 else "", fontsize=7)
        return figure

    return draw()


def _seen(weights: Tensor) -> Tensor:
    """[H, n, n] -> attention to each patch [P, P]."""
    n = weights.shape[-1]
    side = int(n**0.5)
    mean = weights.mean(0)
    seen = mean[0, 1:] if n - side**2 else mean.mean(0)
    return seen.reshape(side, side)


def _spread(label: str, layers: Mapping[str, Tensor]) -> list[list[str]]:
    import math

    from gfml.attention import summarize_weights

    rows = []
    for name, weights in layers.items():
        summary = summarize_weights(weights)
        entropy = ", ".join(f"{value / math.log(weights.shape[-1]):.2f}" for value in summary.entropy.tolist())
        rows.append([f"{label}, {name}", entropy, f"{summary.first_token.mean().item():.3f}"])
    return rows


if __name__ == "__main__":
    sys.exit(run_main(main))
