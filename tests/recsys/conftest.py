"""Tiny runs of the recommender program, made in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gfml.program.cli import run_main
from recsys.main import main

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--dataset synthetic --demo-users 60 --demo-items 40 --demo-interactions 900 --epochs 2 --eval-every 1 "
    "--baselines none --report 0 --embedding-dim 8 --batch-size 256 --topks 5 10 --es_metric ndcg@10 --no-progress --seed 7"
).split()
Train = Callable[..., Path]
Fail = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred numbers gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def train() -> Train:
    """train(out, name, *flags): the directory of a finished tiny run called ``name``."""

    def run(out: Path, name: str, *flags: str) -> Path:
        assert run_main(main, [*TINY, "--out", str(out), "--run-name", name, *flags]) == 0
        return out / name

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The flags of ``train``."""
    return list(TINY)


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """fail(program, *argv): the one line that the program puts on stderr before it exits with 2."""

    def run(program: Callable[..., int], *argv: str) -> str:
        capsys.readouterr()
        try:
            code = run_main(program, list(argv))
        except SystemExit as stop:
            code = stop.code
        text = capsys.readouterr().err
        assert code == 2, (code, text)
        lines = [line for line in text.splitlines() if "error: " in line]
        assert len(lines) == 1 and text.rstrip().endswith(lines[0]) and "Traceback" not in text, text
        return lines[0]

    return run


@pytest.fixture(scope="session")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by name: gravity, bpr, mix (with relu masses), lgn (selected on test, other data parts)."""
    out = tmp_path_factory.mktemp("finished")
    flags = {
        "gravity": "--epochs 6 --lr 2e-2 --baselines popularity item-knn --tensorboard 1",
        "bpr": "--epochs 4 --lr 2e-2 --loss_mode bpr --baselines popularity",
        "mix": "--loss_mode mix --mass_param relu",
        "lgn": "--model lgn --loss_mode bpr_gra --es_on test",
    }
    return {name: train(out, name, *words.split()) for name, words in flags.items()}


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_script(path, *argv, cwd=...): a program of the repository in a process of its own."""

    def run(script: str, *argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / script), *argv]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)

    return run
