"""The worked example of docs/adding-a-model.md: it is read from the page, registered and trained by the program."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from gfml.program.cli import run_main
from mirror_grad.main import main
from mirror_grad.models import MODELS, Entry, load_model

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
SHORT = "--epochs 8 --batch-size 100 --lr 0.02 --embedding-dim 8 --topks 5 10 --device cpu --no-progress --baselines popularity --no-cache"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example's class, known to the program as ContentBPR."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) < 80
    (tmp_path / "worked_example").mkdir()
    (tmp_path / "worked_example" / "model.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from worked_example.model import Settings

    entry = Entry("worked_example.model", "ContentBPR", Settings, has_published=False)
    monkeypatch.setitem(MODELS, "ContentBPR", entry)
    yield load_model("ContentBPR")
    for name in ("worked_example.model", "worked_example"):
        sys.modules.pop(name)


def test_the_example_trains_and_beats_popularity(example, planted, tmp_path):
    words = ["-m", "ContentBPR", "-d", str(planted), "--knn-k", "5", "--out", str(tmp_path / "runs"), *SHORT.split()]
    assert run_main(main, words) == 0
    (path,) = (tmp_path / "runs").glob("mirror-*")
    result = json.loads((path / "result.json").read_text())
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] and "train/bpr" in rows[0]
    # A random order finds 10 of 60 items; the planted groups are found by their features.
    assert result["test"]["recall@10"] > 0.25


def test_a_flag_of_the_example_is_strict(example, planted, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main(main, ["-m", "ContentBPR", "-d", str(planted), "--image-wieght", "0.2"])
    assert "--image-weight" in capsys.readouterr().err
