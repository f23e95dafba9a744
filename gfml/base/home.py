"""Where the project is: a checkout, or an installed package with its stored settings beside the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gfml.base.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def home() -> Path:
    """What paths such as recsys/main.py are relative to: the checkout; for an installed package the working directory."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()


def configs() -> Path:
    """The folder of stored settings: ``configs`` of the checkout, else what was installed with the package."""
    own = PACKAGE.parent / "configs"
    found = own if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE / "configs"
    if not found.is_dir():
        raise UserError(f"the stored settings are missing: there is no folder {found}; install the package anew")
    return found


def find_config(name: str | Path) -> Path:
    """A settings file as it was named; ``configs/...`` without such a file here means the project's own."""
    path = Path(name)
    if path.is_file() or path.is_absolute() or path.parts[:1] != ("configs",):
        return path
    own = configs().joinpath(*path.parts[1:])
    return own if own.is_file() else path


def find_program(name: str | Path, root: Path) -> Path | None:
    """The file of a program such as recsys/main.py: below ``root``, else that of the installed package; None without one."""
    path = Path(name)
    if (root / path).is_file():
        return root / path
    if path.is_absolute() or len(path.parts) < 2 or not all(part.isidentifier() for part in path.with_suffix("").parts):
        return None
    spec = importlib.util.find_spec(path.parts[0])
    places = (spec.submodule_search_locations or ()) if spec else ()
    return next((found for place in places if (found := Path(place).parent / path).is_file()), None)
