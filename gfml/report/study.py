"""What a study found: its rows with their searches and costs, frontiers under damping, tests, figures and page.

``gfml reproduce NAME --collect`` writes, for a table with [search], ``FOLDER/results/NAME.csv`` (a line per row),
``NAME-seeds.csv`` (row and seed), ``NAME-frontier.csv`` (row, split, gamma; means over seeds), ``NAME-paired.csv``, a figure, and the block
of ``FOLDER/NAME.md`` between ``<!-- study:NAME -->`` and ``<!-- end-study:NAME -->``, which is made from these files alone. A
row's label is "DATA, METHOD". A study that has not run to its end says which rows have.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.base.files import atomic_open, write_json
from gfml.report.one_setting import section, trial_rows
from gfml.report.results_table import PAIRED, paired_markdown, paired_name, rows_of_runs, store_rows, stored_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gfml.metrics.compare import Friedman
    from gfml.report.reproduce import Known

Row = dict[str, str]
BLOCK = ("<!-- study:{} -->", "<!-- end-study:{} -->")
K = 20
# The state of a row that no run of its own made.
BESIDE = "judged beside the others"
MASS_SCALES = (0.0, 0.25, 0.5, 0.75)
# Damping goes as far as this share of a method's own ndcg on validation is kept.
KEPT_SHARE = 0.95
FIRST = (
    "method",
    "protocol",
    "n",
    "epoch",
    "train_seconds",
    "state",
    "trials",
    "chosen",
    "at_cap",
    "cpu_search",
    "cpu_seeds",
)
TRIALS = ("method", "point", "value", "epoch", "cpu")


def collect(name: str, table: Mapping[str, Any], known: Sequence[Known], out: Path, data_root: str | None) -> None:
    """Write every file of a study from the runs that are done; what more seeds made before stays."""
    from gfml.report.reproduce import TABLE_ROOT
    from gfml.report.table_pairs import paired_rows

    folder = TABLE_ROOT / table["folder"]
    labels = list(dict.fromkeys(one.cell.row for one in known))
    done = {(one.cell.label, one.cell.seed): one.path for one in known if one.path and not one.cell.point}
    stored = {row["method"]: row for row in stored_rows(folder, name)}
    rows = [_row(label, known, table) for label in labels]
    rows = [_fuller(row, stored.get(row["method"])) for row in [*rows, *_beside(known, table)]]
    rows += [
        row for label, row in stored.items() if row["state"] == BESIDE and label not in {row["method"] for row in rows}
    ]
    gammas = table["search"].get("gammas", ())
    if gammas:
        points = {key: _points(path, gammas, out, data_root) for key, path in done.items()}
        _store_frontiers(folder, name, points, {row["method"] for row in rows if row["n"]})
    store_rows(folder, name, rows, FIRST)
    trials = trial_rows(known)
    # Searches that ended elsewhere stay.
    ended = {row["method"] for row in rows if row["n"]} - {row["method"] for row in trials}
    store_rows(
        folder,
        f"{name}-trials",
        [*trials, *(row for row in stored_rows(folder, f"{name}-trials") if row["method"] in ended)],
        TRIALS,
    )
    pairs: dict[tuple[str, str], None] = {}
    for one in known:
        # Two rows of one entry that both name each other are compared once.
        pairs |= {(one.cell.label, other): None for other in one.cell.against if (other, one.cell.label) not in pairs}
    if pairs:
        tests = paired_rows(list(pairs), done, table["main"], stored_rows(folder, paired_name(name)))
        store_rows(folder, paired_name(name), tests, PAIRED)
    if gammas:
        _draw(folder, name)
    if table.get("main"):
        _draw_ranks(folder, name, rows, table["main"][0])
    write_page(folder, name, table)


def _fuller(row: Row, stored: Row | None) -> Row:
    """The row made of more runs."""
    return row if not stored or int(row["n"] or 0) >= int(stored["n"] or 0) else stored


def _beside(known: Sequence[Known], table: Mapping[str, Any]) -> list[Row]:
    """A row per data set for everything untrained that its runs judged beside their model."""
    found: dict[str, Row] = {}
    for one in known:
        for row in (
            rows_of_runs([(one.cell.label, one.path)], table["metrics"])[1:] if one.path and not one.cell.point else ()
        ):
            label = f"{one.cell.label.partition(', ')[0]}, {row['method']}"
            found.setdefault(label, row | {"method": label, "state": BESIDE, "trials": "", "cpu_seeds": "0"})
    return list(found.values())


def _row(label: str, known: Sequence[Known], table: Mapping[str, Any]) -> Row:
    """One row with its search; without finished seeds only how far it is."""
    from gfml.base.runs import cpu_seconds, read_config, read_result

    seeds = [one for one in known if one.cell.label == label]
    trials = [one for one in known if one.cell.row == label and one.cell.point]
    paths = list(dict.fromkeys(one.path for one in seeds if one.path))
    ended = sum(one.state in ("done", "failed") for one in trials)
    failed = sum(one.state == "failed" for one in trials)
    row = {"method": label, "n": "", "state": "", "trials": f"{ended}/{len(trials)}" if trials else ""}
    row["state"] = ", ".join(filter(None, (f"{failed} trials failed" if failed else "",)))
    if not paths:
        needs = next((one.reason for one in seeds if one.reason), None)
        return row | {
            "state": "cannot run here"
            if needs
            else f"{ended} of {len(trials)} trials done"
            if trials
            else "not run yet"
        }
    row |= rows_of_runs([(label, path) for path in paths], table["metrics"])[0]
    caps = [read_config(path).get("epochs") for path in paths]
    chosen = [read_result(path)["selection"]["epoch"] for path in paths]
    row["at_cap"] = str(sum(bool(cap) and epoch >= cap for cap, epoch in zip(caps, chosen, strict=True)))
    settings = read_result(paths[0]).get("settings")
    row["chosen"] = (
        _point(seeds, trials) if trials else " ".join(f"{key} {value:g}" for key, value in (settings or {}).items())
    )
    row["cpu_search"] = f"{sum(cpu_seconds(one.path) for one in trials if one.path):.0f}" if trials else ""
    row["cpu_seeds"] = f"{statistics.fmean(map(cpu_seconds, paths)):.0f}"
    if len(paths) < len({one.cell.seed for one in seeds}) and trials:
        row["state"] = f"{len(paths)} of {len(seeds)} seeds done"
    return row


def _point(seeds: Sequence[Known], trials: Sequence[Known]) -> str:
    """The flags that the search chose."""
    words = seeds[0].cell.words
    return next((" ".join(one.cell.point) for one in trials if words[-len(one.cell.point) :] == one.cell.point), "")


# -- frontiers


def _points(path: Path, gammas: Sequence[float], out: Path, data_root: str | None) -> list[dict[str, Any]]:
    """The points of a run's frontier, from its stored model; kept below ``out``, as nothing but the model and gammas decides them."""
    from gfml.base.runs import read_json
    from gfml.program.loading import load
    from gfml.ranking.damping import frontier

    file = out / "frontiers" / f"{path.name}.json"
    if (kept := read_json(file, "gammas", "points")) and kept["gammas"] == list(gammas):
        return kept["points"]
    run = load(path, device="cpu", **({"data_root": data_root} if data_root else {}))
    this, model = run.experiment, run.model
    points = [point | {"mass_scale": 1.0} for point in frontier(this.scorer(model), this.interactions, gammas, K)]
    mass = this.mass(model)
    for scale in (
        MASS_SCALES if mass is not None and mass.item is not None and hasattr(this.settings, "mass_scale") else ()
    ):
        other = type(this)(dataclasses.replace(this.settings, mass_scale=scale), this.data, this.world)
        points += [
            point | {"mass_scale": scale} for point in frontier(other.scorer(model), this.interactions, (0.0,), K)
        ]
    write_json(file, {"gammas": list(gammas), "points": points})
    return points


def _store_frontiers(
    folder: Path, name: str, points: Mapping[tuple[str, int], list[dict[str, Any]]], kept: set[str]
) -> None:
    """NAME-frontier.csv, means over seeds, and NAME-seeds.csv; rows of methods without runs here stay."""
    curves: list[Row] = []
    fresh = {label for label, _ in points}
    for label in dict.fromkeys(label for label, _ in points):
        found: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
        for point in (point for (own, _), several in points.items() if own == label for point in several):
            found.setdefault((point["split"], point["gamma"], point["mass_scale"]), []).append(point)
        for (split, gamma, scale), same in found.items():
            figures = {key: f"{statistics.fmean(one[key] for one in same):.6g}" for key in same[0] if "@" in key}
            curves.append(
                {"method": label, "split": split, "gamma": f"{gamma:g}", "mass_scale": f"{scale:g}", **figures}
            )
    seeds = [{"method": label, "seed": str(seed), **_of_seed(several)} for (label, seed), several in points.items()]
    for end, rows, first in (
        ("frontier", curves, ("method", "split", "gamma", "mass_scale")),
        ("seeds", seeds, ("method", "seed")),
    ):
        old = [row for row in stored_rows(folder, f"{name}-{end}") if row["method"] in kept - fresh]
        store_rows(folder, f"{name}-{end}", [*rows, *old], first)


def _of_seed(points: Sequence[Mapping[str, Any]]) -> Row:
    """Areas below the frontier on test, and test figures of the strongest damping that validation allows."""
    from gfml.ranking.damping import frontier_area

    def pick(split: str, *, masses: bool) -> list[Mapping[str, Any]]:
        return [point for point in points if point["split"] == split and (masses or point["mass_scale"] == 1)]

    def area(found: Sequence[Mapping[str, Any]]) -> float:
        return frontier_area([p[f"head_recall@{K}"] for p in found], [p[f"tail_recall@{K}"] for p in found])

    test, valid = pick("test", masses=False), pick("valid", masses=False)
    least = KEPT_SHARE * next(p[f"ndcg@{K}"] for p in valid if p["gamma"] == 0)
    gamma = max(p["gamma"] for p in valid if p["gamma"] == 0 or (p["gamma"] > 0 and p[f"ndcg@{K}"] >= least))
    there = next(p for p in test if p["gamma"] == gamma)
    figures = {f"damped {key}": f"{there[key]:.6g}" for key in there if "@" in key}
    return {
        "area": f"{area(test):.6g}",
        "area, masses too": f"{area(pick('test', masses=True)):.6g}",
        "gamma": f"{gamma:g}",
    } | figures


# -- page


def write_page(folder: Path, name: str, table: Mapping[str, Any], *, check: bool = False) -> None:
    """Replace the block of FOLDER/NAME.md. UserError where it has none or, with check, where it is not what the files say."""
    page = folder / f"{name}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    start, end = (line.format(name) for line in BLOCK)
    if start not in text or end not in text:
        raise UserError(f"{page} has no lines {start} and {end}: add both")
    new = f"{text.partition(start)[0]}{start}\n{block(folder, name, table)}\n{end}{text.partition(end)[2]}"
    if check and new != text:
        raise UserError(f"{page} and the files of {name} disagree: run gfml reproduce {name} --collect")
    if not check:
        with atomic_open(page) as stream:
            stream.write(new)


def block(folder: Path, name: str, table: Mapping[str, Any]) -> str:
    """Everything of a page that has numbers."""
    from gfml.report.reproduce import expand

    rows = stored_rows(folder, name)
    parts = [_state(rows)]
    for data, own in _by_data(rows).items():
        if any(row["n"] for row in own):
            parts.append(f"### {data}\n\n{_table(own, table['columns'], _seeds_of(folder, name))}")
    if (folder / "results" / f"{name}.png").exists():
        parts.append(f"![frontiers](results/{name}.png)")
        parts.append(_area_tests(folder, name, table))
    parts.append(_across(rows, table["main"][0], name) if table.get("main") else "")
    metric = table["search"]["metric"].partition("/")[2]
    parts.append(section(stored_rows(folder, f"{name}-trials"), rows, expand(table), metric))
    if paired := stored_rows(folder, paired_name(name)):
        parts.append(
            f"### Paired tests{' at gamma 0' if table['search'].get('gammas') else ''}\n\n{paired_markdown(paired)}"
        )
    return "\n\n".join(filter(None, parts))


def _by_data(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"].partition(", ")[0], []).append(row)
    return found


def _method(row: Mapping[str, str]) -> str:
    return row["method"].partition(", ")[2]


def _state(rows: Sequence[Row]) -> str:
    """What has run, and what it cost."""
    ran = [row for row in rows if row["n"]]
    seconds = sum(float(row["cpu_search"] or 0) + float(row["cpu_seeds"]) * int(row["n"]) for row in ran)
    whole = [row for row in ran if not row["state"].endswith("seeds done")]
    text = [
        f"{len(whole)} of {len(rows)} rows have run to their end; all that ran took {seconds / 3600:.1f} CPU hours, searches included."
    ]
    under_way = [
        f"{row['method']} ({row['state']})"
        for row in rows
        if row not in whole and not row["state"].startswith(("0 of", "not", "cannot"))
    ]
    waiting = {data: sum(row not in whole for row in own) for data, own in _by_data(rows).items()}
    text += [f"Under way: {'; '.join(under_way)}."] if under_way else []
    text += (
        [f"Rows to come: {', '.join(f'{n} of {data}' for data, n in waiting.items() if n)}."]
        if any(waiting.values())
        else []
    )
    at_cap = [row["method"] for row in ran if int(row.get("at_cap") or 0)]
    text += [f"Chose the last allowed epoch with some seed: {'; '.join(at_cap)}."] if at_cap else []
    return " ".join(text)


def _seeds_of(folder: Path, name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in stored_rows(folder, f"{name}-seeds"):
        found.setdefault(row["method"], []).append(row)
    return found


def _table(rows: Sequence[Row], columns: Sequence[str], seeds: Mapping[str, list[Row]]) -> str:
    """A line per method of one data set."""
    areas = ["frontier area"] if seeds else []
    head = ["method", "seeds", "trials", *columns, *areas, "CPU s: search", "one seed", "epoch", "chosen on validation"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        if row["n"]:
            figures = [_figure([float(row[key])], row.get(f"{key} std")) if row.get(key) else "" for key in columns]
            own = [float(seed["area"]) for seed in seeds.get(row["method"], ())]
            shown = [_figure([100 * value for value in own], None, digits=3) if own else ""] if seeds else []
            lines.append(
                "| "
                + " | ".join([_method(row), row["n"], row["trials"].partition("/")[0], *figures, *shown, row["cpu_search"], row["cpu_seeds"],
                              row["epoch"], f"`{row['chosen']}`" if row["chosen"] else ""])
                + " |"
            )  # fmt: skip
    return "\n".join(lines)


def _figure(values: Sequence[float], spread: str | None, digits: int = 4) -> str:
    """Mean ± sample standard deviation; a method that draws nothing has none."""
    if len(set(values)) > 1:
        spread = str(statistics.stdev(values))
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {float(spread):.{digits}f}" if spread else "")


def _area_tests(folder: Path, name: str, table: Mapping[str, Any]) -> str:
    """Differences of the areas between rows that are compared, by paired t-tests over seeds."""
    import numpy as np

    from gfml.metrics.compare import holm, paired_tests
    from gfml.report.page import p_value, signed
    from gfml.report.reproduce import expand

    seeds = _seeds_of(folder, name)
    pairs = dict.fromkeys((cell.label, other) for cell in expand(table) for other in cell.against)
    found = []
    for label, against in pairs:
        if len(seeds.get(label, ())) < 2 or not seeds.get(against):
            continue
        theirs = {row["seed"]: row for row in seeds[against]}
        both = [(row, theirs[row["seed"]]) for row in seeds[label] if row["seed"] in theirs]
        for what, key in (("gamma", "area"), ("gamma and masses", "area, masses too")):
            values = np.array([100 * (float(mine[key]) - float(other["area"])) for mine, other in both])
            if key == "area" or any(mine[key] != mine["area"] for mine, _ in both):
                found.append((label, against, what, values, paired_tests(values, np.zeros(len(values))).t_pvalue))
    if not found:
        return ""
    adjusted = holm(np.array([one[-1] for one in found]))
    lines = ["| row | minus | damped by | seeds | difference of areas | p | Holm |", "|---" * 7 + "|"]
    for (label, against, what, values, p), corrected in zip(found, adjusted.tolist(), strict=True):
        spread = f"{signed(float(values.mean()))} ± {values.std(ddof=1):.4f}"
        lines.append(
            f"| {label} | {against} | {what} | {len(values)} | {spread} | {p_value(p)} | {p_value(corrected)} |"
        )
    return "### Do the frontiers differ?\n\n" + "\n".join(lines) + (
        "\n\nArea: of all (head recall, tail recall) at or below some point of the frontier on test, times 100. Paired t-test over seeds, Holm"
        " over this table. A method whose mass only moves along the frontier has the area of the one without."
    )  # fmt: skip


def _ranked(rows: Sequence[Row], metric: str) -> tuple[list[str], list[str], Friedman] | None:
    """Data sets, the methods that all of these have, best first, and Friedman's test of them in that order.

    Of the data sets with the most methods as many as make the largest table: one where little has run takes no method away.
    """
    import numpy as np

    from gfml.metrics.compare import friedman

    figures = {
        data: {_method(row): float(row[metric]) for row in own if row.get(metric)}
        for data, own in _by_data(rows).items()
    }
    names = sorted(figures, key=lambda data: -len(figures[data]))
    tables = []
    for number in range(2, len(names) + 1):
        sets = [data for data in figures if data in names[:number]]
        methods = [method for method in figures[sets[0]] if all(method in figures[data] for data in sets)]
        tables.append((sets, methods))
    sets, methods = max(tables, key=lambda one: len(one[0]) * len(one[1]), default=([], []))
    if len(methods) < 3:
        return None
    found = friedman(np.array([[figures[data][method] for method in methods] for data in sets]))
    order = np.argsort(found.ranks, kind="stable")
    return sets, [methods[place] for place in order], found._replace(ranks=found.ranks[order])


def _across(rows: Sequence[Row], metric: str, name: str) -> str:
    """Friedman's test over the data sets that all of the compared methods have."""
    from gfml.report.page import p_value

    if (ranked := _ranked(rows, metric)) is None:
        return ""
    sets, methods, found = ranked
    order = ", ".join(f"{method} {rank:.2f}" for rank, method in zip(found.ranks.tolist(), methods, strict=True))
    return (
        f"### Over {len(sets)} data sets\n\nMean ranks by {metric} on {', '.join(sets)} of the methods that all have, 1 the best: {order}."
        f" Friedman's test: {p_value(found.pvalue)}; two methods differ where their ranks do by {found.cd:.2f} or more (Nemenyi, level"
        f" .05); bars join those that do not.\n\n![mean ranks](results/{name}-ranks.png)"
    )


def _draw_ranks(folder: Path, name: str, rows: Sequence[Row], metric: str) -> None:
    """The critical-difference picture: methods at their mean ranks, bars over those that do not differ."""
    from gfml.report.page import png, styled

    if (ranked := _ranked(rows, metric)) is None:
        return
    picture = png(styled(rank_figure)(ranked[1], ranked[2].ranks.tolist(), ranked[2].cd), 100)
    with atomic_open(folder / "results" / f"{name}-ranks.png", "wb") as stream:
        stream.write(picture)


def cliques(ranks: Sequence[float], cd: float) -> list[tuple[int, int]]:
    """First and last place of every largest group of neighbours, in ascending ``ranks``, that differ by less than ``cd``."""
    found: list[tuple[int, int]] = []
    for first, low in enumerate(ranks):
        last = max(place for place, rank in enumerate(ranks) if rank - low < cd or place == first)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def rank_figure(methods: Sequence[str], ranks: Sequence[float], cd: float) -> Figure:
    """A critical-difference diagram (Demsar, JMLR 2006). methods, ranks: best first."""
    from gfml.report.page import COLORS, TEXT, panels

    groups = cliques(ranks, cd)
    half = -(-len(methods) // 2)
    figure, axes = panels(1, 1, height=1.6 + 0.24 * half + 0.12 * len(groups))
    axis = axes.flat[0]
    top, below = 0.0, -0.5 - 0.35 * len(groups)
    low, high = 1.0, float(len(methods))
    axis.plot([low, high], [top, top], color=TEXT, linewidth=1)
    for rank in range(1, len(methods) + 1):
        axis.plot([rank, rank], [top, top + 0.12], color=TEXT, linewidth=1)
        axis.text(rank, top + 0.2, str(rank), ha="center", va="bottom")
    for place, (method, rank) in enumerate(zip(methods, ranks, strict=True)):
        left = place < half
        height = below - 0.6 * (place if left else len(methods) - 1 - place)
        edge = low - 0.1 if left else high + 0.1
        axis.plot([rank, rank, edge], [top, height, height], color=TEXT, linewidth=0.8)
        axis.text(edge, height, f" {method}  {rank:.2f} ", ha="right" if left else "left", va="center", color=TEXT)
    for number, (first, last) in enumerate(groups):
        height = top - 0.35 - 0.35 * number
        axis.plot([ranks[first] - 0.04, ranks[last] + 0.04], [height, height], color=COLORS[0], linewidth=4)
    axis.plot([low, min(low + cd, high)], [top + 1.1, top + 1.1], color=COLORS[1], linewidth=2)
    axis.text(low, top + 1.2, f"critical difference {cd:.2f}", ha="left", va="bottom", color=COLORS[1])
    room = 0.45 * (high - low) + 0.5
    axis.set(xlim=(low - room, high + room), ylim=(below - 0.6 * half, top + 1.9))
    axis.axis("off")
    return figure


def _draw(folder: Path, name: str) -> None:
    """A panel per data set: head against tail recall on test, a curve per method, a ring where nothing is damped."""
    from gfml.report.page import COLORS, GREYS, legend_below, panels, png, styled

    by_data = _by_data(row for row in stored_rows(folder, f"{name}-frontier") if row["split"] == "test")
    if not by_data:
        return
    methods = list(dict.fromkeys(_method(row) for own in by_data.values() for row in own))
    colors = {method: (*COLORS, *GREYS)[number % 12] for number, method in enumerate(methods)}

    @styled
    def draw() -> Figure:
        lines = -(-len(by_data) // 2)
        figure, axes = panels(lines, min(2, len(by_data)), height=4.2)
        for axis in axes.flat[len(by_data) :]:
            axis.set_visible(False)
        for axis, (data, own) in zip(axes.flat, by_data.items(), strict=False):
            for method in methods:
                mine = [row for row in own if _method(row) == method]
                curve = sorted((float(row["gamma"]), row) for row in mine if row["mass_scale"] == "1") if mine else []
                xy = [(float(row[f"head_recall@{K}"]), float(row[f"tail_recall@{K}"])) for _, row in curve]
                axis.plot(
                    *zip(*xy, strict=True), "-", color=colors[method], linewidth=1.5, label=method
                ) if xy else None
                for gamma, row in curve:
                    if gamma == 0:
                        axis.plot(
                            float(row[f"head_recall@{K}"]),
                            float(row[f"tail_recall@{K}"]),
                            "o",
                            color=colors[method],
                            markerfacecolor="white",
                        )
                masses = sorted((float(row["mass_scale"]), row) for row in mine if row["gamma"] == "0")
                if len(masses) > 1:
                    axis.plot(
                        [float(row[f"head_recall@{K}"]) for _, row in masses],
                        [float(row[f"tail_recall@{K}"]) for _, row in masses],
                        ":",
                        color=colors[method],
                        linewidth=1.5,
                    )
            axis.set(title=data, xlabel=f"head recall@{K} on test", ylabel=f"tail recall@{K}")
        legend_below(figure, axes.flat[0])
        return figure

    with atomic_open(folder / "results" / f"{name}.png", "wb") as stream:
        stream.write(png(draw(), 100))
