"""Report of a finished run: results, training table, a map of the items, nearest neighbours of well-known items.

    python cml_baseline/report.py RUN
    python cml_baseline/report.py RUN --projection pca --of "Alien (1979)" "Fargo (1996)"

Reads what the run stored and trains nothing. Titles and genres are those the run found (``items.csv``).
"""

from __future__ import annotations

import csv
import itertools
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gfml.base.errors import UserError
from gfml.base.files import write_csv
from gfml.base.runs import read_json
from gfml.data.items import by_title
from gfml.program.cli import number, run_main
from gfml.report.page import COLORS, GREYS, Cell, Page, label_points, legend_below, panels, styled
from gfml.report.ranking_page import HOLDS, build_parser, write_report
from gfml.report.sections import slug
from gfml.report.stored import StoredRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gfml.data.interactions import Interactions
    from gfml.data.items import ItemInfo

PROJECTIONS = ("tsne", "pca")
# Points of the map: the most popular items; a t-SNE of more takes minutes.
MAP_POINTS = 1500
NEIGHBOURS, SHOWN_ITEMS = 10, 10
# What gfml/program/index.py stores.
ANN = ("exact_queries_per_second", "searches", "top", "kind", "items", "queries")


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser("cml_baseline/report.py")
    add = parser.add_argument
    add("--projection", choices=PROJECTIONS, default="tsne", help="how items are drawn in the plane")
    add("--of", nargs="+", metavar="TITLE", help="show the neighbours of these items (default: ten well-known ones)")
    add("--seed", type=number(int, least=0, most=2**32 - 1), default=0, metavar="N", help="seed of t-SNE")
    options = parser.parse_args(argv)
    print(draw(options.runs, options.out, options.format and (options.format,),
               projection=options.projection, of=options.of, seed=options.seed))  # fmt: skip
    return 0


def draw(
    paths: Sequence[str | Path],
    out: str | os.PathLike[str] | None = None,
    formats: Sequence[str] | None = None,
    *,
    projection: str = "tsne",
    of: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Write report.html, report.md and the plots; the path of the first. UserError for a run without a result."""
    sections = [_training, partial(_items, projection=projection, of=of, seed=seed), _search]
    return write_report(paths, out, formats, holds=[*HOLDS, "epochs"], what="cml_baseline/main.py", more=sections)


@dataclass(frozen=True)
class Items:
    """Names, genres and train interactions of the items, with their vectors [I, D]."""

    titles: list[str]
    genres: list[tuple[str, ...]]
    popularity: np.ndarray
    vectors: np.ndarray

    @property
    def by_popularity(self) -> np.ndarray:
        """Ids, the most popular first."""
        return np.argsort(-self.popularity, kind="stable")


def write_items(run: Path, data: Interactions, info: ItemInfo | None) -> None:
    """``items.csv``: id, title, genres and train interactions of every item, in the order of the vectors."""
    names = range(data.num_items) if data.item_ids is None else data.item_ids.tolist()
    told = zip(info.titles, map("|".join, info.genres), strict=True) if info else itertools.repeat(("", ""))
    cells = zip(names, told, data.item_popularity.tolist(), strict=False)
    write_csv(run / "items.csv", [{"item": name, "title": title, "genres": genres, "train": count}
                                  for name, (title, genres), count in cells])  # fmt: skip


# -- items


def _read_items(run: StoredRun) -> Items:
    path = run.path
    try:
        with open(path / "items.csv", encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise UserError(
            f"cannot read {path / 'items.csv'} ({error.strerror}): train the run again with --overwrite"
        ) from None
    titles = [row["title"] or row["item"] for row in rows]
    genres = [tuple(filter(None, row["genres"].split("|"))) for row in rows]
    return Items(titles, genres, run.arrays["item_popularity"], run.arrays["item"])


def well_known(items: Items) -> list[int]:
    """Ten popular items, most popular first: one for each of the commonest genres, no two of them close neighbours."""
    order = items.by_popularity.tolist()
    common = [
        name for name, _ in Counter(genre for genres in items.genres for genre in genres).most_common(SHOWN_ITEMS)
    ]
    found: list[int] = []
    close: set[int] = set()
    for genre in common:
        new = [item for item in order if genre in items.genres[item] and item not in close][:1]
        found += new
        if new:
            close |= {*new, *nearest(items.vectors, np.array(new), np.arange(len(order)), NEIGHBOURS)[0][0].tolist()}
    found += [item for item in order if item not in found][: SHOWN_ITEMS - len(found)]
    return sorted(found, key=order.index)


def nearest(vectors: np.ndarray, chosen: np.ndarray, among: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of the items ``among`` to each chosen one, itself excluded: ids [n, k] and squared distances [n, k]."""
    from scipy.spatial.distance import cdist

    sq_distance = cdist(vectors[chosen], vectors[among], "sqeuclidean")
    sq_distance[chosen[:, None] == among] = np.inf
    order = np.argsort(sq_distance, axis=1, kind="stable")[:, : min(k, len(among) - 1)]
    return among[order], np.take_along_axis(sq_distance, order, 1)


def genre_agreement(items: Items) -> tuple[float, float] | None:
    """Share of the ten nearest items that have a genre in common, and the same for any ten items; None without genres.

    Over items with train interactions and a genre.
    """
    rows = np.array([row for row, genres in enumerate(items.genres) if genres and items.popularity[row] > 0])
    if len(rows) <= NEIGHBOURS:
        return None
    names = {name: column for column, name in enumerate(sorted({genre for row in rows for genre in items.genres[row]}))}
    table = np.zeros((len(items.titles), len(names)), dtype=bool)
    for row in rows:
        table[row, [names[genre] for genre in items.genres[row]]] = True
    near = nearest(items.vectors, rows, rows, NEIGHBOURS)[0]
    shared = (table[rows][:, None] & table[near]).any(2).mean()
    chance = (table[rows].astype(np.float32) @ table[rows].T.astype(np.float32) > 0).mean()
    return float(shared), float(chance)


# -- sections


def _training(page: Page, runs: Sequence[StoredRun]) -> None:
    page.section("Training")
    for run in runs:
        rows, topks = run.result["epochs"], run.result["topks"]
        what = "test" if run.on_test else "validation"
        page.table(["epoch", "total loss", *(f"recall@{k}" for k in topks), "seconds"], [list(row.values()) for row in rows],
                   f"{run.label}. Total loss: sum over the epoch's pairs. Recall: {what}. Seconds: training alone.")  # fmt: skip


def _items(page: Page, runs: Sequence[StoredRun], *, projection: str, of: Sequence[str] | None, seed: int) -> None:
    """Map and neighbours of the items of each run."""
    for run in runs:
        items, name = _read_items(run), "" if len(runs) == 1 else run.label
        chosen = well_known(items) if of is None else [by_title(title, items.titles) for title in of]
        _map(page, items, chosen, projection, seed, name)
        _neighbours(page, items, chosen, name)


def _map(page: Page, items: Items, chosen: Sequence[int], projection: str, seed: int, name: str) -> None:
    shown = items.by_popularity[:MAP_POINTS]
    shown = shown[items.popularity[shown] > 0]
    missing = [item for item in chosen if item not in set(shown.tolist())]
    shown = np.concatenate([shown, np.array(missing, dtype=shown.dtype)])
    if len(shown) < 5:
        return
    plane, how = project(items.vectors[shown], projection, seed)
    page.section(f"Map of the items{f', {name}' if name else ''}")
    if agreement := genre_agreement(items):
        page.note(
            "plain",
            f"Of an item's {NEIGHBOURS} nearest items {agreement[0]:.0%} share a genre with it; of any items {agreement[1]:.0%} would.",
        )
    colour = "by genre" if any(items.genres) else "by popularity"
    caption = f"{how} of the vectors of the {len(shown):,} most popular items, coloured {colour}; larger dots are more popular."
    page.figure(
        "-".join(filter(None, ["map", slug(name) if name else ""])), _draw_map(items, shown, plane, chosen), caption
    )


def project(vectors: np.ndarray, projection: str, seed: int) -> tuple[np.ndarray, str]:
    """Vectors [n, D] as points of the plane [n, 2], and the name of the method."""
    from sklearn.decomposition import PCA

    if projection == "pca":
        fitted = PCA(2, random_state=seed).fit(vectors)
        return fitted.transform(
            vectors
        ), f"First two principal components ({fitted.explained_variance_ratio_.sum():.0%} of the variance)"
    from sklearn.manifold import TSNE

    tsne = TSNE(2, init="pca", perplexity=min(30.0, (len(vectors) - 1) / 3), random_state=seed)
    return tsne.fit_transform(vectors), "t-SNE"


@styled
def _draw_map(items: Items, shown: np.ndarray, plane: np.ndarray, chosen: Sequence[int]) -> Figure:
    from matplotlib.patheffects import withStroke

    figure, axes = panels(1, 1, height=7.0)
    axis = axes[0, 0]
    counted = Counter(genre for item in shown for genre in items.genres[item])
    colors = dict(zip([name for name, _ in counted.most_common(len(COLORS))], COLORS, strict=False))
    sizes = 6 + 24 * np.sqrt(items.popularity[shown] / max(1, items.popularity.max()))
    if colors:
        first = [next((genre for genre in items.genres[item] if genre in colors), "") for item in shown]
        for name, color in (colors | {"": GREYS[1]}).items():
            of = np.array([genre == name for genre in first])
            axis.scatter(*plane[of].T, s=sizes[of], color=color, alpha=0.7, linewidths=0, label=name or "other")
        legend_below(figure, axis)
    else:
        from matplotlib.colors import LogNorm

        counts = np.maximum(items.popularity[shown], 1)
        dots = axis.scatter(*plane.T, s=sizes, c=counts, cmap="viridis", norm=LogNorm(), alpha=0.7, linewidths=0)
        figure.colorbar(dots, ax=axis, label="train interactions", fraction=0.03)
    axis.set_axis_off()
    place = {item: row for row, item in enumerate(shown.tolist())}
    x, y = np.array([plane[place[item]] for item in chosen]).T
    axis.scatter(x, y, s=70, facecolors="none", edgecolors="#343942", linewidths=1.4)
    readable = [withStroke(linewidth=3, foreground="white")]
    titles = [items.titles[item] for item in chosen]
    label_points(axis, x, y, titles, "#343942", fontweight="bold", path_effects=readable)
    return figure


def _neighbours(page: Page, items: Items, chosen: Sequence[int], name: str) -> None:
    among = np.flatnonzero(items.popularity > 0)
    ids, sq_distance = nearest(items.vectors, np.array(chosen), among, 5)
    page.section(f"Nearest neighbours{f', {name}' if name else ''}")
    page.table(
        ["item", *(f"{rank + 1}." for rank in range(ids.shape[1]))],
        [
            [Cell(items.titles[item], ", ".join(items.genres[item])),
             *(Cell(items.titles[near], f"{distance:.3f}") for near, distance in zip(row, distances, strict=True))]
            for item, row, distances in zip(chosen, ids.tolist(), sq_distance.tolist(), strict=True)
        ],
        "The five items with the smallest squared distance (small print), among items with train interactions. The loss "
        "never compares two items: neighbours follow from the users they share.", words=True,
    )  # fmt: skip


def _search(page: Page, runs: Sequence[StoredRun]) -> None:
    for run in runs:
        found = read_json(run.path / "ann" / "ann.json", *ANN)
        if found is None:
            continue
        page.section("Nearest-neighbour index")
        rows = [["exact (one matrix product)", "1.0000", f"{found['exact_queries_per_second']:,.0f}"]]
        rows += [
            [row["search"], f"{row['recall']:.4f}", f"{row['queries_per_second']:,.0f}"] for row in found["searches"]
        ]
        page.table(["search", f"recall@{found['top']} against exact", "queries a second"], rows,
                   f"{run.label}: {found['kind']} index of {found['items']:,} items; {found['queries']:,} users as queries.")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
