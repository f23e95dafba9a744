#!/usr/bin/env bash
# torch 2.15.0: a step of a fused optimizer is not seen by autograd, which then differentiates a loss at two points.
#
# Behaviour: a loss is computed, the optimizer steps, then the loss goes backward. With foreach or plain loops torch refuses
# ("modified by an inplace operation"). With fused=True (AdamW, Adam, SGD, Adagrad) the parameter's version stays what it
# was: backward runs and gives the gradient of the old graph at the new weights, 1.8 where 2.0 is right.
# Good guess: fused=True is the same step, faster; every in-place step counts as a change, so all three are refused alike.
# Who is hurt: loops that step one optimizer before all losses are differentiated (two players, mirror steps, delayed
# gradients): switching on fused=True turns an error into wrong gradients.
# Output seen: foreach refused, fused 1.8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torch==2.15.0
"$folder/env/bin/python" - <<'PYTHON'
import torch

found = {}
for how in ("foreach", "fused"):
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
        weight = torch.nn.Parameter(torch.ones(3))
        loss = weight.square().sum()
        weight.grad = torch.ones(3)
        kind([weight], lr=0.1, **{how: True}).step()
        weight.grad = None
        try:
            loss.backward()
            found[how, kind.__name__] = round(float(weight.grad[0]), 2)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            found[how, kind.__name__] = "refused"
print(found)
assert all(value == ("refused" if how == "foreach" else 1.8) for (how, _), value in found.items())
PYTHON
