"""What is installed and what it says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
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


SMALL = "--dataset demo --demo-users 150 --demo-items 110 --demo-interactions 3000 --baselines popularity --epochs 2 --device cpu --no-progress"
PROGRAMS = {
    "recsys": f"--config configs/recsys/lastfm-lgn.toml {SMALL} --report 0",
    "mcl": f"--config configs/mcl/amazon-music.toml {SMALL} --batch-size 64",
    "mirror_grad": f"--model VBPR {SMALL} --features random --random-widths 12 8",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and, for what it needs, the libraries of this one."""
    place = tmp_path_factory.mktemp("wheel")
    source, environment = place / "source", place / "environment"
    big = {"runs", "data", "build", "dist", "site", "tests"}
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.name not in big and path.suffix != ".egg-info":
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source)
    quiet = {"check": True, "capture_output": True, "text": True}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = [*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(place), str(source)]
    subprocess.run(build, **quiet)
    [wheel] = place.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], **quiet)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)], **quiet)
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([str(python), "-c", find], **quiet).stdout.strip())
    # Places alone: what an editable install put among the libraries here is not followed.
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "libraries_of_the_tests.pth").write_text("\n".join(sorted(libraries)) + "\n")
    return environment


def call(words: Sequence[str], folder: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outcome(folder: Path, paper: str) -> tuple[dict, dict]:
    """Settings and result of the only run there, without times and sizes of memory."""
    [path] = [path for path in (folder / "runs").iterdir() if path.name.startswith(paper[:6])]
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    return tomllib.loads((path / "config.toml").read_text(encoding="utf-8")), lasting(result)


def lasting(found: Any) -> Any:
    """Without what differs from one run to the next."""
    if isinstance(found, dict):
        return {name: lasting(value) for name, value in found.items() if "seconds" not in name and "memory" not in name}
    return [lasting(value) for value in found] if isinstance(found, list) else found


@pytest.mark.parametrize("paper", PROGRAMS)
def test_the_installed_program_computes_what_the_checkout_does(paper: str, installed: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "checkout", tmp_path / "installed"
    here.mkdir(), there.mkdir()
    words = PROGRAMS[paper].replace("configs/", f"{ROOT}/configs/").split()
    call([sys.executable, ROOT / paper / "main.py", *words], here, PYTHONPATH=str(ROOT))
    call([installed / "bin" / "gfml", paper, *PROGRAMS[paper].split()], there)
    assert outcome(here, paper) == outcome(there, paper)


def test_the_wheel_is_complete_and_lies_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    code = "import gfml, gfml.base.home as h; print(gfml.__file__); print(h.configs())"
    package, configs = call([installed / "bin" / "python", "-c", code], tmp_path).split()
    assert str(installed) in package and str(installed) in configs
    assert Path(package).with_name("report").joinpath("page.css").is_file()
    names = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.toml")}
    assert names == {path.relative_to(configs) for path in Path(configs).rglob("*.toml")} and len(names) > 50
    overview = call([installed / "bin" / "gfml"], tmp_path)
    papers = [path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("gfml", "tests")]
    assert all(re.search(rf"^  {name} ", overview, re.MULTILINE) for name in [*papers, "compare", "sweep", "reproduce"])
    tables = call([installed / "bin" / "gfml", "reproduce", "mcl-music"], tmp_path)
    assert ("python mcl/main.py" in tables and "not launched" in tables) or "cannot run here" in tables
    commands = [installed / "bin" / "gfml", "sweep", "configs/sweeps/recsys-lastfm.toml", "--dry-run"]
    assert "recsys/main.py" in call(commands, tmp_path)
