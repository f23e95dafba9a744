"""The rules of the repository that a machine can check: who imports whom, what importing costs, what text may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A paper is a folder at the top that is a package and not the core: a new one is under the rules without an edit here.
PAPERS = tuple(
    sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("gfml", "tests"))
)
# The rooms of the core, lowest first: a room imports itself and lower ones. A program draws the page of its run, and a
# command about stored runs reads its flags, so these two stand side by side. Scores of whole
# catalogues stand on ranking: gravity and cml say what a scorer factorises into.
MATHEMATICS = ("distances", "longtail", "losses", "mirror")
SCORES = ("cml", "gravity", "attention", "fused")
LAYERS = (
    ("base",),
    ("kernels",),
    MATHEMATICS,
    ("metrics", "data"),
    ("ranking",),
    SCORES,
    ("engine",),
    ("report", "program"),
)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module a file names in an import, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def family(name: str) -> str:
    return name.partition(".")[0]


def test_the_core_never_imports_a_paper() -> None:
    for path in sources("gfml"):
        assert not {family(name) for name in imported(path)} & {*PAPERS, "configs", "scripts", "tests"}, path


@pytest.mark.parametrize("paper", PAPERS)
def test_papers_never_import_each_other(paper: str) -> None:
    others = {*PAPERS} - {paper}
    for path in sources(paper):
        assert not {family(name) for name in imported(path)} & others, path


def test_rooms_import_lower_rooms_only() -> None:
    rank = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
    for path in sources("gfml"):
        part = path.relative_to(ROOT / "gfml").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imported(path):
            room = name.removeprefix("gfml.").partition(".")[0]
            if name.startswith("gfml.") and room in rank:
                assert rank[room] <= rank[part], f"{path} of {part} imports {name}"


def test_metrics_never_import_models() -> None:
    for path in sources("gfml/metrics"):
        assert not imported(path) & {"gfml.gravity", "gfml.ranking.encoders", "gfml.ranking.graph", "gfml.cml"}, path


def test_every_module_says_what_it_is() -> None:
    for path in sources("gfml", *PAPERS, "scripts"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_importing_a_module_runs_nothing() -> None:
    """Top levels hold definitions, imports and constants: no bare call, no loop, no block."""
    for path in sources("gfml", *PAPERS):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                pytest.fail(f"{path}:{node.lineno} calls something at import")
            if isinstance(node, ast.For | ast.While | ast.With):
                pytest.fail(f"{path}:{node.lineno} runs a block at import")


LIGHT = (
    "gfml",
    "gfml.program.cli",
    "gfml.base.errors",
    "gfml.base.files",
    "gfml.data.options",
    "gfml.base.settings",
    "gfml.program.program",
    "cml_baseline.main",
    "recsys.main",
    "mcl.main",
    "contextual.names",
    "contextual.main",
    "vision.main",
    "mirror_grad.main",
    "hlrm.train",
)
WITHOUT_PICTURES = (
    "gfml.engine.train",
    "gfml.ranking.evaluation",
    "gfml.report.recommenders",
    "recsys.model",
    "mcl.model",
    "mirror_grad.experiment",
)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(LIGHT, ("torch", "pandas", "scipy", "matplotlib", "tensorboard")),
     (WITHOUT_PICTURES, ("torchvision", "timm", "matplotlib", "pandas", "sklearn"))],
)  # fmt: skip
def test_modules_load_only_what_they_need(modules: tuple[str, ...], heavy: tuple[str, ...]) -> None:
    """Flags and errors are known before torch is: a wrong flag answers at once. Recommenders pay for no pictures."""
    code = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
        f"    print(*(f'{{module}} loads {{name}}' for name in {heavy} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def tracked_text() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the list of tracked files is unknown")
    kinds = {".py", ".md", ".toml", ".txt", ".sh", ".csv", ".yml", ""}
    return [
        ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in kinds and (ROOT / name).is_file()
    ]


def test_no_pickle_no_eval() -> None:
    for path in sources("gfml", *PAPERS, "scripts"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec"}, path
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"allow_pickle\s*=\s*True|weights_only\s*=\s*False|pickle\.loads?\(", text), path


def test_text_names_no_machine() -> None:
    """No home directories or workplaces of one machine in tracked files."""
    pattern = re.compile(r"(?<![\w./])/(home|root|Users|opt/[a-z]+)/\w")
    for path in tracked_text():
        found = pattern.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert found is None, f"{path}: {found.group()}"


def test_tracked_files_are_small() -> None:
    for path in tracked_text():
        assert path.stat().st_size < 512 * 1024, path


def test_errors_of_the_library_name_no_flag() -> None:
    """A setting stands in a message by its name, `val_ratio`; programs print it as their flag."""
    rooms = [ROOT / "gfml" / room for room in ("base", "data", "metrics", "ranking", "engine")]
    paths = [path for room in rooms for path in sorted(room.rglob("*.py"))] + sorted((ROOT / "gfml").glob("*.py"))
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error")):
                continue
            texts = [
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            assert not [text for text in texts if re.search(r"(^|[\s(])--[a-z]", text)], f"{path}:{node.lineno}"
