"""Pages escape what they show and hold what they embed; plots draw the numbers they are given."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gfml.report.page import (
    Cell,
    Curves,
    Page,
    best_rows,
    figure_of,
    grouped_bars,
    label_points,
    learning_curves,
    p_value,
    panels,
    png,
    scatter_with_trend,
    signed,
)

NASTY = "<script>alert(\"1\")</script> & 'x' | *y* [z](u)"
VOID = {"meta", "img", "wbr", "br"}


class Checker(HTMLParser):
    """Fails on tags that do not match; collects texts, tags and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture
def page():
    figure, axes = panels(1, 1)
    axes[0, 0].plot([0, 1], [0, 1])
    page = Page(NASTY, NASTY)
    page.section(NASTY)
    page.text(NASTY)
    page.note("warning", NASTY)
    page.facts({NASTY: NASTY})
    page.table(
        [NASTY, "value"], [[Cell(NASTY, NASTY, color="#123456"), Cell("1.0", best=True)], ["second", "2"]], NASTY
    )
    page.figure("plot-one", figure, NASTY)
    return page


def test_text_is_escaped_everywhere(page, tmp_path):
    found = parse(page.write(tmp_path).read_text(encoding="utf-8"))
    assert "script" not in found.seen and not any(name.startswith("on") for name, _ in found.attributes)
    assert sum(NASTY in text for text in found.texts) >= 9


def test_the_page_needs_no_other_file(page, tmp_path):
    text = page.write(tmp_path).read_text(encoding="utf-8")
    sources = [value for name, value in parse(text).attributes if name in ("src", "href")]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert base64.b64decode(sources[0].partition(",")[2]) == (tmp_path / "plot-one.png").read_bytes()
    assert "http" not in text and "url(" not in text


def test_markdown_links_what_was_written_and_escapes_the_rest(page, tmp_path):
    page.write(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[[^]]*\]\((.*?)\)", text) == ["plot-one.png"]
    assert not re.search(r"(?<!\\)[<*[]", text.replace("**", "").replace("![", "")) and "\\*y\\*" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
    assert "| **1.0** |" in table[2]


def test_formats_are_chosen(page, tmp_path):
    assert page.write(tmp_path / "md", ["md"]) == tmp_path / "md" / "report.md"
    assert {path.name for path in (tmp_path / "md").iterdir()} == {"report.md", "plot-one.png"}


def test_the_best_cell_is_marked(page, tmp_path):
    text = page.write(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<td class="best">(.*?)</td>', text) == ["1.0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (-0.5, "−0.5000"),
        (9.99999, "10.0000"),
        (10, "10.0"),
        (12345.678, "12,345.7"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_figures(value, text):
    assert figure_of(value) == text


def test_differences_and_p_values():
    assert (signed(0.01234), signed(-0.01234)) == ("+0.0123", "−0.0123")
    assert (p_value(0.0004), p_value(0.012), p_value(1.0)) == ("p < 0.001", "p = 0.012", "p = 1.000")


def test_best_rows():
    assert best_rows([0.1, 0.3, None, 0.3, math.nan]) == {1, 3}
    assert best_rows([2.0, 1.0], higher=False) == {1}
    assert best_rows([None, 1.0]) == set() == best_rows([])
    assert best_rows([0.5, 0.5, None]) == set(), "nothing is better than another"
    assert best_rows([0.30001, 0.30002, 0.1]) == {0, 1}, "equal as they are shown"


def test_wide_tables_go_on_below(tmp_path):
    names = [f"metric_{n}@20" for n in range(30)]
    page = Page("title")
    page.table(["method", *names], [["mf", *(f"0.{n:04d}" for n in range(30))]])
    text = page.write(tmp_path).read_text(encoding="utf-8")
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", part) for part in text.split("<tr>")[1:]]
    heads, cells = rows[::2], rows[1::2]
    assert len(heads) > 1 and {head[0] for head in heads} == {"method"} and {row[0] for row in cells} == {"mf"}
    assert [name.replace("<wbr>", "") for head in heads for name in head[1:]] == names
    assert [cell for row in cells for cell in row[1:]] == [f"0.{n:04d}" for n in range(30)]


ROWS = [
    {"epoch": e, "train/loss": 1 / e, "train/dot": 2 / e, "train/zero": 0.0}
    | ({"val/m": e * 0.1} if e % 2 == 0 else {})
    for e in range(1, 7)
]


def test_learning_curves_draw_every_term_and_the_best_epoch():
    run = Curves("run", ROWS, "val/m", 4, "#3f86d8")
    loss, terms, selection = learning_curves([run]).axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [1 / e for e in range(1, 7)])
    lines = {line.get_label(): line for line in terms.lines}
    assert lines.keys() == {"dot"}, "a term that is always zero has no line, the loss none beside small terms"
    np.testing.assert_allclose(lines["dot"].get_ydata(), [2 / e for e in range(1, 7)])
    np.testing.assert_allclose(selection.lines[0].get_xydata(), [[2, 0.2], [4, 0.4], [6, 0.6]])
    assert selection.lines[0].get_label() == "run: 0.4000 at epoch 4"
    stars = [line for line in selection.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(stars[0].get_xydata(), [[4, 0.4]])


def test_terms_are_parts_of_the_loss():
    """A term may be below zero; what never differs from the loss, is always zero or is no part of it is not drawn."""
    rows = [
        {"epoch": e, "train/loss": 0.5 - e / 10, "train/pull": 1.0, "train/push": -0.5 - e / 10, "train/off": 0.0,
         "train/only": 0.5 - e / 10, "train/lr": 1e-3, "train/neighbours": 4.0, "val/x": 1.0}
        for e in (1, 2)
    ]  # fmt: skip
    assert Curves("a", rows, "val/x", 1, "#000000").terms() == ["train/pull", "train/push"]


def test_several_runs_share_a_plot_for_each_metric_that_selects():
    rows = [{**row, "test/m": 0.5} for row in ROWS]
    runs = [Curves("one", ROWS, "val/m", 2, "#3f86d8"), Curves("two", rows, "test/m", 2, "#dd7f21")]
    loss, *selections = learning_curves(runs).axes
    assert [line.get_label() for line in loss.lines] == ["_one", "_two"], "named where what selects is drawn"
    assert [axis.get_ylabel() for axis in selections] == ["val/m", "test/m"]
    said = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in selections]
    assert said == [["one: 0.2000 at epoch 2"], ["two: 0.5000 at epoch 2"]]


@pytest.mark.parametrize("rows", [[], ROWS[:1], [{"epoch": 0, "val/m": 0.1}]])
def test_learning_curves_of_next_to_nothing(rows):
    assert png(learning_curves([Curves("run", rows, "val/m", None, "#3f86d8")])).startswith(b"\x89PNG")


def test_bars_stand_where_they_belong():
    _, axes = panels(1, 1)
    grouped_bars(axes[0, 0], ["a", "b"], {"x": [1, 2], "y": [3, float("nan")]}, {"x": "#111111", "y": "#222222"})
    bars = axes[0, 0].patches
    assert [bar.get_height() for bar in bars[:3]] == [1, 2, 3]
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert all(end < start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_labels_never_cover_each_other():
    _figure, axes = panels(1, 1)
    axis = axes[0, 0]
    x, y = [0.0, 0.001, 0.5, 1.0], [0.0, 0.001, 0.5, 1.0]
    axis.plot(x, y)
    label_points(axis, x, y, ["first", "hidden", "middle", "last"], ["#000000"] * 4)
    assert [text.get_text() for text in axis.texts] == ["first", "middle", "last"]


def test_the_trend_is_the_median_of_equal_bins():
    _, axes = panels(1, 1)
    x = np.arange(96.0)
    scatter_with_trend(axes[0, 0], x, 2 * x, "#3f86d8")
    trend = axes[0, 0].lines[0].get_xydata()
    assert len(trend) == 12
    np.testing.assert_allclose(trend[:, 0], [np.median(part) for part in np.split(x, 12)])
    np.testing.assert_allclose(trend[:, 1], 2 * trend[:, 0])


def test_pictures_are_transparent_and_repeatable():
    from matplotlib import image

    figure, axes = panels(1, 1)
    axes[0, 0].plot([0, 1], [0, 1])
    picture = png(figure)
    pixels = image.imread(io.BytesIO(picture))
    assert pixels[0, 0, 3] == 0 and pixels[..., 3].max() == 1
    assert picture == png(figure)
