"""The training loop and its parts."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from gfml.base.checkpoints import load_state
from gfml.base.errors import UserError
from gfml.base.runs import run_state
from gfml.engine import train
from gfml.engine.runs import Run, seed_everything
from gfml.engine.tracking import Tracker
from gfml.engine.train import BestKeeper, EarlyStopping, TermMeans, WeightAverage, fit, plain_step
from gfml.program.cli import run_main

CONFIG = {"seed": 0}


class Sampler:
    """Batches from a generator of its own, which no seed of the epoch brings back."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, epoch: int) -> list[torch.Tensor]:
        return list(torch.randperm(48, generator=self.generator).split(16))

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


class Problem:
    """Regression with dropout, AdamW, a schedule, averaged weights, a sampler and a step with a state."""

    def __init__(self, *, crash: tuple[int, int] | None = None) -> None:
        seed_everything(0)
        self.x = torch.randn(48, 5)
        self.y = self.x @ torch.randn(5, 1) + 0.5 * torch.randn(48, 1)
        self.model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.7)
        self.ema = WeightAverage(self.model.parameters(), 0.9)
        self.sampler = Sampler()
        self.crash = crash
        self.calls = 0
        self.splits: list[str] = []

    def loss(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.crash is not None and self.calls == self.crash[0] * 3 + self.crash[1]:
            raise KeyboardInterrupt
        error = self.model(self.x[batch]) - self.y[batch]
        mse, size = error.square().mean(), 1e-3 * self.model[0].weight.square().sum()
        return {"loss": mse + size, "mse": mse, "size": size}

    def evaluate(self, split: str) -> dict[str, float]:
        self.splits.append(split)
        assert not self.model.training and not torch.is_grad_enabled()
        torch.rand(3)  # must not disturb training
        return {"fit": -(self.model(self.x) - self.y).square().mean().item(), "zero": 0.0}

    def fit(self, run: Run | None, epochs: int, **options) -> train.FitResult:
        defaults = {
            "batches": self.sampler, "loss_fn": self.loss, "evaluate": self.evaluate, "select": "val/fit", "scheduler": self.scheduler,
            "ema": self.ema, "stateful": {"sampler": self.sampler}, "progress": False,
        }  # fmt: skip
        return fit(self.model, self.optimizer, run=run, epochs=epochs, **(defaults | options))


def open_run(path, name="run") -> Run:
    return Run.open(path, "demo", CONFIG, name=name)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without_clock(rows: list[dict]) -> list[dict]:
    """The same without what the clock says."""
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


def logged(run: Run) -> list[dict]:
    """The rows of metrics.jsonl without what the clock says."""
    return without_clock([json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()])


def equal_files(one: Run, two: Run) -> None:
    """The logged values and the tensors of both checkpoints are the same, bit for bit."""
    assert logged(one) == logged(two)
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(run.path / name, weights_only=True)["state"] for run in (one, two))
        for state in (a, b):
            state.pop("seconds", None)
            state.pop("logged", None)  # of rows with seconds
        assert_equal_trees(a, b)


def assert_equal_trees(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    else:
        assert a == b


# -- EMA


@pytest.mark.parametrize("decay", [0.995, 0.5, 0.0, 1.0])
def test_weight_average_follows_the_recurrence(decay):
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=generator))
    ema = WeightAverage([parameter], decay)
    expected = parameter.detach().clone()
    for n in range(1, 2001):
        with torch.no_grad():
            parameter.add_(torch.randn(4, 3, dtype=torch.float64, generator=generator))
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = expected - (1 - d) * (expected - parameter.detach())
        torch.testing.assert_close(ema.averages[0], expected, rtol=1e-12, atol=1e-12)
    assert ema.num_updates == 2000


def test_decay_cap_is_reached_at_step_1790():
    assert (1 + 1789) / (10 + 1789) < 0.995 <= (1 + 1790) / (10 + 1790)


def test_swapped_brings_live_values_back_bit_for_bit():
    model = nn.Linear(3, 2)
    ema = WeightAverage(model.parameters(), 0.9)
    with torch.no_grad():
        model.weight.mul_(math.pi)
    ema.update()
    live = weights_of(model)
    with ema.swapped() as kept:
        assert same(weights_of(model), ema.averages) and not same(weights_of(model), live)
        assert same(kept, live)
    assert same(weights_of(model), live)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        raise RuntimeError("inside")
    assert same(weights_of(model), live)


def test_averaging_nothing_does_nothing():
    ema = WeightAverage([])
    ema.update()
    with ema.swapped() as live:
        assert live == [] and len(ema) == 0
    ema.load_state_dict(ema.state_dict())


def test_weight_average_state():
    model = nn.Linear(3, 2)
    ema = WeightAverage(model.parameters())
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    other = WeightAverage(nn.Linear(3, 2).parameters())
    other.load_state_dict(ema.state_dict())
    assert same(other.averages, ema.averages) and other.num_updates == 1
    with pytest.raises(ValueError, match="shape"):
        WeightAverage(nn.Linear(4, 2).parameters()).load_state_dict(ema.state_dict())
    with pytest.raises(UserError, match="`lam_d`"):
        WeightAverage([], 1.5)


# -- small parts


def test_early_stopping_counts_exactly():
    stopping = EarlyStopping(3)
    values = [0.1, 0.3, 0.3, 0.2, 0.4, 0.4, 0.4, 0.4]
    assert [stopping.update(value) for value in values] == [False] * 7 + [True]
    assert not any(EarlyStopping(None).update(-float(i)) for i in range(100))
    with pytest.raises(UserError, match="`patience`"):
        EarlyStopping(0)


def test_plain_step_is_an_optimizer_step():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 1), nn.Linear(3, 1)
    two.load_state_dict(one.state_dict())
    x = torch.randn(7, 3)
    sgd = torch.optim.SGD(one.parameters(), 0.1)
    for _ in range(2):  # old gradients must not add up
        terms = plain_step(lambda: {"loss": one(x).square().mean(), "bias": one.bias[0]}, sgd)
        before = two.bias.detach().clone()
        two.zero_grad()
        two(x).square().mean().backward()
        with torch.no_grad():
            for parameter in two.parameters():
                parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(weights_of(one), weights_of(two), rtol=1e-6, atol=1e-6)
    assert not terms["loss"].requires_grad
    assert terms["bias"].item() == pytest.approx(before.item())  # as it was before the step


def test_clipping_bounds_the_whole_gradient():
    model = nn.Linear(4, 2, bias=False)
    start = weights_of(model)[0]
    step = partial(plain_step, clip_norm=0.5)
    step(lambda: {"loss": 1e3 * model.weight.sum()}, torch.optim.SGD(model.parameters(), 1.0))
    assert (model.weight.detach() - start).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_term_means_are_true_means():
    means = TermMeans(1)
    for i in range(5):
        means.add({"loss": torch.tensor(float(i)), "plain": 2.0 * i} | ({"rare": torch.tensor(7.0)} if i == 2 else {}))
    assert means.means() == {"loss": 2.0, "plain": 4.0, "rare": 7.0}


def test_a_loss_on_a_device_is_read_back_every_few_steps(monkeypatch):
    """Where the loss is not on the CPU, only every check_every-th step reads, and the first bad step is still named."""
    flushes = []
    original = TermMeans.flush

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    monkeypatch.setattr(TermMeans, "flush", lambda self: (flushes.append(self.step), original(self))[1])
    means = TermMeans(4, check_every=10)

    def loss(value: float) -> torch.Tensor:
        return torch.tensor(value).as_subclass(Elsewhere)

    for _ in range(13):
        means.add({"loss": loss(1.0)})
    assert flushes == [0]
    means.add({"loss": loss(math.nan), "a": loss(3.0)})
    with pytest.raises(UserError, match=r"nan at epoch 4, step 14 \(loss nan, a 3\)"):
        for _ in range(10):
            means.add({"loss": loss(2.0)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_on_cuda_never_wait_for_the_device():
    model = nn.Linear(4, 1, device="cuda")
    optimizer = torch.optim.Adam(model.parameters())
    ema, means, x = WeightAverage(model.parameters()), TermMeans(1), torch.randn(8, 4, device="cuda")
    plain_step(lambda: {"loss": model(x).square().mean()}, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            means.add(plain_step(lambda: {"loss": model(x).square().mean()}, optimizer))
            ema.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(means.means()["loss"])


# -- fit


def test_fit_learns_and_reports():
    problem = Problem()
    result = problem.fit(None, 8, eval_every=3)
    rows = result.history
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert [row["epoch"] for row in rows if "val/fit" in row] == [3, 6, 8]
    assert rows[-1]["train/loss"] < 0.7 * rows[0]["train/loss"]
    assert all(row["train/loss"] == pytest.approx(row["train/mse"] + row["train/size"]) for row in rows)
    assert rows[0]["lr"] == 0.05 and rows[2]["lr"] == pytest.approx(0.035)
    assert result.best_value == max(row["val/fit"] for row in rows if "val/fit" in row)
    assert result.epochs == 8 and not result.stopped_early and result.train_seconds > 0 and result.eval_seconds > 0
    assert set(problem.splits) == {"valid"} and not problem.model.training
    selection = result.selection()
    assert selection["epoch"] == result.best_epoch and selection["split"] == "val" and selection["metric"] == "fit"
    assert selection["weights"] == "averaged" and selection["protocol"] == "selected on validation"


def test_selecting_on_test_is_labelled():
    problem = Problem()
    result = problem.fit(None, 1, select="test/fit")
    assert problem.splits == ["test"] and "test/fit" in result.history[0]
    assert "optimistic" in result.selection()["protocol"]


@pytest.mark.parametrize("averaged", [True, False])
def test_best_weights_reproduce_their_metric_exactly(tmp_path, averaged):
    problem = Problem()
    with open_run(tmp_path) as run:
        # From epoch 5 on the loss is turned round, so that the weights get worse again.
        def loss(batch):
            terms = problem.loss(batch)
            return terms if problem.calls <= 12 else {"loss": -terms["loss"]}

        options = {} if averaged else {"ema": None}
        result = problem.fit(run, 9, loss_fn=loss, **options)
    assert 1 <= result.best_epoch < 9
    with torch.no_grad():
        assert problem.evaluate("valid")["fit"] == result.best_value
    fresh = Problem()
    info = train.load_best(fresh.model, run.path)
    fresh.model.eval()
    with torch.no_grad():
        assert fresh.evaluate("valid")["fit"] == info["value"] == result.best_value
    assert info == {
        "epoch": result.best_epoch, "metric": "val/fit", "value": result.best_value,
        "weights": "averaged" if averaged else "live",
    }  # fmt: skip
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert logged[result.best_epoch - 1]["val/fit"] == result.best_value


def test_best_file_holds_live_values_of_averaged_weights(tmp_path):
    problem = Problem()
    ema = WeightAverage(problem.model[0].parameters(), 0.9)
    with open_run(tmp_path) as run:
        problem.fit(run, 1, ema=ema)
    best = torch.load(run.path / "best.pt", weights_only=True)["state"]
    last = torch.load(run.path / "last.pt", weights_only=True)["state"]
    assert set(best["live"]) == {"0.weight", "0.bias"}
    for name in best["live"]:
        assert torch.equal(best["live"][name], last["model"][name])
        assert not torch.equal(best["model"][name], last["model"][name])
    assert torch.equal(best["model"]["3.weight"], last["model"]["3.weight"])


def test_best_keeper_ignores_ties():
    keeper = BestKeeper(nn.Linear(1, 1))
    assert [keeper.offer(e, v) for e, v in enumerate([1.0, 1.0, 2.0, 0.5, math.nan, 2.0])] == [1, 0, 1, 0, 0, 0]
    assert (keeper.epoch, keeper.value) == (2, 2.0)


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_patience_counts_evaluations_exactly(patience):
    problem = Problem()
    values = iter([0.1, 0.2, 0.3] + [0.3] * 50)  # the third evaluation is the last better one
    result = problem.fit(
        None, 100, evaluate=lambda split: {"fit": next(values)}, patience=patience, eval_every=2, scheduler=None
    )
    assert result.stopped_early and result.best_epoch == 6 and result.epochs == 6 + 2 * patience


def test_the_untrained_model_can_be_judged(tmp_path):
    with open_run(tmp_path) as run:
        result = Problem().fit(run, 2, evaluate_first=True)
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert result.history[0].keys() == {"epoch", "val/fit", "val/zero", "seconds/eval"}
    assert without_clock(Problem().fit(None, 0).history) == without_clock(result.history[:1])


def test_more_epochs_or_evaluations_do_not_change_earlier_epochs():
    def losses(*args, **options) -> list[float]:
        return [row["train/loss"] for row in Problem().fit(None, *args, **options).history]

    base = losses(6)
    assert losses(3) == base[:3]
    assert losses(6, eval_every=4) == base


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(tmp_path, value):
    problem = Problem()

    def loss(batch):
        terms = problem.loss(batch)
        if problem.calls == 5:
            terms["loss"] = terms["loss"] + value
            terms["extra"] = torch.tensor(value)
        return terms

    message = rf"the loss is {value} at epoch 2, step 2 \(loss {value}, mse .*extra {value}\)"
    with pytest.raises(UserError, match=message), open_run(tmp_path) as run:
        problem.fit(run, 4, loss_fn=loss)
    assert run_state(run.path) == "failed"
    assert torch.load(run.path / "last.pt", weights_only=True)["state"]["epoch"] == 1


def test_user_mistakes(tmp_path):
    with pytest.raises(UserError, match="unknown selection metric 'fti': choose one of fit, zero; did you mean 'fit'"):
        Problem().fit(None, 1, select="val/fti")
    for bad in ("fit", "train/fit", "val/"):
        with pytest.raises(UserError, match="wanted val/METRIC or test/METRIC"):
            Problem().fit(None, 1, select=bad)
    with pytest.raises(UserError, match="val/fit is nan at epoch 1"):
        Problem().fit(None, 1, evaluate=lambda split: {"fit": math.nan})
    with pytest.raises(UserError, match="epoch 1 had no batches"):
        Problem().fit(None, 1, batches=lambda epoch: [])
    with pytest.raises(UserError, match="`eval_every`"):
        Problem().fit(None, 1, eval_every=0)


def test_amp_computes_in_bfloat16():
    problem, seen = Problem(), []

    def loss(batch):
        seen.append(problem.model(problem.x[batch]).dtype)
        return problem.loss(batch)

    problem.fit(None, 1, loss_fn=loss, amp=True)
    problem.fit(None, 1, loss_fn=loss, amp=False)
    assert set(seen[:3]) == {torch.bfloat16} and set(seen[3:]) == {torch.float32}
    assert problem.model[0].weight.dtype == torch.float32


def test_compiled_loss(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    problem = Problem()
    problem.fit(None, 1, compile_loss=True)
    assert compiled == [problem.loss]
    problem.fit(None, 1)
    assert len(compiled) == 1


# -- continuing


def test_two_halves_equal_the_whole(tmp_path):
    with open_run(tmp_path, "whole") as whole:
        expected = Problem().fit(whole, 8, eval_every=2, patience=50)
    with open_run(tmp_path, "halves") as halves:
        Problem().fit(halves, 4, eval_every=2, patience=50)
    with open_run(tmp_path, "halves") as halves:
        problem = Problem()
        result = problem.fit(halves, 8, eval_every=2, patience=50)
        assert problem.calls == 4 * 3
    equal_files(whole, halves)
    assert (result.best_epoch, result.best_value) == (expected.best_epoch, expected.best_value)
    assert without_clock(result.history) == without_clock(expected.history)


@pytest.mark.parametrize("options", [{"ema": None}, {"scheduler": None}, {"ema": WeightAverage([])}])
def test_two_halves_equal_the_whole_without_some_part(tmp_path, options):
    with open_run(tmp_path, "whole") as whole:
        Problem().fit(whole, 4, **options)
    for epochs in (2, 4):
        with open_run(tmp_path, "halves") as halves:
            Problem().fit(halves, epochs, **options)
    # A shared empty average counts on; what matters is that nothing else differs.
    assert logged(whole) == logged(halves)


@pytest.mark.parametrize("crash", [(0, 2), (3, 1), (4, 3), (6, 2)])
@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_an_interrupted_run_continues_as_if_never_stopped(tmp_path, crash, checkpoint_every):
    options = {"eval_every": 4, "checkpoint_every": checkpoint_every, "evaluate_first": True}
    with open_run(tmp_path, "whole") as whole:
        Problem().fit(whole, 8, **options)
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path, "broken") as broken:
        Problem(crash=crash).fit(broken, 8, **options)
    assert run_state(broken.path) == "incomplete"
    with open_run(tmp_path, "broken") as broken:
        Problem().fit(broken, 8, **options)
    equal_files(whole, broken)


@pytest.mark.parametrize("where", ["log", "checkpoint", "save_best"])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_between_any_two_files_continues_exactly(tmp_path, monkeypatch, where, after):
    with open_run(tmp_path, "whole") as whole:
        Problem().fit(whole, 5)
    original, calls = getattr(Run, where), []

    def breaks(self, *args):
        calls.append(1)
        if after:
            original(self, *args)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        if not after:
            original(self, *args)

    monkeypatch.setattr(Run, where, breaks)
    with pytest.raises(RuntimeError, match="power cut"), open_run(tmp_path, "broken") as broken:
        Problem().fit(broken, 5)
    monkeypatch.undo()
    with open_run(tmp_path, "broken") as broken:
        Problem().fit(broken, 5)
    equal_files(whole, broken)


@pytest.mark.parametrize(("seconds", "kept"), [(1e9, [3, 4, 6]), (-1.0, [1, 2, 3, 4, 5, 6])])
def test_checkpoints_are_written_when_due(tmp_path, monkeypatch, seconds, kept):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", seconds)
    saved = []
    monkeypatch.setattr(Run, "checkpoint", lambda self, state: saved.append(state["epoch"]))
    with open_run(tmp_path) as run:
        Problem().fit(run, 6, eval_every=4, checkpoint_every=3)
    assert saved == kept


def test_early_stopping_survives_a_break(tmp_path):
    def evaluate(problem):
        # 0.2 at the second evaluation is never beaten.
        return lambda split: {"fit": 0.2 if problem.calls == 6 else 0.1}

    for epochs in (3, 50, 60):
        with open_run(tmp_path) as run:
            problem = Problem()
            problem.calls = 3 * len(run.metrics())
            result = problem.fit(run, epochs, patience=4, evaluate=evaluate(problem))
    assert result.epochs == 6 and result.stopped_early and result.best_epoch == 2
    assert len(run.metrics()) == 6


def test_a_finished_fit_gives_its_result_again(tmp_path):
    with open_run(tmp_path) as run:
        first = Problem().fit(run, 3)
        problem = Problem()
        again = problem.fit(run, 3)
    assert problem.calls == 0 and again == first
    with torch.no_grad():
        assert problem.evaluate("valid")["fit"] == first.best_value


def test_state_of_a_step_is_kept(tmp_path):
    class Counting:
        def __init__(self):
            self.count, self.epochs = 0, 0

        def __call__(self, closure, optimizer):
            self.count += 1
            return plain_step(closure, optimizer)

        def new_epoch(self):
            self.epochs += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    for epochs in (2, 3):
        step = Counting()
        with open_run(tmp_path) as run:
            Problem().fit(run, epochs, step=step)
    assert step.count == 9 and step.epochs == 1


def test_mirror_step_continues_exactly(tmp_path):
    mirror = pytest.importorskip("gfml.mirror")

    def run_to(name, *stages):
        for epochs in stages:
            problem = Problem()
            with open_run(tmp_path, name) as run:
                problem.fit(run, epochs, step=mirror.MirrorGradient(problem.optimizer, every=4))
        return run

    equal_files(run_to("whole", 4), run_to("halves", 2, 4))


def test_checkpoints_of_something_else_are_refused(tmp_path):
    with open_run(tmp_path) as run:
        Problem().fit(run, 1)
    other = Problem()
    other.model[0] = nn.Linear(5, 8)
    with open_run(tmp_path) as run:
        with pytest.raises(UserError, match=r"checkpoint .*last.pt \(of another model.*delete it") as error:
            other.fit(run, 2)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="last.pt.*it holds ema.*wanted optimizer"):
            Problem().fit(run, 2, ema=None, scheduler=None, stateful=None)
        with pytest.raises(UserError, match="best.pt.*another model"):
            train.load_best(other.model, run.path)
        (run.path / "last.pt").write_bytes(b"PK")
        with pytest.raises(UserError, match="last.pt.*cut short"):
            Problem().fit(run, 2)


def test_lost_or_foreign_best_weights_are_told(tmp_path):
    values = iter([0.9, 0.1, 0.1, 0.1])
    with open_run(tmp_path) as run:
        Problem().fit(run, 2, evaluate=lambda split: {"fit": next(values)})
        best = run.path / "best.pt"
        content = run.load_best()
        run.save_best(content | {"epoch": 2})
        with pytest.raises(UserError, match="best.pt.*of epoch 2, wanted epoch 1"):
            Problem().fit(run, 3)
        best.unlink()
        with pytest.raises(UserError, match="best.pt.*it is missing.*`overwrite`"):
            Problem().fit(run, 3)


def test_sigterm_keeps_the_epoch_it_came_in(tmp_path, capsys, monkeypatch):
    """Of short epochs: the run then goes on as if nothing had been. A second signal, or a long epoch, ends at once."""

    whole = Problem()
    with open_run(tmp_path, "whole") as expected:
        whole.fit(expected, 6, eval_every=6)

    def stopped(name: str, *, times: int, first: int) -> Run:
        """A run that gets SIGTERM in its third epoch."""

        class Stopped(Problem):
            def loss(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
                if self.calls == 3 * first + 1:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGTERM)
                return super().loss(batch)

        def main(argv: object) -> None:
            with open_run(tmp_path, name) as run:
                Stopped().fit(run, 6, eval_every=6)

        assert run_main(main) == 143 and run_state(tmp_path / name) == "incomplete"
        assert (
            f"terminated: the run is incomplete; continue it with --resume {tmp_path / name}" in capsys.readouterr().err
        )
        return open_run(tmp_path, name)

    with stopped("once", times=1, first=2) as run:
        assert run.load_checkpoint()["epoch"] == 3
        Problem().fit(run, 6, eval_every=6)
    equal_files(expected, run)
    with stopped("twice", times=2, first=2) as run:
        assert run.load_checkpoint() is None
    with stopped("early", times=1, first=0) as run:
        assert run.load_checkpoint() is None
    monkeypatch.setattr(train, "GRACE_SECONDS", -1e9)
    with stopped("long", times=1, first=2) as run:
        assert run.load_checkpoint() is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_tensorboard_shows_each_epoch_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for crash in ((3, 1), None):
        with contextlib.suppress(KeyboardInterrupt), open_run(tmp_path) as run:
            with Tracker(run.file("tensorboard")) as tracker:
                Problem(crash=crash).fit(run, 5, eval_every=2, tracker=tracker)
    events = EventAccumulator(str(run.file("tensorboard"))).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    shown = {event.step: event.value for event in events.Scalars("val/fit")}
    logged = {row["epoch"]: row["val/fit"] for row in run.metrics() if "val/fit" in row}
    assert shown == pytest.approx(logged) and list(logged) == [2, 4, 5]


# -- what the user sees


def test_lines_without_a_terminal(capsys):
    Problem().fit(None, 4, eval_every=2, progress=None)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 2
    assert lines[0].startswith("epoch    2  loss ") and "val/fit " in lines[0] and " * " in lines[0]


def test_silence_and_a_forced_bar(capsys):
    Problem().fit(None, 2, progress=False)
    assert capsys.readouterr().err == ""
    Problem().fit(None, 2, progress=True)
    assert "2.0/2 epochs" in capsys.readouterr().err


def test_continuing_is_announced(tmp_path, capsys):
    for epochs in (1, 2):
        with open_run(tmp_path) as run:
            Problem().fit(run, epochs, progress=None)
    assert "continuing after epoch 1" in capsys.readouterr().err


def test_without_selection_the_last_epoch_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = WeightAverage(model.parameters(), 0.9)
    inputs = torch.randn(8, 3)
    with Run.open(tmp_path, "toy", {"seed": 0}) as run:
        found = fit(
            model,
            optimizer,
            batches=lambda epoch: [inputs],
            loss_fn=lambda batch: {"loss": model(batch).square().mean()},
            evaluate=None,
            select=None,
            run=run,
            epochs=4,
            ema=average,
            progress=None,
        )
    # Nothing is judged, so every epoch has its line.
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said if line.startswith("epoch ")] == ["1", "2", "3", "4"]
    assert found.best_epoch == 4 and found.selection()["rule"] == "last epoch"
    assert not any(key.startswith("val/") for row in found.history for key in row)
    # The averages are what is judged, so they are what is kept.
    assert torch.equal(model.weight, average.averages[0])
    assert torch.equal(load_state(tmp_path / run.id / "best.pt")["model"]["weight"], model.weight)
