"""What is installed and what it says of itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import find_packages

import gfml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_checkout_is_installed_and_nothing_else() -> None:
    settings = PROJECT["tool"]["setuptools"]["packages"]["find"]
    found = find_packages(str(ROOT), exclude=settings["exclude"])
    wanted = [path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    assert sorted({name.partition(".")[0] for name in found}) == sorted(wanted)
    for package in wanted:  # a folder without __init__.py would stay at home
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= set(found)


def test_version_and_licence_are_said_once() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == gfml.__version__
    assert re.search(r"^license: (.+)$", citation, re.MULTILINE)[1] == PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert (ROOT / "gfml" / "py.typed").is_file()
