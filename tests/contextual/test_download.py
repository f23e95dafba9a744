"""The download script: names, what cannot be had, checks, and nothing done twice; no network."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "download_retrieval.sh"


def fetch(folder: Path, *names: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run([str(SCRIPT), str(folder), *names], capture_output=True, text=True, env=os.environ | env)


def test_a_damaged_archive_is_refused_and_removed(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.zip"
    with zipfile.ZipFile(wrong, "w") as archive:
        archive.writestr("Stanford_Online_Products/Ebay_test.txt", "")
    done = fetch(tmp_path / "data", "sop", SOP_URL=wrong.as_uri())
    assert done.returncode == 2 and "wanted 7f73d41a2f44250d..." in done.stderr
    assert not list((tmp_path / "data").iterdir())


def test_data_that_is_there_is_left_alone_and_the_rest_is_explained(tmp_path: Path) -> None:
    place = tmp_path / "CUB_200_2011"
    place.mkdir()
    (place / "images.txt").write_text("")
    done = fetch(tmp_path, "cub", "inshop")
    assert (
        done.returncode == 2 and f"cub is in {tmp_path}" in done.stdout and "inshop: ask for DeepFashion" in done.stderr
    )
    assert "give CARS_URL" in fetch(tmp_path, "cars").stderr
    assert "unknown data sopp: choose cub, sop" in fetch(tmp_path, "sopp").stderr
