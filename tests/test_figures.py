"""How the source is cut: lengths, parameters, blocks that papers share. ``python scripts/figures.py`` prints the figures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_counts_are_right(figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    body = "\n".join(f"    value{n} = {n}" for n in range(figures.EQUAL_LINES))
    for paper in ("one", "two"):
        (tmp_path / paper).mkdir()
        (tmp_path / paper / "__init__.py").write_text("")
        text = f'def f(a, b, *, c=1, d=[], **e):\n    """Told\n    here."""\n    name = "{paper}"\n{body}\n'
        (tmp_path / paper / "main.py").write_text(text)
    found = list(figures.functions(figures.sources("one")))
    assert [(f.name, f.lines, f.docstring, f.parameters, f.settings) for f in found] == [("f", 14, 2, 3, 1)]
    assert figures.papers() == ["one", "two"] and figures.lines_of(["one"]) == 4 + figures.EQUAL_LINES
    assert figures.equal_blocks() == [("one/main.py:5", "two/main.py:5")]


def test_functions_are_short(figures: ModuleType) -> None:
    """The docstring apart, which says more the more public a function is."""
    long = [f for f in figures.functions(figures.everything()) if f.lines > figures.LONGEST]
    assert not long, long


def test_functions_take_few_things(figures: ModuleType) -> None:
    """Settings apart: parameters with a plain default, which a call may leave out."""
    wide = [
        f for f in figures.functions(figures.everything()) if f.parameters > figures.MOST_PARAMETERS and not f.compiled
    ]
    assert not wide, wide


def test_a_reader_goes_from_flags_to_loss_in_nine_files(tmp_path: Path) -> None:
    """The files on the way of recsys: those that declare and build, and those that call down to the loss."""
    code = (
        "import sys, traceback\n"
        "from pathlib import Path\n"
        "from gfml import losses\n"
        "found, plain = [], losses.bce\n"
        "def bce(*scores):\n"
        "    found.extend(frame.filename for frame in traceback.extract_stack() if 'gfml' in frame.filename or 'recsys' in frame.filename)\n"
        "    return plain(*scores)\n"
        "losses.bce = bce\n"
        "from recsys.main import main\n"
        "main(sys.argv[1:])\n"
        "print('FILES', *sorted({'/'.join(Path(name).parts[-3:]) for name in found}))\n"
    )
    small = (
        "--demo-users 60 --demo-items 50 --demo-interactions 800 --epochs 1 --report 0 --baselines none --no-progress"
    )
    words = [sys.executable, "-c", code, *small.split(), "--kernel", "autograd", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called = done.stdout.rpartition("FILES ")[2].split()
    assert len(called) >= 5 and any(name.endswith("gfml/losses.py") for name in called)
    declared = ["recsys/main.py", "recsys/settings.py", "recsys/experiment.py", "gfml/gravity.py"]
    assert len({*called, *declared}) <= 9, called
