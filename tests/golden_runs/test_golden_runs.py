"""The stored short runs of every program: losses and results as before, up to what another processor rounds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
NAMES = SimpleNamespace(**runpy.run_path(str(HERE / "run.py")))

STORED = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
# On the machine and with the number of threads that made them the numbers are equal bit for bit. Elsewhere sums are
# rounded otherwise, and a metric moves where two scores are nearly equal: by a few users of some hundred.
LOSS, METRIC = 1e-4, 2e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def assert_same(found: Any, wanted: Any, where: str) -> None:
    """``found`` has what ``wanted`` has; it may have more facts."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and found.keys() >= wanted.keys(), (
            f"{where}: {wanted.keys() - found.keys()} missing"
        )
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=METRIC, abs=METRIC), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("name", NAMES.RUNS)
def test_runs_give_what_they_gave(name: str, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = NAMES.run(name, folder)
    finally:
        torch.set_num_threads(threads)
    wanted = STORED[name]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=LOSS)
    assert_same(found["result"], wanted["result"], name)


SHORTER = {
    "mcl": "--epochs 1 --baselines none",
    "cml": "--epochs 1 --baselines none",
    "hlrm": "--epochs 1 --baselines none",
    "mirror-grad": "--epochs 1 --baselines none",
    "contextual-256": "",
    "vision": "--dry-run --batch-size 64",
}


def losses_with(name: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The first losses of a short run with further flags."""
    module, line = NAMES.RUNS[name]
    monkeypatch.setitem(NAMES.RUNS, name, (module, f"{line} {SHORTER[name]} {words}"))
    return NAMES.run(name, folder)["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTER)
def test_amp_rounds_to_bfloat16_and_no_more(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = "1" if name == "contextual-256" else ""
    plain = losses_with(name, "", tmp_path / "plain", monkeypatch)
    monkeypatch.undo()
    half = losses_with(name, f"--amp {value}", tmp_path / "amp", monkeypatch)
    assert half == pytest.approx(plain, rel=5e-2)
    # The others' losses are made of gathered rows alone, which autocast leaves as they are.
    assert (half != plain) == (name in ("vision", "contextual-256", "hlrm"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTER)
def test_compiled_losses_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = losses_with(name, "", tmp_path / "plain", monkeypatch)
    monkeypatch.undo()
    assert losses_with(name, "--compile", tmp_path / "compiled", monkeypatch) == pytest.approx(plain, rel=1e-4)
