"""Several processes that share each batch make the steps of one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gfml.base.checkpoints import load_state
from gfml.base.runs import read_result
from gfml.data.synthetic import generate
from gfml.engine.distributed import World
from gfml.program.steps import shared_loss
from recsys.experiment import Recsys
from recsys.main import PROGRAM

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--dataset", "synthetic", "--demo-users", "301", "--demo-items", "120", "--demo-interactions", "5000", "--epochs", "2",
        "--eval-every", "1", "--batch-size", "333", "--report", "0", "--baselines", "none", "--device", "cpu", "--no-progress",
        "--model", "lgn", "--loss_mode", "mix_bpr", "--lr", "0.01", "--ema-scope", "all", "--refit"]  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "flags", (["--model", "lgn", "--loss_mode", "mix_bpr"], ["--model", "cml", "--loss_mode", "cml", "--num-neg", "3"])
)
@pytest.mark.parametrize("size", (2, 3))
@pytest.mark.parametrize("rows", (50, 2))
def test_the_mean_over_processes_is_the_gradient_of_the_batch(flags: list[str], size: int, rows: int) -> None:
    """Also where processes have unequally many rows, or one has none."""
    options = PROGRAM.parse([*TINY[:-1], *flags])
    this = Recsys(replace(options, batch_size=rows), generate(30, 40, 400, seed=0))
    torch.manual_seed(0)
    model = this.build().double()
    batch = next(iter(this.training(model).batches(1)))
    reduction = "sum" if options.loss_mode == "cml" else "mean"
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(compute) -> list[torch.Tensor]:
        found = torch.autograd.grad(compute(batch)["loss"], parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    whole = gradients(model.loss)
    shares = [gradients(shared_loss(model.loss, World(rank, size, CPU), reduction=reduction)) for rank in range(size)]
    assert any(g.abs().max() > 0 for g in whole)
    for expected, *parts in zip(whole, *shares, strict=True):
        torch.testing.assert_close(sum(parts) / size, expected)


@pytest.mark.parametrize("flags", (["--compat", "1"], ["--loss_mode", "cml", "--use_cov_loss"]))
def test_losses_of_whole_batches_are_not_shared(flags: list[str], processes, tmp_path: Path) -> None:
    words = [*TINY[:-1], *flags, "--out", str(tmp_path)]
    said = processes(2, ROOT / "recsys" / "main.py", *words, fails=True)
    assert any("several processes" in text for text in said)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    program = [str(ROOT / "recsys" / "main.py"), *TINY]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = {}
    for name, start in (("one", [sys.executable]), ("two", two)):
        done = subprocess.run(
            [*start, *program, "--out", str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    [one], [two] = ([run for run in (tmp_path / name).iterdir() if (run / "done").exists()] for name in ("one", "two"))
    weights = [load_state(run / "final.pt")["model"] for run in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-6)
    results = [read_result(run)["test"] for run in (one, two)]
    assert results[0] == pytest.approx(results[1], abs=2e-3)
    # The first process alone speaks.
    assert said["two"].count("run directory") == said["one"].count("run directory") == 1
