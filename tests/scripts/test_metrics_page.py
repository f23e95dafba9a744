"""docs/metrics.md is what the script builds, and its numbers are the stored ones."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VALUES = json.loads((ROOT / "tests" / "golden" / "conventions" / "values.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
FACTS = json.loads((ROOT / "docs" / "metrics.json").read_text(encoding="utf-8"))
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "metrics_page.py"))


def test_the_stored_page_is_the_built_one(tmp_path):
    assert SCRIPT["page"]() == PAGE, "run python scripts/metrics_page.py"


def test_every_framework_and_metric_has_its_row():
    assert len(FACTS["frameworks"]) == 14 and len(FACTS["metrics"]) == 10
    for metric, entry in FACTS["metrics"].items():
        assert entry["rows"].keys() == FACTS["frameworks"].keys(), metric
        section = PAGE.split(f"\n## {metric}")[1].split("\n## ")[0]
        for key, row in entry["rows"].items():
            name = FACTS["frameworks"][key]["name"]
            if row["definition"] is None:
                assert name in section.split("Without it:")[1]
                continue
            numbers = re.findall(r"\d+\.\d{4}", re.search(rf"^\| {re.escape(name)} \|.*$", section, re.MULTILINE)[0])
            wanted = [] if row["value"] is None else [row["value"].replace("@10", f"@{k}") for k in (5, 10, 20)]
            assert numbers[-3:] == [f"{VALUES[key][stored]:.4f}" for stored in wanted], (metric, name)


def test_versions_are_those_of_the_values():
    for key, entry in FACTS["frameworks"].items():
        assert f"| {entry['name']} | {SCRIPT['_version'](VALUES[key]['version'])} |" in PAGE
