from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: GFML_SHARED_DATA, or shared/data beside the repository; skips without it."""
    folder = Path(os.environ.get("GFML_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set GFML_SHARED_DATA to its folder")
    return folder
