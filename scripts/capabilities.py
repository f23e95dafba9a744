"""What each program can, asked of the programs: ``docs/capabilities.md``.

    python scripts/capabilities.py            write the page
    python scripts/capabilities.py --check    exit with 1 where the page says something else

A "yes" is a flag, a method or a class that is there; a "no" has its reason, which the experiment gives
(``Experiment.without``) or which follows from what it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gfml.base.errors import UserError
from gfml.base.settings import about
from gfml.program.cli import Parser, run_main
from gfml.program.experiment import Experiment
from gfml.program.program import Program, program_of
from gfml.program.recommender import Recommender

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "capabilities.md"
HEAD = """# What each program can

Made by `python scripts/capabilities.py` from the programs themselves.

"""
# What a run can -> the setting that asks for it.
BY_SETTING = {
    "continue (`--resume`)": "resume", "judge stored weights (`--eval-only`)": "eval_only", "retrain (`--refit`)": "refit",
    "mirror gradient (`--mirror`)": "mirror", "TensorBoard (`--tensorboard`)": "tensorboard",
    "bfloat16 (`--amp`)": "amp", "`--compile`": "compile", "recorded steps (`--cuda-graph`)": "cuda_graph",
}  # fmt: skip


def programs() -> list[Program]:
    """Every program of a paper, by discovery: main.py or train.py of a package that declares one."""
    found = []
    for path in sorted(ROOT.glob("*/__init__.py")):
        for file in ("main", "train"):
            if path.parent.name not in ("gfml", "tests", "scripts") and (path.parent / f"{file}.py").is_file():
                found.append(program_of(f"{path.parent.name}.{file}"))
    return found


def column(program: Program) -> dict[str, str]:
    """What a program can: yes, or no with its reason."""
    kind, settings = program.load_experiment(), program.settings.choose([])
    known = about(settings)
    found = {what: "yes" if name in known else _no(kind, name) for what, name in BY_SETTING.items()}
    flags = ", ".join(f"`{flag}`" for flag in kind.unshared)
    but = f", but not with {flags}: losses that are no sum over rows" if flags else ""
    found["several processes (`torchrun`)"] = f"yes{but}"
    drawn = kind.page is not Experiment.page or kind.joint_page.__func__ is not Experiment.joint_page.__func__
    found["report page"] = "yes" if drawn else _no(kind, "report")
    lists = issubclass(kind, Recommender)
    for what in (
        "lists for users, neighbours of items (`gfml recommend`)",
        "vectors and masses with ids, index (`gfml vectors`)",
    ):
        found[what] = "yes" if lists else "no: it ranks no items for users"
    found["`gfml.load(RUN)`, `gfml compare`, sweeps"] = "yes"
    return found


def _no(kind: type[Experiment], name: str) -> str:
    if name not in kind.without:
        raise UserError(f"{kind.__name__} has no {name} and no reason for it: give one in its without")
    return f"no: {kind.without[name]}"


def page(columns: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for what can be done, a column for a program."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows: dict[str, Any] = next(iter(columns.values()))
    lines += [f"| {what} | {' | '.join(found[what] for found in columns.values())} |" for what in rows]
    return HEAD + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="scripts/capabilities.py", description="Write docs/capabilities.md from the programs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page differs")
    options = parser.parse_args(argv)
    text = page({program.file: column(program) for program in programs()})
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        print(PAGE.relative_to(ROOT))
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/capabilities.md is not what the programs say: run python scripts/capabilities.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
