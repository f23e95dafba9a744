"""Two processes that share each batch train as one: programs of recommenders beside recsys, which has tests of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gfml.base.checkpoints import load_state
from gfml.base.runs import read_metrics, read_result
from gfml.program.program import program_of

ROOT = Path(__file__).resolve().parents[3]
TINY = """--dataset demo --demo-users 60 --demo-items 40 --demo-interactions 900 --embedding-dim 8 --epochs 2 --device cpu
    --report 0 --baselines none --no-progress --topks 5 --lr 0.02""".split()
PROGRAMS = {
    # Unequal weights: with equal ones the users' masses have gradient 0, and Adam would follow its rounding.
    "mcl/main.py": "--mode gfml --lamb_p 1.5 --lamb_n 0.9 --batch-size 25 --num-neg 3 --mirror two_step",
    "cml_baseline/main.py": "--batch-size 100 --num-neg 4 --select-metric recall@5",
    "hlrm/train.py": "--batch-size 101 --model transcf --num-inter 4 --eval-size 10",
    "mirror_grad/main.py": "--model FREEDOM --features random --batch-size 101 --select-metric recall@5 --no-cache",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_processes_equal_one(program: str, processes: Callable[..., list[str]], tmp_path: Path) -> None:
    words = [*TINY, *PROGRAMS[program].split(), "--out"]
    assert program_of(program.removesuffix(".py").replace("/", ".")).main([*words, str(tmp_path / "one")]) == 0
    first, second = processes(2, ROOT / program, *words, tmp_path / "two")
    # The first process alone speaks.
    assert "2 processes" in first and "run directory" in first and "run directory" not in second
    one, two = (next(path.parent for path in (tmp_path / name).glob("*/done")) for name in ("one", "two"))
    assert len(read_metrics(one)) == 2
    for expected, found in zip(read_metrics(one), read_metrics(two), strict=True):
        assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    weights = [load_state(run / "final.pt")["model"] for run in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5)
    assert read_result(two)["test"] == pytest.approx(read_result(one)["test"], abs=2e-2)


def test_a_loss_that_is_no_sum_over_rows_is_refused(processes: Callable[..., list[str]], tmp_path: Path) -> None:
    words = [*TINY, "--model", "BM3", "--features", "random", "--out", tmp_path]
    said = processes(2, ROOT / "mirror_grad" / "main.py", *words, fails=True)
    [line] = [line for line in said[0].splitlines() if "several processes" in line]
    assert "--model BM3, whose loss" in line and "start one process" in line
