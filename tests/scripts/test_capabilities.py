"""The page of capabilities is what the programs say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from gfml.program.program import program_of

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "capabilities.py"


def test_the_page_is_what_the_programs_say() -> None:
    names = runpy.run_path(str(SCRIPT))
    assert names["main"](["--check"]) == 0


def test_a_no_has_a_reason() -> None:
    rows = [line.split("|")[2:-1] for line in names_page().splitlines() if line.startswith("| ")][1:]
    cells = [cell.strip() for row in rows for cell in row]
    assert cells and all(cell.startswith(("yes", "no: ")) for cell in cells)


VALUES = {"--cov-weight": ["1"], "--features": ["items.csv"]}
SHARED = {
    "recsys.main": ["", "--loss_mode cml", "--loss_mode mix_bpr"],
    "mcl.main": ["--mode gfml", "--mode gfml --mirror two_step"],
    "cml_baseline.main": ["", "--reduction mean"],
    "hlrm.train": ["", "--model transcf", "--model lrml", "--compat 1"],
    "mirror_grad.main": ["--model BPR", "--model FREEDOM", "--model ItemKNNCBF"],
}


@pytest.mark.parametrize("module", SHARED)
def test_several_processes_are_refused_for_the_flags_of_the_page_alone(module: str) -> None:
    program, data = program_of(module), ["--dataset", "demo"]
    kind = program.load_experiment()

    def problem(words: list[str]) -> str | None:
        more = ["--loss_mode", "cml"] if module == "recsys.main" and "--features" in words else []
        return kind(program.parse([*data, *more, *words]), None).sharing_problem()

    for flag in kind.unshared:
        assert problem([*flag.split(), *VALUES.get(flag, [])]), flag
    assert [problem(words.split()) for words in SHARED[module]] == [None] * len(SHARED[module])


def names_page() -> str:
    return (SCRIPT.parents[1] / "docs" / "capabilities.md").read_text(encoding="utf-8")
