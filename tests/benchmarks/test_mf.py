"""Epochs of matrix factorisation for timing, and the page of time to quality."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gfml.data.synthetic import generate

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("kernel", ("auto", "autograd"))
def test_an_epoch_trains_on_every_triple(kernel: str) -> None:
    data = generate(60, 40, 900, seed=0)
    training = module("mf").MatrixFactorisation(data, "gravity", optimizer="lazy_adamw", kernel=kernel, batch_size=64)
    before = training.model.encoder.nodes.detach().clone()
    assert training.epoch() == len(training.sampler.epoch(1).users)
    assert training.epoch(steps=2) == 128 and training.epochs == 2
    assert (training.model.encoder.nodes != before).any()


def test_calls_take_turns_and_the_smallest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, order = module("costs"), []
    cpu, wall = iter([0, 9, 0, 4, 0, 5, 0, 8, 0, 7, 0, 6]), iter(range(100))
    monkeypatch.setattr(costs, "time", SimpleNamespace(process_time=lambda: next(cpu), perf_counter=lambda: next(wall)))
    found = costs.measure_in_turn({name: lambda name=name: order.append(name) for name in "ab"}, runs=2)
    assert order == ["a", "b"] * 3
    assert found == {"a": (5, 1), "b": (6, 1)}


def test_the_page_shows_the_best_so_far_and_what_is_missing() -> None:
    quality = module("time_to_quality")
    curves = {"MF bpr": [[0.5, 0.1], [1.9, 0.3], [5.5, 0.2]], "MF gravity": [[1.5, 0.25], [6.0, 0.35]]}
    assert quality.best_until(curves["MF bpr"], 5.5) == 0.3 and quality.best_until(curves["MF gravity"], 1.0) is None
    text = quality.page({"ml1m": curves})
    assert "| MF bpr | **0.1000** | **0.3000** | **0.3000** |" in text
    assert "| MF gravity |  | 0.2500 | 0.2500 |" in text
    assert "Not run: " in text and "implicit ALS" in text.partition("Not run: ")[2]
