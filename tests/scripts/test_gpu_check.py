"""The GPU check runs on the CPU with toy sizes, so that its first minute on a GPU is not lost to a typo."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = str(ROOT / "scripts")
QUICK = (
    "numbers-mcl", "numbers-fused", "numbers-vision", "numbers-mirror1", "waiting", "recorded", "times-ceilings", "times-lightgcn", "times-factorisation",
    "times-fused", "times-mcl", "times-contextual", "times-attention", "times-vit", "times-multimodal2", "vit-distance",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def scripts():
    before, threads = list(sys.path), torch.get_num_threads()
    sys.path.insert(0, SCRIPTS)
    torch.set_num_threads(1)
    yield
    sys.path[:] = before
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", QUICK)
def test_parts_run_on_the_cpu(part: str, tmp_path: Path) -> None:
    import gpu_parts

    args = Namespace(part=part, device="cpu", tiny=True, out=tmp_path, data_root=tmp_path)
    rows = list(gpu_parts.PARTS[part].run(args))
    assert rows and all(row["work"] for row in rows)
    assert not [row for row in rows if row.get("ok") is False]
    assert all(row["loss"] == 0 and row["way"] == 0 for row in rows if "way" in row)


def test_parts_are_processes_whose_results_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_check

    words = ["--device", "cpu", "--out", str(tmp_path), "--data-root", str(tmp_path), "--only", "times-vit"]
    assert gpu_check.main(words) == 0
    assert "not run" in capsys.readouterr().out
    parts = {part["part"]: part for part in json.loads((tmp_path / "results.json").read_text())["parts"]}
    assert parts["times-vit"]["reason"] == "no cifar10 in --data-root"
    (tmp_path / "times-vit.json").write_text(json.dumps(parts["times-vit"] | {"status": "ok", "reason": "kept"}))
    assert gpu_check.main(words) == 0 and "kept" in capsys.readouterr().out


def test_noise_of_the_cpu_is_the_noise_of_a_loss() -> None:
    import gpu_probe

    x = torch.ones(1000)
    torch.manual_seed(0)
    wanted = torch.nn.functional.dropout(x, 0.3), torch.rand(5)
    torch.manual_seed(0)
    with gpu_probe.DrawsOfTheCPU():
        found = torch.native_dropout(x, 0.3, True)[0], torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_the_page_is_made_from_the_stored_results(tmp_path: Path) -> None:
    import gpu_page

    target = tmp_path / "gpu.md"
    target.write_text("# Words by hand\n")
    assert gpu_page.main([str(ROOT / "docs" / "gpu.json"), str(target)]) == 0
    assert gpu_page.main([str(ROOT / "docs" / "gpu.json"), str(target)]) == 0
    text = target.read_text()
    assert text.startswith("# Words by hand\n") and text.count("## Results") == 1
    committed = (ROOT / "docs" / "gpu.md").read_text()
    assert text.partition(gpu_page.MARK)[2] == committed.partition(gpu_page.MARK)[2]


def test_the_page_tells_what_was_not_run() -> None:
    import gpu_page

    rows = [{"work": "a step", "ms": 2.0, "recorded_ms": 1.0, "bar": "<= 3 ms", "ok": True}]
    parts = [
        {"part": "times-a", "status": "ok", "rows": rows},
        {"part": "processes", "status": "not run", "reason": "one card", "rows": []},
    ]
    text = gpu_page.page({"machine": {"date": "2026-01-01", "torch": "2", "python": "3"}, "parts": parts})
    assert "| a step | 2 | 1 | <= 3 ms |" in text and "Not run: one card." in text and "no card" in text
    assert "**times-flex**\n\nNot run: not among these results." in text and "**vit-tail**" in text
