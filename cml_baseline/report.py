"""Report of a finished run: results, training table, a map of the items, nearest neighbours of well-known items.

    python cml_baseline/report.py RUN
    python cml_baseline/report.py RUN --projection pca --of "Alien (1979)" "Fargo (1996)"

Reads what the run stored and trains nothing. Titles and genres are those the run found (``items.csv``).
"""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_baseline.ann import read_arrays
from gfml.base.errors import UserError, suggest
from gfml.program.cli import Parser, number, run_main

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gfml.data.interactions import Interactions
    from gfml.data.items import ItemInfo
    from gfml.report.page import Page

PROJECTIONS = ("tsne", "pca")
# Points of the map: the most popular items; a t-SNE of more takes minutes.
MAP_POINTS = 1500
NEIGHBOURS, SHOWN_ITEMS = 10, 10


def build_parser() -> Parser:
    """The command line of ``cml_baseline/report.py``."""
    parser = Parser(prog="cml_baseline/report.py", description="A report of a finished run.")
    parser.add_argument("run", metavar="RUN", help="directory of a finished run of cml_baseline/main.py")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: RUN/report)")
    parser.add_argument("--projection", choices=PROJECTIONS, default="tsne", help="how items are drawn in the plane")
    parser.add_argument(
        "--of", nargs="+", metavar="TITLE", help="show the neighbours of these items (default: ten well-known ones)"
    )
    parser.add_argument(
        "--seed", type=number(int, least=0, most=2**32 - 1), default=0, metavar="N", help="seed of t-SNE"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    print(write_report(options.run, options.out, projection=options.projection, of=options.of, seed=options.seed))
    return 0


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
        import numpy as np

        return np.argsort(-self.popularity, kind="stable")


def write_items(run: Path, data: Interactions, info: ItemInfo | None) -> None:
    """``items.csv``: id, title, genres and train interactions of every item, in the order of the vectors."""
    from gfml.base.files import atomic_open

    names = range(data.num_items) if data.item_ids is None else data.item_ids.tolist()
    with atomic_open(run / "items.csv", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["item", "title", "genres", "train"])
        for row, name in enumerate(names):
            title, genres = (info.titles[row], "|".join(info.genres[row])) if info else ("", "")
            writer.writerow([name, title, genres, data.item_popularity[row]])


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    projection: str = "tsne",
    of: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Write report.html, report.md and the plots; the path of the first. UserError for a run without a result."""
    from gfml.engine.runs import read_config, read_metrics, read_result
    from gfml.report.page import COLORS, Curves, Page, learning_curves

    path = Path(run)
    arrays = read_arrays(path)
    result, config, items = read_result(path), read_config(path), _read_items(path, arrays)
    chosen = well_known(items) if of is None else [_find(items, title) for title in of]
    selection = result["selection"]
    page = Page(f"Collaborative Metric Learning on {result['data']['name']}", _lead(result))
    _what_ran(page, path, result, config)
    _results(page, result)
    page.section("Training")
    page.table(["epoch", "total loss", *(f"recall@{k}" for k in result["topks"]), "seconds"],
               [list(row.values()) for row in result["epochs"]],
               f"Total loss: sum over the epoch's pairs. Recall: {'test' if config['select-on'] == 'test' else 'validation'}. "
               "Seconds: training alone.")  # fmt: skip
    curves = Curves(
        result["model"],
        read_metrics(path),
        f"{config['select-on']}/{config['select-metric']}",
        selection["epoch"],
        COLORS[0],
    )
    page.figure(
        "training", learning_curves([curves]), "Train loss with its terms, and the metric that selects the epoch."
    )
    _map(page, items, chosen, projection, seed)
    _neighbours(page, items, chosen)
    _search(page, path)
    return page.write(path / "report" if out is None else out)


# -- items


def _read_items(path: Path, arrays: Mapping[str, np.ndarray]) -> Items:
    try:
        with open(path / "items.csv", encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise UserError(
            f"cannot read {path / 'items.csv'} ({error.strerror}): train the run again with --overwrite"
        ) from None
    titles = [row["title"] or f"item {row['item']}" for row in rows]
    genres = [tuple(filter(None, row["genres"].split("|"))) for row in rows]
    return Items(titles, genres, arrays["item_popularity"], arrays["item"])


def _find(items: Items, title: str) -> int:
    if title not in items.titles:
        raise UserError(
            f"unknown title {title!r}, wanted one such as {items.titles[0]!r}{suggest(title, items.titles)}"
        )
    return items.titles.index(title)


def well_known(items: Items) -> list[int]:
    """Ten popular items, most popular first: one for each of the commonest genres, no two of them close neighbours."""
    import numpy as np

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
    import numpy as np
    from scipy.spatial.distance import cdist

    sq_distance = cdist(vectors[chosen], vectors[among], "sqeuclidean")
    sq_distance[chosen[:, None] == among] = np.inf
    order = np.argsort(sq_distance, axis=1, kind="stable")[:, : min(k, len(among) - 1)]
    return among[order], np.take_along_axis(sq_distance, order, 1)


def genre_agreement(items: Items) -> tuple[float, float] | None:
    """Share of the ten nearest items that have a genre in common, and the same for any ten items; None without genres.

    Over items with train interactions and a genre.
    """
    import numpy as np

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


def _lead(result: Mapping[str, Any]) -> str:
    test, selection = result["test"], result["selection"]
    figures = ", ".join(f"recall@{k} {test[f'recall@{k}']:.4f}" for k in result["topks"])
    return f"{figures} on test, epoch {selection['epoch']}, {selection['protocol']}."


def _what_ran(page: Page, path: Path, result: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    data, selection = result["data"], result["selection"]
    if config["select-on"] == "test":
        page.note("warning", "The epoch was selected on the reported test part itself: its figures are optimistic.")
    loss = (
        f"margin {config['margin']:g}, {config['num-neg']} {config['sampler']} negatives, ball {config['clip-norm']:g}"
    )
    page.section("What ran")
    page.facts({
        "data": f"{data['name']}: {data['num_users']:,} users × {data['num_items']:,} items; train {data['train']:,}, "
                f"validation {data['valid']:,}, test {data['test']:,} interactions",
        **data.get("notes", {}),
        "model": f"{result['model']}, {config['embedding-dim']} dimensions, {loss}",
        "training": f"{config['optimizer']} {config['lr']:g}, batch {config['batch-size']:,}, seed {config['seed']}",
        "selection": f"{config['select-metric']}, epoch {selection['epoch']} of {selection.get('epochs_trained', '?')}; {selection['protocol']}",
        "items without train interactions": f"{result['cold_items']:,}",
        "run directory": str(path),
    })  # fmt: skip


def _results(page: Page, result: Mapping[str, Any]) -> None:
    from gfml.report.page import Cell, best_rows, figure_of

    rows = {result["model"]: result["test"]} | {
        name: found["test"] for name, found in result["baselines"].items() if "test" in found
    }
    k = max(result["topks"])
    wanted = [f"{name}@{length}" for name in ("recall", "ndcg") for length in result["topks"]]
    wanted += [f"{group}_recall@{k}" for group in ("head", "tail", "q5", "cold")] + [f"coverage@{k}", f"arp@{k}"]
    columns = [name for name in wanted if any(name in row for row in rows.values())]
    best = {
        name: best_rows([row.get(name) for row in rows.values()]) if not name.startswith("arp") else set()
        for name in columns
    }
    page.section("Results on test")
    page.table(
        ["method", *columns],
        [[name, *(Cell(figure_of(row.get(column)), best=number in best[column]) for column in columns)]
         for number, (name, row) in enumerate(rows.items())],
        "All items the user has not in train or validation are ranked. Recall divides by the number of held-out items. head: the "
        "most popular 20 % of items; tail: the others; q5: the least popular fifth; cold: items that train never shows. "
        "coverage: share of the catalogue recommended to anyone; arp: mean popularity of recommended items.",
    )  # fmt: skip


def _map(page: Page, items: Items, chosen: Sequence[int], projection: str, seed: int) -> None:
    import numpy as np

    shown = items.by_popularity[:MAP_POINTS]
    shown = shown[items.popularity[shown] > 0]
    missing = [item for item in chosen if item not in set(shown.tolist())]
    shown = np.concatenate([shown, np.array(missing, dtype=shown.dtype)])
    if len(shown) < 5:
        return
    plane, how = project(items.vectors[shown], projection, seed)
    page.section("Map of the items")
    agreement = genre_agreement(items)
    if agreement is not None:
        page.note(
            "plain",
            f"Of an item's {NEIGHBOURS} nearest items {agreement[0]:.0%} share a genre with it; of any items {agreement[1]:.0%} would.",
        )
    colour = "by genre" if any(items.genres) else "by popularity"
    page.figure(
        "map",
        _draw_map(items, shown, plane, chosen),
        f"{how} of the vectors of the {len(shown):,} most popular items, coloured {colour}.",
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


def _draw_map(items: Items, shown: np.ndarray, plane: np.ndarray, chosen: Sequence[int]) -> Figure:
    import numpy as np

    from gfml.report.page import COLORS, GREYS, legend_below, panels, styled

    @styled
    def draw() -> Figure:
        figure, axes = panels(1, 1, height=7.0)
        axis = axes[0, 0]
        common = [
            name
            for name, _ in Counter(genre for item in shown for genre in items.genres[item]).most_common(len(COLORS))
        ]
        first = [next((genre for genre in items.genres[item] if genre in common), "") for item in shown]
        sizes = 6 + 24 * np.sqrt(items.popularity[shown] / max(1, items.popularity.max()))
        if not common:
            axis.scatter(
                *plane.T, s=sizes, c=np.log1p(items.popularity[shown]), cmap="viridis", alpha=0.7, linewidths=0
            )
        for name, color in zip([*common, ""], [*COLORS[: len(common)], GREYS[1]], strict=True) if common else ():
            of = np.array([genre == name for genre in first])
            axis.scatter(*plane[of].T, s=sizes[of], color=color, alpha=0.7, linewidths=0, label=name or "other")
        axis.set_axis_off()
        legend_below(figure, axis)
        place = {item: row for row, item in enumerate(shown.tolist())}
        _name_points(axis, np.array([plane[place[item]] for item in chosen]), [items.titles[item] for item in chosen])
        return figure

    return draw()


def _name_points(axis: Axes, points: np.ndarray, titles: Sequence[str]) -> None:
    """A ring and a title at each point [n, 2]; a title that would cover an earlier one stays away."""
    from gfml.report.page import TEXT

    axis.scatter(*points.T, s=70, facecolors="none", edgecolors=TEXT, linewidths=1.4)
    axis.figure.draw_without_rendering()
    taken: list[tuple[float, float, float]] = []
    for point, (left, y), title in zip(points, axis.transData.transform(points), titles, strict=True):
        width = 6.5 * len(title)
        if all(
            abs(y - other_y) > 15 or left > other + other_width or other > left + width
            for other, other_y, other_width in taken
        ):
            taken.append((left, y, width))
            axis.annotate(
                title, point, xytext=(7, 5), textcoords="offset points", color=TEXT, fontsize=9, fontweight="bold"
            )


def _neighbours(page: Page, items: Items, chosen: Sequence[int]) -> None:
    import numpy as np

    from gfml.report.page import Cell

    among = np.flatnonzero(items.popularity > 0)
    ids, sq_distance = nearest(items.vectors, np.array(chosen), among, 5)
    page.section("Nearest neighbours")
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


def _search(page: Page, path: Path) -> None:
    import json

    file = path / "ann" / "ann.json"
    if not file.exists():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    page.section("Nearest-neighbour index")
    rows = [["exact (one matrix product)", "1.0000", f"{found['exact_queries_per_second']:,.0f}"]]
    rows += [[row["search"], f"{row['recall']:.4f}", f"{row['queries_per_second']:,.0f}"] for row in found["searches"]]
    page.table(["search", f"recall@{found['top']} against exact", "queries a second"], rows,
               f"{found['kind']} index of {found['items']:,} items; {found['queries']:,} users as queries.")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
