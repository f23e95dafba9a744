"""One command for everything that is installed.

    gfml                                        what there is
    gfml recsys --dataset lastfm --model lgn    the program of a paper: PAPER/main.py, or PAPER/train.py
    gfml hlrm eval RUN                          another program of a paper
    gfml compare RUN OTHER                      a command about finished runs, tables or sweeps

``gfml recsys ...`` and ``python recsys/main.py ...`` are the same. Papers are found, not listed: the packages beside
``gfml`` whose main.py or train.py is a program that imports it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from gfml import __version__
from gfml.base.errors import choice_error
from gfml.base.home import PACKAGE
from gfml.program.cli import run_main

# Commands of the project itself; each module has a ``main(argv)``.
COMMANDS = {
    "recommend": "gfml.program.recommend",
    "vectors": "gfml.program.vectors",
    "compare": "gfml.report.compare",
    "report": "gfml.report.collection",
    "sweep": "gfml.program.sweep",
    "run-commands": "gfml.program.run_commands",
    "reproduce": "gfml.report.reproduce",
    "results-table": "gfml.report.results_table",
    "judge": "gfml.report.judge",
    "import": "gfml.program.import_weights",
}
# Commands under another name, with flags of their own.
ALIASES = {"export": ("vectors", "--form", "tools", "--output", "vectors")}
FIRST = ("main", "train")
IS_PROGRAM = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
USES_CORE = re.compile(r"^(from|import) gfml\b", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"gfml {__version__}")
        return 0
    name, rest = words[0].replace("_", "-"), words[1:]
    if name in ALIASES:
        name, *more = ALIASES[name]
        rest = [*more, *rest]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name]).main(rest) or 0
    programs = programs_of(words[0].replace("-", "_"))
    if not programs:
        raise choice_error("command or paper", words[0], [*COMMANDS, *ALIASES, *papers()])
    chosen = rest[0].replace("-", "_") if rest else ""
    if chosen in programs:
        rest = rest[1:]
    else:
        chosen = next(first for first in FIRST if first in programs)
    # As a script of its own: a run's record then names the program, and not this command.
    sys.argv = [str(programs[chosen]), *rest]
    runpy.run_module(f"{words[0].replace('-', '_')}.{chosen}", run_name="__main__", alter_sys=True)
    return 0


def papers() -> list[str]:
    """The packages beside the core that have a program."""
    folders = sorted(path.parent for path in PACKAGE.parent.glob("*/__init__.py") if path.parent != PACKAGE)
    return [folder.name for folder in folders if any(first in _programs_in(folder) for first in FIRST)]


def programs_of(paper: str) -> dict[str, Path]:
    """The programs of an importable package by name; empty for one without a main.py or train.py on this core."""
    spec = importlib.util.find_spec(paper) if paper.isidentifier() else None
    found: dict[str, Path] = {}
    for place in (spec.submodule_search_locations or ()) if spec else ():
        found |= _programs_in(Path(place))
    return found if any(first in found for first in FIRST) else {}


def _programs_in(folder: Path) -> dict[str, Path]:
    if not any((folder / f"{first}.py").is_file() for first in FIRST):
        return {}
    texts = {path: path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))}
    return {path.stem: path for path, text in texts.items() if IS_PROGRAM.search(text) and USES_CORE.search(text)}


def overview() -> str:
    """What there is, a line each."""
    lines = ["gfml: metric learning with a gravity function", "", "papers: gfml PAPER [PROGRAM] --help"]
    for paper in papers():
        programs = programs_of(paper)
        first = next(name for name in FIRST if name in programs)
        others = [name for name in programs if name != first]
        lines.append(f"  {paper:14} {_first_line(programs[first])}")
        lines += [f"  {'':14} also: {', '.join(others)}"] if others else []
    lines += ["", "commands: gfml COMMAND --help"]
    for name, module in COMMANDS.items():
        lines.append(f"  {name:14} {_first_line(PACKAGE.parent.joinpath(*module.split('.')).with_suffix('.py'))}")
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def entry() -> None:
    """The installed command."""
    sys.exit(run_main(main))


if __name__ == "__main__":
    entry()
