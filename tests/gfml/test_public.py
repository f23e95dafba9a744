"""What ``import gfml`` offers, and that it stays lazy."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import gfml


def test_every_listed_part_is_there_and_is_the_one_of_its_module() -> None:
    assert set(gfml.__all__) == {name for names in gfml._PLACES.values() for name in names} <= set(dir(gfml))
    for module, names in gfml._PLACES.items():
        for name in names:
            assert getattr(gfml, name) is getattr(importlib.import_module(module), name)
    for name in gfml._MODULES:
        assert getattr(gfml, name) is importlib.import_module(f"gfml.{name}")
    with pytest.raises(AttributeError, match="no attribute 'gravitas'"):
        _ = gfml.gravitas


def test_listing_the_parts_imports_none() -> None:
    code = "import sys, gfml; dir(gfml); print(*sorted(name for name in sys.modules if name.startswith(('gfml', 'torch'))))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["gfml"]


def test_repr_shows_sizes_and_constants() -> None:
    text = repr(gfml.Gravity(7, 5, lamb=2.5, learn_lamb=True, mass="both", combine="product", mass_param="exp"))
    assert "lambda 2.5 learned" in text and "(mass): Mass(both, exp, product: 7 users, 5 items)" in text
    assert "unit vectors" in text and repr(gfml.Mass(7, 5, "none")) == "Mass(none)"
