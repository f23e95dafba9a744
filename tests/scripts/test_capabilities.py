"""The page of capabilities is what the programs say."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "capabilities.py"


def test_the_page_is_what_the_programs_say() -> None:
    names = runpy.run_path(str(SCRIPT))
    assert names["main"](["--check"]) == 0


def test_a_no_has_a_reason() -> None:
    rows = [line.split("|")[2:-1] for line in names_page().splitlines() if line.startswith("| ")][1:]
    cells = [cell.strip() for row in rows for cell in row]
    assert cells and all(cell.startswith(("yes", "no: ")) for cell in cells)


def names_page() -> str:
    return (SCRIPT.parents[1] / "docs" / "capabilities.md").read_text(encoding="utf-8")
