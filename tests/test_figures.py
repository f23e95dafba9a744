"""How the source is cut: lengths, parameters, blocks that papers share. ``python scripts/figures.py`` prints the figures."""

from __future__ import annotations

import importlib.util
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
    long = [f for f in figures.functions(figures.everything()) if f.lines > figures.LONGEST and _is_held(f.place)]
    assert not long, long


def test_functions_take_few_things(figures: ModuleType) -> None:
    """Settings apart: parameters with a plain default, which a call may leave out."""
    wide = [
        f
        for f in figures.functions(figures.everything())
        if f.parameters > figures.MOST_PARAMETERS and not f.compiled and _is_held(f.place)
    ]
    assert not wide, wide


def _is_held(place: str) -> bool:
    return not place.startswith(WAITING)


# Programs that wait for the driver: their flags and mains go with it.
WAITING = ("gfml/engine/train.py", "hlrm/", "contextual/", "mirror_grad/", "scripts/bench.py")
