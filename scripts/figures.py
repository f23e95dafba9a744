"""How large the source is and how it is cut: lines, long functions, long signatures, blocks that two papers share.

    python scripts/figures.py            every figure, and what breaks a limit
    python scripts/figures.py --all      every offender instead of the first ten of each

Counted are gfml, the papers (folders at the top with an __init__.py), scripts, benchmarks and examples, as they are formatted.
A test holds the limits.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LONGEST, MOST_PARAMETERS, EQUAL_LINES = 60, 10, 12
MOST_LINES = 28_000
# Decorators that make machine code.
COMPILED = ("compiled", "njit", "fast", "scalar", "apart", "triton.jit")


class Function(NamedTuple):
    """A function or method: where it is, its lines of code, those of its docstring, and its parameters.

    settings: parameters with a plain default (number, text, truth value, None), which a call may leave out.
    compiled: machine code, which takes its arrays and numbers one by one.
    """

    place: str
    name: str
    lines: int
    docstring: int
    parameters: int
    settings: int
    compiled: bool


def papers() -> list[str]:
    """The folders at the top that are packages, but for the core."""
    return sorted(
        p.parent.name for p in ROOT.glob("*/__init__.py") if p.parent.name not in ("gfml", "tests", "benchmarks")
    )


def sources(*folders: str) -> list[Path]:
    """Python files below folders of the repository."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def everything() -> list[Path]:
    """All that the figures are about."""
    return sources("gfml", *papers(), "scripts", "benchmarks", "examples")


def lines_of(folders: list[str]) -> int:
    """Lines of all Python files below folders."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*folders))


def functions(paths: list[Path]) -> Iterator[Function]:
    """Every function of the files. Lines run from def to the last one; self and cls do not count as parameters."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given, first = node.args, node.body[0]
            positional = [*given.posonlyargs, *given.args]
            names = [arg.arg for arg in [*positional, *given.kwonlyargs] if arg.arg not in ("self", "cls")]
            plain = sum(isinstance(default, ast.Constant) for default in [*given.defaults, *given.kw_defaults])
            told = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if told else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - docstring
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            compiled = any(ast.unparse(decorator).startswith(COMPILED) for decorator in node.decorator_list)
            yield Function(place, node.name, lines, docstring, len(names) - plain, plain, compiled)


def equal_blocks(size: int = EQUAL_LINES) -> list[tuple[str, str]]:
    """Places in two papers with ``size`` equal lines in a row: blank lines, comments and imports apart."""
    seen: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for paper in papers():
        for path in sources(paper):
            kept = [(number, line.strip()) for number, line in _meaningful(path)]
            for start in range(len(kept) - size + 1):
                block = tuple(line for _, line in kept[start : start + size])
                seen[block].append((paper, f"{path.relative_to(ROOT)}:{kept[start][0]}"))
    found = []
    for places in seen.values():
        first = dict(reversed(places))
        found += [tuple(sorted(first.values())[:2])] if len(first) > 1 else []
    return sorted(found)


def _meaningful(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not re.match(r"\s*(#|import |from \S+ import |[\])}(,]+$)", line):
            yield number, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every offender")
    most = None if parser.parse_args().all else 10
    folders = ["gfml", *papers(), "scripts", "benchmarks", "examples"]
    for folder in folders:
        print(f"{lines_of([folder]):7,} lines  {folder}")
    print(f"{lines_of(folders):7,} lines  in all, of {MOST_LINES:,}")
    found = list(functions(everything()))
    for what, over in (
        (f"functions over {LONGEST} lines", [f for f in found if f.lines > LONGEST]),
        (
            f"functions with more than {MOST_PARAMETERS} parameters beside settings",
            [f for f in found if f.parameters > MOST_PARAMETERS and not f.compiled],
        ),
    ):
        print(f"{len(over):7,} {what}")
        for one in sorted(over, key=lambda one: -one.lines)[:most]:
            print(
                f"        {one.place} {one.name}: {one.lines} lines and {one.docstring} of docstring, "
                f"{one.parameters} parameters and {one.settings} settings"
            )
    blocks = equal_blocks()
    print(f"{len(blocks):7,} blocks of {EQUAL_LINES} equal lines in two papers")
    for first, second in blocks[:most]:
        print(f"        {first} ~ {second}")


if __name__ == "__main__":
    main()
