"""Write docs/gpu.md from what ``gpu_check.py`` found.

python scripts/gpu_page.py docs/gpu.json docs/gpu.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TITLES = {
    "numbers": "The CPU's numbers",
    "whole": "Programs from their flags to their results",
    "tests": "Marked tests",
    "waiting": "Waiting for the device",
    "recorded": "Recorded steps",
    "resume": "Resume",
    "processes": "Several processes",
    "precision": "bfloat16 and TF32",
    "times": "Times",
    "vit": "The published ViT on cimb10, 200 epochs",
    "curve": "LightGCN on gowalla, as many epochs as fitted",
}
MARK = "<!-- Below: made by scripts/gpu_page.py; do not edit. -->"
TEXTS = {
    "numbers": "20 steps from the same start, batches and noise on the card and on the CPU. loss: largest relative difference of a "
    "step's loss; way: difference of the parameters as a share of the way they went; metric: largest relative difference of a "
    "validation figure of the same weights.",
    "waiting": "Where batches or steps make the host wait for the device, found with torch.cuda.set_sync_debug_mode in 20 steps. "
    "none: nowhere. The checks of the loss every 100 steps are apart.",
    "recorded": "Largest relative difference of a step's loss between recorded and plain steps of the same batches on the card, and why "
    "steps are not recorded.",
    "resume": "A run of 4 epochs beside one of 2 that was continued for 2 more: relative difference of the weights.",
    "precision": "Test figures of short runs from the same seed. Losses accumulate in float32.",
    "times": "Medians after a warm-up; ms and seconds by device events, epochs by the host's clock between two synchronisations. "
    "recorded: the same as a CUDA graph, without the host's part. kernels: the sum of the device's own times. Parts build side by "
    "side and measure in turn, so figures with a part of the host (ms, eager) move with its load and the others do not. mib: most "
    "memory allocated during the call, what earlier rows of the part still held included. Features of baby are noise of the "
    "published widths.",
    "curve": "Judged on test every 20 epochs, as published; published after 1,000 epochs: recall .1824, ndcg .1547.",
}
HIDDEN = ("work", "ok", "largest", "where")


def page(found: dict[str, Any]) -> str:
    """The results as markdown."""
    machine, parts = found["machine"], [*found["parts"], *missing(found["parts"])]
    card = machine.get("card", "no card: the CPU, for trying the script out")
    software = [f"{name} {machine[name]}" for name in ("torch", "cuda", "triton", "python") if name in machine]
    memory = f" ({machine['memory_gib']} GiB)" if "memory_gib" in machine else ""
    bars = [bar for part in parts for row in part["rows"] if (bar := bar_row(row))]
    lines = [
        "## Results", "", f"`python scripts/gpu_check.py` on {machine['date']}: {card}{memory}, {', '.join(software)}. Figures belong to "
        "this card; ratios travel further.", "", "### Bars", "", "found: with the host's part; device: as a CUDA graph, or by the "
        "sums of the kernels' times.", "", *table(bars, ["work", "found", "device", "wanted"]),
    ]  # fmt: skip
    groups: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        groups.setdefault(next((name for name in TITLES if part["part"].startswith(name)), part["part"]), []).append(
            part
        )
    for name, members in groups.items():
        lines += ["", f"### {TITLES.get(name, name)}", "", *([TEXTS[name], ""] if name in TEXTS else [])]
        for part in members:
            lines += section(part, alone=len(members) == 1)
    return "\n".join(lines).rstrip() + "\n"


def missing(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of ``gpu_check.py`` that are not among the results."""
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_parts import PARTS

    sys.path.pop(0)
    there, reason = {part["part"] for part in parts}, "not among these results"
    return [{"part": name, "status": "not run", "reason": reason, "rows": []} for name in PARTS if name not in there]


def bar_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row that has a bar, with the figures that the bar is about."""
    if not row.get("bar"):
        return None
    bar, device = row["bar"], None
    if bar.endswith(" s"):
        found = row["seconds"]
    elif bar.endswith(" ms"):
        found, device = row["ms"], row["recorded_ms"]
    elif "eager" in bar:
        found = row["of_eager"]
    else:
        kernels = row["kernels_ms"] / row["plain_kernels_ms"] if row.get("plain_kernels_ms") else None
        found, device = row["ratio"], row.get("recorded_ratio", kernels)
    return {"work": row["work"], "found": found, "device": "" if device is None else device, "wanted": bar}


def section(part: dict[str, Any], *, alone: bool) -> list[str]:
    """One part: its table, or why there is none."""
    lines = [] if alone else [f"**{part['part']}**", ""]
    lines += [f"`{part['command']}`", ""] if "command" in part else []
    if part["status"] == "not run":
        return [*lines, f"Not run: {part['reason']}.", ""]
    if part["status"] in ("failed", "stopped"):
        lines += [f"{part['status'].capitalize()}; what there is:", ""]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in part["rows"]:
        columns = tuple(key for key in row if key not in HIDDEN and row[key] != "")
        groups.setdefault(columns, []).append(row)
    for columns, rows in groups.items():
        lines += [*table(rows, ["work", *columns]), ""]
    return lines


def table(rows: list[dict[str, Any]], columns: list[str]) -> list[str]:
    """A markdown table."""
    if not rows:
        return ["Nothing."]
    lines = [f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", f"|{' --- |' * len(columns)}"]
    return lines + [f"| {' | '.join(text(row.get(column, '')) for column in columns)} |" for row in rows]


def text(value: object) -> str:
    """A cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")[:200]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help="results of gpu_check.py, JSON")
    parser.add_argument("target", type=Path, help="the page; what stands above its mark is kept")
    given = parser.parse_args(argv)
    source, target = given.source, given.target
    above = target.read_text(encoding="utf-8").partition(MARK)[0] if target.exists() else ""
    results = page(json.loads(source.read_text(encoding="utf-8")))
    target.write_text(f"{above.rstrip()}\n\n{MARK}\n\n{results}".lstrip(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
