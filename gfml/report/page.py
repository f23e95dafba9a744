"""Reports: one page written as self-contained HTML and as Markdown, and the plots that several programs share.

A :class:`Page` collects blocks and is written once. Plots are transparent and drawn in middle tones, so that one
picture serves light and dark pages. matplotlib is imported when the first plot is drawn, not before.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from gfml.base.files import atomic_open

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

FORMATS = ("html", "md")
# Characters of a table's figures that fit beside one another.
PAGE_WIDTH = 132.0
# What is logged beside the terms of the loss.
NO_TERMS = tuple(f"train/{name}" for name in ("loss", "lr", "accuracy", "neighbours", "mutual", "covering"))
IS_FIGURE = re.compile(r"[−+-]?[.,\d]*\d|–$|p [<=]")
# Middle tones: about the same contrast on white and on near-black.
COLORS = ("#3f86d8", "#dd7f21", "#2f9e68", "#9a6bd0", "#d4574a", "#2a9fa8", "#cf5f9f", "#99902a")
GREYS = ("#6f7682", "#9299a5", "#b4bac4", "#555b66")
TEXT = "#7a7f88"
STYLE: dict[str, Any] = {
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.titlecolor": TEXT, "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT, "xtick.color": "#8d929b66", "ytick.color": "#8d929b66", "axes.edgecolor": "#8d929b99",
    "grid.color": "#8d929b40", "grid.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "legend.frameon": False, "font.size": 10, "lines.linewidth": 1.8, "hatch.linewidth": 0.6,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
}  # fmt: skip


class Cell(NamedTuple):
    """A table cell: text, small print below it, the best of its column or not, and a colour that marks its row."""

    text: str
    note: str = ""
    best: bool = False
    color: str = ""


# -- the page


class Page:
    """A report under construction. Every block is kept as HTML and as Markdown; all text is escaped."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._html, self._markdown = [f"<h1>{_h(title)}</h1>"], [f"# {_m(title)}"]
        self._pictures: dict[str, bytes] = {}
        if lead:
            self._add(f'<p class="lead">{_h(lead)}</p>', _m(lead))

    def section(self, title: str) -> None:
        """Start a section."""
        self._add(f"<h2>{_h(title)}</h2>", f"## {_m(title)}")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add(f"<p>{_h(text)}</p>", _m(text))

    def note(self, kind: str, text: str) -> None:
        """A highlighted sentence; kind: good, warning or plain."""
        sign = {"good": "Result", "warning": "Warning", "plain": "Note"}[kind]
        self._add(f'<p class="note {kind}">{_h(text)}</p>', f"> **{sign}:** {_m(text)}")

    def facts(self, pairs: Mapping[str, str]) -> None:
        """Names and values, one pair a line."""
        rows = "".join(f"<dt>{_h(name)}</dt><dd>{_h(value)}</dd>" for name, value in pairs.items())
        self._add(f"<dl>{rows}</dl>", "\n".join(f"- **{_m(name)}:** {_m(value)}" for name, value in pairs.items()))

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], caption: str = "", *, words: bool = False
    ) -> None:
        """A table; the first column is set left, the others right, or left too if they hold ``words``.

        One that is too wide for the page goes on below, its first column repeated.
        """
        filled = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        parts = [slice(0, len(columns))] if words else _fitting(columns, filled)
        tables = "".join(_html_table([columns[0], *columns[part]] if part.start else columns[part],
                                     [[row[0], *row[part]] if part.start else row[part] for row in filled]) for part in parts)  # fmt: skip
        under = f"<figcaption>{_h(caption)}</figcaption>" if caption else ""
        lines = [_markdown_row(map(_m, columns)), "|---" * len(columns) + "|"]
        lines += [_markdown_row(map(_markdown_cell, row)) for row in filled]
        self._add(
            f'<figure class="table{" words" if words else ""}"><div>{tables}</div>{under}</figure>',
            "\n".join(lines) + (f"\n\n{_m(caption)}" if caption else ""),
        )

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """A plot, written as ``name.png`` too."""
        picture = png(figure)
        self._pictures[f"{name}.png"] = picture
        data, words = base64.b64encode(picture).decode("ascii"), f"Plot: {name.replace('-', ' ')}"
        self._add(
            f'<figure><img alt="{_h(words)}" style="width:{7.2 * figure.get_figwidth():.0f}rem" src="data:image/png;base64,{data}">'
            f"<figcaption>{_h(caption)}</figcaption></figure>",
            f"![{_m(words)}]({name}.png)\n\n{_m(caption)}",
        )

    def write(self, directory: str | Path, formats: Sequence[str] = FORMATS) -> Path:
        """Write ``report.html`` and ``report.md`` (those in ``formats``) and the plots; the path of the first."""
        directory = Path(directory)
        for name, picture in self._pictures.items():
            with atomic_open(directory / name, "wb") as stream:
                stream.write(picture)
        texts = {"html": self._document(), "md": "\n\n".join(self._markdown) + "\n"}
        for kind in formats:
            with atomic_open(directory / f"report.{kind}") as stream:
                stream.write(texts[kind])
        return directory / f"report.{formats[0]}"

    def _add(self, as_html: str, as_markdown: str) -> None:
        self._html.append(as_html)
        self._markdown.append(as_markdown)

    def _document(self) -> str:
        css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_h(self.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(self._html)
            + "\n</main>\n</body>\n</html>\n"
        )


def _h(text: str) -> str:
    return html.escape(str(text), quote=True)


def _m(text: str) -> str:
    """Markdown text on one line in which nothing of the source is read as markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _fitting(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[slice]:
    """The columns of each piece of a table, so that a piece is no wider than the page."""

    def width(column: int) -> float:
        head = max(map(len, re.split("[ _]", columns[column])))
        return 2.5 + max([head, *(max(len(row[column].text), 0.85 * len(row[column].note)) for row in rows)])

    first = min(max(width(0), 19.0), 40.0)
    widths = [width(column) for column in range(1, len(columns))]

    def starts(limit: float) -> list[int]:
        found, used = [0], first
        for column, own in enumerate(widths, start=1):
            used += own
            if used > limit and column > 1:
                found.append(column)
                used = first + own
        return found

    most = starts(PAGE_WIDTH)
    # As even as so many pieces can be.
    even = next(found for limit in np.linspace(first, PAGE_WIDTH, 100) if len(found := starts(limit)) == len(most))
    return [slice(start, end) for start, end in zip(even, [*even[1:], len(columns)], strict=True)]


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    # Columns of words are set left, as the first one is. A long name may be broken after an underscore.
    left = [not any(IS_FIGURE.match(row[column].text) for row in rows) for column in range(len(columns))]
    marks = [' class="left"' if is_left and column else "" for column, is_left in enumerate(left)]
    head = "".join(
        f"<th{mark}>{_h(name).replace('_', '_<wbr>')}</th>" for name, mark in zip(columns, marks, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_html_cell, row, left))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_cell(cell: Cell, left: bool) -> str:
    dot = f'<span class="dot" style="background:{_h(cell.color)}"></span>' if cell.color else ""
    small = f"<small>{_h(cell.note)}</small>" if cell.note else ""
    kinds = " ".join(["best"] * cell.best + ["left"] * left)
    mark = f' class="{kinds}"' if kinds else ""
    return f"<td{mark}>{dot}{_h(cell.text)}{small}</td>"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_m(cell.text)}**" if cell.best else _m(cell.text)
    return f"{text} ({_m(cell.note)})" if cell.note else text


def _markdown_row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


# -- numbers


def figure_of(value: float | None, digits: int = 4) -> str:
    """A figure for a table: fixed digits below 10, one digit from there on, a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    return _minus(f"{value:.{digits}f}" if abs(value) < 10 else f"{value:,.1f}")


def signed(value: float) -> str:
    """A difference with its sign and four digits."""
    return _minus(f"{value:+.4f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def p_value(value: float) -> str:
    """``p = 0.012`` or ``p < 0.001``."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def best_rows(values: Sequence[float | None], *, higher: bool = True) -> set[int]:
    """The rows that show the best value of a column; empty when all show the same."""
    known = [value for value in values if value is not None and value == value]
    if len(set(map(figure_of, known))) < 2:
        return set()
    best = figure_of((max if higher else min)(known))
    return {row for row, value in enumerate(values) if figure_of(value) == best}


# -- plots


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """A function that draws in the style of the reports, whatever matplotlib is set to outside."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def panels(rows: int, columns: int, *, width: float = 10.0, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns]; ``height`` in inches is that of one row. Not tied to any window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.03)
    return figure, figure.subplots(rows, columns, squeeze=False)


@styled
def png(figure: Figure, dpi: int = 160) -> bytes:
    """The picture of a figure, transparent."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend of some axes under the whole figure, where it covers nothing; bars first, then lines, at most 5 a row."""
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: not isinstance(entry[0], tuple)
    )
    if entries:
        handles, labels = zip(*entries, strict=True)
        fitting = min(max(110 // (max(map(len, labels)) + 8), 1), 5)
        figure.legend(handles, labels, loc="outside lower left", ncols=fitting)


@dataclass(frozen=True)
class Curves:
    """The learning curves of one run: rows of metrics.jsonl, the metric that selects ("val/ndcg@20"), its best epoch."""

    label: str
    rows: Sequence[Mapping[str, Any]]
    select: str
    best_epoch: int | None
    color: str

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and values of one key, where it has a number."""
        points = [(row["epoch"], row[key]) for row in self.rows if isinstance(row.get(key), (int, float))]
        epochs, values = zip(*points, strict=True) if points else ((), ())
        return np.asarray(epochs), np.asarray(values, dtype=float)

    def terms(self) -> list[str]:
        """The names of the train terms but for the total, those that are ever other than zero and than the total."""
        names = dict.fromkeys(key for row in self.rows for key in row if key.startswith("train/"))
        total = self.series("train/loss")[1]
        values = {key: self.series(key)[1] for key in names if key not in (*NO_TERMS, self.select)}
        return [key for key, found in values.items() if found.any() and not np.array_equal(found, total)]


@styled
def learning_curves(runs: Sequence[Curves]) -> Figure:
    """The train loss; of one run its terms in a panel of their own; a panel for each metric that selects, best epochs marked."""
    terms = runs[0].terms() if len(runs) == 1 else []
    selects = list(dict.fromkeys(run.select for run in runs if len(run.series(run.select)[0])))
    number = 1 + bool(terms) + len(selects)
    _, axes = panels(1, number, height=4.0 + 0.18 * max(len(runs) - 2, 0))
    places = iter(axes[0])
    loss = next(places)
    for run in runs:
        # Runs are named where what selects them is drawn.
        named = run.select not in selects and len(runs) > 1
        _draw_line(loss, run.series("train/loss"), run.color, run.label if named else f"_{run.label}")
    loss.set(title="Train loss", ylabel="mean over the epoch")
    if terms:
        axis = next(places)
        for key, color in zip(terms, itertools.cycle(COLORS[1:]), strict=False):
            _draw_line(axis, runs[0].series(key), color, key.removeprefix("train/"))
        axis.set(title="Terms of the loss", ylabel="mean over the epoch")
    for select, axis in zip(selects, places, strict=True):
        for run in (run for run in runs if run.select == select):
            _draw_selection(axis, run)
        axis.set(title="Selection", ylabel=select)
    for place, axis in enumerate(axes[0]):
        axis.set(xlabel="epoch")
        if place <= bool(terms) and axis.lines and _wants_log(axis):
            axis.set_yscale("log")
        handles, labels = axis.get_legend_handles_labels()
        if labels:
            wrapped = [textwrap.fill(label, 120 // number - 8) for label in labels]
            columns = 2 if terms and place == 1 else 1
            axis.legend(handles, wrapped, loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=columns)
        _whole_epochs(axis)
    return loss.figure


def _draw_line(axis: Axes, points: tuple[np.ndarray, np.ndarray], color: str, label: str) -> None:
    epochs, values = points
    if len(epochs):
        axis.plot(epochs, values, color=color, label=label, marker="o", markersize=4 if len(epochs) < 20 else 0)


def _draw_selection(axis: Axes, run: Curves) -> None:
    epochs, values = run.series(run.select)
    at = np.flatnonzero(epochs == run.best_epoch)
    found = f": {values[at[0]]:.4f} at epoch {run.best_epoch}" if len(at) else ""
    _draw_line(axis, (epochs, values), run.color, run.label + found)
    if len(at):
        best = float(values[at[0]])
        axis.axvline(run.best_epoch, color=run.color, linewidth=1, linestyle=":")
        axis.plot(run.best_epoch, best, marker="*", markersize=15, color=run.color, linestyle="none",
                  markeredgecolor="white", markeredgewidth=0.8, zorder=5)  # fmt: skip


def _wants_log(axis: Axes) -> bool:
    """Whether the lines span more than a factor of 20, all positive."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.ones(1)])
    return bool((values > 0).all() and values.max() / values.min() > 20)


def _whole_epochs(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def grouped_bars(
    axis: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float]], colors: Mapping[str, str]
) -> None:
    """Bars side by side within each group, one colour a series; NaN leaves a gap."""
    places = np.arange(len(groups), dtype=float)
    width = 0.84 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        axis.bar(places + offset, values, width * 0.92, color=colors[name], label=name)
    axis.set_xticks(places, groups)
    axis.grid(False, axis="x")
    axis.tick_params(axis="x", length=0)


def mark_level(axis: Axes, values: Sequence[float], label: str) -> None:
    """A level across each group of bars, in a colour that few series have."""
    places = np.arange(len(values))
    axis.hlines(values, places - 0.46, places + 0.46, colors=COLORS[6], linewidth=2.2, label=label)


def scatter_with_trend(axis: Axes, x: np.ndarray, y: np.ndarray, color: str, *, bins: int = 12) -> None:
    """A cloud of points with the median of y in bins of equal count along x. Draws at most 20,000 points."""
    from matplotlib.patheffects import withStroke

    order = np.argsort(x, kind="stable")
    step = max(1, len(x) // 20_000)
    alpha = float(np.clip(1200 / max(1, len(x) // step), 0.12, 0.55))
    axis.scatter(x[order[::step]], y[order[::step]], s=12, color=color, alpha=alpha, linewidths=0)
    parts = [part for part in np.array_split(order, min(bins, max(1, len(x) // 8))) if len(part)]
    if len(parts) > 2:
        middle = [(np.median(x[part]), np.median(y[part])) for part in parts]
        axis.plot(*zip(*middle, strict=True), color="#343942", linewidth=1.8, label="median",
                  path_effects=[withStroke(linewidth=4.5, foreground="white")])  # fmt: skip


def label_points(
    axis: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str], colors: str | Sequence[str], **how: Any
) -> None:
    """Texts beside points, where there is room: one that would cover an earlier one is left out. how: of the text.

    Call when everything else is drawn: limits and layout must be final.
    """
    axis.figure.draw_without_rendering()
    colors = [colors] * len(texts) if isinstance(colors, str) else colors
    pixels = axis.transData.transform(np.column_stack([x, y]))
    taken: list[tuple[float, float, float]] = []
    for place, value, text, color, (left, height) in zip(x, y, texts, colors, pixels, strict=True):
        width = 6.5 * len(text)
        clear = all(abs(height - h) > 15 or left > at + wide or at > left + width for at, h, wide in taken)
        if clear and np.isfinite(left + height):
            taken.append((left, height, width))
            axis.annotate(
                text, (place, value), xytext=(7, 5), textcoords="offset points", color=color, fontsize=9, **how
            )
