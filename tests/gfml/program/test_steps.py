"""The steps that programs share: what is judged, the projected step, the refit and the reported weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gfml.base.checkpoints import save_state
from gfml.base.errors import UserError
from gfml.base.settings import Settings
from gfml.data.interactions import csr_from_pairs
from gfml.data.synthetic import generate
from gfml.engine.runs import Run
from gfml.engine.train import FitResult, fit, plain_step
from gfml.mirror import MirrorGradient
from gfml.program import driver
from gfml.program import steps as program
from gfml.program.experiment import Experiment, Training
from gfml.program.program import Program


def test_cut_offs_join_the_lists_and_the_metric_that_selects() -> None:
    assert program.cut_offs((10, 5), "ndcg@20") == (5, 10, 20)
    assert program.cut_offs((10, 20), "recall@20") == (10, 20)
    assert program.cut_offs((5,), "loss") == (5,)


def test_what_cannot_be_judged_is_one_line() -> None:
    data = generate(30, 20, 200, seed=0)
    nothing = csr_from_pairs([], [], 30, 20)
    program.check_judgeable(data, (5, 20), "ndcg@20", "test")
    program.check_judgeable(data, (5,), "loss", "test")
    for ks, metric, select_on, case, word in (
        ((10, 21, 50), "ndcg@10", "test", data, "give --topks 10 20$"),
        ((10,), "recall@50", "test", data, "give --select-metric recall@20$"),
        ((21,), "recall@50", "test", data, "length of 50, .*the 20 items .*give --topks 20 --select-metric recall@20$"),
        ((5,), "ndcg@5", "val", data, "--split global, a larger --val-ratio or --split-ratios"),
        ((5,), "ndcg@5", "test", replace(data, test=nothing), "--split global with --split-ratios"),
    ):
        with pytest.raises(UserError, match=word):
            program.check_judgeable(case, ks, metric, select_on)


def test_step_of_the_flags() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    flags = {"mirror_alpha1": 1.0, "mirror_alpha2": 0.2, "mirror_every": 3, "mirror_clip": None}
    plain = program.build_step(SimpleNamespace(mirror="off", **flags), optimizer, 1.5)
    assert isinstance(plain, partial) and plain.func is plain_step and plain.keywords == {"clip_norm": 1.5}
    mirror = program.build_step(SimpleNamespace(mirror="fused", **flags), optimizer)
    assert isinstance(mirror, MirrorGradient) and mirror.mode == "fused" and mirror.every == 3


class Ball(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([3.0, 4.0]))

    def project(self) -> None:
        self.point.data /= max(1.0, float(self.point.data.norm()))


def test_projection_follows_the_step() -> None:
    ball = Ball()
    optimizer = torch.optim.SGD(ball.parameters(), lr=0.1)
    step = program.ProjectedStep(partial(plain_step, clip_norm=None), ball)
    terms = step(lambda: {"loss": -ball.point.sum()}, optimizer)
    assert terms["loss"].item() == -7.0
    # From (3, 4) uphill by .1 to (3.1, 4.1), then onto the circle.
    expected = torch.tensor([3.1, 4.1]) / torch.tensor([3.1, 4.1]).norm()
    assert torch.allclose(ball.point.detach(), expected)
    assert step.state_dict() == {}


def test_projected_step_keeps_the_inner_state() -> None:
    ball = Ball()
    optimizer = torch.optim.SGD(ball.parameters(), lr=0.1)
    step = program.ProjectedStep(MirrorGradient(optimizer, every=2, counter="epoch"), ball)
    for _ in range(3):
        step(lambda: {"loss": ball.point.square().sum()}, optimizer)
    other = program.ProjectedStep(MirrorGradient(optimizer, every=2, counter="epoch"), ball)
    other.load_state_dict(step.state_dict())
    assert not other.inner.is_mirror_step()
    other.new_epoch()
    assert other.inner.is_mirror_step()


class Small(Experiment):
    """An experiment whose model is a line."""

    def build(self, *, start: bool = True) -> nn.Module:
        torch.manual_seed(0 if start else 1)
        return nn.Linear(self.data, 1)

    def whole(self) -> Small:
        return self

    def training(self, model: nn.Module) -> Training:
        def batches(epoch: int) -> list[torch.Tensor]:
            self.world.calls.append(epoch)
            return [torch.ones(4, 2) * epoch]

        def loss(batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (model(batch) - 1).square().mean()}

        return Training(torch.optim.SGD(model.parameters(), lr=0.05), batches, loss)


def small(inputs: int = 2, **flags: object) -> Small:
    settings = SimpleNamespace(
        seed=0, refit=True, compile=False, amp=False, cuda_graph="auto", checkpoint_every=10, progress=False, **flags
    )
    world = SimpleNamespace(is_main=True, size=1, device=torch.device("cpu"), calls=[])
    return Small(settings, inputs, world)


PROGRAM = Program("toy/main.py", "toy", Settings, Small, "")


def fitted(this: Small, run: Run) -> FitResult:
    model, values = this.build(), iter((0.1, 0.5, 0.3, 0.2))
    training = this.training(model)
    return fit(
        model, training.optimizer, batches=training.batches, loss_fn=training.loss, evaluate=lambda split: {"m": next(values)},
        select="val/m", run=run, epochs=4, progress=False,
    )  # fmt: skip


def test_refit_trains_for_the_selected_epochs_and_continues(tmp_path: Path) -> None:
    this = small()
    with Run.open(tmp_path, "toy", {"seed": 0, "epochs": 4}) as run:
        found = fitted(this, run)
        assert found.best_epoch == 2
        this.world.calls.clear()
        _, first = driver.refit(PROGRAM, this, found, run)
        assert this.world.calls == [1, 2] and (run.path / "refit-2" / "done").exists() and not first.training
        _, second = driver.refit(PROGRAM, this, found, run)  # it is done: nothing is trained, the weights are read
        assert this.world.calls == [1, 2] and torch.equal(first.weight, second.weight)
        assert this.selection(found, run)["protocol"].endswith("trained anew on train and validation")


def test_reported_weights_and_their_selection(tmp_path: Path) -> None:
    this = small()
    with Run.open(tmp_path, "toy", {"seed": 0}) as run:
        found = fitted(this, run)
        assert this.selection(None, run)["epoch"] == found.best_epoch
        best = this.restore(run.path, done=False).weight.clone()
        save_state(run.file("final.pt"), {"model": {"weight": best + 1, "bias": torch.zeros(1)}})
        run.finish({"selection": {"epoch": 7, "protocol": "stored"}})
        assert torch.equal(this.restore(run.path).weight, best + 1)
        assert this.selection(None, run)["epoch"] == 7
        with pytest.raises(UserError, match="another model"):
            small(3).restore(run.path)
