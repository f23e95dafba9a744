"""The attention kernels in Triton's interpreter, which runs them on the CPU, against the closed form in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
# Triton reads the variable when it is imported, so the comparison is a program of its own.
PROGRAM = """
import json, sys
import torch
from gfml.attention import power_law_attention, power_law_weights

torch.manual_seed(0)
torch.set_num_threads(1)
found = []
for batch, heads, n, d, shape, learned, alpha in json.loads(sys.argv[1]):
    q, k, v = torch.randn(batch, n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
    column = torch.randn(shape)
    beta = torch.rand(heads, 1, 1) + 0.1 if learned else torch.tensor(0.7)
    above = torch.randn(batch, heads, n, d)
    results = []
    for exact in (True, False):
        kind = torch.float64 if exact else torch.float32
        inputs = [part.detach().to(kind).requires_grad_() for part in (q, k, v, column, beta)]
        *rows, b = inputs
        b = b if learned else 0.7
        if exact:
            out = power_law_weights(*rows[:2], 0.3 * rows[3], b, alpha) @ rows[2]
        else:
            out = power_law_attention(*rows, b, scale=0.3, alpha=alpha)
        out.backward(above.to(kind))
        results.append([out, *(part.grad for part in (inputs if learned else inputs[:4]))])
    found.append([float((a.double() - b).norm() / b.norm()) for b, a in zip(*results)])
try:  # the upstream gradient of a sum is a constant
    torch.autograd.grad(out.sum() + q.square().sum(), inputs[0], create_graph=True)
    found.append([1.0])
except RuntimeError as error:
    assert "no second derivative" in str(error)
print(json.dumps(found))
"""
CASES = {
    "one block, a shared mass": (2, 3, 9, 8, [1, 1, 9], False, 0.0),
    "a mass for every head, learned lambda": (1, 2, 17, 24, [2, 1, 17], True, 0.2),
    "masses of keys": (2, 1, 33, 16, [2, 1, 1, 33], True, 0.0),
    "several blocks, blended": (1, 2, 150, 16, [1, 1, 150], True, 0.1),
}


def test_kernels_equal_the_closed_form() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(CASES.values()))],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, errors in zip((*CASES, "create_graph went through"), json.loads(done.stdout), strict=False):
        assert max(errors) < 1e-5, (name, errors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, limit", ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize("n", (9, 65, 128, 197))
def test_a_gpu_gives_the_closed_form(n: int, dtype: torch.dtype, limit: float) -> None:
    from gfml.attention import power_law_attention, power_law_weights

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 32, device="cuda").to(dtype) for _ in range(3))
    column, beta, above = (
        torch.randn(1, 1, n, device="cuda"),
        torch.rand(3, 1, 1, device="cuda"),
        torch.randn(2, 3, n, 32, device="cuda"),
    )
    results = []
    for exact in (True, False):
        inputs = [(part.double() if exact else part).detach().requires_grad_() for part in (q, k, v, column, beta)]
        if exact:
            out = power_law_weights(*inputs[:2], 0.3 * inputs[3], inputs[4], 0.1) @ inputs[2]
        else:
            out = power_law_attention(*inputs, scale=0.3, alpha=0.1)
        out.backward(above.to(out.dtype))
        results.append([out, *(part.grad for part in inputs)])
    for wanted, found in zip(*results, strict=True):
        assert (found.double() - wanted).norm() < limit * wanted.norm()
