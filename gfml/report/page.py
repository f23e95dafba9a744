"""Reports: one page written as self-contained HTML and as Markdown, and the plots that several programs share.

A :class:`Page` collects blocks and is written once. Plots are transparent and drawn in middle tones, so that one
picture serves light and dark pages. matplotlib is imported when the first plot is drawn, not before.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import re
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
        """A table; the first column is set left, the others right, or left too if they hold ``words``."""
        filled = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        # A long name may be broken after an underscore.
        head = "".join(f"<th>{_h(name).replace('_', '_<wbr>')}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in filled)
        under = f"<figcaption>{_h(caption)}</figcaption>" if caption else ""
        lines = [_markdown_row(map(_m, columns)), "|---" * len(columns) + "|"]
        lines += [_markdown_row(map(_markdown_cell, row)) for row in filled]
        self._add(
            f'<figure class="table{" words" if words else ""}"><div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            f"{under}</figure>",
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
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_h(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(self._html)
            + "\n</main>\n</body>\n</html>\n"
        )


CSS = """
:root{color-scheme:light dark;--fg:#1d2026;--soft:#5f6672;--bg:#fbfbfc;--card:#fff;--line:#e0e3e8;--head:#f3f4f6;
--warn:#a34700;--warnbg:#fff4e5;--good:#12693d;--goodbg:#e9f7ef}
@media(prefers-color-scheme:dark){:root{--fg:#e4e7ec;--soft:#a0a7b3;--bg:#14161a;--card:#1b1e23;--line:#30353d;
--head:#22262c;--warn:#ffb067;--warnbg:#33240f;--good:#6fd69c;--goodbg:#12291d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:74rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem}
h2{font-size:1.25rem;margin:2.6rem 0 .8rem;padding-top:.9rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:62rem}
.lead{color:var(--soft);font-size:1.05rem}
.note{padding:.7rem 1rem;border-left:4px solid var(--line);border-radius:0 6px 6px 0;background:var(--head);max-width:none}
.note.warning{border-color:var(--warn);background:var(--warnbg);color:var(--warn);font-weight:600}
.note.good{border-color:var(--good);background:var(--goodbg);color:var(--good);font-weight:600}
dl{display:grid;grid-template-columns:fit-content(15rem) 1fr;gap:.3rem 1.4rem;margin:.8rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
figure{margin:1.1rem 0;padding:1rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
figure.table{padding:0;overflow:hidden}figure.table>div{overflow-x:auto}
figure.table figcaption{padding:.7rem 1rem;margin:0;border-top:1px solid var(--line)}
figcaption{color:var(--soft);font-size:.88rem;margin-top:.6rem}
img{display:block;max-width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.45rem .6rem;text-align:right;vertical-align:top}
td{white-space:nowrap}td:first-child{white-space:normal;min-width:8.5rem}
th:first-child,td:first-child,.words th,.words td{text-align:left}
th{background:var(--head);font-weight:600;vertical-align:bottom}
.words td{white-space:normal}.words small{min-width:9rem;max-width:18rem}
tbody tr+tr td{border-top:1px solid var(--line)}
td.best{font-weight:700}
td small{display:block;color:var(--soft);font-weight:400;font-size:.78rem}
.dot{display:inline-block;width:.65em;height:.65em;border-radius:50%;margin-right:.55em}
@media(max-width:40rem){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}}
@media print{body{background:#fff}figure{break-inside:avoid}}
"""


def _h(text: str) -> str:
    return html.escape(str(text), quote=True)


def _m(text: str) -> str:
    """Markdown text on one line in which nothing of the source is read as markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _html_cell(cell: Cell) -> str:
    dot = f'<span class="dot" style="background:{_h(cell.color)}"></span>' if cell.color else ""
    small = f"<small>{_h(cell.note)}</small>" if cell.note else ""
    return f"<td{' class=best' if cell.best else ''}>{dot}{_h(cell.text)}{small}</td>"


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
    """The rows that hold the best value of a column; empty when fewer than two rows have one."""
    known = [value for value in values if value is not None and value == value]
    if len(known) < 2:
        return set()
    best = (max if higher else min)(known)
    return {row for row, value in enumerate(values) if value == best}


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


def legend_below(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """The legend of some axes under the whole figure, where it covers nothing; bars first, then lines.

    columns None: as many as the longest label leaves room for, at most 5.
    """
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: not isinstance(entry[0], tuple)
    )
    if entries:
        handles, labels = zip(*entries, strict=True)
        fitting = min(max(110 // (max(map(len, labels)) + 8), 1), 5)
        figure.legend(handles, labels, loc="outside lower left", ncols=columns or fitting)


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
        """The names of the train terms, the total first."""
        names = dict.fromkeys(key for row in self.rows for key in row if key.startswith("train/"))
        return sorted(names, key=lambda name: name != "train/loss")


@styled
def learning_curves(runs: Sequence[Curves]) -> Figure:
    """Left the train loss (of one run every term), right the selecting metric with the best epoch marked."""
    figure, axes = panels(1, 2, height=4.0)
    left, right = axes[0]
    for run in runs:
        _draw_terms(left, run, run.terms() if len(runs) == 1 else ["train/loss"], alone=len(runs) == 1)
        _draw_selection(right, run)
    left.set(xlabel="epoch", title="Train loss and its terms" if len(runs) == 1 else "Train loss")
    left.set_ylabel("mean over the epoch")
    if _wants_log(left):
        left.set_yscale("log")
    names = {run.select for run in runs}
    right.set(xlabel="epoch", title="Selection", ylabel=names.pop() if len(names) == 1 else "selecting metric")
    for axis in (left, right):
        if axis.lines:
            axis.legend(
                loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=3 if axis is left and len(runs) == 1 else 1
            )
        _whole_epochs(axis)
    return figure


def _draw_terms(axis: Axes, run: Curves, keys: Sequence[str], *, alone: bool) -> None:
    for number, key in enumerate(keys):
        epochs, values = run.series(key)
        shown = values > 0
        if not shown.any():
            continue
        color = (run.color, *[c for c in COLORS if c != run.color])[number % len(COLORS)]
        label = key.removeprefix("train/") if alone else run.label
        axis.plot(epochs[shown], values[shown], color=color, label=label, marker="o" if shown.sum() == 1 else None,
                  linewidth=4 if alone and number == 0 else 1.6, alpha=0.5 if alone and number == 0 else 1)  # fmt: skip


def _draw_selection(axis: Axes, run: Curves) -> None:
    epochs, values = run.series(run.select)
    if len(epochs) == 0:
        return
    at = np.flatnonzero(epochs == run.best_epoch)
    found = f": best {values[at[0]]:.4f}, epoch {run.best_epoch}" if len(at) else ""
    axis.plot(
        epochs, values, color=run.color, marker="o", markersize=3 if len(epochs) < 60 else 0, label=run.label + found
    )
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

    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))


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
    axis: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str], colors: str | Sequence[str]
) -> None:
    """Texts beside points, where there is room: one that would cover an earlier one is left out.

    Call when everything else is drawn: limits and layout must be final.
    """
    axis.figure.draw_without_rendering()
    colors = [colors] * len(texts) if isinstance(colors, str) else colors
    pixels = axis.transData.transform(np.column_stack([x, y]))
    taken: list[np.ndarray] = []
    for place, value, text, color, pixel in zip(x, y, texts, colors, pixels, strict=True):
        if not np.isfinite(pixel).all() or any(
            abs(pixel[0] - other[0]) < 50 and abs(pixel[1] - other[1]) < 16 for other in taken
        ):
            continue
        taken.append(pixel)
        axis.annotate(text, (place, value), xytext=(7, 5), textcoords="offset points", color=color, fontsize=9)
