"""torch's optimizers without its compiler: the same steps, states and settings."""

import copy
import subprocess
import sys

import pytest
import torch

from gfml.base.optim import light

KINDS = [
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
]


@pytest.mark.parametrize(("kind", "how"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_the_steps_are_torchs(kind, how):
    torch.manual_seed(3)
    first, second = torch.randn(7, 5), torch.randn(5)
    found = []
    for make in (kind, light(kind)):
        parameters = [torch.nn.Parameter(first.clone()), torch.nn.Parameter(second.clone())]
        optimizer = make([{"params": [parameters[0]], "lr": 3e-3}, {"params": [parameters[1]]}], **how)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        state = None
        for step in range(6):
            optimizer.zero_grad()
            ((parameters[0] @ parameters[1]) ** 2).sum().backward()
            optimizer.step()
            schedule.step()
            if step == 3:  # a checkpoint in between, as a continued run has it
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make([{"params": [parameters[0]]}, {"params": [parameters[1]]}], **how)
                optimizer.load_state_dict(state)
                schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        assert isinstance(optimizer, kind)
        found.append((parameters, optimizer.state_dict(), state))
    (one, state_one, _), (two, state_two, _) = found
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert state_one["param_groups"] == state_two["param_groups"]
    for number, values in state_one["state"].items():
        for key, value in values.items():
            assert value is state_two["state"][number][key] is None or torch.equal(
                value, state_two["state"][number][key]
            )


def test_a_closure_has_gradients():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = light(torch.optim.AdamW)([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 and float(weight.detach()[0]) < 1


@pytest.mark.slow
def test_no_compiler_is_imported():
    code = """
import sys, torch
from gfml.engine.optimizers import OPTIMIZERS, build_optimizer
for name in OPTIMIZERS:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = build_optimizer(name, [{"params": [weight], "weight_decay": 0.1}], 0.1)
    optimizer.zero_grad()
    (weight**2).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
