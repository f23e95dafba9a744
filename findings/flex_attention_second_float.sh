#!/usr/bin/env bash
# torch 2.15.0: a compiled flex_attention works with the first float its score_mod closes over and refuses the second.
#
# Behaviour: score_mod multiplies the scores by a Python float of the enclosing scope (a temperature, a soft cap, the slope of
# a layer). The first value compiles and is right. Called again with another value the compiler makes the float symbolic, which
# the operator does not take: "RuntimeError when making fake tensor call", dynamic=False or not. Two ints, two 0-d tensors
# and two values of the argument ``scale`` work.
# Good guess: a recompilation, or one kernel that reads the number; either way the right output.
# Who is hurt: models whose layers differ in one number, and annealed temperatures: layer 1 trains, layer 2 fails, and a test
# of one layer or one epoch shows nothing.
# Output seen: float [right, refused], int [right, right], tensor [right, right].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torch==2.15.0 numpy
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.attention.flex_attention import flex_attention

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))


def outcome(call, factor):
    def modified(score, batch, head, row, column):
        return score * factor

    try:
        found = call(q, k, v, score_mod=modified)
    except RuntimeError as error:
        assert "making fake tensor call" in str(error) and "SymFloat" in str(error)
        return "refused"
    wanted = torch.softmax(q @ k.mT / 4 * factor, -1) @ v
    return "right" if torch.allclose(found, wanted, atol=1e-5) else "wrong"


pairs = {"float": (0.5, 0.7), "int": (2, 3), "tensor": (torch.tensor(0.5), torch.tensor(0.7))}
found = {}
for name, factors in pairs.items():
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention)
    with torch.no_grad():
        found[name] = [outcome(compiled, factor) for factor in factors]
print(found)
assert found == {"float": ["right", "refused"], "int": ["right", "right"], "tensor": ["right", "right"]}
PYTHON
