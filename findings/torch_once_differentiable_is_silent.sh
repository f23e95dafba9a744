#!/usr/bin/env bash
# torch 2.15.0: a Function marked @once_differentiable gives a wrong second derivative without an error.
#
# Behaviour: the error "trying to differentiate twice" sits on a copy of the gradient that is no part of the graph of the
# inputs. torch.autograd.grad(first, x), and with it torch.autograd.functional.hessian, never meet it: the Function's share is
# left out and the rest is returned. Only first.backward() raises, and not even that where the upstream gradient is a constant.
# Good guess: the mark exists to raise; any second differentiation raises, or the Hessian is right.
# Who is hurt: gradient penalties, Hessian-vector products, influence functions and implicit gradients through somebody's
# fused kernel: numbers that are plausible and wrong. gradgradcheck does find it.
# Output seen: Hessian of x S(x), S(x) = x^2, at 3: 6 (right: 18), while .backward() raises; of x^2 + S(x): 2 (right: 4) by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torch==2.15.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def second(f, through_backward):
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    if not through_backward:
        return torch.autograd.grad(first, x)[0].item()
    try:
        first.backward()
    except RuntimeError as error:
        return str(error)[:30]
    return x.grad.item()


found = [[second(f, way) for way in (False, True)] for f in (lambda x: x * Square.apply(x), lambda x: x * x + Square.apply(x))]
point = torch.tensor(3.0, dtype=torch.float64)
hessian = torch.autograd.functional.hessian(lambda x: x * Square.apply(x), point).item()
print(found, hessian)
assert found == [[6.0, "trying to differentiate twice "], [2.0, 2.0]] and hessian == 6.0
PYTHON
