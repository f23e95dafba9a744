"""The paper of docs/adding-a-paper.md, written to disk as the page shows it, does what the other programs do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding-a-paper.md").read_text(encoding="utf-8")
SHOWN = r"^`(gravbpr/\w+\.py)`(?:(?!```).)*?```python\n(.*?)^```$"
FILES = dict(re.findall(SHOWN, PAGE, re.MULTILINE | re.DOTALL))
SMALL = "--dataset demo --demo-users 200 --demo-items 120 --demo-interactions 5000 --baselines popularity --no-progress".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def call(place: Path, *words: str, code: int = 0) -> str:
    path = os.pathsep.join([str(place), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_paper_is_small() -> None:
    assert sorted(FILES) == ["gravbpr/__init__.py", "gravbpr/experiment.py", "gravbpr/main.py"]
    assert sum(len(text.splitlines()) for text in FILES.values()) <= 110


def test_it_can_what_the_others_can(place: Path) -> None:
    call(place, "gravbpr/main.py", *SMALL, "--epochs", "12", "--eval-every", "3")
    [run] = (place / "runs").glob("gravbpr-*")
    whole = json.loads((run / "result.json").read_text())
    assert whole["test"]["ndcg@20"] > whole["baselines"]["popularity"]["test"]["ndcg@20"]
    assert (run / "report" / "report.html").is_file()
    # Half of it, then the rest: the same numbers. The refit and the mirror need nothing of the paper.
    call(place, "gravbpr/main.py", *SMALL, "--epochs", "6", "--eval-every", "3", "--out", "halves", "--report", "0")
    [half] = (place / "halves").glob("gravbpr-*")
    call(place, "gravbpr/main.py", "--resume", str(half), "--epochs", "12")
    assert json.loads((half / "result.json").read_text())["test"] == whole["test"]
    said = call(
        place,
        "-m",
        "gfml.program.console",
        "gravbpr",
        *SMALL,
        "--epochs",
        "2",
        "--refit",
        "--mirror",
        "two_step",
        "--report",
        "0",
    )
    assert "popularity" in said
    assert "error: argument --lamb" in call(place, "gravbpr/main.py", "--lamb", "-1", code=2)
