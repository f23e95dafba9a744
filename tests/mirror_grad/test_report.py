"""The report of several runs: figures, paired differences, seeds together, warnings, robustness."""

from __future__ import annotations

import json

from gfml.program.cli import run_main
from mirror_grad.main import main
from mirror_grad.report import main as report
from mirror_grad.robustness import main as robustness

SHORT = "--epochs 2 --batch-size 100 --lr 0.02 --embedding-dim 8 --topks 5 20 --device cpu --no-progress --no-cache -m VBPR".split()


def test_a_report_of_arms_and_seeds(planted, tmp_path, capsys):
    names = {
        "a": [],
        "b": ["--not_mg"],
        "c": ["--not_mg", "--seed", "3"],
        "d": ["--select-on", "test", "--features", "random"],
    }
    for name, words in names.items():
        assert run_main(main, [*SHORT, "-d", str(planted), "--out", str(tmp_path), "--run-name", name, *words]) == 0
    assert (
        run_main(
            robustness,
            [
                str(tmp_path / "a"),
                "--noise",
                "1",
                "--swap",
                "1",
                "--draws",
                "1",
                "--curvature-batches",
                "1",
                "--iterations",
                "1",
            ],
        )
        == 0
    )
    assert run_main(report, [*(str(tmp_path / name) for name in names), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    stored = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in names}
    for name in ("a", "b", "c"):
        assert f"{stored[name]['test']['recall@5']:.4f}" in text
    mean = (stored["b"]["test"]["recall@5"] + stored["c"]["test"]["recall@5"]) / 2
    assert f"{mean:.4f} ±" in text and "VBPR, plain" in text and "popularity" in text and "Wilcoxon" in text
    assert "optimistic" in text and "random noise" in text and "top eigenvalue" in text
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "learning.png").exists()


def test_one_run_alone_and_other_directories(planted, tmp_path, capsys):
    assert run_main(main, [*SHORT, "-d", str(planted), "--out", str(tmp_path), "--run-name", "a"]) == 0
    assert run_main(report, [str(tmp_path / "a")]) == 0
    assert str(tmp_path / "a" / "report" / "report.html") in capsys.readouterr().out
    assert run_main(report, [str(tmp_path)]) == 2
