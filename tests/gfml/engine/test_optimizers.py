from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from gfml import fused
from gfml.engine import optimizers
from gfml.engine.optimizers import LazyAdagrad, LazyAdamW, build_optimizer
from gfml.engine.train import plain_step
from gfml.fused import FusedPairLoss, touched_rows
from gfml.gravity import Gravity
from gfml.mirror import MODES, MirrorGradient
from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples

LAZY = {"lazy_adamw": LazyAdamW, "adagrad": LazyAdagrad}
SHAPES = ((11, 6), (11,), (), (5, 3, 2))


def gradients(shape, number, kind=torch.float64):
    """Half of the rows are 0, others in every step; a touched row has a 0 somewhere."""
    generator = torch.Generator().manual_seed(number)
    gradient = torch.randn(shape, generator=generator, dtype=kind)
    if shape:
        gradient[torch.rand(shape[0], generator=generator) < 0.5] = 0
    if len(shape) == 2:
        gradient[:, 0] = 0
    return gradient


def plain_adamw(rows, steps, lr, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """One row after the other, in Python floats. rows: [N][D]; steps: gradients [T][N][D]."""
    m, v = (np.zeros_like(rows) for _ in range(2))
    for t, step in enumerate(steps, 1):
        for r, gradient in enumerate(step):
            if not any(gradient):
                continue
            for d, g in enumerate(gradient):
                m[r][d] = beta1 * m[r][d] + (1 - beta1) * g
                v[r][d] = beta2 * v[r][d] + (1 - beta2) * g * g
                move = (m[r][d] / (1 - beta1**t)) / (math.sqrt(v[r][d] / (1 - beta2**t)) + eps)
                rows[r][d] = rows[r][d] * (1 - lr * decay) - lr * move
    return rows


def test_lazy_adamw_against_a_plain_loop() -> None:
    start = torch.randn(11, 6, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = LazyAdamW([parameter], lr=0.1, weight_decay=0.3)
    steps = [gradients((11, 6), number) for number in range(6)]
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    wanted = plain_adamw(start.numpy(), [step.tolist() for step in steps], 0.1, 0.3)
    np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_rows_touched_it_is_adamw(shape) -> None:
    found = []
    for kind in (LazyAdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = kind([{"params": [parameter], "weight_decay": 0.2}], lr=0.05, betas=(0.8, 0.95), eps=1e-3)
        for number in range(5):
            parameter.grad = gradients(shape, number) + 3
            optimizer.step()
        found.append((parameter, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*found, check_dtype=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_decay_lazy_adagrad_is_adagrad(shape) -> None:
    found = []
    for kind in (LazyAdagrad, torch.optim.Adagrad):
        parameter = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = kind([parameter], lr=0.05, initial_accumulator_value=0.1)
        for number in range(5):
            parameter.grad = gradients(shape, number)
            optimizer.step()
        found.append((parameter, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", LAZY)
def test_rows_without_gradient_stay_bit_for_bit(name: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(11, 6))
    optimizer = LAZY[name]([parameter], lr=0.1, weight_decay=0.5)
    for number in range(4):
        parameter.grad = gradients((11, 6), number, torch.float32)
        still = (parameter.grad == 0).all(1)
        before = parameter.detach().clone()
        state = {key: value.clone() for key, value in optimizer.state[parameter].items()} if number else {}
        optimizer.step()
        assert 0 < still.sum() < 11
        assert torch.equal(parameter[still], before[still])
        assert (parameter != before).any(1).equal(~still)
        for key, value in state.items():
            if key != "step":
                assert torch.equal(optimizer.state[parameter][key][still], value[still])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAZY)
def test_the_rule_for_other_devices_is_the_same(name: str, shape, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kinds in (optimizers._KINDS, ()):
        monkeypatch.setattr(optimizers, "_KINDS", kinds)
        parameter = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = LAZY[name]([parameter], lr=0.1, weight_decay=0.1)
        for number in range(5):
            parameter.grad = gradients(shape, number)
            optimizer.step()
        found.append(parameter)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAZY)
def test_any_number_of_threads_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "COORDINATES_PER_THREAD", 1)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            parameter = torch.nn.Parameter(torch.ones(50, 33))
            optimizer = LAZY[name]([parameter], lr=0.1)
            for step in range(3):
                parameter.grad = gradients((50, 33), step, torch.float32)
                optimizer.step()
            found.append(parameter)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Problem:
    """A gravity model with gradients by formula or by autograd."""

    def __init__(self, name: str, *, by_formula: bool = True) -> None:
        torch.manual_seed(0)
        self.encoder, self.gravity = Tables(12, 9, 4).double(), Gravity(12, 9, learn_lamb=True).double()
        self.parameters = [*self.encoder.parameters(), *self.gravity.parameters()]
        self.loss = FusedPairLoss(self.encoder, self.gravity, "gravity", decay=0.1)
        self.by_formula = by_formula
        self.optimizer = build_optimizer(name, [{"params": self.parameters, "weight_decay": 0.1}], 0.1)

    def closure(self, number: int):
        generator = torch.Generator().manual_seed(number)
        batch = Triples(*(torch.randint(n, (4,), generator=generator) for n in (12, 9, 9)))

        def call():
            terms = self.loss(batch)
            if self.by_formula:
                return terms
            # The same gradients as tensors of which nobody knows the rows.
            terms["loss"].backward()
            fixed = [p.grad.clone() for p in self.parameters]
            assert touched_rows(self.encoder.nodes.grad) is not None
            self.optimizer.zero_grad(set_to_none=True)
            return {"loss": sum((p * g).sum() for p, g in zip(self.parameters, fixed, strict=True))}

        return call

    def train(self, numbers, step=None):
        for number in numbers:
            if step is not None:
                step(self.closure(number), self.optimizer)
                continue
            self.optimizer.zero_grad(set_to_none=True)
            self.closure(number)()["loss"].backward()
            self.optimizer.step()
        return [p.detach().clone() for p in self.parameters]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_known_and_searched_rows_give_the_same_bits(name: str) -> None:
    found, wanted = (Problem(name, by_formula=by_formula).train(range(10)) for by_formula in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_stored_state_goes_on_bit_for_bit(name: str) -> None:
    whole = Problem(name).train(range(8))
    first, second = Problem(name), Problem(name)
    first.train(range(5))
    state = copy.deepcopy(first.optimizer.state_dict())
    for parameter, value in zip(second.parameters, first.parameters, strict=True):
        parameter.data.copy_(value)
    second.optimizer.load_state_dict(state)
    assert all(torch.equal(one, other) for one, other in zip(second.train(range(5, 8)), whole, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAZY)
def test_the_mirror_runs_through_lazy_optimizers(name: str, mode: str) -> None:
    if (name, mode) == ("adagrad", "precond"):
        pytest.skip("precond is defined for Adam's second moment")
    found = []
    for by_formula in (True, False):
        problem = Problem(name, by_formula=by_formula)
        found.append(problem.train(range(6), MirrorGradient(problem.optimizer, 1.0, 0.4, 2, mode, clip=0.2)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_closure_is_evaluated() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for kind in LAZY.values():
        optimizer = kind([parameter])
        assert optimizer.step(lambda: parameter.sum()) == parameter.sum()


@pytest.mark.parametrize("name", ("lazy_adamw", "adagrad"))
def test_a_graph_of_the_old_values_is_refused_after_a_step(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    loss = parameter.square().sum()
    parameter.grad = torch.ones(3, 2)
    build_optimizer(name, [{"params": [parameter], "weight_decay": 0.0}], 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ("adamw", "lazy_adamw"))
def test_gradients_handed_over_give_the_same_steps(name: str) -> None:
    wanted = Problem(name).train(range(10))
    problem = Problem(name)
    found = problem.train(range(10), plain_step)
    assert problem.encoder.nodes.grad is None and problem.gravity.mass.item.grad is not None
    exact = name != "adamw"  # torch rounds some products together with their sums
    torch.testing.assert_close(found, wanted, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-12)
    mixed = Problem(name)  # a step with a gradient, one without
    for number in range(10):
        mixed.train([number], plain_step if number % 3 else partial(plain_step, clip_norm=1e9))
    torch.testing.assert_close([p.detach() for p in mixed.parameters], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("adamw", "lazy_adamw"))
def test_two_losses_of_a_table_are_added_before_the_step(name: str) -> None:
    found = []
    for by_hand in (True, False):
        problem = Problem(name)
        for number in range(0, 9, 3):
            several = [problem.closure(number + more) for more in range(3)]

            def total(several=several):
                return {"loss": sum(one()["loss"] for one in several)}

            if by_hand:
                problem.optimizer.zero_grad(set_to_none=True)
                total()["loss"].backward()
                problem.optimizer.step()
            else:
                plain_step(total, problem.optimizer)
        found.append([p.detach() for p in problem.parameters])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("adamw", "lazy_adamw"))
def test_handed_over_gradients_with_any_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "COORDINATES_PER_THREAD", 1)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(Problem(name).train(range(8), plain_step))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_gradient_handed_over_on_the_way_to_an_error_is_dropped() -> None:
    problem = Problem("lazy_adamw")
    with pytest.raises(ValueError, match="on the way"), problem.optimizer.taking():
        problem.closure(0)()["loss"].backward()
        raise ValueError("on the way")
    before = problem.encoder.nodes.detach().clone()
    problem.optimizer.step()
    assert torch.equal(problem.encoder.nodes, before) and not hasattr(problem.encoder.nodes, "taken")
